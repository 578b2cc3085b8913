//! Two things at once: whichever comes first holds, and the other is told so.

use crate::engine::command::{Command, FailureDetail, LeaseRef, Outcome, SeekTo, Settlement};
use crate::engine::effect::{Effects, Reply, SettleStatus};
use crate::engine::testing::{Bench, P0, leased, nack, pairs};
use crate::engine::types::{Level, RequestId};

const SHORT: [(&str, &str); 3] = [("lease", "1s"), ("backoff-initial", "0s"), ("backoff-max", "0s")];

fn ack(record: LeaseRef) -> Command {
    let settlements = vec![Settlement { record, outcome: Outcome::Ack }];
    Command::Settle { group: "pay".to_owned(), member: "a".to_owned(), level: Level::Synced, settlements }
}

/// One turn at the moment when the lease expires: the ack before the tick, or after it. Answers the ack's status.
fn ack_at_expiry(bench: &mut Bench, record: LeaseRef, ack_first: bool) -> SettleStatus {
    bench.now.monotonic_ms += 1_000;
    let mut out = Effects::default();
    for ack_now in [ack_first, !ack_first] {
        if ack_now {
            bench.engine.step(bench.now, bench.lsn, Some(RequestId(1)), ack(record), &mut out);
        } else {
            bench.engine.tick(bench.now, bench.lsn, &mut out);
        }
    }
    match bench.end_turn(out) {
        Some(Reply::Settled(results)) => results[0].status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ack_against_expiry_in_one_tick() {
    for (ack_first, status, failures) in [(true, SettleStatus::Ok, 0), (false, SettleStatus::Late, 1)] {
        let (mut bench, lease) = leased(&SHORT);
        assert_eq!(ack_at_expiry(&mut bench, lease, ack_first), status);
        let counts = bench.counts();
        assert_eq!((counts.acked, counts.failures, counts.scheduled, counts.lag), (1, failures, 0, 0));
        bench.credit(1, 1);
        bench.advance(10_000);
        assert!(bench.offsets().is_empty(), "acknowledged and handed out again");
    }
}

#[test]
fn late_ack_against_a_new_grant() {
    // The ack comes before the record is leased again: it holds, and nobody is given the record.
    let (mut bench, lease) = leased(&SHORT);
    bench.advance(1_000);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Late);
    bench.subscribe(2, "b", 1);
    bench.advance(0);
    assert!(bench.offsets().is_empty());
    // It comes after: it is stale, and the new holder's word holds.
    let (mut bench, lease) = leased(&SHORT);
    bench.subscribe(2, "b", 1);
    bench.advance(1_000);
    bench.advance(0);
    let again = bench.take_one();
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Stale);
    assert_eq!(bench.counts().leased, 1);
    assert_eq!(bench.status("b", again, Outcome::Ack), SettleStatus::Ok);
}

#[test]
fn late_ack_and_new_grant_in_one_turn() {
    let (mut bench, lease) = leased(&SHORT);
    bench.credit(1, 1);
    assert_eq!(ack_at_expiry(&mut bench, lease, false), SettleStatus::Late);
    assert!(
        bench.offsets().is_empty(),
        "what is handed out at the end of the turn is not what was acknowledged"
    );
}

#[test]
fn double_ack_in_one_request_and_in_two() {
    let (mut bench, record) = leased(&[]);
    let settlement = || Settlement { record, outcome: Outcome::Ack };
    let (group, member, level) = ("pay".to_owned(), "a".to_owned(), Level::Synced);
    let twice = Command::Settle { group, member, level, settlements: vec![settlement(), settlement()] };
    let Reply::Settled(results) = bench.ask(twice) else { panic!() };
    assert_eq!((results[0].status, results[1].status), (SettleStatus::Ok, SettleStatus::Duplicate));
    assert_eq!(bench.status("a", record, Outcome::Ack), SettleStatus::Duplicate);
    assert_eq!(bench.counts().acked, 1);
}

