//! What a settlement does to a record: the reply table, and the one law of retry.
//!
//! Pure decisions over [`ShareState`]; the caller applies what comes out.

use super::state::{Cause, ExceptionState, SettledAs, ShareState, change};
use crate::engine::command::{FailureDetail, LeaseRef, Outcome};
use crate::engine::config::{OnExhausted, ShareConfig};
use crate::engine::effect::{RecordState, SettleResult, SettleStatus};
use crate::engine::event::RecordChange;
use crate::engine::types::Now;

/// Longest class, reason and detail kept of a failure, in bytes; the excess is cut.
const MAX_CLASS_BYTES: usize = 128;
const MAX_REASON_BYTES: usize = 1024;
const MAX_DETAIL_BYTES: usize = 8192;

/// What to do for one settlement.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Nothing changes.
    Answer(SettleStatus),
    Ack {
        late: bool,
    },
    Change(RecordChange),
}

/// Decides one settlement by `member` on a record that exists or existed in this group and partition.
pub(crate) fn decide(
    state: &ShareState,
    config: &ShareConfig,
    on_exhausted: OnExhausted,
    member: &str,
    record: &LeaseRef,
    outcome: &Outcome,
    now: Now,
) -> Decision {
    let offset = record.offset;
    if record.lease < state.fence() {
        return Decision::Answer(SettleStatus::Fenced);
    }
    let Some(lease) = state.lease(offset) else {
        return decide_without_lease(state, member, record, outcome);
    };
    if lease.id != record.lease {
        // Leased again.
        return Decision::Answer(repeated(state, record, outcome).unwrap_or(SettleStatus::Stale));
    }
    if &*lease.member != member {
        return Decision::Answer(SettleStatus::NotOwner);
    }
    match outcome {
        Outcome::Ack => Decision::Ack { late: false },
        Outcome::Release => Decision::Change(release(state, config, on_exhausted, offset)),
        Outcome::Extend { remaining_ms } => {
            let wanted = now.monotonic_ms.saturating_add(remaining_ms.unwrap_or(config.lease_ms));
            let latest = lease.granted_ms.saturating_add(config.max_lease_ms);
            let until_ms = wanted.min(latest).max(lease.deadline_ms);
            Decision::Change(RecordChange { offset, kind: change::EXTENDED, until_ms, ..Default::default() })
        }
        Outcome::Nack { delay_ms, counted, detail } => Decision::Change(failure(
            state,
            config,
            on_exhausted,
            offset,
            Failure { cause: Cause::Nacked, counted: *counted, delay_ms: *delay_ms, detail: Some(detail) },
            now,
        )),
        Outcome::Reject { detail } => Decision::Change(failure(
            state,
            config,
            on_exhausted,
            offset,
            Failure { cause: Cause::Rejected, counted: true, delay_ms: None, detail: Some(detail) },
            now,
        )),
    }
}

/// The answer to a settlement of the last lease that ended on the record, if that is the one named.
fn repeated(state: &ShareState, record: &LeaseRef, outcome: &Outcome) -> Option<SettleStatus> {
    let (lease, settled_as) = state.recent(record.offset)?;
    let asked = asked(outcome);
    (lease == record.lease).then_some(match (settled_as, asked) {
        (SettledAs::Lapsed, _) => SettleStatus::Stale,
        (_, None) => SettleStatus::Gone,
        (_, Some(asked)) if asked == settled_as => SettleStatus::Duplicate,
        (_, Some(_)) => SettleStatus::Conflict,
    })
}

/// `None`: an extension, which settles nothing.
fn asked(outcome: &Outcome) -> Option<SettledAs> {
    match outcome {
        Outcome::Ack => Some(SettledAs::Ack),
        Outcome::Nack { .. } => Some(SettledAs::Nack),
        Outcome::Reject { .. } => Some(SettledAs::Reject),
        Outcome::Release => Some(SettledAs::Release),
        Outcome::Extend { .. } => None,
    }
}

fn decide_without_lease(state: &ShareState, member: &str, record: &LeaseRef, outcome: &Outcome) -> Decision {
    let asked = asked(outcome);
    if let Some(status) = repeated(state, record, outcome) {
        return Decision::Answer(status);
    }
    let Some(exception) = state.exception(record.offset) else {
        let long_settled = state.is_settled(record.offset) && state.recent(record.offset).is_none();
        return Decision::Answer(match asked {
            // Also a lease whose grant was lost with the power: the record will come again.
            _ if !long_settled => SettleStatus::Stale,
            None => SettleStatus::Gone,
            Some(_) => SettleStatus::AlreadySettled,
        });
    };
    if exception.last_lease == record.lease && *exception.member != *member {
        return Decision::Answer(SettleStatus::NotOwner);
    }
    let waiting = matches!(exception.state, ExceptionState::Available | ExceptionState::Scheduled { .. });
    let expired = matches!(exception.cause, Cause::LeaseExpired | Cause::MemberLost);
    if asked == Some(SettledAs::Ack) && waiting && expired && exception.last_lease == record.lease {
        return Decision::Ack { late: true };
    }
    Decision::Answer(SettleStatus::Stale)
}

