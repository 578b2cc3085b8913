//! The fold: how each event changes the state. Live, an event is applied when it is staged; on replay, when it is read.
//!
//! Nothing is decided here. An event that does not fit the state (an unknown topic, a batch that is missing) is refused as
//! [`CorruptState`]: state is never defaulted to empty.

use bytes::Bytes;
use felucca_protocol::batch::BatchHeader;
use prost::Message;

use super::catalog::Topic;
use super::config::{ShareConfig, TopicConfig, from_entries};
use super::effect::{Effects, SegmentName, ViewChange};
use super::event::{self, RedriveRow, event::Kind};
use super::partition::{Partition, Segment};
use super::share::ShareGroup;
use super::share::outage::Outage;
use super::share::state::ShareState;
use super::stage::RowKey;
use super::types::{LeaseId, PartitionKey, TopicId};
use super::{CorruptState, Engine};

fn corrupt<T>(what: impl Into<String>) -> Result<T, CorruptState> {
    Err(CorruptState(what.into()))
}

fn topic_id(bytes: &[u8]) -> Result<TopicId, CorruptState> {
    TopicId::from_slice(bytes).ok_or_else(|| CorruptState("a topic id is not 16 bytes".to_owned()))
}

fn partition_key(topic: &[u8], partition: u32) -> Result<PartitionKey, CorruptState> {
    Ok(PartitionKey { topic: topic_id(topic)?, partition })
}

impl Engine {
    /// Applies one frame of the journal. `out` receives the segment writes and view changes that it implies.
    pub fn replay(
        &mut self,
        frame: &[u8],
        batches: Vec<Bytes>,
        out: &mut Effects,
    ) -> Result<(), CorruptState> {
        let frame = event::Frame::decode(frame).map_err(|error| CorruptState(format!("frame: {error}")))?;
        self.meta.monotonic_ms = self.meta.monotonic_ms.max(frame.monotonic_ms);
        self.wall_ms = frame.wall_ms;
        let mut batches = batches.into_iter();
        for event in &frame.events {
            let Some(kind) = &event.kind else {
                return corrupt("an event of a kind that this version does not know");
            };
            self.apply(kind, &mut batches, out)?;
        }
        if batches.next().is_some() {
            corrupt("a frame with more batches than its events append")
        } else {
            Ok(())
        }
    }

