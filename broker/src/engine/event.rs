//! The events of the journal and the rows of the checkpoint, generated from `proto/journal.proto`.

#![allow(clippy::all, unreachable_pub, missing_docs, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/felucca.journal.rs"));
