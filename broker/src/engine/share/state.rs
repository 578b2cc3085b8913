//! What is known of the records of one partition in one share group: the part that events carry and checkpoints keep.
//!
//! Every offset below the log's end is in exactly one place:
//!
//! ```text
//!            settled            exceptions (scheduled, available again, exhausted, held, leased again)
//!   ───────────┬───────────────────────●──────────●──────────────────────────────
//!              low                                         undecided: not listed, not settled
//! ```
//!
//! - below `low`: settled, unless listed in `exceptions`;
//! - at or above `low`: settled when in the `settled` bitmap, listed in `exceptions`, leased for the first time (in `leases`
//!   only), or never handed out.
//!
//! Invariants: `low` is neither settled nor an exception; an exception in state `Leased` has a lease, any other has none; no
//! settled offset is leased or listed. One stuck record is one exception and never stops `low`.
//!
//! How it is written into events and rows of a checkpoint is in [`rows`].

mod rows;

use std::collections::BTreeMap;
use std::sync::Arc;

use roaring::RoaringTreemap;
pub(crate) use rows::{slot_from_stored, stored_slot};

use super::recent::SettledAs;
use crate::engine::event::{Granted, RecordChange, ShareCounts};
use crate::engine::types::LeaseId;

/// Why a record's last lease ended. The numbers are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    None = 0,
    Nacked = 1,
    Rejected = 2,
    LeaseExpired = 3,
    MemberLost = 4,
    Released = 5,
}

/// Why a record is not tried again. The numbers are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It is.
    Not = 0,
    MaxFailures = 1,
    MaxDeliveries = 2,
    /// By its handler, or with a class that is not retryable.
    Rejected = 3,
    LeaseExpired = 4,
    MemberLost = 5,
}

impl Ended {
    /// The reason in a dead letter.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Not | Self::MaxFailures => "max_failures",
            Self::MaxDeliveries => "max_deliveries",
            Self::Rejected => "rejected",
            Self::LeaseExpired => "lease_expired",
            Self::MemberLost => "member_lost",
        }
    }
}

/// Kinds of [`RecordChange`]. The numbers are persisted; some are also the state of an [`Exception`].
pub(crate) mod change {
    pub(crate) const AVAILABLE: u32 = 1;
    pub(crate) const SCHEDULED: u32 = 2;
    pub(crate) const EXTENDED: u32 = 3;
    pub(crate) const EXHAUSTED: u32 = 4;
    pub(crate) const DEAD_LETTERED: u32 = 5;
    pub(crate) const HELD: u32 = 6;
    pub(crate) const DISCARDED: u32 = 7;
    /// State of a checkpoint row only.
    pub(crate) const LEASED: u32 = 8;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExceptionState {
    Available,
    Scheduled {
        due_ms: u64,
    },
    Leased,
    /// Will be dead-lettered: its dead letter is being made.
    Exhausted,
    Held,
}

/// A record that was handed out and came back.
#[derive(Clone, Debug)]
pub(crate) struct Exception {
    pub(crate) state: ExceptionState,
    pub(crate) deliveries: u32,
    /// Of the deliveries, those that do not count toward the cap.
    pub(crate) spared: u32,
    pub(crate) failures: u32,
    pub(crate) slot: Option<u16>,
    pub(crate) size: u32,
    pub(crate) last_lease: LeaseId,
    pub(crate) member: Arc<str>,
    pub(crate) first_delivery_wall_ms: i64,
    pub(crate) last_delivery_wall_ms: i64,
    pub(crate) cause: Cause,
    pub(crate) ended: Ended,
    /// The next attempt is granted alone.
    pub(crate) alone: bool,
    pub(crate) class: String,
    pub(crate) reason: String,
    pub(crate) detail: String,
}

#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) id: LeaseId,
    pub(crate) member: Arc<str>,
    pub(crate) granted_ms: u64,
    pub(crate) deadline_ms: u64,
    pub(crate) wall_ms: i64,
    pub(crate) slot: Option<u16>,
    pub(crate) size: u32,
}

#[derive(Debug)]
pub(crate) struct ShareState {
    /// First undecided offset.
    low: u64,
    settled: RoaringTreemap,
    settled_len: u64,
    exceptions: BTreeMap<u64, Exception>,
    leases: BTreeMap<u64, Lease>,
    counts: ShareCounts,
    /// Leases named below it are void (the group was moved).
    fence: LeaseId,
    scheduled: u64,
    held: u64,
    exhausted: u64,
    /// Class, reason and detail of all exceptions.
    text_bytes: u64,
}

