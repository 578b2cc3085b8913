//! The latest offset of each key, in memory of a fixed size.
//!
//! Keys are told apart by 128 bits of keyed hash, whose secret is drawn anew for each map: nobody can choose keys that pass
//! for each other, and by chance two of a billion keys do so once in 10^20 maps. Open addressing, linear probing, filled to
//! nine tenths at most; nothing is ever removed.

use std::hash::{BuildHasher, RandomState};

/// Names a key within one map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct KeyHash {
    high: u64,
    low: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    hash: KeyHash,
    /// Offset + 1; 0 = free.
    latest: u64,
}

#[derive(Debug)]
pub(super) struct KeyMap {
    secrets: [RandomState; 2],
    slots: Vec<Slot>,
    len: usize,
    limit: usize,
}

impl KeyMap {
    /// A map of about `bytes`.
    pub(super) fn with_bytes(bytes: u64) -> Self {
        let slots = usize::try_from(bytes).unwrap_or(usize::MAX) / size_of::<Slot>();
        let slots = slots.max(16);
        let free = Slot { hash: KeyHash { high: 0, low: 0 }, latest: 0 };
        Self {
            secrets: [RandomState::new(), RandomState::new()],
            slots: vec![free; slots],
            len: 0,
            limit: slots / 10 * 9,
        }
    }

    pub(super) fn hash(&self, key: &[u8]) -> KeyHash {
        let [high, low] = &self.secrets;
        KeyHash { high: high.hash_one(key), low: low.hash_one(key) }
    }

    /// The slot that holds the hash, or where it would go.
    fn find(&self, hash: KeyHash) -> usize {
        // A fair share of all slots, without a division.
        let mut at = ((u128::from(hash.low) * self.slots.len() as u128) >> 64) as usize;
        while self.slots[at].latest != 0 && self.slots[at].hash != hash {
            at = if at + 1 == self.slots.len() { 0 } else { at + 1 };
        }
        at
    }

    /// Notes a key at an offset above all before; false when there is no room for another key.
    pub(super) fn insert(&mut self, hash: KeyHash, offset: u64) -> bool {
        let at = self.find(hash);
        if self.slots[at].latest == 0 {
            if self.len == self.limit {
                return false;
            }
            self.len += 1;
        }
        self.slots[at] = Slot { hash, latest: offset + 1 };
        true
    }

    /// Where the key was last.
    pub(super) fn latest(&self, hash: KeyHash) -> Option<u64> {
        self.slots[self.find(hash)].latest.checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_latest_offset_of_each_key_is_known_until_the_map_is_full() {
        let mut map = KeyMap::with_bytes(24 * 1_000);
        let mut reference = HashMap::new();
        let mut offset = 0;
        let mut state = 1_u64;
        let refused = loop {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = (state >> 40) % 1_500;
            let hash = map.hash(&key.to_be_bytes());
            if !map.insert(hash, offset) {
                break key;
            }
            reference.insert(key, offset);
            offset += 1;
        };
        assert_eq!((map.len, reference.len()), (900, 900));
        assert!(!reference.contains_key(&refused));
        for key in 0..1_500_u64 {
            let hash = map.hash(&key.to_be_bytes());
            assert_eq!(map.latest(hash), reference.get(&key).copied());
        }
        // Known keys still move.
        let (known, _) = reference.iter().next().unwrap();
        let hash = map.hash(&known.to_be_bytes());
        assert!(map.insert(hash, offset));
        assert_eq!(map.latest(hash), Some(offset));
    }
}
