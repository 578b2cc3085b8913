//! The producer against a broker that checks sequences, drops, refuses and forgets.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchHeader, Compression};
use felucca_protocol::{Api, ErrorCode, message};
use proptest::prelude::*;

use super::PendingAck;
use super::lane::{Identity, Lane, Outbound};
use crate::client::TopicRef;
use crate::error::Error;
use crate::record::Record;
use crate::testing::{Asked, FakeBroker, FakeConnection, QUIET, soon, topic_id};

const MAX_BATCH: usize = 120;

fn lane() -> Lane {
    Lane::new(TopicRef { name: "t".into(), id: topic_id("t"), partitions: 1 }, 0)
}

/// Adds a record that has this number as its value.
fn push(lane: &mut Lane, number: u64) -> PendingAck {
    let value = number.to_string();
    if !lane.has_room(30, MAX_BATCH) {
        lane.begin(30, MAX_BATCH, Compression::None);
    }
    let slot = lane.push(0, None, Some(value.as_bytes()), &[], 1).unwrap();
    slot.into_pending(super::Level::Synced, 0)
}

fn numbers(batch: &Bytes) -> Vec<u64> {
    let value = |record: batch::Record| String::from_utf8(record.value.unwrap().to_vec()).unwrap();
    batch::records(batch).unwrap().map(|record| value(record.unwrap()).parse().unwrap()).collect()
}

fn ready(ack: &mut PendingAck) -> Option<crate::Result<super::Ack>> {
    use futures::FutureExt;
    ack.now_or_never()
}

fn id(producer_id: i64) -> Identity {
    Identity { producer_id, epoch: 0 }
}

fn sent(outbound: Option<Outbound>) -> (u64, i64, i32, Vec<u64>) {
    let outbound = outbound.expect("a batch");
    let header = BatchHeader::parse(&outbound.bytes).unwrap();
    batch::check(&outbound.bytes).unwrap();
    (outbound.serial, header.producer_id, header.base_sequence, numbers(&outbound.bytes))
}

#[test]
fn a_batch_gathers_while_one_is_in_flight_and_goes_when_full_or_alone() {
    let (mut lane, now) = (lane(), Instant::now());
    lane.give_identity(id(7));
    let _first = push(&mut lane, 0);
    assert_eq!(sent(lane.take(now, 5)), (0, 7, 0, vec![0]));
    let _more = [push(&mut lane, 1), push(&mut lane, 2)];
    assert!(lane.take(now, 5).is_none(), "it gathers");
    lane.acknowledged(0, 100);
    assert_eq!(sent(lane.take(now, 5)), (1, 7, 1, vec![1, 2]));
    let _many: Vec<_> = (3..20).map(|number| push(&mut lane, number)).collect();
    assert!(lane.take(now, 5).is_some(), "a full batch need not wait");
}

#[test]
fn what_comes_back_is_sent_again_in_order_under_its_sequence_once_all_have_come_back() {
    let (mut lane, now) = (lane(), Instant::now());
    lane.give_identity(id(7));
    let _acks: Vec<_> = (0..20).map(|number| push(&mut lane, number)).collect();
    let before: Vec<_> = (0..3).map(|_| sent(lane.take(now, 5))).collect();
    lane.returned(1, true, false);
    assert!(lane.take(now, 5).is_none());
    lane.returned(2, true, false);
    lane.returned(0, true, false);
    let after: Vec<_> = (0..3).map(|_| sent(lane.take(now, 5))).collect();
    assert_eq!(before, after);
}

#[test]
fn after_a_refused_batch_its_successors_go_on_under_a_new_id() {
    let (mut lane, now) = (lane(), Instant::now());
    lane.give_identity(id(7));
    let mut acks: Vec<_> = (0..20).map(|number| push(&mut lane, number)).collect();
    let (.., first) = sent(lane.take(now, 5));
    let (.., second) = sent(lane.take(now, 5));
    let too_large = Error::broker(ErrorCode::RecordTooLarge, "");
    let gap = Error::broker(ErrorCode::OutOfOrderSequence, "");
    // The answers may come in any order.
    lane.out_of_sequence(1, gap, now);
    lane.refused(0, too_large.clone());
    assert_eq!(ready(&mut acks[0]), Some(Err(too_large)));
    assert!(lane.needs_identity() && !lane.accepts(id(7)) && lane.accepts(id(8)));
    lane.give_identity(id(8));
    assert_eq!(sent(lane.take(now, 5)), (1, 8, 0, second.clone()));
    let (_, producer, sequence, third) = sent(lane.take(now, 5));
    assert_eq!((producer, sequence), (8, second.len() as i32));
    assert_eq!(third[0] as usize, first.len() + second.len());
}

