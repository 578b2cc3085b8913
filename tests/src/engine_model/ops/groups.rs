//! Share groups from outside: create, alter, pause, seek, delete.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::command::{Command, HeldFate, SeekTo};
use felucca_broker::engine::effect::{Reply, TopicKind};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey, TopicId};

use crate::engine_model::model::guard::Guard;
use crate::engine_model::model::share::{Config, OWN_CLASS, OnExhausted, Own, Part, Share, State};
use crate::engine_model::model::topics::{Kind, Topic, letters_name, redrive_name};
use crate::engine_model::world::World;

const NAMES: [&str; 3] = ["pay", "mail", "audit"];

impl World {
    /// A configuration as the command wants it and as the model has it.
    fn draw_config(&mut self) -> (Vec<(String, String)>, Config) {
        let rng = &mut self.rng;
        let lease_ms = if rng.chance(25) { rng.between(1, 40) } else { rng.between(1, 10) } * 100;
        let backoff_initial_ms = [0, 10, 100, 700][rng.below(4) as usize];
        let config = Config {
            lease_ms,
            max_lease_ms: [1_000, 2_500, 10_000, 60_000][rng.below(4) as usize],
            backoff_initial_ms,
            backoff_max_ms: backoff_initial_ms * rng.between(1, 5),
            multiplier: [1.0, 2.0, 3.0][rng.below(3) as usize],
            jitter: [0.0, 0.0, 0.2, 1.0][rng.below(4) as usize],
            max_failures: rng.between(1, 4) as u32,
            max_deliveries: [3, 6, 100][rng.below(3) as usize],
            ordered: rng.chance(60),
            on_exhausted: [
                OnExhausted::DeadLetter,
                OnExhausted::DeadLetter,
                OnExhausted::Hold,
                OnExhausted::Discard,
            ][rng.below(4) as usize],
            fatal_class: rng.chance(50).then_some("fatal"),
            own: Own {
                max_failures: rng.chance(40).then(|| rng.between(1, 6) as u32),
                backoff_initial_ms: rng.chance(30).then(|| rng.below(300)),
                backoff_max_ms: rng.chance(30).then(|| rng.between(200, 2_000)),
            },
            guard: rng.chance(80),
            window: [10, 12, 20, 100][rng.below(4) as usize],
            percent: [80, 80, 50, 99][rng.below(4) as usize],
        };
        (entries(&config), config)
    }

    pub(crate) fn create_share_group(&mut self) {
        let name = self.any_name(&NAMES);
        let mut topics: Vec<String> = (0..self.rng.between(1, 2)).filter_map(|_| self.any_topic()).collect();
        if self.rng.chance(3) {
            topics.push("nowhere".to_owned());
        }
        let from_end = self.rng.chance(25);
        let (config, drawn) = self.draw_config();
        self.create_share_group_as(&name, &topics, (config, drawn), from_end);
    }