#[test]
fn ack_then_nack_and_nack_then_ack() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Ok);
    assert_eq!(bench.status("a", lease, nack()), SettleStatus::Conflict);
    assert_eq!((bench.counts().acked, bench.counts().failures), (1, 0));
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("a", lease, nack()), SettleStatus::Ok);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Conflict);
    assert_eq!((bench.counts().acked, bench.counts().scheduled), (0, 1));
}

#[test]
fn the_wrong_member_settles_nothing() {
    let (mut bench, lease) = leased(&[]);
    for outcome in [Outcome::Ack, nack(), Outcome::Release] {
        assert_eq!(bench.status("b", lease, outcome), SettleStatus::NotOwner);
    }
    assert_eq!(bench.counts().leased, 1);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Ok);
}

#[test]
fn only_the_last_holder_may_acknowledge_late() {
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "10s"), ("backoff-max", "10s")]);
    bench.advance(1_000);
    assert_eq!(bench.status("b", lease, Outcome::Ack), SettleStatus::NotOwner);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Late);
}

#[test]
fn seek_against_ack() {
    // The ack first: the seek brings the record back all the same, that is what it is for.
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Ok);
    bench.seek(SeekTo::Beginning);
    bench.credit(1, 1);
    let again = bench.take_one();
    assert_eq!(again.offset, 0);
    assert_eq!(bench.status("a", again, Outcome::Ack), SettleStatus::Ok);
    // The seek first: the ack is of another life of the group and takes nothing from this one.
    let (mut bench, lease) = leased(&[]);
    bench.seek(SeekTo::Beginning);
    bench.credit(1, 1);
    let again = bench.take_one();
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Fenced);
    assert_eq!(bench.counts().leased, 1);
    assert_eq!(bench.status("a", again, Outcome::Ack), SettleStatus::Ok);
}

#[test]
fn a_seek_and_an_ack_in_one_turn_are_one_frame() {
    let (mut bench, lease) = leased(&[]);
    let mut out = Effects::default();
    let seek = Command::SeekGroup {
        group: "pay".to_owned(),
        topic: "orders".to_owned(),
        positions: vec![(P0.partition, SeekTo::Beginning)],
        force: false,
    };
    bench.engine.step(bench.now, bench.lsn, None, seek, &mut out);
    bench.engine.step(bench.now, bench.lsn, Some(RequestId(1)), ack(lease), &mut out);
    let Some(Reply::Settled(results)) = bench.end_turn(out) else { panic!() };
    assert_eq!(results[0].status, SettleStatus::Fenced);
    bench.reopen();
    assert_eq!((bench.counts().acked, bench.counts().available), (0, 1));
}

#[test]
fn a_stale_ack_never_settles_a_later_delivery_of_another_run() {
    let (mut bench, lease) = leased(&SHORT);
    bench.reopen();
    bench.advance(1_000);
    bench.subscribe(2, "a", 1);
    bench.advance(0);
    let again = bench.take_one();
    assert_ne!(lease.lease, again.lease);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Stale);
    assert_eq!(bench.counts().leased, 1);
}

#[test]
fn a_change_of_settings_against_a_failure() {
    let (mut bench, lease) = leased(&[("max-failures", "1")]);
    let mut out = Effects::default();
    let alter = Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(&[("max-failures", "5")]) };
    bench.engine.step(bench.now, bench.lsn, None, alter, &mut out);
    let outcome = Outcome::Nack { delay_ms: None, counted: true, detail: FailureDetail::default() };
    let settlements = vec![Settlement { record: lease, outcome }];
    let (group, member, level) = ("pay".to_owned(), "a".to_owned(), Level::Synced);
    let settle = Command::Settle { group, member, level, settlements };
    bench.engine.step(bench.now, bench.lsn, None, settle, &mut out);
    bench.end_turn(out);
    assert_eq!((bench.counts().scheduled, bench.counts().dead_lettered), (1, 0));
}
