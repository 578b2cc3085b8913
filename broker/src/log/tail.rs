//! The newest batches of a partition, in memory: what is not yet in its segment, and as much after that as the budget of
//! all partitions together allows.
//!
//! Invariants: the batches are the end of the log, without one missing in between; a batch that is not yet in its
//! segment is never let go, so that everything below the first batch can be read from disk.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::segment::PlacedBatch;
use super::view::ReadView;

/// What a cached batch costs besides its bytes.
const OVERHEAD: usize = size_of::<PlacedBatch>();

/// Memory that a cached batch is counted with.
fn cost(batch: &PlacedBatch) -> usize {
    batch.bytes.len() + OVERHEAD
}

/// What the tail knows about an offset.
#[derive(Debug)]
pub(super) enum TailRead {
    /// The batch with the offset (or the next one, where the tail itself has a hole there), and following ones.
    Found(Vec<PlacedBatch>),
    /// The disk must be asked.
    NotHere,
}

/// One partition's tail. The caller holds the lock of the view.
#[derive(Debug, Default)]
pub(super) struct Tail {
    batches: VecDeque<PlacedBatch>,
    /// Every batch below this offset is in its segment.
    written_end: u64,
}

impl Tail {
    /// Returns what the batch costs.
    pub(super) fn push(&mut self, batch: PlacedBatch) -> usize {
        debug_assert!(self.batches.back().is_none_or(|last| last.last_offset < batch.base_offset));
        let cost = cost(&batch);
        self.batches.push_back(batch);
        cost
    }

    /// Index of the first batch that ends at or above `offset`.
    fn find(&self, offset: u64) -> usize {
        self.batches.partition_point(|batch| batch.last_offset < offset)
    }

    /// Batches from the one that holds `offset` on, while they end below `end` and fit `max_bytes` (the first always does).
    pub(super) fn read(&self, offset: u64, end: u64, max_bytes: usize) -> TailRead {
        let first = self.find(offset);
        match self.batches.get(first) {
            Some(batch) if first > 0 || batch.base_offset <= offset => {
                TailRead::Found(self.take_from(first, end, max_bytes))
            }
            _ => TailRead::NotHere,
        }
    }

    /// As [`Self::read`], for an offset that is known not to be on disk: begins with the next batch above it.
    pub(super) fn following(&self, offset: u64, end: u64, max_bytes: usize) -> Vec<PlacedBatch> {
        self.take_from(self.find(offset), end, max_bytes)
    }

    /// Offset at which the tail begins; `None` when it is empty.
    pub(super) fn start(&self) -> Option<u64> {
        self.batches.front().map(|batch| batch.base_offset)
    }

    fn take_from(&self, first: usize, end: u64, max_bytes: usize) -> Vec<PlacedBatch> {
        let mut taken = 0_usize;
        self.batches
            .range(first..)
            .take_while(|batch| {
                let fits = batch.last_offset < end && (taken == 0 || taken + batch.bytes.len() <= max_bytes);
                taken += batch.bytes.len();
                fits
            })
            .cloned()
            .collect()
    }

    /// The first batch at or above `from` with a record of at least `timestamp`.
    pub(super) fn find_timestamp(&self, timestamp: i64, from: u64) -> Option<PlacedBatch> {
        self.batches.range(self.find(from)..).find(|batch| batch.max_timestamp >= timestamp).cloned()
    }

    /// Everything below `end` is in its segment.
    pub(super) fn mark_written(&mut self, end: u64) {
        self.written_end = self.written_end.max(end);
    }

    /// Whether it has batches below `end` that are not in their segment.
    pub(super) fn has_unwritten(&self, end: u64) -> bool {
        self.batches.get(self.find(self.written_end)).is_some_and(|first| first.base_offset < end)
    }

    /// Lets go of the batches below `end` that are in their segment; returns them so that they are freed without the lock.
    fn evict(&mut self, end: u64) -> Vec<PlacedBatch> {
        let end = end.min(self.written_end);
        let count = self.batches.partition_point(|batch| batch.last_offset < end);
        self.batches.drain(..count).collect()
    }

    /// Lets go of the batches below `end`: other segments than theirs hold what is left of them.
    fn let_go(&mut self, end: u64) -> Vec<PlacedBatch> {
        self.mark_written(end);
        self.evict(end)
    }

    /// Lets go of everything; for a partition that is gone.
    fn clear(&mut self) -> Vec<PlacedBatch> {
        self.batches.drain(..).collect()
    }
}

/// The memory that all tails share.
///
/// Batches leave in the order in which they reached their segments, over all partitions: a partition that is quiet for
/// long makes room for the others.
#[derive(Debug)]
pub(super) struct TailBudget {
    limit: usize,
    used: AtomicUsize,
    /// What may go, oldest first: everything of the partition below the offset.
    evictable: Mutex<VecDeque<(Weak<ReadView>, u64)>>,
}

impl TailBudget {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), evictable: Mutex::new(VecDeque::new()) }
    }

    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, cost: usize) {
        self.used.fetch_add(cost, Ordering::Relaxed);
    }

    fn release(&self, batches: &[PlacedBatch]) {
        self.used.fetch_sub(batches.iter().map(cost).sum(), Ordering::Relaxed);
    }

    /// The view's batches below `end` are in their segment and may be evicted from now on.
    pub(super) fn allow(&self, view: &Arc<ReadView>, end: u64) {
        self.evictable.lock().push_back((Arc::downgrade(view), end));
    }

    /// Evicts until the budget is kept, or nothing more may go.
    pub(super) fn enforce(&self) {
        while self.used() > self.limit {
            let Some((view, end)) = self.evictable.lock().pop_front() else { return };
            if let Some(view) = view.upgrade() {
                let evicted = view.tail().lock().evict(end);
                self.release(&evicted);
            }
        }
    }

    /// Frees what the view's tail has below `end`, where other segments are in the place of those that it had.
    pub(super) fn let_go(&self, view: &ReadView, end: u64) {
        let evicted = view.tail().lock().let_go(end);
        self.release(&evicted);
    }

    /// Frees the tail of a partition that is gone.
    pub(super) fn forget(&self, view: &ReadView) {
        let evicted = view.tail().lock().clear();
        self.release(&evicted);
        self.evictable.lock().retain(|(other, _)| !std::ptr::eq(other.as_ptr(), view));
    }
}
