//! Writing a whole segment beside those that are there, for the cleaner.
//!
//! Invariant: a segment that [`SegmentRewriter::finish`] has answered for is on the device, with its name. Nobody reads it
//! before an event has put it into its partition; until then it is the business of whoever writes it to remove it, or that
//! of the next start.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::BatchHeader;

use super::error::ReadError;
use super::index::Index;
use super::view::ReadView;
use crate::disk::DiskFile;
use crate::engine::effect::SegmentName;
use crate::plants::planted;

/// Bytes gathered for one write.
const WRITE_BYTES: usize = 1024 * 1024;

/// A segment that is being written.
#[derive(Debug)]
pub struct SegmentRewriter {
    view: Arc<ReadView>,
    name: SegmentName,
    file: Arc<dyn DiskFile>,
    index: Index,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
}

/// A segment that is complete and on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewritten {
    pub name: SegmentName,
    pub bytes: u64,
    /// Greatest timestamp of its records, Unix ms.
    pub max_timestamp: i64,
}

impl SegmentRewriter {
    /// Creates the file. The name must be nobody else's.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    pub fn create(view: &Arc<ReadView>, name: SegmentName) -> Result<Self, ReadError> {
        let files = &view.context().files;
        let file = files.disk().create(&files.log_path(name)).map_err(|error| files.io(name, error))?;
        Ok(Self {
            view: Arc::clone(view),
            name,
            file,
            index: Index::starting_at(0, name.base_offset),
            waiting: Vec::new(),
            waiting_bytes: 0,
        })
    }

    pub fn name(&self) -> SegmentName {
        self.name
    }

    /// Appends a batch, which must follow the one before without a hole.
    ///
    /// # Errors
    /// [`ReadError::Io`]; the segment is worth nothing then.
    pub fn append(&mut self, header: &BatchHeader, bytes: Bytes) -> Result<(), ReadError> {
        let length = bytes.len() as u64;
        self.index.push(header.base_offset, header.last_offset(), header.max_timestamp, length);
        self.waiting_bytes += bytes.len();
        self.waiting.push(bytes);
        if self.waiting_bytes >= WRITE_BYTES { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), ReadError> {
        let position = self.index.end_position() - self.waiting_bytes as u64;
        let mut slices: Vec<_> = self.waiting.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let written = self.file.write_all_vectored_at(&mut slices, position);
        self.waiting.clear();
        self.waiting_bytes = 0;
        written.map_err(|error| self.view.context().files.io(self.name, error))
    }

    /// Writes the rest and the index, and syncs. Blocks.
    ///
    /// # Errors
    /// [`ReadError::Io`]; the segment is worth nothing then.
    pub fn finish(mut self) -> Result<Rewritten, ReadError> {
        self.write()?;
        let files = &self.view.context().files;
        let finish = || -> io::Result<()> {
            if !planted("swap-before-sync") {
                self.file.sync_data()?;
            }
            files.write_index(self.name, &self.index.encode(self.name.base_offset))?;
            // The directories above may be as new as the file.
            let directory = files.directory(self.name.partition);
            directory
                .ancestors()
                .take(3)
                .map(Path::to_path_buf)
                .try_for_each(|dir| files.disk().sync_dir(&dir))
        };
        finish().map_err(|error| files.io(self.name, error))?;
        Ok(Rewritten {
            name: self.name,
            bytes: self.index.end_position(),
            max_timestamp: self.index.max_timestamp(),
        })
    }
}

/// Removes segments that were written and are not to be put into their partition.
pub fn discard(view: &ReadView, names: &[SegmentName]) {
    let files = &view.context().files;
    for &name in names {
        if let Err(error) = files.remove(name) {
            tracing::warn!(file = %files.log_path(name).display(), %error, "a segment could not be removed");
        }
        if view.is_removed() {
            files.remove_empty(name.partition);
        }
    }
}
