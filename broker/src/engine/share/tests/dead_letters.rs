//! Dead letters: how they come about, their topics, redrive and `complete`.

use crate::engine::command::{AppendEntry, Command, LetterError, Settlement};
use crate::engine::effect::{RecordState, Reply, SettleStatus};
use crate::engine::error::EngineError;
use crate::engine::testing::{Bench, TOPIC, leased, nack, reject, staged};
use crate::engine::types::{Level, PartitionKey, SubscriptionId, TopicId};

#[test]
fn dead_letters_that_cannot_be_made_do_not_use_up_the_places_of_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 100).unwrap();
    bench.subscribe(1, "a", 100);
    bench.unreadable = Some(LetterError::Record("damaged".to_owned()));
    for (lease, _, _) in bench.delivered() {
        bench.settle("a", lease, reject());
    }
    assert_eq!(bench.counts().held, 100);
}

#[test]
fn a_dead_letter_is_made_later_when_the_disk_failed() {
    let (mut bench, lease) = leased(&[]);
    bench.unreadable = Some(LetterError::Disk);
    bench.settle("a", lease, reject());
    for _ in 0..3 {
        bench.advance(1_000);
        assert_eq!((bench.counts().held, bench.counts().dead_lettered), (0, 0));
    }
    bench.unreadable = None;
    bench.advance(1_000);
    assert_eq!((bench.counts().held, bench.counts().dead_lettered), (0, 1));
    assert_eq!(bench.contexts.last().unwrap().reason, "rejected");
}

#[test]
fn an_exhausted_record_is_dead_lettered_in_one_frame_and_once_also_after_a_crash_in_between() {
    let (mut bench, lease) = leased(&[("max-failures", "1")]);
    bench.hold_letters = true;
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::DeadLettered));
    assert_eq!(bench.counts().dead_lettered, 0);
    bench.hold_letters = false;
    bench.reopen();
    let frames = bench.frames.len();
    assert_eq!(bench.counts().dead_lettered, 1);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    assert_eq!((letters[0].topic.name.as_str(), letters[0].pending), ("dlq.pay.orders", 1));
    bench.reopen();
    assert_eq!(bench.counts().dead_lettered, 1);
    let with_batch = bench.frames[..frames].iter().filter(|(_, batches)| !batches.is_empty()).count();
    assert_eq!(with_batch, 2, "the record and its dead letter");
}

#[test]
fn a_redrive_may_write_to_its_own_topic_and_no_other_that_belongs_to_a_group() {
    let (mut bench, record) = leased(&[]);
    bench.settle("a", record, reject());
    let group = "redrive.pay.orders";
    let reply = bench.ask(Command::ShareSubscribe {
        subscription: SubscriptionId(2),
        group: group.to_owned(),
        member: "a".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    });
    assert_eq!(reply, Reply::Done);
    let record = bench.take_one();
    let Reply::Metadata { topics, .. } = bench.ask(Command::Metadata { names: Vec::new() }) else { panic!() };
    let mut complete = |name: &str| {
        let topic = topics.iter().find(|topic| topic.name == name).unwrap().id;
        let output = AppendEntry { partition: PartitionKey { topic, partition: 0 }, batch: staged(None, 1) };
        let (group, member) = (group.to_owned(), "a".to_owned());
        bench.ask(Command::Complete { group, member, record, outputs: vec![output] })
    };
    assert!(matches!(complete("dlq.pay.orders"), Reply::Error(EngineError::ForeignProducer(_))));
    assert!(matches!(complete(group), Reply::Completed { .. }));
}

#[test]
fn who_redrives_a_dead_letter_topic_is_told_when_it_goes() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let reply = bench.ask(Command::ShareSubscribe {
        subscription: SubscriptionId(1),
        group: "redrive.pay.orders".to_owned(),
        member: "redriver".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    });
    assert_eq!(reply, Reply::Done);
    bench.ask(Command::DeleteGroup { group: "pay".to_owned(), force: false });
    bench.ask(Command::DeleteTopic { name: "dlq.pay.orders".to_owned() });
    assert_eq!(bench.ended.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [SubscriptionId(1)]);
    assert!(bench.engine.subscriptions.is_empty());
}

#[test]
fn producers_may_not_write_to_a_dead_letter_topic() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let partition = PartitionKey { topic: letters[0].topic.id, partition: 0 };
    let entry = AppendEntry { partition, batch: staged(None, 1) };
    assert!(matches!(bench.append_entry(entry, Level::Synced), Err(EngineError::ForeignProducer(_))));
}

