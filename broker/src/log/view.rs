//! What readers see of a partition, without a message to the shard and without waiting for it.
//!
//! ```text
//!   log start ≤ offsets that can be read < high watermark ≤ staged end
//!   ├────────────── segments on disk ──────────────┤
//!                            ├────────── tail, in memory ──────────┤
//! ```
//!
//! Invariants: batches are staged in the tail before they become visible; what leaves the tail is in its segment; so
//! each visible offset is in one of the two. A read returns whole batches, each following the one before, or says why it
//! cannot: it never leaves out a record. Offsets can be missing where the engine skipped them (after a power loss, with a
//! higher epoch); such a hole may also stand at the end, below the high watermark.
//!
//! Only the segment writer and the shard change a view; anybody may read it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::error::ReadError;
use super::files::SegmentFiles;
use super::reread::{BatchPlaces, Found, RereadCache};
use super::segment::{PlacedBatch, Segment};
use super::tail::{Tail, TailBudget, TailRead};
use crate::engine::PartitionInfo;
use crate::engine::effect::SegmentName;
use crate::engine::types::PartitionKey;

/// What all views of a log share.
#[derive(Debug)]
pub(super) struct LogContext {
    pub(super) files: SegmentFiles,
    pub(super) budget: TailBudget,
    pub(super) rereads: RereadCache,
    /// Bounds the threads that may wait for the disk on behalf of readers.
    pub(super) disk_reads: Arc<Semaphore>,
}

/// Who reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// Nothing below the log start.
    Anybody,
    /// Also what is kept below it.
    ShareGroup,
}

/// What is in memory from an offset on.
#[derive(Debug)]
pub(super) enum Reread {
    Batches(Vec<PlacedBatch>),
    Places(Arc<BatchPlaces>),
}

/// One partition as readers see it.
#[derive(Debug)]
pub struct ReadView {
    partition: PartitionKey,
    topic: Arc<str>,
    log_start: AtomicU64,
    high_watermark: AtomicU64,
    /// Ascending by base offset; the last one grows. Those that end below the log start are kept for share groups.
    segments: ArcSwap<Vec<Arc<Segment>>>,
    /// Never held over I/O.
    tail: Mutex<Tail>,
    interested: Mutex<Vec<Weak<Notify>>>,
    removed: AtomicBool,
    context: Arc<LogContext>,
}

impl ReadView {
    /// Everything below the end of the partition is visible at first.
    pub(super) fn new(context: Arc<LogContext>, info: &PartitionInfo) -> Self {
        let segment = |(at, &(name, bytes)): (usize, &(SegmentName, u64))| {
            let next = info.segments.get(at + 1).map(|(next, _)| next.base_offset);
            Arc::new(Segment::new(name, bytes, next.unwrap_or(info.end), next.is_some()))
        };
        let segments: Vec<_> = info.segments.iter().enumerate().map(segment).collect();
        Self {
            partition: info.partition,
            topic: info.topic.as_str().into(),
            log_start: AtomicU64::new(info.log_start),
            high_watermark: AtomicU64::new(info.end),
            segments: ArcSwap::from_pointee(segments),
            tail: Mutex::default(),
            interested: Mutex::default(),
            removed: AtomicBool::new(false),
            context,
        }
    }

    pub fn partition(&self) -> PartitionKey {
        self.partition
    }

    /// Name of the topic.
    pub fn topic(&self) -> &Arc<str> {
        &self.topic
    }

    /// First offset that can be read, if there is a record at all; but see [`Self::fetch_kept`].
    pub fn log_start(&self) -> u64 {
        self.log_start.load(Ordering::Acquire)
    }

    /// End of what is visible: the first offset that cannot be read yet.
    pub fn high_watermark(&self) -> u64 {
        self.high_watermark.load(Ordering::Acquire)
    }

    /// Bytes of all batches, those included that are not visible yet.
    pub fn bytes(&self) -> u64 {
        self.segments.load().iter().map(|segment| segment.staged_end()).sum()
    }

