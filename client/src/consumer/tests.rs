//! The consumer against a broker that hangs up, reassigns and sends rubbish.

use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};

use super::{Consumer, ConsumerBuilder, OutOfRange};
use crate::error::{Error, Result};
use crate::testing::{Asked, FakeBroker, FakeConnection, QUIET, numbered, soon, topic_id};

async fn offsets(connection: &mut FakeConnection, partitions: u32) {
    let asked = connection.expect::<message::ListOffsets>(Api::ListOffsets).await;
    let offsets =
        |partition| message::PartitionOffsets { partition, high_watermark: 100, ..Default::default() };
    let partitions = (0..partitions).map(offsets).collect();
    connection.reply(&asked, &message::ListOffsetsReply { partitions }).await;
}

/// Takes a subscription; answers it with its id and positions.
async fn subscribe(connection: &mut FakeConnection) -> (u64, Vec<(u32, u64)>) {
    let asked = loop {
        let frame = connection.request().await.expect("a request");
        match Api::try_from(frame.api).unwrap() {
            Api::Credit | Api::Unsubscribe => {}
            Api::Subscribe => {
                let message: message::Subscribe = frame.decode_message().unwrap();
                let correlation = frame.correlation;
                break Asked { api: Api::Subscribe, correlation, message, payload: Bytes::new() };
            }
            other => panic!("{other:?} instead of a subscription"),
        }
    };
    connection.reply(&asked, &message::Empty {}).await;
    let position = |position: &message::Position| (position.partition, position.offset);
    (asked.message.subscription, asked.message.positions.iter().map(position).collect())
}

async fn push(connection: &mut FakeConnection, subscription: u64, partition: u32, payload: &[u8]) {
    let records = message::Records { subscription, topic_id: topic_id("t"), partition, high_watermark: 100 };
    connection.push(Api::Records, subscription, &records, payload).await;
}

/// A consumer of a topic with so many partitions, and its subscription.
async fn reading(
    connection: &mut FakeConnection,
    builder: ConsumerBuilder,
    partitions: u32,
) -> (Consumer, u64) {
    let building = tokio::spawn(builder.topics(["t"]).build());
    connection.metadata("t", partitions).await;
    offsets(connection, partitions).await;
    let (subscription, _) = subscribe(connection).await;
    (soon(building).await.unwrap().unwrap(), subscription)
}

async fn next(consumer: &mut Consumer) -> (u32, u64) {
    let record = soon(consumer.next()).await.unwrap().unwrap();
    assert_eq!(record.value.as_deref(), Some(record.offset.to_string().as_bytes()));
    (record.partition, record.offset)
}

#[tokio::test]
async fn reading_goes_on_at_the_next_record_after_the_connection_was_lost() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = reading(&mut connection, client.consumer(), 1).await;
    push(&mut connection, subscription, 0, &numbered(0..10)).await;
    push(&mut connection, subscription, 0, &numbered(10..20)).await;
    for offset in 0..4 {
        assert_eq!(next(&mut consumer).await, (0, offset));
    }
    drop(connection);
    let mut connection = broker.accept().await;
    let (again, positions) = subscribe(&mut connection).await;
    assert!(again != subscription);
    assert_eq!(positions, [(0, 4)]);
    // A batch begins where it begins.
    push(&mut connection, again, 0, &numbered(0..10)).await;
    push(&mut connection, again, 0, &numbered(10..12)).await;
    for offset in 4..12 {
        assert_eq!(next(&mut consumer).await, (0, offset));
    }
}

#[tokio::test]
async fn a_subscription_that_a_stopping_broker_ends_is_opened_again() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = reading(&mut connection, client.consumer(), 1).await;
    let end = |subscription, code| message::SubscriptionEnded {
        subscription,
        error: Some(message::Error::new(code, "as the test says")),
        topic_id: topic_id("t"),
        partition: 0,
    };
    let ended = end(subscription, ErrorCode::Overloaded);
    connection.push(Api::SubscriptionEnded, subscription, &ended, &[]).await;
    let (subscription, positions) = subscribe(&mut connection).await;
    assert_eq!(positions, [(0, 0)]);
    let ended = end(subscription, ErrorCode::OffsetOutOfRange);
    connection.push(Api::SubscriptionEnded, subscription, &ended, &[]).await;
    let error = soon(consumer.next()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::OffsetOutOfRange));
    assert!(error.to_string().contains("t/0"), "{error}");
    assert!(soon(consumer.next()).await.is_none());
}