#[test]
fn what_may_have_been_appended_fails_with_the_hole_before_it() {
    let (mut lane, now) = (lane(), Instant::now());
    lane.give_identity(id(7));
    let mut acks: Vec<_> = (0..20).map(|number| push(&mut lane, number)).collect();
    let first = sent(lane.take(now, 5)).3.len();
    let _second = lane.take(now, 5);
    lane.returned(0, true, false);
    lane.returned(1, true, false);
    let late = Duration::from_secs(1);
    lane.expire(Instant::now() + late, late);
    let timeout = Error::Timeout("delivering a record");
    assert_eq!(ready(&mut acks[0]), Some(Err(timeout.clone())));
    assert_eq!(ready(&mut acks[first]), Some(Err(timeout)));
    assert!(!lane.accepts(id(7)));
}

#[test]
fn a_broker_without_memory_gets_the_same_records_under_a_new_id() {
    let (mut lane, now) = (lane(), Instant::now());
    lane.give_identity(id(7));
    let mut ack = push(&mut lane, 0);
    let _first = lane.take(now, 5);
    lane.out_of_sequence(0, Error::broker(ErrorCode::UnknownProducer, ""), now);
    assert_eq!(ready(&mut ack), None);
    lane.give_identity(id(8));
    assert!(lane.take(now, 5).is_none(), "after a pause");
    assert_eq!(sent(lane.take(now + Duration::from_secs(3), 5)), (0, 8, 0, vec![0]));
}

/// A partition with the broker's rules for sequences.
#[derive(Default)]
struct Log {
    records: Vec<u64>,
    producers: HashMap<i64, Vec<(i32, u32, u64)>>,
}

impl Log {
    fn append(&mut self, batch: &Bytes) -> Result<u64, ErrorCode> {
        let header = batch::check(batch).unwrap();
        let seen = self.producers.entry(header.producer_id).or_default();
        let (first, count) = (header.base_sequence, header.record_count);
        let recent = seen.iter().rev().take(5);
        if let Some((.., base)) = recent.copied().find(|(f, c, _)| (*f, *c) == (first, count)) {
            return Ok(base);
        }
        let expected = seen.last().map_or(0, |(f, c, _)| f + *c as i32);
        if first != expected {
            return Err(ErrorCode::OutOfOrderSequence);
        }
        let base = self.records.len() as u64;
        seen.push((first, count, base));
        self.records.extend(numbers(batch));
        Ok(base)
    }
}

