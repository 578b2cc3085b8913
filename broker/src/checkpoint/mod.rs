//! The checkpoint: the engine's state as rows, as it was at one LSN, so that recovery replays only the journal after it.
//!
//! Two files take turns, `checkpoint-a.redb` and `checkpoint-b.redb`, each an embedded transactional store. A commit goes
//! to the older one, in one transaction: what the newer one says changed in its last interval, and what has changed
//! since. So the other file, which nobody touches meanwhile, is always a whole checkpoint, one interval older; the journal
//! is kept back to it, and damage to one file costs replay, not data.
//!
//! Invariants: a file under its real name holds at least one committed checkpoint (it is made under another name and
//! renamed); LSNs of commits never fall; every row, the list of what changed last, and the meta value carry checksums,
//! and the rows also a count and a sum: a row that is damaged, lost or left over is noticed, and then nothing of that
//! file is used.
//!
//! # Format, version 1 (integers big-endian)
//!
//! ```text
//! table "rows"    key → CRC-32 (IEEE) of key and value · value
//! table "recent"  keys that the last commit changed (or removed) → nothing
//! table "meta"    one value:
//!                  0  4  format version = 1
//!                  4  8  LSN: the rows are the state after this frame
//!                 12  8  LSN of the commit before, 0 if there was none
//!                 20  8  the engine's monotonic time, ms
//!                 28  8  number of rows      36  8  sum of the rows' CRCs, modulo 2^64
//!                 44  8  number of recent    52  8  sum of the CRC-32s of the recent keys, modulo 2^64
//!                 60  4  CRC-32 of the bytes before
//! ```
//!
//! What rows mean is the engine's business. A version is raised when the layout above changes or when older code would
//! misread the rows; a file of a newer version is refused, never overwritten.

mod backend;
mod inspect;
mod slot;
mod store;
#[cfg(test)]
mod tests;

pub use inspect::{Inspected, Whole, inspect, read_rows};
pub use store::{CheckpointError, CheckpointStore, Loaded, Row};