#[tokio::test]
async fn a_consumer_that_may_goes_on_where_the_log_is_left() {
    for (policy, next) in [(OutOfRange::Beginning, 40), (OutOfRange::End, 100)] {
        let broker = FakeBroker::start().await;
        let (client, mut connection) = broker.client().await;
        let builder = client.consumer().out_of_range(policy);
        let (_consumer, subscription) = reading(&mut connection, builder, 1).await;
        let ended = message::SubscriptionEnded {
            subscription,
            error: Some(message::Error::new(ErrorCode::OffsetOutOfRange, "as the test says")),
            topic_id: topic_id("t"),
            partition: 0,
        };
        connection.push(Api::SubscriptionEnded, subscription, &ended, &[]).await;
        let asked = loop {
            let frame = connection.request().await.expect("a request");
            if frame.api == u8::from(Api::ListOffsets) {
                let message: message::ListOffsets = frame.decode_message().unwrap();
                let correlation = frame.correlation;
                break Asked { api: Api::ListOffsets, correlation, message, payload: Bytes::new() };
            }
        };
        let partitions =
            vec![message::PartitionOffsets { log_start: 40, high_watermark: 100, ..Default::default() }];
        connection.reply(&asked, &message::ListOffsetsReply { partitions }).await;
        let (_, positions) = subscribe(&mut connection).await;
        assert_eq!(positions, [(0, next)]);
    }
}

#[tokio::test]
async fn a_damaged_batch_is_never_passed_over() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = reading(&mut connection, client.consumer(), 1).await;
    let mut damaged = numbered(1..3).to_vec();
    damaged[70] ^= 0x7f;
    push(&mut connection, subscription, 0, &numbered(0..1)).await;
    push(&mut connection, subscription, 0, &damaged).await;
    push(&mut connection, subscription, 0, &numbered(3..5)).await;
    assert_eq!(next(&mut consumer).await, (0, 0));
    let mut ended = soon(consumer.next()).await.unwrap();
    while ended.is_ok() {
        ended = soon(consumer.next()).await.unwrap();
    }
    assert!(matches!(ended, Err(Error::Protocol(_))), "{ended:?}");
    assert!(soon(consumer.next()).await.is_none());
}

#[tokio::test]
async fn credit_comes_back_as_records_are_taken_and_in_pieces_that_are_worth_it() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.consumer().credit(100, 1 << 20);
    let (mut consumer, subscription) = reading(&mut connection, builder, 1).await;
    for first in [0, 20, 40, 60] {
        push(&mut connection, subscription, 0, &numbered(first..first + 20)).await;
    }
    for _ in 0..21 {
        next(&mut consumer).await;
    }
    connection.expect_quiet().await;
    for _ in 21..60 {
        next(&mut consumer).await;
    }
    let credit = connection.expect::<message::Credit>(Api::Credit).await.message;
    assert_eq!((credit.subscription, credit.records), (subscription, 40));
}

#[tokio::test]
async fn seeking_goes_back_and_forth_and_leaves_what_was_queued() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = reading(&mut connection, client.consumer(), 1).await;
    push(&mut connection, subscription, 0, &numbered(0..10)).await;
    assert_eq!(next(&mut consumer).await, (0, 0));
    for to in [7, 2] {
        soon(consumer.seek("t", 0, to)).await.unwrap();
        let (subscription, positions) = subscribe(&mut connection).await;
        assert_eq!(positions, [(0, to)]);
        push(&mut connection, subscription, 0, &numbered(0..10)).await;
        assert_eq!(next(&mut consumer).await, (0, to));
    }
    let error = soon(consumer.seek("t", 9, 0)).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotAssigned));
}

