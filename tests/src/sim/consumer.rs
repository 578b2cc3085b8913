//! Members of a consumer group: they read what they are assigned in its order, and commit how far they came.

use std::collections::BTreeMap;

use felucca_broker::engine::command::{Command, OffsetCommit};
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::PartitionKey;

use super::client::{Asked, Known, Outgoing};
use crate::engine_model::rng::Rng;

/// How often a member is heard of.
const HEARTBEAT_MS: u64 = 1_000;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Consumer {
    pub(crate) group: String,
    member: String,
    topics: Vec<String>,
    generation: u64,
    /// Where it is in each partition that it owns; `None`: not known yet.
    owned: BTreeMap<PartitionKey, Option<u64>>,
    committed: BTreeMap<PartitionKey, u64>,
    /// A request is under way: one at a time.
    waits: bool,
    heartbeat_at_ms: u64,
}

impl Consumer {
    pub(crate) fn new(group: &str, member: &str, topics: &[&str]) -> Self {
        Self {
            group: group.to_owned(),
            member: member.to_owned(),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            generation: 0,
            owned: BTreeMap::new(),
            committed: BTreeMap::new(),
            waits: false,
            heartbeat_at_ms: 0,
        }
    }

    pub(crate) fn connected(&mut self) {
        self.waits = false;
    }

    /// The partitions that it may read on in, and from where.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (PartitionKey, u64)> {
        self.owned.iter().filter_map(|(key, position)| Some((*key, (*position)?)))
    }

    /// It has read a partition up to an offset.
    pub(crate) fn advance(&mut self, key: PartitionKey, to: u64) {
        if let Some(Some(position)) = self.owned.get_mut(&key) {
            *position = to;
        }
    }

    /// Whether it has committed all that it has read.
    pub(crate) fn has_committed(&self) -> bool {
        self.positions().all(|(key, position)| self.committed.get(&key).is_some_and(|at| *at == position))
            && self.owned.values().all(Option::is_some)
    }

    pub(crate) fn act(&mut self, rng: &mut Rng, known: &Known<'_>, out: &mut Outgoing) {
        if self.waits {
            return;
        }
        let unknown: Vec<PartitionKey> =
            self.owned.iter().filter(|(_, position)| position.is_none()).map(|(key, _)| *key).collect();
        let news: Vec<OffsetCommit> = self
            .positions()
            .filter(|(key, position)| self.committed.get(key) != Some(position))
            .map(|(partition, offset)| OffsetCommit { partition, offset, metadata: String::new() })
            .collect();
        let (asked, command) = if known.now_ms >= self.heartbeat_at_ms || self.generation == 0 {
            self.heartbeat_at_ms = known.now_ms + HEARTBEAT_MS;
            let command = Command::GroupHeartbeat {
                group: self.group.clone(),
                member: self.member.clone(),
                connection: 0,
                topics: self.topics.clone(),
                owned: self.owned.keys().copied().collect(),
                generation: self.generation,
                leave: false,
            };
            (Asked::Heartbeat, command)
        } else if !unknown.is_empty() {
            let (group, partitions) = (self.group.clone(), unknown);
            (
                Asked::Fetch { group: group.clone(), partitions: partitions.clone() },
                Command::FetchOffsets { group, partitions },
            )
        } else if !news.is_empty() && rng.chance(70) {
            let command = Command::CommitOffsets {
                group: self.group.clone(),
                member: self.member.clone(),
                connection: 0,
                generation: self.generation,
                offsets: news.clone(),
            };
            (Asked::Commit { group: self.group.clone(), offsets: news }, command)
        } else {
            return;
        };
        self.waits = true;
        out.push((asked, command));
    }

    pub(crate) fn answered(&mut self, asked: &Asked, reply: &Reply) {
        self.waits = false;
        match (asked, reply) {
            (Asked::Heartbeat, Reply::Heartbeat { generation, assigned, .. }) => {
                self.generation = *generation;
                self.owned.retain(|key, _| assigned.contains(key));
                self.committed.retain(|key, _| assigned.contains(key));
                for key in assigned {
                    self.owned.entry(*key).or_insert(None);
                }
            }
            (Asked::Fetch { .. }, Reply::Offsets(offsets)) => {
                for (key, position) in self.owned.iter_mut().filter(|(_, position)| position.is_none()) {
                    let found = offsets.iter().find(|offset| offset.partition == *key);
                    *position = Some(found.map_or(0, |offset| offset.offset));
                    self.committed.insert(*key, found.map_or(0, |offset| offset.offset));
                }
            }
            (Asked::Commit { offsets, .. }, Reply::OffsetsCommitted(results)) => {
                for (offset, result) in offsets.iter().zip(results) {
                    match result {
                        Ok(()) => {
                            self.committed.insert(offset.partition, offset.offset);
                        }
                        Err(_) => self.heartbeat_at_ms = 0,
                    }
                }
            }
            (_, Reply::Error(error)) => match error {
                EngineError::UnknownMember(_) | EngineError::StaleGeneration { .. } => {
                    // Whoever is not known any more has nothing.
                    self.owned.clear();
                    self.committed.clear();
                    self.generation = 0;
                }
                EngineError::ReadOnly(_) | EngineError::Stopping | EngineError::LimitReached { .. } => {}
                error => panic!("a consumer is told: {error}"),
            },
            (asked, reply) => panic!("{reply:?} to {asked:?}"),
        }
    }
}
