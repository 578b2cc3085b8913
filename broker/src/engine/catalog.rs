//! Topics by id and by name, and the rules for names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::{EngineSettings, TopicConfig, from_entries, to_entries};
use super::effect::{TopicInfo, TopicKind};
use super::error::EngineError;
use super::event::TopicRow;
use super::types::{PartitionKey, TopicId};

/// Longest name of a topic or group, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 200;
const DEAD_LETTER_PREFIX: &str = "dlq.";
const REDRIVE_PREFIX: &str = "redrive.";

#[derive(Clone, Debug)]
pub(crate) struct Topic {
    pub(crate) id: TopicId,
    pub(crate) name: Arc<str>,
    pub(crate) partitions: u32,
    pub(crate) kind: TopicKind,
    pub(crate) config: TopicConfig,
    /// Share groups that consume it.
    pub(crate) share_groups: BTreeSet<Arc<str>>,
}

impl Topic {
    pub(crate) fn keys(&self) -> impl Iterator<Item = PartitionKey> + use<> {
        let topic = self.id;
        (0..self.partitions).map(move |partition| PartitionKey { topic, partition })
    }

    pub(crate) fn info(&self) -> TopicInfo {
        TopicInfo {
            id: self.id,
            name: self.name.to_string(),
            partitions: self.partitions,
            kind: self.kind.clone(),
            config: self.config.entries(),
        }
    }

    pub(crate) fn to_row(&self) -> TopicRow {
        let (kind, group, source) = match &self.kind {
            TopicKind::Standard => (0, "", ""),
            TopicKind::DeadLetter { group, source } => (1, group.as_str(), source.as_str()),
            TopicKind::Redrive { group, source } => (2, group.as_str(), source.as_str()),
        };
        TopicRow {
            id: self.id.0.to_vec(),
            name: self.name.to_string(),
            partitions: self.partitions,
            kind,
            group: group.to_owned(),
            source: source.to_owned(),
            config: to_entries(&self.config.entries()),
        }
    }

    pub(crate) fn from_row(row: &TopicRow, settings: &EngineSettings) -> Result<Self, String> {
        let id = TopicId::from_slice(&row.id).ok_or_else(|| format!("id of topic {:?}", row.name))?;
        let names = || (row.group.clone(), row.source.clone());
        let kind = match row.kind {
            0 => TopicKind::Standard,
            1 => TopicKind::DeadLetter { group: names().0, source: names().1 },
            2 => TopicKind::Redrive { group: names().0, source: names().1 },
            other => return Err(format!("kind {other} of topic {:?}", row.name)),
        };
        let config =
            TopicConfig::new(settings).with(&from_entries(&row.config)).map_err(|error| error.to_string())?;
        Ok(Self {
            id,
            name: row.name.as_str().into(),
            partitions: row.partitions,
            kind,
            config,
            share_groups: BTreeSet::new(),
        })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Catalog {
    topics: BTreeMap<TopicId, Topic>,
    by_name: BTreeMap<Arc<str>, TopicId>,
    pub(crate) partitions: u64,
}

impl Catalog {
    pub(crate) fn insert(&mut self, topic: Topic) {
        self.partitions += u64::from(topic.partitions);
        self.by_name.insert(topic.name.clone(), topic.id);
        self.topics.insert(topic.id, topic);
    }

    pub(crate) fn remove(&mut self, id: &TopicId) -> Option<Topic> {
        let topic = self.topics.remove(id)?;
        self.by_name.remove(&topic.name);
        self.partitions -= u64::from(topic.partitions);
        Some(topic)
    }

    pub(crate) fn get(&self, id: &TopicId) -> Option<&Topic> {
        self.topics.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: &TopicId) -> Option<&mut Topic> {
        self.topics.get_mut(id)
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&Topic> {
        self.by_name.get(name).and_then(|id| self.topics.get(id))
    }

    pub(crate) fn require(&self, name: &str) -> Result<&Topic, EngineError> {
        self.by_name(name).ok_or_else(|| EngineError::UnknownTopic(name.to_owned()))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Topic> {
        self.topics.values()
    }

    pub(crate) fn len(&self) -> u64 {
        self.topics.len() as u64
    }
}

pub(crate) fn dead_letter_name(group: &str, source: &str) -> String {
    format!("{DEAD_LETTER_PREFIX}{group}.{source}")
}

pub(crate) fn redrive_name(group: &str, source: &str) -> String {
    format!("{REDRIVE_PREFIX}{group}.{source}")
}

/// Checks the name of a topic or group that a user gives: Kafka's alphabet, and no prefix that the broker keeps for itself.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), EngineError> {
    let refused = |why: &str| Err(EngineError::InvalidName(format!("{what} name {name:?}: {why}")));
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return refused("expected 1 to 200 characters");
    }
    if name == "." || name == ".." || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    {
        return refused("expected letters, digits, '.', '_' and '-', and more than dots");
    }
    if name.starts_with(DEAD_LETTER_PREFIX) || name.starts_with(REDRIVE_PREFIX) {
        return refused("names beginning with \"dlq.\" and \"redrive.\" belong to share groups");
    }
    Ok(())
}
