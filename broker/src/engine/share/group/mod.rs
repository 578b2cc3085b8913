//! One share group: its members and their credit, and for each partition the records' state and queue.
//!
//! [`members`] keeps sessions and subscriptions, [`settling`] carries out what ends or returns a lease, [`granting`] hands out.
//! What is here is what they share, and the way from a change to what is derived from it.

mod granting;
mod members;
mod settling;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use members::{Member, Subscription};

use super::queue::Queue;
use super::state::{ShareState, change};
use crate::engine::config::{OnExhausted, ShareConfig};
use crate::engine::event::{RecordChange, Settled, event::Kind};
use crate::engine::stage::{RowKey, Stage, TimerKey};
use crate::engine::types::{Lsn, PartitionKey, SubscriptionId, TopicId};

/// The group on one partition.
#[derive(Debug)]
pub(crate) struct SharePartition {
    pub(crate) state: ShareState,
    pub(crate) queue: Queue,
    /// The engine timer that is set for it.
    armed: Option<u64>,
}

impl SharePartition {
    pub(crate) fn new(state: ShareState, ordered: bool) -> Self {
        let queue = Queue::rebuild(&state, ordered);
        Self { state, queue, armed: None }
    }
}

/// A share group.
#[derive(Debug)]
pub struct ShareGroup {
    pub(crate) name: Arc<str>,
    pub(crate) config: ShareConfig,
    pub(crate) paused: bool,
    /// A redrive group: not listed, no dead-letter topic of its own.
    pub(crate) hidden: bool,
    pub(crate) topics: Vec<TopicId>,
    /// Why it is not served: what was recovered of it does not fit the log (rule R6).
    pub(crate) corrupt: Option<String>,
    /// Where the exhausted records of a topic go; a topic without one holds them.
    pub(crate) dead_letter_topics: BTreeMap<TopicId, TopicId>,
    partitions: BTreeMap<PartitionKey, SharePartition>,
    members: BTreeMap<Arc<str>, Member>,
    subscriptions: BTreeMap<SubscriptionId, Subscription>,
    /// Subscriptions with credit left.
    takers: BTreeSet<SubscriptionId>,
    /// Partitions with something to hand out.
    ready: BTreeSet<PartitionKey>,
    /// Partitions that may have something to scan.
    unscanned: BTreeSet<PartitionKey>,
    last_partition: Option<PartitionKey>,
    last_subscription: Option<SubscriptionId>,
}

impl ShareGroup {
    pub(crate) fn new(
        name: Arc<str>,
        config: ShareConfig,
        topics: Vec<TopicId>,
        paused: bool,
        hidden: bool,
    ) -> Self {
        Self {
            name,
            config,
            paused,
            hidden,
            topics,
            corrupt: None,
            dead_letter_topics: BTreeMap::new(),
            partitions: BTreeMap::new(),
            members: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            takers: BTreeSet::new(),
            ready: BTreeSet::new(),
            unscanned: BTreeSet::new(),
            last_partition: None,
            last_subscription: None,
        }
    }

    pub(crate) fn partitions(&self) -> &BTreeMap<PartitionKey, SharePartition> {
        &self.partitions
    }

    pub(crate) fn partition(&self, key: &PartitionKey) -> Option<&SharePartition> {
        self.partitions.get(key)
    }

    pub(crate) fn put_partition(&mut self, key: PartitionKey, state: ShareState) {
        self.partitions.insert(key, SharePartition::new(state, self.config.ordered));
        self.ready.remove(&key);
        self.unscanned.insert(key);
    }

    pub(crate) fn remove_partition(&mut self, key: &PartitionKey) {
        self.partitions.remove(key);
        self.ready.remove(key);
        self.unscanned.remove(key);
    }

    pub(crate) fn state_mut(&mut self, key: &PartitionKey) -> Option<&mut ShareState> {
        self.partitions.get_mut(key).map(|partition| &mut partition.state)
    }

    /// Forgets all derived state and derives it again: after replay, and when the ordering changed.
    pub(crate) fn rebuild(&mut self) {
        self.ready.clear();
        for (key, partition) in &mut self.partitions {
            partition.queue = Queue::rebuild(&partition.state, self.config.ordered);
            partition.armed = None;
            self.unscanned.insert(*key);
            if partition.queue.has_ready() {
                self.ready.insert(*key);
            }
        }
    }

    /// The group was moved on a partition, or its order changed, in the frame `lsn`.
    pub(crate) fn wait_for(&mut self, lsn: Lsn, which: impl Fn(&PartitionKey) -> bool) {
        for (key, partition) in self.partitions.iter_mut().filter(|(key, _)| which(key)) {
            partition.queue.wait_for(lsn);
            self.ready.remove(key);
        }
    }

