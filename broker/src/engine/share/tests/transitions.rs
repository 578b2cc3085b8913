//! The states of a record, row by row of the table of transitions, with what each counts.

use crate::engine::command::{Command, FailureDetail, Outcome};
use crate::engine::effect::{Effects, GroupPartitionInfo, RecordState, SettleStatus};
use crate::engine::testing::{Bench, EXTEND, leased, nack, reject};

const QUICK: [(&str, &str); 3] = [("backoff-initial", "1s"), ("backoff-max", "1s"), ("jitter", "0")];

fn states(counts: &GroupPartitionInfo) -> [u64; 4] {
    [counts.available, counts.leased, counts.scheduled, counts.acked]
}

fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    QUICK.iter().chain(more).copied().collect()
}

#[test]
fn available_to_leased_counts_a_delivery() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 1).unwrap();
    assert_eq!(states(&bench.counts()), [1, 0, 0, 0]);
    bench.subscribe(1, "a", 1);
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.deliveries), ([0, 1, 0, 0], 1));
}

#[test]
fn leased_to_acked_by_an_ack() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.settle("a", lease, Outcome::Ack).state, Some(RecordState::Acked));
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.failures, counts.lag), ([0, 0, 0, 1], 0, 0));
}

#[test]
fn leased_to_scheduled_by_a_nack_counts_a_failure() {
    let (mut bench, lease) = leased(&QUICK);
    let detail = FailureDetail::default();
    let result = bench.settle("a", lease, Outcome::Nack { delay_ms: None, counted: true, detail });
    assert_eq!((result.state, result.remaining_ms), (Some(RecordState::Scheduled), 1_000));
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.failures), ([0, 0, 1, 0], 1));
}

#[test]
fn a_nack_may_override_the_delay_and_not_count() {
    let (mut bench, lease) = leased(&with(&[("max-failures", "1")]));
    let detail = FailureDetail::default();
    let result = bench.settle("a", lease, Outcome::Nack { delay_ms: Some(70), counted: false, detail });
    assert_eq!((result.state, result.remaining_ms), (Some(RecordState::Scheduled), 70));
    assert_eq!(bench.counts().failures, 0);
}

#[test]
fn leased_to_scheduled_by_an_expired_lease_counts_a_failure() {
    let (mut bench, _) = leased(&with(&[("lease", "2s")]));
    bench.advance(1_999);
    assert_eq!(states(&bench.counts()), [0, 1, 0, 0]);
    bench.advance(1);
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.failures), ([0, 0, 1, 0], 1));
}

#[test]
fn leased_to_scheduled_by_a_lost_member_counts_a_failure() {
    let (mut bench, _) = leased(&QUICK);
    bench.advance(10_000);
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.failures), ([0, 0, 1, 0], 1));
}

#[test]
fn leased_to_available_by_a_release_is_no_failure() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.settle("a", lease, Outcome::Release).state, Some(RecordState::Available));
    let counts = bench.counts();
    assert_eq!((states(&counts), counts.failures), ([1, 0, 0, 0], 0));
    bench.credit(1, 1);
    assert_eq!(bench.delivered()[0].1, 2, "a second delivery");
}

#[test]
fn leased_to_leased_by_an_extension_which_never_shortens() {
    let (mut bench, lease) = leased(&[("lease", "10s")]);
    let shorter = bench.settle("a", lease, Outcome::Extend { remaining_ms: Some(3_000) });
    assert_eq!((shorter.state, shorter.remaining_ms), (Some(RecordState::Leased), 10_000));
    bench.advance(5_000);
    assert_eq!(bench.settle("a", lease, EXTEND).remaining_ms, 10_000);
}

#[test]
fn an_extension_ends_with_the_longest_lease() {
    let (mut bench, lease) = leased(&[("lease", "4s"), ("max-lease", "6s")]);
    bench.advance(3_000);
    assert_eq!(bench.settle("a", lease, EXTEND).remaining_ms, 3_000);
    assert_eq!(bench.settle("a", lease, Outcome::Extend { remaining_ms: Some(60_000) }).remaining_ms, 3_000);
    bench.advance(3_000);
    assert_eq!(bench.counts().scheduled, 1);
}

/// The reason of the one dead letter that came about, with its class and message.
fn dead(bench: &mut Bench) -> (&'static str, String, String) {
    let counts = bench.counts();
    assert_eq!((counts.dead_lettered, counts.lag), (1, 0));
    let context = bench.contexts.pop().unwrap();
    (context.reason, context.class, context.message)
}

fn failed_as(class: &str, reason: &str) -> Outcome {
    let (class, reason) = (class.to_owned(), reason.to_owned());
    let detail = FailureDetail { class, reason, detail: String::new() };
    Outcome::Nack { delay_ms: Some(0), counted: true, detail }
}

