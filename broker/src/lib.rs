//! The Felucca broker as a library; the `felucca` binary is a thin shell around it.

pub mod config;
pub mod settings;
pub mod telemetry;
