//! `ordering=key`: records of one key one after the other, whatever happens.

use crate::engine::command::{Command, LeaseRef, Outcome, SeekTo};
use crate::engine::effect::SettleStatus;
use crate::engine::testing::{Bench, nack, pairs, reject};
use crate::engine::types::SubscriptionId;

/// After a start nothing is scanned yet; what then goes back must not be missed because everything before it is settled
/// first, nor be overtaken by its key's successor.
#[test]
fn a_record_that_goes_back_before_it_was_scanned_is_handed_out_in_its_turn() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"first"), 1).unwrap();
    bench.append(Some(b"second"), 2).unwrap();
    bench.subscribe(1, "a", 10);
    let leases = bench.delivered();
    assert_eq!(leases.len(), 2);
    bench.reopen();
    bench.subscribe_holding(2, "a", 0, vec![leases[0].0]);
    assert_eq!(bench.status("a", leases[0].0, Outcome::Ack), SettleStatus::Ok);
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(2), records: 10, bytes: 0 });
    assert_eq!(bench.offsets(), [1]);
    assert_eq!(bench.counts().lag, 2);
}

#[test]
fn a_key_stays_in_order_through_a_nack_while_others_flow() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    for key in [b"a", b"a", b"b", b"a"] {
        bench.append(Some(key), 1).unwrap();
    }
    bench.subscribe(1, "m", 10);
    let first = bench.delivered();
    assert_eq!(first.iter().map(|(lease, _, _)| lease.offset).collect::<Vec<_>>(), [0, 2]);
    bench.settle("m", first[0].0, nack());
    assert!(bench.offsets().is_empty(), "the key waits for its first record");
    bench.advance(100);
    let retried = bench.take_one();
    assert_eq!(retried.offset, 0);
    bench.settle("m", retried, Outcome::Ack);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_key_is_free_only_when_the_settlement_before_is_synced() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"a"), 2).unwrap();
    bench.subscribe(1, "m", 10);
    let first = bench.take_one();
    bench.hold_sync = true;
    bench.settle("m", first, Outcome::Ack);
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
}

/// A lost deletion brings them back: then their successors must not have been handed out.
#[test]
fn a_key_waits_for_the_deletion_of_records_that_nobody_has_looked_at() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"a"), 4).unwrap();
    bench.hold_sync = true;
    bench.ask(Command::DeleteRecords { topic: "orders".to_owned(), partition: 0, before: 2 });
    bench.subscribe(1, "m", 10);
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [2]);
}

/// After a restart, the records from 0 to 2 of one key or two, leased or returned before anything is scanned again.
fn reopened_with_leases(keys: [&[u8]; 4]) -> (Bench, Vec<LeaseRef>) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key"), ("max-failures", "10")]);
    for key in keys {
        bench.append(Some(key), 1).unwrap();
    }
    bench.subscribe(1, "m", 10);
    let leases: Vec<LeaseRef> = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    bench.reopen();
    (bench, leases)
}

#[test]
fn a_returned_record_that_the_low_watermark_passed_after_a_restart_is_not_forgotten() {
    let (mut bench, leases) = reopened_with_leases([b"a", b"b", b"c", b"b"]);
    assert_eq!(leases.len(), 3);
    bench.settle("m", leases[1], nack());
    bench.settle("m", leases[0], Outcome::Ack);
    bench.settle("m", leases[2], Outcome::Ack);
    assert_eq!(bench.counts().position, Some(3));
    bench.subscribe(2, "m", 10);
    assert!(bench.offsets().is_empty(), "the third b waits for the second record, which is scheduled");
    bench.advance(100);
    assert_eq!(bench.take_one().offset, 1);
}

