//! The reply table, row by row: what ack, nack, reject, release and extend of a lease are answered.

use crate::engine::command::{Command, FailureDetail, LeaseRef, Outcome, SeekTo, Settlement};
use crate::engine::effect::{RecordState, Reply, SettleStatus};
use crate::engine::share::recent::RECENT_AGE_MS;
use crate::engine::testing::{Bench, EXTEND, leased, nack, reject};
use crate::engine::types::{LeaseId, Level, PartitionKey, TopicId};

use SettleStatus::{AlreadySettled, Conflict, Duplicate, Fenced, Gone, Late, NotOwner, Ok, Stale};

/// The columns of the table.
fn outcomes() -> [(&'static str, Outcome); 5] {
    [
        ("ack", Outcome::Ack),
        ("nack", nack()),
        ("reject", reject()),
        ("release", Outcome::Release),
        ("extend", EXTEND),
    ]
}

/// A row: in the situation that `make` makes anew each time, `member` is answered `expected` for each column.
fn row(make: impl Fn() -> (Bench, LeaseRef), member: &str, expected: [SettleStatus; 5]) {
    for ((name, outcome), expected) in outcomes().into_iter().zip(expected) {
        let (mut bench, lease) = make();
        assert_eq!(bench.status(member, lease, outcome), expected, "{name}");
    }
}

/// A lease of member `a` that expired, with its record scheduled far from now.
fn expired() -> (Bench, LeaseRef) {
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "1m"), ("backoff-max", "1m")]);
    bench.advance(1_000);
    assert_eq!(bench.counts().scheduled, 1);
    (bench, lease)
}

/// A lease of member `a` that expired, with its record leased to `b`.
fn leased_again() -> (Bench, LeaseRef) {
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "0s"), ("backoff-max", "0s")]);
    bench.subscribe(2, "b", 1);
    bench.advance(1_000);
    bench.advance(0);
    assert_eq!(bench.offsets(), [0]);
    (bench, lease)
}

fn settled_as(outcome: Outcome) -> (Bench, LeaseRef) {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("a", lease, outcome), Ok);
    (bench, lease)
}

#[test]
fn a_current_lease_is_settled() {
    row(|| leased(&[]), "a", [Ok; 5]);
}

#[test]
fn the_answer_to_a_current_lease_names_the_next_state_and_its_time() {
    let answer = |outcome| {
        let (mut bench, lease) = leased(&[]);
        let result = bench.settle("a", lease, outcome);
        (result.state, result.remaining_ms)
    };
    assert_eq!(answer(Outcome::Ack), (Some(RecordState::Acked), 0));
    assert_eq!(answer(nack()), (Some(RecordState::Scheduled), 100));
    assert_eq!(answer(reject()), (Some(RecordState::DeadLettered), 0));
    assert_eq!(answer(Outcome::Release), (Some(RecordState::Available), 0));
    assert_eq!(answer(EXTEND), (Some(RecordState::Leased), 30_000));
}

#[test]
fn a_repeated_settlement_is_told_as_such() {
    row(|| settled_as(Outcome::Ack), "a", [Duplicate, Conflict, Conflict, Conflict, Gone]);
    row(|| settled_as(nack()), "a", [Conflict, Duplicate, Conflict, Conflict, Gone]);
    row(|| settled_as(reject()), "a", [Conflict, Conflict, Duplicate, Conflict, Gone]);
    row(|| settled_as(Outcome::Release), "a", [Conflict, Conflict, Conflict, Duplicate, Gone]);
}

#[test]
fn a_repeated_settlement_is_told_as_such_when_the_record_was_leased_and_settled_again() {
    let again = |last: Option<Outcome>| {
        let (mut bench, lease) = leased(&[]);
        let retry = Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() };
        bench.settle("a", lease, retry);
        bench.credit(1, 1);
        bench.advance(0);
        let second = bench.take_one();
        if let Some(outcome) = last {
            assert_eq!(bench.status("a", second, outcome), Ok);
        }
        (bench, lease)
    };
    for last in [None, Some(nack()), Some(Outcome::Ack), Some(reject())] {
        row(|| again(last.clone()), "a", [Conflict, Duplicate, Conflict, Conflict, Gone]);
    }
}

#[test]
fn an_expired_lease_may_be_acknowledged_late_and_no_more() {
    row(expired, "a", [Late, Stale, Stale, Stale, Stale]);
}

#[test]
fn a_nack_after_expiry_is_no_second_penalty() {
    let (mut bench, lease) = expired();
    let before = bench.counts();
    bench.settle("a", lease, nack());
    assert_eq!(bench.counts(), before);
}

#[test]
fn an_expired_lease_whose_record_is_leased_again_is_stale() {
    row(leased_again, "a", [Stale; 5]);
}

#[test]
fn an_expired_lease_whose_record_was_leased_again_and_acknowledged_is_stale() {
    let make = || {
        let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "0s"), ("backoff-max", "0s")]);
        bench.credit(1, 1);
        bench.advance(1_000);
        bench.advance(0);
        let again = bench.take_one();
        assert_eq!(bench.status("a", again, Outcome::Ack), Ok);
        (bench, lease)
    };
    row(make, "a", [Stale; 5]);
}

