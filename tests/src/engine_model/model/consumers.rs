//! Consumer groups: committed offsets, and who holds which partition.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::types::PartitionKey;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Consumer {
    pub(crate) offsets: BTreeMap<PartitionKey, (u64, String)>,
    pub(crate) members: BTreeMap<String, Member>,
    pub(crate) generation: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Member {
    pub(crate) topics: Vec<String>,
    /// What it may be reading: what it was given and has not given back.
    pub(crate) holding: BTreeSet<PartitionKey>,
}

impl Consumer {
    pub(crate) fn held_by_others(&self, member: &str) -> BTreeSet<PartitionKey> {
        let others = self.members.iter().filter(|(name, _)| *name != member);
        others.flat_map(|(_, other)| other.holding.iter().copied()).collect()
    }

    /// A heartbeat that was answered with `assigned`.
    pub(crate) fn heard(
        &mut self,
        name: &str,
        topics: Vec<String>,
        owned: &BTreeSet<PartitionKey>,
        assigned: &BTreeSet<PartitionKey>,
    ) {
        let others = self.held_by_others(name);
        assert!(assigned.is_disjoint(&others), "{name} was given what others hold: {assigned:?} {others:?}");
        let before = self.members.get(name).cloned();
        let mut holding: BTreeSet<PartitionKey> = match &before {
            Some(before) => owned.intersection(&before.holding).copied().collect(),
            None => owned.difference(&others).copied().collect(),
        };
        holding.extend(assigned);
        let after = Member { topics, holding };
        if before.as_ref() != Some(&after) {
            self.generation += 1;
            self.members.insert(name.to_owned(), after);
        }
    }

    pub(crate) fn gone(&mut self, name: &str) {
        if self.members.remove(name).is_some() {
            self.generation += 1;
        }
    }
}
