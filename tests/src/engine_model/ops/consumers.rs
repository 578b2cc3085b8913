//! Consumer groups: heartbeats and commits.

use std::collections::BTreeSet;

use felucca_broker::engine::command::{Command, OffsetCommit};
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey, TopicId};

use crate::engine_model::world::World;

/// The second is also a share group's.
const GROUPS: [&str; 3] = ["readers", "audit", "writers"];
const MEMBERS: [&str; 3] = ["uma", "vic", "wes"];

impl World {
    pub(crate) fn heartbeat(&mut self) {
        let group = self.any_name(&GROUPS);
        let member = self.any_name(&MEMBERS);
        let leave = self.rng.chance(8);
        let topics: Vec<String> = if leave {
            Vec::new()
        } else {
            let standard = self.model.topics.values().map(|topic| topic.name.clone());
            standard.filter(|_| self.rng.chance(80)).collect()
        };
        let holding = self.model.consumers.get(&group).and_then(|consumer| consumer.members.get(&member));
        let mut owned: BTreeSet<PartitionKey> =
            holding.map_or_else(BTreeSet::new, |member| member.holding.clone());
        if self.rng.chance(60) {
            owned.retain(|_| self.rng.chance(70));
        }
        if self.rng.chance(10) {
            owned.extend(self.any_partition());
        }
        if self.rng.chance(3) {
            owned.insert(PartitionKey { topic: TopicId([9; 16]), partition: 9 });
        }
        self.heartbeat_as(&group, &member, topics, owned, leave);
    }

    pub(crate) fn heartbeat_as(
        &mut self,
        group: &str,
        member: &str,
        topics: Vec<String>,
        owned: BTreeSet<PartitionKey>,
        leave: bool,
    ) {
        let generation = self.model.consumers.get(group).map_or(0, |consumer| consumer.generation);
        let command = Command::GroupHeartbeat {
            group: group.to_owned(),
            member: member.to_owned(),
            connection: 0,
            topics: topics.clone(),
            owned: owned.iter().copied().collect(),
            generation,
            leave,
        };
        self.note(|| format!("heartbeat {group} {member} {topics:?} owns {owned:?} leave={leave}"));
        if self.model.shares.contains_key(group) {
            self.refused(command, |error| matches!(error, EngineError::WrongGroupKind { .. }));
            return;
        }
        let is_full = self.model.consumers.get(group).is_some_and(|consumer| {
            let members = consumer.members.len() as u64;
            members >= self.settings.max_members_per_group && !consumer.members.contains_key(member)
        });
        if !leave && (is_full || !self.room_for_group(group)) {
            self.refused(command, |error| matches!(error, EngineError::LimitReached { .. }));
            return;
        }
        let reply = self.ask(command, Level::Synced);
        let Reply::Heartbeat { generation, assigned, .. } = reply else { panic!("{reply:?}") };
        let session = (group.to_owned(), member.to_owned());
        if leave {
            assert!(assigned.is_empty());
            self.live.consumers.remove(&session);
            if let Some(consumer) = self.model.consumers.get_mut(group) {
                consumer.gone(member);
            }
            return;
        }
        self.live.consumers.insert(session.clone(), self.now.monotonic_ms);
        let assigned: BTreeSet<PartitionKey> = assigned.into_iter().collect();
        self.assigned.insert(session, assigned.clone());
        for key in &assigned {
            let name = self.model.topics.get(&key.topic).map(|topic| &topic.name);
            assert!(name.is_some_and(|name| topics.contains(name)), "{member} was given {key}");
        }
        let owned = owned.into_iter().filter(|key| self.model.logs.contains_key(key)).collect();
        let consumer = self.model.consumers.entry(group.to_owned()).or_default();
        consumer.heard(member, topics, &owned, &assigned);
        assert_eq!(generation, consumer.generation, "generation of {group}");
    }

    fn room_for_group(&self, group: &str) -> bool {
        let groups = (self.model.shares.len() + self.model.consumers.len()) as u64;
        self.model.consumers.contains_key(group) || groups < self.settings.max_groups
    }

    pub(crate) fn commit_offsets(&mut self) {
        let group = self.any_name(&GROUPS);
        let outside = self.rng.chance(30);
        let member = if outside { String::new() } else { self.any_name(&MEMBERS) };
        let mut offsets = Vec::new();
        for _ in 0..self.rng.between(1, 3) {
            let Some(partition) = self.any_partition() else { return };
            let offset = self.rng.below(self.model.logs[&partition].end + 3);
            offsets.push(OffsetCommit { partition, offset, metadata: format!("at {offset}") });
        }
        self.note(|| format!("commit {group} {member:?} {offsets:?}"));
        let known = self.model.consumers.get(&group);
        let generation = known.map_or(0, |consumer| consumer.generation);
        let has_members = known.is_some_and(|consumer| !consumer.members.is_empty());
        let command = Command::CommitOffsets {
            group: group.clone(),
            member: member.clone(),
            connection: 0,
            generation,
            offsets: offsets.clone(),
        };
        if self.model.shares.contains_key(&group) {
            self.refused(command, |error| matches!(error, EngineError::WrongGroupKind { .. }));
            return;
        }
        if outside && has_members {
            self.refused(command, |error| matches!(error, EngineError::GroupNotEmpty(_)));
            return;
        }
        if !self.room_for_group(&group) {
            self.refused(command, |error| matches!(error, EngineError::LimitReached { .. }));
            return;
        }
        let reply = self.ask(command, Level::Synced);
        let Reply::OffsetsCommitted(results) = reply else { panic!("{reply:?}") };
        let session = (group.clone(), member.clone());
        if let Some(seen) = self.live.consumers.get_mut(&session) {
            *seen = self.now.monotonic_ms;
        }
        let holding = self.model.consumers.get(&group).and_then(|consumer| consumer.members.get(&member));
        let holding = holding.map(|member| member.holding.clone());
        for (commit, result) in offsets.into_iter().zip(results) {
            let end = self.model.logs[&commit.partition].end;
            let right = match &result {
                Ok(()) => {
                    commit.offset <= end
                        && (outside || holding.as_ref().is_some_and(|held| held.contains(&commit.partition)))
                }
                Err(EngineError::OffsetOutOfRange { .. }) => commit.offset > end,
                Err(EngineError::UnknownMember(_)) => !outside && holding.is_none(),
                Err(EngineError::NotAssigned(_)) => {
                    holding.as_ref().is_some_and(|held| !held.contains(&commit.partition))
                }
                Err(_) => false,
            };
            assert!(right, "{commit:?} by {member:?} holding {holding:?}, end {end}: {result:?}");
            if result.is_ok() {
                let consumer = self.model.consumers.entry(group.clone()).or_default();
                consumer.offsets.insert(commit.partition, (commit.offset, commit.metadata));
            }
        }
    }
}
