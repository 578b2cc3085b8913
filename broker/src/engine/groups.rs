//! Share groups seen from outside: create, alter, move, delete, describe; and their members' commands.

use super::Engine;
use super::append::Origin;
use super::catalog::{self, Topic, check_name};
use super::command::{AppendEntry, LeaseRef, SeekTo, Settlement, StagedBatch};
use super::config::{ShareConfig, TopicConfig, mix, to_entries};
use super::effect::{
    DeadLetterInfo, Effects, GroupDescription, GroupKind, GroupListing, GroupMemberInfo, GroupPartitionInfo,
    Reply, TopicKind,
};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::partition::Sequence;
use super::share::settle;
use super::types::{Level, Lsn, Now, PartitionKey, SubscriptionId, TopicId};

impl Engine {
    /// Creates a share group with its dead-letter topics, or adds topics to one that has the same settings.
    pub(super) fn create_share_group(
        &mut self,
        now: Now,
        name: &str,
        topics: &[String],
        config: &[(String, String)],
        from_end: bool,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        check_name("group", name)?;
        if self.groups.contains_key(name) || self.consumers.contains_key(name) {
            return Err(EngineError::GroupExists(name.to_owned()));
        }
        let config = ShareConfig::default().with(config)?;
        if topics.is_empty() {
            return Err(EngineError::InvalidRequest("a share group needs at least one topic".to_owned()));
        }
        let mut sources: Vec<Topic> = Vec::new();
        for topic in topics {
            let topic = self.catalog.require(topic)?;
            if matches!(topic.kind, TopicKind::Redrive { .. }) {
                let why = format!("topic {:?} belongs to another share group", &*topic.name);
                return Err(EngineError::InvalidRequest(why));
            }
            if sources.iter().all(|known| known.id != topic.id) {
                sources.push(topic.clone());
            }
        }
        for source in &sources {
            self.check_companion(&catalog::dead_letter_name(name, &source.name), name, source)?;
            self.check_companion(&catalog::redrive_name(name, &source.name), name, source)?;
        }
        self.room_for_companions(name, &sources)?;
        let mut ids: Vec<TopicId> = sources.iter().map(|source| source.id).collect();
        let mut entropy = now.entropy;
        for source in sources.iter().filter(|source| source.kind == TopicKind::Standard) {
            ids.push(self.add_companions(name, source, &mut entropy, out)?);
        }
        self.start_group(name, &ids, &config, from_end, false, out);
        self.link_dead_letters(name);
        Ok(Reply::Done)
    }

    /// A name that the group needs must be free, or be left from a former group of the same name and topic.
    fn check_companion(&self, companion: &str, group: &str, source: &Topic) -> Result<(), EngineError> {
        let Some(existing) = self.catalog.by_name(companion) else { return Ok(()) };
        let own = match &existing.kind {
            TopicKind::DeadLetter { group: g, source: s } | TopicKind::Redrive { group: g, source: s } => {
                g == group && **s == *source.name && existing.partitions == source.partitions
            }
            TopicKind::Standard => false,
        };
        if own { Ok(()) } else { Err(EngineError::TopicExists(companion.to_owned())) }
    }

    /// Whether the topics and groups that come with a share group stay within the limits, so that all are made or none.
    fn room_for_companions(&self, group: &str, sources: &[Topic]) -> Result<(), EngineError> {
        let mut more = Room { topics: 0, partitions: 0, groups: 1 };
        for source in sources.iter().filter(|source| source.kind == TopicKind::Standard) {
            let letters = self.catalog.by_name(&catalog::dead_letter_name(group, &source.name)).is_none();
            let redrive = self.catalog.by_name(&catalog::redrive_name(group, &source.name)).is_none();
            more.topics += u64::from(letters) + u64::from(redrive);
            more.partitions += (u64::from(letters) + u64::from(redrive)) * u64::from(source.partitions);
            more.groups += u64::from(letters);
        }
        let settings = &self.settings;
        let groups = (self.groups.len() + self.consumers.len()) as u64;
        for (what, needed, limit) in [
            ("topics", self.catalog.len() + more.topics, settings.max_topics),
            ("partitions", self.catalog.partitions + more.partitions, settings.max_partitions),
            ("groups", groups + more.groups, settings.max_groups),
        ] {
            if needed > limit {
                return Err(EngineError::LimitReached { what, limit });
            }
        }
        Ok(())
    }

