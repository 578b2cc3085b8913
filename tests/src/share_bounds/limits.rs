//! The limits of a share group one by one: what stops, what goes on, and what is said of it.

use felucca_broker::engine::command::{Command, FailureDetail, LeaseRef, Outcome, ScannedRecord};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::effect::{Reply, ShareAlarm};

use super::bench::Bench;

fn record_at(offset: u64) -> ScannedRecord {
    ScannedRecord { offset, slot: None, size: 100 }
}

fn nack(delay_ms: u64) -> Outcome {
    Outcome::Nack { delay_ms: Some(delay_ms), counted: true, detail: FailureDetail::default() }
}

fn bench(settings: EngineSettings, config: &[(&str, &str)]) -> Bench {
    let mut bench = Bench::new(settings, 1, record_at);
    bench.create_group("pay", &[config, &[("outage-guard", "off"), ("max-failures", "1000")]].concat());
    bench
}

fn offsets(leases: &[LeaseRef]) -> Vec<u64> {
    leases.iter().map(|lease| lease.offset).collect()
}

/// Each of the tables, when full, stops new records, and what came back goes on.
pub fn a_full_table_stops_new_records_only() {
    // Leases.
    let mut full = bench(EngineSettings { max_leases: 10, ..EngineSettings::default() }, &[]);
    full.append(0, 100);
    full.subscribe("pay", 1, "w", 1_000);
    full.rest();
    let leases = full.take_granted(1);
    let info = full.partition("pay", 0);
    assert_eq!((leases.len(), info.alarms), (10, vec![ShareAlarm::Leases]));
    full.settle("pay", "w", &leases[..4], &Outcome::Ack);
    full.rest();
    assert_eq!(full.take_granted(1).len(), 4, "room for as many more");

    // Exceptions: a scheduled record uses no lease.
    let mut full = bench(EngineSettings { max_exceptions: 10, ..EngineSettings::default() }, &[]);
    full.append(0, 100);
    full.subscribe("pay", 1, "w", 10);
    full.rest();
    let leases = full.take_granted(1);
    full.settle("pay", "w", &leases, &nack(1_000));
    full.turn(vec![Bench::credit(1, 50)]);
    full.rest();
    let info = full.partition("pay", 0);
    assert_eq!((info.leased, info.scheduled, info.alarms), (0, 10, vec![ShareAlarm::Exceptions]));
    assert!(full.take_granted(1).is_empty());
    full.advance(1_000);
    let again = full.take_granted(1);
    assert_eq!(offsets(&again), offsets(&leases), "what came back is tried again");
    full.settle("pay", "w", &again, &Outcome::Ack);
    full.rest();
    assert_eq!(full.take_granted(1).len(), 40);
    assert!(full.partition("pay", 0).alarms.is_empty());

    // Span: a record that is neither settled nor returned holds the first undecided offset.
    let mut full = bench(EngineSettings { max_span: 100, ..EngineSettings::default() }, &[]);
    full.append(0, 1_000);
    full.subscribe("pay", 1, "w", 1_000);
    full.rest();
    let leases = full.take_granted(1);
    assert_eq!(leases.len(), 100);
    full.settle("pay", "w", &leases[1..], &Outcome::Ack);
    full.rest();
    assert!(full.take_granted(1).is_empty());
    assert_eq!(full.partition("pay", 0).alarms, vec![ShareAlarm::Span]);
    full.settle("pay", "w", &leases[..1], &nack(0));
    full.rest();
    assert_eq!(full.take_granted(1).len(), 101, "a returned record does not hold it");
}

/// One group takes all of the memory: it gets nothing new, another goes on slowly, and quickly when there is room again.
pub fn a_spent_budget_slows_new_records_down() {
    let limit = 1 << 20;
    let settings = EngineSettings { share_state_bytes: limit, ..EngineSettings::default() };
    let mut bench = bench(settings, &[]);
    bench.create_group("other", &[]);
    bench.append(0, 100_000);
    bench.subscribe("pay", 1, "w", 1_000_000);
    let mut failed = Vec::new();
    for _ in 0..1_000 {
        let leases = bench.take_granted(1);
        bench.settle("pay", "w", &leases, &nack(3_600_000));
        failed.extend(leases);
        bench.rest();
    }
    let full = bench.partition("pay", 0);
    assert_eq!(full.alarms, vec![ShareAlarm::Memory], "{full:?}");
    assert!(full.scheduled > 1_000 && full.scheduled < 10_000, "{full:?}");
    assert!(full.memory_bytes < limit + limit / 4, "{full:?}");

    bench.subscribe("other", 2, "v", 1_000);
    bench.rest();
    for _ in 0..10 {
        let few = bench.take_granted(2);
        assert!(!few.is_empty() && few.len() <= 32, "{}", few.len());
        bench.settle("other", "v", &few, &Outcome::Ack);
        bench.rest();
    }
    assert_eq!(bench.partition("other", 0).alarms, vec![ShareAlarm::Memory]);

    // The one that took it all is done.
    bench.advance(3_600_000);
    bench.subscribe("pay", 4, "w", 1_000_000);
    bench.rest();
    loop {
        bench.seen("pay", &["w".to_owned()]);
        let again = bench.take_granted(4);
        if again.is_empty() {
            break;
        }
        bench.settle("pay", "w", &again, &Outcome::Ack);
        bench.rest();
    }
    assert_eq!(bench.partition("pay", 0).lag, 0);
    bench.subscribe("other", 3, "v", 1_000);
    bench.rest();
    assert!(bench.take_granted(3).len() > 100, "the other one is not slow any more");
    assert!(bench.partition("other", 0).alarms.is_empty());
}

