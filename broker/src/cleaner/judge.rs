//! Which records a cleaning keeps.
//!
//! A record is kept when it has no key, when it is the latest of its key, or when a share group has it in hand. A tombstone
//! goes when its time is over and nothing older of its key is left: so a reader that takes less than that time for the log
//! sees every deletion, and no deleted value comes back.

use std::collections::HashSet;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchError, BatchHeader, RecordMeta};

use super::keys::{KeyHash, KeyMap};
use crate::engine::cleaning::{Cleaning, Goal};
use crate::plants::planted;

/// When a tombstone is looked at again that stays only because a share group has something in hand, ms.
const HELD_MS: i64 = 600_000;

#[derive(Debug)]
pub(super) struct Judge {
    cleaning: Cleaning,
    /// Of the records from where the log was clean up to `mapped_until`.
    keys: KeyMap,
    mapped_until: u64,
    /// Keys of which a superseded record is kept, and the first of the records that superseded one.
    held: HashSet<KeyHash>,
    held_until: u64,
    tombstones_due_ms: Option<i64>,
}

/// What becomes of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) header: BatchHeader,
    /// Offsets, ascending.
    pub(super) kept: Vec<u64>,
    pub(super) dropped: Vec<u64>,
    /// From when on the tombstones among them may go, if the batch does not say so yet.
    pub(super) horizon: Option<i64>,
}

impl Verdict {
    pub(super) fn changes(&self) -> bool {
        !self.dropped.is_empty() || self.horizon.is_some()
    }
}

impl Judge {
    pub(super) fn new(cleaning: Cleaning, keys: KeyMap, mapped_until: u64) -> Self {
        Self {
            cleaning,
            keys,
            mapped_until,
            held: HashSet::new(),
            held_until: u64::MAX,
            tombstones_due_ms: None,
        }
    }

    /// Batches must come in order.
    pub(super) fn judge(&mut self, bytes: &Bytes) -> Result<Verdict, BatchError> {
        let opened = batch::scan(bytes)?;
        let header = *opened.header();
        let Goal::Compact { delete_retention_ms, .. } = self.cleaning.goal else {
            return self.survivors(&opened);
        };
        let due_ms = self.cleaning.now_ms.saturating_add_unsigned(delete_retention_ms);
        let horizon = header.delete_horizon();
        let mut verdict = Verdict { header, kept: Vec::new(), dropped: Vec::new(), horizon: None };
        for record in &opened {
            let record = record?;
            if self.keeps(&record, horizon) {
                verdict.kept.push(record.offset);
                if self.is_tombstone(&record) {
                    verdict.horizon = Some(due_ms).filter(|_| horizon.is_none());
                    let held_ms = self.cleaning.now_ms + HELD_MS;
                    let due_ms = horizon.unwrap_or(due_ms);
                    let due_ms = if due_ms <= self.cleaning.now_ms { held_ms } else { due_ms };
                    self.tombstones_due_ms =
                        Some(self.tombstones_due_ms.map_or(due_ms, |first| first.min(due_ms)));
                }
            } else {
                verdict.dropped.push(record.offset);
            }
        }
        Ok(verdict)
    }

    fn survivors(&self, opened: &batch::Scan<'_>) -> Result<Verdict, BatchError> {
        let header = *opened.header();
        let mut verdict = Verdict { header, kept: Vec::new(), dropped: Vec::new(), horizon: None };
        for record in opened {
            let offset = record?.offset;
            let kept = self.cleaning.in_hand.contains(offset);
            (if kept { &mut verdict.kept } else { &mut verdict.dropped }).push(offset);
        }
        Ok(verdict)
    }

    /// A tombstone that this cleaning has looked at.
    fn is_tombstone(&self, record: &RecordMeta<'_>) -> bool {
        record.tombstone && record.key.is_some() && record.offset < self.mapped_until
    }

    fn keeps(&mut self, record: &RecordMeta<'_>, horizon: Option<i64>) -> bool {
        let in_hand = self.cleaning.in_hand.contains(record.offset);
        if record.offset < self.cleaning.log_start {
            return in_hand;
        }
        let Some(key) = record.key.filter(|_| record.offset < self.mapped_until) else { return true };
        let hash = self.keys.hash(key);
        if let Some(latest) = self.keys.latest(hash).filter(|latest| *latest > record.offset) {
            if in_hand {
                self.held.insert(hash);
                self.held_until = self.held_until.min(latest);
            }
            return in_hand;
        }
        let is_over = record.tombstone && horizon.is_some_and(|horizon| horizon <= self.cleaning.now_ms);
        if record.tombstone && planted("drop-tombstones-early") {
            return in_hand;
        }
        !is_over || in_hand || self.held.contains(&hash)
    }

    /// Below it no key has two records, once all batches up to `mapped_until` were judged.
    pub(super) fn cleaned_until(&self) -> u64 {
        self.mapped_until.min(self.held_until)
    }

    /// When the first of the tombstones that were kept may go.
    pub(super) fn tombstones_due_ms(&self) -> Option<i64> {
        self.tombstones_due_ms
    }
}