#[test]
fn an_expired_lease_whose_record_is_dead_is_stale() {
    for on_exhausted in ["dead-letter", "discard", "hold"] {
        let make = || {
            let (mut bench, lease) =
                leased(&[("lease", "1s"), ("max-failures", "1"), ("on-exhausted", on_exhausted)]);
            bench.advance(1_000);
            let counts = bench.counts();
            assert_eq!(counts.dead_lettered + counts.discarded + counts.held, 1);
            (bench, lease)
        };
        row(make, "a", [Stale; 5]);
    }
}

#[test]
fn what_was_settled_long_ago_is_told_so() {
    let make = || {
        let (mut bench, lease) = settled_as(Outcome::Ack);
        bench.advance(RECENT_AGE_MS);
        (bench, lease)
    };
    row(make, "a", [AlreadySettled, AlreadySettled, AlreadySettled, AlreadySettled, Gone]);
}

#[test]
fn the_lease_of_another_member_is_refused() {
    row(|| leased(&[]), "b", [NotOwner; 5]);
    row(expired, "b", [NotOwner; 5]);
    row(|| settled_as(nack()), "b", [NotOwner; 5]);
}

#[test]
fn a_lease_from_before_a_move_of_the_group_is_fenced() {
    let make = || {
        let (mut bench, lease) = leased(&[]);
        bench.seek(SeekTo::Beginning);
        (bench, lease)
    };
    row(make, "a", [Fenced; 5]);
}

#[test]
fn a_lease_of_a_former_group_of_the_same_name_is_fenced() {
    let make = || {
        let (mut bench, lease) = leased(&[("lease", "1s")]);
        bench.advance(20_000);
        assert_eq!(bench.ask(Command::DeleteGroup { group: "pay".to_owned(), force: false }), Reply::Done);
        bench.group(&[]);
        (bench, lease)
    };
    row(make, "a", [Fenced; 5]);
}

#[test]
fn a_lease_on_a_partition_that_the_group_does_not_consume_is_fenced() {
    let make = || {
        let (bench, lease) = leased(&[]);
        let elsewhere = PartitionKey { topic: TopicId([8; 16]), partition: 0 };
        (bench, LeaseRef { partition: elsewhere, ..lease })
    };
    row(make, "a", [Fenced; 5]);
}

#[test]
fn a_lease_that_was_never_granted_is_stale() {
    let make = || {
        let (bench, lease) = leased(&[]);
        let never = LeaseId { boot_epoch: lease.lease.boot_epoch, sequence: 1 << 40 };
        (bench, LeaseRef { lease: never, ..lease })
    };
    row(make, "a", [Stale; 5]);
}

#[test]
fn a_lease_that_was_lost_with_the_power_settles_nothing_and_is_told_so() {
    let make = || {
        let (mut bench, lease) = leased(&[]);
        // The frame of the grant is gone.
        bench.frames.pop();
        bench.lsn -= 1;
        bench.reopen_as("another run of the machine");
        (bench, lease)
    };
    row(make, "a", [Stale; 5]);
    let (mut bench, _) = make();
    bench.subscribe(2, "a", 1);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn an_acknowledged_lease_does_not_speak_for_another_record() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 2).unwrap();
    bench.subscribe(1, "a", 2);
    let leases = bench.delivered();
    assert_eq!(bench.status("a", leases[0].0, Outcome::Ack), Ok);
    let mixed = LeaseRef { offset: 1, ..leases[0].0 };
    assert_eq!(bench.status("a", mixed, Outcome::Ack), Stale);
}

#[test]
fn the_answers_are_the_same_after_a_crash() {
    let reopened = |(mut bench, lease): (Bench, LeaseRef)| {
        bench.reopen();
        (bench, lease)
    };
    row(|| reopened(leased(&[])), "a", [Ok; 5]);
    row(|| reopened(settled_as(Outcome::Ack)), "a", [Duplicate, Conflict, Conflict, Conflict, Gone]);
    row(|| reopened(settled_as(nack())), "a", [Conflict, Duplicate, Conflict, Conflict, Gone]);
    row(|| reopened(expired()), "a", [Late, Stale, Stale, Stale, Stale]);
    row(|| reopened(leased(&[])), "b", [NotOwner; 5]);
}

#[test]
fn each_record_of_a_batch_has_its_own_answer() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 3).unwrap();
    bench.subscribe(1, "a", 3);
    let leases = bench.delivered();
    assert_eq!(bench.status("a", leases[0].0, Outcome::Ack), Ok);
    let settlements = leases
        .iter()
        .zip([nack(), nack(), Outcome::Ack])
        .map(|((record, _, _), outcome)| Settlement { record: *record, outcome })
        .collect();
    let (group, member) = ("pay".to_owned(), "a".to_owned());
    let level = Level::Synced;
    let Reply::Settled(results) = bench.ask(Command::Settle { group, member, level, settlements }) else {
        panic!()
    };
    assert_eq!(results.iter().map(|result| result.status).collect::<Vec<_>>(), [Conflict, Ok, Ok]);
}
