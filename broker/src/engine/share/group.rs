//! One share group: its members and their credit, and for each partition the records' state and queue.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::queue::{Queue, Ready};
use super::settle::{self, Decision, Failure};
use super::state::{Cause, ExceptionState, Lease, ShareState, change, stored_slot};
use crate::engine::command::{LeaseRef, ScannedRecord, Settlement};
use crate::engine::config::{OnExhausted, ShareConfig};
use crate::engine::dead_letter::DeadLetterContext;
use crate::engine::effect::{DeadLetterRead, DeliveredRecord, Delivery, Scan, SettleResult, SettleStatus};
use crate::engine::event::{Granted, RecordChange, Settled, event::Kind};
use crate::engine::stage::{RowKey, Stage, TimerKey};
use crate::engine::types::{LeaseId, Lsn, PartitionKey, SubscriptionId, TopicId};

/// Records granted to one member in one turn, so that members and partitions share what is ready.
const GRANT_QUANTUM: usize = 256;
/// Due records and expired leases handled in one step.
const DUE_PER_STEP: usize = 4096;
/// Offsets that one scan may report.
const SCAN_RECORDS: usize = super::queue::LOOKAHEAD;
/// Pause before a failed read of the log is repeated.
const SCAN_RETRY_MS: u64 = 1_000;

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

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) last_seen_ms: u64,
    /// A session timer is set.
    pub(crate) watched: bool,
    subscriptions: BTreeSet<SubscriptionId>,
}

#[derive(Debug)]
struct Subscription {
    member: Arc<str>,
    credit_records: i64,
    credit_bytes: i64,
}

