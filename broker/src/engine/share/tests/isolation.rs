//! Poison isolation: from half of the most failures on a record is granted alone.

use crate::engine::command::{Command, FailureDetail, LeaseRef, Outcome};
use crate::engine::testing::Bench;
use crate::engine::types::SubscriptionId;

const CONFIG: [(&str, &str); 3] = [("max-failures", "4"), ("backoff-initial", "0s"), ("backoff-max", "0s")];

fn failed() -> Outcome {
    Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() }
}

/// Record 0 has failed twice of four times and is available; member `a` holds `others` more. No credit is left.
fn suspect(others: usize) -> (Bench, Vec<LeaseRef>) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&CONFIG);
    bench.append(None, 1).unwrap();
    bench.subscribe(1, "a", 1);
    let first = bench.take_one();
    bench.settle("a", first, failed());
    bench.credit(1, 1);
    bench.advance(0);
    let second = bench.take_one();
    bench.append(None, others).unwrap();
    bench.credit(1, others as u32);
    let held = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    bench.settle("a", second, failed());
    bench.advance(0);
    (bench, held)
}

#[test]
fn it_waits_until_a_member_holds_nothing_else_and_that_member_gets_nothing_meanwhile() {
    let (mut bench, held) = suspect(2);
    bench.credit(1, 10);
    bench.append(None, 1).unwrap();
    assert!(bench.offsets().is_empty(), "neither the suspect nor what is new");
    bench.settle("a", held[0], Outcome::Ack);
    assert!(bench.offsets().is_empty());
    bench.settle("a", held[1], Outcome::Ack);
    assert_eq!(bench.offsets(), [0], "alone, although more is ready and there is credit");
}

#[test]
fn nothing_joins_it_and_the_flow_goes_on_after_it() {
    let (mut bench, held) = suspect(1);
    bench.credit(1, 10);
    bench.settle("a", held[0], Outcome::Ack);
    let alone = bench.take_one();
    bench.append(None, 3).unwrap();
    assert!(bench.offsets().is_empty());
    bench.settle("a", alone, Outcome::Ack);
    assert_eq!(bench.offsets(), [2, 3, 4]);
}

#[test]
fn a_member_that_holds_nothing_takes_it_at_once() {
    let (mut bench, _) = suspect(2);
    bench.subscribe(2, "b", 5);
    assert_eq!(bench.take_one().offset, 0);
}

#[test]
fn the_others_go_on_while_one_member_is_kept_for_it() {
    let (mut bench, _) = suspect(2);
    bench.append(None, 1).unwrap();
    bench.subscribe(2, "b", 1);
    let alone = bench.take_one();
    assert_eq!(alone.offset, 0);
    bench.settle("b", alone, failed());
    bench.credit(2, 1);
    bench.advance(0);
    // It was b's last and others wait: first those, then it again.
    assert_eq!(bench.offsets(), [3]);
    bench.credit(1, 5);
    bench.append(None, 2).unwrap();
    let flowing = bench.offsets();
    assert!(!flowing.is_empty() && !flowing.contains(&0), "{flowing:?}");
}

#[test]
fn it_and_the_others_take_turns_with_a_single_member() {
    let (mut bench, held) = suspect(1);
    bench.append(None, 2).unwrap();
    bench.settle("a", held[0], Outcome::Ack);
    let mut seen = Vec::new();
    for _ in 0..4 {
        bench.credit(1, 1);
        bench.advance(0);
        for (lease, _, _) in bench.delivered() {
            seen.push(lease.offset);
            bench.settle("a", lease, if lease.offset == 0 { failed() } else { Outcome::Ack });
        }
    }
    assert_eq!(seen, [0, 2, 0, 3]);
    assert_eq!(bench.counts().dead_lettered, 1);
}

#[test]
fn a_crash_does_not_bring_it_together_with_others() {
    let (mut bench, held) = suspect(2);
    bench.reopen();
    bench.advance(0);
    bench.subscribe_holding(9, "a", 10, held.clone());
    bench.append(None, 1).unwrap();
    assert!(bench.offsets().is_empty());
    for lease in held {
        bench.settle("a", lease, Outcome::Ack);
    }
    assert_eq!(bench.offsets(), [0]);
    bench.reopen();
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(9), records: 1, bytes: 1 });
    assert!(bench.offsets().is_empty(), "leased still, and the subscription is of the former run");
}

#[test]
fn records_that_failed_less_than_half_are_not_alone() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&CONFIG);
    bench.append(None, 3).unwrap();
    bench.subscribe(1, "a", 3);
    for (lease, _, _) in bench.delivered() {
        bench.settle("a", lease, failed());
    }
    bench.credit(1, 3);
    bench.advance(0);
    assert_eq!(bench.offsets(), [0, 1, 2]);
}
