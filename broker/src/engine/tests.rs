//! The engine's behaviour, command by command: topics, producers, consumer groups, and what survives.

use felucca_protocol::batch::BatchBuilder;
use prost::Message;

use super::Engine;
use super::command::{AppendEntry, Command, OffsetCommit, Outcome, SeekTo};
use super::config::EngineSettings;
use super::effect::{Effects, Reply};
use super::error::EngineError;
use super::event::PartitionRow;
use super::testing::{Bench, P0, TOPIC, finish, leased, nack, staged};
use super::types::{Level, PartitionKey, RequestId, SubscriptionId, TopicId};

#[test]
fn a_retried_batch_is_answered_with_its_first_offset_also_after_a_crash() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let Reply::Producer { producer_id, epoch } = bench.ask(Command::InitProducer) else { panic!() };
    let batch = |sequence: i32| {
        let builder = BatchBuilder::new().producer(producer_id.cast_signed(), epoch.cast_signed(), sequence);
        AppendEntry { partition: P0, batch: finish(builder, None, 3) }
    };
    assert_eq!(bench.append_entry(batch(0), Level::Synced).unwrap().base_offset, 0);
    assert_eq!(bench.append_entry(batch(3), Level::Synced).unwrap().base_offset, 3);
    bench.reopen();
    let again = bench.append_entry(batch(0), Level::Synced).unwrap();
    assert!(again.duplicate && again.base_offset == 0);
    let error = bench.append_entry(batch(9), Level::Synced).unwrap_err();
    assert_eq!(error, EngineError::OutOfOrderSequence { producer_id, got: 9, expected: 6 });
    assert_eq!(bench.append_entry(batch(6), Level::Synced).unwrap().base_offset, 6);
}

#[test]
fn a_producer_id_that_was_never_given_out_is_refused() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let entry = AppendEntry { partition: P0, batch: finish(BatchBuilder::new().producer(99, 0, 0), None, 1) };
    assert_eq!(bench.append_entry(entry, Level::Synced), Err(EngineError::UnknownProducer(99)));
}

#[test]
fn written_is_refused_unless_the_topic_allows_it() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let entry = AppendEntry { partition: P0, batch: staged(None, 1) };
    assert!(matches!(bench.append_entry(entry, Level::Written), Err(EngineError::WrittenNotAllowed(_))));
}

#[test]
fn after_a_power_loss_a_partition_that_showed_unsynced_offsets_resumes_above_them() {
    let mut bench = Bench::new();
    bench.topic(&[("allow-written", "true"), ("visibility", "written")]);
    let entry = || AppendEntry { partition: P0, batch: staged(None, 1) };
    bench.append_entry(entry(), Level::Written).unwrap();
    bench.reopen_as("another run of the machine");
    let next = bench.append_entry(entry(), Level::Written).unwrap().base_offset;
    assert!(next > 1, "{next}");
}

#[test]
fn offsets_are_shown_unsynced_only_when_a_synced_ceiling_covers_them() {
    let mut bench = Bench::new();
    bench.topic(&[("allow-written", "true")]);
    let Reply::Producer { producer_id, epoch } = bench.ask(Command::InitProducer) else { panic!() };
    let batch = |sequence: i32| {
        let builder = BatchBuilder::new().producer(producer_id.cast_signed(), epoch.cast_signed(), sequence);
        AppendEntry { partition: P0, batch: finish(builder, None, 1) }
    };
    bench.hold_sync = true;
    for (sequence, what) in [(0, "raises the ceiling"), (1, "comes before its sync"), (0, "is repeated")] {
        bench.append_entry(batch(sequence), Level::Written).unwrap();
        assert_eq!(bench.level, Level::Synced, "{what}");
    }
    bench.hold_sync = false;
    bench.advance(1);
    bench.hold_sync = true;
    for (sequence, what) in [(2, "is covered"), (0, "is repeated")] {
        bench.append_entry(batch(sequence), Level::Written).unwrap();
        assert_eq!(bench.level, Level::Written, "{what}");
    }
}

#[test]
fn replay_of_the_journal_and_a_checkpoint_with_the_rest_of_it_agree() {
    let (mut bench, lease) = leased(&[("max-failures", "2")]);
    bench.append(Some(b"k"), 50).unwrap();
    let rows = bench.engine.take_dirty_rows();
    let at = bench.frames.len();
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 20, bytes: 0 });
    let taken = bench.delivered();
    bench.settle("a", lease, nack());
    for (lease, _, _) in taken.iter().step_by(2) {
        bench.settle("a", *lease, Outcome::Ack);
    }
    let mut full = Engine::new(EngineSettings::default());
    for (events, batches) in &bench.frames {
        full.replay(events, batches.clone(), &mut Effects::default()).unwrap();
    }
    let mut short = Engine::new(EngineSettings::default());
    for (key, value) in &rows {
        if let Some(value) = value {
            short.restore_row(key, value).unwrap();
        }
    }
    for (events, batches) in &bench.frames[at..] {
        short.replay(events, batches.clone(), &mut Effects::default()).unwrap();
    }
    let all: std::collections::BTreeMap<_, _> = full.take_dirty_rows().into_iter().collect();
    for (key, value) in short.take_dirty_rows() {
        assert_eq!(all[&key], value);
    }
}

