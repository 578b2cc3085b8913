//! Where a consumer stands on each of its partitions: shared by the consumer, which moves on record by record, and its task,
//! which commits and subscribes.
//!
//! Per partition `processed ≤ next`. A new subscription is announced before its offsets are read from `next`, and only
//! batches of the announced one are looked at; so a record that is returned meanwhile is skipped when it comes again, and
//! none is passed over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// A partition: topic id and number.
pub(super) type Key = (Bytes, u32);

/// No offset was committed yet.
const NEVER: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Partition {
    pub(super) key: Key,
    pub(super) topic: Arc<str>,
    /// Next offset to return to the caller.
    next: AtomicU64,
    /// Everything below was processed.
    processed: AtomicU64,
    committed: AtomicU64,
    /// It goes to another member: nothing of it is returned any more.
    revoked: AtomicBool,
}

impl Partition {
    pub(super) fn new(key: Key, topic: Arc<str>, next: u64, committed: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            key,
            topic,
            next: AtomicU64::new(next),
            processed: AtomicU64::new(next),
            committed: AtomicU64::new(committed.unwrap_or(NEVER)),
            revoked: AtomicBool::new(false),
        })
    }

    pub(super) fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// The record before `next` was returned.
    pub(super) fn returned(&self, next: u64) {
        self.next.store(next, Ordering::Release);
    }

    pub(super) fn processed(&self, below: u64) {
        self.processed.fetch_max(below, Ordering::AcqRel);
    }

    /// Moves to an offset, also back.
    pub(super) fn seek(&self, offset: u64) {
        self.next.store(offset, Ordering::Release);
        self.processed.store(offset, Ordering::Release);
    }

    /// What is to be committed, if that is news.
    pub(super) fn uncommitted(&self) -> Option<u64> {
        let processed = self.processed.load(Ordering::Acquire);
        (self.committed.load(Ordering::Acquire) != processed).then_some(processed)
    }

    pub(super) fn committed(&self, offset: u64) {
        self.committed.store(offset, Ordering::Release);
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Answers what it was before.
    pub(super) fn set_revoked(&self, revoked: bool) -> bool {
        self.revoked.swap(revoked, Ordering::AcqRel)
    }
}

#[derive(Debug, Default)]
pub(super) struct Positions {
    /// Batches of other subscriptions are of no use any more; 0 = of any.
    subscription: AtomicU64,
    partitions: Mutex<BTreeMap<Key, Arc<Partition>>>,
}

impl Positions {
    pub(super) fn subscription(&self) -> u64 {
        self.subscription.load(Ordering::Acquire)
    }

    /// Announces a subscription; to be called before the offsets for it are read.
    pub(super) fn set_subscription(&self, subscription: u64) {
        self.subscription.store(subscription, Ordering::Release);
    }

    pub(super) fn all(&self) -> Vec<Arc<Partition>> {
        self.partitions.lock().values().cloned().collect()
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Partition>> {
        self.partitions.lock().get(key).cloned()
    }

    pub(super) fn find(&self, topic: &str, partition: u32) -> Option<Arc<Partition>> {
        let partitions = self.partitions.lock();
        partitions.values().find(|known| &*known.topic == topic && known.key.1 == partition).cloned()
    }

    pub(super) fn insert(&self, partition: Arc<Partition>) {
        self.partitions.lock().insert(partition.key.clone(), partition);
    }

    pub(super) fn remove(&self, key: &Key) {
        self.partitions.lock().remove(key);
    }
}
