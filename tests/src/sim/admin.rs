//! One who changes topics and groups: creates, fills and deletes a topic, deletes records, pauses, moves and kicks groups.

use std::collections::BTreeSet;

use felucca_broker::engine::command::{AppendEntry, Command, SeekTo};
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey, TopicId};

use super::client::{Asked, Known, Outgoing, Sent};
use super::content::{batch, staged};
use super::history::{ANONYMOUS, History, Kind};
use crate::engine_model::rng::Rng;

/// The topic that comes and goes.
pub(crate) const FLEETING: &str = "fleeting";
/// As a maker of records.
const MAKER: u32 = ANONYMOUS + 500_000;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Admin {
    waits: bool,
    fleeting: Option<TopicId>,
    made: u32,
    /// Groups that may be moved, with one of their topics.
    pub(crate) movable: Vec<(String, String)>,
    /// Groups that may be paused, kicked and altered.
    pub(crate) groups: Vec<String>,
    paused: Option<String>,
    /// Groups that may be paused although they were resumed: a pause may come late, on a connection that was left.
    late: BTreeSet<String>,
    /// Topics whose records may be deleted.
    pub(crate) deletable: Vec<(String, PartitionKey)>,
}

impl Admin {
    pub(crate) fn connected(&mut self) {
        self.waits = false;
    }

    /// Whether everything is as clients need it.
    pub(crate) fn is_done(&self) -> bool {
        self.paused.is_none() && self.late.is_empty()
    }

    pub(crate) fn act(
        &mut self,
        rng: &mut Rng,
        known: &Known<'_>,
        history: &History,
        calm: bool,
        out: &mut Outgoing,
    ) {
        if self.waits {
            return;
        }
        if calm && self.paused.is_none() {
            self.paused = self.late.pop_first();
        }
        let asked = if calm { self.resume() } else { self.something(rng, known, history) };
        if let Some(asked) = asked {
            self.waits = true;
            out.push(asked);
        }
    }

    fn resume(&mut self) -> Option<(Asked, Command)> {
        let group = self.paused.clone()?;
        Some((Asked::Admin { what: "resume" }, Command::PauseGroup { group, paused: false }))
    }

    fn something(&mut self, rng: &mut Rng, known: &Known<'_>, history: &History) -> Option<(Asked, Command)> {
        match rng.below(100) {
            0..25 => Some(self.create_or_delete(rng)),
            25..55 => self.append(rng, known),
            55..70 => {
                let (topic, key) = rng.pick(&self.deletable)?.clone();
                let log = history.logs.get(&key)?;
                let before = rng.below(log.end() + 1);
                let asked = Asked::DeleteRecords { key, before };
                Some((asked, Command::DeleteRecords { topic, partition: key.partition, before }))
            }
            70..78 => match self.resume() {
                Some(resume) => Some(resume),
                None => {
                    let group = rng.pick(&self.groups)?.clone();
                    self.paused = Some(group.clone());
                    self.late.insert(group.clone());
                    Some((Asked::Admin { what: "pause" }, Command::PauseGroup { group, paused: true }))
                }
            },
            78..86 => {
                let group = rng.pick(&self.groups)?.clone();
                Some((Asked::Admin { what: "kick" }, Command::KickGroup { group, topic: None }))
            }
            86..92 => {
                let group = rng.pick(&self.groups)?.clone();
                let config = vec![("max-failures".to_owned(), rng.between(2, 4).to_string())];
                Some((Asked::Admin { what: "alter" }, Command::AlterShareGroup { group, config }))
            }
            92..95 => {
                let (group, topic) = rng.pick(&self.movable)?.clone();
                let to = [SeekTo::Beginning, SeekTo::End][rng.below(2) as usize];
                let asked = Asked::Seek { group: group.clone() };
                Some((asked, Command::SeekGroup { group, topic, positions: vec![(0, to)], force: true }))
            }
            _ => Some((Asked::Admin { what: "list" }, Command::ListGroups)),
        }
    }

    fn create_or_delete(&mut self, rng: &mut Rng) -> (Asked, Command) {
        let name = FLEETING.to_owned();
        if self.fleeting.take().is_some() {
            return (Asked::DeleteTopic { topic: name.clone() }, Command::DeleteTopic { name });
        }
        let mut id = [0; 16];
        id[..8].copy_from_slice(&rng.bits().to_be_bytes());
        id[8..].copy_from_slice(&rng.bits().to_be_bytes());
        let command =
            Command::CreateTopic { id: TopicId(id), name: name.clone(), partitions: 2, config: Vec::new() };
        (Asked::CreateTopic { topic: name }, command)
    }

    fn append(&mut self, rng: &mut Rng, known: &Known<'_>) -> Option<(Asked, Command)> {
        let partition = PartitionKey { topic: self.fleeting?, partition: rng.below(2) as u32 };
        let (first, count) = (self.made, rng.between(1, 5) as u32);
        self.made += count;
        let sent = Sent { target: usize::MAX, partition, maker: MAKER, first, count };
        let batch = staged(batch(MAKER, first, count, None, known.wall_ms));
        let entries = vec![AppendEntry { partition, batch }];
        let level = Level::Synced;
        Some((Asked::Append { sent: vec![sent], level }, Command::Append { level, entries }))
    }

    pub(crate) fn answered(&mut self, asked: &Asked, reply: &Reply) {
        self.waits = false;
        match (asked, reply) {
            (Asked::CreateTopic { .. }, Reply::Topic(info)) => self.fleeting = Some(info.id),
            // It is there from before an answer was lost: the next thing is to delete it.
            (Asked::CreateTopic { .. }, Reply::Error(EngineError::TopicExists(_))) => {
                self.fleeting = Some(TopicId([0; 16]));
            }
            (Asked::Admin { what: "resume" }, Reply::Done) => self.paused = None,
            (_, Reply::Error(error)) => match error {
                EngineError::ReadOnly(_)
                | EngineError::Stopping
                | EngineError::LimitReached { .. }
                | EngineError::UnknownTopic(_) => {}
                error => panic!("an administrator is told: {error} to {asked:?}"),
            },
            _ => {}
        }
    }
}

/// A topic's kind, from its settings.
pub(crate) fn standard(allow_written: bool, visibility: Level, retention: bool) -> Kind {
    Kind::Standard { allow_written, visibility, retention, compact: false }
}