// ---- In a group ----

fn assign(generation: u64, partitions: &[u32]) -> message::GroupHeartbeatReply {
    let of = |partition: &u32| message::TopicPartition { topic_id: topic_id("t"), partition: *partition };
    let assigned = partitions.iter().map(of).collect();
    message::GroupHeartbeatReply { generation, assigned, interval_ms: 20 }
}

fn owned(heartbeat: &message::GroupHeartbeat) -> Vec<u32> {
    heartbeat.owned.iter().map(|partition| partition.partition).collect()
}

/// A member that reads partitions 0 and 1, the latter from its committed offset 50.
async fn member(connection: &mut FakeConnection, builder: ConsumerBuilder) -> (Consumer, u64) {
    let building = tokio::spawn(builder.group("g").member_id("m").topics(["t"]).build());
    connection.metadata("t", 2).await;
    let asked = connection.expect::<message::GroupHeartbeat>(Api::GroupHeartbeat).await;
    assert!(owned(&asked.message).is_empty());
    connection.reply(&asked, &assign(1, &[0, 1])).await;
    let asked = connection.expect::<message::FetchOffsets>(Api::FetchOffsets).await;
    let committed =
        message::CommittedOffset { topic_id: topic_id("t"), partition: 1, offset: 50, ..Default::default() };
    connection.reply(&asked, &message::FetchOffsetsReply { offsets: vec![committed] }).await;
    offsets(connection, 1).await;
    let (subscription, positions) = subscribe(connection).await;
    assert_eq!(positions, [(0, 0), (1, 50)]);
    (soon(building).await.unwrap().unwrap(), subscription)
}

/// The next request that is not one of the heartbeats that keep things as they are.
async fn past_heartbeats(connection: &mut FakeConnection, keep: &[u32]) -> felucca_protocol::frame::Frame {
    loop {
        let frame = connection.request().await.expect("a request");
        if frame.api != u8::from(Api::GroupHeartbeat) {
            return frame;
        }
        let message: message::GroupHeartbeat = frame.decode_message().unwrap();
        if message.leave || owned(&message) != keep {
            return frame;
        }
        let (api, correlation) = (Api::GroupHeartbeat, frame.correlation);
        connection.reply(&Asked { api, correlation, message, payload: Bytes::new() }, &assign(1, keep)).await;
    }
}

fn as_asked<M: prost::Message + Default>(frame: &felucca_protocol::frame::Frame) -> Asked<M> {
    Asked {
        api: Api::try_from(frame.api).unwrap(),
        correlation: frame.correlation,
        message: frame.decode_message().unwrap(),
        payload: Bytes::new(),
    }
}

fn committed(commit: &message::CommitOffsets) -> Vec<(u32, u64)> {
    commit.offsets.iter().map(|offset| (offset.partition, offset.offset)).collect()
}

fn accept(commit: &Asked<message::CommitOffsets>) -> message::CommitOffsetsReply {
    let results = commit.message.offsets.iter().map(|_| message::CommitResult::default()).collect();
    message::CommitOffsetsReply { results }
}

#[tokio::test]
async fn a_revoked_partition_is_committed_before_it_is_given_up_and_then_not_returned() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = member(&mut connection, client.consumer()).await;
    push(&mut connection, subscription, 1, &numbered(50..60)).await;
    // 51 is in the caller's hands: 50 is processed.
    assert_eq!(next(&mut consumer).await, (1, 50));
    assert_eq!(next(&mut consumer).await, (1, 51));
    let asked = connection.expect::<message::GroupHeartbeat>(Api::GroupHeartbeat).await;
    assert_eq!(owned(&asked.message), [0, 1]);
    connection.reply(&asked, &assign(2, &[0])).await;
    let asked = connection.expect::<message::CommitOffsets>(Api::CommitOffsets).await;
    assert_eq!((committed(&asked.message), asked.message.generation), (vec![(0, 0), (1, 51)], 2));
    // Stopped already.
    assert!(tokio::time::timeout(QUIET, consumer.next()).await.is_err());
    connection.reply(&asked, &accept(&asked)).await;
    let (_, positions) = subscribe(&mut connection).await;
    assert_eq!(positions, [(0, 0)]);
    let asked = connection.expect::<message::GroupHeartbeat>(Api::GroupHeartbeat).await;
    assert_eq!(owned(&asked.message), [0]);
    assert_eq!(consumer.assignment()["t"], [0]);
}

