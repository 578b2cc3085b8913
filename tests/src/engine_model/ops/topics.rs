//! Topics: create, alter, delete.

use std::collections::BTreeSet;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, TopicId};

use crate::engine_model::model::topics::{Kind, Topic};
use crate::engine_model::world::World;

const NAMES: [&str; 3] = ["orders", "payments", "mails"];

impl World {
    pub(crate) fn create_topic(&mut self) {
        let name = self.any_name(&NAMES);
        let partitions = self.rng.between(1, 2) as u32;
        let (allow_written, early) = self.draw_levels();
        self.create_topic_as(&name, partitions, allow_written, early);
    }

    fn draw_levels(&mut self) -> (bool, bool) {
        let allow_written = self.rng.chance(50);
        (allow_written, allow_written && self.rng.chance(50))
    }

    pub(crate) fn create_topic_as(&mut self, name: &str, partitions: u32, allow_written: bool, early: bool) {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.rng.bits().to_be_bytes());
        let id = TopicId(id);
        let config = levels(allow_written, early);
        let command = Command::CreateTopic { id, name: name.to_owned(), partitions, config };
        self.note(|| format!("create topic {name} {id}/{partitions} written={allow_written} early={early}"));
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
        self.model.add_topic(id, Topic { name, partitions, kind: Kind::Standard, allow_written, early });
    }

    pub(crate) fn alter_topic(&mut self) {
        let Some(name) = self.any_topic() else { return };
        let (allow_written, early) = self.draw_levels();
        self.note(|| format!("alter topic {name} written={allow_written} early={early}"));
        let command = Command::AlterTopic { name: name.clone(), config: levels(allow_written, early) };
        let Reply::Topic(_) = self.ask(command, Level::Synced) else { panic!("topic {name} is there") };
        let id = self.model.topic_named(&name).map(|(id, _)| id).expect("a known topic");
        for key in self.model.topic_keys(id) {
            self.model.logs.get_mut(&key).expect("a known partition").was_written |= allow_written;
        }
        let topic = self.model.topics.get_mut(&id).expect("a known topic");
        (topic.allow_written, topic.early) = (allow_written, early);
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
}

fn levels(allow_written: bool, early: bool) -> Vec<(String, String)> {
    let visibility = if early { "written" } else { "synced" };
    [("allow-written", allow_written.to_string()), ("visibility", visibility.to_owned())]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
}
