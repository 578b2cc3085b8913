//! The Felucca broker as a library; the `felucca` binary is a thin shell around it.

pub mod broker;
pub mod byte_size;
pub mod checkpoint;
pub mod cleaner;
pub mod config;
pub mod disk;
pub mod engine;
pub mod environment;
pub mod journal;
pub mod listener;
pub mod log;
pub mod plants;
pub mod redrive;
pub mod server;
pub mod settings;
pub mod shard;
pub mod status;
pub mod telemetry;