    /// Creates the dead-letter topic with the hidden group that redrives it, and the redrive topic; answers the latter's id.
    fn add_companions(
        &mut self,
        group: &str,
        source: &Topic,
        entropy: &mut u64,
        out: &mut Effects,
    ) -> Result<TopicId, EngineError> {
        let names = || (group.to_owned(), source.name.to_string());
        let dead_letters = catalog::dead_letter_name(group, &source.name);
        let redrives = catalog::redrive_name(group, &source.name);
        let config = TopicConfig::new(&self.settings);
        if self.catalog.by_name(&dead_letters).is_none() {
            let (group, source_name) = names();
            let kind = TopicKind::DeadLetter { group, source: source_name };
            let id = topic_id(entropy);
            self.add_topic(id, &dead_letters, source.partitions, kind, config.clone(), out)?;
            let holds = ShareConfig::default().with(&[("on-exhausted".to_owned(), "hold".to_owned())])?;
            self.start_group(&redrives, &[id], &holds, false, true, out);
        }
        if let Some(existing) = self.catalog.by_name(&redrives) {
            return Ok(existing.id);
        }
        let (group, source_name) = names();
        let id = topic_id(entropy);
        let kind = TopicKind::Redrive { group, source: source_name };
        self.add_topic(id, &redrives, source.partitions, kind, config, out)?;
        Ok(id)
    }

    fn start_group(
        &mut self,
        name: &str,
        topics: &[TopicId],
        config: &ShareConfig,
        from_end: bool,
        hidden: bool,
        out: &mut Effects,
    ) {
        let row = event::GroupRow {
            group: name.to_owned(),
            topic_ids: topics.iter().map(|id| id.0.to_vec()).collect(),
            config: to_entries(&config.entries()),
            paused: false,
            hidden,
        };
        self.stage_event(Kind::GroupCreated(row), out);
        for id in topics {
            let keys: Vec<PartitionKey> =
                self.catalog.get(id).map_or_else(Vec::new, |topic| topic.keys().collect());
            for key in keys {
                let start =
                    self.partitions.get(&key).map_or(0, |p| if from_end { p.end } else { p.log_start });
                self.start_share(name, key, start, out);
            }
        }
    }

    fn start_share(&mut self, group: &str, key: PartitionKey, start: u64, out: &mut Effects) {
        let started = event::ShareStarted {
            group: group.to_owned(),
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
            start,
            fence_boot_epoch: self.desk.boot_epoch,
            fence_sequence: self.desk.next_sequence,
        };
        self.stage_event(Kind::ShareStarted(started), out);
    }

    /// Derives where a group's exhausted records go.
    pub(super) fn link_dead_letters(&mut self, name: &str) {
        let Some(group) = self.groups.get_mut(name) else { return };
        group.dead_letter_topics.clear();
        for id in &group.topics {
            let Some(topic) = self.catalog.get(id) else { continue };
            let source: &str = match &topic.kind {
                TopicKind::Standard => &topic.name,
                TopicKind::Redrive { source, .. } => source,
                TopicKind::DeadLetter { .. } => continue,
            };
            if let Some(letters) = self.catalog.by_name(&catalog::dead_letter_name(name, source)) {
                group.dead_letter_topics.insert(*id, letters.id);
            }
        }
    }

