//! Key order within one partition: for each key slot the *chain* of its unsettled offsets, as far as they are kept.
//!
//! ```text
//!   head     parked, ascending          not kept
//!    ●──────●──●───●──────●─────●┄┄┄┄┄○┄┄┄○┄┄┄┄┄┄○┄┄┄┄▶
//!    only this one may be        ▲                      scan_next
//!    ready or leased             resume: read again from here
//! ```
//!
//! The head is the lowest unsettled offset of the slot. After it was settled the next one is the head, and the slot is
//! *blocked* until that settlement has reached the group's commit level (rule R5).
//!
//! What is kept is bounded: per slot, and in total ([`MAX_PARKED`]; when that is reached, every slot may park half as many,
//! and the excess is forgotten). A slot that had no room for a record keeps one offset instead, *resume*:
//! nothing of the slot at or above it is kept, everything below it is. When such a slot runs short (is *hungry*), a piece
//! of the log is read again from there, for all slots whose resume offset lies in that piece.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Bound::{Excluded, Unbounded};

use crate::engine::types::Lsn;

/// Offsets parked in a partition at most. No less than there are slots, so that there is room for one in each.
pub(crate) const MAX_PARKED: usize = 1 << 17;

/// Chains whose memory a partition keeps when none is left.
const IDLE_SLOTS: usize = 1024;

const _: () = assert!(MAX_PARKED > u16::MAX as usize);

/// Spreads slots over a table: slots are a checksum's bits already, and come from a set of 65,536.
#[derive(Debug, Default)]
struct SlotHasher(u64);