/// Records are deleted that nobody was given yet: they are counted, what was given out is kept, and the rest goes on.
pub fn a_group_goes_on_above_what_was_deleted() {
    for ordering in ["none", "key"] {
        let slotted = |offset: u64| ScannedRecord { offset, slot: Some((offset % 50) as u16), size: 100 };
        let mut bench = Bench::new(EngineSettings::default(), 1, slotted);
        bench.create_group("pay", &[("ordering", ordering), ("outage-guard", "off")]);
        bench.append(0, 20_000);
        bench.subscribe("pay", 1, "w", 30);
        bench.rest();
        let leases = bench.take_granted(1);
        assert_eq!(leases.len(), 30);
        bench.settle("pay", "w", &leases[..10], &nack(1_000));
        bench.settle("pay", "w", &leases[10..20], &Outcome::Ack);
        let (topic, partition, before) = ("orders".to_owned(), 0, 12_000);
        let reply = bench.ask(Command::DeleteRecords { topic, partition, before });
        assert_eq!(reply, Reply::RecordsDeleted { log_start: before });
        let mut seen = Vec::new();
        for round in 0.. {
            assert!(round < 20_000, "{ordering}: stuck at {:?}", bench.partition("pay", 0));
            bench.turn(vec![Bench::credit(1, 100)]);
            bench.advance(10);
            let more = bench.take_granted(1);
            seen.extend(offsets(&more));
            bench.settle("pay", "w", &more, &Outcome::Ack);
            if round == 200 {
                bench.settle("pay", "w", &leases[20..], &Outcome::Ack);
            }
            if bench.partition("pay", 0).lag == 0 {
                break;
            }
        }
        seen.sort_unstable();
        let info = bench.partition("pay", 0);
        // Of those below, only what had been handed out before comes again.
        let handed_out = seen.iter().filter(|offset| **offset < 12_000).count() as u64;
        assert_eq!(info.expired + handed_out, 12_000 - 20, "{ordering}: {info:?}");
        assert_eq!(handed_out, 10, "{ordering}");
        assert!(seen.iter().copied().filter(|offset| *offset >= 12_000).eq(12_000..20_000), "{ordering}");
        assert_eq!(info.acked, 20 + seen.len() as u64);
    }
}

/// Leases of several partitions expire at once, or with their member: what that changes is journaled in frames of bounded
/// size, one after the other.
pub fn frames_stay_small_when_many_leases_end_at_once() {
    let partitions = 4;
    for is_member_lost in [false, true] {
        let mut bench = Bench::new(EngineSettings::default(), partitions, record_at);
        bench.create_group("pay", &[("outage-guard", "off")]);
        bench.subscribe("pay", 1, "w", 40_000);
        for partition in 0..partitions {
            bench.append(partition, 10_000);
        }
        bench.rest();
        assert_eq!(bench.take_granted(1).len(), 40_000);
        bench.largest_frame = 0;
        if is_member_lost {
            bench.advance(20_000);
        } else {
            for _ in 0..6 {
                bench.seen("pay", &["w".to_owned()]);
                bench.advance(5_000);
            }
        }
        let scheduled: u64 = bench.describe("pay").iter().map(|info| info.scheduled).sum();
        assert_eq!(scheduled, 40_000);
        assert!(bench.largest_frame < 1_500_000, "{}", bench.largest_frame);
    }
}

/// What a group remembers of ended leases is let go of when it is idle.
pub fn an_idle_group_forgets() {
    let mut bench = bench(EngineSettings { share_state_bytes: 1 << 18, ..EngineSettings::default() }, &[]);
    bench.append(0, 1_000_000);
    bench.subscribe("pay", 1, "w", 100);
    let mut acked = 0;
    while bench.partition("pay", 0).alarms.is_empty() && acked < 200_000 {
        let leases = bench.take_granted(1);
        acked += leases.len() as u64;
        bench.settle("pay", "w", &leases, &Outcome::Ack);
        bench.turn(vec![Bench::credit(1, leases.len() as u32)]);
        bench.rest();
    }
    assert!(acked > 1_000 && acked < 200_000, "{acked}");
    bench.advance(700_000);
    assert!(bench.partition("pay", 0).alarms.is_empty());
}
