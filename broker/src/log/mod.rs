//! The log: the records of every partition, as segments on disk and tails in memory, and the views through which
//! readers see them.
//!
//! ```text
//!   shard ── append ──▶ tail of the partition ──────────────▶ readers (visible once published)
//!                └────▶ queue ──▶ segment writer ──▶ segment ──▶ readers (once it has left the tail)
//! ```
//!
//! The log is a projection of the journal: the engine decides every position, replay repeats every write, and nothing
//! here is needed to recover but the bytes up to the checkpointed end of each segment. So the log may be written late,
//! in large pieces, and synced only for the checkpoint.
//!
//! A large batch may be written to its segment ahead of its frame, which then refers to it: see `ahead`.
//!
//! Order of reading: `view` (what readers see), `tail`, `segment`, `walk` (reading and proving), `index`, `queue`,
//! `writer` (its front), `thread` (what it does), `rewrite` (whole segments beside those that are there), `scan` (looking
//! into batches), `exact` (single records out of them), `reread` (what was read for both); `scrub` looks for damage,
//! `inspect` looks at segment files from outside.

mod ahead;
mod error;
mod exact;
mod files;
mod index;
mod inspect;
mod lru;
mod queue;
mod reread;
mod rewrite;
mod scan;
mod scrub;
mod segment;
mod tail;
#[cfg(test)]
mod tests;
mod thread;
mod view;
mod views;
mod walk;
mod writer;

pub use ahead::Stored;
pub use error::{LogFailure, ReadError};
pub use exact::ExactReadError;
pub use inspect::{Flaw, Inspected, SegmentFile};
pub use rewrite::{Rewritten, SegmentRewriter, discard};
pub use scan::{Scanned, read_record, scan, scan_memory};
pub use scrub::{Damage, ScrubOptions};
pub(crate) use scrub::{Scrubbed, Scrubber};
pub use view::ReadView;
pub use views::Views;
pub use writer::{Condemned, LogOptions, SegmentWriter, Wake};