/// Gives a leased record back without a failure. At the cap of deliveries it ends all the same: a member that dies on it
/// and comes back under its name would otherwise get it again for ever.
pub(crate) fn release(
    state: &ShareState,
    config: &ShareConfig,
    on_exhausted: OnExhausted,
    offset: u64,
) -> RecordChange {
    let (deliveries, _) = state.attempts(offset);
    let kind = if deliveries >= config.max_deliveries { ending(on_exhausted) } else { change::AVAILABLE };
    RecordChange { offset, kind, cause: Cause::Released as u32, ..Default::default() }
}

/// How a record ends that is not tried again.
fn ending(on_exhausted: OnExhausted) -> u32 {
    match on_exhausted {
        OnExhausted::DeadLetter => change::EXHAUSTED,
        OnExhausted::Hold => change::HELD,
        OnExhausted::Discard => change::DISCARDED,
    }
}

/// One failed attempt.
#[derive(Debug)]
pub(crate) struct Failure<'a> {
    pub(crate) cause: Cause,
    pub(crate) counted: bool,
    pub(crate) delay_ms: Option<u64>,
    pub(crate) detail: Option<&'a FailureDetail>,
}

/// The one law for nack, timeout, disconnect and crash: schedule the next attempt, or end the record.
pub(crate) fn failure(
    state: &ShareState,
    config: &ShareConfig,
    on_exhausted: OnExhausted,
    offset: u64,
    failure: Failure<'_>,
    now: Now,
) -> RecordChange {
    let (deliveries, failures) = state.attempts(offset);
    let failures = failures + u32::from(failure.counted);
    let class = failure.detail.map_or("", |detail| detail.class.as_str());
    let ends = failure.cause == Cause::Rejected
        || config.is_non_retryable(class)
        || failures >= config.max_failures
        || deliveries >= config.max_deliveries;
    let (kind, until_ms) = if ends {
        (ending(on_exhausted), 0)
    } else {
        let delay = failure.delay_ms.unwrap_or_else(|| config.backoff_ms(failures, now.entropy ^ offset));
        (change::SCHEDULED, now.monotonic_ms.saturating_add(delay))
    };
    let cut = |text: &str, limit: usize| text[..text.floor_char_boundary(limit)].to_owned();
    let mut change = RecordChange {
        offset,
        kind,
        until_ms,
        failed: failure.counted,
        cause: failure.cause as u32,
        ..Default::default()
    };
    match failure.detail {
        Some(detail) => {
            change.class = cut(&detail.class, MAX_CLASS_BYTES);
            change.reason = cut(&detail.reason, MAX_REASON_BYTES);
            change.detail = cut(&detail.detail, MAX_DETAIL_BYTES);
        }
        None => {
            change.reason = match failure.cause {
                Cause::LeaseExpired => "lease expired",
                Cause::MemberLost => "member lost",
                _ => "",
            }
            .to_owned();
        }
    }
    change
}

/// The answer to a settlement that was carried out.
pub(crate) fn result(status: SettleStatus, change: Option<&RecordChange>, now: Now) -> SettleResult {
    let state = match change.map(|change| change.kind) {
        None => RecordState::Acked,
        Some(change::SCHEDULED) => RecordState::Scheduled,
        Some(change::EXTENDED) => RecordState::Leased,
        // The dead letter follows in a frame of its own; that it will is what was decided.
        Some(change::EXHAUSTED | change::DEAD_LETTERED) => RecordState::DeadLettered,
        Some(change::HELD) => RecordState::Held,
        Some(change::DISCARDED) => RecordState::Discarded,
        Some(_) => RecordState::Available,
    };
    let remaining_ms = change.map_or(0, |change| change.until_ms.saturating_sub(now.monotonic_ms));
    SettleResult { status, state: Some(state), remaining_ms }
}

/// A settlement that changed nothing.
pub(crate) fn unchanged(status: SettleStatus) -> SettleResult {
    SettleResult { status, state: None, remaining_ms: 0 }
}
