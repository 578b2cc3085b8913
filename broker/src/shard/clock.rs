//! Time and randomness for the engine.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::engine::types::Now;

/// Monotonic time goes on from where the journal's ended; wall time is the system's; entropy is a small generator's.
#[derive(Debug)]
pub(crate) struct Clock {
    /// Monotonic time at `started`.
    base_ms: u64,
    started: Instant,
    entropy: u64,
}

impl Clock {
    /// A clock whose monotonic time goes on from `base_ms`.
    pub(crate) fn starting_at(base_ms: u64) -> Self {
        // The system's randomness; the truncation is wanted.
        let seed = Uuid::new_v4().as_u128() as u64;
        Self { base_ms, started: Instant::now(), entropy: seed }
    }

    pub(crate) fn now(&mut self) -> Now {
        Now { monotonic_ms: self.monotonic_ms(), wall_ms: wall_ms(), entropy: self.next_entropy() }
    }

    pub(crate) fn monotonic_ms(&self) -> u64 {
        let passed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base_ms.saturating_add(passed)
    }

    /// How long it is until a monotonic time.
    pub(crate) fn until(&self, monotonic_ms: u64) -> Duration {
        Duration::from_millis(monotonic_ms.saturating_sub(self.monotonic_ms()))
    }

    /// SplitMix64.
    fn next_entropy(&mut self) -> u64 {
        self.entropy = self.entropy.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.entropy;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Unix milliseconds; 0 for a clock set before 1970.
pub(crate) fn wall_ms() -> i64 {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(passed.as_millis()).unwrap_or(i64::MAX)
}
