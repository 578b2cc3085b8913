//! Topics, and what goes with them when they go.

use felucca_broker::engine::types::{PartitionKey, TopicId};

use super::Model;
use super::log::Log;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Standard,
    Letters { group: String, source: String },
    Redrive { group: String, source: String },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) partitions: u32,
    pub(crate) kind: Kind,
    pub(crate) allow_written: bool,
    /// Visibility `written`.
    pub(crate) early: bool,
    pub(crate) retention_ms: Option<u64>,
}

pub(crate) fn keys(id: TopicId, partitions: u32) -> impl Iterator<Item = PartitionKey> {
    (0..partitions).map(move |partition| PartitionKey { topic: id, partition })
}

pub(crate) fn letters_name(group: &str, source: &str) -> String {
    format!("dlq.{group}.{source}")
}

pub(crate) fn redrive_name(group: &str, source: &str) -> String {
    format!("redrive.{group}.{source}")
}

impl Model {
    pub(crate) fn topic_named(&self, name: &str) -> Option<(TopicId, &Topic)> {
        self.topics.iter().find(|(_, topic)| topic.name == name).map(|(id, topic)| (*id, topic))
    }

    pub(crate) fn topic_keys(&self, id: TopicId) -> Vec<PartitionKey> {
        self.topics.get(&id).map_or_else(Vec::new, |topic| keys(id, topic.partitions).collect())
    }

    pub(crate) fn add_topic(&mut self, id: TopicId, topic: Topic) {
        for key in keys(id, topic.partitions) {
            self.logs.insert(key, Log { was_written: topic.allow_written, ..Log::default() });
        }
        self.topics.insert(id, topic);
    }

    /// Whether a topic may be deleted by hand.
    pub(crate) fn deletable(&self, topic: &Topic) -> bool {
        match &topic.kind {
            Kind::Standard => true,
            Kind::Letters { group, .. } | Kind::Redrive { group, .. } => !self.shares.contains_key(group),
        }
    }

    /// Deletes a topic with everything that depends on it.
    pub(crate) fn delete_topic(&mut self, id: TopicId) {
        let Some(topic) = self.topics.get(&id).cloned() else { return };
        let users: Vec<String> = self
            .shares
            .iter()
            .filter(|(_, share)| share.topics.contains(&id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in users {
            let redrive = self.topic_named(&redrive_name(&name, &topic.name)).map(|(id, _)| id);
            let Some(share) = self.shares.get_mut(&name) else { continue };
            share.topics.remove(&id);
            share.parts.retain(|key, _| key.topic != id);
            if share.hidden && share.topics.is_empty() {
                self.shares.remove(&name);
            } else if let Some(redrive) = redrive {
                share.topics.remove(&redrive);
                share.parts.retain(|key, _| key.topic != redrive);
                self.drop_topic(redrive);
            }
        }
        self.drop_topic(id);
    }

    pub(crate) fn drop_topic(&mut self, id: TopicId) {
        self.topics.remove(&id);
        self.logs.retain(|key, _| key.topic != id);
        for consumer in self.consumers.values_mut() {
            consumer.offsets.retain(|key, _| key.topic != id);
            for member in consumer.members.values_mut() {
                member.holding.retain(|key| key.topic != id);
            }
        }
    }
}
