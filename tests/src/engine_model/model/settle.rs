//! Settlements: the reply table of share groups, and what each settlement does.

use felucca_broker::engine::command::{FailureDetail, LeaseRef, Outcome};
use felucca_broker::engine::effect::{RecordState, SettleResult, SettleStatus};

use super::share::{Cause, Failure, How, Past, Record, Said, State};
use super::{Model, Moment, Name};

/// Repetitions are told apart for at least so long.
const REMEMBERED_MS: u64 = 10 * 60 * 1000;

pub(crate) fn said(outcome: &Outcome) -> Option<Said> {
    match outcome {
        Outcome::Ack => Some(Said::Ack),
        Outcome::Nack { .. } => Some(Said::Nack),
        Outcome::Reject { .. } => Some(Said::Reject),
        Outcome::Release => Some(Said::Release),
        Outcome::Extend { .. } => None,
    }
}

/// Bytes of what is kept of a failure.
fn kept(detail: &FailureDetail) -> u64 {
    (detail.class.len().min(128) + detail.reason.len().min(1024) + detail.detail.len().min(8192)) as u64
}

/// Who settles what, and what is known of the lease's origin.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    pub(crate) group: &'a str,
    pub(crate) member: &'a Name,
    pub(crate) record: LeaseRef,
    pub(crate) outcome: &'a Outcome,
    /// [`super::share::Part::instance`] under which the lease was granted; `None` for a name that was never given out.
    pub(crate) instance: Option<u64>,
    /// Settlements in frames up to this one need not be remembered.
    pub(crate) forgotten: u64,
}

impl Model {
    /// The answers that are right for this settlement now.
    pub(crate) fn right_answers(&self, at: Moment, attempt: &Attempt<'_>) -> Vec<SettleStatus> {
        use SettleStatus::{AlreadySettled, Conflict, Duplicate, Fenced, Gone, Late, NotOwner, Ok, Stale};
        let LeaseRef { partition, offset, lease } = attempt.record;
        let Some(part) = self.shares[attempt.group].parts.get(&partition) else { return vec![Fenced] };
        let said = said(attempt.outcome);
        let long_ago = if said.is_some() { AlreadySettled } else { Gone };
        match attempt.instance {
            Some(instance) if instance < part.instance => return vec![Fenced],
            // The seek that came before this lease was lost with the power.
            Some(instance) if instance > part.instance => return vec![Fenced, Stale, long_ago],
            _ => {}
        }
        let Some(record) = part.records.get(&offset) else {
            // A record that is not there, or is none of the group's business, counts as done with.
            let log = &self.logs[&partition];
            let is_there = log.entries.contains_key(&offset) && offset >= part.start.max(log.log_start);
            return if is_there { vec![Stale] } else { vec![Stale, long_ago] };
        };
        let mut right = Vec::new();
        if record.lease == lease && record.lease_deadline().is_some() {
            right.push(if record.member == *attempt.member { Ok } else { NotOwner });
            return right;
        }
        let last = record.lease == lease && !record.is_settled();
        let owner = record.lease != lease || record.member == *attempt.member;
        // A lease is known by its last end: one that lapsed may have been acknowledged late.
        let Some(past) = record.past.iter().rev().find(|past| past.lease == lease) else {
            // Never granted, or lost with the power.
            return vec![if record.is_settled() { long_ago } else { Stale }];
        };
        if last && !owner {
            return vec![NotOwner];
        }
        if past.said == Said::Lapsed {
            let waits = matches!(record.state, State::Waiting { .. });
            right.push(if last && waits && said == Some(Said::Ack) { Late } else { Stale });
        } else {
            right.push(match said {
                None => Gone,
                Some(said) if said == past.said => Duplicate,
                Some(_) => Conflict,
            });
        }
        let remembered = past.lsn > attempt.forgotten && at.now_ms < past.at_ms + REMEMBERED_MS;
        // A record that is not settled tells of its last lease itself.
        if !remembered && !last {
            right.push(if record.is_settled() { long_ago } else { Stale });
        }
        right
    }

    /// Carries out a settlement that was answered with `Ok` or `Late`, and checks the rest of the answer.
    pub(crate) fn settled(&mut self, at: Moment, attempt: &Attempt<'_>, result: SettleResult) {
        let LeaseRef { partition, offset, lease } = attempt.record;
        if let Some(said) = said(attempt.outcome) {
            let record = self.record_mut(attempt);
            record.past.push(Past {
                lease,
                member: attempt.member.clone(),
                said,
                at_ms: at.now_ms,
                lsn: at.lsn,
            });
        }
        match attempt.outcome {
            Outcome::Ack => self.acked(at, attempt),
            Outcome::Extend { remaining_ms } => {
                let config = self.shares[attempt.group].config.clone();
                let record = self.record_mut(attempt);
                let State::Leased { granted_ms, deadline_ms, lsn } = record.state else {
                    panic!("extended without a lease: {attempt:?}")
                };
                let wanted = at.now_ms.saturating_add(remaining_ms.unwrap_or(config.lease_ms));
                let until = wanted.min(granted_ms + config.max_lease_ms).max(deadline_ms);
                record.state = State::Leased { granted_ms, deadline_ms: until, lsn };
            }
            Outcome::Release => {
                self.fail(at, attempt.group, partition, offset, Failure::release(true));
            }
            Outcome::Nack { delay_ms, counted, detail } => {
                let class = detail.class.as_str();
                let (delay_ms, counted) = (*delay_ms, *counted);
                let text = kept(detail);
                let failure = Failure { cause: Cause::Nacked, counted, spared: false, delay_ms, class, text };
                self.fail(at, attempt.group, partition, offset, failure);
            }
            Outcome::Reject { detail } => {
                let failure = Failure {
                    cause: Cause::Rejected,
                    counted: true,
                    spared: false,
                    delay_ms: None,
                    class: detail.class.as_str(),
                    text: kept(detail),
                };
                self.fail(at, attempt.group, partition, offset, failure);
            }
        }
        self.check_result(at, attempt, result);
    }

