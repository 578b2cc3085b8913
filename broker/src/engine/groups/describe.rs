//! What is told of groups of both kinds, and of dead-letter topics.

use crate::engine::Engine;
use crate::engine::catalog;
use crate::engine::effect::{
    DeadLetterInfo, GroupDescription, GroupKind, GroupListing, GroupMemberInfo, GroupPartitionInfo,
    OutageInfo, Reply, TopicKind,
};
use crate::engine::error::EngineError;
use crate::engine::partition::Partition;
use crate::engine::share::ShareGroup;
use crate::engine::types::{Now, TopicId};

impl Engine {
    pub(in crate::engine) fn list_groups(&self) -> Reply {
        let names = |topics: &mut dyn Iterator<Item = TopicId>| -> Vec<String> {
            let topics = topics.filter_map(|id| self.catalog.get(&id));
            topics
                .filter(|topic| !matches!(topic.kind, TopicKind::Redrive { .. }))
                .map(|topic| topic.name.to_string())
                .collect()
        };
        let shares = self.groups.values().filter(|group| !group.hidden).map(|group| GroupListing {
            group: group.name.to_string(),
            kind: GroupKind::Share,
            members: group.members().len() as u32,
            topics: names(&mut group.topics.iter().copied()),
        });
        let consumers = self.consumers.iter().map(|(name, group)| {
            let topics: std::collections::BTreeSet<TopicId> =
                group.offsets.keys().map(|key| key.topic).collect();
            GroupListing {
                group: name.to_string(),
                kind: GroupKind::Consumer,
                members: group.members.len() as u32,
                topics: names(&mut topics.into_iter()),
            }
        });
        let mut groups: Vec<GroupListing> = shares.chain(consumers).collect();
        groups.sort_by(|a, b| a.group.cmp(&b.group));
        Reply::Groups(groups)
    }

    pub(in crate::engine) fn describe_group(&self, now: Now, name: &str) -> Result<Reply, EngineError> {
        if let Some(group) = self.groups.get(name) {
            return Ok(Reply::Group(self.describe_share_group(now, group)));
        }
        let group = self.consumers.get(name).ok_or_else(|| EngineError::UnknownGroup(name.to_owned()))?;
        let members = group.members.iter().map(|(member, entry)| GroupMemberInfo {
            member: member.to_string(),
            assigned: entry.holding.iter().copied().collect(),
            leased: 0,
        });
        let partitions = group.offsets.iter().filter_map(|(key, committed)| {
            let topic = self.catalog.get(&key.topic)?;
            let high_watermark = self.desk.high_watermarks.get(key).copied().unwrap_or(0);
            Some(GroupPartitionInfo {
                topic: topic.name.to_string(),
                partition: Some(*key),
                high_watermark,
                position: Some(committed.offset),
                lag: high_watermark.saturating_sub(committed.offset),
                oldest_unsettled: (committed.offset < high_watermark).then_some(committed.offset),
                ..GroupPartitionInfo::default()
            })
        });
        Ok(Reply::Group(GroupDescription {
            group: name.to_owned(),
            kind: GroupKind::Consumer,
            paused: false,
            config: Vec::new(),
            members: members.collect(),
            partitions: partitions.collect(),
            outage: None,
            corrupt: group.corrupt.clone(),
        }))
    }

    fn describe_share_group(&self, now: Now, group: &ShareGroup) -> GroupDescription {
        let outage = &group.ledger.outage;
        let outage = outage
            .limit()
            .zip(outage.not_before())
            .map(|(limit, at)| OutageInfo { limit, next_probe_ms: at.saturating_sub(now.monotonic_ms) });
        let members = group.members().keys().map(|member| GroupMemberInfo {
            member: member.to_string(),
            assigned: Vec::new(),
            leased: group.leases_of(member),
        });
        let partitions = group.partitions().iter().filter_map(|(key, partition)| {
            let topic = self.catalog.get(&key.topic)?;
            let high_watermark = self.desk.high_watermarks.get(key).copied().unwrap_or(0);
            let state = &partition.state;
            let counts = state.counts();
            let lag = state.unsettled(high_watermark);
            let leased = state.leases().len() as u64;
            let pinned = self.partitions.get(key).into_iter().flat_map(Partition::detached);
            let pinned = pinned.filter(|(segment, end)| state.has_in_hand(segment.base_offset, *end));
            let elsewhere = leased + state.scheduled() + state.held() + state.exhausted();
            Some(GroupPartitionInfo {
                topic: topic.name.to_string(),
                partition: Some(*key),
                high_watermark,
                position: Some(state.low()),
                lag,
                available: lag.saturating_sub(elsewhere),
                oldest_unsettled: state.oldest_unsettled(high_watermark),
                leased,
                scheduled: state.scheduled(),
                held: state.held(),
                exhausted: state.exhausted(),
                parked: partition.queue.parked(),
                acked: counts.acked,
                dead_lettered: counts.dead_lettered,
                discarded: counts.discarded,
                skipped: counts.skipped,
                expired: counts.expired,
                deliveries: counts.deliveries,
                failures: counts.failures,
                alarms: partition.alarms(&self.settings),
                memory_bytes: partition.memory(),
                pinned_bytes: pinned.map(|(segment, _)| segment.bytes).sum(),
                unreadable: partition.queue.unreadable().cloned(),
            })
        });
        GroupDescription {
            group: group.name.to_string(),
            kind: GroupKind::Share,
            paused: group.paused,
            config: group.config.entries(),
            members: members.collect(),
            partitions: partitions.collect(),
            outage,
            corrupt: group.corrupt.clone(),
        }
    }

    pub(in crate::engine) fn list_dead_letters(&self, group: Option<&str>) -> Reply {
        let mut letters = Vec::new();
        for topic in self.catalog.iter() {
            let TopicKind::DeadLetter { group: owner, source } = &topic.kind else { continue };
            if group.is_some_and(|wanted| wanted != owner) {
                continue;
            }
            let redrive_group = catalog::redrive_name(owner, source);
            let (mut pending, mut redriven, mut purged) = (0, 0, 0);
            if let Some(hidden) = self.groups.get(redrive_group.as_str()) {
                for (key, partition) in hidden.partitions() {
                    let end = self.desk.high_watermarks.get(key).copied().unwrap_or(0);
                    pending += partition.state.unsettled(end);
                    redriven += partition.state.counts().acked;
                    purged += partition.state.counts().discarded;
                }
            }
            letters.push(DeadLetterInfo {
                group: owner.clone(),
                source: source.clone(),
                topic: topic.info(),
                redrive_group,
                pending,
                redriven,
                purged,
            });
        }
        Reply::DeadLetters(letters)
    }
}
