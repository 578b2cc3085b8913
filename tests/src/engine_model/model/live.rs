//! What a restart of the broker forgets: what is visible, sessions, credit, dead letters being made.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::types::{PartitionKey, SubscriptionId};

use super::Model;

#[derive(Clone, Copy, Debug)]
struct Raise {
    lsn: u64,
    end: u64,
    /// May be shown once written.
    early: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Subscription {
    pub(crate) group: String,
    pub(crate) member: String,
    pub(crate) records: i64,
    pub(crate) bytes: i64,
}

impl Subscription {
    pub(crate) fn has_credit(&self) -> bool {
        self.records > 0 && self.bytes > 0
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    /// What the engine was told last.
    pub(crate) written: u64,
    pub(crate) synced: u64,
    /// Settlements in frames up to this one came out of a checkpoint: repetitions of them cannot be told apart any more.
    pub(crate) forgotten: u64,
    raises: BTreeMap<PartitionKey, Vec<Raise>>,
    boot_ends: BTreeMap<PartitionKey, u64>,
    /// Members of share groups, (group, member), and when they were heard of last.
    pub(crate) members: BTreeMap<(String, String), u64>,
    /// The same of consumer groups.
    pub(crate) consumers: BTreeMap<(String, String), u64>,
    pub(crate) subscriptions: BTreeMap<SubscriptionId, Subscription>,
    pub(crate) letters: BTreeSet<(String, PartitionKey, u64)>,
    /// The order of a group changed: the engine begins anew and may ask again.
    pub(crate) letters_may_repeat: bool,
    /// A scan failed: the engine may pause until then.
    pub(crate) scans_paused_until: u64,
}

impl Live {
    /// After a boot: everything is visible, holders of leases and members of consumer groups have a new session.
    pub(crate) fn boot(model: &Model, now_ms: u64, lsn: u64, forgotten: u64) -> Self {
        let mut live = Self { written: lsn, synced: lsn, forgotten, ..Self::default() };
        live.boot_ends = model.logs.iter().map(|(key, log)| (*key, log.end)).collect();
        for (group, share) in &model.shares {
            for (_, record) in share.parts.values().flat_map(|part| part.records.iter()) {
                if record.lease_deadline().is_some() {
                    live.members.insert((group.clone(), record.member.to_string()), now_ms);
                }
            }
        }
        for (group, consumer) in &model.consumers {
            for member in consumer.members.keys() {
                live.consumers.insert((group.clone(), member.clone()), now_ms);
            }
        }
        live
    }

    pub(crate) fn raised(&mut self, key: PartitionKey, lsn: u64, end: u64, early: bool) {
        self.raises.entry(key).or_default().push(Raise { lsn, end, early });
    }

    /// Nothing at or above this may be handed out.
    pub(crate) fn may_show(&self, key: &PartitionKey) -> u64 {
        self.visible(key, |raise| raise.lsn <= if raise.early { self.written } else { self.synced })
    }

    /// Everything below this must be handed out when asked for.
    pub(crate) fn must_show(&self, key: &PartitionKey) -> u64 {
        self.visible(key, |raise| raise.lsn <= self.synced)
    }

    fn visible(&self, key: &PartitionKey, reached: impl Fn(&Raise) -> bool) -> u64 {
        let raises = self.raises.get(key).into_iter().flatten();
        let raised = raises.filter(|raise| reached(raise)).map(|raise| raise.end).max();
        raised.unwrap_or(0).max(self.boot_ends.get(key).copied().unwrap_or(0))
    }

    pub(crate) fn group_members(&self, group: &str) -> Vec<String> {
        let members = self.members.keys().filter(|(name, _)| name == group);
        members.map(|(_, member)| member.clone()).collect()
    }

    /// The sessions that have ended, which are forgotten with their subscriptions: members and subscriptions.
    pub(crate) fn end_sessions(&mut self, now_ms: u64, session_ms: u64) -> Lost {
        let over = |seen: &u64| seen + session_ms <= now_ms;
        let take = |sessions: &mut BTreeMap<(String, String), u64>| -> Vec<(String, String)> {
            let lost = sessions.iter().filter(|(_, seen)| over(seen)).map(|(name, _)| name.clone()).collect();
            sessions.retain(|_, seen| !over(seen));
            lost
        };
        let (members, consumers) = (take(&mut self.members), take(&mut self.consumers));
        let of_lost = |subscription: &Subscription| {
            members
                .iter()
                .any(|(group, member)| *group == subscription.group && *member == subscription.member)
        };
        let ended: BTreeSet<SubscriptionId> =
            self.subscriptions.iter().filter(|(_, sub)| of_lost(sub)).map(|(id, _)| *id).collect();
        self.subscriptions.retain(|id, _| !ended.contains(id));
        Lost { members, consumers, ended }
    }

    /// A group is gone, with its members; answers their subscriptions.
    pub(crate) fn drop_group(&mut self, group: &str) -> BTreeSet<SubscriptionId> {
        self.members.retain(|(name, _), _| name != group);
        self.consumers.retain(|(name, _), _| name != group);
        let ended = self.subscriptions.extract_if(.., |_, subscription| subscription.group == group);
        ended.map(|(id, _)| id).collect()
    }

    /// When the first session ends.
    pub(crate) fn next_session_end(&self, session_ms: u64) -> Option<u64> {
        self.members.values().chain(self.consumers.values()).min().map(|seen| seen + session_ms)
    }
}

#[derive(Debug)]
pub(crate) struct Lost {
    pub(crate) members: Vec<(String, String)>,
    pub(crate) consumers: Vec<(String, String)>,
    pub(crate) ended: BTreeSet<SubscriptionId>,
}