    pub(super) fn apply(
        &mut self,
        kind: &Kind,
        batches: &mut dyn Iterator<Item = Bytes>,
        out: &mut Effects,
    ) -> Result<(), CorruptState> {
        match kind {
            Kind::Booted(event) => {
                self.meta.boot_epoch = event.boot_epoch;
                self.meta.machine_boot.clone_from(&event.machine_boot);
                self.meta.stopped = false;
                self.desk.dirty.insert(RowKey::Meta);
            }
            Kind::Stopped(event::Stopped {}) => {
                self.meta.stopped = true;
                self.desk.dirty.insert(RowKey::Meta);
            }
            Kind::ProducerAllocated(event) => {
                self.meta.next_producer_id = event.producer_id + 1;
                self.desk.dirty.insert(RowKey::Meta);
            }
            Kind::TopicCreated(row) => self.apply_topic_created(row, out)?,
            Kind::TopicAltered(event) => {
                let config = TopicConfig::new(&self.settings).with(&from_entries(&event.config));
                let config = config.map_err(|error| CorruptState(error.to_string()))?;
                let id = topic_id(&event.id)?;
                let Some(topic) = self.catalog.get_mut(&id) else {
                    return corrupt(format!("unknown topic {id}"));
                };
                topic.config = config;
                self.desk.dirty.insert(RowKey::Topic(id));
            }
            Kind::TopicDeleted(event) => self.apply_topic_deleted(topic_id(&event.id)?, out)?,
            Kind::GroupCreated(row) => self.apply_group_created(row)?,
            Kind::GroupAltered(event) => self.apply_group_altered(event)?,
            Kind::GroupPaused(event) => {
                let group = self.group_of(&event.group)?;
                group.paused = event.paused;
                let name = group.name.clone();
                self.desk.dirty.insert(RowKey::Group(name));
            }
            Kind::GroupDeleted(event) => self.apply_group_deleted(&event.group),
            Kind::OutageNoted(row) => {
                let group = self.group_of(&row.group)?;
                group.ledger.outage = Outage::from_row(row);
                let name = group.name.clone();
                self.desk.dirty.insert(RowKey::Group(name));
            }
            Kind::RedriveNoted(row) => {
                let id: std::sync::Arc<str> = row.id.as_str().into();
                self.desk.dirty.insert(RowKey::Redrive(id.clone()));
                self.redrives.insert(id, RedriveRow::clone(row));
            }
            Kind::RedriveForgotten(event) => {
                if let Some((id, _)) = self.redrives.remove_entry(event.id.as_str()) {
                    self.desk.dirty.insert(RowKey::Redrive(id));
                }
            }
            Kind::OffsetsCommitted(event) => {
                self.consumers.entry(event.group.as_str().into()).or_default().apply_offsets(&event.offsets);
                self.desk.dirty.insert(RowKey::Consumer(event.group.as_str().into()));
            }
            Kind::MembersChanged(event) => {
                let group = self.consumers.entry(event.group.as_str().into()).or_default();
                group.apply_members(event.generation, &event.members);
                self.desk.dirty.insert(RowKey::Consumer(event.group.as_str().into()));
            }
            Kind::Appended(event) => {
                let Some(bytes) = batches.next() else { return corrupt("an append without its batch") };
                self.apply_appended(event, bytes, out)?;
            }
            Kind::SegmentAdded(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let segment = Segment::new(event.base_offset, event.generation);
                let partition = self.partition_of(key)?;
                partition.add_segment(segment);
                out.view_changes.push(ViewChange::SegmentAdded { segment: partition.segment_name(&segment) });
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::EpochStarted(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                self.partition_of(key)?.start_epoch(event.epoch, event.start_offset);
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::CeilingRaised(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                self.partition_of(key)?.ceiling = event.ceiling;
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::LogStartRaised(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let partition = self.partition_of(key)?;
                if event.log_start < partition.log_start || event.log_start > partition.end {
                    let (start, end) = (partition.log_start, partition.end);
                    return corrupt(format!(
                        "partition {key}, {start} to {end}, starts at {}",
                        event.log_start
                    ));
                }
                partition.log_start = event.log_start;
                out.view_changes
                    .push(ViewChange::LogStartRaised { partition: key, log_start: event.log_start });
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::SegmentsRemoved(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let partition = self.partition_of(key)?;
                let mut segments = Vec::with_capacity(event.segments.len());
                for &event::SegmentRef { base_offset, generation } in &event.segments {
                    if !partition.remove_segment(base_offset, generation) {
                        return corrupt(format!("partition {key} has no segment {base_offset}-{generation}"));
                    }
                    segments.push(SegmentName { partition: key, base_offset, generation });
                }
                out.view_changes.push(ViewChange::SegmentsRemoved { segments });
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::GenerationsReserved(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let partition = self.partition_of(key)?;
                partition.next_generation = partition.next_generation.max(event.next_generation);
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::SegmentsReplaced(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let partition = self.partition_of(key)?;
                let removed: Vec<_> =
                    event.removed.iter().map(|segment| (segment.base_offset, segment.generation)).collect();
                let added: Vec<_> = event.added.iter().map(Segment::from_row).collect();
                if !partition.replace_segments(&removed, &added) {
                    return corrupt(format!("segments of {key} cannot be replaced: {event:?}"));
                }
                let name = |base_offset, generation| SegmentName { partition: key, base_offset, generation };
                out.view_changes.push(ViewChange::SegmentsReplaced {
                    partition: key,
                    removed: removed
                        .iter()
                        .map(|&(base_offset, generation)| name(base_offset, generation))
                        .collect(),
                    added: added.iter().map(|s| (name(s.base_offset, s.generation), s.bytes)).collect(),
                });
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::Cleaned(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let partition = self.partition_of(key)?;
                partition.cleaned_until = event.cleaned_until;
                partition.tombstones_due_ms = event.tombstones_due_ms;
                self.desk.dirty.insert(RowKey::Partition(key));
            }
            Kind::ShareStarted(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let fence = LeaseId { boot_epoch: event.fence_boot_epoch, sequence: event.fence_sequence };
                let group = self.group_of(&event.group)?;
                group.put_partition(key, ShareState::new(event.start, fence));
                let name = group.name.clone();
                self.desk.dirty.insert(RowKey::Share(name, key));
            }
            Kind::ShareStopped(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let group = self.group_of(&event.group)?;
                group.remove_partition(&key);
                let name = group.name.clone();
                self.desk.dirty.insert(RowKey::Share(name, key));
            }
            Kind::Granted(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let (name, state) = self.share_state_of(&event.group, key)?;
                state.apply_granted(event);
                self.desk.dirty.insert(RowKey::Share(name, key));
            }
            Kind::Settled(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let group = self.group_of(&event.group)?;
                let name = group.name.clone();
                if !group.apply_settled(&key, event) {
                    return corrupt(format!("group {name:?} is not on {key}"));
                }
                self.desk.dirty.extend([RowKey::Group(name.clone()), RowKey::Share(name, key)]);
            }
            Kind::ShareKicked(event) => {
                let key = partition_key(&event.topic_id, event.partition)?;
                let (name, state) = self.share_state_of(&event.group, key)?;
                state.kick();
                self.desk.dirty.insert(RowKey::Share(name, key));
            }
        }
        Ok(())
    }

    fn partition_of(&mut self, key: PartitionKey) -> Result<&mut Partition, CorruptState> {
        self.partitions.get_mut(&key).ok_or_else(|| CorruptState(format!("unknown partition {key}")))
    }

    fn group_of(&mut self, name: &str) -> Result<&mut ShareGroup, CorruptState> {
        self.groups.get_mut(name).ok_or_else(|| CorruptState(format!("unknown share group {name:?}")))
    }

    fn share_state_of(
        &mut self,
        name: &str,
        key: PartitionKey,
    ) -> Result<(std::sync::Arc<str>, &mut ShareState), CorruptState> {
        let group = self.group_of(name)?;
        let name = group.name.clone();
        let state = group.state_mut(&key);
        state
            .map(|state| (name.clone(), state))
            .ok_or_else(|| CorruptState(format!("group {name:?} is not on {key}")))
    }

    fn apply_topic_created(&mut self, row: &event::TopicRow, out: &mut Effects) -> Result<(), CorruptState> {
        let topic = Topic::from_row(row, &self.settings).map_err(CorruptState)?;
        for key in topic.keys() {
            let partition = Partition::new(key);
            let first_segment = partition.segment_name(&partition.segments[0]);
            out.view_changes.push(ViewChange::Created {
                partition: key,
                topic: topic.name.to_string(),
                first_segment,
            });
            self.partitions.insert(key, partition);
            self.desk.high_watermarks.insert(key, 0);
            self.desk.dirty.insert(RowKey::Partition(key));
        }
        self.desk.dirty.insert(RowKey::Topic(topic.id));
        self.catalog.insert(topic);
        Ok(())
    }

    fn apply_topic_deleted(&mut self, id: TopicId, out: &mut Effects) -> Result<(), CorruptState> {
        let Some(topic) = self.catalog.remove(&id) else { return corrupt(format!("unknown topic {id}")) };
        for key in topic.keys() {
            self.partitions.remove(&key);
            self.desk.high_watermarks.remove(&key);
            out.view_changes.push(ViewChange::Removed { partition: key });
            self.desk.dirty.insert(RowKey::Partition(key));
        }
        for group in self.groups.values_mut() {
            if let Some(position) = group.topics.iter().position(|topic| *topic == id) {
                group.topics.remove(position);
                self.desk.dirty.insert(RowKey::Group(group.name.clone()));
                for key in topic.keys() {
                    group.remove_partition(&key);
                    self.desk.dirty.insert(RowKey::Share(group.name.clone(), key));
                }
            }
        }
        for (name, group) in &mut self.consumers {
            group.forget_topic(id);
            self.desk.dirty.insert(RowKey::Consumer(name.clone()));
        }
        self.desk.dirty.insert(RowKey::Topic(id));
        Ok(())
    }

    pub(super) fn apply_group_created(&mut self, row: &event::GroupRow) -> Result<(), CorruptState> {
        let config = ShareConfig::default().with(&from_entries(&row.config));
        let config = config.map_err(|error| CorruptState(error.to_string()))?;
        let topics = row.topic_ids.iter().map(|id| topic_id(id)).collect::<Result<Vec<_>, _>>()?;
        let mut group = {
            let budget = self.desk.budget.clone();
            ShareGroup::new(row.group.as_str().into(), config, topics, row.paused, row.hidden, budget)
        };
        if let Some(outage) = &row.outage {
            group.ledger.outage = Outage::from_row(outage);
        }
        for id in &group.topics {
            let Some(topic) = self.catalog.get_mut(id) else { return corrupt(format!("unknown topic {id}")) };
            topic.share_groups.insert(group.name.clone());
        }
        self.desk.dirty.insert(RowKey::Group(group.name.clone()));
        self.groups.insert(group.name.clone(), group);
        Ok(())
    }

    fn apply_group_altered(&mut self, event: &event::GroupAltered) -> Result<(), CorruptState> {
        let config = ShareConfig::default().with(&from_entries(&event.config));
        let config = config.map_err(|error| CorruptState(error.to_string()))?;
        let topics = event.topic_ids.iter().map(|id| topic_id(id)).collect::<Result<Vec<_>, _>>()?;
        let group = self.group_of(&event.group)?;
        let name = group.name.clone();
        group.config = config;
        let before = std::mem::replace(&mut group.topics, topics.clone());
        let left: Vec<TopicId> = before.into_iter().filter(|id| !topics.contains(id)).collect();
        let gone: Vec<PartitionKey> =
            group.partitions().keys().filter(|key| left.contains(&key.topic)).copied().collect();
        for key in &gone {
            group.remove_partition(key);
        }
        self.desk.dirty.extend(gone.into_iter().map(|key| RowKey::Share(name.clone(), key)));
        for id in left {
            if let Some(topic) = self.catalog.get_mut(&id) {
                topic.share_groups.remove(&name);
            }
        }
        self.note_awake(&name);
        self.desk.dirty.insert(RowKey::Group(name));
        Ok(())
    }

    fn apply_group_deleted(&mut self, name: &str) {
        if let Some(group) = self.groups.remove(name) {
            for key in group.partitions().keys() {
                self.desk.dirty.insert(RowKey::Share(group.name.clone(), *key));
            }
            for id in &group.topics {
                if let Some(topic) = self.catalog.get_mut(id) {
                    topic.share_groups.remove(&group.name);
                }
            }
            self.note_awake(name);
            self.desk.dirty.insert(RowKey::Group(group.name));
        }
        if let Some((name, _)) = self.consumers.remove_entry(name) {
            self.desk.dirty.insert(RowKey::Consumer(name));
        }
    }

    fn apply_appended(
        &mut self,
        event: &event::Appended,
        bytes: Bytes,
        out: &mut Effects,
    ) -> Result<(), CorruptState> {
        let key = partition_key(&event.topic_id, event.partition)?;
        let header =
            BatchHeader::parse(&bytes).map_err(|error| CorruptState(format!("batch of {key}: {error}")))?;
        let (wall_ms, max_producers) = (self.wall_ms, self.settings.max_producers_per_partition);
        let partition = self.partition_of(key)?;
        if header.base_offset != partition.end {
            return corrupt(format!(
                "partition {key} ends at {}, its next batch begins at {}",
                partition.end, header.base_offset
            ));
        }
        let whole = bytes.len() == header.length as usize;
        let write = partition.append(&header, bytes, wall_ms, max_producers);
        let place = event::BatchPlace {
            base_offset: write.segment.base_offset,
            generation: write.segment.generation,
            position: write.position,
        };
        if !whole && event.place != Some(place) {
            return corrupt(format!(
                "a batch of {key} stands at {place:?}, its frame says {:?}",
                event.place
            ));
        }
        out.segment_writes.push(write);
        self.desk.dirty.insert(RowKey::Partition(key));
        Ok(())
    }
}