impl Subscription {
    fn has_credit(&self) -> bool {
        self.credit_records > 0 && self.credit_bytes > 0
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

    pub(crate) fn members(&self) -> &BTreeMap<Arc<str>, Member> {
        &self.members
    }

    pub(crate) fn subscriptions(&self) -> impl Iterator<Item = SubscriptionId> {
        self.subscriptions.keys().copied()
    }

    pub(crate) fn leases_of(&self, member: &str) -> u64 {
        let of_partition = |partition: &SharePartition| {
            partition.state.leases().values().filter(|lease| &*lease.member == member).count()
        };
        self.partitions.values().map(of_partition).sum::<usize>() as u64
    }

    fn on_exhausted(&self, topic: &TopicId) -> OnExhausted {
        match self.config.on_exhausted {
            OnExhausted::DeadLetter if !self.dead_letter_topics.contains_key(topic) => OnExhausted::Hold,
            chosen => chosen,
        }
    }

    // ---- Members ----

    /// Opens a subscription. Live leases of the member that it does not name in `held` go back without a failure, and older
    /// subscriptions of the member get nothing more: they are of a connection whose end has not been noticed yet, and what
    /// would be sent there would be leased to nobody.
    pub(crate) fn subscribe(
        &mut self,
        stage: &mut Stage<'_>,
        id: SubscriptionId,
        member: &str,
        credit: (u32, u32),
        held: &[LeaseRef],
    ) {
        self.seen(stage, member);
        let member: Arc<str> = member.into();
        if let Some(entry) = self.members.get_mut(&member) {
            for older in std::mem::replace(&mut entry.subscriptions, BTreeSet::from([id])) {
                self.subscriptions.remove(&older);
                self.takers.remove(&older);
            }
        }
        let held: BTreeSet<(PartitionKey, u64, LeaseId)> =
            held.iter().map(|lease| (lease.partition, lease.offset, lease.lease)).collect();
        let unknown: Vec<(PartitionKey, u64)> = self
            .partitions
            .iter()
            .flat_map(|(key, partition)| {
                partition.state.leases().iter().map(move |(offset, lease)| (*key, *offset, lease))
            })
            .filter(|(key, offset, lease)| {
                lease.member == member && !held.contains(&(*key, *offset, lease.id))
            })
            .map(|(key, offset, _)| (key, offset))
            .collect();
        for (key, offset) in unknown {
            let on_exhausted = self.on_exhausted(&key.topic);
            let Some(partition) = self.partitions.get(&key) else { continue };
            let released = settle::release(&partition.state, &self.config, on_exhausted, offset);
            self.commit_changes(stage, key, Vec::new(), vec![released]);
        }
        let subscription =
            Subscription { member, credit_records: i64::from(credit.0), credit_bytes: i64::from(credit.1) };
        if subscription.has_credit() {
            self.takers.insert(id);
        }
        self.subscriptions.insert(id, subscription);
    }

    pub(crate) fn add_credit(&mut self, id: SubscriptionId, records: u32, bytes: u32) {
        if let Some(subscription) = self.subscriptions.get_mut(&id) {
            subscription.credit_records = subscription.credit_records.saturating_add(i64::from(records));
            subscription.credit_bytes = subscription.credit_bytes.saturating_add(i64::from(bytes));
            if subscription.has_credit() {
                self.takers.insert(id);
            }
        }
    }

    pub(crate) fn unsubscribe(&mut self, id: SubscriptionId) {
        self.takers.remove(&id);
        if let Some(subscription) = self.subscriptions.remove(&id)
            && let Some(member) = self.members.get_mut(&subscription.member)
        {
            member.subscriptions.remove(&id);
        }
    }

    /// Something was heard of the member; its session begins anew.
    pub(crate) fn seen(&mut self, stage: &mut Stage<'_>, member: &str) {
        let now_ms = stage.now.monotonic_ms;
        match self.members.get_mut(member) {
            Some(entry) => entry.last_seen_ms = now_ms,
            None => {
                let entry = Member { last_seen_ms: now_ms, watched: false, subscriptions: BTreeSet::new() };
                self.members.insert(member.into(), entry);
            }
        }
        self.watch(stage, member);
    }

    fn watch(&mut self, stage: &mut Stage<'_>, member: &str) {
        if let Some((name, entry)) = self.members.get_key_value(member)
            && !entry.watched
        {
            let at = entry.last_seen_ms + stage.session_timeout_ms;
            stage.timers.insert((at, TimerKey::Session(self.name.clone(), name.clone())));
        }
        if let Some(entry) = self.members.get_mut(member) {
            entry.watched = true;
        }
    }

    /// Gives every member that holds a lease a session, after a start.
    pub(crate) fn adopt_members(&mut self, stage: &mut Stage<'_>) {
        if self.corrupt.is_some() {
            return;
        }
        let holders: BTreeSet<Arc<str>> = self
            .partitions
            .values()
            .flat_map(|partition| partition.state.leases().values().map(|lease| lease.member.clone()))
            .collect();
        for member in holders {
            self.seen(stage, &member);
        }
    }

    /// The member's session timer fired: it is lost when it was silent for the whole session.
    pub(crate) fn session_timer(&mut self, stage: &mut Stage<'_>, member: &str) {
        let Some(entry) = self.members.get_mut(member) else { return };
        entry.watched = false;
        if entry.last_seen_ms + stage.session_timeout_ms > stage.now.monotonic_ms {
            self.watch(stage, member);
            return;
        }
        let subscriptions = std::mem::take(&mut entry.subscriptions);
        for id in subscriptions {
            self.subscriptions.remove(&id);
            self.takers.remove(&id);
            let error = crate::engine::error::EngineError::UnknownMember(member.to_owned());
            stage.out.ended.push((id, error));
        }
        self.members.remove(member);
        let keys: Vec<PartitionKey> = self.partitions.keys().copied().collect();
        for key in keys {
            let on_exhausted = self.on_exhausted(&key.topic);
            let Some(partition) = self.partitions.get(&key) else { continue };
            let lost = partition.state.leases().iter().filter(|(_, lease)| &*lease.member == member);
            let changes: Vec<RecordChange> = lost
                .map(|(offset, _)| {
                    let failure =
                        Failure { cause: Cause::MemberLost, counted: true, delay_ms: None, detail: None };
                    settle::failure(&partition.state, &self.config, on_exhausted, *offset, failure, stage.now)
                })
                .collect();
            self.commit_changes(stage, key, Vec::new(), changes);
        }
    }

    // ---- Settling ----

    /// Carries out settlements of one member, in order. One result per settlement.
    pub(crate) fn settle(
        &mut self,
        stage: &mut Stage<'_>,
        member: &str,
        settlements: &[Settlement],
    ) -> Vec<SettleResult> {
        self.seen(stage, member);
        let mut results = Vec::with_capacity(settlements.len());
        // A partition's run of settlements becomes one event.
        for run in settlements.chunk_by(|a, b| a.record.partition == b.record.partition) {
            let key = run[0].record.partition;
            let on_exhausted = self.on_exhausted(&key.topic);
            let mut acked = Vec::new();
            let mut changes = Vec::new();
            let Some(partition) = self.partitions.get_mut(&key) else {
                results.extend(run.iter().map(|_| settle::unchanged(SettleStatus::Fenced)));
                continue;
            };
            for settlement in run {
                let record = &settlement.record;
                let decision = settle::decide(
                    &partition.state,
                    &self.config,
                    on_exhausted,
                    member,
                    record,
                    &settlement.outcome,
                    stage.now,
                );
                results.push(match decision {
                    Decision::Answer(status) => settle::unchanged(status),
                    Decision::Ack { late } => {
                        let status = if late { SettleStatus::Late } else { SettleStatus::Ok };
                        partition.ack(stage, record.offset);
                        acked.push(record.offset);
                        settle::result(status, None, stage.now)
                    }
                    Decision::Change(change) => {
                        let result = settle::result(SettleStatus::Ok, Some(&change), stage.now);
                        partition.change(stage, &change);
                        changes.push(change);
                        result
                    }
                });
            }
            self.push_settled(stage, key, acked, changes, Vec::new());
        }
        results
    }

    /// What acknowledging this record would answer, without doing it: `Ok` of the status when it can be done.
    pub(crate) fn can_complete(
        &self,
        stage: &Stage<'_>,
        member: &str,
        record: &LeaseRef,
    ) -> Result<SettleStatus, SettleStatus> {
        let Some(partition) = self.partitions.get(&record.partition) else {
            return Err(SettleStatus::Fenced);
        };
        let on_exhausted = self.on_exhausted(&record.partition.topic);
        let ack = crate::engine::command::Outcome::Ack;
        match settle::decide(&partition.state, &self.config, on_exhausted, member, record, &ack, stage.now) {
            Decision::Ack { late: false } => Ok(SettleStatus::Ok),
            Decision::Ack { late: true } => Ok(SettleStatus::Late),
            Decision::Answer(status) => Err(status),
            Decision::Change(_) => Err(SettleStatus::Stale),
        }
    }

    /// Acknowledges a record that `can_complete`.
    pub(crate) fn ack(&mut self, stage: &mut Stage<'_>, record: &LeaseRef) {
        self.commit_changes(stage, record.partition, vec![record.offset], Vec::new());
    }

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
        while let Some(offset) = partition.queue.next_letter() {
            let Some(exception) = partition.state.exception(offset) else { continue };
            let context = DeadLetterContext {
                group: self.name.to_string(),
                topic: key.topic,
                partition: key.partition,
                offset,
                deliveries: exception.deliveries,
                failures: exception.failures,
                reason: dead_letter_reason(
                    exception.cause,
                    exception.deliveries >= self.config.max_deliveries,
                ),
                class: exception.class.clone(),
                message: exception.reason.clone(),
                detail: exception.detail.clone(),
                first_delivery_ms: exception.first_delivery_wall_ms,
                last_delivery_ms: exception.last_delivery_wall_ms,
                consumer: exception.member.to_string(),
                wall_ms: stage.now.wall_ms,
            };
            stage.out.dead_letter_reads.push(DeadLetterRead {
                group: self.name.to_string(),
                partition: key,
                offset,
                context,
            });
        }
    }