#[test]
fn a_commit_beyond_the_end_is_refused() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.append(None, 5).unwrap();
    let commit = |offset| OffsetCommit { partition: P0, offset, metadata: String::new() };
    let reply = bench.ask(Command::CommitOffsets {
        group: "readers".to_owned(),
        member: String::new(),
        connection: 0,
        generation: 0,
        offsets: vec![commit(5), commit(6)],
    });
    let Reply::OffsetsCommitted(results) = reply else { panic!() };
    assert_eq!(results[0], Ok(()));
    assert_eq!(results[1], Err(EngineError::OffsetOutOfRange { partition: P0, offset: 6, end: 5 }));
    bench.reopen();
    let reply = bench.ask(Command::FetchOffsets { group: "readers".to_owned(), partitions: Vec::new() });
    assert_eq!(reply, Reply::Offsets(vec![commit(5)]));
}

#[test]
fn a_commit_that_comes_late_on_a_connection_that_its_member_has_left_is_refused() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.append(None, 5).unwrap();
    let heartbeat = |bench: &mut Bench, connection, leave| {
        bench.ask(Command::GroupHeartbeat {
            group: "readers".to_owned(),
            member: "a".to_owned(),
            connection,
            topics: vec!["orders".to_owned()],
            owned: vec![P0],
            generation: 1,
            leave,
        })
    };
    let commit = |bench: &mut Bench, connection, offset| {
        bench.ask(Command::CommitOffsets {
            group: "readers".to_owned(),
            member: "a".to_owned(),
            connection,
            generation: 1,
            offsets: vec![OffsetCommit { partition: P0, offset, metadata: String::new() }],
        })
    };
    let fenced = Reply::Error(EngineError::MemberFenced("a".to_owned()));
    heartbeat(&mut bench, 1, false);
    assert_eq!(commit(&mut bench, 1, 2), Reply::OffsetsCommitted(vec![Ok(())]));
    assert_eq!(commit(&mut bench, 2, 4), Reply::OffsetsCommitted(vec![Ok(())]));
    assert_eq!(commit(&mut bench, 1, 3), fenced);
    assert_eq!(heartbeat(&mut bench, 1, true), fenced);
    // One that was made before the member was, and is heard of after it.
    heartbeat(&mut bench, 2, true);
    heartbeat(&mut bench, 3, false);
    assert_eq!(commit(&mut bench, 2, 3), fenced);
    let reply = bench.ask(Command::FetchOffsets { group: "readers".to_owned(), partitions: Vec::new() });
    let Reply::Offsets(offsets) = reply else { panic!() };
    assert_eq!(offsets[0].offset, 4);
    // No connection outlives the broker.
    bench.reopen();
    assert!(matches!(heartbeat(&mut bench, 1, false), Reply::Heartbeat { .. }));
}

#[test]
fn a_member_that_leaves_does_not_end_the_sessions_of_the_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let heartbeat = |bench: &mut Bench, member: &str, leave| {
        bench.ask(Command::GroupHeartbeat {
            group: "readers".to_owned(),
            member: member.to_owned(),
            connection: 0,
            topics: vec!["orders".to_owned()],
            owned: Vec::new(),
            generation: 0,
            leave,
        });
    };
    heartbeat(&mut bench, "a", false);
    heartbeat(&mut bench, "b", false);
    bench.advance(9_000);
    heartbeat(&mut bench, "a", false);
    heartbeat(&mut bench, "b", true);
    bench.advance(1_500);
    let Reply::Group(readers) = bench.ask(Command::DescribeGroup { group: "readers".to_owned() }) else {
        panic!()
    };
    assert_eq!(readers.members.len(), 1);
    heartbeat(&mut bench, "a", true);
    bench.ask(Command::DeleteGroup { group: "readers".to_owned(), force: false });
    heartbeat(&mut bench, "c", true);
    assert_eq!(bench.ask(Command::ListGroups), Reply::Groups(Vec::new()), "who leaves no group makes none");
}