#[test]
fn complete_appends_its_outputs_with_the_ack_or_not_at_all() {
    let (mut bench, record) = leased(&[]);
    let complete = |bench: &mut Bench| {
        let other = PartitionKey { topic: TOPIC, partition: 1 };
        let outputs = vec![AppendEntry { partition: other, batch: staged(None, 2) }];
        let (group, member) = ("pay".to_owned(), "a".to_owned());
        match bench.ask(Command::Complete { group, member, record, outputs }) {
            Reply::Completed { result, base_offsets } => (result.status, base_offsets),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(complete(&mut bench), (SettleStatus::Ok, vec![0]));
    assert_eq!(complete(&mut bench), (SettleStatus::Duplicate, vec![]));
    bench.reopen();
    assert_eq!(complete(&mut bench), (SettleStatus::Duplicate, vec![]));
}

#[test]
fn the_group_behind_a_dead_letter_topic_cannot_be_deleted_alone() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let reply = bench.ask(Command::DeleteGroup { group: letters[0].redrive_group.clone(), force: false });
    assert!(matches!(reply, Reply::Error(EngineError::InvalidRequest(_))), "{reply:?}");
}

fn create(bench: &mut Bench, group: &str, topic: &str) -> Reply {
    let (group, topics) = (group.to_owned(), vec![topic.to_owned()]);
    bench.ask(Command::CreateShareGroup { group, topics, config: Vec::new(), from_end: false })
}

#[test]
fn the_topic_comes_with_the_group_and_has_the_partitions_of_its_source() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let topic = &letters[0].topic;
    assert_eq!((topic.name.as_str(), topic.partitions), ("dlq.pay.orders", 2));
    assert!(
        topic.config.contains(&("retention.ms".to_owned(), "1209600000".to_owned())),
        "{:?}",
        topic.config
    );
}

#[test]
fn a_letter_lies_in_the_partition_of_its_record() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let partition = PartitionKey { topic: TOPIC, partition: 1 };
    bench.append_entry(AppendEntry { partition, batch: staged(None, 1) }, Level::Synced).unwrap();
    bench.subscribe(1, "a", 1);
    let lease = bench.take_one();
    bench.settle("a", lease, reject());
    let letters: Vec<u32> =
        bench.log.iter().filter(|(key, _)| key.topic != TOPIC).map(|(key, _)| key.partition).collect();
    assert_eq!(letters, [1]);
}

#[test]
fn names_of_dead_letter_topics_are_kept_for_groups() {
    let mut bench = Bench::new();
    let (id, config) = (TOPIC, Vec::new());
    let create = Command::CreateTopic { id, name: "dlq.pay.orders".to_owned(), partitions: 1, config };
    assert!(matches!(bench.ask(create), Reply::Error(EngineError::InvalidName(_))));
}

#[test]
fn a_name_that_clashes_with_another_groups_is_refused() {
    // Group `a` on `b.c` and group `a.b` on `c` want the same name.
    let mut bench = Bench::new();
    for (i, name) in ["b.c", "c"].into_iter().enumerate() {
        let id = TopicId([20 + i as u8; 16]);
        bench.ask(Command::CreateTopic { id, name: name.to_owned(), partitions: 1, config: Vec::new() });
    }
    assert_eq!(create(&mut bench, "a", "b.c"), Reply::Done);
    let frames = bench.frames.len();
    assert!(matches!(create(&mut bench, "a.b", "c"), Reply::Error(EngineError::TopicExists(_))));
    assert_eq!(bench.frames.len(), frames, "refused as a whole");
}

#[test]
fn letters_outlive_their_group_and_its_successor_goes_on_with_them() {
    let (mut bench, lease) = leased(&[]);
    bench.settle("a", lease, reject());
    bench.advance(20_000);
    bench.ask(Command::DeleteGroup { group: "pay".to_owned(), force: false });
    let pending = |bench: &mut Bench| match bench.ask(Command::ListDeadLetters { group: None }) {
        Reply::DeadLetters(letters) => letters.iter().map(|letters| letters.pending).sum::<u64>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(pending(&mut bench), 1);
    bench.group(&[]);
    assert_eq!(pending(&mut bench), 1);
}

#[test]
fn an_exhausted_dead_letter_is_held() {
    let (mut bench, lease) = leased(&[]);
    bench.settle("a", lease, reject());
    assert_eq!(create(&mut bench, "morgue", "dlq.pay.orders"), Reply::Done);
    let subscribe = Command::ShareSubscribe {
        subscription: SubscriptionId(2),
        group: "morgue".to_owned(),
        member: "m".to_owned(),
        credit_records: 1,
        credit_bytes: 1 << 20,
        held: Vec::new(),
    };
    assert_eq!(bench.ask(subscribe), Reply::Done);
    let record = bench.take_one();
    let settlements = vec![Settlement { record, outcome: reject() }];
    let (group, member, level) = ("morgue".to_owned(), "m".to_owned(), Level::Synced);
    let Reply::Settled(results) = bench.ask(Command::Settle { group, member, level, settlements }) else {
        panic!()
    };
    assert_eq!(results[0].state, Some(RecordState::Held));
    let Reply::Metadata { topics, .. } = bench.ask(Command::Metadata { names: Vec::new() }) else { panic!() };
    assert!(topics.iter().all(|topic| !topic.name.contains("morgue")), "no dead letters of dead letters");
}

#[test]
fn two_groups_on_a_topic_have_letters_of_their_own() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(create(&mut bench, "mail", "orders"), Reply::Done);
    bench.settle("a", lease, reject());
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let found: Vec<(&str, u64)> =
        letters.iter().map(|letters| (letters.group.as_str(), letters.pending)).collect();
    assert_eq!(found.iter().filter(|(group, _)| *group == "pay").map(|(_, n)| n).sum::<u64>(), 1);
    assert_eq!(found.iter().filter(|(group, _)| *group == "mail").map(|(_, n)| n).sum::<u64>(), 0);
}