    /// Whether this exhausted record still waits for the dead letter that was being made.
    pub(crate) fn awaits_letter(&self, key: &PartitionKey, offset: u64) -> bool {
        self.partitions.get(key).is_some_and(|partition| {
            partition.queue.letter_in_flight(offset)
                && partition
                    .state
                    .exception(offset)
                    .is_some_and(|exception| exception.state == ExceptionState::Exhausted)
        })
    }

    /// The record's dead letter was appended in this frame, or (`held`) could not be made.
    pub(crate) fn letter_done(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        offset: u64,
        held: Option<String>,
    ) {
        let change = match held {
            None => RecordChange { offset, kind: change::DEAD_LETTERED, ..Default::default() },
            Some(reason) => RecordChange {
                offset,
                kind: change::HELD,
                cause: Cause::Undecodable as u32,
                class: "undecodable".to_owned(),
                reason,
                ..Default::default()
            },
        };
        self.commit_changes(stage, key, Vec::new(), vec![change]);
    }

    // ---- Timers and commits ----

    /// A partition's timer fired: due records become available, expired leases fail.
    pub(crate) fn partition_timer(&mut self, stage: &mut Stage<'_>, key: PartitionKey, fired_at: u64) {
        let on_exhausted = self.on_exhausted(&key.topic);
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        if partition.armed != Some(fired_at) {
            return;
        }
        partition.armed = None;
        let now_ms = stage.now.monotonic_ms;
        let mut changes = Vec::new();
        for offset in partition.queue.take_due(now_ms, DUE_PER_STEP) {
            if partition.state.lease(offset).is_some_and(|lease| lease.deadline_ms <= now_ms) {
                let failure =
                    Failure { cause: Cause::LeaseExpired, counted: true, delay_ms: None, detail: None };
                let change =
                    settle::failure(&partition.state, &self.config, on_exhausted, offset, failure, stage.now);
                partition.change(stage, &change);
                changes.push(change);
            } else if let Some(exception) = partition.state.exception(offset)
                && let ExceptionState::Scheduled { due_ms } = exception.state
                && due_ms <= now_ms
            {
                let slot = exception.slot;
                partition.state.due(offset);
                partition.queue.available(&partition.state, offset, slot);
            }
        }
        self.push_settled(stage, key, Vec::new(), changes, Vec::new());
        stage.pump.insert(self.name.clone());
    }