#[test]
fn leased_to_dead_lettered_by_a_reject() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.settle("a", lease, reject()).state, Some(RecordState::DeadLettered));
    assert_eq!(dead(&mut bench).0, "rejected");
}

#[test]
fn leased_to_dead_lettered_by_a_class_that_is_not_retryable() {
    let (mut bench, lease) = leased(&[("non-retryable-classes", "schema bug")]);
    assert_eq!(bench.settle("a", lease, failed_as("schema", "")).state, Some(RecordState::DeadLettered));
    let (reason, class, message) = dead(&mut bench);
    assert_eq!((reason, class.as_str()), ("rejected", "schema"));
    assert_eq!(message, "failures of class \"schema\" are not retried");
    let (mut bench, lease) = leased(&[("non-retryable-classes", "schema bug")]);
    bench.settle("a", lease, failed_as("bug", "division by zero"));
    assert_eq!(dead(&mut bench).2, "division by zero");
}

#[test]
fn leased_to_dead_lettered_at_the_most_failures() {
    let (mut bench, lease) = leased(&[("max-failures", "2")]);
    assert_eq!(bench.settle("a", lease, failed_as("io", "no route")).state, Some(RecordState::Scheduled));
    bench.credit(1, 1);
    bench.advance(0);
    let again = bench.take_one();
    assert_eq!(bench.settle("a", again, failed_as("io", "no route")).state, Some(RecordState::DeadLettered));
    assert_eq!(dead(&mut bench), ("max_failures", "io".to_owned(), "no route".to_owned()));
}

#[test]
fn leased_to_dead_lettered_by_a_last_lease_that_expired_or_a_member_that_was_lost() {
    let (mut bench, _) = leased(&[("max-failures", "1"), ("lease", "1s")]);
    bench.advance(1_000);
    assert_eq!(dead(&mut bench).0, "lease_expired");
    let (mut bench, _) = leased(&[("max-failures", "1")]);
    bench.advance(10_000);
    assert_eq!(dead(&mut bench).0, "member_lost");
}

#[test]
fn leased_to_dead_lettered_at_the_cap_of_deliveries() {
    let (mut bench, mut lease) = leased(&[("max-deliveries", "3")]);
    let at_once = || Outcome::Nack { delay_ms: Some(0), counted: false, detail: FailureDetail::default() };
    // What was given back without having been tried does not count.
    for outcome in [at_once(), Outcome::Release, at_once(), Outcome::Release, Outcome::Release] {
        bench.settle("a", lease, outcome);
        bench.credit(1, 1);
        bench.advance(0);
        lease = bench.take_one();
    }
    assert_eq!(bench.settle("a", lease, at_once()).state, Some(RecordState::DeadLettered));
    assert_eq!(dead(&mut bench).0, "max_deliveries");
}

#[test]
fn the_reason_of_a_dead_letter_is_that_of_its_time() {
    let (mut bench, lease) = leased(&[("max-failures", "1")]);
    bench.hold_letters = true;
    bench.settle("a", lease, nack());
    bench.alter(&[("max-deliveries", "1")]);
    bench.hold_letters = false;
    bench.reopen();
    assert_eq!(dead(&mut bench).0, "max_failures");
}

#[test]
fn leased_to_held_keeps_the_record_in_place() {
    let (mut bench, lease) = leased(&[("on-exhausted", "hold"), ("max-failures", "1")]);
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Held));
    bench.credit(1, 1);
    bench.advance(1_000_000);
    let counts = bench.counts();
    assert_eq!((counts.held, counts.lag, counts.available), (1, 1, 0));
    assert!(bench.offsets().is_empty());
}

#[test]
fn leased_to_discarded_is_counted() {
    let (mut bench, lease) = leased(&[("on-exhausted", "discard"), ("max-failures", "1")]);
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Discarded));
    let counts = bench.counts();
    assert_eq!((counts.discarded, counts.dead_lettered, counts.lag), (1, 0, 0));
}

