//! What of a partition may be handed out next in one share group. Derived state: never journaled, rebuilt after a start from
//! [`ShareState`] and by scanning the log upward from `low`.
//!
//! In key-ordered mode the unsettled offsets of a key slot form a *chain*; only its head may be ready, and after the head was
//! settled the next one only when that settlement has reached the group's commit level (rule R5): until then the slot is
//! *blocked*. The others of a chain are *parked*. Records without a key, and all records in unordered mode, are in no chain.
//!
//! Nothing at or above `scan_next` is ready, so a returned record cannot overtake an older one of its key that the scan has
//! not met yet.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::state::{ExceptionState, ShareState};
use crate::engine::command::ScannedRecord;
use crate::engine::types::Lsn;

/// Scanned but not handed out: below half of it the log is scanned on.
pub(crate) const LOOKAHEAD: usize = 4096;
/// Parked offsets at which scanning pauses until some key is freed.
pub(crate) const MAX_PARKED: usize = 1_000_000;
/// Dead letters of one partition that are being made at a time.
const MAX_LETTERS_IN_FLIGHT: usize = 32;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) offset: u64,
    pub(crate) slot: Option<u16>,
    pub(crate) size: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    ordered: bool,
    /// Everything below was scanned.
    scan_next: u64,
    scan_in_flight: bool,
    /// After a failed read.
    scan_not_before_ms: u64,
    new: BTreeMap<u64, (Option<u16>, u32)>,
    returned: BTreeSet<u64>,
    /// Returned and to be granted alone.
    alone: BTreeSet<u64>,
    chains: BTreeMap<u16, BTreeMap<u64, u32>>,
    /// Offsets in chains.
    chained: usize,
    blocked: BTreeMap<u16, Lsn>,
    freed: VecDeque<(Lsn, u16)>,
    /// The group was moved or its order changed in this frame: nothing is handed out before it has reached the commit level.
    barrier: Option<Lsn>,
    /// (time, offset): lease deadlines and due times; an entry that no longer holds is passed over.
    timers: BTreeSet<(u64, u64)>,
    letters: BTreeSet<u64>,
    letters_in_flight: BTreeSet<u64>,
    take_returned_next: bool,
    /// Returned records are taken round about, so that no one of them is tried again before the others.
    last_returned: u64,
}

impl Queue {
    /// The queue of a state as it stands, with nothing scanned.
    pub(crate) fn rebuild(state: &ShareState, ordered: bool) -> Self {
        let mut queue = Self { ordered, scan_next: state.low(), ..Self::default() };
        for (&offset, lease) in state.leases() {
            queue.timers.insert((lease.deadline_ms, offset));
        }
        for (&offset, exception) in state.exceptions() {
            match exception.state {
                ExceptionState::Scheduled { due_ms } => {
                    queue.timers.insert((due_ms, offset));
                }
                ExceptionState::Exhausted => {
                    queue.letters.insert(offset);
                }
                ExceptionState::Available | ExceptionState::Leased | ExceptionState::Held => {}
            }
        }
        // Below `low` only exceptions are unsettled, and the scan begins at `low`.
        for (&offset, exception) in state.exceptions().range(..state.low()) {
            queue.admit(state, offset, exception.slot, exception.size);
        }
        queue
    }

    pub(crate) fn has_ready(&self) -> bool {
        self.barrier.is_none() && (!self.new.is_empty() || !self.returned.is_empty())
    }

    /// Hands out nothing before the frame `lsn` has reached the commit level. In key-ordered mode only: elsewhere no record
    /// depends on another.
    pub(crate) fn wait_for(&mut self, lsn: Lsn) {
        self.barrier = self.ordered.then_some(lsn);
    }

    /// Whether a record waits to be granted alone.
    pub(crate) fn has_alone(&self) -> bool {
        self.barrier.is_none() && !self.alone.is_empty()
    }

    pub(crate) fn ready_len(&self) -> usize {
        self.new.len() + self.returned.len()
    }

    /// Records waiting behind an older one of their key.
    pub(crate) fn parked(&self) -> u64 {
        (self.chained - self.chains.len()) as u64
    }