    /// Frames up to `committed` have reached the commit level. Answers whether anything still waits.
    pub(crate) fn committed(&mut self, stage: &mut Stage<'_>, key: PartitionKey, committed: Lsn) -> bool {
        let Some(partition) = self.partitions.get_mut(&key) else { return false };
        partition.queue.committed(&partition.state, committed);
        let waits = partition.queue.waits_for_commit();
        self.after_change(stage, key);
        waits
    }

    // ---- Handing out ----

    pub(crate) fn scanned(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        from: u64,
        next: u64,
        records: &[ScannedRecord],
    ) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        let missing = partition.queue.scanned(&partition.state, from, next, records);
        let skipped: Vec<u64> = missing.into_iter().flat_map(|(first, count)| [first, count]).collect();
        if !skipped.is_empty() {
            let event = Settled { skipped: skipped.clone(), ..Default::default() };
            partition.state.apply_settled(&event);
        }
        self.push_settled(stage, key, Vec::new(), Vec::new(), skipped);
        stage.pump.insert(self.name.clone());
    }

    pub(crate) fn scan_failed(&mut self, stage: &mut Stage<'_>, key: PartitionKey) {
        if let Some(partition) = self.partitions.get_mut(&key) {
            partition.queue.scan_failed(stage.now.monotonic_ms + SCAN_RETRY_MS);
        }
        self.after_change(stage, key);
    }

    /// Hands out what is ready to members with credit, then asks for scans where little is left.
    pub(crate) fn pump(&mut self, stage: &mut Stage<'_>) {
        if self.paused {
            return;
        }
        while let Some(key) = next_after(&self.ready, self.last_partition) {
            let Some(id) = next_after(&self.takers, self.last_subscription) else { break };
            self.last_partition = Some(key);
            self.last_subscription = Some(id);
            if !self.grant(stage, key, id) {
                self.ready.remove(&key);
            }
        }
        if !self.takers.is_empty() {
            self.ask_for_scans(stage);
        }
    }

    /// New records are visible on a partition.
    pub(crate) fn advanced(&mut self, key: PartitionKey) {
        self.unscanned.insert(key);
    }

    fn ask_for_scans(&mut self, stage: &mut Stage<'_>) {
        // What wants no scan now is put back by whatever changes that: new records, a grant, a timer.
        for key in std::mem::take(&mut self.unscanned) {
            let Some(partition) = self.partitions.get_mut(&key) else { continue };
            let Some(high_watermark) = stage.high_watermarks.get(&key) else { continue };
            let wants = partition.queue.wants_scan(&partition.state, *high_watermark, stage.now.monotonic_ms);
            if let Some(from) = wants {
                partition.queue.scan_started();
                stage.out.scans.push(Scan {
                    group: self.name.to_string(),
                    partition: key,
                    from,
                    until: *high_watermark,
                    max_records: SCAN_RECORDS,
                });
            }
        }
    }

    /// Grants one member its share of what is ready on one partition. Answers whether more is ready there.
    fn grant(&mut self, stage: &mut Stage<'_>, key: PartitionKey, id: SubscriptionId) -> bool {
        let Some(partition) = self.partitions.get_mut(&key) else { return false };
        let Some(subscription) = self.subscriptions.get_mut(&id) else { return false };
        let leases = partition.state.leases().len() as u64;
        if leases >= stage.max_leases {
            return false;
        }
        let allow_new = (partition.state.exceptions().len() as u64) < stage.max_exceptions;
        let share = partition.queue.ready_len().div_ceil(self.takers.len().max(1)).clamp(1, GRANT_QUANTUM);
        let mut taken: Vec<Ready> = Vec::with_capacity(share);
        while taken.len() < share
            && subscription.has_credit()
            && let Some(ready) = partition.queue.take(&partition.state, allow_new)
        {
            subscription.credit_records -= 1;
            subscription.credit_bytes -= i64::from(ready.size);
            taken.push(ready);
        }
        if !subscription.has_credit() {
            self.takers.remove(&id);
        }
        if taken.is_empty() {
            return false;
        }
        taken.sort_unstable_by_key(|ready| ready.offset);
        let first_lease = stage.next_leases(taken.len());
        let now_ms = stage.now.monotonic_ms;
        let deadline_ms = now_ms + self.config.lease_ms;
        let mut records = Vec::with_capacity(taken.len());
        for (lease, ready) in (first_lease.sequence..).zip(&taken) {
            partition.state.grant(
                ready.offset,
                Lease {
                    id: LeaseId { boot_epoch: first_lease.boot_epoch, sequence: lease },
                    member: subscription.member.clone(),
                    granted_ms: now_ms,
                    deadline_ms,
                    wall_ms: stage.now.wall_ms,
                    slot: ready.slot,
                    size: ready.size,
                },
            );
            partition.queue.leased(ready.offset, deadline_ms);
            let (deliveries, failures) = partition.state.attempts(ready.offset);
            records.push(DeliveredRecord { offset: ready.offset, deliveries, failures });
        }
        let keyed = taken.iter().any(|ready| ready.slot.is_some());
        stage.event(Kind::Granted(Granted {
            group: self.name.to_string(),
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
            member: subscription.member.to_string(),
            boot_epoch: first_lease.boot_epoch,
            first_sequence: first_lease.sequence,
            granted_ms: now_ms,
            deadline_ms,
            wall_ms: stage.now.wall_ms,
            offset_deltas: to_deltas(taken.iter().map(|ready| ready.offset).collect()),
            slots: if keyed {
                taken.iter().map(|ready| stored_slot(ready.slot)).collect()
            } else {
                Vec::new()
            },
            sizes: taken.iter().map(|ready| ready.size).collect(),
        }));
        stage.dirty.insert(RowKey::Share(self.name.clone(), key));
        stage.out.deliveries.push(Delivery {
            subscription: id,
            partition: key,
            first_lease,
            lease_ms: self.config.lease_ms,
            records,
        });
        let more = partition.queue.has_ready();
        self.after_change(stage, key);
        more
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

fn dead_letter_reason(cause: Cause, at_delivery_cap: bool) -> &'static str {
    match cause {
        Cause::Rejected => "rejected",
        _ if at_delivery_cap => "max_deliveries",
        Cause::LeaseExpired => "lease_expired",
        Cause::MemberLost => "member_lost",
        Cause::Undecodable => "undecodable",
        Cause::Nacked | Cause::Released | Cause::None => "max_failures",
    }
}

/// The smallest element above `last`, else the smallest of all: round robin over a set.
fn next_after<T: Ord + Copy>(set: &BTreeSet<T>, last: Option<T>) -> Option<T> {
    use std::ops::Bound::{Excluded, Unbounded};
    last.and_then(|last| set.range((Excluded(last), Unbounded)).next().copied())
        .or_else(|| set.first().copied())
}

/// Ascending offsets as the first one and then differences.
fn to_deltas(mut offsets: Vec<u64>) -> Vec<u64> {
    for i in (1..offsets.len()).rev() {
        offsets[i] -= offsets[i - 1];
    }
    offsets
}
