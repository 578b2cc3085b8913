//! The outage guard, as a group has it: see `share::outage` for its law.

use crate::engine::Engine;
use crate::engine::command::{FailureDetail, LeaseRef, Outcome, SeekTo};
use crate::engine::config::EngineSettings;
use crate::engine::effect::Effects;
use crate::engine::testing::{Bench, reject};

fn failed() -> Outcome {
    Outcome::Nack { delay_ms: None, counted: true, detail: FailureDetail::default() }
}

const CONFIG: [(&str, &str); 5] = [
    ("max-failures", "2"),
    ("backoff-initial", "100ms"),
    ("backoff-max", "200ms"),
    ("jitter", "0"),
    ("outage-window", "10"),
];

fn started(config: &[(&str, &str)], records: usize) -> (Bench, Vec<LeaseRef>) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(config);
    bench.append(None, records).unwrap();
    bench.subscribe(1, "a", 1_000);
    let leases = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    (bench, leases)
}

/// Nine failures of the window of ten have turned the guard on; nothing is leased.
fn down(records: usize) -> Bench {
    let (mut bench, leases) = started(&CONFIG, records);
    for lease in leases {
        bench.settle("a", lease, failed());
    }
    bench
}

#[test]
fn an_outage_puts_nothing_into_the_dead_letters_and_without_the_guard_it_does() {
    for (guard, lost) in [("on", 0), ("off", 40)] {
        // Nor does the number of probes, however long it lasts.
        let more = [("outage-guard", guard), ("max-deliveries", "5")];
        let config: Vec<_> = CONFIG.iter().copied().chain(more).collect();
        let (mut bench, mut leases) = started(&config, 40);
        for _ in 0..600 {
            for lease in leases {
                bench.settle("a", lease, failed());
            }
            bench.credit(1, 100);
            bench.advance(50);
            leases = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
        }
        assert_eq!(bench.counts().dead_lettered, lost, "guard {guard}");
        // The dependency is there again.
        for _ in 0..200 {
            for lease in leases {
                bench.settle("a", lease, Outcome::Ack);
            }
            bench.credit(1, 100);
            bench.advance(50);
            leases = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
        }
        let counts = bench.counts();
        assert_eq!((counts.acked, counts.lag), (40 - lost, 0), "guard {guard}");
    }
}

#[test]
fn a_suspect_that_always_fails_does_not_take_every_probe() {
    let config: Vec<_> = CONFIG.iter().copied().chain([("max-failures", "6")]).collect();
    let (mut bench, mut leases) = started(&config, 1);
    // Always back before the next probe is due.
    let soon = || Outcome::Nack { delay_ms: Some(10), counted: true, detail: FailureDetail::default() };
    // Three failures make a suspect of record 0, six more turn the guard on.
    for _ in 0..3 {
        bench.settle("a", leases[0], soon());
        bench.credit(1, 1);
        bench.advance(200);
        leases = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    }
    bench.settle("a", leases[0], Outcome::Release);
    bench.append(None, 6).unwrap();
    for _ in 0..400 {
        let is_down = bench.counts().failures < 9;
        for (lease, _, _) in bench.delivered() {
            let outcome = match lease.offset {
                0 => soon(),
                _ if is_down => failed(),
                _ => Outcome::Ack,
            };
            bench.settle("a", lease, outcome);
        }
        bench.credit(1, 100);
        bench.advance(50);
    }
    assert_eq!(bench.counts().acked, 6, "the others are probed too");
}

#[test]
fn it_probes_with_one_record_at_a_time_and_pauses_between() {
    let mut bench = down(9);
    assert_eq!(bench.describe().outage.map(|outage| (outage.limit, outage.next_probe_ms)), Some((1, 100)));
    bench.advance(99);
    assert!(bench.offsets().is_empty());
    bench.advance(1);
    let probe = bench.take_one();
    bench.advance(1_000);
    assert!(bench.offsets().is_empty(), "one at a time");
    bench.settle("a", probe, failed());
    assert_eq!(bench.describe().outage.map(|outage| outage.next_probe_ms), Some(200));
    bench.advance(199);
    assert!(bench.offsets().is_empty());
    bench.advance(1);
    assert_eq!(bench.offsets().len(), 1);
}

