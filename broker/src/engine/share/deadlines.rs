//! When the records of one partition must next be looked at: leases that end, scheduled records that are due.
//!
//! Leases of one deadline share a *bucket*: most are settled long before, and then counting is all there is to do. Entries
//! that no longer hold are passed over by the caller, which looks at what each record is now; they are cleared out when
//! they are four times as many as those that hold, of all buckets together. Scheduled records are listed exactly.

use std::collections::{BTreeMap, BTreeSet};

use super::state::ShareState;

/// Entries of leases that need not be cleared out.
const FEW: usize = 1024;

#[derive(Debug, Default)]
struct Bucket {
    live: usize,
    /// At least those that are live.
    offsets: Vec<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    leases: BTreeMap<u64, Bucket>,
    /// Of all buckets: leases that are live, and entries.
    live: usize,
    listed: usize,
    /// (due, offset)
    scheduled: BTreeSet<(u64, u64)>,
    /// When reads of the log that failed are repeated.
    again: BTreeSet<u64>,
}

impl Deadlines {
    pub(crate) fn next(&self) -> Option<u64> {
        let lease = self.leases.first_key_value().map(|(at, _)| *at);
        let due = self.scheduled.first().map(|(at, _)| *at);
        [lease, due, self.again.first().copied()].into_iter().flatten().min()
    }

    /// Bytes of memory, roughly.
    pub(crate) fn memory(&self) -> u64 {
        (self.leases.len() * 64 + self.listed * 16 + self.scheduled.len() * 24) as u64
    }

    /// These records were leased until then.
    pub(crate) fn leased(&mut self, offsets: impl Iterator<Item = u64>, deadline_ms: u64) {
        let bucket = self.leases.entry(deadline_ms).or_default();
        let before = bucket.offsets.len();
        bucket.offsets.extend(offsets);
        let added = bucket.offsets.len() - before;
        bucket.live += added;
        self.live += added;
        self.listed += added;
        if bucket.offsets.is_empty() {
            self.leases.remove(&deadline_ms);
        }
    }

    /// One lease of this deadline ended, or has another deadline now.
    pub(crate) fn lease_ended(&mut self, state: &ShareState, deadline_ms: u64) {
        let Some(bucket) = self.leases.get_mut(&deadline_ms) else { return };
        bucket.live -= 1;
        self.live -= 1;
        if bucket.live == 0 {
            self.listed -= bucket.offsets.len();
            self.leases.remove(&deadline_ms);
        }
        if self.listed > FEW && self.listed / 4 > self.live {
            self.clear_out(state);
        }
    }

    fn clear_out(&mut self, state: &ShareState) {
        self.listed = 0;
        for (deadline_ms, bucket) in &mut self.leases {
            let holds =
                |offset: &u64| state.lease(*offset).is_some_and(|lease| lease.deadline_ms == *deadline_ms);
            bucket.offsets.retain(holds);
            bucket.offsets.sort_unstable();
            bucket.offsets.dedup();
            bucket.offsets.shrink_to_fit();
            self.listed += bucket.offsets.len();
        }
    }

    pub(crate) fn scheduled(&mut self, offset: u64, due_ms: u64) {
        self.scheduled.insert((due_ms, offset));
    }

    /// The record is not scheduled any more, before its time.
    pub(crate) fn unscheduled(&mut self, offset: u64, due_ms: u64) {
        self.scheduled.remove(&(due_ms, offset));
    }

    /// No record is scheduled any more.
    pub(crate) fn none_scheduled(&mut self) {
        self.scheduled.clear();
    }

    /// A read of the log failed and is to be repeated then.
    pub(crate) fn look_again(&mut self, at_ms: u64) {
        self.again.insert(at_ms);
    }

    /// Takes offsets whose time has come, as many as asked for and perhaps some more of one deadline.
    pub(crate) fn take_due(&mut self, now_ms: u64, limit: usize) -> Vec<u64> {
        self.again = self.again.split_off(&(now_ms + 1));
        let mut due = Vec::new();
        while due.len() < limit / 2
            && let Some(&(at, offset)) = self.scheduled.first()
            && at <= now_ms
        {
            self.scheduled.pop_first();
            due.push(offset);
        }
        while due.len() < limit
            && let Some(mut entry) = self.leases.first_entry()
            && *entry.key() <= now_ms
        {
            let bucket = entry.get_mut();
            let rest = bucket.offsets.len().saturating_sub(limit - due.len());
            let taken = bucket.offsets.drain(rest..);
            self.listed -= taken.len();
            due.extend(taken);
            if rest == 0 {
                self.live -= entry.remove().live;
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::Lease;
    use super::*;
    use crate::engine::types::LeaseId;

    #[test]
    fn one_live_lease_in_each_of_many_deadlines_keeps_few_entries_of_the_others() {
        let id = LeaseId { boot_epoch: 1, sequence: 1 };
        let mut state = ShareState::new(0, id);
        let mut deadlines = Deadlines::default();
        let (each, rounds) = (100, 1_000);
        for round in 0..rounds {
            let offsets = round * each..(round + 1) * each;
            for offset in offsets.clone() {
                let lease = Lease {
                    id,
                    member: "m".into(),
                    granted_ms: 0,
                    deadline_ms: 1_000 + round,
                    wall_ms: 0,
                    slot: None,
                    size: 1,
                };
                state.grant(offset, lease);
            }
            deadlines.leased(offsets.clone(), 1_000 + round);
            for offset in offsets.skip(1) {
                deadlines.lease_ended(&state, 1_000 + round);
                state.ack(offset);
            }
            assert!(deadlines.listed <= FEW.max(4 * deadlines.live + 4) + each as usize, "{deadlines:?}");
        }
        assert_eq!(deadlines.live as u64, rounds);
        let due = deadlines.take_due(1_000 + rounds, usize::MAX);
        let live = due.iter().filter(|offset| state.lease(**offset).is_some()).count();
        assert_eq!((live as u64, deadlines.live, deadlines.listed), (rounds, 0, 0));
    }
}