impl ShareState {
    pub(crate) fn new(start: u64, fence: LeaseId) -> Self {
        Self {
            low: start,
            settled: RoaringTreemap::new(),
            settled_len: 0,
            text_bytes: 0,
            exceptions: BTreeMap::new(),
            leases: BTreeMap::new(),
            counts: ShareCounts::default(),
            fence,
            scheduled: 0,
            held: 0,
            exhausted: 0,
        }
    }

    pub(crate) fn low(&self) -> u64 {
        self.low
    }

    pub(crate) fn counts(&self) -> &ShareCounts {
        &self.counts
    }

    pub(crate) fn fence(&self) -> LeaseId {
        self.fence
    }

    pub(crate) fn scheduled(&self) -> u64 {
        self.scheduled
    }

    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// Records whose dead letter is being made.
    pub(crate) fn exhausted(&self) -> u64 {
        self.exhausted
    }

    pub(crate) fn leases(&self) -> &BTreeMap<u64, Lease> {
        &self.leases
    }

    pub(crate) fn exceptions(&self) -> &BTreeMap<u64, Exception> {
        &self.exceptions
    }

    /// Bytes of memory, roughly: a tree's nodes are half full when it is filled in order, and a bitmap takes at most two bytes for an offset and a
    /// bit for each between the first and the last. A lease counts as what it becomes when it fails, so that failures never
    /// take more than was there.
    pub(crate) fn memory(&self) -> u64 {
        let leases = self.leases.len() * (size_of::<(u64, Exception)>() * 2);
        let exceptions = self.exceptions.len() * (size_of::<(u64, Exception)>() * 2);
        let span = self.settled.max().map_or(0, |last| last - self.low);
        let settled = (2 * self.settled_len).min(span / 8) + (span >> 16) * 32;
        (leases + exceptions) as u64 + self.text_bytes + settled
    }

    pub(crate) fn lease(&self, offset: u64) -> Option<&Lease> {
        self.leases.get(&offset)
    }

    pub(crate) fn exception(&self, offset: u64) -> Option<&Exception> {
        self.exceptions.get(&offset)
    }

    pub(crate) fn is_settled(&self, offset: u64) -> bool {
        if offset < self.low { !self.exceptions.contains_key(&offset) } else { self.settled.contains(offset) }
    }

    /// Whether every offset in `from..until`, at or above `low`, is settled.
    pub(crate) fn is_all_settled(&self, from: u64, until: u64) -> bool {
        self.settled.contains_range(from..until)
    }

    /// Whether a record in `from..until` is in somebody's hands, or came back and is still to be decided on.
    pub(crate) fn has_in_hand(&self, from: u64, until: u64) -> bool {
        self.leases.range(from..until).next().is_some() || self.exceptions.range(from..until).next().is_some()
    }

    /// The offsets in `from..until` of such records, not in order.
    pub(crate) fn in_hand(&self, from: u64, until: u64) -> impl Iterator<Item = u64> {
        let leases = self.leases.range(from..until).map(|(offset, _)| *offset);
        leases.chain(self.exceptions.range(from..until).map(|(offset, _)| *offset))
    }

    /// Those of `offsets` below `until` that are not decided yet.
    pub(crate) fn undecided(&self, offsets: &RoaringTreemap, until: u64) -> RoaringTreemap {
        let mut undecided = offsets - &self.settled;
        undecided.remove_range(..self.low);
        undecided.remove_range(until..);
        undecided
    }

    /// First offset at or after `from` (and `low`) that is not settled.
    pub(crate) fn next_unsettled(&self, from: u64) -> u64 {
        first_absent(&self.settled, from.max(self.low))
    }

    /// Records in `low..end` that are not settled, and the exceptions below `low`.
    pub(crate) fn unsettled(&self, end: u64) -> u64 {
        let below = self.exceptions.range(..self.low).count() as u64;
        end.saturating_sub(self.low).saturating_sub(self.settled_len) + below
    }

    /// The oldest record that is not settled, below `end`.
    pub(crate) fn oldest_unsettled(&self, end: u64) -> Option<u64> {
        let exception = self.exceptions.keys().next().copied();
        let undecided = (self.low < end).then_some(self.low);
        [exception, undecided].into_iter().flatten().min()
    }

    /// First offset of which nothing is known: never beyond the end of the partition.
    pub(crate) fn known_end(&self) -> u64 {
        let settled = self.settled.max();
        let listed = self.exceptions.keys().next_back().copied();
        let leased = self.leases.keys().next_back().copied();
        let last = [settled, listed, leased].into_iter().flatten().max();
        last.map_or(0, |last| last + 1).max(self.low)
    }

