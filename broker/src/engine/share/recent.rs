//! How leases ended, remembered to answer repetitions: at least the last million of a group, for ten minutes.
//!
//! A lease is one bit in the set of those that ended the same way; names of leases are dense, so a million of them take
//! some hundred kilobytes, at the worst two bytes each. Sets are kept in generations of a minute or a tenth of the number,
//! and whole generations are forgotten. Not checkpointed: after a restart what replay has not seen again counts as long
//! settled, unless the record itself still tells.

use std::collections::{BTreeMap, VecDeque};

use roaring::RoaringTreemap;

use crate::engine::types::LeaseId;

/// Remembered so long, in milliseconds.
pub(crate) const RECENT_AGE_MS: u64 = 10 * 60 * 1000;
/// Remembered of one group at least; at most a tenth more.
pub(crate) const RECENT_COUNT: u64 = 1_000_000;
const GENERATIONS: u64 = 10;

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SettledAs {
    Ack,
    Nack,
    Reject,
    Release,
    /// Its holder did not settle it in time.
    Lapsed,
}

impl SettledAs {
    const ALL: [Self; 5] = [Self::Ack, Self::Nack, Self::Reject, Self::Release, Self::Lapsed];
}

#[derive(Debug)]
struct Generation {
    began_ms: u64,
    last_ms: u64,
    count: u64,
    /// By boot epoch: sequences, in the order of [`SettledAs::ALL`].
    ends: BTreeMap<u64, [RoaringTreemap; SettledAs::ALL.len()]>,
}

/// The last ends of leases of one group.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    generations: VecDeque<Generation>,
    count: u64,
}

impl Recent {
    /// The lease ended now. Of a lease that lapsed and was settled late, the settlement counts.
    pub(crate) fn insert(&mut self, lease: LeaseId, settled_as: SettledAs, now_ms: u64) {
        let fits = |last: &Generation| {
            last.count < RECENT_COUNT / GENERATIONS && now_ms < last.began_ms + RECENT_AGE_MS / GENERATIONS
        };
        if !self.generations.back().is_some_and(fits) {
            self.forget(now_ms);
            let ends = BTreeMap::new();
            self.generations.push_back(Generation { began_ms: now_ms, last_ms: now_ms, count: 0, ends });
        }
        let Some(last) = self.generations.back_mut() else { return };
        last.last_ms = now_ms;
        last.count += 1;
        self.count += 1;
        last.ends.entry(lease.boot_epoch).or_default()[settled_as as usize].insert(lease.sequence);
    }

    /// When the oldest of them may be forgotten, in milliseconds of uptime.
    pub(crate) fn forget_at(&self) -> Option<u64> {
        self.generations.front().map(|oldest| oldest.last_ms + RECENT_AGE_MS)
    }

    /// Bytes of memory, at the worst.
    pub(crate) fn memory(&self) -> u64 {
        2 * self.count + 512 * self.generations.len() as u64
    }

    /// Forgets the oldest of them before their time, as long as a tenth of the usual number is left.
    pub(crate) fn forget_some(&mut self) {
        if let Some(oldest) = self.generations.front()
            && self.count - oldest.count >= RECENT_COUNT / GENERATIONS
        {
            self.count -= oldest.count;
            self.generations.pop_front();
        }
    }

    /// Forgets what is too old.
    pub(crate) fn forget(&mut self, now_ms: u64) {
        while let Some(oldest) = self.generations.front()
            && (oldest.last_ms + RECENT_AGE_MS <= now_ms || self.count - oldest.count >= RECENT_COUNT)
        {
            self.count -= oldest.count;
            self.generations.pop_front();
        }
    }

    /// How the lease ended, if that is remembered at this time.
    pub(crate) fn get(&self, lease: LeaseId, now_ms: u64) -> Option<SettledAs> {
        let known = self.generations.iter().rev().filter(|known| known.last_ms + RECENT_AGE_MS > now_ms);
        known.filter_map(|known| known.ends.get(&lease.boot_epoch)).find_map(|ends| {
            SettledAs::ALL.into_iter().find(|settled_as| ends[*settled_as as usize].contains(lease.sequence))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(sequence: u64) -> LeaseId {
        LeaseId { boot_epoch: 3, sequence }
    }

    #[test]
    fn a_million_ends_are_remembered_and_little_more() {
        let mut recent = Recent::default();
        let all = 2 * RECENT_COUNT;
        for sequence in 0..all {
            recent.insert(lease(sequence), SettledAs::Ack, 5);
        }
        assert_eq!(recent.get(lease(all - RECENT_COUNT), 5), Some(SettledAs::Ack));
        assert_eq!(recent.get(lease(all - RECENT_COUNT - RECENT_COUNT / GENERATIONS - 1), 5), None);
        let sets = recent.generations.iter().flat_map(|known| known.ends.values().flatten());
        let bytes: usize = sets.map(RoaringTreemap::serialized_size).sum();
        assert!(bytes < 2 << 20, "{bytes} bytes");
    }

    #[test]
    fn an_end_is_forgotten_after_ten_minutes() {
        let mut recent = Recent::default();
        recent.insert(lease(1), SettledAs::Nack, 1_000);
        assert_eq!(recent.get(lease(1), 1_000 + RECENT_AGE_MS - 1), Some(SettledAs::Nack));
        assert_eq!(recent.get(lease(1), 1_000 + RECENT_AGE_MS), None);
    }

    #[test]
    fn a_late_settlement_counts_more_than_the_lapse() {
        let mut recent = Recent::default();
        recent.insert(lease(1), SettledAs::Lapsed, 1_000);
        recent.insert(lease(1), SettledAs::Ack, 2_000);
        assert_eq!(recent.get(lease(1), 2_000), Some(SettledAs::Ack));
    }
}
