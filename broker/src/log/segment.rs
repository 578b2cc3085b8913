//! One segment: a file of record batches, one after the other, exactly as the wire carries them.
//!
//! ```text
//! <data>/log/<topic uuid>/<partition>/<base offset, 20 digits>-<generation>.log      batches, nothing else
//!                                     <base offset, 20 digits>-<generation>.index    see `index`
//! ```
//!
//! Invariants: bytes are written at positions that the engine decided, once each, by the segment writer or ahead of it (see
//! `ahead`); what counts as *written*, which only the segment writer says, never changes again, and readers look at nothing
//! else. Whatever the file holds beyond that is left over from before a crash, and is cut off by the first write after
//! the replay. A file is created by its first write.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use felucca_protocol::batch::BatchHeader;
use parking_lot::Mutex;
use tracing::warn;

use super::error::ReadError;
use super::files::SegmentFiles;
use super::index::{BLOCK_BYTES, Block, Index};
use super::walk::{self, Walker};
use crate::engine::effect::{SegmentName, SegmentWrite};

/// A batch and where it stands.
#[derive(Clone, Debug)]
pub(super) struct PlacedBatch {
    pub(super) segment: Arc<Segment>,
    pub(super) position: u64,
    pub(super) base_offset: u64,
    /// Inclusive.
    pub(super) last_offset: u64,
    pub(super) max_timestamp: i64,
    pub(super) bytes: Bytes,
    /// The file has its bytes already.
    pub(super) stored: bool,
}

#[derive(Debug)]
enum State {
    /// The newest segment; the index grows with it. Bytes before `head` were written before this process started and
    /// are indexed only when somebody asks for them: a start must not read every partition.
    Growing { index: Index, head: u64 },
    /// Complete; its index is on disk, or is rebuilt when it is not.
    Sealed {
        end: u64,
        /// Once the index was looked at; damage counts as the greatest.
        max_timestamp: Option<i64>,
    },
}

#[derive(Debug)]
pub(super) struct Segment {
    name: SegmentName,
    /// What was written before this process started is of offsets below.
    bound: u64,
    state: Mutex<State>,
    /// Bytes including those that wait to be written.
    staged_end: AtomicU64,
    /// It was seen to that the file ends where it should.
    prepared: AtomicBool,
    /// Its name is known to be on the device.
    pub(super) named: AtomicBool,
    /// Held while the file is prepared.
    pub(super) preparing: Mutex<()>,
    /// Held while the file is synced, until a failure of that is known to everybody: the next sync would not fail again.
    pub(super) syncing: Mutex<()>,
    /// Held while an index is read or rebuilt, so that it happens once. Like the two above it is held over I/O; only
    /// threads that may block take it.
    loading: Mutex<()>,
}

impl Segment {
    /// A segment of which `end` bytes were written before, of offsets below `bound`; `sealed` when another one follows.
    pub(super) fn new(name: SegmentName, end: u64, bound: u64, sealed: bool) -> Self {
        let state = if sealed {
            State::Sealed { end, max_timestamp: None }
        } else {
            State::Growing { index: Index::starting_at(end, name.base_offset), head: end }
        };
        Self {
            name,
            bound,
            state: Mutex::new(state),
            staged_end: AtomicU64::new(end),
            prepared: AtomicBool::new(false),
            named: AtomicBool::new(false),
            preparing: Mutex::new(()),
            syncing: Mutex::new(()),
            loading: Mutex::new(()),
        }
    }

    pub(super) fn name(&self) -> SegmentName {
        self.name
    }

    /// Bytes of the segment, those included that wait to be written.
    pub(super) fn staged_end(&self) -> u64 {
        self.staged_end.load(Ordering::Relaxed)
    }

    pub(super) fn stage(&self, end: u64) {
        self.staged_end.store(end, Ordering::Relaxed);
    }

    pub(super) fn is_growing(&self) -> bool {
        matches!(&*self.state.lock(), State::Growing { .. })
    }

    pub(super) fn is_prepared(&self) -> bool {
        self.prepared.load(Ordering::Relaxed)
    }

    pub(super) fn set_prepared(&self) {
        self.prepared.store(true, Ordering::Relaxed);
    }

    /// Bytes that can be read from the file.
    pub(super) fn written(&self) -> u64 {
        match &*self.state.lock() {
            State::Growing { index, .. } => index.end_position(),
            State::Sealed { end, .. } => *end,
        }
    }

