//! What an operator does to a group: kick, pause, seek, and what it sees.

use crate::engine::command::{Command, Outcome, SeekTo};
use crate::engine::config::EngineSettings;
use crate::engine::effect::{RecordState, Reply, ShareAlarm};
use crate::engine::error::EngineError;
use crate::engine::testing::{Bench, leased, nack, reject};

const SLOW: [(&str, &str); 3] = [("backoff-initial", "1h"), ("backoff-max", "1h"), ("ordering", "key")];

fn failed() -> Outcome {
    Outcome::Nack { delay_ms: None, counted: true, detail: Default::default() }
}

fn kick(bench: &mut Bench, topic: Option<&str>) -> Reply {
    bench.ask(Command::KickGroup { group: "pay".to_owned(), topic: topic.map(str::to_owned) })
}

#[test]
fn a_kick_makes_scheduled_records_due_and_counts_no_failure() {
    let (mut bench, lease) = leased(&SLOW);
    assert_eq!(bench.settle("a", lease, failed()).state, Some(RecordState::Scheduled));
    let before = bench.counts();
    assert_eq!(kick(&mut bench, None), Reply::Kicked { records: 1 });
    let counts = bench.counts();
    assert_eq!((counts.available, counts.scheduled, counts.failures), (1, 0, before.failures));
    assert_eq!(kick(&mut bench, None), Reply::Kicked { records: 0 });
    bench.credit(1, 1);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn a_kick_keeps_the_order_of_keys() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&SLOW);
    bench.append(Some(b"k"), 2).unwrap();
    bench.subscribe(1, "a", 5);
    let first = bench.take_one();
    bench.settle("a", first, failed());
    kick(&mut bench, None);
    assert_eq!(bench.offsets(), [0], "and the second waits for it");
}

#[test]
fn a_kick_survives_a_crash() {
    let (mut bench, lease) = leased(&SLOW);
    bench.settle("a", lease, failed());
    kick(&mut bench, Some("orders"));
    bench.reopen();
    bench.subscribe(2, "a", 1);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn a_kick_names_a_topic_of_the_group() {
    let (mut bench, lease) = leased(&SLOW);
    bench.settle("a", lease, failed());
    assert!(matches!(kick(&mut bench, Some("nowhere")), Reply::Error(EngineError::UnknownTopic(_))));
    assert!(matches!(kick(&mut bench, Some("dlq.pay.orders")), Reply::Error(EngineError::InvalidRequest(_))));
    assert_eq!(bench.counts().scheduled, 1);
}

#[test]
fn a_paused_group_hands_out_nothing_and_takes_settlements() {
    let (mut bench, lease) = leased(&[]);
    let pause = |bench: &mut Bench, paused| {
        assert_eq!(bench.ask(Command::PauseGroup { group: "pay".to_owned(), paused }), Reply::Done);
    };
    pause(&mut bench, true);
    bench.credit(1, 5);
    bench.append(None, 1).unwrap();
    assert!(bench.offsets().is_empty());
    assert_eq!(bench.settle("a", lease, Outcome::Ack).state, Some(RecordState::Acked));
    bench.reopen();
    bench.subscribe(2, "a", 5);
    assert!(bench.offsets().is_empty(), "paused after a crash too");
    pause(&mut bench, false);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_seek_forgets_what_was_before_it() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 5).unwrap();
    bench.subscribe(1, "a", 2);
    let leases = bench.delivered();
    bench.settle("a", leases[0].0, nack());
    bench.seek(SeekTo::Offset(4));
    let counts = bench.counts();
    assert_eq!((counts.leased, counts.scheduled, counts.lag, counts.available), (0, 0, 1, 1));
    let members = bench.describe().members;
    assert_eq!(members[0].leased, 0);
    bench.credit(1, 5);
    assert_eq!(bench.offsets(), [4]);
}

#[test]
fn every_state_is_counted_once() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 7).unwrap();
    bench.subscribe(1, "a", 5);
    let leases = bench.delivered();
    bench.hold_letters = true;
    for ((lease, _, _), outcome) in leases.iter().zip([Outcome::Ack, nack(), reject(), Outcome::Release]) {
        bench.settle("a", *lease, outcome);
    }
    let counts = bench.counts();
    // Released, and two that were never handed out.
    assert_eq!((counts.lag, counts.available), (6, 3));
    assert_eq!((counts.leased, counts.scheduled, counts.exhausted, counts.held), (1, 1, 1, 0));
    assert_eq!((counts.acked, counts.dead_lettered, counts.oldest_unsettled), (1, 0, Some(1)));
    assert_eq!((counts.deliveries, counts.failures), (5, 2));
}

#[test]
fn a_group_is_not_deleted_or_moved_while_a_dead_letter_is_being_made_unless_forced() {
    let (mut bench, lease) = leased(&[]);
    bench.hold_letters = true;
    bench.settle("a", lease, reject());
    let refused = |reply: Reply| {
        let Reply::Error(EngineError::GroupUnsettled { redriven, exhausted, .. }) = reply else {
            panic!("{reply:?}")
        };
        (redriven, exhausted)
    };
    let seek = |force| Command::SeekGroup {
        group: "pay".to_owned(),
        topic: "orders".to_owned(),
        positions: vec![(0, SeekTo::Beginning)],
        force,
    };
    assert_eq!(refused(bench.ask(seek(false))), (0, 1));
    bench.advance(20_000);
    let delete = |force| Command::DeleteGroup { group: "pay".to_owned(), force };
    assert_eq!(refused(bench.ask(delete(false))), (0, 1));
    assert_eq!(bench.ask(seek(true)), Reply::Done);
    assert_eq!(bench.ask(delete(false)), Reply::Done, "nothing is left to lose");
}

#[test]
fn what_cannot_be_read_is_told() {
    let (mut bench, lease) = leased(&[]);
    bench.settle("a", lease, Outcome::Ack);
    bench.append(None, 1).unwrap();
    bench.unscannable = Some("a bad sector".to_owned());
    bench.credit(1, 1);
    bench.advance(1);
    assert!(bench.offsets().is_empty());
    let told = bench.counts().unreadable.expect("an alarm");
    assert_eq!((told.offset, told.reason.as_str()), (1, "a bad sector"));
    bench.unscannable = None;
    bench.advance(1_000);
    assert_eq!((bench.offsets(), bench.counts().unreadable), (vec![1], None));
}

#[test]
fn a_full_table_of_leases_stops_new_records_only() {
    let mut bench = Bench::with(EngineSettings { max_leases: 8, ..EngineSettings::default() });
    bench.topic(&[]);
    bench.group(&[("outage-guard", "off")]);
    bench.append(None, 20).unwrap();
    bench.subscribe(1, "a", 20);
    let leases = bench.delivered();
    assert_eq!(leases.len(), 8, "the table is full");
    assert_eq!(bench.counts().alarms, [ShareAlarm::Leases]);
    bench.settle("a", leases[0].0, nack());
    assert_eq!(bench.offsets(), [8], "its place goes to a new record");
    bench.advance(100);
    assert_eq!(bench.offsets(), [0], "tried again all the same");
    bench.settle_all("a", &[leases[1].0, leases[2].0], &nack());
    assert_eq!(bench.offsets(), [9]);
    bench.advance(100);
    assert_eq!(bench.offsets(), [1], "within bounds: the other waits for a place");
}
