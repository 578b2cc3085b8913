//! What ends a lease or returns a record: settlements, expiry, due times, dead letters made, commits.

use super::{READ_RETRY_MS, ShareGroup};
use crate::engine::command::{HeldFate, LeaseRef, Outcome, Settlement};
use crate::engine::dead_letter::DeadLetterContext;
use crate::engine::effect::{DeadLetterRead, SettleResult, SettleStatus};
use crate::engine::event::{RecordChange, Settled, ShareKicked, event::Kind};
use crate::engine::share::settle::{self, Decision, Failure};
use crate::engine::share::state::{Cause, ExceptionState, change};
use crate::engine::stage::{RowKey, Stage};
use crate::engine::types::{Lsn, PartitionKey};

/// Due records and expired leases handled in one step.
const DUE_PER_STEP: usize = 4096;

impl ShareGroup {
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
            let (ledger, config) = (&mut self.ledger, &self.config);
            for settlement in run {
                let record = &settlement.record;
                let desk = partition.desk(ledger, config, on_exhausted, stage.now);
                results.push(match settle::decide(&desk, member, record, &settlement.outcome) {
                    Decision::Answer(status) => settle::unchanged(status),
                    Decision::Ack { late } => {
                        let status = if late { SettleStatus::Late } else { SettleStatus::Ok };
                        partition.ack(stage, ledger, config, record.offset);
                        acked.push(record.offset);
                        settle::result(status, None, stage.now)
                    }
                    Decision::Change(change) => {
                        let result = settle::result(SettleStatus::Ok, Some(&change), stage.now);
                        partition.change(stage, ledger, config, &change);
                        changes.push(change);
                        result
                    }
                });
            }
            self.push_settled(stage, key, &acked, Settled { changes, ..Settled::default() });
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
        let desk = partition.desk(&self.ledger, &self.config, on_exhausted, stage.now);
        match settle::decide(&desk, member, record, &Outcome::Ack) {
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

    /// Settles records of the partition that nobody has leased: they were moved elsewhere in this frame.
    pub(crate) fn take_out(&mut self, stage: &mut Stage<'_>, key: PartitionKey, offsets: Vec<u64>) {
        if let Some(partition) = self.partitions.get_mut(&key) {
            partition.queue.take_out(&offsets);
        }
        self.commit_changes(stage, key, offsets, Vec::new());
    }

    // ---- Dead letters ----

    /// Asks for the dead letters of exhausted records, as many as may be in the making.
    pub(super) fn ask_for_letters(&mut self, stage: &mut Stage<'_>, key: PartitionKey) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        while let Some(offset) = partition.queue.next_letter(stage.now.monotonic_ms) {
            let Some(exception) = partition.state.exception(offset) else { continue };
            let context = DeadLetterContext {
                group: self.name.to_string(),
                topic: key.topic,
                partition: key.partition,
                offset,
                deliveries: exception.deliveries,
                failures: exception.failures,
                reason: exception.ended.name(),
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
            // Why it failed stays what it was.
            Some(reason) => {
                let exception = self.partitions.get(&key).and_then(|known| known.state.exception(offset));
                let known = exception.map_or("", |exception| exception.detail.as_str());
                let detail = settle::cut_detail(&format!("no dead letter: {reason}\n{known}"));
                RecordChange { offset, kind: change::HELD, detail, ..Default::default() }
            }
        };
        self.commit_changes(stage, key, Vec::new(), vec![change]);
    }

    /// The disk failed when the record's dead letter was being made.
    pub(crate) fn letter_failed(&mut self, stage: &mut Stage<'_>, key: PartitionKey, offset: u64) {
        if let Some(partition) = self.partitions.get_mut(&key) {
            partition.queue.letter_failed(offset, stage.now.monotonic_ms + READ_RETRY_MS);
        }
        self.after_change(stage, key);
    }

    // ---- Timers and commits ----

    /// A partition's timer fired: due records become available, expired leases fail. Answers how many there were; when there
    /// are more, the timer is set anew.
    pub(crate) fn partition_timer(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        fired_at: u64,
    ) -> usize {
        let on_exhausted = self.on_exhausted(&key.topic);
        let Some(partition) = self.partitions.get_mut(&key) else { return 0 };
        if partition.armed != Some(fired_at) {
            return 0;
        }
        partition.armed = None;
        let now_ms = stage.now.monotonic_ms;
        let mut changes = Vec::new();
        let due = partition.queue.take_due(now_ms, DUE_PER_STEP);
        let records = due.len();
        for offset in due {
            if partition.state.lease(offset).is_some_and(|lease| lease.deadline_ms <= now_ms) {
                let (ledger, config) = (&mut self.ledger, &self.config);
                let desk = partition.desk(ledger, config, on_exhausted, stage.now);
                let change = settle::failure(&desk, offset, Failure::lapsed(Cause::LeaseExpired));
                partition.change(stage, ledger, config, &change);
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
        self.push_settled(stage, key, &[], Settled { changes, ..Settled::default() });
        stage.pump.insert(self.name.clone());
        records
    }

    /// Fails leases of a member that is lost, as many as may be in one step. Answers how many.
    pub(super) fn member_lost(&mut self, stage: &mut Stage<'_>, member: &str) -> usize {
        let mut lost = Vec::new();
        let mut room = DUE_PER_STEP;
        for (key, offsets) in self.ledger.holders.offsets_of(member) {
            let offsets: Vec<u64> = offsets.iter().take(room).collect();
            room -= offsets.len();
            lost.push((key, offsets));
            if room == 0 {
                break;
            }
        }
        for (key, offsets) in lost {
            let on_exhausted = self.on_exhausted(&key.topic);
            let Some(partition) = self.partitions.get_mut(&key) else { continue };
            let mut changes = Vec::with_capacity(offsets.len());
            for offset in offsets {
                let (ledger, config) = (&mut self.ledger, &self.config);
                let desk = partition.desk(ledger, config, on_exhausted, stage.now);
                let change = settle::failure(&desk, offset, Failure::lapsed(Cause::MemberLost));
                partition.change(stage, ledger, config, &change);
                changes.push(change);
            }
            self.push_settled(stage, key, &[], Settled { changes, ..Settled::default() });
        }
        DUE_PER_STEP - room
    }

    /// An operator wants every scheduled record of the partition now. Answers how many there were.
    pub(crate) fn kick(&mut self, stage: &mut Stage<'_>, key: PartitionKey) -> u64 {
        let Some(partition) = self.partitions.get_mut(&key) else { return 0 };
        let kicked = partition.state.kick();
        if kicked.is_empty() {
            return 0;
        }
        partition.queue.none_scheduled();
        for offset in &kicked {
            let slot = partition.state.exception(*offset).and_then(|exception| exception.slot);
            partition.queue.available(&partition.state, *offset, slot);
        }
        stage.event(Kind::ShareKicked(ShareKicked {
            group: self.name.to_string(),
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
        }));
        stage.dirty.insert(RowKey::Share(self.name.clone(), key));
        self.after_change(stage, key);
        kicked.len() as u64
    }

    /// An operator decides on the held records of the partition, at most `most` of them. Answers how many there were.
    pub(crate) fn end_held(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        fate: HeldFate,
        most: usize,
    ) -> usize {
        let Some(partition) = self.partitions.get(&key).filter(|partition| partition.state.held() > 0) else {
            return 0;
        };
        let held = partition.state.exceptions().iter();
        let held = held.filter(|(_, exception)| exception.state == ExceptionState::Held).take(most);
        let changes: Vec<RecordChange> = held
            .map(|(offset, _)| match fate {
                HeldFate::Release => RecordChange {
                    offset: *offset,
                    kind: change::AVAILABLE,
                    fresh: true,
                    ..RecordChange::default()
                },
                HeldFate::Discard => {
                    RecordChange { offset: *offset, kind: change::DISCARDED, ..RecordChange::default() }
                }
            })
            .collect();
        let ended = changes.len();
        self.commit_changes(stage, key, Vec::new(), changes);
        ended
    }

    /// Frames up to `committed` have reached the commit level. While anything waits for more, it asks to be told again.
    pub(crate) fn committed(&mut self, stage: &mut Stage<'_>, key: PartitionKey, committed: Lsn) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        partition.watched = false;
        partition.queue.committed(&partition.state, committed);
        self.after_change(stage, key);
    }
}