proptest! {
    /// Whatever goes wrong: what is acknowledged is in the log once, at the place that was said, in the order of sending;
    /// what failed is there at most once.
    #[test]
    fn acknowledged_records_are_appended_once_and_in_order(
        steps in proptest::collection::vec((0..100_u32, any::<prop::sample::Index>()), 50..400),
    ) {
        let (mut lane, mut log, mut now) = (lane(), Log::default(), Instant::now());
        let mut acks = Vec::new();
        let mut in_flight: Vec<(Outbound, Option<Result<u64, ErrorCode>>)> = Vec::new();
        let mut identity = 0;
        let answer = |lane: &mut Lane, outbound: Outbound, answer: Result<u64, ErrorCode>, now| {
            let error = |code| Error::broker(code, "");
            match answer {
                Ok(base) => lane.acknowledged(outbound.serial, base),
                Err(code @ ErrorCode::OutOfOrderSequence) => lane.out_of_sequence(outbound.serial, error(code), now),
                Err(ErrorCode::Overloaded) => lane.postponed(outbound.serial, &Error::broker(ErrorCode::Overloaded, ""), now),
                Err(code) => lane.refused(outbound.serial, error(code)),
            };
        };
        for (action, which) in steps {
            match action {
                0..40 => acks.push(push(&mut lane, acks.len() as u64)),
                40..65 => {
                    if lane.needs_identity() {
                        identity += 1;
                        lane.give_identity(id(identity));
                    }
                    if let Some(outbound) = lane.take(now, 5) {
                        in_flight.push((outbound, None));
                    }
                }
                // The broker takes the requests of a connection in their order.
                65..80 => {
                    if let Some((outbound, answered)) = in_flight.iter_mut().find(|(_, answered)| answered.is_none()) {
                        *answered = Some(match which.index(12) {
                            0 => Err(ErrorCode::Overloaded),
                            1 => Err(ErrorCode::RecordTooLarge),
                            _ => log.append(&outbound.bytes),
                        });
                    }
                }
                // Answers come in any order.
                80..95 => {
                    let ready: Vec<usize> = (0..in_flight.len()).filter(|i| in_flight[*i].1.is_some()).collect();
                    if !ready.is_empty() {
                        let (outbound, answered) = in_flight.remove(ready[which.index(ready.len())]);
                        answer(&mut lane, outbound, answered.unwrap(), now);
                    }
                }
                // The connection ends: some of what was sent is appended all the same.
                95..98 => {
                    let lost = which.index(in_flight.len() + 1);
                    for (i, (outbound, answered)) in in_flight.drain(..).enumerate() {
                        if i < lost && answered.is_none() {
                            let _unheard = log.append(&outbound.bytes);
                        }
                        lane.returned(outbound.serial, true, false);
                    }
                }
                _ => {
                    now += Duration::from_secs(40);
                    lane.expire(now, Duration::from_secs(120));
                }
            }
        }
        // All is well again.
        for (outbound, answered) in in_flight {
            let answered = answered.unwrap_or_else(|| log.append(&outbound.bytes));
            answer(&mut lane, outbound, answered, now);
        }
        now += Duration::from_secs(5);
        for _ in 0..1000 {
            if lane.needs_identity() {
                identity += 1;
                lane.give_identity(id(identity));
            }
            let Some(outbound) = lane.take(now, 5) else { break };
            let answered = log.append(&outbound.bytes);
            answer(&mut lane, outbound, answered, now);
            now += Duration::from_secs(3);
        }
        prop_assert!(lane.is_empty());
        let mut last = None;
        for (number, ack) in acks.iter_mut().enumerate() {
            let copies = log.records.iter().filter(|record| **record == number as u64).count();
            match ready(ack) {
                Some(Ok(ack)) => {
                    prop_assert_eq!(copies, 1);
                    prop_assert_eq!(log.records[ack.offset as usize], number as u64);
                    prop_assert!(last < Some(ack.offset));
                    last = Some(ack.offset);
                }
                Some(Err(_)) => prop_assert!(copies <= 1, "{} copies of {}", copies, number),
                None => prop_assert!(false, "record {} has no outcome", number),
            }
        }
    }
}

// ---- Over a connection ----

async fn produce(connection: &mut FakeConnection) -> (Asked<message::Produce>, Vec<Bytes>) {
    let asked = connection.expect::<message::Produce>(Api::Produce).await;
    let batches = batch::split(&asked.payload).map(Result::unwrap).collect();
    (asked, batches)
}

fn appended(base_offsets: &[u64]) -> message::ProduceReply {
    let result = |base: &u64| message::ProduceResult { base_offset: *base, ..Default::default() };
    message::ProduceReply { results: base_offsets.iter().map(result).collect() }
}

fn identity_of(batch: &Bytes) -> (i64, i32) {
    let header = BatchHeader::parse(batch).unwrap();
    (header.producer_id, header.base_sequence)
}

#[tokio::test]
async fn batches_without_an_answer_are_sent_again_over_the_next_connection_before_new_ones() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().max_batch_bytes(100).build().await.unwrap();
    let sending = tokio::spawn(async move {
        let mut acks = Vec::new();
        for number in 0..6 {
            let record = Record::new("t", number.to_string()).key("k");
            acks.push(producer.enqueue(record).await.unwrap());
        }
        (producer, acks)
    });
    connection.metadata("t", 1).await;
    let (producer, acks) = soon(sending).await.unwrap();
    connection.init_producer(7).await;
    let (_, first) = produce(&mut connection).await;
    drop(connection);

    let mut connection = broker.accept().await;
    let (asked, again) = produce(&mut connection).await;
    assert_eq!(first, again);
    assert_eq!(identity_of(&again[0]), (7, 0));
    connection.reply(&asked, &appended(&[40])).await;
    let mut next = numbers(&again[0]).len() as u64;
    while next < 6 {
        let (asked, batches) = produce(&mut connection).await;
        assert_eq!(identity_of(&batches[0]), (7, next as i32));
        connection.reply(&asked, &appended(&[40 + next])).await;
        next += numbers(&batches[0]).len() as u64;
    }
    for (number, ack) in acks.into_iter().enumerate() {
        assert_eq!(soon(ack).await.unwrap().offset, 40 + number as u64);
    }
    drop(producer);
}

