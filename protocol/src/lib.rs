//! Felucca's wire and record formats: bytes in, bytes out.
//!
//! * [`frame`]: the envelope of every request, reply, error and push on a connection.
//! * [`api`]: which request a frame carries. [`error`]: the codes that say why one failed.
//! * [`message`]: the protobuf messages, one module generated from `proto/felucca.proto`.
//! * [`batch`]: RecordBatch v2, the only form in which record data is sent, stored and served.
//! * [`partitioner`]: the partition of a key, the same for every client.
//!
//! **Invariants.** No socket, file, clock or thread is touched here. Bytes from outside never cause a panic, and no
//! allocation is sized by a length that has not been checked against a limit or against bytes that are really there.

pub mod api;
pub mod batch;
pub mod error;
pub mod frame;
pub mod message;
pub mod partitioner;

pub use api::Api;
pub use error::ErrorCode;

/// The newest version of the native protocol that this crate speaks.
pub const PROTOCOL_VERSION: u32 = 1;
