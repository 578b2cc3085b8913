//! What a settlement does to a record: the reply table, and the one law of retry.
//!
//! Pure decisions over [`ShareState`]; the caller applies what comes out.

use super::recent::{Recent, SettledAs};
use super::state::{Cause, Ended, ExceptionState, ShareState, change};
use crate::engine::command::{FailureDetail, LeaseRef, Outcome};
use crate::engine::config::{MAX_BACKOFF_MS, OnExhausted, ShareConfig};
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

/// What a settlement is decided on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desk<'a> {
    pub(crate) state: &'a ShareState,
    pub(crate) recent: &'a Recent,
    pub(crate) config: &'a ShareConfig,
    pub(crate) on_exhausted: OnExhausted,
    /// The outage guard is on: failures that may be retried do not count.
    pub(crate) guarded: bool,
    pub(crate) now: Now,
}

/// Decides one settlement by `member` on a record that exists or existed in this group and partition.
pub(crate) fn decide(desk: &Desk<'_>, member: &str, record: &LeaseRef, outcome: &Outcome) -> Decision {
    let offset = record.offset;
    if record.lease < desk.state.fence() {
        return Decision::Answer(SettleStatus::Fenced);
    }
    let lease = match desk.state.lease(offset) {
        Some(lease) if lease.id == record.lease => lease,
        leased_again => return without_lease(desk, member, record, outcome, leased_again.is_some()),
    };
    if &*lease.member != member {
        return Decision::Answer(SettleStatus::NotOwner);
    }
    match outcome {
        Outcome::Ack => Decision::Ack { late: false },
        // As if it had not been handed out, so also without coming nearer to the cap of deliveries.
        Outcome::Release => Decision::Change(RecordChange { spared: true, ..available(offset) }),
        Outcome::Extend { remaining_ms } => {
            let now_ms = desk.now.monotonic_ms;
            let wanted = now_ms.saturating_add(remaining_ms.unwrap_or(desk.config.lease_ms));
            let latest = lease.granted_ms.saturating_add(desk.config.max_lease_ms);
            let until_ms = wanted.min(latest).max(lease.deadline_ms);
            Decision::Change(RecordChange { offset, kind: change::EXTENDED, until_ms, ..Default::default() })
        }
        Outcome::Nack { delay_ms, counted, detail } => {
            let (cause, counted, delay_ms) = (Cause::Nacked, *counted, *delay_ms);
            let attempt = Failure { cause, counted, delay_ms, detail: Some(detail) };
            Decision::Change(failure(desk, offset, attempt))
        }
        Outcome::Reject { detail } => {
            let attempt =
                Failure { cause: Cause::Rejected, counted: true, delay_ms: None, detail: Some(detail) };
            Decision::Change(failure(desk, offset, attempt))
        }
    }
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

/// The answer to a settlement of a lease that is not live.
fn without_lease(
    desk: &Desk<'_>,
    member: &str,
    record: &LeaseRef,
    outcome: &Outcome,
    leased_again: bool,
) -> Decision {
    let asked = asked(outcome);
    let settled = desk.state.is_settled(record.offset);
    let mut ended_as = desk.recent.get(record.lease, desk.now.monotonic_ms);
    if !leased_again
        && let Some(exception) = desk.state.exception(record.offset)
        && exception.last_lease == record.lease
    {
        if *exception.member != *member {
            return Decision::Answer(SettleStatus::NotOwner);
        }
        let waiting = matches!(exception.state, ExceptionState::Available | ExceptionState::Scheduled { .. });
        ended_as = exception.settled_as().or(ended_as);
        if waiting && ended_as == Some(SettledAs::Lapsed) && asked == Some(SettledAs::Ack) {
            return Decision::Ack { late: true };
        }
    }
    Decision::Answer(match (ended_as, asked) {
        (Some(SettledAs::Lapsed), _) => SettleStatus::Stale,
        // That lease was of another record: this one was never acknowledged.
        (Some(SettledAs::Ack), _) if !settled => SettleStatus::Stale,
        (Some(_), None) => SettleStatus::Gone,
        (Some(ended_as), Some(asked)) if asked == ended_as => SettleStatus::Duplicate,
        (Some(_), Some(_)) => SettleStatus::Conflict,
        // Also a lease whose grant was lost with the power: the record will come again.
        (None, _) if !settled => SettleStatus::Stale,
        (None, None) => SettleStatus::Gone,
        (None, Some(_)) => SettleStatus::AlreadySettled,
    })
}

/// Gives a record back that its member came back without, without a failure. At the cap of deliveries it ends all the
/// same: a member that dies on it and comes back under its name would otherwise get it again for ever.
pub(crate) fn forgotten(desk: &Desk<'_>, offset: u64) -> RecordChange {
    if desk.state.capped_deliveries(offset) < desk.config.max_deliveries {
        return available(offset);
    }
    RecordChange { kind: ending(desk.on_exhausted), ended: Ended::MaxDeliveries as u32, ..available(offset) }
}

/// Makes a leased record available again.
fn available(offset: u64) -> RecordChange {
    RecordChange { offset, kind: change::AVAILABLE, cause: Cause::Released as u32, ..Default::default() }
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

impl Failure<'_> {
    /// Nobody settled the lease in time.
    pub(crate) fn lapsed(cause: Cause) -> Self {
        Self { cause, counted: true, delay_ms: None, detail: None }
    }
}

/// The one law for nack, timeout, disconnect and crash: schedule the next attempt, or end the record.
pub(crate) fn failure(desk: &Desk<'_>, offset: u64, failure: Failure<'_>) -> RecordChange {
    let (config, now) = (desk.config, desk.now);
    let (_, failures) = desk.state.attempts(offset);
    let class = failure.detail.map_or("", |detail| detail.class.as_str());
    let fatal = failure.cause == Cause::Rejected || config.is_non_retryable(class);
    let counted = failure.counted && (fatal || !desk.guarded);
    let failures = failures + u32::from(counted);
    // A probe of the outage guard: it fails for a reason that is not the record's.
    let spared = failure.counted && !counted;
    let capped = !spared && desk.state.capped_deliveries(offset) >= config.max_deliveries;
    let law = config.law(class);
    let ended = if fatal {
        Ended::Rejected
    } else if capped {
        Ended::MaxDeliveries
    } else if counted && failures >= law.max_failures {
        match failure.cause {
            Cause::LeaseExpired => Ended::LeaseExpired,
            Cause::MemberLost => Ended::MemberLost,
            _ => Ended::MaxFailures,
        }
    } else {
        Ended::Not
    };
    let (kind, until_ms) = if ended == Ended::Not {
        let asked = failure.delay_ms.map(|delay| delay.min(MAX_BACKOFF_MS));
        let delay = asked.unwrap_or_else(|| config.backoff_ms(law, failures, now.entropy ^ offset));
        (change::SCHEDULED, now.monotonic_ms.saturating_add(delay))
    } else {
        (ending(desk.on_exhausted), 0)
    };
    let mut change = RecordChange {
        offset,
        kind,
        until_ms,
        failed: counted,
        spared,
        cause: failure.cause as u32,
        ended: ended as u32,
        alone: ended == Ended::Not && failures > 0 && u64::from(failures) * 2 >= u64::from(law.max_failures),
        ..Default::default()
    };
    match failure.detail {
        Some(detail) => {
            change.class = cut(&detail.class, MAX_CLASS_BYTES);
            change.reason = cut(&detail.reason, MAX_REASON_BYTES);
            change.detail = cut_detail(&detail.detail);
            if change.reason.is_empty() && fatal && failure.cause != Cause::Rejected {
                change.reason = format!("failures of class {:?} are not retried", change.class);
            }
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

fn cut(text: &str, limit: usize) -> String {
    text[..text.floor_char_boundary(limit)].to_owned()
}

/// As much of a failure's detail as is kept.
pub(crate) fn cut_detail(detail: &str) -> String {
    cut(detail, MAX_DETAIL_BYTES)
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