    /// Shows everything below `high_watermark` and wakes whoever is interested. It never falls: a lower value is ignored.
    pub fn publish(&self, high_watermark: u64) {
        if self.high_watermark.fetch_max(high_watermark, Ordering::AcqRel) < high_watermark {
            self.wake();
        }
    }

    /// Nobody reads below `log_start` any more; it is at most the high watermark that readers were shown. It never falls.
    pub(super) fn raise_log_start(&self, log_start: u64) {
        self.log_start.fetch_max(log_start, Ordering::AcqRel);
        // Whoever waits in vain below it finds out.
        self.wake();
    }

    /// Wakes `notify` (one permit, [`Notify::notify_one`]) whenever the high watermark or the log start rises or the partition goes, for as
    /// long as somebody else holds the `Arc`. Registering again changes nothing. Register first, then read, then wait: so no rise is missed.
    pub fn interest(&self, notify: &Arc<Notify>) {
        let mut interested = self.interested.lock();
        if interested.iter().any(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(notify))) {
            return;
        }
        // Room is made before the list grows, so that it stays in proportion to those who are still there.
        if interested.len() == interested.capacity() {
            interested.retain(|other| other.strong_count() > 0);
        }
        interested.push(Arc::downgrade(notify));
    }

    fn wake(&self) {
        self.interested.lock().retain(|notify| match notify.upgrade() {
            Some(notify) => {
                notify.notify_one();
                true
            }
            None => false,
        });
    }

    /// Batches from the one that holds `offset` on: whole, visible, at most `max_bytes` unless the first alone is larger.
    /// The first may begin below `offset`, or above it where the log has a hole. Empty when there is nothing (yet) from
    /// `offset` on.
    ///
    /// The batches share buffers, which they may pin beyond their own length by about 64 KiB.
    ///
    /// Blocks on the disk when the batches are not in memory; in async code use [`Self::fetch`].
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(&self, offset: u64, max_bytes: usize) -> Result<Vec<Bytes>, ReadError> {
        self.read_placed(Reader::Anybody, offset, max_bytes).map(into_bytes)
    }

    /// As [`Self::read`], without blocking: what is in memory is answered at once, the disk is read on one of a bounded
    /// number of threads. Dropping the future is safe; a disk read that has begun then ends in the background.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn fetch(self: &Arc<Self>, offset: u64, max_bytes: usize) -> Result<Vec<Bytes>, ReadError> {
        self.fetch_from(Reader::Anybody, offset, max_bytes).await
    }

    /// As [`Self::fetch`], for share groups: below the log start there may still be records that they have in hand. What is
    /// not there any more is passed over.
    ///
    /// # Errors
    /// See [`ReadError`]; never [`ReadError::BelowStart`].
    pub async fn fetch_kept(
        self: &Arc<Self>,
        offset: u64,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        self.fetch_from(Reader::ShareGroup, offset, max_bytes).await
    }

    async fn fetch_from(
        self: &Arc<Self>,
        reader: Reader,
        offset: u64,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        if let Some(batches) = self.read_memory(reader, offset, max_bytes)? {
            return Ok(into_bytes(batches));
        }
        self.on_disk_thread(move |view| view.read_placed(reader, offset, max_bytes).map(into_bytes)).await
    }

    /// As [`Self::fetch_kept`], blocking on the disk.
    ///
    /// # Errors
    /// See [`ReadError`]; never [`ReadError::BelowStart`].
    pub fn read_stored(&self, offset: u64, max_bytes: usize) -> Result<Vec<Bytes>, ReadError> {
        self.read_placed(Reader::ShareGroup, offset, max_bytes).map(into_bytes)
    }

    /// The first visible record of at least this timestamp (Unix ms): its offset, `None` if there is none.
    ///
    /// Blocks on the disk; in async code use [`Self::find_timestamp`].
    ///
    /// # Errors
    /// [`ReadError::Corrupt`] and [`ReadError::Io`].
    pub fn offset_for_timestamp(&self, timestamp: i64) -> Result<Option<u64>, ReadError> {
        super::scan::offset_for_timestamp(self, timestamp)
    }

    /// As [`Self::offset_for_timestamp`], without blocking. Dropping the future is safe.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`] and [`ReadError::Io`].
    pub async fn find_timestamp(self: &Arc<Self>, timestamp: i64) -> Result<Option<u64>, ReadError> {
        self.on_disk_thread(move |view| view.offset_for_timestamp(timestamp)).await
    }

    /// Runs blocking work for a reader on one of a bounded number of threads.
    pub(super) async fn on_disk_thread<R: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<R, ReadError> + Send + 'static,
    ) -> Result<R, ReadError> {
        let permit = Arc::clone(&self.context.disk_reads).acquire_owned().await;
        let view = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&view);
            drop(permit);
            result
        });
        match task.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(error) => Err(ReadError::Io {
                    file: self.context.files.directory(self.partition),
                    source: std::io::Error::other(error),
                }),
            },
        }
    }

    /// As [`Self::read`] for share groups, and keeps for a while what it reads from disk; for [`Self::reread_memory`].
    pub(super) fn read_kept(&self, offset: u64, max_bytes: usize) -> Result<Vec<PlacedBatch>, ReadError> {
        if let Some(Reread::Batches(batches)) = self.reread_memory(offset, max_bytes)? {
            return Ok(batches);
        }
        let batches = self.read_placed(Reader::ShareGroup, offset, max_bytes)?;
        self.context.rereads.keep(self.partition, &batches);
        Ok(batches)
    }

    /// As [`Self::read_kept`], one batch of which few records are wanted: keeps no more than where they stand.
    pub(super) fn read_keeping_places(&self, offset: u64) -> Result<Vec<PlacedBatch>, ReadError> {
        let batches = self.read_placed(Reader::ShareGroup, offset, 0)?;
        if let Some(batch) = batches.first() {
            self.context.rereads.keep_places(self.partition, batch);
        }
        Ok(batches)
    }

    /// As [`Self::read_memory`], also from what was kept: of that, one batch, or where its records stand.
    pub(super) fn reread_memory(&self, offset: u64, max_bytes: usize) -> Result<Option<Reread>, ReadError> {
        if let Some(batches) = self.read_memory(Reader::ShareGroup, offset, max_bytes)? {
            return Ok(Some(Reread::Batches(batches)));
        }
        let Some(found) = self.context.rereads.find(self.partition, offset) else { return Ok(None) };
        // It may have been read before the cleaner replaced its segment, and kept after.
        if self.segment(found.segment()).is_none() {
            self.context.rereads.forget(self.partition);
            return Ok(None);
        }
        Ok(Some(match found {
            Found::Batch(batch) => Reread::Batches(vec![batch]),
            Found::Places(places) => Reread::Places(places),
        }))
    }

    pub(super) fn read_placed(
        &self,
        reader: Reader,
        offset: u64,
        max_bytes: usize,
    ) -> Result<Vec<PlacedBatch>, ReadError> {
        'again: loop {
            if let Some(batches) = self.read_memory(reader, offset, max_bytes)? {
                return Ok(batches);
            }
            let tail_start = self.tail.lock().start();
            let end = self.high_watermark();
            for segment in self.segments_from(offset) {
                match segment.read(&self.context.files, offset, end, max_bytes) {
                    Ok(batches) if batches.is_empty() => {}
                    // Its file may have been removed under our hands.
                    Err(_) if self.is_removed() || self.segment(segment.name()).is_none() => continue 'again,
                    other => return other,
                }
            }
            // Every byte that was ever written is accounted for, and no batch on disk holds the offset or follows it. If
            // the tail has not moved since, the offset lies in a hole before it or at the end of the log; otherwise its
            // batch may have gone to disk behind our back.
            let tail = self.tail.lock();
            if tail.start() == tail_start {
                return Ok(tail.following(offset, self.high_watermark(), max_bytes));
            }
        }
    }

    /// `None` when the disk must be asked.
    pub(super) fn read_memory(
        &self,
        reader: Reader,
        offset: u64,
        max_bytes: usize,
    ) -> Result<Option<Vec<PlacedBatch>>, ReadError> {
        if self.is_removed() {
            return Err(ReadError::Removed);
        }
        // In this order: the log start is never above a high watermark that is read after it.
        let log_start = self.log_start();
        let high_watermark = self.high_watermark();
        if offset < log_start && reader == Reader::Anybody {
            return Err(ReadError::BelowStart { log_start });
        }
        if offset > high_watermark {
            return Err(ReadError::AboveEnd { high_watermark });
        }
        if offset == high_watermark {
            return Ok(Some(Vec::new()));
        }
        match self.tail.lock().read(offset, high_watermark, max_bytes) {
            TailRead::Found(batches) => Ok(Some(batches)),
            TailRead::NotHere => Ok(None),
        }
    }

    /// The segments that may hold `offset` or what follows it, as they are now.
    pub(super) fn segments_from(&self, offset: u64) -> impl Iterator<Item = Arc<Segment>> + use<> {
        let segments = self.segments();
        let first =
            segments.partition_point(|segment| segment.name().base_offset <= offset).saturating_sub(1);
        (first..segments.len()).map(move |at| Arc::clone(&segments[at]))
    }

    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    pub(super) fn context(&self) -> &LogContext {
        &self.context
    }

    pub(super) fn tail(&self) -> &Mutex<Tail> {
        &self.tail
    }

    pub(super) fn segments(&self) -> Arc<Vec<Arc<Segment>>> {
        self.segments.load_full()
    }

    pub(super) fn segment(&self, name: SegmentName) -> Option<Arc<Segment>> {
        let segments = self.segments.load();
        let first = segments.partition_point(|segment| segment.name().base_offset < name.base_offset);
        segments[first..].iter().find(|segment| segment.name() == name).map(Arc::clone)
    }

    /// Adds the segment that grows from now on.
    pub(super) fn add_segment(&self, name: SegmentName) {
        let added = Arc::new(Segment::new(name, 0, u64::MAX, false));
        self.segments.rcu(|segments| segments.iter().chain([&added]).map(Arc::clone).collect::<Vec<_>>());
    }

    /// Takes segments from the list; readers in the middle of one finish.
    pub(super) fn remove_segments(&self, names: &[SegmentName]) {
        self.segments.rcu(|segments| {
            let kept = segments.iter().filter(|segment| !names.contains(&segment.name()));
            kept.map(Arc::clone).collect::<Vec<_>>()
        });
    }

    /// Puts complete segments into the place of neighbouring ones; readers in the middle of one of those finish.
    pub(super) fn replace_segments(&self, removed: &[SegmentName], added: &[(SegmentName, u64)]) {
        let added: Vec<_> =
            added.iter().map(|(name, bytes)| Arc::new(Segment::new(*name, *bytes, u64::MAX, true))).collect();
        let last = removed.iter().map(|name| name.base_offset).max().unwrap_or(0);
        let mut end = None;
        self.segments.rcu(|segments| {
            // Before the others are among them, which may begin above `last`.
            end = segments.iter().map(|segment| segment.name().base_offset).find(|base| *base > last);
            let kept = segments.iter().filter(|segment| !removed.contains(&segment.name()));
            let mut segments: Vec<_> = kept.chain(&added).map(Arc::clone).collect();
            segments.sort_by_key(|segment| segment.name().base_offset);
            segments
        });
        // What is dropped shall be found nowhere any more.
        self.context.rereads.forget(self.partition);
        if let Some(end) = end {
            self.context.budget.let_go(self, end);
        }
    }

    /// Takes a batch into the tail. It becomes visible with [`Self::publish`].
    pub(super) fn stage(&self, batch: PlacedBatch) {
        batch.segment.stage(batch.position + batch.bytes.len() as u64);
        let cost = self.tail.lock().push(batch);
        self.context.budget.add(cost);
    }

    /// The partition is gone: frees its tail and wakes its readers, who get [`ReadError::Removed`] from now on.
    pub(super) fn close(&self) {
        self.removed.store(true, Ordering::Release);
        self.context.budget.forget(self);
        self.context.rereads.forget(self.partition);
        self.wake();
    }
}

fn into_bytes(batches: Vec<PlacedBatch>) -> Vec<Bytes> {
    batches.into_iter().map(|batch| batch.bytes).collect()
}
