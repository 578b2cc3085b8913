//! Handing out: scans of the log, and grants to members with credit.

use std::collections::BTreeSet;

use super::members::Subscription;
use super::{READ_RETRY_MS, ShareGroup, to_deltas};
use crate::engine::command::ScannedRecord;
use crate::engine::effect::{DeliveredRecord, Delivery, Scan};
use crate::engine::event::{Granted, Settled, event::Kind};
use crate::engine::share::budget::TRICKLE;
use crate::engine::share::queue::{self, Ready};
use crate::engine::share::state::{Lease, stored_slot};
use crate::engine::stage::{RowKey, Stage};
use crate::engine::types::{LeaseId, PartitionKey, SubscriptionId};

/// Records granted to one member in one turn, so that members and partitions share what is ready.
const GRANT_QUANTUM: usize = 256;
/// Of what members hold on average, this part may be granted to one of them before it is the next one's turn.
const HELD_PER_GRANTED: u64 = 4;
/// Beyond the limit of leases, one part in so many is kept for records that came back.
const RETURNED_RESERVE: u64 = 8;
/// Offsets that one scan may report.
const SCAN_RECORDS: usize = queue::LOOKAHEAD;
/// The same while the budget of memory is spent.
const SCAN_RECORDS_SPENT: usize = 256;

impl ShareGroup {
    pub(crate) fn scanned(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        from: u64,
        next: u64,
        records: &[ScannedRecord],
    ) {
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        let mut settled = Settled::default();
        for (first, count) in partition.queue.scanned(&partition.state, from, next, records) {
            partition.state.skip(first, first + count, false);
            settled.skipped.extend([first, count]);
        }
        self.push_settled(stage, key, &[], settled);
        stage.pump.insert(self.name.clone());
    }

    pub(crate) fn scan_failed(
        &mut self,
        stage: &mut Stage<'_>,
        key: PartitionKey,
        from: u64,
        reason: String,
    ) {
        if let Some(partition) = self.partitions.get_mut(&key) {
            partition.queue.reading_failed(from, stage.now.monotonic_ms + READ_RETRY_MS, reason);
        }
        self.after_change(stage, key);
    }

    /// Hands out what is ready to members with credit, then asks for scans where little is left.
    pub(crate) fn pump(&mut self, stage: &mut Stage<'_>) {
        if self.paused {
            return;
        }
        for id in std::mem::take(&mut self.withheld) {
            self.offer(id);
        }
        loop {
            self.grant_alone(stage);
            if self.alone.is_empty()
                && let Some(reserved) = self.reserved.take()
            {
                self.offer(reserved);
            }
            if !self.grant_ready(stage) {
                break;
            }
        }
        self.reserve();
        if !self.takers.is_empty() {
            self.ask_for_scans(stage);
        }
    }

    /// Puts a subscription where its credit and what its member holds want it.
    pub(super) fn offer(&mut self, id: SubscriptionId) {
        self.takers.remove(&id);
        self.withheld.remove(&id);
        if let Some(subscription) = self.subscriptions.get(&id)
            && subscription.has_credit()
        {
            let alone = self.ledger.holders.is_alone(&subscription.member);
            let open = !alone && self.reserved != Some(id);
            (if open { &mut self.takers } else { &mut self.withheld }).insert(id);
        }
    }

    /// Hands out, each to one member, as long as there are members with credit. Answers whether anything came of it.
    fn grant_ready(&mut self, stage: &mut Stage<'_>) -> bool {
        let mut progress = false;
        while let Some(key) = next_after(&self.ready, self.last_partition) {
            let Some(id) = next_after(&self.takers, self.last_subscription) else { break };
            if self.ledger.outage.room(stage.now.monotonic_ms) == 0 {
                break;
            }
            self.last_partition = Some(key);
            self.last_subscription = Some(id);
            progress = true;
            if !self.grant(stage, key, id, false) {
                self.ready.remove(&key);
            }
        }
        progress
    }

    /// Hands out what is to be alone, to members that hold nothing.
    fn grant_alone(&mut self, stage: &mut Stage<'_>) {
        while let Some(key) = next_after(&self.alone, self.last_alone) {
            let Some(id) = self.free_taker() else { break };
            if self.ledger.outage.room(stage.now.monotonic_ms) == 0 {
                break;
            }
            self.last_alone = Some(key);
            if !self.grant(stage, key, id, true) {
                self.alone.remove(&key);
            }
        }
    }

    /// A member that may be given a record alone: it has credit and holds nothing, and what it was given last was not alone
    /// too while others wait.
    fn free_taker(&self) -> Option<SubscriptionId> {
        let is_free = |id: &SubscriptionId| {
            self.subscriptions.get(id).is_some_and(|subscription| {
                let in_turn = self.ready.is_empty() || !subscription.had_alone;
                let chosen = in_turn || self.reserved == Some(*id);
                chosen && subscription.has_credit() && self.leases_of(&subscription.member) == 0
            })
        };
        self.reserved.filter(is_free).or_else(|| self.takers.iter().copied().find(is_free))
    }

    /// When a record waits to be granted alone and no member is free, one of them gets nothing more until it is.
    fn reserve(&mut self) {
        let leases = |subscription: &Subscription| self.leases_of(&subscription.member);
        let is_alone = |subscription: &Subscription| self.ledger.holders.is_alone(&subscription.member);
        // One that neither has credit nor will have it by settling something is waited for in vain.
        let hopeful = |subscription: &Subscription| subscription.has_credit() || leases(subscription) > 0;
        // Else a suspect would be tried again and again before others: in an outage for ever, for it would be every probe.
        let in_turn = |subscription: &Subscription| self.ready.is_empty() || !subscription.had_alone;
        let kept = self.reserved.and_then(|id| self.subscriptions.get(&id)).is_some_and(hopeful);
        if self.alone.is_empty() || kept {
            return;
        }
        let candidates =
            self.subscriptions.iter().filter(|(_, one)| hopeful(one) && in_turn(one) && !is_alone(one));
        let chosen = candidates.min_by_key(|(_, one)| (!one.has_credit(), leases(one)));
        let former = std::mem::replace(&mut self.reserved, chosen.map(|(id, _)| *id));
        for id in former.into_iter().chain(self.reserved) {
            self.offer(id);
        }
    }