    pub(crate) fn create_share_group_as(
        &mut self,
        name: &str,
        topics: &[String],
        (config, drawn): (Vec<(String, String)>, Config),
        from_end: bool,
    ) {
        self.note(|| format!("create share group {name} on {topics:?} from_end={from_end} {drawn:?}"));
        let command =
            Command::CreateShareGroup { group: name.to_owned(), topics: topics.to_vec(), config, from_end };
        if self.model.shares.contains_key(name) || self.model.consumers.contains_key(name) {
            self.refused(command, |error| matches!(error, EngineError::GroupExists(_)));
            return;
        }
        if !drawn.is_valid() {
            self.refused(command, |error| matches!(error, EngineError::InvalidConfig(_)));
            return;
        }
        if topics.is_empty() {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        let known: Vec<(TopicId, Topic)> = topics
            .iter()
            .filter_map(|topic| self.model.topic_named(topic).map(|(id, topic)| (id, topic.clone())))
            .collect();
        let private = known.iter().any(|(_, topic)| matches!(topic.kind, Kind::Redrive { .. }));
        if known.len() < topics.len() || private {
            self.refused(command, |error| {
                matches!(error, EngineError::UnknownTopic(_) | EngineError::InvalidRequest(_))
            });
            return;
        }
        let sources: BTreeMap<TopicId, Topic> = known.into_iter().collect();
        let fits = |companion: &str, topic: &Topic| {
            self.model.topic_named(companion).is_none_or(|(_, found)| found.partitions == topic.partitions)
        };
        if !sources.values().all(|topic| {
            fits(&letters_name(name, &topic.name), topic) && fits(&redrive_name(name, &topic.name), topic)
        }) {
            self.refused(command, |error| matches!(error, EngineError::TopicExists(_)));
            return;
        }
        if self.over_limits(name, &sources) {
            self.refused(command, |error| matches!(error, EngineError::LimitReached { .. }));
            return;
        }
        assert_eq!(self.ask(command, Level::Synced), Reply::Done);
        let mut members: BTreeSet<TopicId> = sources.keys().copied().collect();
        members.extend(self.adopt_companions(name, &sources));
        self.start_share(name, &members, drawn, from_end, false);
    }

    fn over_limits(&self, name: &str, sources: &BTreeMap<TopicId, Topic>) -> bool {
        let (mut topics, mut partitions) = (0, 0);
        for topic in sources.values().filter(|topic| topic.kind == Kind::Standard) {
            for companion in [letters_name(name, &topic.name), redrive_name(name, &topic.name)] {
                if self.model.topic_named(&companion).is_none() {
                    topics += 1;
                    partitions += u64::from(topic.partitions);
                }
            }
        }
        let groups = (self.model.shares.len() + self.model.consumers.len()) as u64;
        let hidden = sources
            .values()
            .filter(|topic| topic.kind == Kind::Standard)
            .filter(|topic| self.model.topic_named(&letters_name(name, &topic.name)).is_none());
        if groups + 1 + hidden.count() as u64 > self.settings.max_groups {
            return true;
        }
        let there: u64 = self.model.topics.values().map(|topic| u64::from(topic.partitions)).sum();
        self.model.topics.len() as u64 + topics > self.settings.max_topics
            || there + partitions > self.settings.max_partitions
    }

    /// Learns the dead-letter and redrive topics that the group must have made; answers the redrive topics.
    fn adopt_companions(&mut self, group: &str, sources: &BTreeMap<TopicId, Topic>) -> Vec<TopicId> {
        let Reply::Metadata { topics: found, .. } =
            self.ask(Command::Metadata { names: Vec::new() }, Level::Synced)
        else {
            panic!("metadata")
        };
        let mut redrives = Vec::new();
        for source in sources.values().filter(|topic| topic.kind == Kind::Standard) {
            let (letters, redrive) = (letters_name(group, &source.name), redrive_name(group, &source.name));
            let names = || (group.to_owned(), source.name.clone());
            let find = |name: &str| {
                let info = found.iter().find(|info| info.name == name).expect("made with the group");
                assert_eq!(info.partitions, source.partitions);
                (info.id, info.kind.clone())
            };
            if self.model.topic_named(&letters).is_none() {
                let (id, kind) = find(&letters);
                let (group, origin) = names();
                assert_eq!(kind, TopicKind::DeadLetter { group: group.clone(), source: origin.clone() });
                self.add_companion(id, &letters, source.partitions, Kind::Letters { group, source: origin });
                let config = Config { on_exhausted: OnExhausted::Hold, ..Config::default() };
                self.start_share(&redrive, &BTreeSet::from([id]), config, false, true);
            }
            let (id, kind) = find(&redrive);
            if self.model.topic_named(&redrive).is_none() {
                let (group, origin) = names();
                assert_eq!(kind, TopicKind::Redrive { group: group.clone(), source: origin.clone() });
                self.add_companion(id, &redrive, source.partitions, Kind::Redrive { group, source: origin });
            }
            redrives.push(id);
        }
        assert_eq!(found.len(), self.model.topics.len(), "{found:?}");
        redrives
    }

    fn add_companion(&mut self, id: TopicId, name: &str, partitions: u32, kind: Kind) {
        let name = name.to_owned();
        let retention_ms = matches!(kind, Kind::Letters { .. }).then_some(14 * 24 * 3_600_000);
        let topic = Topic { name, partitions, kind, allow_written: false, early: false, retention_ms };
        self.model.add_topic(id, topic);
    }

    fn start_share(
        &mut self,
        name: &str,
        topics: &BTreeSet<TopicId>,
        config: Config,
        from_end: bool,
        hidden: bool,
    ) {
        let mut parts = BTreeMap::new();
        let keys: Vec<PartitionKey> = topics.iter().flat_map(|id| self.model.topic_keys(*id)).collect();
        for key in keys {
            let log = &self.model.logs[&key];
            let start = if from_end { log.end } else { log.log_start };
            parts.insert(key, Part::new(self.instance(), self.lsn(), start));
        }
        let topics = topics.clone();
        let since = self.lsn();
        let share = Share {
            config,
            paused: false,
            hidden,
            since,
            topics,
            parts,
            ordered_since: since,
            guard: Guard::default(),
        };
        self.model.shares.insert(name.to_owned(), share);
    }

    pub(crate) fn alter_share_group(&mut self) {
        let Some(group) = self.any_share_group() else { return };
        let (_, mut drawn) = self.draw_config();
        let before = self.model.shares[&group].config.clone();
        if self.rng.chance(70) {
            drawn.ordered = before.ordered;
        }
        self.note(|| format!("alter {group} {drawn:?}"));
        let command = Command::AlterShareGroup { group: group.clone(), config: entries(&drawn) };
        if !drawn.is_valid() {
            self.refused(command, |error| matches!(error, EngineError::InvalidConfig(_)));
            return;
        }
        assert_eq!(self.ask(command, Level::Synced), Reply::Done);
        let lsn = self.lsn();
        if drawn.ordered != before.ordered {
            self.live.letters_may_repeat = true;
            self.promises.forget_order(&group);
        }
        let share = self.model.shares.get_mut(&group).expect("a known group");
        if drawn.ordered && !before.ordered {
            share.ordered_since = lsn;
        }
        if !drawn.guard {
            share.guard = Guard::default();
        }
        share.config = drawn;
    }

    pub(crate) fn kick_group(&mut self) {
        let Some(group) = self.any_share_group() else { return };
        let topic = if self.rng.chance(40) { self.any_topic() } else { None };
        let id = topic.as_deref().and_then(|topic| self.model.topic_named(topic)).map(|(id, _)| id);
        self.note(|| format!("kick {group} {topic:?}"));
        let command = Command::KickGroup { group: group.clone(), topic };
        let share = &self.model.shares[&group];
        if id.is_some_and(|id| !share.topics.contains(&id)) {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        let now_ms = self.now.monotonic_ms;
        let parts = share.parts.iter().filter(|(key, _)| id.is_none_or(|id| key.topic == id));
        let waiting: Vec<u64> = parts
            .flat_map(|(_, part)| part.records.values())
            .filter_map(|record| match record.state {
                State::Waiting { from_ms, .. } => Some(from_ms),
                _ => None,
            })
            .collect();
        let least = waiting.iter().filter(|from_ms| **from_ms > now_ms).count() as u64;
        let Reply::Kicked { records } = self.ask(command, Level::Synced) else { panic!("kicked") };
        assert!((least..=waiting.len() as u64).contains(&records), "{records} kicked, at least {least}");
        if records > 0 {
            self.model.kicked(now_ms, &group, id);
        }
    }

    pub(crate) fn end_held(&mut self) {
        let Some(group) = self.any_share_group() else { return };
        let topic = if self.rng.chance(40) { self.any_topic() } else { None };
        let id = topic.as_deref().and_then(|topic| self.model.topic_named(topic)).map(|(id, _)| id);
        let fate = if self.rng.chance(70) { HeldFate::Release } else { HeldFate::Discard };
        self.note(|| format!("{fate:?} what is held by {group} {topic:?}"));
        let command = Command::EndHeld { group: group.clone(), topic, fate };
        if id.is_some_and(|id| !self.model.shares[&group].topics.contains(&id)) {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        let at = self.moment();
        let held = self.model.end_held(at, &group, id, fate == HeldFate::Release);
        let least = if held.is_empty() { Level::Written } else { Level::Synced };
        let records = held.len() as u64;
        for (key, instance, offset) in held {
            self.promises.forget_failures(&((group.clone(), key, instance), offset));
        }
        assert_eq!(self.ask(command, least), Reply::HeldEnded { records, more: false });
    }

    pub(crate) fn pause_group(&mut self) {
        let Some(group) = self.any_share_group() else { return };
        let paused = self.rng.chance(40);
        self.pause(&group, paused);
    }

    pub(crate) fn pause(&mut self, group: &str, paused: bool) {
        self.note(|| format!("pause {group} {paused}"));
        let command = Command::PauseGroup { group: group.to_owned(), paused };
        assert_eq!(self.ask(command, Level::Synced), Reply::Done);
        self.model.shares.get_mut(group).expect("a known group").paused = paused;
    }

    pub(crate) fn seek_group(&mut self) {
        let names: Vec<String> =
            self.model.shares.keys().chain(self.model.consumers.keys()).cloned().collect();
        let Some(group) = self.rng.pick(&names).cloned() else { return };
        let Some(key) = self.any_partition() else { return };
        let (log_start, end) = (self.model.logs[&key].log_start, self.model.logs[&key].end);
        let to = match self.rng.below(4) {
            0 => SeekTo::Beginning,
            1 => SeekTo::End,
            _ => SeekTo::Offset(self.rng.below(end.min(1 << 40) + 2)),
        };
        let name = self.model.topics[&key.topic].name.clone();
        self.note(|| format!("seek {group} {name} {key} to {to:?}"));
        let positions = vec![(key.partition, to)];
        let force = self.rng.chance(70);
        let command = Command::SeekGroup { group: group.clone(), topic: name, positions, force };
        let start = match to {
            SeekTo::Beginning => log_start,
            SeekTo::End => end,
            SeekTo::Offset(offset) => offset.max(log_start),
        };
        if start > end {
            self.refused(command, |error| matches!(error, EngineError::OffsetOutOfRange { .. }));
            return;
        }
        if let Some(consumer) = self.model.consumers.get_mut(&group) {
            if !consumer.members.is_empty() {
                self.refused(command, |error| matches!(error, EngineError::GroupNotEmpty(_)));
                return;
            }
            consumer.offsets.insert(key, (start, String::new()));
            assert_eq!(self.ask(command, Level::Synced), Reply::Done);
            return;
        }
        if !self.model.shares[&group].topics.contains(&key.topic) {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        if force {
            assert_eq!(self.ask(command, Level::Synced), Reply::Done);
        } else if self.refused_for_what_it_drops(&group, command, &[(key, start)]) {
            return;
        }
        self.restart_part(&group, key, start);
    }

    /// Asks to move a group to these offsets, or to delete it, without force; answers whether that is refused.
    fn refused_for_what_it_drops(
        &mut self,
        group: &str,
        command: Command,
        places: &[(PartitionKey, u64)],
    ) -> bool {
        let (mut dropped, mut holes) = (0, 0);
        for (key, to) in places {
            let (part, log) = (&self.model.shares[group].parts[key], &self.model.logs[key]);
            dropped += part.records.values().filter(|record| record.state == State::Exhausted).count() as u64;
            if matches!(self.model.topics[&key.topic].kind, Kind::Redrive { .. }) {
                let end = log.end.min(*to);
                dropped += part.unsettled(log, end).count() as u64;
                // The engine cannot tell a record from none that it has not looked for.
                holes += end.saturating_sub(part.start)
                    - log.entries.range(part.start.min(end)..end).count() as u64;
            }
        }
        let staged = self.staged_events();
        match self.ask(command, Level::Written) {
            Reply::Done => {
                assert_eq!(dropped, 0, "dropped by {group}");
                false
            }
            Reply::Error(EngineError::GroupUnsettled { .. }) => {
                assert!(dropped + holes > 0, "refused to {group}");
                assert_eq!(self.staged_events(), staged, "refused, and yet something was done");
                true
            }
            other => panic!("{other:?}"),
        }
    }

    fn restart_part(&mut self, group: &str, key: PartitionKey, start: u64) {
        let part = Part::new(self.instance(), self.lsn(), start);
        let share = self.model.shares.get_mut(group).expect("a known group");
        share.parts.insert(key, part);
        self.live.letters.retain(|(name, other, _)| (name.as_str(), *other) != (group, key));
    }

    pub(crate) fn delete_group(&mut self) {
        let names: Vec<String> =
            self.model.shares.keys().chain(self.model.consumers.keys()).cloned().collect();
        let Some(group) = self.rng.pick(&names).cloned() else { return };
        self.note(|| format!("delete group {group}"));
        let force = self.rng.chance(50);
        let command = Command::DeleteGroup { group: group.clone(), force };
        if self.model.shares.get(&group).is_some_and(|share| share.hidden) {
            self.refused(command, |error| matches!(error, EngineError::InvalidRequest(_)));
            return;
        }
        let has_members = match self.model.consumers.get(&group) {
            Some(consumer) => !consumer.members.is_empty(),
            None => !self.live.group_members(&group).is_empty(),
        };
        if has_members {
            self.refused(command, |error| matches!(error, EngineError::GroupNotEmpty(_)));
            return;
        }
        match self.model.shares.get(&group) {
            Some(share) if !force => {
                let places: Vec<_> = share.parts.keys().map(|key| (*key, u64::MAX)).collect();
                if self.refused_for_what_it_drops(&group, command, &places) {
                    return;
                }
            }
            _ => assert_eq!(self.ask(command, Level::Synced), Reply::Done),
        }
        self.deleted.insert(group.clone());
        self.live.drop_group(&group);
        self.model.consumers.remove(&group);
        if self.model.shares.remove(&group).is_some() {
            let private = self.model.topics.iter().filter(
                |(_, topic)| matches!(&topic.kind, Kind::Redrive { group: owner, .. } if *owner == group),
            );
            let private: Vec<TopicId> = private.map(|(id, _)| *id).collect();
            for id in private {
                self.model.drop_topic(id);
            }
        }
    }
}

fn entries(config: &Config) -> Vec<(String, String)> {
    let on_exhausted = match config.on_exhausted {
        OnExhausted::DeadLetter => "dead-letter",
        OnExhausted::Hold => "hold",
        OnExhausted::Discard => "discard",
    };
    let own = |setting: &str, value: Option<String>| {
        (format!("class.{OWN_CLASS}.{setting}"), value.unwrap_or_else(|| "inherit".to_owned()))
    };
    let own = [
        own("max-failures", config.own.max_failures.map(|count| count.to_string())),
        own("backoff-initial", config.own.backoff_initial_ms.map(|ms| format!("{ms}ms"))),
        own("backoff-max", config.own.backoff_max_ms.map(|ms| format!("{ms}ms"))),
    ];
    let group = [
        ("lease", format!("{}ms", config.lease_ms)),
        ("max-lease", format!("{}ms", config.max_lease_ms)),
        ("backoff-initial", format!("{}ms", config.backoff_initial_ms)),
        ("backoff-max", format!("{}ms", config.backoff_max_ms)),
        ("backoff-multiplier", config.multiplier.to_string()),
        ("jitter", config.jitter.to_string()),
        ("max-failures", config.max_failures.to_string()),
        ("max-deliveries", config.max_deliveries.to_string()),
        ("ordering", if config.ordered { "key" } else { "none" }.to_owned()),
        ("on-exhausted", on_exhausted.to_owned()),
        ("non-retryable-classes", config.fatal_class.unwrap_or("").to_owned()),
        ("outage-guard", if config.guard { "on" } else { "off" }.to_owned()),
        ("outage-window", config.window.to_string()),
        ("outage-percent", config.percent.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    group.into_iter().chain(own).collect()
}
