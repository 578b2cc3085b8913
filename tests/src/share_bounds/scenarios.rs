//! What must hold when a share group is at its limits. Each scenario checks it as it goes, and panics where it does not.

use std::time::Duration;

use felucca_broker::engine::command::{Command, FailureDetail, LeaseRef, Outcome, ScannedRecord, Settlement};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::share::key_slot;

use super::bench::{Bench, resident_bytes};

const HOUR_MS: u64 = 3_600_000;
/// Settings of a group whose records fail on purpose, again and again.
const FAILING: [(&str, &str); 3] =
    [("outage-guard", "off"), ("max-failures", "1000000"), ("max-deliveries", "1000000")];
/// Records of one settlement request.
const PER_REQUEST: usize = 64;
const CREDIT: u32 = 4096;
/// By so much the resident memory of a small process wavers, whatever is kept in it.
pub const WAVERING_BYTES: f64 = 524_288.0;

/// One part of a long run.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Settled per second of processor time.
    pub per_second: f64,
    /// Resident memory of the process at its end.
    pub resident: u64,
    /// What the group is charged for at its end.
    pub charged: u64,
}

fn unkeyed(offset: u64) -> ScannedRecord {
    ScannedRecord { offset, slot: None, size: 100 }
}

fn nack(delay_ms: Option<u64>) -> Outcome {
    Outcome::Nack { delay_ms, counted: true, detail: FailureDetail::default() }
}

/// Requests of member `w` that settle leases as `outcome` says, and give the credit back.
fn settlements(leases: &[LeaseRef], outcome: &dyn Fn(u64) -> Option<Outcome>) -> Vec<Command> {
    let mut commands: Vec<Command> = leases
        .chunks(PER_REQUEST)
        .map(|some| {
            let outcomes =
                some.iter().filter_map(|lease| outcome(lease.offset).map(|outcome| (lease, outcome)));
            let settlements = outcomes.map(|(record, outcome)| Settlement { record: *record, outcome });
            Bench::settlement("pay", "w", settlements.collect())
        })
        .collect();
    if !leases.is_empty() {
        commands.push(Bench::credit(1, leases.len() as u32));
    }
    commands
}

/// Works off what is granted to member `w` until so many records were settled.
fn work(bench: &mut Bench, records: u64, outcome: &dyn Fn(u64) -> Option<Outcome>) {
    let mut settled = 0;
    let mut idle = 0;
    while settled < records {
        let leases = bench.take_granted(1);
        settled += leases.iter().filter(|lease| outcome(lease.offset).is_some()).count() as u64;
        idle = if leases.is_empty() { idle + 1 } else { 0 };
        assert!(idle < 1_000, "nothing more is handed out after {settled} of {records} records");
        let commands = settlements(&leases, outcome);
        bench.pass(1);
        bench.turn(commands);
    }
}

fn window(bench: &mut Bench, records: u64, outcome: &dyn Fn(u64) -> Option<Outcome>) -> Window {
    bench.engine_time = Duration::ZERO;
    work(bench, records, outcome);
    let per_second = records as f64 / bench.engine_time.as_secs_f64();
    let charged = bench.partition("pay", 0).memory_bytes;
    Window { per_second, resident: resident_bytes(), charged }
}

/// Acknowledges so many records while the first one of the partition fails again and again.
pub fn acks_above_a_stuck_record(records: u64) -> Vec<Window> {
    let mut bench = Bench::new(EngineSettings::default(), 1, unkeyed);
    bench.create_group("pay", &FAILING);
    bench.subscribe("pay", 1, "w", CREDIT);
    let part = records / 10;
    let outcome = |offset| Some(if offset == 0 { nack(Some(5)) } else { Outcome::Ack });
    let windows: Vec<Window> = (0..10)
        .map(|_| {
            bench.append(0, part);
            window(&mut bench, part, &outcome)
        })
        .collect();
    let end = bench.partition("pay", 0);
    assert!(end.failures > 1, "the first record was not tried again");
    assert_eq!(end.oldest_unsettled, Some(0));
    assert!(end.acked + u64::from(CREDIT) >= records, "{end:?}");
    windows
}

