//! Who is given how much: credit, and turns of members, partitions, retries and new records.

use crate::engine::command::{AppendEntry, Command, Outcome};
use crate::engine::effect::Reply;
use crate::engine::testing::{Bench, P0, TOPIC, nack, staged};
use crate::engine::types::{Level, PartitionKey, SubscriptionId};

fn started(config: &[(&str, &str)]) -> Bench {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(config);
    bench
}

/// Offsets that each of the subscriptions was given since the last call.
fn shares(bench: &mut Bench, subscriptions: u64) -> Vec<usize> {
    let mut shares = vec![0; subscriptions as usize];
    for delivery in bench.deliveries.drain(..) {
        shares[delivery.subscription.0 as usize] += delivery.records.len();
    }
    shares
}

#[test]
fn credit_is_taken_in_records_and_in_bytes() {
    let mut bench = started(&[]);
    bench.append(None, 100).unwrap();
    let size = i64::from(bench.log[0].1.size);
    bench.subscribe(1, "a", 3);
    assert_eq!(bench.offsets(), [0, 1, 2], "as many records as there is credit for");
    // Room for the bytes of two and a part of the third, which goes out as a whole.
    let credit_bytes = (2 * size + 1) as u32;
    let reply = bench.ask(Command::ShareSubscribe {
        subscription: SubscriptionId(2),
        group: "pay".to_owned(),
        member: "b".to_owned(),
        credit_records: 50,
        credit_bytes,
        held: Vec::new(),
    });
    assert_eq!(reply, Reply::Done);
    assert_eq!(bench.offsets(), [3, 4, 5]);
    // What the third took too much is owed.
    let give = |bytes: i64| Command::ShareCredit {
        subscription: SubscriptionId(2),
        records: 0,
        bytes: bytes as u32,
    };
    bench.tell(give(size - 1));
    assert!(bench.offsets().is_empty());
    bench.tell(give(1));
    assert_eq!(bench.offsets(), [6]);
}

#[test]
fn a_settlement_gives_no_credit_back() {
    let mut bench = started(&[]);
    bench.append(None, 2).unwrap();
    bench.subscribe(1, "a", 1);
    let lease = bench.take_one();
    bench.settle("a", lease, Outcome::Ack);
    assert!(bench.offsets().is_empty());
    bench.credit(1, 1);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn members_share_what_is_ready() {
    let mut bench = started(&[]);
    for (id, member) in (0..).zip(["a", "b", "c", "d"]) {
        bench.subscribe(id, member, 1_000);
    }
    // Of what comes at once nobody gets the most by far.
    bench.append(None, 400).unwrap();
    let burst = shares(&mut bench, 4);
    assert_eq!(burst.iter().sum::<usize>(), 400);
    assert!(burst.iter().all(|share| (50..=200).contains(share)), "{burst:?}");
    // Of what comes bit by bit everybody gets the same.
    for _ in 0..100 {
        bench.append(None, 4).unwrap();
    }
    let bits = shares(&mut bench, 4);
    assert_eq!(bits.iter().sum::<usize>(), 400);
    assert!(bits.iter().all(|share| (80..=120).contains(share)), "{bits:?}");
}

#[test]
fn partitions_share_the_credit_of_a_member() {
    let mut bench = started(&[]);
    let other = PartitionKey { topic: TOPIC, partition: 1 };
    for partition in [P0, other] {
        let entry = AppendEntry { partition, batch: staged(None, 2_000) };
        bench.append_entry(entry, Level::Synced).unwrap();
    }
    bench.subscribe(1, "a", 1_000);
    let mut granted = [0, 0];
    for delivery in bench.deliveries.drain(..) {
        granted[delivery.partition.partition as usize] += delivery.records.len();
    }
    assert_eq!(granted.iter().sum::<usize>(), 1_000);
    assert!(granted.iter().all(|count| *count >= 400), "{granted:?}");
}

#[test]
fn due_retries_and_new_records_take_turns() {
    let quiet = [("outage-guard", "off"), ("max-failures", "1000"), ("max-deliveries", "1000")];
    let mut bench = started(&quiet);
    bench.append(None, 1_000).unwrap();
    bench.subscribe(1, "a", 100);
    let failed = bench.delivered();
    for (lease, _, _) in failed {
        bench.settle("a", lease, nack());
    }
    bench.advance(100);
    assert_eq!(bench.counts().scheduled, 0, "all are due");
    bench.credit(1, 100);
    let delivered = bench.delivered();
    let retried = delivered.iter().filter(|(_, deliveries, _)| *deliveries > 1).count();
    assert_eq!((delivered.len(), retried), (100, 50));
    // Neither waits for the other when it is alone.
    bench.credit(1, 900);
    assert_eq!(bench.delivered().len(), 900);
}