    /// Deliveries and failures so far of an offset.
    pub(crate) fn attempts(&self, offset: u64) -> (u32, u32) {
        match self.exceptions.get(&offset) {
            Some(exception) => (exception.deliveries, exception.failures),
            None => (u32::from(self.leases.contains_key(&offset)), 0),
        }
    }

    /// Deliveries so far that count toward the cap.
    pub(crate) fn capped_deliveries(&self, offset: u64) -> u32 {
        let spared = self.exceptions.get(&offset).map_or(0, |exception| exception.spared);
        self.attempts(offset).0.saturating_sub(spared)
    }

    // ---- The fold ----

    pub(crate) fn grant(&mut self, offset: u64, lease: Lease) {
        self.counts.deliveries += 1;
        if let Some(exception) = self.exceptions.get_mut(&offset) {
            if matches!(exception.state, ExceptionState::Scheduled { .. }) {
                self.scheduled -= 1;
            }
            exception.state = ExceptionState::Leased;
            exception.deliveries += 1;
            exception.last_lease = lease.id;
            exception.member = lease.member.clone();
            exception.last_delivery_wall_ms = lease.wall_ms;
        }
        self.leases.insert(offset, lease);
    }

    pub(crate) fn apply_granted(&mut self, event: &Granted) {
        let member: Arc<str> = event.member.as_str().into();
        let mut offset = 0;
        for (i, delta) in event.offset_deltas.iter().enumerate() {
            offset += delta;
            let lease = Lease {
                id: LeaseId { boot_epoch: event.boot_epoch, sequence: event.first_sequence + i as u64 },
                member: member.clone(),
                granted_ms: event.granted_ms,
                deadline_ms: event.deadline_ms,
                wall_ms: event.wall_ms,
                slot: event.slots.get(i).copied().and_then(slot_from_stored),
                size: event.sizes.get(i).copied().unwrap_or(0),
            };
            self.grant(offset, lease);
        }
    }

    /// Answers the lease by which it was acknowledged.
    pub(crate) fn ack(&mut self, offset: u64) -> Option<LeaseId> {
        let lease = self.leases.remove(&offset).map(|lease| lease.id);
        let exception = if self.exceptions.is_empty() { None } else { self.remove_exception(offset) };
        self.counts.acked += 1;
        self.settle(offset);
        lease.or(exception.map(|exception| exception.last_lease))
    }

    /// Answers the lease that it ended, and how.
    pub(crate) fn change(&mut self, change: &RecordChange) -> Option<(LeaseId, SettledAs)> {
        let offset = change.offset;
        if change.kind == change::EXTENDED {
            if let Some(lease) = self.leases.get_mut(&offset) {
                lease.deadline_ms = change.until_ms;
            }
            return None;
        }
        let lease = self.leases.remove(&offset);
        let mut exception = match (self.remove_exception(offset), &lease) {
            (Some(exception), _) => exception,
            (None, Some(lease)) => Exception {
                state: ExceptionState::Leased,
                deliveries: 1,
                spared: 0,
                failures: 0,
                slot: lease.slot,
                size: lease.size,
                last_lease: lease.id,
                member: lease.member.clone(),
                first_delivery_wall_ms: lease.wall_ms,
                last_delivery_wall_ms: lease.wall_ms,
                cause: Cause::None,
                ended: Ended::Not,
                alone: false,
                class: String::new(),
                reason: String::new(),
                detail: String::new(),
            },
            // Nothing known of the record: the event is not of this state (never staged so).
            (None, None) => return None,
        };
        exception.spared += u32::from(change.spared);
        if change.failed {
            exception.failures += 1;
            self.counts.failures += 1;
        }
        let mut ended = None;
        if change.cause != Cause::None as u32 {
            exception.cause = Cause::from_code(change.cause);
            exception.ended = Ended::from_code(change.ended);
            // A release tells nothing of the record.
            if exception.cause != Cause::Released {
                exception.alone = change.alone;
            }
            exception.class.clone_from(&change.class);
            exception.reason.clone_from(&change.reason);
            exception.detail.clone_from(&change.detail);
            ended = exception.settled_as().map(|settled_as| (exception.last_lease, settled_as));
        } else if !change.detail.is_empty() {
            exception.detail.clone_from(&change.detail);
        }
        if change.fresh {
            exception.failures = 0;
            exception.spared = exception.deliveries;
            exception.ended = Ended::Not;
            exception.alone = false;
        }
        match change.kind {
            change::DEAD_LETTERED => {
                self.counts.dead_lettered += 1;
                self.settle(offset);
                return ended;
            }
            change::DISCARDED => {
                self.counts.discarded += 1;
                self.settle(offset);
                return ended;
            }
            change::SCHEDULED => {
                self.scheduled += 1;
                exception.state = ExceptionState::Scheduled { due_ms: change.until_ms };
            }
            change::EXHAUSTED => {
                self.exhausted += 1;
                exception.state = ExceptionState::Exhausted;
            }
            change::HELD => {
                self.held += 1;
                exception.state = ExceptionState::Held;
            }
            _ => exception.state = ExceptionState::Available,
        }
        self.text_bytes += exception.text_bytes();
        self.exceptions.insert(offset, exception);
        self.advance_low();
        ended
    }

