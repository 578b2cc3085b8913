//! The Felucca broker as a library; the `felucca` binary is a thin shell around it.

pub mod checkpoint;
pub mod config;
pub mod disk;
pub mod engine;
pub mod journal;
pub mod log;
pub mod settings;
pub mod telemetry;
