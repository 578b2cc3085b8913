//! The shard: one engine, one journal, one thread that decides and writes, one that syncs, one that checkpoints.
//!
//! ```text
//!  listeners ── Submission ──▶ inbox ──▶ shard thread ── Release ──▶ sync thread
//!      ▲                         ▲        (core, runner)               │    │
//!      │                         └──────── News::Synced ◀──────────────┘    │
//!      └─ Answer, Delivery ◀── sinks ◀── `written` ┴─────── `synced` ◀──────┘
//! ```
//!
//! Order of reading: `admission` (bytes are admitted before they are queued), `inbox`, `core` (one turn), `runner` (the
//! thread), `reference` (what the journal only refers to), `release` (the sync thread), `room` (when the disk is full), `reads` (what may touch the disk), `checkpoint`, `recovery` (how it all begins).
//! `stepped` is the same without threads; `advance` moves a clock that stands still by itself.

mod admission;
mod advance;
mod checkpoint;
mod clock;
mod core;
mod inbox;
mod reads;
mod recovery;
mod reference;
mod release;
mod room;
mod runner;
mod scrub;
mod sink;
mod stepped;
#[cfg(test)]
mod tests;

pub use admission::{Admission, ConnectionGate, Gate, Overloaded, REQUEST_OVERHEAD};
pub(crate) use advance::{settle, step};
pub use core::ShardOptions;
pub(crate) use inbox::Inbox;
pub use inbox::Submission;
pub use recovery::{Replayed, StartError, StorageOptions};
pub(crate) use recovery::{Running, start};
pub use reference::ReferenceOptions;
pub use room::RoomOptions;
pub use runner::CheckpointOptions;
pub(crate) use sink::Once;
pub use sink::{Answer, Origin, Responder, Sink, Token};
pub use stepped::{Did, Stepped};
