//! Members: sessions, names, and leases that live through a crash.

use crate::engine::command::{Command, FailureDetail, Outcome};
use crate::engine::effect::SettleStatus;
use crate::engine::error::EngineError;
use crate::engine::testing::{Bench, leased, nack};
use crate::engine::types::SubscriptionId;

#[test]
fn a_member_that_dies_on_a_record_and_comes_back_under_its_name_does_not_get_it_for_ever() {
    let (mut bench, _) = leased(&[("max-deliveries", "3")]);
    for subscription in 2..10 {
        bench.subscribe(subscription, "a", 1);
    }
    let counts = bench.counts();
    assert_eq!((counts.deliveries, counts.failures, counts.dead_lettered), (3, 0, 1));
}

#[test]
fn one_stuck_record_does_not_stop_the_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 100).unwrap();
    bench.subscribe(1, "a", 100);
    let all = bench.delivered();
    assert_eq!(all.len(), 100);
    bench.settle("a", all[0].0, nack());
    for (lease, _, _) in &all[1..] {
        bench.settle("a", *lease, Outcome::Ack);
    }
    let counts = bench.counts();
    assert_eq!((counts.position, counts.lag, counts.scheduled, counts.acked), (Some(100), 1, 1, 99));
}

#[test]
fn failures_and_leases_survive_a_crash_and_the_old_name_still_settles() {
    let (mut bench, lease) = leased(&[]);
    bench.settle(
        "a",
        lease,
        Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() },
    );
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 1, bytes: 0 });
    bench.advance(0);
    let second = bench.delivered()[0];
    assert_eq!((second.1, second.2), (2, 1));
    bench.reopen();
    bench.subscribe_holding(2, "a", 1, vec![second.0]);
    assert!(bench.delivered().is_empty(), "the member holds it still");
    assert_eq!(bench.status("a", second.0, Outcome::Ack), SettleStatus::Ok);
}

#[test]
fn leases_that_a_returning_member_does_not_name_go_back_without_a_failure() {
    let (mut bench, _) = leased(&[]);
    bench.subscribe(2, "a", 1);
    let again = bench.delivered();
    assert_eq!((again[0].1, again[0].2), (2, 0));
}

#[test]
fn a_silent_member_is_lost_and_its_records_are_tried_again() {
    let (mut bench, _) = leased(&[("backoff-initial", "1s"), ("backoff-max", "1s"), ("jitter", "0")]);
    bench.advance(10_000);
    assert_eq!(bench.ended, [(SubscriptionId(1), EngineError::UnknownMember("a".to_owned()))]);
    let counts = bench.counts();
    assert_eq!((counts.leased, counts.scheduled, counts.failures), (0, 1, 1));
    bench.subscribe(2, "b", 1);
    bench.advance(1_000);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn a_member_that_subscribes_again_gets_nothing_on_its_older_subscription() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.subscribe(1, "m", 10);
    bench.subscribe(2, "m", 10);
    bench.append(None, 2).unwrap();
    bench.append(None, 2).unwrap();
    assert!(bench.deliveries.iter().all(|delivery| delivery.subscription == SubscriptionId(2)));
    assert_eq!(bench.offsets().len(), 4);
}

#[test]
fn the_older_of_two_processes_with_one_member_id_is_told() {
    let (mut bench, lease) = leased(&[]);
    bench.subscribe_holding(2, "a", 1, vec![lease]);
    assert_eq!(bench.ended, [(SubscriptionId(1), EngineError::MemberFenced("a".to_owned()))]);
    bench.credit(1, 10);
    bench.append(None, 2).unwrap();
    assert!(bench.deliveries.iter().all(|delivery| delivery.subscription == SubscriptionId(2)));
}

#[test]
fn who_is_no_member_does_not_become_one_by_settling() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("stranger", lease, Outcome::Ack), SettleStatus::NotOwner);
    let complete = Command::Complete {
        group: "pay".to_owned(),
        member: "stranger".to_owned(),
        record: lease,
        outputs: Vec::new(),
    };
    bench.ask(complete);
    assert_eq!(bench.describe().members.len(), 1);
}

#[test]
fn a_member_that_was_lost_may_acknowledge_late_without_coming_back() {
    let (mut bench, lease) = leased(&[("backoff-initial", "1m"), ("backoff-max", "1m")]);
    bench.advance(10_000);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Late);
    assert!(bench.describe().members.is_empty());
}

#[test]
fn a_member_that_holds_leases_lives_on_through_a_crash_until_its_session_ends() {
    let (mut bench, _) = leased(&[("lease", "1m")]);
    bench.reopen();
    let members = bench.describe().members;
    assert_eq!((members.len(), members[0].leased), (1, 1));
    bench.advance(9_999);
    assert_eq!((bench.counts().leased, bench.counts().failures), (1, 0));
    bench.advance(1);
    assert_eq!((bench.counts().leased, bench.counts().failures), (0, 1));
}

#[test]
fn the_time_that_the_broker_was_down_is_not_taken_from_a_lease() {
    let (mut bench, lease) = leased(&[("lease", "20s")]);
    bench.advance(5_000);
    bench.reopen();
    bench.subscribe_holding(2, "a", 0, vec![lease]);
    bench.advance(9_000);
    bench.tell(Command::MembersSeen { members: vec![("pay".to_owned(), "a".to_owned())] });
    bench.advance(5_999);
    assert_eq!(bench.counts().leased, 1);
    bench.advance(1);
    assert_eq!(bench.counts().leased, 0);
}

/// Eight members hold so many records each, of which one settles four: how many records the deliveries that follow have.
fn deliveries_after_four_are_settled(held: u32) -> Vec<usize> {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    for key in (0..8 * held).chain(0..8 * held) {
        bench.append(Some(&key.to_be_bytes()), 1).unwrap();
    }
    for (id, member) in (1..).zip(["a", "b", "c", "d", "e", "f", "g", "h"]) {
        bench.subscribe(id, member, held);
    }
    let leases: Vec<_> = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    assert_eq!(leases.len(), 8 * held as usize, "the subscriptions have no credit left");
    for id in 1..=8 {
        bench.credit(id, 10);
    }
    assert!(bench.delivered().is_empty(), "every key is in somebody's hand");
    bench.settle_all("a", &leases[..4], &Outcome::Ack);
    bench.deliveries.drain(..).map(|delivery| delivery.records.len()).collect()
}

#[test]
fn members_with_much_in_hand_are_given_a_part_of_it_at_a_time_and_others_one_by_one() {
    assert_eq!(deliveries_after_four_are_settled(16), [3, 1]);
    assert_eq!(deliveries_after_four_are_settled(4), [1, 1, 1, 1]);
}