impl Hasher for SlotHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u16(u16::from(*byte));
        }
    }

    fn write_u16(&mut self, slot: u16) {
        // Fibonacci hashing: the table looks at the highest and the lowest bits.
        let mixed = (self.0 ^ u64::from(slot)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type BySlot<T> = HashMap<u16, T, BuildHasherDefault<SlotHasher>>;
type Slots = HashSet<u16, BuildHasherDefault<SlotHasher>>;

/// A record as the queue knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) offset: u64,
    pub(crate) size: u32,
}

#[derive(Debug, Default)]
struct Chain {
    head: Option<Known>,
    /// The head was handed to the queue of new records.
    listed: bool,
    parked: VecDeque<Known>,
    resume: Option<u64>,
    blocked: Option<Lsn>,
}

impl Chain {
    fn is_empty(&self) -> bool {
        self.head.is_none() && self.resume.is_none() && self.blocked.is_none()
    }

    fn last(&self) -> Option<u64> {
        self.parked.back().or(self.head.as_ref()).map(|known| known.offset)
    }

    fn is_hungry(&self, room: usize) -> bool {
        self.resume.is_some() && self.parked.len() <= room / 4
    }

    /// The next one is the head, if there is one.
    fn promote(&mut self) {
        self.head = self.parked.pop_front();
        self.listed = false;
        if self.parked.is_empty() && self.parked.capacity() > 4 {
            self.parked = VecDeque::new();
        }
    }
}

#[derive(Debug)]
pub(crate) struct Chains {
    slots: BySlot<Chain>,
    parked: usize,
    /// Offsets that each slot may park, at most and now.
    slot_parked: usize,
    room: usize,
    /// (resume offset, slot) of every slot that has one, and of those of them that run short.
    cut: BTreeSet<(u64, u16)>,
    hungry: BTreeSet<(u64, u16)>,
    /// Where the last reading began.
    last_read: u64,
    freed: VecDeque<(Lsn, u16)>,
}

impl Chains {
    /// Chains that park so many offsets per slot.
    pub(crate) fn new(slot_parked: usize) -> Self {
        Self {
            slots: BySlot::default(),
            parked: 0,
            slot_parked,
            room: slot_parked,
            cut: BTreeSet::new(),
            hungry: BTreeSet::new(),
            last_read: 0,
            freed: VecDeque::new(),
        }
    }

    /// Offsets kept behind an older one of their slot.
    pub(crate) fn parked(&self) -> u64 {
        self.parked as u64
    }

    /// Bytes of memory, roughly.
    pub(crate) fn memory(&self) -> u64 {
        let chains = self.slots.capacity() * (size_of::<(u16, Chain)>() + 1);
        let parked = self.parked * 2 * size_of::<Known>();
        (chains + parked + (self.cut.len() + self.hungry.len()) * 24 + self.freed.len() * 16) as u64
    }

    /// Changes one chain and keeps the sets in step.
    fn update<R>(&mut self, slot: u16, change: impl FnOnce(&mut Chain) -> R) -> R {
        let chain = self.slots.entry(slot).or_default();
        let (resume, parked, hungry) = (chain.resume, chain.parked.len(), chain.is_hungry(self.room));
        let result = change(chain);
        self.parked = self.parked + chain.parked.len() - parked;
        if resume.is_some() || chain.resume.is_some() {
            let is_hungry = chain.is_hungry(self.room);
            if resume != chain.resume {
                self.cut.extend(chain.resume.map(|offset| (offset, slot)));
            }
            if resume != chain.resume || hungry != is_hungry {
                self.hungry.extend(chain.resume.filter(|_| is_hungry).map(|offset| (offset, slot)));
            }
            if let Some(before) = resume {
                if chain.resume != resume {
                    self.cut.remove(&(before, slot));
                }
                if hungry && (chain.resume != resume || !is_hungry) {
                    self.hungry.remove(&(before, slot));
                }
            }
        }
        if chain.is_empty() {
            self.slots.remove(&slot);
        }
        result
    }

    /// Takes in an unsettled record that the scan upward has met. Answers whether it is the head of a slot that is free.
    pub(crate) fn admit(&mut self, slot: u16, known: Known) -> bool {
        let room = self.room;
        let is_head = self.update(slot, |chain| {
            if chain.resume.is_some() || chain.last().is_some_and(|last| last >= known.offset) {
                return false;
            }
            if chain.head.is_none() {
                chain.head = Some(known);
                chain.listed = false;
                return chain.blocked.is_none();
            }
            if chain.parked.len() < room {
                chain.parked.push_back(known);
            } else {
                chain.resume = Some(known.offset);
            }
            false
        });
        self.stay_within_bounds();
        is_head
    }

    /// Where to read again from, when a slot runs short of records that are not kept. Hungry slots take turns.
    pub(crate) fn wants_again(&self) -> Option<u64> {
        let next = self.hungry.range((Excluded((self.last_read, u16::MAX)), Unbounded)).next();
        next.or_else(|| self.hungry.first()).map(|(offset, _)| *offset)
    }

    /// Takes in the unsettled records of `from..next` that were read again; `end` is where the scan upward stands. Answers
    /// the slots that have a new head and are free.
    pub(crate) fn readmit(
        &mut self,
        from: u64,
        next: u64,
        end: u64,
        records: impl Iterator<Item = (u16, Known)>,
    ) -> Vec<u16> {
        self.last_read = from;
        let mut full = Slots::default();
        let mut heads = Vec::new();
        for (slot, known) in records {
            let room = self.room;
            let Some(chain) = self.slots.get_mut(&slot) else { continue };
            let Some(resume) = chain.resume.filter(|resume| *resume >= from) else { continue };
            if known.offset < resume
                || full.contains(&slot)
                || chain.last().is_some_and(|last| last >= known.offset)
            {
                continue;
            }
            if chain.head.is_none() {
                (chain.head, chain.listed) = (Some(known), false);
                if chain.blocked.is_none() {
                    heads.push(slot);
                }
            } else if chain.parked.len() < room {
                chain.parked.push_back(known);
                self.parked += 1;
            } else {
                full.insert(slot);
            }
        }
        let read: Vec<(u64, u16)> = self.cut.range((from, 0)..(next, 0)).copied().collect();
        for (resume, slot) in read {
            self.hungry.remove(&(resume, slot));
            self.update(slot, |chain| {
                chain.resume = if full.contains(&slot) {
                    Some(chain.last().map_or(resume, |last| resume.max(last + 1)))
                } else {
                    (next < end).then_some(next)
                };
            });
        }
        self.stay_within_bounds();
        heads
    }

    /// When all slots together have parked too much, each may park half as many; when there is plenty of room, twice.
    fn stay_within_bounds(&mut self) {
        if self.room < self.slot_parked && self.parked < MAX_PARKED / 8 {
            self.room = (self.room * 2).min(self.slot_parked);
            self.rebuild_hunger();
        }
        while self.parked >= MAX_PARKED {
            self.room = (self.room / 2).max(1);
            let room = self.room;
            let is_long = |chain: &Chain| chain.parked.len() > room;
            let long = self.slots.iter().filter(|(_, chain)| is_long(chain));
            let long: Vec<u16> = long.map(|(slot, _)| *slot).collect();
            for slot in long {
                self.update(slot, |chain| {
                    chain.resume = chain.parked.get(room).map(|known| known.offset).or(chain.resume);
                    chain.parked.truncate(room);
                    chain.parked.shrink_to_fit();
                });
            }
            self.rebuild_hunger();
        }
    }

    /// What is short depends on the room.
    fn rebuild_hunger(&mut self) {
        let (slots, room) = (&self.slots, self.room);
        let hungry = |(_, slot): &&(u64, u16)| slots.get(slot).is_some_and(|chain| chain.is_hungry(room));
        self.hungry = self.cut.iter().filter(hungry).copied().collect();
    }

    /// The record was settled in the frame `lsn`: its slot waits for that, also when nothing of it was met yet, as after a
    /// restart.
    pub(crate) fn settled(&mut self, slot: u16, offset: u64, lsn: Lsn) {
        let newly = self.update(slot, |chain| {
            if chain.head.is_some_and(|head| head.offset == offset) {
                chain.promote();
            } else if let Ok(index) = chain.parked.binary_search_by_key(&offset, |known| known.offset) {
                // Leased before the group was ordered.
                chain.parked.remove(index);
            }
            chain.blocked.replace(lsn) != Some(lsn)
        });
        if newly {
            self.freed.push_back((lsn, slot));
        }
    }

    /// Offsets that are gone count as settled in the frame `lsn`. Those that were not kept here are looked for again all the
    /// same, and not found.
    pub(crate) fn forget(&mut self, lsn: Lsn, is_gone: impl Fn(u64) -> bool) {
        let is_gone = |known: &Known| is_gone(known.offset);
        let hit = |chain: &Chain| chain.head.iter().chain(&chain.parked).any(is_gone);
        let mut hit: Vec<u16> =
            self.slots.iter().filter(|(_, chain)| hit(chain)).map(|(slot, _)| *slot).collect();
        hit.sort_unstable();
        for slot in hit {
            let newly = self.update(slot, |chain| {
                chain.parked.retain(|known| !is_gone(known));
                if chain.head.as_ref().is_some_and(is_gone) {
                    chain.promote();
                    return chain.blocked.replace(lsn) != Some(lsn);
                }
                false
            });
            if newly {
                self.freed.push_back((lsn, slot));
            }
        }
    }

    /// The next slot whose settlements up to `committed` have all reached the commit level.
    pub(crate) fn next_free(&mut self, committed: Lsn) -> Option<u16> {
        while let Some(&(lsn, slot)) = self.freed.front().filter(|(lsn, _)| *lsn <= committed) {
            self.freed.pop_front();
            let is_free = self.slots.get(&slot).is_some_and(|chain| chain.blocked == Some(lsn));
            if is_free {
                self.update(slot, |chain| chain.blocked = None);
                if self.slots.is_empty() && self.slots.capacity() > IDLE_SLOTS {
                    self.slots = BySlot::default();
                }
                return Some(slot);
            }
        }
        None
    }

    pub(crate) fn waits_for_commit(&self) -> bool {
        !self.freed.is_empty()
    }

    /// The record is the head of a slot that is free.
    pub(crate) fn may_go(&self, slot: u16, offset: u64) -> bool {
        self.free_head(slot).is_some_and(|head| head.offset == offset)
    }

    /// The head of the slot, unless the slot is blocked.
    pub(crate) fn free_head(&self, slot: u16) -> Option<Known> {
        self.slots.get(&slot).filter(|chain| chain.blocked.is_none()).and_then(|chain| chain.head)
    }

    /// Notes that the head is handed to the queue of new records. Answers false when it had been.
    pub(crate) fn list(&mut self, slot: u16) -> bool {
        self.slots.get_mut(&slot).is_some_and(|chain| !std::mem::replace(&mut chain.listed, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT_PARKED: usize = 1024;

    fn known(offset: u64) -> Known {
        Known { offset, size: 1 }
    }

    /// Settles the head of a slot and answers what may go next.
    fn next(chains: &mut Chains, slot: u16, lsn: Lsn) -> Option<u64> {
        let head = chains.free_head(slot)?.offset;
        chains.settled(slot, head, lsn);
        assert_eq!(chains.free_head(slot), None, "blocked until the commit");
        assert_eq!(chains.next_free(lsn), Some(slot));
        chains.free_head(slot).map(|head| head.offset)
    }

    #[test]
    fn a_long_chain_keeps_a_bounded_part_of_itself_and_reads_the_rest_again() {
        let mut chains = Chains::new(SLOT_PARKED);
        let end = 10_000;
        assert!(chains.admit(7, known(0)));
        for offset in 1..end {
            assert!(!chains.admit(7, known(offset)));
        }
        assert_eq!(chains.parked(), SLOT_PARKED as u64);
        for expected in 1..end {
            if let Some(from) = chains.wants_again() {
                let until = (from + 4096).min(end);
                chains.readmit(from, until, end, (from..until).map(|offset| (7, known(offset))));
                assert!(chains.parked() <= SLOT_PARKED as u64);
            }
            assert_eq!(next(&mut chains, 7, expected), Some(expected));
        }
        assert_eq!((next(&mut chains, 7, end), chains.parked(), chains.slots.len()), (None, 0, 0));
        assert!(chains.cut.is_empty() && chains.hungry.is_empty());
    }

    #[test]
    fn all_slots_together_are_bounded_and_every_slot_keeps_something() {
        let mut chains = Chains::new(SLOT_PARKED);
        let slots = 1_000;
        let end = 1_000_000;
        for offset in 0..end {
            chains.admit((offset % slots) as u16, known(offset));
            assert!(chains.parked() <= MAX_PARKED as u64);
        }
        assert!(chains.parked() >= MAX_PARKED as u64 / 4, "{}", chains.parked());
        // Every slot goes through all of its records in their order, at different speeds.
        let mut expected: Vec<u64> = (0..slots).collect();
        let (mut lsn, mut done, mut reads) = (0, 0, 0);
        while done < slots {
            for slot in 0..slots {
                let speed = 1 + slot % 7;
                for _ in 0..speed {
                    let Some(head) = chains.free_head(slot as u16) else { continue };
                    lsn += 1;
                    assert_eq!(head.offset, expected[slot as usize]);
                    expected[slot as usize] += slots;
                    done += u64::from(expected[slot as usize] >= end);
                    next(&mut chains, slot as u16, lsn);
                }
            }
            if let Some(from) = chains.wants_again() {
                let until = (from + 4096).min(end);
                let records = (from..until).map(|offset| ((offset % slots) as u16, known(offset)));
                chains.readmit(
                    from,
                    until,
                    end,
                    records.filter(|(slot, known)| known.offset >= expected[*slot as usize]),
                );
                reads += 1;
            }
            assert!(chains.parked() <= MAX_PARKED as u64);
        }
        assert!(chains.slots.is_empty() && chains.cut.is_empty() && chains.hungry.is_empty());
        assert!(reads < 20_000, "{reads}");
    }

    #[test]
    fn what_the_log_lost_is_forgotten_and_the_rest_goes_on() {
        let mut chains = Chains::new(SLOT_PARKED);
        for offset in 0..5_000 {
            chains.admit((offset % 2) as u16, known(offset));
        }
        // Offset 1 was handed out before.
        chains.forget(3, |offset| offset < 4_000 && offset != 1);
        assert_eq!(chains.free_head(1), Some(known(1)));
        assert_eq!(chains.free_head(0), None);
        assert_eq!(chains.next_free(3), Some(0));
        while let Some(from) = chains.wants_again() {
            assert!(from > 1_000);
            chains.readmit(
                from,
                5_000,
                5_000,
                (4_000..5_000).map(|offset| ((offset % 2) as u16, known(offset))),
            );
        }
        assert_eq!(chains.free_head(0), Some(known(4_000)));
        assert_eq!(next(&mut chains, 1, 9), Some(4_001));
    }
}
