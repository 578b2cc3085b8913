//! Members of a share group: sessions, subscriptions, credit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{ShareGroup, SharePartition};
use crate::engine::command::LeaseRef;
use crate::engine::error::EngineError;
use crate::engine::event::RecordChange;
use crate::engine::share::settle::{self, Failure};
use crate::engine::share::state::Cause;
use crate::engine::stage::{Stage, TimerKey};
use crate::engine::types::{LeaseId, PartitionKey, SubscriptionId};

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) last_seen_ms: u64,
    /// A session timer is set.
    pub(crate) watched: bool,
    subscriptions: BTreeSet<SubscriptionId>,
}

#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) member: Arc<str>,
    pub(super) credit_records: i64,
    pub(super) credit_bytes: i64,
}

impl Subscription {
    pub(super) fn has_credit(&self) -> bool {
        self.credit_records > 0 && self.credit_bytes > 0
    }
}

impl ShareGroup {
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
            let error = EngineError::UnknownMember(member.to_owned());
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
}