    /// Every scheduled record is due now. Answers them.
    pub(crate) fn kick(&mut self) -> Vec<u64> {
        let mut kicked = Vec::new();
        for (offset, exception) in &mut self.exceptions {
            if matches!(exception.state, ExceptionState::Scheduled { .. }) {
                exception.state = ExceptionState::Available;
                kicked.push(*offset);
            }
        }
        self.scheduled = 0;
        kicked
    }

    /// A scheduled record is due. Derived from its due time, so it is no event.
    pub(crate) fn due(&mut self, offset: u64) {
        if let Some(exception) = self.exceptions.get_mut(&offset)
            && matches!(exception.state, ExceptionState::Scheduled { .. })
        {
            exception.state = ExceptionState::Available;
            self.scheduled -= 1;
        }
    }

    fn remove_exception(&mut self, offset: u64) -> Option<Exception> {
        let exception = self.exceptions.remove(&offset)?;
        self.text_bytes -= exception.text_bytes();
        match exception.state {
            ExceptionState::Scheduled { .. } => self.scheduled -= 1,
            ExceptionState::Held => self.held -= 1,
            ExceptionState::Exhausted => self.exhausted -= 1,
            ExceptionState::Available | ExceptionState::Leased => {}
        }
        Some(exception)
    }

    /// Settles offsets that hold no record; none of them is leased or listed. `expired`: they held one that nobody was given.
    pub(crate) fn skip(&mut self, first: u64, end: u64, expired: bool) {
        let count = if first <= self.low {
            let known = self.settled.remove_range(self.low..end);
            let count = end.saturating_sub(self.low) - known;
            self.settled_len -= known;
            self.low = self.low.max(end);
            count
        } else {
            let count = self.settled.insert_range(first..end);
            self.settled_len += count;
            count
        };
        *(if expired { &mut self.counts.expired } else { &mut self.counts.skipped }) += count;
        self.advance_low();
    }

    fn settle(&mut self, offset: u64) {
        if offset == self.low {
            self.low += 1;
            self.advance_low();
        } else if offset > self.low {
            self.settled_len += u64::from(self.settled.insert(offset));
        }
    }

    fn advance_low(&mut self) {
        loop {
            if self.settled_len > 0 {
                let free = first_absent(&self.settled, self.low);
                self.settled_len -= self.settled.remove_range(self.low..free);
                self.low = free;
            }
            if !self.exceptions.contains_key(&self.low) {
                break;
            }
            self.low += 1;
        }
    }
}

/// The first offset at or after `from` that is not in the set. Gaps in the log make runs of millions, so the steps double.
fn first_absent(set: &RoaringTreemap, from: u64) -> u64 {
    if !set.contains(from) {
        return from;
    }
    // Everything in `from..=inside` is in the set, something in `inside..=inside + step` is not once the first loop ends.
    let (mut inside, mut step) = (from, 1_u64);
    while set.contains_range(inside..=inside + step) {
        inside += step;
        step *= 2;
    }
    while step > 1 {
        step /= 2;
        if set.contains_range(inside..=inside + step) {
            inside += step;
        }
    }
    inside + 1
}

impl Exception {
    fn text_bytes(&self) -> u64 {
        (self.class.len() + self.reason.len() + self.detail.len()) as u64
    }

    /// How its last lease ended, once it has.
    pub(crate) fn settled_as(&self) -> Option<SettledAs> {
        match self.cause {
            Cause::Nacked => Some(SettledAs::Nack),
            Cause::Rejected => Some(SettledAs::Reject),
            Cause::Released => Some(SettledAs::Release),
            Cause::LeaseExpired | Cause::MemberLost => Some(SettledAs::Lapsed),
            Cause::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_run_is_found_wherever_it_is() {
        for length in (0..70).chain([65_535, 65_536, 65_537, 1 << 24]) {
            let mut set = RoaringTreemap::new();
            set.insert_range(1_000..1_000 + length);
            set.insert_range(1_001 + length..1_100 + length);
            assert_eq!(first_absent(&set, 1_000), 1_000 + length);
        }
    }
}