    /// New records are visible on a partition.
    pub(crate) fn advanced(&mut self, key: PartitionKey) {
        self.unscanned.insert(key);
    }

    /// Everything that was refused, or that nobody was told of, may be looked at again: the budget of memory is not spent
    /// any more, or there are subscriptions again.
    pub(crate) fn look_again(&mut self) {
        for (key, partition) in &self.partitions {
            self.unscanned.insert(*key);
            if partition.queue.has_ready() {
                self.ready.insert(*key);
            }
        }
    }

    fn ask_for_scans(&mut self, stage: &mut Stage<'_>) {
        let spent = self.budget.is_spent();
        // What wants no scan now is put back by whatever changes that: new records, a grant, a timer.
        for key in std::mem::take(&mut self.unscanned) {
            let Some(partition) = self.partitions.get_mut(&key) else { continue };
            let Some(high_watermark) = stage.high_watermarks.get(&key) else { continue };
            if spent && partition.is_over_trickle() {
                stage.starved.insert(self.name.clone());
                continue;
            }
            let end = partition.state.low().saturating_add(stage.max_span).min(*high_watermark);
            let wanted = partition.queue.wants_reading(&partition.state, end, stage.now.monotonic_ms);
            if let Some(reading) = wanted {
                partition.queue.reading_started(reading);
                stage.out.scans.push(Scan {
                    group: self.name.to_string(),
                    partition: key,
                    from: reading.from,
                    until: reading.until,
                    max_records: if spent { SCAN_RECORDS_SPENT } else { SCAN_RECORDS },
                    soon: !self.config.ordered,
                });
            }
        }
    }

    /// Grants one member its share of what is ready on one partition, or one record `alone`. Answers whether more is ready
    /// there.
    fn grant(&mut self, stage: &mut Stage<'_>, key: PartitionKey, id: SubscriptionId, alone: bool) -> bool {
        let room = self.ledger.outage.room(stage.now.monotonic_ms);
        let Some(partition) = self.partitions.get_mut(&key) else { return false };
        let members = self.subscriptions.len().max(1) as u64;
        let Some(subscription) = self.subscriptions.get_mut(&id) else { return false };
        let leases = partition.state.leases().len() as u64;
        let room_below = |limit: u64| usize::try_from(limit.saturating_sub(leases)).unwrap_or(usize::MAX);
        let full = partition.state.exceptions().len() as u64 >= stage.max_exceptions;
        // A full table stops new records only.
        let mut free_for_new = if full { 0 } else { room_below(stage.max_leases) };
        let free = room_below(stage.max_leases.saturating_add(stage.max_leases.div_ceil(RETURNED_RESERVE)));
        let end = stage.high_watermarks.get(&key).copied().unwrap_or(0);
        let fair = partition.queue.outlook(end).div_ceil(self.takers.len().max(1));
        // Whoever has much in hand does not wait for the next record: then fewer, larger deliveries are better than even ones.
        let held = self.ledger.holders.leases() / members;
        let share = fair.max((held / HELD_PER_GRANTED) as usize).clamp(1, GRANT_QUANTUM);
        let mut share = if alone { 1 } else { share.min(room).min(free) };
        if self.budget.is_spent() {
            if partition.is_over_trickle() {
                stage.starved.insert(self.name.clone());
                free_for_new = 0;
            }
            share = share.min(TRICKLE as usize);
        }
        let mut taken: Vec<Ready> = Vec::with_capacity(share);
        while taken.len() < share
            && subscription.has_credit()
            && let Some(ready) = if alone {
                partition.queue.take_alone(&partition.state)
            } else {
                partition.queue.take(&partition.state, free_for_new > 0)
            }
        {
            if partition.state.exception(ready.offset).is_none() {
                free_for_new -= 1;
            }
            subscription.credit_records -= 1;
            subscription.credit_bytes -= i64::from(ready.size);
            taken.push(ready);
        }
        if taken.is_empty() {
            return false;
        }
        subscription.had_alone = alone;
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
            self.ledger.outage.granted();
            let (deliveries, failures) = partition.state.attempts(ready.offset);
            records.push(DeliveredRecord { offset: ready.offset, deliveries, failures });
        }
        let offsets = || taken.iter().map(|ready| ready.offset);
        self.ledger.holders.granted(&subscription.member, key, offsets(), alone);
        partition.queue.leased(offsets(), deadline_ms);
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
            offset_deltas: to_deltas(offsets().collect()),
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
        let more = if alone { partition.queue.has_alone() } else { partition.queue.has_ready() };
        if alone {
            // The one that was waited for, or another was free.
            self.reserved = self.reserved.filter(|reserved| *reserved != id);
        }
        self.offer(id);
        self.after_change(stage, key);
        more
    }
}

/// The smallest element above `last`, else the smallest of all: round robin over a set.
fn next_after<T: Ord + Copy>(set: &BTreeSet<T>, last: Option<T>) -> Option<T> {
    use std::ops::Bound::{Excluded, Unbounded};
    last.and_then(|last| set.range((Excluded(last), Unbounded)).next().copied())
        .or_else(|| set.first().copied())
}
