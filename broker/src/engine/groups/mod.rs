//! Share groups seen from outside: create, alter, move, pause, delete.
//!
//! [`companions`] are the topics that come with a group, [`describe`] what is told of groups of both kinds, [`serve`] the
//! commands of members.

mod companions;
mod describe;
mod serve;

use super::Engine;
use super::catalog::{self, Topic, check_name};
use super::command::{HeldFate, MAX_HELD_ENDED, SeekTo};
use super::config::{ShareConfig, to_entries};
use super::effect::{Effects, Reply, TopicKind};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::types::{Lsn, Now, PartitionKey, TopicId};

impl Engine {
    /// Creates a share group with its dead-letter topics. One of that name is refused, whatever its settings.
    pub(in crate::engine) fn create_share_group(
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
            outage: None,
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

    pub(in crate::engine) fn alter_share_group(
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
        if let Some(group) = self.groups.get_mut(name) {
            group.ledger.outage.configured(&group.config);
            group.note_outage(&mut self.desk.stage(now, lsn, out));
            self.desk.pump.insert(name.into());
        }
        if reordered && let Some(group) = self.groups.get_mut(name) {
            group.rebuild();
            let mut stage = self.desk.stage(now, lsn, out);
            group.wait_for(&mut stage, |_| true);
            group.settle_in(&mut stage);
            // Everything is to be scanned again.
            self.desk.pump.insert(name.into());
        }
        Ok(Reply::Done)
    }

    pub(in crate::engine) fn delete_group(
        &mut self,
        name: &str,
        force: bool,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
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
            if !force {
                let everything: Vec<_> = group.partitions().keys().map(|key| (*key, u64::MAX)).collect();
                self.check_dropped(name, &everything)?;
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

    pub(in crate::engine) fn pause_group(
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

    /// Makes every scheduled record of a group due now, on one of its topics or on all.
    pub(in crate::engine) fn kick_group(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        topic: Option<&str>,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let keys = self.partitions_on(name, topic)?;
        let group = self.groups.get_mut(name).ok_or_else(|| EngineError::UnknownGroup(name.to_owned()))?;
        let mut stage = self.desk.stage(now, lsn, out);
        let records = keys.into_iter().map(|key| group.kick(&mut stage, key)).sum();
        Ok(Reply::Kicked { records })
    }

    /// Releases or discards held records of a group, on one of its topics or on all, [`MAX_HELD_ENDED`] at the most.
    pub(in crate::engine) fn end_held(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        topic: Option<&str>,
        fate: HeldFate,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let keys = self.partitions_on(name, topic)?;
        let group = self.groups.get_mut(name).ok_or_else(|| EngineError::UnknownGroup(name.to_owned()))?;
        let mut stage = self.desk.stage(now, lsn, out);
        let mut room = MAX_HELD_ENDED;
        for key in &keys {
            room -= group.end_held(&mut stage, *key, fate, room);
        }
        let more = keys.iter().any(|key| group.partition(key).is_some_and(|one| one.state.held() > 0));
        Ok(Reply::HeldEnded { records: (MAX_HELD_ENDED - room) as u64, more })
    }

    /// The partitions of a share group that is served, on one of its topics or on all.
    fn partitions_on(&mut self, name: &str, topic: Option<&str>) -> Result<Vec<PartitionKey>, EngineError> {
        let only = topic.map(|topic| self.catalog.require(topic).map(|topic| topic.id)).transpose()?;
        let group = self.served_group(name)?;
        if only.is_some_and(|id| !group.topics.contains(&id)) {
            let why = format!("group {name:?} does not consume topic {:?}", topic.unwrap_or_default());
            return Err(EngineError::InvalidRequest(why));
        }
        let chosen = |key: &&PartitionKey| only.is_none_or(|id| key.topic == id);
        Ok(group.partitions().keys().filter(chosen).copied().collect())
    }

    /// Refuses to move a share group to these offsets, or to end it, if that drops records that nobody else has: those that were
    /// redriven to it, and those that were given up and whose dead letters are not written yet.
    fn check_dropped(&self, name: &str, places: &[(PartitionKey, u64)]) -> Result<(), EngineError> {
        let Some(group) = self.groups.get(name) else { return Ok(()) };
        let (mut redriven, mut exhausted) = (0, 0);
        for (key, to) in places {
            let Some(partition) = group.partition(key) else { continue };
            exhausted += partition.state.exhausted();
            let kind = self.catalog.get(&key.topic).map(|topic| &topic.kind);
            if let (Some(TopicKind::Redrive { .. }), Some(log)) = (kind, self.partitions.get(key)) {
                redriven += partition.state.unsettled(log.end.min(*to));
            }
        }
        if (redriven, exhausted) == (0, 0) {
            return Ok(());
        }
        Err(EngineError::GroupUnsettled { group: name.to_owned(), redriven, exhausted })
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one command")]
    pub(in crate::engine) fn seek_group(
        &mut self,
        now: Now,
        lsn: Lsn,
        name: &str,
        topic: &str,
        positions: &[(u32, SeekTo)],
        force: bool,
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
        if !force {
            self.check_dropped(name, &resolved)?;
        }
        for (key, offset) in &resolved {
            self.start_share(name, *key, *offset, out);
        }
        let was_corrupt = self.groups.get(name).is_some_and(|group| group.corrupt.is_some());
        self.check_ends(name);
        if let Some(group) = self.groups.get_mut(name) {
            let mut stage = self.desk.stage(now, lsn, out);
            group.wait_for(&mut stage, |key| resolved.iter().any(|(moved, _)| moved == key));
            if was_corrupt {
                group.adopt_members(&mut stage);
                group.settle_in(&mut stage);
            }
        }
        self.desk.pump.insert(name.into());
        Ok(Reply::Done)
    }
}
