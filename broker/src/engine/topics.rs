//! Topics and producer ids: create, alter, delete, look up.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Engine;
use super::catalog::{self, Topic, check_name};
use super::config::{TopicConfig, to_entries};
use super::effect::{Effects, Reply, TopicKind};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::types::TopicId;
use crate::plants::planted;

/// Most partitions of one topic.
const MAX_PARTITIONS_PER_TOPIC: u32 = 10_000;

impl Engine {
    pub(super) fn create_topic(
        &mut self,
        id: TopicId,
        name: &str,
        partitions: u32,
        config: &[(String, String)],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        check_name("topic", name)?;
        let config = TopicConfig::new(&self.settings).with(config)?;
        self.add_topic(id, name, partitions, TopicKind::Standard, config, out)
    }

    pub(super) fn add_topic(
        &mut self,
        id: TopicId,
        name: &str,
        partitions: u32,
        kind: TopicKind,
        config: TopicConfig,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        if self.catalog.by_name(name).is_some() || self.catalog.get(&id).is_some() {
            return Err(EngineError::TopicExists(name.to_owned()));
        }
        if partitions == 0 || partitions > MAX_PARTITIONS_PER_TOPIC {
            let limit = MAX_PARTITIONS_PER_TOPIC;
            return Err(EngineError::InvalidRequest(format!(
                "partitions={partitions}: expected 1 to {limit}"
            )));
        }
        if self.catalog.len() >= self.settings.max_topics {
            return Err(EngineError::LimitReached { what: "topics", limit: self.settings.max_topics });
        }
        if self.catalog.partitions + u64::from(partitions) > self.settings.max_partitions {
            return Err(EngineError::LimitReached {
                what: "partitions",
                limit: self.settings.max_partitions,
            });
        }
        let topic = Topic { id, name: name.into(), partitions, kind, config, share_groups: BTreeSet::new() };
        let info = topic.info();
        self.stage_event(Kind::TopicCreated(topic.to_row()), out);
        Ok(Reply::Topic(info))
    }

    pub(super) fn alter_topic(
        &mut self,
        name: &str,
        config: &[(String, String)],
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let topic = self.catalog.require(name)?;
        let id = topic.id;
        let altered = topic.config.clone().with(config)?;
        let event = event::TopicAltered { id: id.0.to_vec(), config: to_entries(&altered.entries()) };
        self.stage_event(Kind::TopicAltered(event), out);
        Ok(Reply::Topic(self.catalog.require(name)?.info()))
    }

    pub(super) fn delete_topic(&mut self, name: &str, out: &mut Effects) -> Result<Reply, EngineError> {
        let topic = self.catalog.require(name)?.clone();
        match &topic.kind {
            TopicKind::Standard => {}
            TopicKind::DeadLetter { group, .. } | TopicKind::Redrive { group, .. } => {
                if self.groups.contains_key(group.as_str()) {
                    let why =
                        format!("topic {name:?} belongs to share group {group:?}; delete the group first");
                    return Err(EngineError::InvalidRequest(why));
                }
            }
        }
        for group in &topic.share_groups {
            self.leave_topic(group, &topic, out);
        }
        self.stage_event(Kind::TopicDeleted(event::TopicDeleted { id: topic.id.0.to_vec() }), out);
        if planted("forget-topic-deletion") {
            out.events.pop();
        }
        Ok(Reply::Topic(topic.info()))
    }

    /// Ends a share group's work on a topic that is going away.
    fn leave_topic(&mut self, group: &Arc<str>, topic: &Topic, out: &mut Effects) {
        let redrive =
            self.catalog.by_name(&catalog::redrive_name(group, &topic.name)).map(|redrive| redrive.id);
        let Some(entry) = self.groups.get(group) else { return };
        let kept = entry.topics.iter().filter(|id| **id != topic.id && Some(**id) != redrive);
        let topic_ids: Vec<Vec<u8>> = kept.map(|id| id.0.to_vec()).collect();
        if entry.hidden && topic_ids.is_empty() {
            let gone = EngineError::UnknownGroup(group.to_string());
            out.ended.extend(entry.subscriptions().map(|id| (id, gone.clone())));
            self.stage_event(Kind::GroupDeleted(event::GroupDeleted { group: group.to_string() }), out);
            return;
        }
        let config = to_entries(&entry.config.entries());
        let altered = event::GroupAltered { group: group.to_string(), config, topic_ids };
        self.stage_event(Kind::GroupAltered(altered), out);
        if let Some(redrive) = redrive {
            self.stage_event(Kind::TopicDeleted(event::TopicDeleted { id: redrive.0.to_vec() }), out);
        }
    }

    pub(super) fn metadata(&self, names: Vec<String>) -> Reply {
        if names.is_empty() {
            return Reply::Metadata {
                topics: self.catalog.iter().map(Topic::info).collect(),
                unknown: Vec::new(),
            };
        }
        let mut topics = Vec::new();
        let mut unknown = Vec::new();
        for name in names {
            match self.catalog.by_name(&name) {
                Some(topic) => topics.push(topic.info()),
                None => unknown.push(name),
            }
        }
        Reply::Metadata { topics, unknown }
    }

    pub(super) fn init_producer(&mut self, out: &mut Effects) -> Reply {
        let producer_id = self.meta.next_producer_id;
        self.stage_event(Kind::ProducerAllocated(event::ProducerAllocated { producer_id }), out);
        Reply::Producer { producer_id, epoch: 0 }
    }
}
