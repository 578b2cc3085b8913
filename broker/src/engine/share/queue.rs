//! What of a partition may be handed out next in one share group. Derived state: never journaled, rebuilt after a start from
//! [`ShareState`] and by scanning the log upward from `low`.
//!
//! In key-ordered mode the unsettled offsets of a key slot form a chain, and only its head may be ready: see [`Chains`].
//! Records without a key, and all records in unordered mode, are in no chain. There is one reading of the log at a time:
//! upward from `scan_next`, or again of a piece below it whose records the chains had no room for; when both are wanted
//! they take turns.
//!
//! Nothing at or above `scan_next` is ready, so a returned record cannot overtake an older one of its key that the scan has
//! not met yet.

use std::collections::{BTreeSet, VecDeque};

use super::budget::Budget;
use super::chains::{Chains, Known};
use super::deadlines::Deadlines;
use super::state::{ExceptionState, ShareState};
use crate::engine::command::ScannedRecord;
use crate::engine::effect::Unreadable;
use crate::engine::types::Lsn;

/// Scanned but not handed out: below half of it the log is scanned on.
pub(crate) const LOOKAHEAD: usize = 4096;
/// Dead letters of one partition that are being made at a time.
const MAX_LETTERS_IN_FLIGHT: usize = 32;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) offset: u64,
    pub(crate) slot: Option<u16>,
    pub(crate) size: u32,
}

/// A reading of the log that is under way, or wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) from: u64,
    pub(crate) until: u64,
    /// Below `scan_next`, for records that the chains had no room for.
    again: bool,
    /// What it reads has changed since it began.
    stale: bool,
}

#[derive(Debug)]
pub(crate) struct Queue {
    ordered: bool,
    /// Everything below was scanned.
    scan_next: u64,
    reading: Option<Reading>,
    /// The last reading was one of what had been scanned before.
    read_again_last: bool,
    /// After a failed read.
    scan_not_before_ms: u64,
    /// What the last read failed for.
    unreadable: Option<Unreadable>,
    new: VecDeque<Ready>,
    returned: BTreeSet<u64>,
    /// Returned and to be granted alone.
    alone: BTreeSet<u64>,
    chains: Chains,
    /// The group was moved or its order changed in this frame: nothing is handed out before it has reached the commit level.
    barrier: Option<Lsn>,
    deadlines: Deadlines,
    letters: BTreeSet<u64>,
    letters_in_flight: BTreeSet<u64>,
    /// After one could not be read.
    letters_not_before_ms: u64,
    take_returned_next: bool,
    /// Returned records are taken round about, so that no one of them is tried again before the others.
    last_returned: u64,
}

