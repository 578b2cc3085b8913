//! What an operator decides on held records.

use crate::engine::command::{Command, HeldFate, MAX_HELD_ENDED, Outcome};
use crate::engine::effect::{RecordState, Reply};
use crate::engine::testing::{Bench, leased, nack, reject};

fn end_held(bench: &mut Bench, fate: HeldFate) -> Reply {
    bench.ask(Command::EndHeld { group: "pay".to_owned(), topic: Some("orders".to_owned()), fate })
}

/// A key-ordered group whose first record of two is held.
fn first_of_key_held() -> (Bench, u32) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let failures = 2;
    let config =
        [("ordering", "key"), ("on-exhausted", "hold"), ("max-failures", "2"), ("outage-guard", "off")];
    bench.group(&config);
    bench.append(Some(b"k"), 2).unwrap();
    bench.subscribe(1, "a", 10);
    for _ in 0..failures {
        let lease = bench.take_one();
        bench.settle("a", lease, nack());
        bench.advance(100);
    }
    assert_eq!((bench.counts().held, bench.offsets()), (1, vec![]), "its key waits with it");
    (bench, failures)
}

#[test]
fn a_held_record_is_tried_again_as_if_it_had_never_failed() {
    let (mut bench, failures) = first_of_key_held();
    assert_eq!(end_held(&mut bench, HeldFate::Release), Reply::HeldEnded { records: 1, more: false });
    for attempt in 0..failures {
        let (lease, deliveries, failed) = bench.delivered().remove(0);
        assert_eq!((lease.offset, deliveries, failed), (0, failures + attempt + 1, attempt));
        if attempt == 0 {
            assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Scheduled));
            bench.reopen();
            bench.subscribe(2, "a", 10);
            bench.advance(100);
        } else {
            bench.settle("a", lease, Outcome::Ack);
        }
    }
    assert_eq!(bench.offsets(), [1], "its key goes on");
    assert_eq!(end_held(&mut bench, HeldFate::Release), Reply::HeldEnded { records: 0, more: false });
}

#[test]
fn a_released_record_begins_anew_with_the_cap_of_deliveries() {
    let (mut bench, lease) =
        leased(&[("on-exhausted", "hold"), ("max-failures", "9"), ("max-deliveries", "1")]);
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Held));
    bench.alter(&[("max-deliveries", "2")]);
    end_held(&mut bench, HeldFate::Release);
    bench.credit(1, 9);
    let lease = bench.take_one();
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Scheduled));
    bench.advance(100);
    let lease = bench.take_one();
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::Held));
}

#[test]
fn a_discarded_record_frees_its_key_when_that_is_synced() {
    let (mut bench, _) = first_of_key_held();
    bench.hold_sync = true;
    assert_eq!(end_held(&mut bench, HeldFate::Discard), Reply::HeldEnded { records: 1, more: false });
    let counts = bench.counts();
    assert_eq!((counts.held, counts.discarded, counts.lag), (0, 1, 1));
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
    bench.reopen();
    assert_eq!((bench.counts().held, bench.counts().discarded), (0, 1));
}

#[test]
fn held_records_are_ended_a_thousand_at_a_time() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("on-exhausted", "hold")]);
    bench.append(None, MAX_HELD_ENDED + 1).unwrap();
    bench.subscribe(1, "a", 2000);
    let leases: Vec<_> = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    bench.settle_all("a", &leases, &reject());
    assert_eq!(bench.counts().held, MAX_HELD_ENDED as u64 + 1);
    let all = MAX_HELD_ENDED as u64;
    assert_eq!(end_held(&mut bench, HeldFate::Discard), Reply::HeldEnded { records: all, more: true });
    assert_eq!(end_held(&mut bench, HeldFate::Discard), Reply::HeldEnded { records: 1, more: false });
    assert_eq!(bench.counts().discarded, all + 1);
}