/// Whatever ends a record, `on-exhausted` says where it goes.
#[test]
fn every_end_of_a_record_may_be_the_dead_letters_a_hold_or_a_discard() {
    let ends = [
        ("a reject", Some(reject()), "30s", ("jitter", "0")),
        ("a final class", Some(failed_as("fatal", "")), "30s", ("non-retryable-classes", "fatal")),
        ("the most failures", Some(nack()), "30s", ("max-failures", "1")),
        ("the cap of deliveries", Some(nack()), "30s", ("max-deliveries", "1")),
        ("an expired lease", None, "5s", ("max-failures", "1")),
        ("a lost member", None, "30s", ("max-failures", "1")),
    ];
    for (name, outcome, lasts, setting) in ends {
        for (to, expected) in [("dead-letter", [1, 0, 0]), ("hold", [0, 1, 0]), ("discard", [0, 0, 1])] {
            let (mut bench, lease) = leased(&[("on-exhausted", to), ("lease", lasts), setting]);
            match outcome.clone() {
                Some(outcome) => drop(bench.settle_all("a", &[lease], &outcome)),
                // The lease of 5 s ends before the session of 10 s does.
                None => (0..10).for_each(|_| bench.advance(1_000)),
            }
            let counts = bench.counts();
            let found = [counts.dead_lettered, counts.held, counts.discarded];
            assert_eq!((found, counts.leased), (expected, 0), "{name}, {to}");
        }
    }
}

#[test]
fn scheduled_to_available_when_due() {
    let (mut bench, lease) = leased(&QUICK);
    bench.settle("a", lease, nack());
    bench.advance(99);
    assert_eq!(states(&bench.counts()), [0, 0, 1, 0]);
    bench.advance(1);
    assert_eq!(states(&bench.counts()), [1, 0, 0, 0]);
}

#[test]
fn scheduled_to_acked_by_a_late_ack() {
    let (mut bench, lease) = leased(&with(&[("lease", "1s")]));
    bench.advance(1_000);
    assert_eq!(states(&bench.counts()), [0, 0, 1, 0]);
    assert_eq!(bench.settle("a", lease, Outcome::Ack).status, SettleStatus::Late);
    assert_eq!(states(&bench.counts()), [0, 0, 0, 1]);
    bench.credit(1, 1);
    bench.advance(60_000);
    assert!(bench.offsets().is_empty(), "never handed out again");
}

#[test]
fn available_to_acked_by_a_late_ack() {
    let (mut bench, lease) = leased(&with(&[("lease", "1s")]));
    bench.advance(1_000);
    bench.advance(1_000);
    assert_eq!(states(&bench.counts()), [1, 0, 0, 0]);
    assert_eq!(bench.settle("a", lease, Outcome::Ack).status, SettleStatus::Late);
    assert_eq!(states(&bench.counts()), [0, 0, 0, 1]);
    bench.credit(1, 1);
    assert!(bench.offsets().is_empty(), "never handed out again");
}

#[test]
fn offsets_without_a_record_are_skipped_and_those_below_the_log_expired() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 10).unwrap();
    // 0 to 3 are deleted, 6 went with a compaction.
    bench.log.retain(|(_, record)| record.offset != 6);
    bench.ask(Command::DeleteRecords { topic: "orders".to_owned(), partition: 0, before: 4 });
    bench.subscribe(1, "a", 100);
    assert_eq!(bench.offsets(), [4, 5, 7, 8, 9]);
    let counts = bench.counts();
    assert_eq!((counts.expired, counts.skipped, counts.lag), (4, 1, 5));
}

#[test]
fn counts_do_not_fall_with_a_crash() {
    let (mut bench, mut lease) = leased(&[("backoff-initial", "0s"), ("backoff-max", "0s")]);
    for attempt in 1..5 {
        bench.settle("a", lease, failed_as("io", ""));
        bench.reopen();
        bench.subscribe(10 + u64::from(attempt), "a", 1);
        bench.advance(0);
        let again = bench.delivered()[0];
        assert_eq!((again.1, again.2), (attempt + 1, attempt));
        lease = again.0;
    }
    let counts = bench.counts();
    assert_eq!((counts.deliveries, counts.failures), (5, 4));
}

#[test]
fn a_class_has_its_own_limits() {
    let config = [("class.io.max-failures", "1"), ("class.busy.backoff-initial", "7s"), ("jitter", "0")];
    let (mut bench, lease) = leased(&config);
    assert_eq!(bench.settle("a", lease, failed_as("io", "")).state, Some(RecordState::DeadLettered));
    let (mut bench, lease) = leased(&config);
    let detail = FailureDetail { class: "busy".to_owned(), ..FailureDetail::default() };
    let nacked = bench.settle("a", lease, Outcome::Nack { delay_ms: None, counted: true, detail });
    assert_eq!(nacked.remaining_ms, 7_000);
}

#[test]
fn settings_hold_from_the_next_failure_on_and_survive() {
    let (mut bench, lease) = leased(&QUICK);
    bench.alter(&[("max-failures", "1"), ("on-exhausted", "hold")]);
    bench.reopen();
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Held));
    let mut out = Effects::default();
    bench.engine.stop(&mut out);
    assert!(bench.describe().config.contains(&("max-failures".to_owned(), "1".to_owned())));
}