    pub(super) fn alter_share_group(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        config: &[(String, String)],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let group = self.share_group(name)?;
        let altered = group.config.clone().with(config)?;
        let reordered = altered.ordered != group.config.ordered;
        let event = event::GroupAltered {
            group: name.to_owned(),
            config: to_entries(&altered.entries()),
            topic_ids: group.topics.iter().map(|id| id.0.to_vec()).collect(),
        };
        self.stage_event(Kind::GroupAltered(event), out);
        if reordered && let Some(group) = self.groups.get_mut(name) {
            group.rebuild();
            group.wait_for(lsn, |_| true);
            group.settle_in(&mut self.desk.stage(now, lsn, out));
            // Everything is to be scanned again.
            self.desk.pump.insert(name.into());
            self.watch_commits(&name.into());
        }
        Ok(Reply::Done)
    }

    pub(super) fn delete_group(&mut self, name: &str, out: &mut Effects) -> Result<Reply, EngineError> {
        if let Some(group) = self.consumers.get(name) {
            if !group.members.is_empty() {
                return Err(EngineError::GroupNotEmpty(name.to_owned()));
            }
        } else {
            let group = self.share_group(name)?;
            if group.hidden {
                let why = format!("group {name:?} belongs to a dead-letter topic and goes with it");
                return Err(EngineError::InvalidRequest(why));
            }
            if !group.members().is_empty() {
                return Err(EngineError::GroupNotEmpty(name.to_owned()));
            }
        }
        self.stage_event(Kind::GroupDeleted(event::GroupDeleted { group: name.to_owned() }), out);
        let private = self
            .catalog
            .iter()
            .filter(|topic| matches!(&topic.kind, TopicKind::Redrive { group, .. } if group == name));
        let private: Vec<TopicId> = private.map(|topic| topic.id).collect();
        for id in private {
            self.stage_event(Kind::TopicDeleted(event::TopicDeleted { id: id.0.to_vec() }), out);
        }
        Ok(Reply::Done)
    }

    pub(super) fn pause_group(
        &mut self,
        name: &str,
        paused: bool,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        self.share_group(name)?;
        self.stage_event(Kind::GroupPaused(event::GroupPaused { group: name.to_owned(), paused }), out);
        self.desk.pump.insert(name.into());
        Ok(Reply::Done)
    }

    pub(super) fn seek_group(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        topic: &str,
        positions: &[(u32, SeekTo)],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let id = self.catalog.require(topic)?.id;
        let mut resolved = Vec::with_capacity(positions.len());
        for (partition, to) in positions {
            let key = PartitionKey { topic: id, partition: *partition };
            let Some(log) = self.partitions.get(&key) else { return Err(EngineError::UnknownPartition(key)) };
            let offset = match to {
                SeekTo::Beginning => log.log_start,
                SeekTo::End => log.end,
                SeekTo::Offset(offset) if *offset <= log.end => (*offset).max(log.log_start),
                SeekTo::Offset(offset) => {
                    return Err(EngineError::OffsetOutOfRange {
                        partition: key,
                        offset: *offset,
                        end: log.end,
                    });
                }
            };
            resolved.push((key, offset));
        }
        if let Some(group) = self.consumers.get(name) {
            if !group.members.is_empty() {
                return Err(EngineError::GroupNotEmpty(name.to_owned()));
            }
            let committed = |(key, offset): &(PartitionKey, u64)| event::CommittedOffset {
                topic_id: key.topic.0.to_vec(),
                partition: key.partition,
                offset: *offset,
                metadata: String::new(),
            };
            let offsets = resolved.iter().map(committed).collect();
            let event = event::OffsetsCommitted { group: name.to_owned(), offsets };
            self.stage_event(Kind::OffsetsCommitted(event), out);
            self.check_ends(name);
            return Ok(Reply::Done);
        }
        if !self.share_group(name)?.topics.contains(&id) {
            return Err(EngineError::InvalidRequest(format!(
                "group {name:?} does not consume topic {topic:?}"
            )));
        }
        for (key, offset) in &resolved {
            self.start_share(name, *key, *offset, out);
        }
        let was_corrupt = self.groups.get(name).is_some_and(|group| group.corrupt.is_some());
        self.check_ends(name);
        if let Some(group) = self.groups.get_mut(name) {
            group.wait_for(lsn, |key| resolved.iter().any(|(moved, _)| moved == key));
            if was_corrupt {
                let mut stage = self.desk.stage(now, lsn, out);
                group.adopt_members(&mut stage);
                group.settle_in(&mut stage);
            }
        }
        self.watch_commits(&name.into());
        self.desk.pump.insert(name.into());
        Ok(Reply::Done)
    }