    pub(crate) fn record_mut(&mut self, attempt: &Attempt<'_>) -> &mut Record {
        let share = self.shares.get_mut(attempt.group).expect("a settlement in a known group");
        let part = share.parts.get_mut(&attempt.record.partition).expect("on a known partition");
        part.records.get_mut(&attempt.record.offset).expect("of a record that was handed out")
    }

    fn acked(&mut self, at: Moment, attempt: &Attempt<'_>) {
        self.record_mut(attempt).state = State::Settled { how: How::Acked, lsn: at.lsn, at_ms: at.now_ms };
        let share = self.shares.get_mut(attempt.group).expect("a settlement in a known group");
        let part = share.parts.get_mut(&attempt.record.partition).expect("on a known partition");
        part.counts.acked += 1;
        share.guard.outcome(false, share.config.guard_law(), at.now_ms);
    }

    /// The next state and the due time or deadline that were answered.
    fn check_result(&mut self, at: Moment, attempt: &Attempt<'_>, result: SettleResult) {
        let released = matches!(attempt.outcome, Outcome::Release);
        let record = self.record_mut(attempt);
        let left = |until: u64| until.saturating_sub(at.now_ms);
        let expected = match record.state {
            State::Leased { deadline_ms, .. } => (RecordState::Leased, left(deadline_ms), left(deadline_ms)),
            State::Waiting { .. } if released => (RecordState::Available, 0, 0),
            State::Waiting { from_ms, by_ms } => (RecordState::Scheduled, left(from_ms), left(by_ms)),
            State::Exhausted => (RecordState::DeadLettered, 0, 0),
            State::Held => (RecordState::Held, 0, 0),
            State::Settled { how: How::Acked, .. } => (RecordState::Acked, 0, 0),
            State::Settled { how: How::Discarded, .. } => (RecordState::Discarded, 0, 0),
            State::Settled { how: How::DeadLettered, .. } => (RecordState::DeadLettered, 0, 0),
        };
        let (state, least, most) = expected;
        assert_eq!(result.state, Some(state), "{attempt:?}: {result:?}, expected {:?}", record.state);
        assert!(
            (least..=most).contains(&result.remaining_ms),
            "{attempt:?}: {result:?}, expected {least} to {most} ms"
        );
        if let State::Waiting { from_ms, by_ms } = &mut record.state {
            // The draw is known now.
            *from_ms = at.now_ms.saturating_add(result.remaining_ms);
            *by_ms = *from_ms;
        }
    }

    /// The dead letter of a record was handed in (`built`), or could not be made.
    pub(crate) fn letter_in(&mut self, at: Moment, group: &str, place: Place, built: bool) {
        let (key, offset) = place;
        let share = self.shares.get_mut(group).expect("the group of a dead letter");
        let part = share.parts.get_mut(&key).expect("the partition of a dead letter");
        let record = part.records.get_mut(&offset).expect("the record of a dead letter");
        assert_eq!(record.state, State::Exhausted);
        record.state = if built {
            part.counts.dead_lettered += 1;
            State::Settled { how: How::DeadLettered, lsn: at.lsn, at_ms: at.now_ms }
        } else {
            // The detail says why there is none, in front of what it said.
            record.text += 100;
            State::Held
        };
    }

    /// Whether a dead letter that is handed in now must be taken.
    pub(crate) fn awaits_letter(&self, group: &str, place: Place) -> bool {
        let part = self.shares.get(group).and_then(|share| share.parts.get(&place.0));
        part.and_then(|part| part.records.get(&place.1))
            .is_some_and(|record| record.state == State::Exhausted)
    }

    /// A member that comes back names the leases that it still holds: the others go back.
    pub(crate) fn give_back(&mut self, at: Moment, group: &str, member: &str, held: &[LeaseRef]) {
        for (key, offset, holder, _) in self.leases(group) {
            let share = self.shares.get_mut(group).expect("a known group");
            let record =
                share.parts.get_mut(&key).and_then(|part| part.records.get_mut(&offset)).expect("a lease");
            let kept = held
                .iter()
                .any(|held| (held.partition, held.offset, held.lease) == (key, offset, record.lease));
            if *holder != *member || kept {
                continue;
            }
            let lease = record.lease;
            record.past.push(Past {
                lease,
                member: holder.clone(),
                said: Said::Release,
                at_ms: at.now_ms,
                lsn: at.lsn,
            });
            self.fail(at, group, key, offset, Failure::release(false));
        }
    }
}

/// A record's place.
pub(crate) type Place = (felucca_broker::engine::types::PartitionKey, u64);
