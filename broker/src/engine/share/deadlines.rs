//! When the records of one partition must next be looked at: leases that end, scheduled records that are due.
//!
//! Leases of one deadline share a *bucket*: most are settled long before, and then counting is all there is to do. Entries
//! that no longer hold are passed over by the caller, which looks at what each record is now; they are cleared out before
//! they outnumber those that hold.

use std::collections::{BTreeMap, BTreeSet};

use super::state::{ExceptionState, ShareState};

/// Entries that need not be cleared out.
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
    /// Of all buckets.
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
        bucket.live += bucket.offsets.len() - before;
        self.listed += bucket.offsets.len() - before;
        if bucket.offsets.is_empty() {
            self.leases.remove(&deadline_ms);
        }
    }

    /// One lease of this deadline ended, or has another deadline now.
    pub(crate) fn lease_ended(&mut self, state: &ShareState, deadline_ms: u64) {
        let Some(bucket) = self.leases.get_mut(&deadline_ms) else { return };
        bucket.live -= 1;
        let before = bucket.offsets.len();
        if bucket.live == 0 {
            self.leases.remove(&deadline_ms);
            self.listed -= before;
        } else if before > FEW && before / 4 > bucket.live {
            bucket
                .offsets
                .retain(|offset| state.lease(*offset).is_some_and(|lease| lease.deadline_ms == deadline_ms));
            bucket.offsets.sort_unstable();
            bucket.offsets.dedup();
            bucket.offsets.shrink_to_fit();
            self.listed -= before - bucket.offsets.len();
        }
    }

    pub(crate) fn scheduled(&mut self, state: &ShareState, offset: u64, due_ms: u64) {
        self.scheduled.insert((due_ms, offset));
        if self.scheduled.len() > FEW && self.scheduled.len() as u64 / 2 > state.scheduled() {
            let holds = |(due, offset): &(u64, u64)| {
                state.exception(*offset).is_some_and(
                    |exception| matches!(exception.state, ExceptionState::Scheduled { due_ms } if due_ms == *due),
                )
            };
            self.scheduled.retain(holds);
        }
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
                entry.remove();
            }
        }
        due
    }
}