#[tokio::test]
async fn commits_are_of_what_was_processed_and_closing_leaves() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.consumer().auto_commit(Some(Duration::from_millis(50)));
    let (mut consumer, subscription) = member(&mut connection, builder).await;
    push(&mut connection, subscription, 0, &numbered(0..3)).await;
    assert_eq!(next(&mut consumer).await, (0, 0));
    assert_eq!(next(&mut consumer).await, (0, 1));
    let frame = past_heartbeats(&mut connection, &[0, 1]).await;
    let asked = as_asked::<message::CommitOffsets>(&frame);
    assert_eq!(committed(&asked.message)[0], (0, 1));
    connection.reply(&asked, &accept(&asked)).await;
    let closing = tokio::spawn(consumer.close());
    let frame = past_heartbeats(&mut connection, &[0, 1]).await;
    let asked = as_asked::<message::CommitOffsets>(&frame);
    assert_eq!(committed(&asked.message), [(0, 2)]);
    connection.reply(&asked, &accept(&asked)).await;
    let frame = past_heartbeats(&mut connection, &[0, 1]).await;
    assert_eq!(frame.api, u8::from(Api::Unsubscribe));
    let frame = past_heartbeats(&mut connection, &[0, 1]).await;
    let asked = as_asked::<message::GroupHeartbeat>(&frame);
    assert!(asked.message.leave);
    connection.reply(&asked, &assign(3, &[])).await;
    soon(closing).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_record_is_committed_whatever_was_returned_since() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = member(&mut connection, client.consumer().auto_commit(None)).await;
    push(&mut connection, subscription, 0, &numbered(0..3)).await;
    let first = soon(consumer.next()).await.unwrap().unwrap();
    next(&mut consumer).await;
    next(&mut consumer).await;
    let committing = async { consumer.commit_record(&first).await };
    let answering = async {
        let frame = past_heartbeats(&mut connection, &[0, 1]).await;
        let asked = as_asked::<message::CommitOffsets>(&frame);
        assert_eq!(committed(&asked.message), [(0, 1)]);
        connection.reply(&asked, &accept(&asked)).await;
    };
    let (result, ()) = tokio::join!(committing, answering);
    result.unwrap();
}

#[tokio::test]
async fn a_member_that_reconnects_says_what_it_owns_and_reads_on() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut consumer, subscription) = member(&mut connection, client.consumer()).await;
    push(&mut connection, subscription, 1, &numbered(50..52)).await;
    next(&mut consumer).await;
    drop(connection);
    let mut connection = broker.accept().await;
    let first = connection.expect::<message::GroupHeartbeat>(Api::GroupHeartbeat).await;
    assert_eq!(owned(&first.message), [0, 1]);
    connection.reply(&first, &assign(1, &[0, 1])).await;
    let frame = past_heartbeats(&mut connection, &[0, 1]).await;
    let asked = as_asked::<message::Subscribe>(&frame);
    let positions = asked.message.positions.iter().map(|position| (position.partition, position.offset));
    assert_eq!(positions.collect::<Vec<_>>(), [(0, 0), (1, 51)]);
}

#[tokio::test]
async fn a_consumer_without_anything_to_read_is_refused() -> Result<()> {
    let broker = FakeBroker::start().await;
    let (client, _connection) = broker.client().await;
    let error = client.consumer().build().await.unwrap_err();
    assert!(matches!(error, Error::Record(_)), "{error}");
    Ok(())
}