    /// Looks whether the group knows of records that its partitions do not have.
    pub(crate) fn check_ends(&mut self, end_of: impl Fn(&PartitionKey) -> u64) {
        let beyond =
            self.partitions.iter().find(|(key, partition)| partition.state.known_end() > end_of(key));
        self.corrupt = beyond.map(|(key, partition)| {
            let (known, end) = (partition.state.known_end(), end_of(key));
            format!("its state on partition {key} reaches to offset {known}, the partition ends at {end}")
        });
    }

    /// Sets the timers and asks for the dead letters of every partition, after a rebuild. A group that is not served rests.
    pub(crate) fn settle_in(&mut self, stage: &mut Stage<'_>) {
        if self.corrupt.is_some() {
            return;
        }
        let keys: Vec<PartitionKey> = self.partitions.keys().copied().collect();
        for key in keys {
            self.after_change(stage, key);
        }
    }

    fn on_exhausted(&self, topic: &TopicId) -> OnExhausted {
        match self.config.on_exhausted {
            OnExhausted::DeadLetter if !self.dead_letter_topics.contains_key(topic) => OnExhausted::Hold,
            chosen => chosen,
        }
    }

    // ---- From a change to what follows ----

    fn commit_changes(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        acked: Vec<u64>,
        changes: Vec<RecordChange>,
    ) {
        if let Some(partition) = self.partitions.get_mut(&key) {
            for offset in &acked {
                partition.ack(stage, *offset);
            }
            for change in &changes {
                partition.change(stage, change);
            }
            self.push_settled(stage, key, acked, changes, Vec::new());
        }
    }

    /// Stages the event of what was just applied.
    fn push_settled(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        mut acked: Vec<u64>,
        changes: Vec<RecordChange>,
        skipped: Vec<u64>,
    ) {
        if !acked.is_empty() || !changes.is_empty() || !skipped.is_empty() {
            acked.sort_unstable();
            let event = Settled {
                group: self.name.to_string(),
                topic_id: key.topic.0.to_vec(),
                partition: key.partition,
                acked_deltas: to_deltas(acked),
                changes,
                skipped,
                now_ms: stage.now.monotonic_ms,
            };
            stage.event(Kind::Settled(event));
            stage.dirty.insert(RowKey::Share(self.name.clone(), key));
        }
        self.after_change(stage, key);
    }

    /// Brings what is derived from a partition up to date: ready list, timer, dead letters to make.
    fn after_change(&mut self, stage: &mut Stage<'_>, key: PartitionKey) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        self.unscanned.insert(key);
        partition.queue.catch_up(&partition.state);
        if partition.queue.has_ready() {
            self.ready.insert(key);
            stage.pump.insert(self.name.clone());
        } else {
            self.ready.remove(&key);
        }
        if let Some(at) = partition.queue.next_timer()
            && partition.armed.is_none_or(|armed| at < armed)
        {
            partition.armed = Some(at);
            stage.timers.insert((at, TimerKey::Share(self.name.clone(), key)));
        }
        self.ask_for_letters(stage, key);
    }
}

impl SharePartition {
    fn ack(&mut self, stage: &mut Stage<'_>, offset: u64) {
        let slot = self.end_lease(offset);
        self.state.ack(offset, stage.now.monotonic_ms);
        self.queue.settled(offset, slot, stage.lsn);
    }

    fn change(&mut self, stage: &mut Stage<'_>, change: &RecordChange) {
        let offset = change.offset;
        let slot = self.end_lease(offset);
        self.state.change(change, stage.now.monotonic_ms);
        match change.kind {
            change::EXTENDED => self.queue.leased(offset, change.until_ms),
            change::SCHEDULED => self.queue.scheduled(offset, change.until_ms),
            change::EXHAUSTED => self.queue.exhausted(offset),
            change::HELD => self.queue.held(offset),
            change::AVAILABLE => self.queue.available(&self.state, offset, slot),
            change::DEAD_LETTERED | change::DISCARDED => self.queue.settled(offset, slot, stage.lsn),
            _ => {}
        }
    }

    /// Drops the timer of the record's lease, if it has one, and answers the record's key slot.
    fn end_lease(&mut self, offset: u64) -> Option<u16> {
        match self.state.lease(offset) {
            Some(lease) => {
                self.queue.lease_ended(offset, lease.deadline_ms);
                lease.slot
            }
            None => self.state.exception(offset).and_then(|exception| exception.slot),
        }
    }
}

/// Ascending offsets as the first one and then differences.
fn to_deltas(mut offsets: Vec<u64>) -> Vec<u64> {
    for i in (1..offsets.len()).rev() {
        offsets[i] -= offsets[i - 1];
    }
    offsets
}