#[test]
fn a_key_that_was_settled_before_it_was_scanned_again_waits_for_the_sync_too() {
    let (mut bench, leases) = reopened_with_leases([b"a", b"a", b"a", b"a"]);
    bench.hold_sync = true;
    bench.settle("m", leases[0], Outcome::Ack);
    bench.subscribe(2, "m", 10);
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_group_whose_order_changes_goes_on_by_itself() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"k"), 2).unwrap();
    bench.subscribe(1, "a", 10);
    assert_eq!(bench.offsets(), [0]);
    bench.ask(Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(&[("ordering", "none")]) });
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_key_waits_for_the_sync_of_a_move_and_of_a_change_of_order() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(Some(b"k"), 5).unwrap();
    bench.subscribe(1, "a", 1);
    let first = bench.take_one();
    bench.hold_sync = true;
    bench.settle("a", first, Outcome::Ack);
    bench.ask(Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(&[("ordering", "key")]) });
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 10, bytes: 0 });
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
    bench.hold_sync = true;
    let positions = vec![(0, SeekTo::Offset(3))];
    bench.ask(Command::SeekGroup {
        group: "pay".to_owned(),
        topic: "orders".to_owned(),
        positions,
        force: true,
    });
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [3]);
}

/// Two records of one key and two of another; answers the leases of the first of each.
fn two_keys(config: &[(&str, &str)]) -> (Bench, LeaseRef, LeaseRef) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[&[("ordering", "key")], config].concat());
    for key in [b"a", b"a", b"b", b"b"] {
        bench.append(Some(key), 1).unwrap();
    }
    bench.subscribe(1, "m", 10);
    let first = bench.delivered();
    assert_eq!(first.len(), 2);
    (bench, first[0].0, first[1].0)
}

#[test]
fn dead_lettering_and_discarding_free_the_key_and_holding_does_not() {
    for (to, next) in [("dead-letter", vec![1]), ("discard", vec![1]), ("hold", vec![])] {
        let (mut bench, lease, _) = two_keys(&[("on-exhausted", to)]);
        bench.settle("m", lease, reject());
        assert_eq!(bench.offsets(), next, "{to}");
    }
}

#[test]
fn a_key_stays_in_order_through_expiry_a_lost_member_and_a_release() {
    let config = [("lease", "1s"), ("backoff-initial", "1s"), ("backoff-max", "1s"), ("jitter", "0")];
    let (mut bench, _, other) = two_keys(&config);
    bench.settle("m", other, Outcome::Ack);
    assert_eq!(bench.offsets(), [3]);
    bench.advance(1_000);
    assert!(bench.offsets().is_empty(), "both keys wait for their expired record");
    bench.advance(1_000);
    assert_eq!(bench.offsets(), [0, 3]);

    let (mut bench, ..) = two_keys(&[("backoff-initial", "0s"), ("backoff-max", "0s")]);
    bench.advance(10_000);
    bench.subscribe(2, "n", 10);
    bench.advance(0);
    assert_eq!(bench.offsets(), [0, 2]);

    let (mut bench, lease, _) = two_keys(&[]);
    bench.settle("m", lease, Outcome::Release);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn a_late_ack_frees_the_key() {
    let (mut bench, lease, _) =
        two_keys(&[("lease", "1s"), ("backoff-initial", "1h"), ("backoff-max", "1h")]);
    bench.advance(1_000);
    assert!(bench.offsets().is_empty());
    assert_eq!(bench.status("m", lease, Outcome::Ack), SettleStatus::Late);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn records_without_a_key_are_in_no_order() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(None, 3).unwrap();
    bench.subscribe(1, "m", 10);
    assert_eq!(bench.offsets(), [0, 1, 2]);
}

#[test]
fn a_key_goes_to_any_member_and_to_one_at_a_time() {
    let (mut bench, lease, _) = two_keys(&[]);
    bench.subscribe(2, "n", 10);
    assert!(bench.offsets().is_empty());
    // Nothing ties the key to member m once its record is settled.
    bench.ask(Command::ShareUnsubscribe { subscription: SubscriptionId(1) });
    bench.settle("m", lease, Outcome::Ack);
    let next = bench.take_one();
    assert_eq!((next.offset, bench.status("n", next, Outcome::Ack)), (1, SettleStatus::Ok));
}
