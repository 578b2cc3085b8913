//! Looks through what is stored although nobody asks for it, so that damage is found while there is still another copy of
//! the records somewhere.
//!
//! Reads sealed segments batch by batch, as a reader would, at a bounded rate, and says in the log what cannot be read: topic,
//! partition, offsets, file and position. Changes nothing. What the page cache holds is not read from the device again; what
//! has been there for long is mostly not in it.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::error::ReadError;
use super::segment::Segment;
use super::view::ReadView;
use super::views::Views;
use crate::engine::types::PartitionKey;

/// Bytes read at a time; also what a reader of the same disk may have to wait for.
const PIECE_BYTES: usize = 256 << 10;

/// How much is looked at, and how often.
#[derive(Clone, Debug)]
pub struct ScrubOptions {
    /// Bytes read in a second at most; 0 to look at nothing.
    pub bytes_per_second: u64,
    /// Time between the beginnings of two looks at everything.
    pub interval: Duration,
}

impl Default for ScrubOptions {
    /// Nothing is looked at.
    fn default() -> Self {
        Self { bytes_per_second: 0, interval: Duration::from_hours(24) }
    }
}

/// Stored records that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub topic: Arc<str>,
    pub partition: PartitionKey,
    /// From the first that cannot be read to the first that can be read again.
    pub offsets: Range<u64>,
    pub file: PathBuf,
    /// Where the damaged batch begins, in bytes.
    pub position: u64,
    pub reason: String,
}

/// What one piece of work came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scrubbed {
    /// So many bytes are whole.
    Whole(usize),
    Damaged(Damage),
    /// Everything has been looked at; the next piece begins anew.
    Round,
}

/// Takes one piece after the other, blocking on the disk.
#[derive(Debug)]
pub(crate) struct Scrubber {
    views: Arc<Views>,
    todo: VecDeque<PartitionKey>,
    /// Next offset of the first of `todo`.
    offset: u64,
    begun: bool,
}

impl Scrubber {
    pub(crate) fn new(views: Arc<Views>) -> Self {
        Self { views, todo: VecDeque::new(), offset: 0, begun: false }
    }

    /// Looks at the next piece.
    pub(crate) fn step(&mut self) -> Scrubbed {
        if !self.begun {
            self.begun = true;
            self.todo = self.views.all().iter().map(|view| view.partition()).collect();
        }
        while let Some(partition) = self.todo.front() {
            if let Some(view) = self.views.get(*partition)
                && let Some(scrubbed) = self.look_at(&view)
            {
                return scrubbed;
            }
            self.todo.pop_front();
            self.offset = 0;
        }
        self.begun = false;
        Scrubbed::Round
    }

    /// `None` when there is nothing left to look at in the partition.
    fn look_at(&mut self, view: &ReadView) -> Option<Scrubbed> {
        let segments = view.segments();
        // The last segment is still written to, and read by everybody.
        for pair in segments.windows(2) {
            let (segment, end) = (&pair[0], pair[1].name().base_offset);
            if end <= self.offset {
                continue;
            }
            let from = self.offset.max(segment.name().base_offset);
            match segment.read(&view.context().files, from, end, PIECE_BYTES) {
                Ok(batches) => {
                    self.offset = batches.last().map_or(end, |batch| batch.last_offset + 1);
                    return Some(Scrubbed::Whole(batches.iter().map(|batch| batch.bytes.len()).sum()));
                }
                // Retention was faster.
                Err(_) if view.is_removed() || view.segment(segment.name()).is_none() => self.offset = end,
                Err(ReadError::Corrupt { file, position, reason, .. }) => {
                    self.offset = readable_from(view, segment, from, end);
                    return Some(Scrubbed::Damaged(Damage {
                        topic: view.topic().clone(),
                        partition: view.partition(),
                        offsets: from..self.offset,
                        file,
                        position,
                        reason,
                    }));
                }
                Err(error) => {
                    tracing::warn!(%error, "a segment cannot be looked through");
                    self.offset = end;
                }
            }
        }
        None
    }
}

/// The first offset above `damaged` that can be read again, or `end`.
fn readable_from(view: &ReadView, segment: &Arc<Segment>, damaged: u64, end: u64) -> u64 {
    let is_readable = |offset| segment.read(&view.context().files, offset, end, 0).is_ok();
    let (mut below, mut above, mut step) = (damaged, end, 1);
    while below + step < end {
        if is_readable(below + step) {
            above = below + step;
            break;
        }
        below += step;
        step *= 2;
    }
    while below + 1 < above {
        let middle = below + (above - below) / 2;
        if is_readable(middle) { above = middle } else { below = middle }
    }
    above
}
