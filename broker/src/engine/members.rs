//! Members of consumer groups: heartbeats, assignment, committed offsets.

use std::sync::Arc;

use super::Engine;
use super::command::OffsetCommit;
use super::consumer_group::ConsumerGroup;
use super::effect::{Effects, Reply};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::stage::TimerKey;
use super::types::{Now, PartitionKey};
use crate::plants::planted;

/// Longest metadata text of a committed offset, in bytes.
const MAX_METADATA_BYTES: usize = 4096;

impl Engine {
    /// Refuses what comes on another connection than the newest of a member: it is late, and would undo what came after it.
    pub(super) fn meet_member(
        &mut self,
        name: &str,
        member: &str,
        connection: u64,
    ) -> Result<(), EngineError> {
        let group = self.consumers.get_mut(name);
        let Some(entry) = group.and_then(|group| group.members.get_mut(member)) else { return Ok(()) };
        if connection < entry.connection {
            return Err(EngineError::MemberFenced(member.to_owned()));
        }
        entry.connection = connection;
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(super) fn group_heartbeat(
        &mut self,
        now: Now,
        name: &str,
        member: &str,
        connection: u64,
        topics: Vec<String>,
        owned: &[PartitionKey],
        generation: u64,
        leave: bool,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        self.consumer_group_allowed(name)?;
        if member.is_empty() || member.len() > super::catalog::MAX_NAME_BYTES {
            return Err(EngineError::InvalidRequest("member id: expected 1 to 200 bytes".to_owned()));
        }
        for topic in &topics {
            self.catalog.require(topic)?;
        }
        let name: Arc<str> = name.into();
        let session_ms = self.desk.session_timeout_ms;
        let interval_ms = u32::try_from((session_ms / 10).clamp(50, 3_000)).unwrap_or(1_000);
        if leave {
            if let Some(group) = self.consumers.get_mut(&name)
                && group.members.remove(member).is_some()
            {
                group.generation += 1;
                let event = group.members_event(&name);
                self.stage_event(Kind::MembersChanged(event), out);
            }
            return Ok(Reply::Heartbeat { generation, assigned: Vec::new(), interval_ms });
        }
        self.room_for_consumer_group(&name)?;
        let max_members = self.settings.max_members_per_group;
        let group = self.consumers.entry(name.clone()).or_default();
        let before = group.members.get(member).cloned();
        if before.is_none() && group.members.len() as u64 >= max_members {
            return Err(EngineError::LimitReached { what: "members of the group", limit: max_members });
        }
        let held_by_others = |key: &PartitionKey| {
            group.members.iter().any(|(other, entry)| &**other != member && entry.holding.contains(key))
        };
        // A member that comes back after its session ended keeps what nobody took meanwhile.
        let claims: Vec<PartitionKey> = match &before {
            Some(entry) => owned.iter().filter(|key| entry.holding.contains(key)).copied().collect(),
            None => {
                let exists = |key: &&PartitionKey| self.partitions.contains_key(key);
                owned.iter().filter(exists).filter(|key| !held_by_others(key)).copied().collect()
            }
        };
        let entry = group.members.entry(member.into()).or_default();
        entry.last_seen_ms = now.monotonic_ms;
        entry.connection = connection;
        entry.topics = topics;
        entry.holding = claims.into_iter().collect();
        let catalog = &self.catalog;
        let partitions_of =
            |topic: &str| catalog.by_name(topic).map_or_else(Vec::new, |topic| topic.keys().collect());
        let assigned = group.assigned(member, partitions_of);
        let mut changed = before.as_ref().is_none_or(|before| before.topics != group.members[member].topics);
        if let Some(entry) = group.members.get_mut(member) {
            entry.holding.extend(assigned.iter().copied());
            changed |= before.is_none_or(|before| before.holding != entry.holding);
        }
        if changed {
            group.generation += 1;
            let event = group.members_event(&name);
            out.events.push(event::Event { kind: Some(Kind::MembersChanged(event)) });
            self.desk.dirty.insert(super::stage::RowKey::Consumer(name.clone()));
        }
        let generation = group.generation;
        self.watch_consumer(&name, member);
        Ok(Reply::Heartbeat { generation, assigned: assigned.into_iter().collect(), interval_ms })
    }

    fn consumer_group_allowed(&self, name: &str) -> Result<(), EngineError> {
        if self.groups.contains_key(name) {
            return Err(EngineError::WrongGroupKind { group: name.to_owned(), actual: "share" });
        }
        match self.consumers.get(name) {
            None => super::catalog::check_name("group", name),
            Some(ConsumerGroup { corrupt: Some(reason), .. }) => {
                Err(EngineError::GroupCorrupt { group: name.to_owned(), reason: reason.clone() })
            }
            Some(_) => Ok(()),
        }
    }

    fn room_for_consumer_group(&self, name: &str) -> Result<(), EngineError> {
        let limit = self.settings.max_groups;
        if self.consumers.contains_key(name) || ((self.groups.len() + self.consumers.len()) as u64) < limit {
            return Ok(());
        }
        Err(EngineError::LimitReached { what: "groups", limit })
    }

    fn watch_consumer(&mut self, name: &Arc<str>, member: &str) {
        let session_ms = self.desk.session_timeout_ms;
        if let Some(entry) = self.consumers.get_mut(name).and_then(|group| group.members.get_mut(member))
            && !entry.watched
        {
            entry.watched = true;
            let timer = TimerKey::ConsumerSession(name.clone(), member.into());
            self.desk.timers.insert((entry.last_seen_ms + session_ms, timer));
        }
    }

    /// Gives every member a new session, after a start.
    pub(super) fn watch_consumers(&mut self, now: Now) {
        let mut members = Vec::new();
        for (name, group) in &mut self.consumers {
            for (member, entry) in &mut group.members {
                entry.last_seen_ms = now.monotonic_ms;
                entry.watched = false;
                members.push((name.clone(), member.clone()));
            }
        }
        for (name, member) in members {
            self.watch_consumer(&name, &member);
        }
    }

    pub(super) fn consumer_session_timer(
        &mut self,
        now: Now,
        name: &Arc<str>,
        member: &str,
        out: &mut Effects,
    ) {
        let session_ms = self.desk.session_timeout_ms;
        let Some(group) = self.consumers.get_mut(name) else { return };
        let Some(entry) = group.members.get_mut(member) else { return };
        entry.watched = false;
        if entry.last_seen_ms + session_ms > now.monotonic_ms {
            self.watch_consumer(name, member);
            return;
        }
        group.members.remove(member);
        group.generation += 1;
        let event = group.members_event(name);
        out.events.push(event::Event { kind: Some(Kind::MembersChanged(event)) });
        self.desk.dirty.insert(super::stage::RowKey::Consumer(name.clone()));
    }

    pub(super) fn commit_offsets(
        &mut self,
        now: Now,
        name: &str,
        member: &str,
        generation: u64,
        offsets: Vec<OffsetCommit>,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        self.consumer_group_allowed(name)?;
        self.room_for_consumer_group(name)?;
        let name: Arc<str> = name.into();
        let empty = ConsumerGroup::default();
        let group = self.consumers.get(&name).unwrap_or(&empty);
        if member.is_empty() && !group.members.is_empty() {
            return Err(EngineError::GroupNotEmpty(name.to_string()));
        }
        let mut results = Vec::with_capacity(offsets.len());
        let mut accepted = Vec::new();
        for commit in &offsets {
            let checked = self
                .check_offset(commit)
                .and_then(|()| group.check_commit(member, generation, commit.partition));
            if checked.is_ok() {
                accepted.push(commit.to_event());
            }
            results.push(checked);
        }
        if !accepted.is_empty() {
            let event = event::OffsetsCommitted { group: name.to_string(), offsets: accepted };
            self.stage_event(Kind::OffsetsCommitted(event), out);
            if planted("forget-commits") {
                out.events.pop();
            }
        }
        if let Some(entry) = self.consumers.get_mut(&name).and_then(|group| group.members.get_mut(member)) {
            entry.last_seen_ms = now.monotonic_ms;
        }
        Ok(Reply::OffsetsCommitted(results))
    }

    fn check_offset(&self, commit: &OffsetCommit) -> Result<(), EngineError> {
        let Some(partition) = self.partitions.get(&commit.partition) else {
            return Err(EngineError::UnknownPartition(commit.partition));
        };
        if commit.offset > partition.end {
            let (partition, offset, end) = (commit.partition, commit.offset, partition.end);
            return Err(EngineError::OffsetOutOfRange { partition, offset, end });
        }
        if commit.metadata.len() > MAX_METADATA_BYTES {
            return Err(EngineError::InvalidRequest(format!("metadata: at most {MAX_METADATA_BYTES} bytes")));
        }
        Ok(())
    }

    pub(super) fn fetch_offsets(
        &self,
        name: &str,
        partitions: &[PartitionKey],
    ) -> Result<Reply, EngineError> {
        let Some(group) = self.consumers.get(name) else { return Ok(Reply::Offsets(Vec::new())) };
        self.consumer_group_allowed(name)?;
        let wanted =
            group.offsets.iter().filter(|(key, _)| partitions.is_empty() || partitions.contains(key));
        let offsets = wanted.map(|(key, committed)| OffsetCommit {
            partition: *key,
            offset: committed.offset,
            metadata: committed.metadata.clone(),
        });
        Ok(Reply::Offsets(offsets.collect()))
    }
}
