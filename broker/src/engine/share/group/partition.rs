//! A share group on one partition: the records' state, the queue derived from it, and what is set for it.
//!
//! Invariant: whatever ends a lease ends it in the state, the queue and the group's ledger alike.

use super::Ledger;
use crate::engine::config::{EngineSettings, OnExhausted, ShareConfig};
use crate::engine::effect::ShareAlarm;
use crate::engine::event::RecordChange;
use crate::engine::share::budget::{Budget, Charge, TRICKLE};
use crate::engine::share::queue::Queue;
use crate::engine::share::recent::SettledAs;
use crate::engine::share::settle::Desk;
use crate::engine::share::state::{Cause, Ended, ExceptionState, ShareState, change};
use crate::engine::stage::Stage;
use crate::engine::types::{Now, PartitionKey};

/// The group on one partition.
#[derive(Debug)]
pub(crate) struct SharePartition {
    key: PartitionKey,
    pub(crate) state: ShareState,
    pub(crate) queue: Queue,
    charge: Charge,
    /// The engine timer that is set for it.
    pub(super) armed: Option<u64>,
    /// The engine tells it of commits.
    pub(super) watched: bool,
}

impl SharePartition {
    pub(super) fn new(key: PartitionKey, state: ShareState, ordered: bool, budget: &Budget) -> Self {
        let queue = Queue::rebuild(&state, ordered, budget);
        let charge = budget.charge();
        let mut partition = Self { key, state, queue, charge, armed: None, watched: false };
        partition.account();
        partition
    }

    /// Whether it has enough to do while the budget is spent.
    pub(super) fn is_over_trickle(&self) -> bool {
        (self.state.leases().len() + self.state.exceptions().len()) as u64 >= TRICKLE
    }

    /// Whether a record is undecided and nobody has leased it.
    pub(crate) fn is_pending(&self, offset: u64) -> bool {
        !self.state.is_settled(offset) && self.state.lease(offset).is_none()
    }

    /// What of it is full, so that nothing new is handed out.
    pub(crate) fn alarms(&self, settings: &EngineSettings) -> Vec<ShareAlarm> {
        let state = &self.state;
        let full = [
            (ShareAlarm::Leases, state.leases().len() as u64 >= settings.max_leases),
            (ShareAlarm::Exceptions, state.exceptions().len() as u64 >= settings.max_exceptions),
            (ShareAlarm::Span, self.queue.scan_next().saturating_sub(state.low()) >= settings.max_span),
            (ShareAlarm::Memory, self.charge.is_spent() && self.is_over_trickle()),
        ];
        full.into_iter().filter(|(_, is_full)| *is_full).map(|(alarm, _)| alarm).collect()
    }

    /// Bytes that it takes, roughly.
    pub(crate) fn memory(&self) -> u64 {
        size_of::<(PartitionKey, Self)>() as u64 + self.state.memory() + self.queue.memory()
    }

    /// Charges the budget with what it takes now.
    pub(super) fn account(&mut self) {
        let bytes = self.memory();
        self.charge.set(bytes);
    }

    /// What a settlement here is decided on.
    pub(super) fn desk<'a>(
        &'a self,
        ledger: &'a Ledger,
        config: &'a ShareConfig,
        on_exhausted: OnExhausted,
        now: Now,
    ) -> Desk<'a> {
        let guarded = ledger.outage.is_on();
        Desk { state: &self.state, recent: &ledger.recent, config, on_exhausted, guarded, now }
    }

    pub(super) fn ack(
        &mut self,
        stage: &mut Stage<'_>,
        ledger: &mut Ledger,
        config: &ShareConfig,
        offset: u64,
    ) {
        let now_ms = stage.now.monotonic_ms;
        let slot = self.end_lease(ledger, offset);
        if let Some(lease) = self.state.ack(offset) {
            ledger.recent.insert(lease, SettledAs::Ack, now_ms);
        }
        ledger.outage.note(false, config, now_ms);
        self.queue.settled(offset, slot, stage.lsn);
    }

    pub(super) fn change(
        &mut self,
        stage: &mut Stage<'_>,
        ledger: &mut Ledger,
        config: &ShareConfig,
        change: &RecordChange,
    ) {
        let (offset, now_ms) = (change.offset, stage.now.monotonic_ms);
        if change.kind == change::EXTENDED {
            if let Some(lease) = self.state.lease(offset) {
                self.queue.lease_ended(&self.state, lease.deadline_ms);
            }
            self.state.change(change);
            self.queue.leased([offset].into_iter(), change.until_ms);
            return;
        }
        let slot = self.end_lease(ledger, offset);
        if let Some((lease, settled_as)) = self.state.change(change) {
            ledger.recent.insert(lease, settled_as, now_ms);
        }
        if is_failed_outcome(change) {
            ledger.outage.note(true, config, now_ms);
        }
        match change.kind {
            change::SCHEDULED => self.queue.scheduled(offset, change.until_ms),
            change::EXHAUSTED => self.queue.exhausted(offset),
            change::HELD => self.queue.held(offset),
            change::AVAILABLE => self.queue.available(&self.state, offset, slot),
            change::DEAD_LETTERED | change::DISCARDED => self.queue.settled(offset, slot, stage.lsn),
            _ => {}
        }
    }

    /// Ends the record's lease, if it has one, for all but the state; answers the record's key slot.
    fn end_lease(&mut self, ledger: &mut Ledger, offset: u64) -> Option<u16> {
        match self.state.lease(offset) {
            Some(lease) => {
                ledger.holders.ended(&lease.member, &self.key, offset);
                ledger.outage.ended(lease.granted_ms);
                self.queue.lease_ended(&self.state, lease.deadline_ms);
                lease.slot
            }
            None => {
                let exception = self.state.exception(offset)?;
                if let ExceptionState::Scheduled { due_ms } = exception.state {
                    self.queue.unscheduled(offset, due_ms);
                }
                exception.slot
            }
        }
    }
}

/// Whether the outage guard counts this as an attempt that failed: see [`crate::engine::share::outage`].
pub(super) fn is_failed_outcome(change: &RecordChange) -> bool {
    let failed =
        matches!(Cause::from_code(change.cause), Cause::Nacked | Cause::LeaseExpired | Cause::MemberLost);
    failed && Ended::from_code(change.ended) != Ended::Rejected
}
