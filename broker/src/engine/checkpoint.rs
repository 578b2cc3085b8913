//! The engine's state as rows of a checkpoint, and back.
//!
//! A row's key is one tag byte and then what names it, so that rows restored in the order of their keys find what they refer
//! to: meta, topics, partitions, groups, consumer groups, share partitions, redrives.

use std::sync::Arc;

use prost::Message;

use super::catalog::Topic;
use super::config::to_entries;
use super::consumer_group::ConsumerGroup;
use super::event::{ConsumerRow, GroupRow, MetaRow, PartitionRow, RedriveRow, ShareRow, TopicRow};
use super::partition::Partition;
use super::share::state::ShareState;
use super::stage::RowKey;
use super::types::{PartitionKey, TopicId};
use super::{CorruptState, Engine};

/// A row: its key, and its value or `None` when it is gone.
pub type Row = (Vec<u8>, Option<Vec<u8>>);

const META: u8 = 0;
const TOPIC: u8 = 1;
const PARTITION: u8 = 2;
const GROUP: u8 = 3;
const CONSUMER: u8 = 4;
const SHARE: u8 = 5;
const REDRIVE: u8 = 6;

impl RowKey {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let put_partition = |bytes: &mut Vec<u8>, key: &PartitionKey| {
            bytes.extend_from_slice(&key.topic.0);
            bytes.extend_from_slice(&key.partition.to_be_bytes());
        };
        match self {
            Self::Meta => bytes.push(META),
            Self::Topic(id) => {
                bytes.push(TOPIC);
                bytes.extend_from_slice(&id.0);
            }
            Self::Partition(key) => {
                bytes.push(PARTITION);
                put_partition(&mut bytes, key);
            }
            Self::Group(name) => {
                bytes.push(GROUP);
                bytes.extend_from_slice(name.as_bytes());
            }
            Self::Consumer(name) => {
                bytes.push(CONSUMER);
                bytes.extend_from_slice(name.as_bytes());
            }
            Self::Share(name, key) => {
                bytes.push(SHARE);
                put_partition(&mut bytes, key);
                bytes.extend_from_slice(name.as_bytes());
            }
            Self::Redrive(id) => {
                bytes.push(REDRIVE);
                bytes.extend_from_slice(id.as_bytes());
            }
        }
        bytes
    }
}

impl Engine {
    /// The rows that changed since the last call, as they are now. Call it between turns.
    pub fn take_dirty_rows(&mut self) -> Vec<Row> {
        self.desk.dirty.insert(RowKey::Meta);
        let dirty = std::mem::take(&mut self.desk.dirty);
        dirty.into_iter().map(|key| (key.to_bytes(), self.row_value(&key))).collect()
    }

    /// Every row, as a checkpoint of everything would have it.
    pub fn rows(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let topics = self.catalog.iter().map(|topic| RowKey::Topic(topic.id));
        let partitions = self.partitions.keys().map(|key| RowKey::Partition(*key));
        let groups = self.groups.keys().map(|name| RowKey::Group(name.clone()));
        let consumers = self.consumers.keys().map(|name| RowKey::Consumer(name.clone()));
        let shares = self
            .groups
            .iter()
            .flat_map(|(name, group)| group.partitions().keys().map(|key| RowKey::Share(name.clone(), *key)));
        let all = [RowKey::Meta].into_iter().chain(topics).chain(partitions).chain(groups);
        let redrives = self.redrives.keys().map(|id| RowKey::Redrive(id.clone()));
        let all = all.chain(consumers).chain(shares).chain(redrives);
        all.filter_map(|key| Some((key.to_bytes(), self.row_value(&key)?))).collect()
    }

    fn row_value(&self, key: &RowKey) -> Option<Vec<u8>> {
        match key {
            RowKey::Meta => Some(self.meta.encode_to_vec()),
            RowKey::Topic(id) => self.catalog.get(id).map(|topic| topic.to_row().encode_to_vec()),
            RowKey::Partition(key) => {
                self.partitions.get(key).map(|partition| partition.to_row().encode_to_vec())
            }
            RowKey::Group(name) => self.groups.get(name).map(|group| {
                let row = GroupRow {
                    group: name.to_string(),
                    topic_ids: group.topics.iter().map(|id| id.0.to_vec()).collect(),
                    config: to_entries(&group.config.entries()),
                    paused: group.paused,
                    hidden: group.hidden,
                    outage: Some(group.ledger.outage.to_row(name)),
                };
                row.encode_to_vec()
            }),
            RowKey::Redrive(id) => self.redrives.get(id).map(Message::encode_to_vec),
            RowKey::Consumer(name) => {
                self.consumers.get(name).map(|group| group.to_row(name).encode_to_vec())
            }
            RowKey::Share(name, key) => {
                let partition = self.groups.get(name).and_then(|group| group.partition(key));
                partition
                    .map(|partition| partition.state.to_row(name, key.topic, key.partition).encode_to_vec())
            }
        }
    }

    /// Restores one row. Rows come in the order of their keys, before any replay.
    pub fn restore_row(&mut self, key: &[u8], value: &[u8]) -> Result<(), CorruptState> {
        let failed = |error: prost::DecodeError| CorruptState(format!("checkpoint row: {error}"));
        match key.first() {
            Some(&META) => {
                self.meta = MetaRow::decode(value).map_err(failed)?;
            }
            Some(&TOPIC) => {
                let topic = Topic::from_row(&TopicRow::decode(value).map_err(failed)?, &self.settings);
                self.catalog.insert(topic.map_err(CorruptState)?);
            }
            Some(&PARTITION) => {
                let row = PartitionRow::decode(value).map_err(failed)?;
                let key = key_of(&row.topic_id, row.partition)?;
                let partition = Partition::from_row(key, &row).map_err(CorruptState)?;
                self.desk.high_watermarks.insert(key, partition.end);
                self.partitions.insert(key, partition);
            }
            Some(&GROUP) => {
                self.apply_group_created(&GroupRow::decode(value).map_err(failed)?)?;
                self.desk.dirty.clear();
            }
            Some(&CONSUMER) => {
                let row = ConsumerRow::decode(value).map_err(failed)?;
                self.consumers.insert(Arc::from(row.group.as_str()), ConsumerGroup::from_row(&row));
            }
            Some(&REDRIVE) => {
                let row = RedriveRow::decode(value).map_err(failed)?;
                self.redrives.insert(Arc::from(row.id.as_str()), row);
            }
            Some(&SHARE) => {
                let row = ShareRow::decode(value).map_err(failed)?;
                let key = key_of(&row.topic_id, row.partition)?;
                let state = ShareState::from_row(&row).map_err(CorruptState)?;
                let group = self.groups.get_mut(row.group.as_str());
                let group =
                    group.ok_or_else(|| CorruptState(format!("unknown share group {:?}", row.group)))?;
                group.put_partition(key, state);
            }
            _ => {
                return Err(CorruptState(
                    "a checkpoint row of a kind that this version does not know".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

fn key_of(topic: &[u8], partition: u32) -> Result<PartitionKey, CorruptState> {
    let topic =
        TopicId::from_slice(topic).ok_or_else(|| CorruptState("a topic id is not 16 bytes".to_owned()))?;
    Ok(PartitionKey { topic, partition })
}