/// What [`a_partition_in_retry`] took.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    pub records: u64,
    /// Memory for each record that waits for its next attempt.
    pub resident_each: f64,
    pub charged_each: f64,
    /// Records that failed, and that were acknowledged at their second attempt, per second of processor time.
    pub failed_per_second: f64,
    pub retried_per_second: f64,
}

impl Retry {
    /// A record that waits takes a few hundred bytes, no fewer are charged than it takes, and those that come back are
    /// handed out about as quickly as new ones.
    pub fn assert_bounded(&self) {
        assert!(self.charged_each < 500.0, "{self:?}");
        let wavering = WAVERING_BYTES / self.records as f64;
        assert!(
            self.resident_each <= self.charged_each * 1.1 + wavering,
            "more is taken than is charged: {self:?}"
        );
        assert!(self.retried_per_second * 3.0 >= self.failed_per_second, "{self:?}");
    }
}

/// Every record of a partition fails and waits, none of them uses a lease meanwhile, new ones flow beside them, and then
/// all come back and are acknowledged.
pub fn a_partition_in_retry(records: u64) -> Retry {
    let mut bench = Bench::new(EngineSettings::default(), 1, unkeyed);
    let config = [&FAILING[..], &[("backoff-initial", "1h"), ("backoff-max", "1h")]].concat();
    bench.create_group("pay", &config);
    bench.subscribe("pay", 1, "w", CREDIT);
    bench.append(0, records);
    let before = resident_bytes();
    let failing = window(&mut bench, records, &|_| Some(nack(None)));
    let waiting = bench.partition("pay", 0);
    assert_eq!((waiting.scheduled, waiting.leased), (records, 0));
    let resident = resident_bytes().saturating_sub(before);

    let new = records / 10;
    bench.append(0, new);
    work(&mut bench, new, &|_| Some(Outcome::Ack));
    assert_eq!(bench.partition("pay", 0).acked, new);

    bench.pass(HOUR_MS * 7 / 10);
    let mut retried = 0;
    bench.engine_time = Duration::ZERO;
    while retried < records {
        // All are due within two fifths of an hour.
        bench.pass(HOUR_MS / 2_000);
        bench.seen("pay", &["w".to_owned()]);
        bench.rest();
        loop {
            let leases = bench.take_granted(1);
            if leases.is_empty() {
                break;
            }
            retried += leases.len() as u64;
            let commands = settlements(&leases, &|_| Some(Outcome::Ack));
            bench.turn(commands);
        }
    }
    let end = bench.partition("pay", 0);
    assert_eq!((end.lag, end.scheduled, end.failures), (0, 0, records));
    Retry {
        records,
        resident_each: resident as f64 / records as f64,
        charged_each: failing.charged as f64 / records as f64,
        failed_per_second: failing.per_second,
        retried_per_second: records as f64 / bench.engine_time.as_secs_f64(),
    }
}

/// What [`one_stuck_key`] took.
#[derive(Clone, Debug)]
pub struct StuckKey {
    pub windows: Vec<Window>,
    /// Offsets of the key that were kept, at most.
    pub parked: u64,
    /// Records of the key handed out one after the other, per second of processor time.
    pub drained_per_second: f64,
}

impl StuckKey {
    /// What is kept of the key that is stuck, and of what is looked at and worked on of the others.
    pub fn assert_bounded(&self) {
        let most = EngineSettings::default().max_parked_per_slot as u64 + 3 * u64::from(CREDIT);
        assert!(self.parked <= most, "{} parked", self.parked);
    }
}

