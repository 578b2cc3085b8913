//! The beginning and the end of a run: something to work on, and members that work it off.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::command::{Command, Outcome, Settlement};
use felucca_broker::engine::types::{Level, PartitionKey};

use super::model::consumers::{Consumer, Member};
use super::model::share::{How, State};
use super::model::topics::Kind;
use super::world::{Fate, World};

impl World {
    /// A topic and a share group, so that runs get to the point.
    pub(crate) fn set_up(&mut self) {
        self.begin_turn();
        self.create_topic();
        self.init_producer();
        self.produce();
        self.create_share_group();
        self.subscribe();
        self.end_turn(Fate::Released);
    }

    /// Time goes by: mostly little, sometimes to the next thing that is due, seldom much.
    pub(crate) fn pass_time(&mut self) {
        let ms = match self.rng.below(100) {
            0..40 => 0,
            40..70 => self.rng.below(50),
            70..90 => {
                let next = self.engine.next_deadline().unwrap_or(0);
                next.saturating_sub(self.now.monotonic_ms).min(20_000)
            }
            90..98 => self.rng.below(3_000),
            98 => self.rng.below(20_000),
            _ => self.rng.below(900_000),
        };
        if ms > 0 {
            self.advance(ms);
        }
    }

    /// The device catches up, wholly or in part.
    pub(crate) fn sync_some(&mut self) {
        let written = self.written();
        let lsn = if self.rng.chance(70) { written } else { self.rng.between(self.synced, written) };
        self.sync(lsn);
    }

    /// Members that do as they should work off everything, within a bounded time.
    pub(crate) fn drain(&mut self) {
        self.unreadable = 0;
        self.settle_down();
        self.converge();
        // The others go home; their sessions end.
        self.held.clear();
        self.advance(self.session_ms);
        self.begin_turn();
        self.tick();
        let groups: Vec<String> = self.model.shares.keys().cloned().collect();
        for group in &groups {
            self.pause(group, false);
            self.subscribe_as(group, "zoe", 1_000_000, 1 << 30, true);
        }
        self.end_turn(Fate::Released);
        for round in 0.. {
            self.settle_down();
            let left = self.work_left();
            if left.is_empty() {
                break;
            }
            assert!(round < 2_000, "members do not get through: {left:?}");
            self.begin_turn();
            self.work();
            self.end_turn(Fate::Released);
            let next = self.engine.next_deadline().unwrap_or(0);
            let wait = next.saturating_sub(self.now.monotonic_ms);
            if self.held.is_empty() && wait > 0 {
                self.advance(wait.min(1_000));
            }
            self.begin_turn();
            self.tell(Command::MembersSeen {
                members: groups.iter().map(|group| (group.clone(), "zoe".to_owned())).collect(),
            });
            for group in &groups {
                self.live.members.insert((group.clone(), "zoe".to_owned()), self.now.monotonic_ms);
            }
            self.end_turn(Fate::Released);
        }
        self.check_letters();
    }

    /// Members that give back what they are asked to give back end with even shares of every topic.
    fn converge(&mut self) {
        let topics: Vec<String> = self.model.topics.values().map(|topic| topic.name.clone()).collect();
        let groups: Vec<(String, Consumer)> =
            self.model.consumers.iter().map(|(name, consumer)| (name.clone(), consumer.clone())).collect();
        for (group, consumer) in groups.iter().filter(|(_, consumer)| !consumer.members.is_empty()) {
            let members: Vec<&String> = consumer.members.keys().collect();
            for _ in 0..2 * members.len() + 1 {
                for member in &members {
                    self.begin_turn();
                    let owned = self.assigned.get(&(group.clone(), (*member).clone())).cloned();
                    self.heartbeat_as(group, member, topics.clone(), owned.unwrap_or_default(), false);
                    self.end_turn(Fate::Released);
                }
            }
            let shares = &self.model.consumers[group].members;
            for id in self.model.topics.keys() {
                let keys = self.model.topic_keys(*id);
                let of = |member: &Member| keys.iter().filter(|key| member.holding.contains(key)).count();
                let counts: Vec<usize> = shares.values().map(of).collect();
                assert_eq!(counts.iter().sum::<usize>(), keys.len(), "{group} does not read all of {id}");
                let (least, most) = (counts.iter().min(), counts.iter().max());
                assert!(most.unwrap_or(&0) - least.unwrap_or(&0) <= 1, "{group} on {id}: {counts:?}");
            }
        }
    }