    /// These batches are in the file now, from [`Self::written`] on.
    pub(super) fn wrote<'b>(&self, batches: impl IntoIterator<Item = &'b PlacedBatch>) {
        if let State::Growing { index, .. } = &mut *self.state.lock() {
            for batch in batches {
                let length = batch.bytes.len() as u64;
                index.push(batch.base_offset, batch.last_offset, batch.max_timestamp, length);
            }
        }
    }

    /// As [`Self::wrote`], of one batch whose bytes nobody has at hand.
    pub(super) fn has(&self, write: &SegmentWrite) {
        if let State::Growing { index, .. } = &mut *self.state.lock() {
            index.push(write.base_offset, write.last_offset, write.max_timestamp, write.length);
        }
    }

    /// Writes the index and closes the segment: nothing is appended from now on.
    ///
    /// A segment that cannot be indexed because it is damaged is sealed all the same; readers are told when they come.
    ///
    /// # Errors
    /// The index file cannot be written.
    pub(super) fn seal(&self, files: &SegmentFiles) -> io::Result<()> {
        match self.lookup(files, |_| false, Index::clone) {
            // Never written to, so there is no file either; or damaged, and to be looked at again; or removed, as the
            // replay will come to.
            Ok(index) if index.end_position() == 0 || index.is_damaged() || files.is_gone(self.name) => {}
            Ok(index) => {
                files.write_index(self.name, &index.encode(self.name.base_offset))?;
                files.keep_index(self.name, &Arc::new(index));
            }
            Err(error) => warn!(%error, "a segment is sealed without an index"),
        }
        let mut state = self.state.lock();
        if let State::Growing { index, .. } = &*state {
            *state = State::Sealed { end: index.end_position(), max_timestamp: None };
        }
        Ok(())
    }

    /// Batches from the one that holds `offset`, or the first above it, while they end below `end_offset` and fit
    /// `max_bytes` (the first always does). Empty when the segment holds none. Blocks on the disk.
    pub(super) fn read(
        self: &Arc<Self>,
        files: &SegmentFiles,
        offset: u64,
        end_offset: u64,
        max_bytes: usize,
    ) -> Result<Vec<PlacedBatch>, ReadError> {
        let look = |index: &Index| (index.block_for_offset(offset), index.end_position(), index.end_offset());
        let (block, end, indexed_end) = self.lookup(files, |first| first <= offset, look)?;
        let Some(block) = block.filter(|_| offset < indexed_end) else { return Ok(Vec::new()) };
        let mut walker = Walker::new(files, self, block, end)?;
        // The wanted batch lies somewhere within its block.
        let mut ahead = max_bytes.saturating_add(BLOCK_BYTES as usize);
        let mut batches = Vec::new();
        let mut taken = 0;
        loop {
            let step = walker.peek(ahead).and_then(|header| {
                let Some(header) = header else { return Ok(None) };
                if header.last_offset() < offset {
                    walker.skip(&header, ahead)?;
                    return Ok(Some(None));
                }
                let fits = taken == 0 || taken + header.length as usize <= max_bytes;
                // The last offset is not trusted before the CRC is checked. It ends below the visible end as well, since
                // that always falls between batches.
                if header.base_offset >= end_offset || !fits {
                    return Ok(None);
                }
                let position = walker.position();
                let bytes = walker.take(&header, ahead)?;
                Ok(Some(Some(self.placed(position, &header, bytes))))
            });
            match step {
                Ok(Some(None)) => {}
                Ok(Some(Some(batch))) => {
                    taken += batch.bytes.len();
                    ahead = max_bytes.saturating_sub(taken);
                    batches.push(batch);
                }
                Ok(None) => return Ok(batches),
                // What is whole is given out; the next read begins at the damage and reports it.
                Err(_) if !batches.is_empty() => return Ok(batches),
                Err(error) => return Err(error),
            }
        }
    }

    /// The first batch that ends at or above `from` and has a record of at least `timestamp`. Blocks on the disk.
    pub(super) fn find_timestamp(
        self: &Arc<Self>,
        files: &SegmentFiles,
        timestamp: i64,
        from: u64,
    ) -> Result<Option<PlacedBatch>, ReadError> {
        if let State::Sealed { max_timestamp: Some(latest), .. } = &*self.state.lock()
            && *latest < timestamp
        {
            return Ok(None);
        }
        let look = |index: &Index| {
            let by_time = index.block_for_timestamp(timestamp)?;
            let by_offset = index.block_for_offset(from)?;
            let later = if by_time.position < by_offset.position { by_offset } else { by_time };
            Some((later, index.end_position()))
        };
        let Some((block, end)) = self.lookup(files, |_| false, look)? else { return Ok(None) };
        let mut walker = Walker::new(files, self, block, end)?;
        while let Some(header) = walker.peek(BLOCK_BYTES as usize)? {
            if header.last_offset() >= from && header.max_timestamp >= timestamp {
                let position = walker.position();
                let bytes = walker.take(&header, 0)?;
                return Ok(Some(self.placed(position, &header, bytes)));
            }
            walker.skip(&header, BLOCK_BYTES as usize)?;
        }
        Ok(None)
    }

    fn placed(self: &Arc<Self>, position: u64, header: &BatchHeader, bytes: Bytes) -> PlacedBatch {
        PlacedBatch {
            segment: Arc::clone(self),
            position,
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            max_timestamp: header.max_timestamp,
            bytes,
            stored: true,
        }
    }

    /// The block that begins at `position`.
    pub(super) fn block_at(&self, files: &SegmentFiles, position: u64) -> Result<Option<Block>, ReadError> {
        // Whoever walks here came from a block before, so what is indexed begins below.
        self.lookup(files, |_| true, |index| index.block_at(position))
    }

    /// Looks something up in the index. A growing segment that is indexed only from some offset on is indexed from its
    /// start first, unless `suffices` says of that offset that this part will do.
    fn lookup<R>(
        &self,
        files: &SegmentFiles,
        suffices: impl Fn(u64) -> bool,
        look: impl FnOnce(&Index) -> R,
    ) -> Result<R, ReadError> {
        loop {
            let end = match &*self.state.lock() {
                State::Growing { index, head } => {
                    if *head == 0 || index.first_offset().is_some_and(&suffices) {
                        return Ok(look(index));
                    }
                    None
                }
                State::Sealed { end, .. } => Some(*end),
            };
            match end {
                None => self.index_head(files)?,
                Some(end) => return Ok(look(&*self.sealed_index(files, end)?)),
            }
        }
    }

    /// Indexes what was written before this process started.
    fn index_head(&self, files: &SegmentFiles) -> Result<(), ReadError> {
        let _loading = self.loading.lock();
        let end = match &*self.state.lock() {
            State::Growing { head, .. } if *head > 0 => *head,
            _ => return Ok(()),
        };
        let mut whole = walk::rebuild(files, self.name, end, self.bound)?;
        if let State::Growing { index, head } = &mut *self.state.lock() {
            whole.extend(index);
            *index = whole;
            *head = 0;
        }
        Ok(())
    }

    /// The index of the sealed segment: held, on disk, or rebuilt from the batches.
    fn sealed_index(&self, files: &SegmentFiles, end: u64) -> Result<Arc<Index>, ReadError> {
        if end == 0 {
            return Ok(Arc::new(Index::starting_at(0, self.name.base_offset)));
        }
        if let Some(index) = files.cached_index(self.name) {
            return Ok(index);
        }
        let _loading = self.loading.lock();
        if let Some(index) = files.cached_index(self.name) {
            return Ok(index);
        }
        let path = files.index_path(self.name);
        let stored = files
            .read_whole(&path)
            .map_err(|error| error.to_string())
            .and_then(|bytes| Index::decode(&bytes, self.name.base_offset).map_err(|error| error.to_string()))
            .and_then(|index| {
                let described = index.end_position();
                if described == end {
                    Ok(index)
                } else {
                    Err(format!("it describes {described} of {end} bytes"))
                }
            });
        let index = match stored {
            Ok(index) => Arc::new(index),
            Err(reason) => {
                warn!(path = %path.display(), reason, "an index is rebuilt from its segment");
                let index = Arc::new(walk::rebuild(files, self.name, end, self.bound)?);
                // Only saves the next one the work.
                if !index.is_damaged()
                    && let Err(error) = files.write_index(self.name, &index.encode(self.name.base_offset))
                {
                    warn!(path = %path.display(), %error, "the rebuilt index could not be written");
                }
                index
            }
        };
        files.keep_index(self.name, &index);
        if let State::Sealed { max_timestamp, .. } = &mut *self.state.lock() {
            *max_timestamp = Some(index.max_timestamp());
        }
        Ok(index)
    }
}
