//! Log lines: `tracing` events to stderr, as text or as JSON.
//!
//! stdout belongs to the answers of the command line (and to `serve`'s one line with its address), so nothing is logged there.
//! What is logged is chosen with `FELUCCA_LOG`, in the syntax of `tracing`'s filters (`info,felucca_broker::shard=debug`).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::settings::LogFormat;

/// Names the filter.
pub const ENV_FILTER: &str = "FELUCCA_LOG";

/// The filter's text cannot be used, or logging was set up already.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{ENV_FILTER} is not a log filter: {0}")]
    Filter(#[from] ParseError),
    #[error("logging is set up already")]
    Twice,
}

/// Starts logging for the whole process; `default_filter` holds when `FELUCCA_LOG` is not set.
pub fn init(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let text = std::env::var(ENV_FILTER).unwrap_or_else(|_| default_filter.to_owned());
    let filter = EnvFilter::builder().parse(text)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).try_init(),
    }
    .map_err(|_| TelemetryError::Twice)
}
