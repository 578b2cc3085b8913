//! What happened in a run: the last lines for people, a checksum over all of them for comparing two runs.

use std::collections::VecDeque;

/// Lines kept.
const KEPT: usize = 400;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Trace {
    lines: VecDeque<String>,
    hash: u64,
    /// Steps begun.
    pub(crate) steps: u64,
}

impl Default for Trace {
    fn default() -> Self {
        Self { lines: VecDeque::new(), hash: 0xcbf2_9ce4_8422_2325, steps: 0 }
    }
}

impl Trace {
    pub(crate) fn note(&mut self, line: String) {
        for byte in line.bytes().chain([b'\n']) {
            // FNV-1a.
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(format!("{:>5} {line}", self.steps));
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }

    pub(crate) fn digest(&self) -> u64 {
        self.hash
    }
}