#[test]
fn a_share_group_that_finds_no_room_for_its_topics_is_refused_as_a_whole() {
    let settings = EngineSettings { max_topics: 4, ..EngineSettings::default() };
    let mut bench = Bench::with(settings);
    bench.topic(&[]);
    let (id, name) = (TopicId([2; 16]), "returns".to_owned());
    bench.ask(Command::CreateTopic { id, name, partitions: 1, config: Vec::new() });
    let create = Command::CreateShareGroup {
        group: "pay".to_owned(),
        topics: vec!["orders".to_owned(), "returns".to_owned()],
        config: Vec::new(),
        from_end: false,
    };
    let frames = bench.frames.len();
    let reply = bench.ask(create);
    assert!(matches!(reply, Reply::Error(EngineError::LimitReached { what: "topics", .. })), "{reply:?}");
    assert_eq!(bench.frames.len(), frames);
}

#[test]
fn the_clock_does_not_fall_when_it_goes_on_from_a_checkpoint() {
    let (mut bench, _) = leased(&[("lease", "1s")]);
    bench.advance(1_000);
    let mut restored = Engine::new(EngineSettings::default());
    for (key, value) in bench.engine.take_dirty_rows() {
        restored.restore_row(&key, &value.unwrap()).unwrap();
    }
    assert_eq!(restored.monotonic_ms(), bench.now.monotonic_ms);
}

#[test]
fn a_member_cannot_claim_partitions_that_do_not_exist() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let reply = bench.ask(Command::GroupHeartbeat {
        group: "readers".to_owned(),
        member: "m".to_owned(),
        connection: 0,
        topics: vec!["orders".to_owned()],
        owned: vec![
            P0,
            PartitionKey { topic: TOPIC, partition: 7 },
            PartitionKey { topic: TopicId([9; 16]), partition: 0 },
        ],
        generation: 0,
        leave: false,
    });
    let Reply::Heartbeat { assigned, .. } = reply else { panic!("{reply:?}") };
    assert_eq!(assigned, [P0, PartitionKey { topic: TOPIC, partition: 1 }]);
    let Reply::Group(group) = bench.ask(Command::DescribeGroup { group: "readers".to_owned() }) else {
        panic!()
    };
    assert_eq!(group.members[0].assigned, assigned);
}

#[test]
fn a_group_that_knows_more_than_the_log_has_is_not_served_until_it_is_moved() {
    let (mut bench, lease) = leased(&[]);
    bench.append(None, 4).unwrap();
    bench.settle("a", lease, Outcome::Ack);
    let commit = OffsetCommit { partition: P0, offset: 5, metadata: String::new() };
    bench.ask(Command::CommitOffsets {
        group: "readers".to_owned(),
        member: String::new(),
        connection: 0,
        generation: 0,
        offsets: vec![commit.clone()],
    });
    let rows = bench.engine.take_dirty_rows();
    bench.engine = Engine::new(EngineSettings::default());
    for (key, value) in rows {
        let mut value = value.unwrap();
        if let Ok(mut row) = PartitionRow::decode(&value[..])
            && key[0] == 2
            && row.topic_id == TOPIC.0
        {
            row.end = 0;
            value = row.encode_to_vec();
        }
        bench.engine.restore_row(&key, &value).unwrap();
    }
    bench.boot_as("machine");
    let subscribe = || Command::ShareSubscribe {
        subscription: SubscriptionId(7),
        group: "pay".to_owned(),
        member: "a".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    };
    let settle = Command::Settle {
        group: "pay".to_owned(),
        member: "a".to_owned(),
        level: Level::Synced,
        settlements: Vec::new(),
    };
    let fetch = || Command::FetchOffsets { group: "readers".to_owned(), partitions: Vec::new() };
    for command in [subscribe(), settle, fetch()] {
        let reply = bench.ask(command);
        assert!(matches!(reply, Reply::Error(EngineError::GroupCorrupt { .. })), "{reply:?}");
    }
    assert_eq!(bench.engine.corrupt_groups().map(|(group, _)| group).collect::<Vec<_>>(), ["pay", "readers"]);
    assert!(bench.describe().corrupt.is_some());
    for group in ["pay", "readers"] {
        let (group, topic) = (group.to_owned(), "orders".to_owned());
        let positions = vec![(0, SeekTo::End)];
        assert_eq!(bench.ask(Command::SeekGroup { group, topic, positions, force: true }), Reply::Done);
    }
    assert_eq!(bench.ask(subscribe()), Reply::Done);
    assert_eq!(bench.ask(fetch()), Reply::Offsets(vec![OffsetCommit { offset: 0, ..commit }]));
}

#[test]
fn two_groups_created_in_one_turn_get_topics_of_their_own() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let mut out = Effects::default();
    for group in ["pay", "mail"] {
        let (group, topics, config) = (group.to_owned(), vec!["orders".to_owned()], Vec::new());
        let create = Command::CreateShareGroup { group, topics, config, from_end: false };
        bench.engine.step(bench.now, bench.lsn, Some(RequestId(1)), create, &mut out);
    }
    let replies: Vec<&Reply> = out.replies.iter().map(|pending| &pending.reply).collect();
    assert_eq!(replies, [&Reply::Done, &Reply::Done]);
}