/// So many records wait behind one of their key while a hundred other keys flow, and then go out in their order.
pub fn one_stuck_key(records: u64) -> StuckKey {
    let stuck = key_slot(b"stuck");
    let others: Vec<u16> = (0..100_u32).map(|key| key_slot(&key.to_be_bytes())).collect();
    assert!(!others.contains(&stuck));
    let record_at = move |offset: u64| {
        let slot = if offset.is_multiple_of(2) { stuck } else { others[(offset / 2 % 100) as usize] };
        ScannedRecord { offset, slot: Some(slot), size: 100 }
    };
    let mut bench = Bench::new(EngineSettings::default(), 1, record_at);
    bench.create_group("pay", &[("ordering", "key"), ("lease", "12h")]);
    bench.subscribe("pay", 1, "w", CREDIT);
    let part = records / 10;
    let mut parked = 0;
    let mut windows = Vec::new();
    bench.append(0, 1);
    bench.rest();
    let mut next = bench.take_granted(1).pop().expect("the first record is granted");
    for _ in 0..10 {
        bench.append(0, 2 * part);
        windows.push(window(&mut bench, part, &|_| Some(Outcome::Ack)));
        parked = parked.max(bench.partition("pay", 0).parked);
    }
    let end = bench.partition("pay", 0);
    assert_eq!((end.acked, end.lag, end.leased), (10 * part, 10 * part + 1, 1));
    bench.engine_time = Duration::ZERO;
    for offset in (0..=20 * part).step_by(2) {
        assert_eq!(next.offset, offset, "out of order");
        let acked = bench.settle("pay", "w", &[next], &Outcome::Ack);
        assert_eq!(acked.len(), 1);
        bench.turn(vec![Bench::credit(1, 1)]);
        let mut granted = bench.take_granted(1);
        if granted.is_empty() {
            bench.rest();
            granted = bench.take_granted(1);
        }
        match granted[..] {
            [lease] => next = lease,
            [] => assert_eq!(offset, 20 * part, "the key does not go on"),
            _ => panic!("two records of a key at a time: {granted:?}"),
        }
    }
    assert_eq!(bench.partition("pay", 0).lag, 0);
    let drained_per_second = (10 * part) as f64 / bench.engine_time.as_secs_f64();
    StuckKey { windows, parked, drained_per_second }
}

/// So many leases expire at once. Answers how many records were handed out again in each hundredth of a second after it, as
/// long as there was credit for half of them.
pub fn leases_that_expire_together(leases: u32) -> Vec<usize> {
    let mut bench = Bench::new(EngineSettings::default(), 1, unkeyed);
    bench.create_group("pay", &FAILING);
    bench.append(0, u64::from(leases));
    let members: Vec<String> = (0..10).map(|i| format!("m{i}")).collect();
    for (id, member) in (0..).zip(&members) {
        bench.subscribe("pay", id, member, leases / 10);
    }
    bench.rest();
    let granted = |bench: &mut Bench| (0..10).map(|id| bench.take_granted(id).len()).sum::<usize>();
    assert_eq!(granted(&mut bench), leases as usize);
    for _ in 0..6 {
        bench.seen("pay", &members);
        bench.advance(5_000);
    }
    let expired = bench.partition("pay", 0);
    assert_eq!((expired.leased, expired.scheduled), (0, u64::from(leases)));
    // What was not settled gives no credit back: each member asks for so much more, and gets no more.
    let more = leases / 20;
    bench.turn((0..10).map(|id| Bench::credit(id, more)).collect());
    let mut spread = Vec::new();
    for _ in 0..150 {
        bench.seen("pay", &members);
        bench.advance(10);
        spread.push(granted(&mut bench));
    }
    assert_eq!(spread.iter().sum::<usize>(), (10 * more) as usize, "as many again as there is credit");
    bench.turn((0..10).map(|id| Bench::credit(id, more)).collect());
    bench.rest();
    assert_eq!(granted(&mut bench), (leases - 10 * more) as usize);
    spread
}