    // ---- Looking ----

    pub(super) fn list_groups(&self) -> Reply {
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

    pub(super) fn describe_group(&self, name: &str) -> Result<Reply, EngineError> {
        if let Some(group) = self.groups.get(name) {
            return Ok(Reply::Group(self.describe_share_group(group)));
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
        }))
    }

    fn describe_share_group(&self, group: &super::share::ShareGroup) -> GroupDescription {
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
            Some(GroupPartitionInfo {
                topic: topic.name.to_string(),
                partition: Some(*key),
                high_watermark,
                position: Some(state.low()),
                lag: state.unsettled(high_watermark),
                oldest_unsettled: state.oldest_unsettled(high_watermark),
                leased: state.leases().len() as u64,
                scheduled: state.scheduled(),
                held: state.held(),
                parked: partition.queue.parked(),
                acked: counts.acked,
                dead_lettered: counts.dead_lettered,
                discarded: counts.discarded,
                skipped: counts.skipped,
                deliveries: counts.deliveries,
                failures: counts.failures,
            })
        });
        GroupDescription {
            group: group.name.to_string(),
            kind: GroupKind::Share,
            paused: group.paused,
            config: group.config.entries(),
            members: members.collect(),
            partitions: partitions.collect(),
        }
    }

    pub(super) fn list_dead_letters(&self, group: Option<&str>) -> Reply {
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

    // ---- Members' commands ----

    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(super) fn share_subscribe(
        &mut self,
        now: Now,
        lsn: Lsn,
        id: SubscriptionId,
        name: &str,
        member: &str,
        credit: (u32, u32),
        held: &[LeaseRef],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        if member.is_empty() || member.len() > catalog::MAX_NAME_BYTES {
            return Err(EngineError::InvalidRequest("member id: expected 1 to 200 bytes".to_owned()));
        }
        let max_members = self.settings.max_members_per_group;
        let group = self.served_group(name)?;
        if group.members().len() as u64 >= max_members && !group.members().contains_key(member) {
            return Err(EngineError::LimitReached { what: "members of the group", limit: max_members });
        }
        let name = group.name.clone();
        if let Some(group) = self.groups.get_mut(&name) {
            group.subscribe(&mut self.desk.stage(now, lsn, out), id, member, credit, held);
        }
        self.subscriptions.insert(id, name.clone());
        self.watch_commits(&name);
        self.desk.pump.insert(name);
        Ok(Reply::Done)
    }

    pub(super) fn share_credit(&mut self, id: SubscriptionId, records: u32, bytes: u32) {
        let Some(name) = self.subscriptions.get(&id) else { return };
        if let Some(group) = self.groups.get_mut(name) {
            group.add_credit(id, records, bytes);
            self.desk.pump.insert(name.clone());
        }
    }

    pub(super) fn share_unsubscribe(&mut self, id: SubscriptionId) {
        if let Some(name) = self.subscriptions.remove(&id)
            && let Some(group) = self.groups.get_mut(&name)
        {
            group.unsubscribe(id);
        }
    }

    pub(super) fn members_seen(
        &mut self,
        now: Now,
        lsn: Lsn,
        members: &[(String, String)],
        out: &mut Effects,
    ) {
        for (name, member) in members {
            if let Some(group) = self.groups.get_mut(name.as_str()) {
                if group.members().contains_key(member.as_str()) {
                    group.seen(&mut self.desk.stage(now, lsn, out), member);
                }
            } else if let Some(group) = self.consumers.get_mut(name.as_str())
                && let Some(entry) = group.members.get_mut(member.as_str())
            {
                entry.last_seen_ms = now.monotonic_ms;
            }
        }
    }

    pub(super) fn settle(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        member: &str,
        settlements: &[Settlement],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let group_name = self.served_group(name)?.name.clone();
        let Some(group) = self.groups.get_mut(&group_name) else {
            return Err(EngineError::UnknownGroup(name.to_owned()));
        };
        let results = group.settle(&mut self.desk.stage(now, lsn, out), member, settlements);
        self.watch_commits(&group_name);
        Ok(Reply::Settled(results))
    }

    /// The ack and the outputs in one frame, or neither.
    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(super) fn complete(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        member: &str,
        record: &LeaseRef,
        outputs: Vec<AppendEntry>,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let group_name = self.served_group(name)?.name.clone();
        let origin = match self.groups.get(&group_name) {
            Some(group) if group.hidden => Origin::Redrive(&group_name),
            _ => Origin::Producer,
        };
        for output in &outputs {
            self.check_append(output.partition, Level::Synced, &output.batch.header, origin)?;
            if output.batch.header.producer_id >= 0 {
                let why = "an output of complete carries a producer id; its lease makes it exactly-once";
                return Err(EngineError::InvalidRequest(why.to_owned()));
            }
        }
        let Some(group) = self.groups.get_mut(&group_name) else {
            return Err(EngineError::UnknownGroup(name.to_owned()));
        };
        let mut stage = self.desk.stage(now, lsn, out);
        group.seen(&mut stage, member);
        let status = match group.can_complete(&stage, member, record) {
            Err(status) => {
                return Ok(Reply::Completed { result: settle::unchanged(status), base_offsets: Vec::new() });
            }
            Ok(status) => status,
        };
        group.ack(&mut stage, record);
        self.watch_commits(&group_name);
        let base_offsets = outputs
            .into_iter()
            .map(|output| self.append_checked(lsn, output.partition, output.batch, out).0)
            .collect();
        Ok(Reply::Completed { result: settle::result(status, None, now), base_offsets })
    }

    /// Appends a dead letter and settles its source record, in one frame (rule R3).
    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(super) fn dead_letter_built(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        key: PartitionKey,
        offset: u64,
        letter: Result<StagedBatch, String>,
        out: &mut Effects,
    ) {
        let Some(group) = self.groups.get(name) else { return };
        if !group.awaits_letter(&key, offset) {
            // The group was moved meanwhile.
            return;
        }
        let name = group.name.clone();
        let target = group.dead_letter_topics.get(&key.topic).copied();
        let target = target.map(|topic| PartitionKey { topic, partition: key.partition });
        let held = match (letter, target) {
            (Ok(batch), Some(target)) => {
                match self.check_append(target, Level::Synced, &batch.header, Origin::DeadLetter) {
                    Ok(Sequence::Next) => {
                        self.append_checked(lsn, target, batch, out);
                        None
                    }
                    Ok(Sequence::Duplicate(_)) => None,
                    Err(error) => Some(error.to_string()),
                }
            }
            (Ok(_), None) => Some("the group has no dead-letter topic".to_owned()),
            (Err(reason), _) => Some(reason),
        };
        if let Some(group) = self.groups.get_mut(&name) {
            group.letter_done(&mut self.desk.stage(now, lsn, out), key, offset, held);
        }
        self.watch_commits(&name);
    }
}

/// What a share group needs of what is limited.
#[derive(Debug)]
struct Room {
    topics: u64,
    partitions: u64,
    groups: u64,
}

/// A topic id (UUID version 4) from entropy, which is advanced.
fn topic_id(entropy: &mut u64) -> TopicId {
    let mut bytes = [0; 16];
    for half in bytes.chunks_exact_mut(8) {
        *entropy = mix(*entropy);
        half.copy_from_slice(&entropy.to_be_bytes());
    }
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    TopicId(bytes)
}
