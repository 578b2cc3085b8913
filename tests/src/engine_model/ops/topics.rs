//! Topics: create, alter, delete.

use std::collections::BTreeSet;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, TopicId};

use crate::engine_model::model::topics::{Kind, Topic};
use crate::engine_model::promises::Fact;
use crate::engine_model::world::World;

const NAMES: [&str; 3] = ["orders", "payments", "mails"];

/// Settings of a topic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) allow_written: bool,
    pub(crate) early: bool,
    pub(crate) retention_ms: Option<u64>,
}

impl Drawn {
    fn config(self) -> Vec<(String, String)> {
        let visibility = if self.early { "written" } else { "synced" };
        let retention = self.retention_ms.map_or_else(|| "-1".to_owned(), |ms| ms.to_string());
        [
            ("allow-written", self.allow_written.to_string()),
            ("visibility", visibility.to_owned()),
            ("retention.ms", retention),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

impl World {
    pub(crate) fn create_topic(&mut self) {
        let name = self.any_name(&NAMES);
        let partitions = self.rng.between(1, 2) as u32;
        let drawn = self.draw_topic();
        self.create_topic_as(&name, partitions, drawn);
    }

    fn draw_topic(&mut self) -> Drawn {
        let allow_written = self.rng.chance(50);
        let early = allow_written && self.rng.chance(50);
        let retention_ms = if self.rng.chance(40) { Some(60_000 + self.rng.below(600_000)) } else { None };
        Drawn { allow_written, early, retention_ms }
    }

    pub(crate) fn create_topic_as(&mut self, name: &str, partitions: u32, drawn: Drawn) {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.rng.bits().to_be_bytes());
        let id = TopicId(id);
        let config = drawn.config();
        let command = Command::CreateTopic { id, name: name.to_owned(), partitions, config };
        self.note(|| format!("create topic {name} {id}/{partitions} {drawn:?}"));
        let more = self.model.topics.values().map(|topic| u64::from(topic.partitions)).sum::<u64>();
        if self.model.topic_named(name).is_some() {
            self.refused(command, |error| matches!(error, EngineError::TopicExists(_)));
            return;
        }
        if self.model.topics.len() as u64 >= self.settings.max_topics
            || more + u64::from(partitions) > self.settings.max_partitions
        {
            self.refused(command, |error| matches!(error, EngineError::LimitReached { .. }));
            return;
        }
        let Reply::Topic(info) = self.ask(command, Level::Synced) else { panic!("topic {name} is new") };
        assert_eq!((info.id, info.name.as_str(), info.partitions), (id, name, partitions));
        let name = name.to_owned();
        let Drawn { allow_written, early, retention_ms } = drawn;
        let topic = Topic { name, partitions, kind: Kind::Standard, allow_written, early, retention_ms };
        self.model.add_topic(id, topic);
    }

    pub(crate) fn alter_topic(&mut self) {
        let Some(name) = self.any_topic() else { return };
        let drawn = self.draw_topic();
        self.note(|| format!("alter topic {name} {drawn:?}"));
        let command = Command::AlterTopic { name: name.clone(), config: drawn.config() };
        let Reply::Topic(_) = self.ask(command, Level::Synced) else { panic!("topic {name} is there") };
        let id = self.model.topic_named(&name).map(|(id, _)| id).expect("a known topic");
        for key in self.model.topic_keys(id) {
            self.model.logs.get_mut(&key).expect("a known partition").was_written |= drawn.allow_written;
        }
        let topic = self.model.topics.get_mut(&id).expect("a known topic");
        (topic.allow_written, topic.early) = (drawn.allow_written, drawn.early);
        topic.retention_ms = drawn.retention_ms;
    }

    pub(crate) fn delete_topic(&mut self) {
        let Some(name) = self.any_topic() else { return };
        self.note(|| format!("delete topic {name}"));
        let command = Command::DeleteTopic { name: name.clone() };
        let (id, topic) = self.model.topic_named(&name).expect("a known topic");
        if !self.model.deletable(topic) {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        self.deleted.insert(name.clone());
        let already = self.ended_since(0).len();
        let Reply::Topic(_) = self.ask(command, Level::Synced) else { panic!("topic {name} is there") };
        let before: Vec<String> = self.model.shares.keys().cloned().collect();
        self.model.delete_topic(id);
        let mut ended = BTreeSet::new();
        for group in before.iter().filter(|group| !self.model.shares.contains_key(*group)) {
            ended.extend(self.live.drop_group(group));
        }
        assert_eq!(self.ended_since(already), ended, "subscriptions that went with topic {name}");
    }

    pub(crate) fn delete_records(&mut self) {
        let Some(key) = self.any_partition() else { return };
        let log = &self.model.logs[&key];
        let (log_start, end) = (log.log_start, log.end);
        let before = self.rng.below(end.min(1 << 40) + 2);
        let topic = self.model.topics[&key.topic].name.clone();
        self.note(|| format!("delete records of {topic} {key} before {before}, now {log_start} to {end}"));
        let command = Command::DeleteRecords { topic, partition: key.partition, before };
        if before > self.live.may_show(&key) {
            self.refused(command, |error| matches!(error, EngineError::OffsetOutOfRange { .. }));
            return;
        }
        self.deleting = Some((key, before));
        let reply = self.ask(command, Level::Synced);
        self.deleting = None;
        match reply {
            Reply::RecordsDeleted { log_start: found } => {
                assert_eq!(found, log_start.max(before));
                assert_eq!(self.model.logs[&key].log_start, found, "{key} starts where the answer says");
                self.promise(Fact::Deleted { key, log_start: found });
            }
            // What may be shown is not always shown at once.
            Reply::Error(EngineError::OffsetOutOfRange { .. }) if before > self.live.must_show(&key) => {}
            other => panic!("{other:?}"),
        }
    }
}
