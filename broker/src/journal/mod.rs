//! The write-ahead journal: the one file sequence that everything else on disk is a projection of.
//!
//! ```text
//!   shard thread                sync thread              background thread
//!   Journal::append ──▶ file ◀── Syncer::sync             prepares the next file,
//!        │  one vectored write      fdatasync              recycles released ones
//!        └── Journal::mark, release
//! ```
//!
//! A [`Journal`] owns a directory of numbered files; `file.rs` and `frame.rs` hold their formats byte by byte. A frame is
//! atomic: after a crash it is there with all its events and batches, or not at all.
//!
//! Invariants:
//! - Data frames have dense LSNs from 1; frames lie in LSN order within a file and across the chain of files.
//! - Every frame tells the highest LSN known to be on the device when it was written (`synced`), and that claim is true
//!   for ever. The last frames before a pause are covered by a mark.
//! - A file that follows another holds no synced frame before the other is synced completely.
//! - A frame may refer to bytes in other files ([`Outside`]), written before it. It counts as synced only when they are
//!   on the device too; one that was not synced counts after a crash only if they are whole ([`Replay::complete`]).
//! - After the first failed write or sync nothing is written or synced any more: what the page cache holds then is
//!   known to nobody. Restarting is the way out.
//! - Nothing that a finished recovery has left out ever comes back, and nothing that it has returned is lost later:
//!   see `recovery.rs`.
//!
//! Deliberately absent: knowledge of what events mean, waiting, and the clock. When to sync, to mark and to release is
//! the shard's decision.

mod dump;
mod file;
mod frame;
mod prepare;
mod reader;
mod recovery;
mod repair;
mod syncer;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use dump::{Dump, DumpItem, DumpedFile, DumpedFrame, FrameState};
pub use file::FORMAT_VERSION;
pub use frame::FrameKind;
pub use recovery::{Completed, Replay};
pub use repair::{Damage, Repair, RepairError, Unreadable};
pub use syncer::Syncer;
pub use writer::{Journal, Recovered};

use crate::engine::types::Lsn;
use crate::environment::Environment;

/// Sizes and habits of a journal. Sizes are rounded up to whole sectors.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Size of the file that a start writes synchronously, in bytes. It grows past that while the next file is not
    /// ready yet.
    pub first_file_bytes: u64,
    /// Size of the files prepared in the background, in bytes; at least large enough for the largest frame.
    pub file_bytes: u64,
    /// Largest frame, in bytes, header and table of batch lengths (64 + 4 per batch) included.
    pub max_frame_bytes: u64,
    /// Most released files that are kept for recycling: about what one interval between two checkpoints takes.
    pub spare_files: usize,
    /// Whether a background thread prepares files. Without it the append that needs a file prepares it, which
    /// simulation wants for its order of operations.
    pub background: bool,
    /// Where the salts of files come from.
    pub environment: Environment,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            first_file_bytes: 1 << 20,
            file_bytes: 64 << 20,
            max_frame_bytes: 20 << 20,
            spare_files: 18,
            background: true,
            environment: Environment::default(),
        }
    }
}

impl JournalOptions {
    /// The same options made consistent: aligned, and with files that hold the largest frame.
    fn settled(mut self) -> Self {
        self.max_frame_bytes = self.max_frame_bytes.clamp(frame::HEADER_BYTES, u64::from(u32::MAX));
        let least = file::FIRST_FRAME + frame::padded(self.max_frame_bytes);
        self.file_bytes = frame::padded(self.file_bytes.max(least));
        self.first_file_bytes = frame::padded(self.first_file_bytes.max(file::FIRST_FRAME));
        self
    }
}

/// What of a frame's batches lies elsewhere.
#[derive(Debug, Default)]
pub struct Outside {
    /// Bytes that are not in the frame.
    pub bytes: u64,
    /// The files that they are in.
    pub files: Vec<Arc<dyn OutsideFile>>,
}

/// A file that frames refer to.
pub trait OutsideFile: Send + Sync + std::fmt::Debug {
    /// Where it is; two of the same path are the same file.
    fn path(&self) -> &Path;

    /// Returns once everything written to the file so far is on the device. Blocks.
    fn sync(&self) -> io::Result<()>;
}

/// Why a call on an open journal failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// The frame was not written; the journal goes on.
    #[error("a journal frame of {bytes} bytes exceeds the limit of {limit}")]
    FrameTooLarge {
        /// Size of the refused frame.
        bytes: u64,
        /// [`JournalOptions::max_frame_bytes`].
        limit: u64,
    },
    /// The journal has stopped for good; every later call returns the same failure.
    #[error("the journal has stopped: {0}")]
    Stopped(Arc<Failure>),
}

/// The first thing that went wrong with a journal.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", file.display())]
pub struct Failure {
    /// What was tried.
    pub action: FailedAction,
    /// On which file.
    pub file: PathBuf,
    /// What the disk said.
    pub source: io::Error,
}

/// What a journal was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedAction {
    /// Making the file that the next frame needs.
    Prepare,
    /// Writing a frame.
    Write,
    /// Bringing written frames to the device.
    Sync,
}

impl std::fmt::Display for FailedAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FailedAction::Prepare => "prepare the next file in",
            FailedAction::Write => "write to",
            FailedAction::Sync => "sync",
        })
    }
}

/// Why a journal cannot be opened. `E` is the error of the function that frames are replayed into.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError<E> {
    /// Something that had been synced is damaged or missing. The broker must not start on this journal.
    #[error("{} is damaged at byte {position}: {reason}", file.display())]
    Corrupt {
        /// The damaged or missing file.
        file: PathBuf,
        /// Offset in the file of the frame or header that cannot be read.
        position: u64,
        /// What was found, and what proves that it was once whole.
        reason: String,
    },
    /// The disk failed; trying again may help.
    #[error("cannot access {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// A newer broker wrote this journal.
    #[error("{} has journal format version {found}; this build reads up to version {supported}", file.display())]
    NewerFormat {
        /// The first such file found.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// [`FORMAT_VERSION`].
        supported: u32,
    },
    /// A frame was read whole, and its content was refused.
    #[error("frame {lsn} cannot be replayed: {source}")]
    Apply {
        /// The frame.
        lsn: Lsn,
        /// What the replay function said.
        source: E,
    },
}