#[tokio::test]
async fn one_producer_id_serves_all_partitions_and_their_batches_ride_together() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().max_in_flight(1).build().await.unwrap();
    let first = tokio::spawn({
        let producer = producer.clone();
        async move { producer.enqueue(Record::new("t", "0").partition(0)).await }
    });
    connection.metadata("t", 4).await;
    let mut acks = vec![soon(first).await.unwrap().unwrap()];
    connection.init_producer(7).await;
    let (asked, batches) = produce(&mut connection).await;
    assert_eq!(batches.len(), 1);
    for partition in 1..4 {
        acks.push(producer.enqueue(Record::new("t", "x").partition(partition)).await.unwrap());
    }
    connection.expect_quiet().await;
    connection.reply(&asked, &appended(&[0])).await;
    let (asked, batches) = produce(&mut connection).await;
    let partitions: Vec<u32> = asked.message.entries.iter().map(|entry| entry.partition).collect();
    assert_eq!(partitions, [1, 2, 3]);
    assert!(batches.iter().all(|batch| identity_of(batch) == (7, 0)));
    connection.reply(&asked, &appended(&[10, 20, 30])).await;
    let mut offsets = Vec::new();
    for ack in acks {
        offsets.push(soon(ack).await.unwrap().offset);
    }
    assert_eq!(offsets, [0, 10, 20, 30]);
}

#[tokio::test]
async fn a_request_refused_for_one_batch_fails_only_that_one() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().max_in_flight(1).build().await.unwrap();
    let first = tokio::spawn({
        let producer = producer.clone();
        async move { producer.enqueue(Record::new("t", "0").partition(0)).await }
    });
    connection.metadata("t", 3).await;
    let first = soon(first).await.unwrap().unwrap();
    connection.init_producer(7).await;
    let (asked, _) = produce(&mut connection).await;
    let good = producer.enqueue(Record::new("t", "good").partition(1)).await.unwrap();
    let bad = producer.enqueue(Record::new("t", "bad").partition(2)).await.unwrap();
    connection.reply(&asked, &appended(&[0])).await;
    soon(first).await.unwrap();
    let (asked, batches) = produce(&mut connection).await;
    assert_eq!(batches.len(), 2);
    connection.refuse(&asked, ErrorCode::CorruptBatch).await;
    let (asked, _) = produce(&mut connection).await;
    assert_eq!(asked.message.entries.len(), 1);
    assert_eq!(asked.message.entries[0].partition, 1);
    connection.reply(&asked, &appended(&[5])).await;
    let (asked, _) = produce(&mut connection).await;
    assert_eq!(asked.message.entries[0].partition, 2);
    connection.refuse(&asked, ErrorCode::CorruptBatch).await;
    assert_eq!(soon(good).await.unwrap().offset, 5);
    assert_eq!(soon(bad).await.unwrap_err().code(), Some(ErrorCode::CorruptBatch));
}

#[tokio::test]
async fn a_record_that_takes_too_long_fails_and_the_next_goes_under_a_new_id() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().delivery_timeout(Duration::from_millis(150)).build().await.unwrap();
    let sending = tokio::spawn({
        let producer = producer.clone();
        async move { producer.send(Record::new("t", "late")).await }
    });
    connection.metadata("t", 1).await;
    connection.init_producer(7).await;
    let (_unanswered, _) = produce(&mut connection).await;
    assert_eq!(soon(sending).await.unwrap(), Err(Error::Timeout("delivering a record")));
    let next = tokio::spawn(async move { producer.send(Record::new("t", "next")).await });
    connection.init_producer(8).await;
    let (asked, batches) = produce(&mut connection).await;
    assert_eq!(identity_of(&batches[0]), (8, 0));
    connection.reply(&asked, &appended(&[3])).await;
    assert_eq!(soon(next).await.unwrap().unwrap().offset, 3);
}

