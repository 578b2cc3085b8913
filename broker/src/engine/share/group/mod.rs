//! One share group: its members and their credit, and for each partition the records' state and queue.
//!
//! [`members`] keeps sessions and subscriptions, [`settling`] carries out what ends or returns a lease, [`granting`] hands out,
//! [`partition`] is the group on one partition. What is here is what they share, and the way from a change to what is derived from it.

mod granting;
mod members;
mod partition;
mod settling;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use members::{Member, Subscription};
pub(crate) use partition::SharePartition;
use partition::is_failed_outcome;
use roaring::RoaringTreemap;

use super::acks::{self, push_ranges};
use super::budget::{Budget, Charge};
use super::holders::Holders;
use super::outage::Outage;
use super::queue::{Queue, push_gap};
use super::recent::{Recent, SettledAs};
use super::state::ShareState;
use crate::engine::config::{OnExhausted, ShareConfig};
use crate::engine::event::{RecordChange, Settled, event::Kind};
use crate::engine::stage::{RowKey, Stage, TimerKey};
use crate::engine::types::{PartitionKey, SubscriptionId, TopicId};

/// Pause before a failed read of the log is repeated.
const READ_RETRY_MS: u64 = 1_000;

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
    budget: Budget,
    /// For what is not of one partition.
    charge: Charge,
    /// A timer is set to forget how leases ended.
    forgetting: bool,
    /// Boxed: a tree's node has room for eleven, and most groups are on few.
    partitions: BTreeMap<PartitionKey, Box<SharePartition>>,
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
        budget: Budget,
    ) -> Self {
        Self {
            charge: budget.charge(),
            budget,
            forgetting: false,
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

    pub(crate) fn partitions(&self) -> &BTreeMap<PartitionKey, Box<SharePartition>> {
        &self.partitions
    }

    pub(crate) fn partition(&self, key: &PartitionKey) -> Option<&SharePartition> {
        self.partitions.get(key).map(Box::as_ref)
    }

    pub(crate) fn put_partition(&mut self, key: PartitionKey, state: ShareState) {
        self.remove_partition(&key);
        let partition = SharePartition::new(key, state, self.config.ordered, &self.budget);
        self.partitions.insert(key, Box::new(partition));
        self.unscanned.insert(key);
    }

    pub(crate) fn remove_partition(&mut self, key: &PartitionKey) {
        if let Some(partition) = self.partitions.remove(key) {
            for (offset, lease) in partition.state.leases() {
                self.ledger.holders.ended(&lease.member, key, *offset);
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
        let mut successes = 0_u32;
        for offset in acks::offsets(&event.acked) {
            successes = successes.saturating_add(1);
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
            ledger.outage.fold_successes(successes);
        }
        true
    }

    /// Forgets all derived state and derives it again: after replay, and when the ordering changed.
    pub(crate) fn rebuild(&mut self) {
        self.ready.clear();
        self.alone.clear();
        self.forgetting = false;
        self.ledger.holders = Holders::default();
        for (key, partition) in &mut self.partitions {
            partition.queue = Queue::rebuild(&partition.state, self.config.ordered, &self.budget);
            partition.armed = None;
            partition.account();
            self.unscanned.insert(*key);
            for (offset, lease) in partition.state.leases() {
                let alone = partition.state.exception(*offset).is_some_and(|exception| exception.alone);
                self.ledger.holders.granted(&lease.member, *key, [*offset].into_iter(), alone);
            }
        }
        let leases = self.partitions.values().flat_map(|partition| partition.state.leases().values());
        self.ledger.outage.recount(leases.map(|lease| lease.granted_ms));
    }

    /// The log of a partition starts at `log_start` now: what lies below and was never handed out has expired. What is leased or
    /// came back is kept.
    pub(crate) fn expire(&mut self, stage: &mut Stage<'_>, key: PartitionKey, log_start: u64) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        let state = &mut partition.state;
        let mut undecided = Vec::new();
        push_gap(&mut undecided, state, state.low(), log_start);
        undecided.retain(|(first, count)| !state.is_all_settled(*first, first + count));
        if undecided.is_empty() {
            return;
        }
        let mut settled = Settled::default();
        for (first, count) in undecided {
            state.skip(first, first + count, true);
            settled.expired.extend([first, count]);
        }
        let state = &partition.state;
        let is_kept = |offset| state.lease(offset).is_some() || state.exception(offset).is_some();
        partition.queue.forget(stage.lsn, |offset| offset < log_start && !is_kept(offset));
        self.push_gone(stage, key, settled);
    }

    /// Records that the group has not in hand were compacted away, in the frame that is being staged.
    pub(crate) fn compacted(&mut self, stage: &mut Stage<'_>, key: PartitionKey, dropped: &RoaringTreemap) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        let state = &mut partition.state;
        if dropped.max().is_none_or(|last| last < state.low()) {
            return;
        }
        // What lies above, the log says when it is read.
        let gone = state.undecided(dropped, partition.queue.scan_next());
        partition.queue.read_anew(stage.now.monotonic_ms);
        partition.queue.forget(stage.lsn, |offset| dropped.contains(offset));
        let mut settled = Settled::default();
        for offset in gone {
            match settled.skipped.as_mut_slice() {
                [.., first, count] if *first + *count == offset => *count += 1,
                _ => settled.skipped.extend([offset, 1]),
            }
        }
        for range in settled.skipped.chunks_exact(2) {
            partition.state.skip(range[0], range[0] + range[1], false);
        }
        self.push_gone(stage, key, settled);
    }

    /// Settles what the log no longer has, in the frame that is being staged.
    fn push_gone(&mut self, stage: &mut Stage<'_>, key: PartitionKey, settled: Settled) {
        self.push_settled(stage, key, &[], settled);
        stage.pump.insert(self.name.clone());
        if self.config.ordered {
            // What was not looked at yet may have been in front of any key's next record, and is back if the frame is lost.
            self.wait_for(stage, |other| *other == key);
        }
    }

    /// The group was moved on a partition, or its order changed, in the frame that is being staged.
    pub(crate) fn wait_for(&mut self, stage: &mut Stage<'_>, which: impl Fn(&PartitionKey) -> bool) {
        for (key, partition) in self.partitions.iter_mut().filter(|(key, _)| which(key)) {
            partition.queue.wait_for(stage.lsn);
            stage.uncommitted.insert((self.name.clone(), *key));
            partition.watched = true;
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
        self.wait_to_forget(stage);
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
            self.push_settled(stage, key, &acked, settled);
        }
    }

    /// Stages the event of what was just applied: `acked`, and the changes, skipped and expired offsets of `settled`.
    fn push_settled(&mut self, stage: &mut Stage<'_>, key: PartitionKey, acked: &[u64], settled: Settled) {
        let gaps = !settled.skipped.is_empty() || !settled.expired.is_empty();
        let outcomes = !acked.is_empty() || !settled.changes.is_empty();
        let mut is_new = true;
        if gaps || !settled.changes.is_empty() {
            let mut ranges = Vec::new();
            push_ranges(&mut ranges, 0, acked);
            stage.event(Kind::Settled(Settled {
                group: self.name.to_string(),
                topic_id: key.topic.0.to_vec(),
                partition: key.partition,
                acked: ranges,
                now_ms: stage.now.monotonic_ms,
                ..settled
            }));
        } else if outcomes {
            let at = (stage.lsn, stage.now.monotonic_ms);
            is_new = stage.acks.push(stage.out, at, &self.name, key, acked);
        }
        if is_new && (gaps || outcomes) {
            stage.dirty.insert(RowKey::Share(self.name.clone(), key));
            // The window of the outage guard.
            stage.dirty.insert(RowKey::Group(self.name.clone()));
        }
        if outcomes {
            // Others may have waited for what has ended.
            stage.pump.insert(self.name.clone());
            self.note_outage(stage);
            self.wait_to_forget(stage);
        }
        self.after_change(stage, key);
    }

    /// Charges the budget with what is not of one partition, and sets the timer that lets go of it.
    fn wait_to_forget(&mut self, stage: &mut Stage<'_>) {
        if self.budget.is_spent() {
            self.ledger.recent.forget_some();
        }
        let members = self.members.len() * (size_of::<Member>() + size_of::<Subscription>() + 200);
        let ledger = self.ledger.recent.memory() + self.ledger.holders.memory();
        self.charge.set((size_of::<Self>() + members) as u64 + ledger);
        if !self.forgetting
            && let Some(at) = self.ledger.recent.forget_at()
        {
            self.forgetting = true;
            stage.timers.insert((at, TimerKey::Forget(self.name.clone())));
        }
    }

    /// Forgets how leases ended, as far as that is long ago.
    pub(crate) fn forget(&mut self, stage: &mut Stage<'_>) {
        self.forgetting = false;
        self.ledger.recent.forget(stage.now.monotonic_ms);
        self.wait_to_forget(stage);
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
        partition.account();
        if !partition.watched && partition.queue.waits_for_commit() {
            partition.watched = true;
            stage.uncommitted.insert((self.name.clone(), key));
        }
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

/// Ascending offsets as the first one and then differences.
fn to_deltas(mut offsets: Vec<u64>) -> Vec<u64> {
    for i in (1..offsets.len()).rev() {
        offsets[i] -= offsets[i - 1];
    }
    offsets
}