    /// Counts dead letters by what their headers say, independently of all that was followed step by step: every
    /// dead-lettered record once, no other at all. Names that were used twice are passed over.
    fn check_letters(&self) {
        let mut letters: BTreeMap<String, u32> = BTreeMap::new();
        for (_, records) in self.logs.records.iter().filter(|(key, _)| self.is_letters(key)) {
            for (_, letter) in records.values() {
                let id = letter.headers.iter().find(|header| header.name == "__dlq.errors.id");
                let id = id.and_then(|header| header.value.clone()).expect("a dead letter has an id");
                *letters.entry(String::from_utf8_lossy(&id).into_owned()).or_default() += 1;
            }
        }
        for (group, share) in self.model.shares.iter().filter(|(group, _)| !self.deleted.contains(*group)) {
            // A group that was moved may give up a record twice.
            for (key, part) in share.parts.iter().filter(|(_, part)| part.since == share.since) {
                let name = &self.model.topics[&key.topic].name;
                if self.deleted.contains(name) {
                    continue;
                }
                for (offset, record) in &part.records {
                    let id = format!("{group}/{name}/{}/{offset}", key.partition);
                    let dead = matches!(record.state, State::Settled { how: How::DeadLettered, .. });
                    let found = letters.get(&id).copied().unwrap_or(0);
                    assert_eq!(found, u32::from(dead), "dead letters of {id}, which is {:?}", record.state);
                }
            }
        }
    }

    fn is_letters(&self, key: &PartitionKey) -> bool {
        let topic = self.model.topics.get(&key.topic);
        topic.is_some_and(|topic| matches!(topic.kind, Kind::Letters { .. }))
    }

    fn work(&mut self) {
        let held: Vec<_> = self.held.iter().filter(|held| held.member == "zoe").cloned().collect();
        for held in held {
            let outcome = if self.rng.chance(90) {
                Outcome::Ack
            } else {
                Outcome::Nack { delay_ms: None, counted: true, detail: Default::default() }
            };
            let settlements = vec![Settlement { record: held.record, outcome }];
            self.settle_as(&held.group, &held.member, Level::Synced, settlements);
        }
        // What others hold they lose with their sessions.
        self.held.retain(|held| held.member == "zoe");
    }

    /// The records that are neither done with, nor held, nor behind a held one of their key.
    fn work_left(&self) -> Vec<(String, PartitionKey, u64)> {
        let mut left = Vec::new();
        for (group, share) in &self.model.shares {
            for (key, part) in &share.parts {
                let log = &self.model.logs[key];
                let is_held =
                    |offset: &u64| part.records.get(offset).is_some_and(|record| record.state == State::Held);
                let (mut blocked, mut new, mut again) = (BTreeSet::new(), Vec::new(), Vec::new());
                let mut stuck = 0;
                for offset in part.unsettled(log, log.end) {
                    let slot = log.entries[&offset].slot.filter(|_| share.config.ordered);
                    let behind = slot.is_some_and(|slot| blocked.contains(&slot));
                    let known = part.records.contains_key(&offset);
                    if is_held(&offset) || (behind && known) {
                        blocked.extend(slot);
                        stuck += 1;
                    } else if !behind {
                        if known { &mut again } else { &mut new }.push((group.clone(), *key, offset));
                    }
                }
                left.append(&mut again);
                // A table full of what is stuck takes in nothing new.
                if self.has_room_for_new(0, stuck) {
                    left.append(&mut new);
                }
            }
        }
        left
    }
}
