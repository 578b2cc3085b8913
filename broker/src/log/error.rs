//! Why the log cannot be read or written.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Why a read gave nothing. End of data is no error: it is an empty result.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The records were removed by retention. The caller decides where to go on.
    #[error("the log starts at offset {log_start}")]
    BelowStart { log_start: u64 },
    /// Nothing was ever visible there.
    #[error("the log ends at offset {high_watermark}")]
    AboveEnd { high_watermark: u64 },
    /// The partition was deleted; look it up again.
    #[error("the partition was deleted")]
    Removed,
    /// What is stored is not what was written. Retrying does not help; other offsets may still be readable.
    #[error("{} is damaged at byte {position} (offset {offset}): {reason}", file.display())]
    Corrupt { file: PathBuf, position: u64, offset: u64, reason: String },
    /// The disk failed. Retrying may help.
    #[error("cannot read {}: {source}", file.display())]
    Io { file: PathBuf, source: io::Error },
}

/// The first write or sync that failed. The segment writer stays in this state: what the page cache holds is not
/// trusted any more, and a restart replays from the journal.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", file.display())]
pub struct LogFailure {
    /// What was being done: "write", "sync", …
    pub action: &'static str,
    pub file: PathBuf,
    pub source: Arc<io::Error>,
}