#[test]
fn what_was_leased_before_does_not_stand_in_the_way_of_a_probe() {
    let (mut bench, leases) = started(&CONFIG, 12);
    bench.settle_all("a", &leases[1..], &failed());
    assert_eq!(bench.counts().leased, 1);
    bench.advance(200);
    assert_eq!(bench.offsets().len(), 1);
    bench.settle("a", leases[0], Outcome::Release);
    bench.advance(1_000);
    assert!(bench.offsets().is_empty(), "the probe is still out");
}

#[test]
fn it_doubles_with_every_round_that_goes_well() {
    let config: Vec<_> = CONFIG.iter().copied().chain([("max-failures", "9")]).collect();
    let (mut bench, leases) = started(&config, 200);
    bench.settle_all("a", &leases, &failed());
    bench.advance(1_000);
    let mut rounds = Vec::new();
    while bench.counts().acked < 100 {
        let round = bench.delivered();
        rounds.push(round.len());
        let leases: Vec<LeaseRef> = round.into_iter().map(|(lease, _, _)| lease).collect();
        bench.settle_all("a", &leases, &Outcome::Ack);
    }
    assert_eq!(rounds[..3], [1, 2, 4]);
    assert_eq!(bench.describe().outage, None);
}

#[test]
fn failures_do_not_count_while_it_is_on_and_do_before_and_after() {
    let (mut bench, leases) = started(&CONFIG, 12);
    for lease in leases {
        bench.settle("a", lease, failed());
    }
    assert_eq!(bench.counts().failures, 9, "the ninth failure turned it on");
    bench.alter(&[("outage-guard", "off")]);
    assert_eq!(bench.describe().outage, None);
    bench.advance(200);
    let (lease, _, _) = bench.delivered()[0];
    bench.settle("a", lease, failed());
    assert_eq!(bench.counts().failures, 10);
}

#[test]
fn what_is_not_retryable_ends_all_the_same() {
    let mut bench = down(9);
    bench.alter(&[("non-retryable-classes", "bad")]);
    bench.advance(200);
    let probe = bench.take_one();
    let detail = FailureDetail { class: "bad".to_owned(), ..FailureDetail::default() };
    bench.settle("a", probe, Outcome::Nack { delay_ms: None, counted: true, detail });
    assert_eq!(bench.counts().dead_lettered, 1);
}

#[test]
fn rejections_are_no_outage() {
    let (mut bench, leases) = started(&CONFIG, 100);
    for lease in leases {
        bench.settle("a", lease, reject());
    }
    assert_eq!((bench.describe().outage, bench.counts().dead_lettered), (None, 100));
}

#[test]
fn leases_that_expire_and_members_that_are_lost_are_outcomes_too() {
    let config: Vec<_> = CONFIG.iter().copied().chain([("lease", "1s")]).collect();
    let (mut bench, _) = started(&config, 20);
    bench.advance(1_000);
    assert!(bench.describe().outage.is_some());
    assert_eq!(bench.counts().failures, 9);
    let (mut bench, _) = started(&CONFIG, 20);
    bench.advance(10_000);
    assert!(bench.describe().outage.is_some());
    assert_eq!(bench.counts().failures, 9);
}

#[test]
fn it_survives_a_crash_and_a_checkpoint() {
    let mut bench = down(20);
    let before = bench.describe().outage;
    assert!(before.is_some());
    bench.reopen();
    assert_eq!(bench.describe().outage, before);
    bench.subscribe(2, "a", 100);
    assert!(bench.offsets().is_empty());
    bench.advance(100);
    assert_eq!(bench.offsets().len(), 1, "the timer of the next probe was set again");
    let mut restored = Engine::new(EngineSettings::default());
    for (key, value) in bench.engine.take_dirty_rows() {
        restored.restore_row(&key, &value.unwrap()).unwrap();
    }
    bench.engine = restored;
    let mut out = Effects::default();
    bench.engine.boot(bench.now, bench.lsn, "machine", &mut out);
    bench.end_turn(out);
    assert_eq!(bench.describe().outage.map(|outage| outage.limit), Some(1));
}

#[test]
fn a_move_while_it_is_on_is_replayed() {
    let mut bench = down(20);
    bench.advance(200);
    assert_eq!(bench.offsets().len(), 1);
    bench.seek(SeekTo::Beginning);
    bench.reopen();
    bench.subscribe(2, "a", 100);
    bench.advance(200);
    assert_eq!(bench.offsets().len(), 1);
}