    pub(crate) fn next_timer(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    // ---- Scanning ----

    /// Where to scan from, when it is time to: nothing in flight and little left to hand out.
    pub(crate) fn wants_scan(&mut self, state: &ShareState, high_watermark: u64, now_ms: u64) -> Option<u64> {
        if self.scan_in_flight
            || self.new.len() >= LOOKAHEAD / 2
            || self.chained >= MAX_PARKED
            || now_ms < self.scan_not_before_ms
        {
            return None;
        }
        let from = state.next_unsettled(self.scan_next).min(high_watermark);
        self.scan_next = self.scan_next.max(from);
        (self.scan_next < high_watermark).then_some(self.scan_next)
    }

    /// Settlements after a restart can move `low` past what was not scanned yet: below it only exceptions are unsettled, and
    /// they are known. A scan in flight meets them itself.
    pub(crate) fn catch_up(&mut self, state: &ShareState) {
        if self.scan_in_flight || self.scan_next >= state.low() {
            return;
        }
        for (&offset, exception) in state.exceptions().range(self.scan_next..state.low()) {
            self.admit(state, offset, exception.slot, exception.size);
        }
        self.scan_next = state.low();
    }

    pub(crate) fn scan_started(&mut self) {
        self.scan_in_flight = true;
    }

    pub(crate) fn scan_failed(&mut self, retry_at_ms: u64) {
        self.scan_in_flight = false;
        self.scan_not_before_ms = retry_at_ms;
        self.timers.insert((retry_at_ms, u64::MAX));
    }

    /// Takes in what a scan found. Returns the ranges (first, count) that hold no record and must be skipped.
    pub(crate) fn scanned(
        &mut self,
        state: &ShareState,
        from: u64,
        next: u64,
        records: &[ScannedRecord],
    ) -> Vec<(u64, u64)> {
        if from != self.scan_next || !self.scan_in_flight {
            // The group was moved meanwhile.
            return Vec::new();
        }
        self.scan_in_flight = false;
        let mut missing = Vec::new();
        let mut expected = from;
        for record in records {
            push_gap(&mut missing, state, expected, record.offset);
            expected = record.offset + 1;
            self.scan_next = expected;
            if !state.is_settled(record.offset) {
                self.admit(state, record.offset, record.slot, record.size);
            }
        }
        push_gap(&mut missing, state, expected, next);
        self.scan_next = next;
        missing
    }

    /// Takes in one unsettled record.
    fn admit(&mut self, state: &ShareState, offset: u64, slot: Option<u16>, size: u32) {
        match slot.filter(|_| self.ordered) {
            Some(slot) => {
                let chain = self.chains.entry(slot).or_default();
                if chain.insert(offset, size).is_none() {
                    self.chained += 1;
                }
                if chain.len() == 1 && !self.blocked.contains_key(&slot) {
                    self.make_ready(state, offset, Some(slot), size);
                }
            }
            None => self.make_ready(state, offset, slot, size),
        }
    }

    fn make_ready(&mut self, state: &ShareState, offset: u64, slot: Option<u16>, size: u32) {
        match state.exception(offset) {
            Some(exception) if exception.state == ExceptionState::Available => {
                let ready = if exception.alone { &mut self.alone } else { &mut self.returned };
                ready.insert(offset);
            }
            Some(_) => {}
            None if state.lease(offset).is_none() => {
                self.new.insert(offset, (slot, size));
            }
            None => {}
        }
    }

    // ---- Handing out ----

    /// Takes one record that may be leased; returned ones and new ones take turns, so that neither starves the other.
    pub(crate) fn take(&mut self, state: &ShareState, allow_new: bool) -> Option<Ready> {
        self.take_returned_next = !self.take_returned_next;
        if self.take_returned_next || self.new.is_empty() || !allow_new {
            while let Some(offset) = pop_after(&mut self.returned, &mut self.last_returned) {
                if let Some(exception) = state.exception(offset)
                    && exception.state == ExceptionState::Available
                {
                    return Some(Ready { offset, slot: exception.slot, size: exception.size });
                }
            }
        }
        if !allow_new {
            return None;
        }
        self.new.pop_first().map(|(offset, (slot, size))| Ready { offset, slot, size })
    }

    /// Takes one record that is to be leased alone.
    pub(crate) fn take_alone(&mut self, state: &ShareState) -> Option<Ready> {
        while let Some(offset) = pop_after(&mut self.alone, &mut self.last_returned) {
            if let Some(exception) = state.exception(offset)
                && exception.state == ExceptionState::Available
            {
                return Some(Ready { offset, slot: exception.slot, size: exception.size });
            }
        }
        None
    }

    pub(crate) fn leased(&mut self, offset: u64, deadline_ms: u64) {
        self.timers.insert((deadline_ms, offset));
    }

    pub(crate) fn lease_ended(&mut self, offset: u64, deadline_ms: u64) {
        self.timers.remove(&(deadline_ms, offset));
    }

    // ---- After an event was applied ----

    /// The record was settled in the frame `lsn`.
    pub(crate) fn settled(&mut self, offset: u64, slot: Option<u16>, lsn: Lsn) {
        self.new.remove(&offset);
        self.returned.remove(&offset);
        self.alone.remove(&offset);
        self.letters.remove(&offset);
        self.letters_in_flight.remove(&offset);
        let Some(slot) = slot.filter(|_| self.ordered) else { return };
        if let Some(chain) = self.chains.get_mut(&slot) {
            if chain.remove(&offset).is_some() {
                self.chained -= 1;
            }
            if chain.is_empty() {
                self.chains.remove(&slot);
            }
        }
        // Also when nothing of the slot was scanned yet, as after a restart: its next record must wait none the less.
        self.blocked.insert(slot, lsn);
        self.freed.push_back((lsn, slot));
    }

    /// The record came back and may be tried again at once.
    pub(crate) fn available(&mut self, state: &ShareState, offset: u64, slot: Option<u16>) {
        if offset >= self.scan_next {
            // The scan will meet it.
            return;
        }
        let head = match slot.filter(|_| self.ordered) {
            Some(slot) => {
                !self.blocked.contains_key(&slot)
                    && self.chains.get(&slot).and_then(|chain| chain.first_key_value()).map(|(head, _)| *head)
                        == Some(offset)
            }
            None => true,
        };
        if head {
            self.make_ready(state, offset, slot, 0);
        }
    }

    pub(crate) fn scheduled(&mut self, offset: u64, due_ms: u64) {
        self.timers.insert((due_ms, offset));
    }

    pub(crate) fn exhausted(&mut self, offset: u64) {
        self.letters.insert(offset);
    }

    /// The record is kept in place, perhaps because its dead letter could not be made: there is room for another.
    pub(crate) fn held(&mut self, offset: u64) {
        self.letters.remove(&offset);
        self.letters_in_flight.remove(&offset);
    }

    /// The next exhausted record whose dead letter may be made now.
    pub(crate) fn next_letter(&mut self) -> Option<u64> {
        if self.letters_in_flight.len() >= MAX_LETTERS_IN_FLIGHT {
            return None;
        }
        let offset = self.letters.pop_first()?;
        self.letters_in_flight.insert(offset);
        Some(offset)
    }

    pub(crate) fn letter_in_flight(&self, offset: u64) -> bool {
        self.letters_in_flight.contains(&offset)
    }

    /// The settlements of frames up to `committed` have reached the group's commit level: their keys are free.
    pub(crate) fn committed(&mut self, state: &ShareState, committed: Lsn) {
        self.barrier = self.barrier.filter(|lsn| *lsn > committed);
        while let Some(&(lsn, slot)) = self.freed.front() {
            if lsn > committed {
                break;
            }
            self.freed.pop_front();
            if self.blocked.get(&slot).is_none_or(|blocking| *blocking > committed) {
                continue;
            }
            self.blocked.remove(&slot);
            let head = self.chains.get(&slot).and_then(|chain| chain.first_key_value());
            if let Some((&offset, &size)) = head {
                self.make_ready(state, offset, Some(slot), size);
            }
        }
    }

    pub(crate) fn waits_for_commit(&self) -> bool {
        !self.freed.is_empty() || self.barrier.is_some()
    }

    /// Takes the offsets whose time has come; the caller looks at what they are now.
    pub(crate) fn take_due(&mut self, now_ms: u64, limit: usize) -> Vec<u64> {
        let mut due = Vec::new();
        while due.len() < limit
            && let Some(&(at, offset)) = self.timers.first()
            && at <= now_ms
        {
            self.timers.pop_first();
            if offset != u64::MAX {
                due.push(offset);
            }
        }
        due
    }
}

/// Takes the first offset above `last`, or else the first of all.
fn pop_after(offsets: &mut BTreeSet<u64>, last: &mut u64) -> Option<u64> {
    let next = offsets.range(last.saturating_add(1)..).next().or_else(|| offsets.first()).copied()?;
    offsets.remove(&next);
    *last = next;
    Some(next)
}

/// Adds `from..until` as (first, count), leaving out offsets that the group knows something of.
fn push_gap(gaps: &mut Vec<(u64, u64)>, state: &ShareState, from: u64, until: u64) {
    let mut first = from.max(state.low());
    while first < until {
        let lease = state.leases().range(first..until).next().map(|(offset, _)| *offset);
        let exception = state.exceptions().range(first..until).next().map(|(offset, _)| *offset);
        let end = [lease, exception].into_iter().flatten().min().unwrap_or(until);
        if end > first {
            gaps.push((first, end - first));
        }
        first = end + 1;
    }
}
