//! Who holds which leases in a group. Derived state: listed anew after a start.
//!
//! By member, so that one who comes back or is lost costs what it holds and nothing of what others hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::engine::types::PartitionKey;

/// What one member holds.
#[derive(Debug, Default)]
struct Holding {
    leases: u64,
    alone: bool,
    offsets: BTreeMap<PartitionKey, Offsets>,
}

/// Offsets of one partition, in blocks of 64: what a member holds mostly lies close together.
#[derive(Debug, Default)]
pub(crate) struct Offsets {
    /// By the number of the block: a bit for each of its offsets. None is empty.
    blocks: BTreeMap<u64, u64>,
}

impl Offsets {
    fn block_and_bit(offset: u64) -> (u64, u64) {
        (offset >> 6, 1 << (offset & 63))
    }

    /// Answers how many of them were not there. Those of one block should come one after the other.
    fn extend(&mut self, offsets: impl Iterator<Item = u64>) -> u64 {
        let mut added = 0;
        let mut add = |block: u64, bits: u64| {
            if bits != 0 {
                let known = self.blocks.entry(block).or_default();
                added += u64::from((bits & !*known).count_ones());
                *known |= bits;
            }
        };
        let (mut block, mut bits) = (0, 0);
        for offset in offsets {
            let (its_block, its_bit) = Self::block_and_bit(offset);
            if its_block != block {
                add(block, bits);
                (block, bits) = (its_block, 0);
            }
            bits |= its_bit;
        }
        add(block, bits);
        added
    }

    /// Answers whether it was there.
    fn remove(&mut self, offset: u64) -> bool {
        let (block, bit) = Self::block_and_bit(offset);
        let Some(bits) = self.blocks.get_mut(&block) else { return false };
        let was_there = *bits & bit != 0;
        *bits &= !bit;
        if *bits == 0 {
            self.blocks.remove(&block);
        }
        was_there
    }

    /// All of them, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> {
        self.blocks.iter().flat_map(|(block, bits)| {
            (0..64).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| block << 6 | bit)
        })
    }
}

/// Bytes of a member's entry for one partition, and of a lease when each lies in a block of its own, roughly.
const PARTITION_BYTES: u64 = 256;
const OFFSET_BYTES: u64 = 24;

#[derive(Debug, Default)]
pub(crate) struct Holders {
    by_member: BTreeMap<Arc<str>, Holding>,
    leases: u64,
    /// Pairs of a member and a partition on which it holds leases.
    pairs: u64,
}

impl Holders {
    /// Leases of one member.
    pub(crate) fn leases_of(&self, member: &str) -> u64 {
        self.by_member.get(member).map_or(0, |holding| holding.leases)
    }

    /// What the member holds is to be alone: it gets nothing else.
    pub(crate) fn is_alone(&self, member: &str) -> bool {
        self.by_member.get(member).is_some_and(|holding| holding.alone)
    }

    /// Leases of all members together.
    pub(crate) fn leases(&self) -> u64 {
        self.leases
    }

    /// Those who hold leases.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_member.keys()
    }

    /// The offsets that one member holds on each partition.
    pub(crate) fn offsets_of(&self, member: &str) -> impl Iterator<Item = (PartitionKey, &Offsets)> {
        let offsets = self.by_member.get(member).into_iter().flat_map(|holding| &holding.offsets);
        offsets.map(|(key, offsets)| (*key, offsets))
    }

    /// Bytes of memory, roughly.
    pub(crate) fn memory(&self) -> u64 {
        self.pairs * PARTITION_BYTES + self.leases * OFFSET_BYTES
    }

    /// The member was leased these offsets.
    pub(crate) fn granted(
        &mut self,
        member: &Arc<str>,
        key: PartitionKey,
        offsets: impl Iterator<Item = u64>,
        alone: bool,
    ) {
        let holding = self.by_member.entry(member.clone()).or_default();
        let known = holding.offsets.entry(key).or_insert_with(|| {
            self.pairs += 1;
            Offsets::default()
        });
        let added = known.extend(offsets);
        holding.leases += added;
        self.leases += added;
        holding.alone |= alone;
    }

    /// A lease of the member ended.
    pub(crate) fn ended(&mut self, member: &str, key: &PartitionKey, offset: u64) {
        let Some(holding) = self.by_member.get_mut(member) else { return };
        let Some(offsets) = holding.offsets.get_mut(key) else { return };
        if offsets.remove(offset) {
            holding.leases -= 1;
            self.leases -= 1;
        }
        if offsets.blocks.is_empty() {
            holding.offsets.remove(key);
            self.pairs -= 1;
        }
        if holding.leases == 0 {
            self.by_member.remove(member);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::TopicId;

    #[test]
    fn offsets_are_a_set_in_ascending_order() {
        let mut offsets = Offsets::default();
        let given = [0, 63, 64, 1_000, 1, u64::MAX, 64, 1_000];
        assert_eq!(offsets.extend(given.into_iter()), 6);
        assert_eq!(offsets.iter().collect::<Vec<_>>(), [0, 1, 63, 64, 1_000, u64::MAX]);
        assert_eq!(offsets.extend([2, 63].into_iter()), 1);
        assert!(offsets.remove(u64::MAX) && !offsets.remove(u64::MAX) && !offsets.remove(65));
        assert_eq!(offsets.iter().collect::<Vec<_>>(), [0, 1, 2, 63, 64, 1_000]);
    }

    #[test]
    fn what_has_ended_leaves_nothing_behind() {
        let key = |partition| PartitionKey { topic: TopicId([1; 16]), partition };
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let mut holders = Holders::default();
        holders.granted(&a, key(0), 0..100, false);
        holders.granted(&a, key(1), [7].into_iter(), true);
        holders.granted(&b, key(0), 100..200, false);
        assert_eq!((holders.leases_of("a"), holders.leases_of("b"), holders.leases()), (101, 100, 201));
        assert!(holders.is_alone("a") && !holders.is_alone("b"));
        let of_a: Vec<(PartitionKey, usize)> =
            holders.offsets_of("a").map(|(key, offsets)| (key, offsets.iter().count())).collect();
        assert_eq!(of_a, [(key(0), 100), (key(1), 1)]);
        for offset in 0..200 {
            holders.ended(if offset < 100 { "a" } else { "b" }, &key(0), offset);
        }
        assert_eq!(holders.members().collect::<Vec<_>>(), [&a]);
        holders.ended("a", &key(1), 7);
        assert_eq!((holders.leases(), holders.memory(), holders.members().count()), (0, 0, 0));
    }
}
