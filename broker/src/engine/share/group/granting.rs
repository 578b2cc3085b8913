//! Handing out: scans of the log, and grants to members with credit.

use std::collections::BTreeSet;

use super::{ShareGroup, to_deltas};
use crate::engine::command::ScannedRecord;
use crate::engine::effect::{DeliveredRecord, Delivery, Scan};
use crate::engine::event::{Granted, Settled, event::Kind};
use crate::engine::share::queue::{self, Ready};
use crate::engine::share::state::{Lease, stored_slot};
use crate::engine::stage::{RowKey, Stage};
use crate::engine::types::{LeaseId, PartitionKey, SubscriptionId};

/// Records granted to one member in one turn, so that members and partitions share what is ready.
const GRANT_QUANTUM: usize = 256;
/// Offsets that one scan may report.
const SCAN_RECORDS: usize = queue::LOOKAHEAD;
/// Pause before a failed read of the log is repeated.
const SCAN_RETRY_MS: u64 = 1_000;

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

/// The smallest element above `last`, else the smallest of all: round robin over a set.
fn next_after<T: Ord + Copy>(set: &BTreeSet<T>, last: Option<T>) -> Option<T> {
    use std::ops::Bound::{Excluded, Unbounded};
    last.and_then(|last| set.range((Excluded(last), Unbounded)).next().copied())
        .or_else(|| set.first().copied())
}