#[tokio::test]
async fn without_a_broker_records_fail_after_the_delivery_timeout() {
    let broker = FakeBroker::start().await;
    let (client, connection) = broker.client().await;
    let producer = client.producer().delivery_timeout(Duration::from_millis(200)).build().await.unwrap();
    drop((connection, broker));
    let error = soon(producer.send(Record::new("t", "x"))).await.unwrap_err();
    assert!(error.retryable(), "{error}");
}

#[tokio::test]
async fn a_full_buffer_holds_up_the_caller_until_something_is_acknowledged() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().buffer_bytes(1000).build().await.unwrap();
    let first = tokio::spawn({
        let producer = producer.clone();
        async move { producer.enqueue(Record::new("t", vec![0; 900])).await }
    });
    connection.metadata("t", 1).await;
    let first = soon(first).await.unwrap().unwrap();
    connection.init_producer(7).await;
    let (asked, _) = produce(&mut connection).await;
    let record = || Record::new("t", vec![1; 500]);
    let blocked = tokio::time::timeout(QUIET, producer.enqueue(record())).await;
    assert!(blocked.is_err(), "there is no room");
    let waiting = tokio::spawn({
        let producer = producer.clone();
        async move { producer.send(record()).await }
    });
    connection.reply(&asked, &appended(&[0])).await;
    soon(first).await.unwrap();
    let (asked, batches) = produce(&mut connection).await;
    let count = BatchHeader::parse(&batches[0]).unwrap().record_count;
    assert_eq!(count, 1, "the one that was given up is not sent");
    connection.reply(&asked, &appended(&[1])).await;
    assert_eq!(soon(waiting).await.unwrap().unwrap().offset, 1);
}

#[tokio::test]
async fn a_record_over_the_limit_is_refused_here_and_the_limit_is_named() {
    let mut broker = FakeBroker::start().await;
    broker.welcome.max_record_bytes = 1000;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().build().await.unwrap();
    let error = producer.enqueue(Record::new("t", vec![0; 1001])).await.unwrap_err();
    assert!(!error.retryable() && error.to_string().contains("1000"), "{error}");
    connection.expect_quiet().await;
}

#[tokio::test]
async fn a_deleted_topic_is_asked_for_again() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = client.producer().build().await.unwrap();
    let send = || {
        let producer = producer.clone();
        tokio::spawn(async move { producer.send(Record::new("t", "x")).await })
    };
    let sending = send();
    connection.metadata("t", 1).await;
    connection.init_producer(7).await;
    let (asked, _) = produce(&mut connection).await;
    let error = Some(message::Error::new(ErrorCode::UnknownTopic, "gone"));
    let results = vec![message::ProduceResult { error, ..Default::default() }];
    connection.reply(&asked, &message::ProduceReply { results }).await;
    assert_eq!(soon(sending).await.unwrap().unwrap_err().code(), Some(ErrorCode::UnknownTopic));
    let sending = send();
    connection.metadata("t", 1).await;
    let (asked, _) = produce(&mut connection).await;
    connection.reply(&asked, &appended(&[0])).await;
    soon(sending).await.unwrap().unwrap();
}

#[tokio::test]
async fn flushing_waits_for_what_was_there_and_not_for_what_follows() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let producer = Arc::new(client.producer().build().await.unwrap());
    let first = tokio::spawn({
        let producer = producer.clone();
        async move { producer.enqueue(Record::new("t", "1")).await }
    });
    connection.metadata("t", 1).await;
    let _first = soon(first).await.unwrap().unwrap();
    let flushing = tokio::spawn({
        let producer = producer.clone();
        async move { producer.flush().await }
    });
    connection.init_producer(7).await;
    let (asked, _) = produce(&mut connection).await;
    tokio::time::sleep(QUIET).await;
    assert!(!flushing.is_finished());
    let _second = producer.enqueue(Record::new("t", "2")).await.unwrap();
    connection.reply(&asked, &appended(&[0])).await;
    let (_unanswered, _) = produce(&mut connection).await;
    soon(flushing).await.unwrap().unwrap();
}
