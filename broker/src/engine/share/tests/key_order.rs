//! `ordering=key`: records of one key one after the other, whatever happens.

use crate::engine::command::{Command, LeaseRef, Outcome, SeekTo};
use crate::engine::effect::SettleStatus;
use crate::engine::testing::{Bench, nack, pairs};
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
