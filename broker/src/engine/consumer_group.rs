//! Consumer groups: committed offsets, and partitions spread over the members.
//!
//! The broker computes the assignment and reconciles it member by member (in the way of KIP-848): a partition is offered to
//! its next owner only when no other member *holds* it, that is, may still be reading it. What a member holds shrinks only
//! when the member says so in a heartbeat, or when its session ends. Holdings are journaled, so that a restart of the broker
//! neither moves partitions nor hands one to two members.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::command::OffsetCommit;
use super::error::EngineError;
use super::event::{CommittedOffset, ConsumerRow, MemberRow, MembersChanged, PartitionRef};
use super::types::{PartitionKey, TopicId};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Committed {
    pub(crate) offset: u64,
    pub(crate) metadata: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Member {
    pub(crate) topics: Vec<String>,
    /// What it may be reading.
    pub(crate) holding: BTreeSet<PartitionKey>,
    pub(crate) last_seen_ms: u64,
    /// A session timer is set.
    pub(crate) watched: bool,
    /// The newest on which it was heard; none after a start.
    pub(crate) connection: u64,
}

#[derive(Debug, Default)]
pub(crate) struct ConsumerGroup {
    pub(crate) offsets: BTreeMap<PartitionKey, Committed>,
    pub(crate) members: BTreeMap<Arc<str>, Member>,
    pub(crate) generation: u64,
    /// Why it is not served: what was recovered of it does not fit the log (rule R6).
    pub(crate) corrupt: Option<String>,
}

impl ConsumerGroup {
    /// Looks whether offsets are committed that the partitions do not have.
    pub(crate) fn check_ends(&mut self, end_of: impl Fn(&PartitionKey) -> u64) {
        let beyond = self.offsets.iter().find(|(key, committed)| committed.offset > end_of(key));
        self.corrupt = beyond.map(|(key, committed)| {
            let (offset, end) = (committed.offset, end_of(key));
            format!("offset {offset} is committed on partition {key}, which ends at {end}")
        });
    }

    /// Who should read what: each topic's partitions evenly over the members that want it, moving as few as possible.
    /// `partitions_of` gives the partitions of a topic by name.
    fn target(&self, partitions_of: impl Fn(&str) -> Vec<PartitionKey>) -> BTreeMap<PartitionKey, Arc<str>> {
        let mut target = BTreeMap::new();
        let mut load: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
        let topics: BTreeSet<&String> = self.members.values().flat_map(|member| &member.topics).collect();
        for topic in topics {
            let partitions = partitions_of(topic);
            let takers = self.members.iter().filter(|(_, member)| member.topics.contains(topic));
            // (partitions held now, load from topics before, name)
            let mut takers: Vec<(usize, usize, &Arc<str>)> = takers
                .map(|(name, member)| {
                    let held = partitions.iter().filter(|key| member.holding.contains(key)).count();
                    (held, load.get(name).copied().unwrap_or(0), name)
                })
                .collect();
            takers.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
            let (share, larger) = (partitions.len() / takers.len(), partitions.len() % takers.len());
            let mut homeless: BTreeSet<PartitionKey> = partitions.iter().copied().collect();
            let mut short = Vec::new();
            for (rank, (_, _, name)) in takers.iter().enumerate() {
                let quota = share + usize::from(rank < larger);
                let holding = &self.members[*name].holding;
                let kept: Vec<PartitionKey> = homeless.intersection(holding).take(quota).copied().collect();
                *load.entry(name).or_default() += quota;
                short.extend(std::iter::repeat_n(*name, quota - kept.len()));
                for key in kept {
                    homeless.remove(&key);
                    target.insert(key, (*name).clone());
                }
            }
            target.extend(homeless.into_iter().zip(short.into_iter().cloned()));
        }
        target
    }

    /// What the member should own now: its part of the target less what others still hold.
    pub(crate) fn assigned(
        &self,
        member: &str,
        partitions_of: impl Fn(&str) -> Vec<PartitionKey>,
    ) -> BTreeSet<PartitionKey> {
        let held_by_others: BTreeSet<PartitionKey> = self
            .members
            .iter()
            .filter(|(name, _)| &***name != member)
            .flat_map(|(_, other)| other.holding.iter().copied())
            .collect();
        let target = self.target(partitions_of);
        let own =
            target.into_iter().filter(|(key, owner)| &**owner == member && !held_by_others.contains(key));
        own.map(|(key, _)| key).collect()
    }

    /// Whether the member may commit for the partition.
    pub(crate) fn check_commit(
        &self,
        member: &str,
        generation: u64,
        key: PartitionKey,
    ) -> Result<(), EngineError> {
        if member.is_empty() {
            return Ok(());
        }
        let Some(entry) = self.members.get(member) else {
            return Err(EngineError::UnknownMember(member.to_owned()));
        };
        if entry.holding.contains(&key) {
            Ok(())
        } else if generation < self.generation {
            Err(EngineError::StaleGeneration { got: generation, current: self.generation })
        } else {
            Err(EngineError::NotAssigned(key))
        }
    }

    pub(crate) fn members_event(&self, group: &str) -> MembersChanged {
        MembersChanged { group: group.to_owned(), generation: self.generation, members: self.member_rows() }
    }

    fn member_rows(&self) -> Vec<MemberRow> {
        let holding = |member: &Member| {
            let refs = member.holding.iter();
            refs.map(|key| PartitionRef { topic_id: key.topic.0.to_vec(), partition: key.partition })
                .collect()
        };
        let rows = self.members.iter().map(|(name, member)| MemberRow {
            member: name.to_string(),
            topics: member.topics.clone(),
            holding: holding(member),
        });
        rows.collect()
    }

    // ---- The fold ----

    pub(crate) fn apply_offsets(&mut self, offsets: &[CommittedOffset]) {
        for committed in offsets {
            if let Some(commit) = OffsetCommit::from_event(committed) {
                self.offsets
                    .insert(commit.partition, Committed { offset: commit.offset, metadata: commit.metadata });
            }
        }
    }

    pub(crate) fn apply_members(&mut self, generation: u64, rows: &[MemberRow]) {
        self.generation = generation;
        // Sessions go on: they are not part of the event.
        let before = std::mem::take(&mut self.members);
        self.members = rows
            .iter()
            .map(|row| {
                let holding = row.holding.iter().filter_map(|key| {
                    Some(PartitionKey {
                        topic: TopicId::from_slice(&key.topic_id)?,
                        partition: key.partition,
                    })
                });
                let known = before.get(row.member.as_str());
                let member = Member {
                    topics: row.topics.clone(),
                    holding: holding.collect(),
                    last_seen_ms: known.map_or(0, |known| known.last_seen_ms),
                    watched: known.is_some_and(|known| known.watched),
                    connection: known.map_or(0, |known| known.connection),
                };
                (Arc::from(row.member.as_str()), member)
            })
            .collect();
    }

    /// Forgets a deleted topic.
    pub(crate) fn forget_topic(&mut self, topic: TopicId) {
        self.offsets.retain(|key, _| key.topic != topic);
        for member in self.members.values_mut() {
            member.holding.retain(|key| key.topic != topic);
        }
    }

    pub(crate) fn to_row(&self, group: &str) -> ConsumerRow {
        let offsets = self.offsets.iter().map(|(key, committed)| CommittedOffset {
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
            offset: committed.offset,
            metadata: committed.metadata.clone(),
        });
        ConsumerRow {
            group: group.to_owned(),
            offsets: offsets.collect(),
            generation: self.generation,
            members: self.member_rows(),
        }
    }

    pub(crate) fn from_row(row: &ConsumerRow) -> Self {
        let mut group = Self::default();
        group.apply_offsets(&row.offsets);
        group.apply_members(row.generation, &row.members);
        group
    }
}

impl OffsetCommit {
    pub(crate) fn from_event(event: &CommittedOffset) -> Option<Self> {
        Some(Self {
            partition: PartitionKey {
                topic: TopicId::from_slice(&event.topic_id)?,
                partition: event.partition,
            },
            offset: event.offset,
            metadata: event.metadata.clone(),
        })
    }

    pub(crate) fn to_event(&self) -> CommittedOffset {
        CommittedOffset {
            topic_id: self.partition.topic.0.to_vec(),
            partition: self.partition.partition,
            offset: self.offset,
            metadata: self.metadata.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(partition: u32) -> PartitionKey {
        PartitionKey { topic: TopicId([7; 16]), partition }
    }

    fn member(holding: &[u32]) -> Member {
        Member {
            topics: vec!["orders".to_owned()],
            holding: holding.iter().map(|partition| key(*partition)).collect(),
            ..Member::default()
        }
    }

    fn eight(_: &str) -> Vec<PartitionKey> {
        (0..8).map(key).collect()
    }

    #[test]
    fn a_second_member_gets_partitions_only_after_the_first_gave_them_up() {
        let mut group = ConsumerGroup::default();
        group.members.insert("a".into(), member(&[0, 1, 2, 3, 4, 5, 6, 7]));
        group.members.insert("b".into(), member(&[]));
        assert!(group.assigned("b", eight).is_empty());
        let kept = group.assigned("a", eight);
        assert_eq!(kept.len(), 4);
        group.members.insert("a".into(), Member { holding: kept.clone(), ..member(&[]) });
        let given = group.assigned("b", eight);
        assert_eq!(given.len(), 4);
        assert!(kept.is_disjoint(&given));
    }

    #[test]
    fn every_partition_has_one_owner_and_loads_differ_by_one_at_most() {
        for members in 1..12 {
            let mut group = ConsumerGroup::default();
            for i in 0..members {
                group.members.insert(
                    format!("m{i}").as_str().into(),
                    member(if i == 0 { &[0, 1, 2, 3, 4] } else { &[] }),
                );
            }
            let target = group.target(eight);
            assert_eq!(target.len(), 8);
            let loads: Vec<usize> = group
                .members
                .keys()
                .map(|name| target.values().filter(|owner| *owner == name).count())
                .collect();
            assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{loads:?}");
        }
    }

    #[test]
    fn what_a_member_holds_stays_with_it_where_it_can() {
        let mut group = ConsumerGroup::default();
        group.members.insert("a".into(), member(&[1, 3]));
        group.members.insert("b".into(), member(&[0, 2, 4, 5, 6, 7]));
        let kept = group.assigned("a", eight);
        assert!(kept.contains(&key(1)) && kept.contains(&key(3)));
    }
}