impl Queue {
    /// The queue of a state as it stands, with nothing scanned.
    pub(crate) fn rebuild(state: &ShareState, ordered: bool, budget: &Budget) -> Self {
        let mut queue = Self {
            ordered,
            scan_next: state.low(),
            reading: None,
            read_again_last: false,
            scan_not_before_ms: 0,
            unreadable: None,
            new: VecDeque::new(),
            returned: BTreeSet::new(),
            alone: BTreeSet::new(),
            chains: Chains::new(budget.slot_parked()),
            barrier: None,
            deadlines: Deadlines::default(),
            letters: BTreeSet::new(),
            letters_in_flight: BTreeSet::new(),
            letters_not_before_ms: 0,
            take_returned_next: false,
            last_returned: 0,
        };
        for (&offset, lease) in state.leases() {
            queue.deadlines.leased([offset].into_iter(), lease.deadline_ms);
        }
        for (&offset, exception) in state.exceptions() {
            match exception.state {
                ExceptionState::Scheduled { due_ms } => queue.deadlines.scheduled(offset, due_ms),
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

    /// Records that can be handed out now or as soon as they are scanned, of which there are some up to `end`. In
    /// key-ordered mode nobody knows how many of those may go, so they do not count.
    pub(crate) fn outlook(&self, end: u64) -> usize {
        let unscanned = if self.ordered { 0 } else { end.saturating_sub(self.scan_next) };
        (self.new.len() + self.returned.len())
            .saturating_add(usize::try_from(unscanned).unwrap_or(usize::MAX))
    }

    /// Records known to wait behind an older one of their key: those that are kept.
    pub(crate) fn parked(&self) -> u64 {
        self.chains.parked()
    }

    pub(crate) fn next_timer(&self) -> Option<u64> {
        self.deadlines.next()
    }

    /// Bytes of memory, roughly.
    pub(crate) fn memory(&self) -> u64 {
        let sets = self.returned.len() + self.alone.len() + self.letters.len() + self.letters_in_flight.len();
        let own = sets * 16 + self.new.capacity() * size_of::<Ready>();
        own as u64 + self.chains.memory() + self.deadlines.memory()
    }

    /// What could not be read last, if nothing was read since.
    pub(crate) fn unreadable(&self) -> Option<&Unreadable> {
        self.unreadable.as_ref()
    }

    // ---- Scanning ----

    /// Everything below was scanned.
    pub(crate) fn scan_next(&self) -> u64 {
        self.scan_next
    }

    /// What to read, when it is time to: nothing under way and little left to hand out. New records are looked for below
    /// `end` only.
    pub(crate) fn wants_reading(&mut self, state: &ShareState, end: u64, now_ms: u64) -> Option<Reading> {
        if self.reading.is_some() || self.new.len() >= LOOKAHEAD / 2 || now_ms < self.scan_not_before_ms {
            return None;
        }
        let from = state.next_unsettled(self.scan_next).min(end);
        self.scan_next = self.scan_next.max(from);
        let on = (self.scan_next < end).then_some(Reading {
            from: self.scan_next,
            until: end,
            again: false,
            stale: false,
        });
        let again = self.chains.wants_again();
        let again = again.map(|from| Reading { from, until: self.scan_next, again: true, stale: false });
        if self.read_again_last { on.or(again) } else { again.or(on) }
    }

    /// Settlements after a restart can move `low` past what was not scanned yet: below it only exceptions are unsettled, and
    /// they are known. A scan under way meets them itself.
    pub(crate) fn catch_up(&mut self, state: &ShareState) {
        if self.reading.is_some() || self.scan_next >= state.low() {
            return;
        }
        for (&offset, exception) in state.exceptions().range(self.scan_next..state.low()) {
            self.admit(state, offset, exception.slot, exception.size);
        }
        self.scan_next = state.low();
    }

    pub(crate) fn reading_started(&mut self, reading: Reading) {
        self.reading = Some(reading);
        self.read_again_last = reading.again;
    }

    pub(crate) fn reading_failed(&mut self, from: u64, retry_at_ms: u64, reason: String) {
        if self.reading.is_none_or(|reading| reading.from != from) {
            // The group was moved meanwhile.
            return;
        }
        self.reading = None;
        self.unreadable = Some(Unreadable { offset: from, reason });
        self.scan_not_before_ms = retry_at_ms;
        self.deadlines.look_again(retry_at_ms);
    }

    /// Takes in what a reading from `from` found up to `next`. Answers the ranges (first, count) that hold no record and must be
    /// skipped.
    pub(crate) fn scanned(
        &mut self,
        state: &ShareState,
        from: u64,
        next: u64,
        records: &[ScannedRecord],
    ) -> Vec<(u64, u64)> {
        let mut missing = Vec::new();
        let Some(reading) = self.reading.filter(|reading| reading.from == from) else {
            // The group was moved meanwhile.
            return missing;
        };
        self.reading = None;
        self.unreadable = None;
        if reading.stale {
            return missing;
        }
        if reading.again {
            let unsettled = records.iter().filter(|record| !state.is_settled(record.offset));
            let chained = unsettled.filter_map(|record| {
                record.slot.map(|slot| (slot, Known { offset: record.offset, size: record.size }))
            });
            for slot in self.chains.readmit(from, next, self.scan_next, chained) {
                self.free(state, slot);
            }
            return missing;
        }
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
        self.scan_next = self.scan_next.max(next);
        missing
    }

    /// Records that are neither leased nor listed are gone: settled as of the frame `lsn`.
    pub(crate) fn forget(&mut self, lsn: Lsn, is_gone: impl Fn(u64) -> bool) {
        self.new.retain(|ready| !is_gone(ready.offset));
        self.chains.forget(lsn, is_gone);
    }

    /// The log changes with the frame that is being staged: what a reading under way finds does not count, and the next one
    /// begins after this turn.
    pub(crate) fn read_anew(&mut self, now_ms: u64) {
        if let Some(reading) = &mut self.reading {
            reading.stale = true;
        }
        self.scan_not_before_ms = self.scan_not_before_ms.max(now_ms + 1);
        self.deadlines.look_again(self.scan_not_before_ms);
    }

    /// Takes in one unsettled record.
    fn admit(&mut self, state: &ShareState, offset: u64, slot: Option<u16>, size: u32) {
        match slot.filter(|_| self.ordered) {
            Some(slot) => {
                if self.chains.admit(slot, Known { offset, size }) {
                    self.free(state, slot);
                }
            }
            None => self.make_ready(state, Ready { offset, slot, size }),
        }
    }

    /// The slot may go on, if it has a head.
    fn free(&mut self, state: &ShareState, slot: u16) {
        let Some(head) = self.chains.free_head(slot) else { return };
        self.make_ready(state, Ready { offset: head.offset, slot: Some(slot), size: head.size });
    }

    fn make_ready(&mut self, state: &ShareState, ready: Ready) {
        match state.exception(ready.offset) {
            Some(exception) if exception.state == ExceptionState::Available => {
                let queue = if exception.alone { &mut self.alone } else { &mut self.returned };
                queue.insert(ready.offset);
            }
            Some(_) => {}
            None if state.lease(ready.offset).is_none() => {
                let again = ready.slot.filter(|_| self.ordered).is_some_and(|slot| !self.chains.list(slot));
                if !again {
                    self.new.push_back(ready);
                }
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
        let ready = self.new.pop_front();
        if self.new.is_empty() && self.new.capacity() > LOOKAHEAD {
            self.new = VecDeque::new();
        }
        ready
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

    pub(crate) fn leased(&mut self, offsets: impl Iterator<Item = u64>, deadline_ms: u64) {
        self.deadlines.leased(offsets, deadline_ms);
    }

    pub(crate) fn lease_ended(&mut self, state: &ShareState, deadline_ms: u64) {
        self.deadlines.lease_ended(state, deadline_ms);
    }

    // ---- After an event was applied ----

    /// The record was settled in the frame `lsn`.
    pub(crate) fn settled(&mut self, offset: u64, slot: Option<u16>, lsn: Lsn) {
        // What is new was never leased, and is settled by being handed out first.
        for set in [&mut self.returned, &mut self.alone, &mut self.letters, &mut self.letters_in_flight] {
            if !set.is_empty() {
                set.remove(&offset);
            }
        }
        if let Some(slot) = slot.filter(|_| self.ordered) {
            self.chains.settled(slot, offset, lsn);
        }
    }

    /// Records, ascending, are settled without having been handed out.
    pub(crate) fn take_out(&mut self, offsets: &[u64]) {
        self.new.retain(|ready| offsets.binary_search(&ready.offset).is_err());
    }

    /// The record came back and may be tried again at once.
    pub(crate) fn available(&mut self, state: &ShareState, offset: u64, slot: Option<u16>) {
        if offset >= self.scan_next {
            // The scan will meet it.
            return;
        }
        if slot.filter(|_| self.ordered).is_none_or(|slot| self.chains.may_go(slot, offset)) {
            self.make_ready(state, Ready { offset, slot, size: 0 });
        }
    }

    pub(crate) fn scheduled(&mut self, offset: u64, due_ms: u64) {
        self.deadlines.scheduled(offset, due_ms);
    }

    /// The record is not scheduled any more, before its time.
    pub(crate) fn unscheduled(&mut self, offset: u64, due_ms: u64) {
        self.deadlines.unscheduled(offset, due_ms);
    }

    /// No record is scheduled any more.
    pub(crate) fn none_scheduled(&mut self) {
        self.deadlines.none_scheduled();
    }

    pub(crate) fn exhausted(&mut self, offset: u64) {
        self.letters.insert(offset);
    }

    /// The record is kept in place, perhaps because its dead letter could not be made: there is room for another.
    pub(crate) fn held(&mut self, offset: u64) {
        self.letters.remove(&offset);
        self.letters_in_flight.remove(&offset);
    }

    /// The record could not be read: its dead letter is made later.
    pub(crate) fn letter_failed(&mut self, offset: u64, retry_at_ms: u64) {
        if self.letters_in_flight.remove(&offset) {
            self.letters.insert(offset);
            self.letters_not_before_ms = retry_at_ms;
            self.deadlines.look_again(retry_at_ms);
        }
    }

    /// The next exhausted record whose dead letter may be made now.
    pub(crate) fn next_letter(&mut self, now_ms: u64) -> Option<u64> {
        if self.letters_in_flight.len() >= MAX_LETTERS_IN_FLIGHT || now_ms < self.letters_not_before_ms {
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
        while let Some(slot) = self.chains.next_free(committed) {
            self.free(state, slot);
        }
    }

    pub(crate) fn waits_for_commit(&self) -> bool {
        self.chains.waits_for_commit() || self.barrier.is_some()
    }

    /// Takes the offsets whose time has come; the caller looks at what they are now.
    pub(crate) fn take_due(&mut self, now_ms: u64, limit: usize) -> Vec<u64> {
        self.deadlines.take_due(now_ms, limit)
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
pub(crate) fn push_gap(gaps: &mut Vec<(u64, u64)>, state: &ShareState, from: u64, until: u64) {
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
