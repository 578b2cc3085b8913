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

use super::holders::Holders;
use super::outage::Outage;
use super::queue::Queue;
use super::recent::{Recent, SettledAs};
use super::settle::Desk;
use super::state::{Cause, Ended, ShareState, change};
use crate::engine::config::{OnExhausted, ShareConfig};
use crate::engine::event::{RecordChange, Settled, event::Kind};
use crate::engine::stage::{RowKey, Stage, TimerKey};
use crate::engine::types::{Lsn, Now, PartitionKey, SubscriptionId, TopicId};

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

/// What a group keeps of all its partitions together.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) recent: Recent,
    pub(crate) holders: Holders,
    pub(crate) outage: Outage,
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
    pub(crate) ledger: Ledger,
    /// Subscriptions with credit left that may be granted something.
    takers: BTreeSet<SubscriptionId>,
    /// Subscriptions with credit left whose member gets nothing for the moment.
    withheld: BTreeSet<SubscriptionId>,
    /// Gets nothing until its member holds nothing: a record waits to be granted alone.
    reserved: Option<SubscriptionId>,
    /// Partitions with something to hand out.
    ready: BTreeSet<PartitionKey>,
    /// Partitions with something to hand out alone.
    alone: BTreeSet<PartitionKey>,
    /// Partitions that may have something to scan.
    unscanned: BTreeSet<PartitionKey>,
    last_partition: Option<PartitionKey>,
    last_alone: Option<PartitionKey>,
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
            ledger: Ledger::default(),
            takers: BTreeSet::new(),
            withheld: BTreeSet::new(),
            reserved: None,
            ready: BTreeSet::new(),
            alone: BTreeSet::new(),
            unscanned: BTreeSet::new(),
            last_partition: None,
            last_alone: None,
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
        self.remove_partition(&key);
        self.partitions.insert(key, SharePartition::new(state, self.config.ordered));
        self.unscanned.insert(key);
    }

    pub(crate) fn remove_partition(&mut self, key: &PartitionKey) {
        if let Some(partition) = self.partitions.remove(key) {
            for lease in partition.state.leases().values() {
                self.ledger.holders.ended(&lease.member);
                self.ledger.outage.ended(lease.granted_ms);
            }
        }
        self.ready.remove(key);
        self.alone.remove(key);
        self.unscanned.remove(key);
    }

    pub(crate) fn state_mut(&mut self, key: &PartitionKey) -> Option<&mut ShareState> {
        self.partitions.get_mut(key).map(|partition| &mut partition.state)
    }

    /// The fold of a settlement. Answers false when the group is not on the partition.
    pub(crate) fn apply_settled(&mut self, key: &PartitionKey, event: &Settled) -> bool {
        let Some(partition) = self.partitions.get_mut(key) else { return false };
        let (state, ledger) = (&mut partition.state, &mut self.ledger);
        let mut offset = 0;
        for delta in &event.acked_deltas {
            offset += delta;
            if let Some(lease) = state.ack(offset) {
                ledger.recent.insert(lease, SettledAs::Ack, event.now_ms);
            }
        }
        for change in &event.changes {
            if let Some((lease, settled_as)) = state.change(change) {
                ledger.recent.insert(lease, settled_as, event.now_ms);
            }
        }
        for (ranges, expired) in [(&event.skipped, false), (&event.expired, true)] {
            for range in ranges.chunks_exact(2) {
                state.skip(range[0], range[0] + range[1], expired);
            }
        }
        // With failures among them, the state of the guard follows in an event of its own.
        if !event.changes.iter().any(is_failed_outcome) {
            let count = u32::try_from(event.acked_deltas.len()).unwrap_or(u32::MAX);
            ledger.outage.fold_successes(count);
        }
        true
    }

    /// Forgets all derived state and derives it again: after replay, and when the ordering changed.
    pub(crate) fn rebuild(&mut self) {
        self.ready.clear();
        self.alone.clear();
        self.ledger.holders = Holders::default();
        for (key, partition) in &mut self.partitions {
            partition.queue = Queue::rebuild(&partition.state, self.config.ordered);
            partition.armed = None;
            self.unscanned.insert(*key);
            for (offset, lease) in partition.state.leases() {
                let alone = partition.state.exception(*offset).is_some_and(|exception| exception.alone);
                self.ledger.holders.granted(&lease.member, alone);
            }
        }
        let leases = self.partitions.values().flat_map(|partition| partition.state.leases().values());
        self.ledger.outage.recount(leases.map(|lease| lease.granted_ms));
    }

    /// The group was moved on a partition, or its order changed, in the frame `lsn`.
    pub(crate) fn wait_for(&mut self, lsn: Lsn, which: impl Fn(&PartitionKey) -> bool) {
        for (key, partition) in self.partitions.iter_mut().filter(|(key, _)| which(key)) {
            partition.queue.wait_for(lsn);
            self.ready.remove(key);
            self.alone.remove(key);
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
        self.wait_for_probe(stage);
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
                partition.ack(stage, &mut self.ledger, &self.config, *offset);
            }
            for change in &changes {
                partition.change(stage, &mut self.ledger, &self.config, change);
            }
            let settled = Settled { changes, ..Settled::default() };
            self.push_settled(stage, key, acked, settled);
        }
    }

    /// Stages the event of what was just applied: `acked`, and the changes, skipped and expired offsets of `settled`.
    fn push_settled(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        mut acked: Vec<u64>,
        settled: Settled,
    ) {
        let gaps = !settled.skipped.is_empty() || !settled.expired.is_empty();
        let outcomes = !acked.is_empty() || !settled.changes.is_empty();
        if gaps || outcomes {
            acked.sort_unstable();
            stage.event(Kind::Settled(Settled {
                group: self.name.to_string(),
                topic_id: key.topic.0.to_vec(),
                partition: key.partition,
                acked_deltas: to_deltas(acked),
                now_ms: stage.now.monotonic_ms,
                ..settled
            }));
            stage.dirty.insert(RowKey::Share(self.name.clone(), key));
        }
        if outcomes {
            // The window of the outage guard.
            stage.dirty.insert(RowKey::Group(self.name.clone()));
            // Others may have waited for what has ended.
            stage.pump.insert(self.name.clone());
            self.note_outage(stage);
        }
        self.after_change(stage, key);
    }

    /// Stages the outage guard's state when it changed.
    pub(crate) fn note_outage(&mut self, stage: &mut Stage<'_>) {
        if let Some(row) = self.ledger.outage.take_changed(&self.name) {
            stage.event(Kind::OutageNoted(row));
            stage.dirty.insert(RowKey::Group(self.name.clone()));
            self.wait_for_probe(stage);
        }
    }

    /// Sets the timer for the next probe.
    fn wait_for_probe(&self, stage: &mut Stage<'_>) {
        if let Some(at) = self.ledger.outage.not_before()
            && at > stage.now.monotonic_ms
        {
            stage.timers.insert((at, TimerKey::Outage(self.name.clone())));
        }
    }

    /// Brings what is derived from a partition up to date: ready list, timer, dead letters to make.
    fn after_change(&mut self, stage: &mut Stage<'_>, key: PartitionKey) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        self.unscanned.insert(key);
        partition.queue.catch_up(&partition.state);
        for (ready, waits) in
            [(&mut self.ready, partition.queue.has_ready()), (&mut self.alone, partition.queue.has_alone())]
        {
            if waits {
                ready.insert(key);
                stage.pump.insert(self.name.clone());
            } else {
                ready.remove(&key);
            }
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
    /// What a settlement here is decided on.
    fn desk<'a>(
        &'a self,
        ledger: &'a Ledger,
        config: &'a ShareConfig,
        on_exhausted: OnExhausted,
        now: Now,
    ) -> Desk<'a> {
        let guarded = ledger.outage.is_on();
        Desk { state: &self.state, recent: &ledger.recent, config, on_exhausted, guarded, now }
    }

    fn ack(&mut self, stage: &mut Stage<'_>, ledger: &mut Ledger, config: &ShareConfig, offset: u64) {
        let now_ms = stage.now.monotonic_ms;
        let slot = self.end_lease(ledger, offset);
        if let Some(lease) = self.state.ack(offset) {
            ledger.recent.insert(lease, SettledAs::Ack, now_ms);
        }
        ledger.outage.note(false, config, now_ms);
        self.queue.settled(offset, slot, stage.lsn);
    }

    fn change(
        &mut self,
        stage: &mut Stage<'_>,
        ledger: &mut Ledger,
        config: &ShareConfig,
        change: &RecordChange,
    ) {
        let (offset, now_ms) = (change.offset, stage.now.monotonic_ms);
        if change.kind == change::EXTENDED {
            if let Some(lease) = self.state.lease(offset) {
                self.queue.lease_ended(offset, lease.deadline_ms);
            }
            self.state.change(change);
            self.queue.leased(offset, change.until_ms);
            return;
        }
        let slot = self.end_lease(ledger, offset);
        if let Some((lease, settled_as)) = self.state.change(change) {
            ledger.recent.insert(lease, settled_as, now_ms);
        }
        if is_failed_outcome(change) {
            ledger.outage.note(true, config, now_ms);
        }
        match change.kind {
            change::SCHEDULED => self.queue.scheduled(offset, change.until_ms),
            change::EXHAUSTED => self.queue.exhausted(offset),
            change::HELD => self.queue.held(offset),
            change::AVAILABLE => self.queue.available(&self.state, offset, slot),
            change::DEAD_LETTERED | change::DISCARDED => self.queue.settled(offset, slot, stage.lsn),
            _ => {}
        }
    }

    /// Ends the record's lease, if it has one, for all but the state; answers the record's key slot.
    fn end_lease(&mut self, ledger: &mut Ledger, offset: u64) -> Option<u16> {
        match self.state.lease(offset) {
            Some(lease) => {
                ledger.holders.ended(&lease.member);
                ledger.outage.ended(lease.granted_ms);
                self.queue.lease_ended(offset, lease.deadline_ms);
                lease.slot
            }
            None => self.state.exception(offset).and_then(|exception| exception.slot),
        }
    }
}

/// Whether the outage guard counts this as an attempt that failed: see [`super::outage`].
fn is_failed_outcome(change: &RecordChange) -> bool {
    let failed =
        matches!(Cause::from_code(change.cause), Cause::Nacked | Cause::LeaseExpired | Cause::MemberLost);
    failed && Ended::from_code(change.ended) != Ended::Rejected
}

/// Ascending offsets as the first one and then differences.
fn to_deltas(mut offsets: Vec<u64>) -> Vec<u64> {
    for i in (1..offsets.len()).rev() {
        offsets[i] -= offsets[i - 1];
    }
    offsets
}
