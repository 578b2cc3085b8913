//! A small weighted cache that forgets what was used longest ago.
//!
//! Invariant: the weights of what it holds add up to at most the limit, except that one entry heavier than the whole
//! limit may stand alone (it could not be used otherwise).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: usize,
    used: u64,
}

#[derive(Debug)]
pub(super) struct Lru<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Time of last use → key; times are unique.
    by_use: BTreeMap<u64, K>,
    clock: u64,
    weight: usize,
    limit: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Lru<K, V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), by_use: BTreeMap::new(), clock: 0, weight: 0, limit }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.get_mut(key)?;
        self.clock += 1;
        self.by_use.remove(&entry.used);
        entry.used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(entry.value.clone())
    }

    /// Puts a value in, and returns what had to leave: dropping it (a file, say) is better done outside a lock.
    #[must_use = "drop the evicted values after releasing the lock"]
    pub(super) fn insert(&mut self, key: K, value: V, weight: usize) -> Vec<V> {
        let mut evicted: Vec<V> = self.remove(&key).into_iter().collect();
        while self.weight + weight > self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.weight -= entry.weight;
                evicted.push(entry.value);
            }
        }
        self.clock += 1;
        self.weight += weight;
        self.by_use.insert(self.clock, key);
        self.entries.insert(key, Entry { value, weight, used: self.clock });
        evicted
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.by_use.remove(&entry.used);
        self.weight -= entry.weight;
        Some(entry.value)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_what_was_used_longest_ago() {
        let mut lru = Lru::new(2);
        assert!(lru.insert(1, 'a', 1).is_empty());
        assert!(lru.insert(2, 'b', 1).is_empty());
        assert_eq!(lru.get(&1), Some('a'));
        assert_eq!(lru.insert(3, 'c', 1), ['b']);
        assert_eq!(lru.get(&2), None);
        assert_eq!(lru.get(&1), Some('a'));
        assert_eq!(lru.len(), 2);
    }

    #[test]
    fn an_entry_above_the_limit_stands_alone() {
        let mut lru = Lru::new(10);
        assert!(lru.insert(1, 'a', 5).is_empty());
        assert_eq!(lru.insert(2, 'b', 50), ['a']);
        assert_eq!(lru.get(&2), Some('b'));
        assert_eq!(lru.insert(3, 'c', 1), ['b']);
        assert_eq!(lru.len(), 1);
    }

    #[test]
    fn replacing_a_value_counts_its_weight_once() {
        let mut lru = Lru::new(10);
        assert!(lru.insert(1, 'a', 9).is_empty());
        assert_eq!(lru.insert(1, 'b', 9), ['a']);
        assert!(lru.insert(2, 'c', 1).is_empty());
        assert_eq!(lru.len(), 2);
    }
}
