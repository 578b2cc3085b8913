//! Members of a share group: sessions, subscriptions, credit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::ShareGroup;
use crate::engine::command::LeaseRef;
use crate::engine::error::EngineError;
use crate::engine::share::settle;
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
    /// What it was granted last was to be alone.
    pub(super) had_alone: bool,
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
        self.ledger.holders.leases_of(member)
    }

    /// Opens a subscription. Live leases of the member that it does not name in `held` go back without a failure, and older
    /// subscriptions of the member end: they are of a connection whose end has not been noticed yet, and what would be sent
    /// there would be leased to nobody; or they are of another live process under the same name, which is told.
    pub(crate) fn subscribe(
        &mut self,
        stage: &mut Stage<'_>,
        id: SubscriptionId,
        member: &str,
        credit: (u32, u32),
        held: &[LeaseRef],
    ) {
        self.join(stage, member);
        let member: Arc<str> = member.into();
        if let Some(entry) = self.members.get_mut(&member) {
            for older in std::mem::replace(&mut entry.subscriptions, BTreeSet::from([id])) {
                self.drop_subscription(older);
                stage.out.ended.push((older, EngineError::MemberFenced(member.to_string())));
            }
        }
        let held: BTreeSet<(PartitionKey, u64, LeaseId)> =
            held.iter().map(|lease| (lease.partition, lease.offset, lease.lease)).collect();
        let mut released = Vec::new();
        for (key, offsets) in self.ledger.holders.offsets_of(&member) {
            let Some(partition) = self.partitions.get(&key) else { continue };
            let is_named = |offset: u64| {
                partition.state.lease(offset).is_none_or(|lease| held.contains(&(key, offset, lease.id)))
            };
            let desk = partition.desk(&self.ledger, &self.config, self.on_exhausted(&key.topic), stage.now);
            let unnamed = offsets.iter().filter(|offset| !is_named(*offset));
            let changes: Vec<_> = unnamed.map(|offset| settle::forgotten(&desk, offset)).collect();
            if !changes.is_empty() {
                released.push((key, changes));
            }
        }
        for (key, changes) in released {
            self.commit_changes(stage, key, Vec::new(), changes);
        }
        let (credit_records, credit_bytes) = (i64::from(credit.0), i64::from(credit.1));
        let subscription = Subscription { member, credit_records, credit_bytes, had_alone: false };
        self.subscriptions.insert(id, subscription);
        self.offer(id);
    }

    pub(crate) fn add_credit(&mut self, id: SubscriptionId, records: u32, bytes: u32) {
        if let Some(subscription) = self.subscriptions.get_mut(&id) {
            subscription.credit_records = subscription.credit_records.saturating_add(i64::from(records));
            subscription.credit_bytes = subscription.credit_bytes.saturating_add(i64::from(bytes));
            self.offer(id);
        }
    }

    pub(crate) fn unsubscribe(&mut self, id: SubscriptionId) {
        if let Some(subscription) = self.drop_subscription(id)
            && let Some(member) = self.members.get_mut(&subscription.member)
        {
            member.subscriptions.remove(&id);
            // With nothing in hand there is nothing to come back for.
            if member.subscriptions.is_empty() && self.leases_of(&subscription.member) == 0 {
                self.members.remove(&subscription.member);
            }
        }
    }

    fn drop_subscription(&mut self, id: SubscriptionId) -> Option<Subscription> {
        self.takers.remove(&id);
        self.withheld.remove(&id);
        self.reserved = self.reserved.filter(|reserved| *reserved != id);
        self.subscriptions.remove(&id)
    }

    fn join(&mut self, stage: &mut Stage<'_>, member: &str) {
        if !self.members.contains_key(member) {
            let subscriptions = BTreeSet::new();
            let entry = Member { last_seen_ms: stage.now.monotonic_ms, watched: false, subscriptions };
            self.members.insert(member.into(), entry);
        }
        self.seen(stage, member);
    }

    /// Something was heard of the member: its session begins anew. Who is no member does not become one by it.
    pub(crate) fn seen(&mut self, stage: &mut Stage<'_>, member: &str) {
        if let Some(entry) = self.members.get_mut(member) {
            entry.last_seen_ms = stage.now.monotonic_ms;
            self.watch(stage, member);
        }
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
        let holders: Vec<Arc<str>> = self.ledger.holders.members().cloned().collect();
        for member in holders {
            self.join(stage, &member);
        }
    }

    /// The member's session timer fired: it is lost when it was silent for the whole session. Answers how many of its leases
    /// failed; when there are more, that goes on in the next turn.
    pub(crate) fn session_timer(&mut self, stage: &mut Stage<'_>, member: &str) -> usize {
        let Some(entry) = self.members.get_mut(member) else { return 0 };
        entry.watched = false;
        if entry.last_seen_ms + stage.session_timeout_ms > stage.now.monotonic_ms {
            self.watch(stage, member);
            return 0;
        }
        let subscriptions = std::mem::take(&mut entry.subscriptions);
        for id in subscriptions {
            self.drop_subscription(id);
            stage.out.ended.push((id, EngineError::UnknownMember(member.to_owned())));
        }
        let failed = self.member_lost(stage, member);
        if self.leases_of(member) > 0 {
            self.watch(stage, member);
        } else {
            self.members.remove(member);
        }
        failed
    }
}
