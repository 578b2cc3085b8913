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
//! thread), `release` (the sync thread), `reads` (what may touch the disk), `checkpoint`, `recovery` (how it all begins).

mod admission;
mod checkpoint;
mod clock;
mod core;
mod inbox;
mod reads;
mod recovery;
mod release;
mod runner;
mod sink;
#[cfg(test)]
mod tests;

pub use admission::{Admission, ConnectionGate, Gate, Overloaded, REQUEST_OVERHEAD};
pub(crate) use clock::wall_ms;
pub use core::ShardOptions;
pub(crate) use inbox::Inbox;
pub use inbox::Submission;
pub use recovery::StartError;
pub(crate) use recovery::{Running, StorageOptions, start};
pub use runner::CheckpointOptions;
pub(crate) use sink::Once;
pub use sink::{Answer, Origin, Responder, Sink, Token};
