//! Batches that are written to their segment before the frame that appends them, so that the frame needs only to refer to
//! them and their bytes are written once.
//!
//! ```text
//!   shard ── write ahead ──▶ segment ──▶ journal.append(header, place) ──▶ queue: counts as written in its turn
//!                               ▲                        │
//!                               └─── synced with it ─────┘
//! ```
//!
//! Invariants: the name of a segment is on the device before any frame refers to it, so that one that a start does not
//! find was removed, which proves that its frames were synced; a frame does not count as synced before the segment is
//! ([`crate::journal::OutsideFile`]); positions are the engine's, so a batch may be written before those in front
//! of it are, but counts as written only behind them. The shard's thread alone writes ahead.

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{self, BatchHeader};

use super::error::LogFailure;
use super::segment::Segment;
use super::thread::Shared;
use super::view::ReadView;
use super::writer::SegmentWriter;
use crate::disk::DiskFile;
use crate::engine::effect::{SegmentName, SegmentWrite};
use crate::journal::OutsideFile;
use crate::plants::planted;

/// What a start finds of a batch that an unsynced frame refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    Whole(Bytes),
    /// The segment was removed, after the frame was synced.
    Gone,
    /// Not all of it reached the device.
    Torn,
}

/// A segment that frames refer to.
struct ReferredSegment {
    shared: Arc<Shared>,
    segment: Arc<Segment>,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
}

impl std::fmt::Debug for ReferredSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ReferredSegment").field(&self.path).finish()
    }
}

impl OutsideFile for ReferredSegment {
    fn path(&self) -> &Path {
        &self.path
    }

    fn sync(&self) -> io::Result<()> {
        let _one_at_a_time = self.segment.syncing.lock();
        if let Some(failure) = self.shared.failure() {
            return Err(io::Error::other(failure.to_string()));
        }
        self.file.sync_data().map_err(|error| {
            let failure = self.shared.fail("sync", self.path.clone(), error);
            io::Error::new(failure.source.kind(), failure.source.to_string())
        })
    }
}

impl SegmentWriter {
    /// Whether [`Self::write_ahead`] may be asked to write to a segment.
    pub fn knows(&self, segment: SegmentName) -> bool {
        self.shared.place(segment).is_some()
    }

    /// Writes batches of one segment ahead of their frame; they are then given to [`Self::append`] as stored. Nothing was
    /// written to their places before. Blocks for a copy into the page cache, and for the first batch of a segment until
    /// its name is on the device.
    ///
    /// # Errors
    /// The log has failed, now or before; nothing may be appended any more.
    pub fn write_ahead(&self, writes: &[&SegmentWrite]) -> Result<Option<Arc<dyn OutsideFile>>, LogFailure> {
        let Some((_, segment)) = writes.first().and_then(|write| self.shared.place(write.segment)) else {
            return Ok(None);
        };
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let path = self.shared.context.files.log_path(segment.name());
        let fail = |action, error| self.shared.fail(action, path.clone(), error);
        let file = self.shared.open(&segment).map_err(|error| fail("open", error))?;
        if !segment.named.load(Ordering::Relaxed) {
            // The directories above may be as new as the file.
            let above = path.ancestors().skip(1).take(3);
            above
                .into_iter()
                .try_for_each(|directory| self.shared.context.files.disk().sync_dir(directory))
                .map_err(|error| fail("sync the directories of", error))?;
            segment.named.store(true, Ordering::Relaxed);
        }
        for run in writes.chunk_by(|one, next| one.position + one.length == next.position) {
            let Some(first) = run.first() else { continue };
            let mut slices: Vec<_> = run.iter().map(|write| IoSlice::new(&write.bytes)).collect();
            file.write_all_vectored_at(&mut slices, first.position).map_err(|error| fail("write", error))?;
        }
        let shared = Arc::clone(&self.shared);
        Ok(Some(Arc::new(ReferredSegment { shared, segment, file, path })))
    }

    /// Looks for a batch, of which the beginning is known, in its place. For a start. Blocks.
    ///
    /// # Errors
    /// The disk failed; or what is known is not the beginning of a batch.
    pub fn find_stored(&self, segment: SegmentName, position: u64, beginning: &[u8]) -> io::Result<Stored> {
        let header = BatchHeader::parse(beginning).map_err(io::Error::other)?;
        let file = match self.shared.context.files.open(segment) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stored::Gone),
            file => file?,
        };
        let mut bytes = BytesMut::zeroed(header.length as usize);
        let read = file.read_full_at(&mut bytes, position)?;
        let whole = read == bytes.len() && bytes.starts_with(beginning) && batch::check(&bytes).is_ok();
        if planted("skip-reference-check") {
            bytes[..beginning.len()].copy_from_slice(beginning);
            return Ok(Stored::Whole(bytes.freeze()));
        }
        Ok(if whole { Stored::Whole(bytes.freeze()) } else { Stored::Torn })
    }

    /// Path of a segment.
    pub fn segment_path(&self, segment: SegmentName) -> PathBuf {
        self.shared.context.files.log_path(segment)
    }
}

impl Shared {
    /// Takes in a batch that a replayed frame refers to. It is in its segment, and nowhere else: so what is in front of it
    /// must be, too, before readers may be sent there.
    pub(super) fn take_stored(&self, view: &Arc<ReadView>, segment: &Arc<Segment>, write: &SegmentWrite) {
        let has_unwritten = view.tail().lock().has_unwritten(write.base_offset);
        // A failure is found by whoever appends.
        if has_unwritten && self.write_out().is_err() || self.seal_before(view, segment).is_err() {
            return;
        }
        let written = segment.written();
        if write.position != written {
            let reason = format!("position {} was decided, {written} bytes are written", write.position);
            self.fail("continue", self.context.files.log_path(segment.name()), io::Error::other(reason));
            return;
        }
        self.context.budget.let_go(view, write.last_offset + 1);
        let end = write.position + write.length;
        segment.stage(end);
        segment.has(write);
        self.refer(segment.name(), end);
    }
}