/// Of leases that expired together, no hundredth of a second sees more than an eighth of those that are tried again.
pub fn assert_spread(spread: &[usize]) {
    let most = spread.iter().copied().max().unwrap_or(0);
    let all: usize = spread.iter().sum();
    assert!(most * 8 <= all, "{spread:?}");
}

/// What [`members_come_and_go`] took.
#[derive(Clone, Copy, Debug)]
pub struct Members {
    /// Processor time for one of them that comes back with its leases, and for one that is lost with them.
    pub returned: Duration,
    pub lost: Duration,
}

impl Members {
    /// One costs no more where there are many others than where there are `few`, but for the depth of trees and what a
    /// processor has at hand.
    pub fn assert_like(&self, few: &Self) {
        for (one, of_few) in [(self.returned, few.returned), (self.lost, few.lost)] {
            assert!(one <= of_few * 4, "{self:?}, {few:?} where there are few");
        }
    }
}

/// So many members with ten leases each subscribe anew, all of them, and then are silent for their session.
pub fn members_come_and_go(members: u32) -> Members {
    const EACH: u32 = 10;
    let mut bench = Bench::new(EngineSettings::default(), 1, unkeyed);
    bench.create_group("pay", &FAILING);
    bench.append(0, u64::from(members * EACH));
    let names: Vec<String> = (0..members).map(|i| format!("member-{i}")).collect();
    for (id, member) in (0..).zip(&names) {
        bench.subscribe("pay", id, member, EACH);
    }
    bench.rest();
    let held: Vec<Vec<LeaseRef>> = (0..).zip(&names).map(|(id, _)| bench.take_granted(id)).collect();
    assert!(held.iter().all(|leases| leases.len() == EACH as usize));

    bench.engine_time = Duration::ZERO;
    for ((id, member), held) in (u64::from(members)..).zip(&names).zip(held) {
        bench.resubscribe("pay", id, member, 0, held);
    }
    let returned = bench.engine_time / members;
    assert_eq!(bench.partition("pay", 0).leased, u64::from(members * EACH));

    bench.engine_time = Duration::ZERO;
    bench.advance(20_000);
    let lost = bench.engine_time / members;
    let end = bench.partition("pay", 0);
    assert_eq!((end.leased, end.failures), (0, u64::from(members * EACH)));
    Members { returned, lost }
}

/// What [`idle_groups`] took.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Memory of one group that has no members, with its dead-letter topic and what redrives it.
    pub resident_each: f64,
    /// Processor time of a turn with one appended batch, without and with the groups.
    pub turn_alone: Duration,
    pub turn: Duration,
}

impl Idle {
    /// A group that nobody uses takes some kilobytes, and no time when records arrive.
    pub fn assert_bounded(&self) {
        assert!(self.resident_each < 32_768.0, "{self:?}");
        assert!(self.turn < self.turn_alone * 3, "{self:?}");
    }
}

/// Groups on one topic of one partition that nobody uses.
pub fn idle_groups(groups: u32) -> Idle {
    let settings = EngineSettings {
        max_topics: 10 * u64::from(groups),
        max_groups: 10 * u64::from(groups),
        ..EngineSettings::default()
    };
    let mut bench = Bench::new(settings, 1, unkeyed);
    bench.create_group("pay", &[]);
    bench.subscribe("pay", 1, "w", 0);
    let turn = |bench: &mut Bench| {
        let turns = 200;
        bench.engine_time = Duration::ZERO;
        for _ in 0..turns {
            bench.pass(1);
            bench.append(0, 1);
        }
        bench.engine_time / turns
    };
    let turn_alone = turn(&mut bench);
    let before = resident_bytes();
    for i in 0..groups {
        bench.create_group(&format!("idle-{i}"), &[]);
    }
    let _ = bench.engine.take_dirty_rows();
    let resident = resident_bytes().saturating_sub(before);
    Idle { resident_each: resident as f64 / f64::from(groups), turn_alone, turn: turn(&mut bench) }
}
