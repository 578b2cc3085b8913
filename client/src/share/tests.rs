//! The share consumer against a broker that hangs up, takes leases back and answers late.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};
use tokio::sync::Notify;

use super::{
    Breaker, Delivery, HandlerFn, Nack, Outcome, SettleStatus, ShareConsumer, ShareConsumerBuilder, json,
};
use crate::record::Record;
use crate::testing::{Asked, FakeBroker, FakeConnection, QUIET, numbered, soon, topic_id};

const LEASE_MS: u32 = 30_000;

async fn joined(connection: &mut FakeConnection, builder: ShareConsumerBuilder) -> (ShareConsumer, u64) {
    let building = tokio::spawn(builder.member_id("m").build());
    let asked = connection.expect::<message::ShareSubscribe>(Api::ShareSubscribe).await;
    connection.reply(&asked, &message::Empty {}).await;
    (soon(building).await.unwrap().unwrap(), asked.message.subscription)
}

/// Leases records under sequences that are their offsets.
async fn lease(
    connection: &mut FakeConnection,
    subscription: u64,
    offsets: std::ops::Range<u64>,
    lease_ms: u32,
) {
    let leased = message::LeasedRecords {
        subscription,
        topic_id: topic_id("t"),
        partition: 0,
        boot_epoch: 1,
        first_sequence: offsets.start,
        lease_ms,
        ..Default::default()
    };
    connection.push(Api::LeasedRecords, subscription, &leased, &numbered(offsets)).await;
}

type Settled = Vec<(u64, message::Outcome)>;

async fn settle(connection: &mut FakeConnection) -> (Asked<message::Settle>, Settled) {
    let asked = connection.expect_past_credit::<message::Settle>(Api::Settle).await;
    let settled = settled(&asked.message);
    (asked, settled)
}

fn settled(settle: &message::Settle) -> Settled {
    let settlements = settle.batches.iter().flat_map(|batch| &batch.settlements);
    settlements.map(|settlement| (settlement.offset, settlement.outcome())).collect()
}

fn statuses(statuses: &[SettleStatus]) -> message::SettleReply {
    let result =
        |status: &SettleStatus| message::SettleResult { status: (*status).into(), ..Default::default() };
    message::SettleReply { results: statuses.iter().map(result).collect() }
}

/// Says yes to everything until the member leaves; returns what was settled, extensions not counted, and subscriptions.
async fn to_the_end(connection: &mut FakeConnection) -> (Settled, Vec<message::ShareSubscribe>) {
    let (mut all, mut subscriptions) = (Vec::new(), Vec::new());
    loop {
        let frame = connection.request().await.expect("a request");
        let (api, correlation, payload) =
            (Api::try_from(frame.api).unwrap(), frame.correlation, Bytes::new());
        match api {
            Api::Settle => {
                let asked = Asked { api, correlation, message: frame.decode_message().unwrap(), payload };
                let settled = settled(&asked.message);
                connection.reply(&asked, &statuses(&vec![SettleStatus::Ok; settled.len()])).await;
                all.extend(settled.into_iter().filter(|(_, outcome)| *outcome != message::Outcome::Extend));
            }
            Api::ShareSubscribe => {
                let asked = Asked { api, correlation, message: frame.decode_message().unwrap(), payload };
                connection.reply(&asked, &message::Empty {}).await;
                subscriptions.push(asked.message);
            }
            // The one that waits for an answer is the last.
            Api::Unsubscribe if correlation != 0 => {
                connection.reply(&Asked { api, correlation, message: (), payload }, &message::Empty {}).await;
                all.sort_unstable();
                return (all, subscriptions);
            }
            Api::Unsubscribe | Api::Credit => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn settlements_gather_while_one_is_on_its_way_and_each_has_its_own_outcome() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..4, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let mut deliveries = Vec::new();
    for offset in 0..4 {
        let delivery = soon(member.next()).await.unwrap();
        assert_eq!((delivery.offset, delivery.lease.sequence, delivery.delivery_count), (offset, offset, 1));
        deliveries.push(delivery);
    }
    let mut deliveries = deliveries.into_iter();
    let first = tokio::spawn(deliveries.next().unwrap().ack());
    let (asked, settlements) = settle(&mut connection).await;
    assert_eq!(settlements, [(0, message::Outcome::Ack)]);
    let second = tokio::spawn(deliveries.next().unwrap().ack());
    let third = tokio::spawn(deliveries.next().unwrap().nack(Nack::default()));
    let fourth = tokio::spawn(deliveries.next().unwrap().release());
    connection.expect_quiet().await;
    connection.reply(&asked, &statuses(&[SettleStatus::Ok])).await;
    assert!(soon(first).await.unwrap().unwrap().is_done());
    let (asked, mut settlements) = settle(&mut connection).await;
    settlements.sort_unstable();
    let outcomes = [message::Outcome::Ack, message::Outcome::Nack, message::Outcome::Release];
    assert_eq!(settlements, [(1, outcomes[0]), (2, outcomes[1]), (3, outcomes[2])]);
    let answers = asked.message.batches[0].settlements.iter().map(|settlement| match settlement.offset {
        1 => SettleStatus::Stale,
        2 => SettleStatus::Ok,
        _ => SettleStatus::Conflict,
    });
    connection.reply(&asked, &statuses(&answers.collect::<Vec<_>>())).await;
    assert_eq!(soon(second).await.unwrap().unwrap().status, SettleStatus::Stale);
    assert_eq!(soon(third).await.unwrap().unwrap().status, SettleStatus::Ok);
    assert_eq!(soon(fourth).await.unwrap().unwrap().status, SettleStatus::Conflict);
}

#[tokio::test]
async fn after_a_reconnect_the_member_names_what_it_holds_and_settles_under_the_old_leases() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.share_consumer("g").concurrency(1).prefetch(10);
    let (mut member, subscription) = joined(&mut connection, builder).await;
    lease(&mut connection, subscription, 0..3, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let acked = soon(member.next()).await.unwrap();
    let kept = soon(member.next()).await.unwrap();
    let acking = tokio::spawn(acked.ack());
    let (before, _) = settle(&mut connection).await;
    drop(connection);

    let mut connection = broker.accept().await;
    let (mut subscribed, mut repeated) = (None, None);
    while subscribed.is_none() || repeated.is_none() {
        let frame = connection.request().await.unwrap();
        let (api, correlation) = (Api::try_from(frame.api).unwrap(), frame.correlation);
        match api {
            Api::ShareSubscribe => {
                let message: message::ShareSubscribe = frame.decode_message().unwrap();
                let asked = Asked { api, correlation, message, payload: Bytes::new() };
                connection.reply(&asked, &message::Empty {}).await;
                subscribed = Some(asked.message);
            }
            Api::Settle => {
                let message: message::Settle = frame.decode_message().unwrap();
                repeated = Some(Asked { api, correlation, message, payload: Bytes::new() });
            }
            other => panic!("{other:?}"),
        }
    }
    let subscribed = subscribed.unwrap();
    let mut held: Vec<u64> = subscribed.held.iter().map(|lease| lease.offset).collect();
    held.sort_unstable();
    assert_eq!((held, subscribed.credit_records, &*subscribed.member_id), (vec![0, 1, 2], 7, "m"));
    let repeated = repeated.unwrap();
    assert_eq!(repeated.message, before.message);
    connection.reply(&repeated, &statuses(&[SettleStatus::AlreadySettled])).await;
    let result = soon(acking).await.unwrap().unwrap();
    assert!(result.is_done(), "the first try did it: {result:?}");
    let credit = connection.expect::<message::Credit>(Api::Credit).await.message;
    assert_eq!((credit.subscription, credit.records), (subscribed.subscription, 1));
    let settling = tokio::spawn(kept.ack());
    let (asked, settlements) = settle(&mut connection).await;
    assert_eq!(settlements, [(1, message::Outcome::Ack)]);
    connection.reply(&asked, &statuses(&[SettleStatus::AlreadySettled])).await;
    // Not repeated: somebody else settled it.
    assert!(!soon(settling).await.unwrap().unwrap().is_done());
}

#[tokio::test]
async fn a_member_whose_session_ended_joins_again() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    let end = |subscription, code| {
        let error = Some(message::Error::new(code, "as the test says"));
        message::SubscriptionEnded { subscription, error, ..Default::default() }
    };
    let ended = end(subscription, ErrorCode::UnknownMember);
    connection.push(Api::SubscriptionEnded, subscription, &ended, &[]).await;
    let asked = loop {
        let frame = connection.request().await.unwrap();
        if frame.api == u8::from(Api::ShareSubscribe) {
            let message: message::ShareSubscribe = frame.decode_message().unwrap();
            let correlation = frame.correlation;
            break Asked { api: Api::ShareSubscribe, correlation, message, payload: Bytes::new() };
        }
    };
    connection.reply(&asked, &message::Empty {}).await;
    let subscription = asked.message.subscription;
    let ended = end(subscription, ErrorCode::UnknownGroup);
    connection.push(Api::SubscriptionEnded, subscription, &ended, &[]).await;
    assert_eq!(soon(member.next()).await.unwrap_err().code(), Some(ErrorCode::UnknownGroup));
}

#[tokio::test]
async fn what_is_dropped_unsettled_goes_back_and_the_member_leaves_after_the_last_delivery() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..4, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let dropped = soon(member.next()).await.unwrap();
    let kept = soon(member.next()).await.unwrap();
    drop(dropped);
    drop(member);
    let acking = tokio::spawn(async move {
        tokio::time::sleep(QUIET).await;
        kept.ack().await
    });
    let (settlements, subscriptions) = soon(to_the_end(&mut connection)).await;
    let release = message::Outcome::Release;
    assert_eq!(settlements, [(0, release), (1, message::Outcome::Ack), (2, release), (3, release)]);
    assert!(soon(acking).await.unwrap().unwrap().is_done());
    // While the last one was worked on, the member stayed, without credit.
    assert_eq!(subscriptions.len(), 1);
    let (records, bytes) = (subscriptions[0].credit_records, subscriptions[0].credit_bytes);
    assert_eq!((records, bytes), (0, 0));
    assert!(subscriptions[0].held.iter().any(|lease| lease.offset == 1));
}

#[tokio::test]
async fn a_worker_settles_by_outcome_and_a_panic_is_a_nack() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..5, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let started = Arc::new(AtomicUsize::new(0));
    let (done, counted) = (Arc::new(Notify::new()), started.clone());
    let shutdown = done.clone();
    let handler = move |delivery: Delivery| {
        if counted.fetch_add(1, Ordering::Relaxed) == 4 {
            done.notify_one();
        }
        assert!(delivery.offset != 4, "before the future");
        async move {
            match delivery.offset {
                0 => Outcome::Ack,
                1 => Outcome::nack("later"),
                2 => Outcome::reject("broken", "never"),
                _ => panic!("within the future"),
            }
        }
    };
    let running = tokio::spawn(member.run(handler, async move { shutdown.notified().await }));
    let (settlements, _) = soon(to_the_end(&mut connection)).await;
    let nack = message::Outcome::Nack;
    let expected =
        [(0, message::Outcome::Ack), (1, nack), (2, message::Outcome::Reject), (3, nack), (4, nack)];
    assert_eq!(settlements, expected);
    let report = soon(running).await.unwrap().unwrap();
    assert_eq!((report.acked, report.nacked, report.rejected, report.lost), (1, 3, 1, 0));
}

#[tokio::test]
async fn shutting_down_releases_what_was_not_started_and_cuts_off_what_does_not_end() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.share_consumer("g").concurrency(2).drain_timeout(Duration::from_millis(200));
    let (member, subscription) = joined(&mut connection, builder).await;
    lease(&mut connection, subscription, 0..5, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let stop = Arc::new(Notify::new());
    let (shutdown, begun) = (stop.clone(), stop);
    let handler = move |delivery: Delivery| {
        if delivery.offset == 1 {
            begun.notify_one();
        }
        async move {
            match delivery.offset {
                0 => tokio::time::sleep(Duration::from_millis(100)).await,
                _ => std::future::pending().await,
            }
            Outcome::Ack
        }
    };
    let running = tokio::spawn(member.run(handler, async move { shutdown.notified().await }));
    let (settlements, subscriptions) = soon(to_the_end(&mut connection)).await;
    let release = message::Outcome::Release;
    let expected =
        [(0, message::Outcome::Ack), (1, message::Outcome::Nack), (2, release), (3, release), (4, release)];
    assert_eq!(settlements, expected);
    assert!(subscriptions.iter().all(|subscribed| subscribed.credit_records == 0));
    let report = soon(running).await.unwrap().unwrap();
    assert_eq!((report.acked, report.nacked, report.released, report.lost), (1, 1, 3, 0));
}

#[tokio::test]
async fn leases_of_handlers_and_of_the_queue_are_extended_and_a_lost_one_is_told() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.share_consumer("g").concurrency(1);
    let (member, subscription) = joined(&mut connection, builder).await;
    lease(&mut connection, subscription, 0..2, 400).await;
    connection.metadata("t", 1).await;
    let stop = Arc::new(Notify::new());
    let shutdown = stop.clone();
    let handler = move |delivery: Delivery| {
        let stop = stop.clone();
        async move {
            delivery.lease_lost().await;
            assert!(delivery.lease_is_lost());
            stop.notify_one();
            Outcome::Ack
        }
    };
    let running = tokio::spawn(member.run(handler, async move { shutdown.notified().await }));
    let mut extended = [0; 2];
    while extended != [2, 2] {
        let (asked, settlements) = settle(&mut connection).await;
        let mut answers = Vec::new();
        for (offset, outcome) in settlements {
            assert_eq!(outcome, message::Outcome::Extend);
            extended[offset as usize] += 1;
            let remaining_ms = if extended[offset as usize] < 2 { 200 } else { 60_000 };
            answers.push(message::SettleResult { remaining_ms, ..Default::default() });
        }
        connection.reply(&asked, &message::SettleReply { results: answers }).await;
    }
    // Long leases now: nothing to do. A broker that takes a lease back says so at the next extension.
    connection.expect_quiet().await;
    drop(connection);
    let mut connection = broker.accept().await;
    let asked = connection.expect::<message::ShareSubscribe>(Api::ShareSubscribe).await;
    assert_eq!(asked.message.held.len(), 2);
    connection.reply(&asked, &message::Empty {}).await;
    running.abort();
}

#[tokio::test]
async fn a_handler_whose_lease_was_taken_back_learns_it() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..1, 200).await;
    connection.metadata("t", 1).await;
    let stop = Arc::new(Notify::new());
    let shutdown = stop.clone();
    let handler = move |delivery: Delivery| {
        let stop = stop.clone();
        async move {
            delivery.lease_lost().await;
            stop.notify_one();
            Outcome::Ack
        }
    };
    let running = tokio::spawn(member.run(handler, async move { shutdown.notified().await }));
    let (asked, settlements) = settle(&mut connection).await;
    assert_eq!(settlements, [(0, message::Outcome::Extend)]);
    connection.reply(&asked, &statuses(&[SettleStatus::Stale])).await;
    let (asked, settlements) = loop {
        let frame = connection.request().await.unwrap();
        let (api, correlation) = (Api::try_from(frame.api).unwrap(), frame.correlation);
        match api {
            Api::Settle => {
                let message: message::Settle = frame.decode_message().unwrap();
                let settlements = settled(&message);
                break (Asked { api, correlation, message, payload: Bytes::new() }, settlements);
            }
            Api::ShareSubscribe => {
                let asked = Asked { api, correlation, message: (), payload: Bytes::new() };
                connection.reply(&asked, &message::Empty {}).await;
            }
            _ => {}
        }
    };
    assert_eq!(settlements, [(0, message::Outcome::Ack)]);
    connection.reply(&asked, &statuses(&[SettleStatus::Stale])).await;
    let report = soon(async {
        let (report, _) = tokio::join!(running, to_the_end(&mut connection));
        report.unwrap().unwrap()
    })
    .await;
    assert_eq!((report.acked, report.lost), (0, 1));
}

#[tokio::test]
async fn completing_sends_outputs_to_the_partitions_of_their_keys_and_is_repeated_over_reconnects() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (mut member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..1, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let delivery = soon(member.next()).await.unwrap();
    let outputs = vec![Record::new("t", "out").key("k"), Record::new("t", "more").key("k")];
    let completing = tokio::spawn(delivery.complete(outputs));
    let before = connection.expect::<message::Complete>(Api::Complete).await;
    assert_eq!((before.message.outputs.len(), before.message.outputs[0].partition), (1, 0));
    drop(connection);
    let mut connection = broker.accept().await;
    let again = loop {
        let frame = connection.request().await.unwrap();
        let (api, correlation) = (Api::try_from(frame.api).unwrap(), frame.correlation);
        let payload = frame.payload.clone().freeze();
        if api == Api::Complete {
            break Asked::<message::Complete> {
                api,
                correlation,
                message: frame.decode_message().unwrap(),
                payload,
            };
        }
        connection.reply(&Asked { api, correlation, message: (), payload }, &message::Empty {}).await;
    };
    assert_eq!((&again.message, &again.payload), (&before.message, &before.payload));
    let status = SettleStatus::Duplicate.into();
    let result = Some(message::SettleResult { status, ..Default::default() });
    connection.reply(&again, &message::CompleteReply { result, base_offsets: Vec::new() }).await;
    assert!(soon(completing).await.unwrap().unwrap().is_done());
}

#[tokio::test]
async fn a_record_that_cannot_be_completed_is_tried_again_and_not_held_for_ever() {
    for (code, class, counted) in
        [(ErrorCode::ReadOnly, "complete-failed", false), (ErrorCode::UnknownPartition, "output-topic", true)]
    {
        let broker = FakeBroker::start().await;
        let (client, mut connection) = broker.client().await;
        let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
        lease(&mut connection, subscription, 0..1, LEASE_MS).await;
        connection.metadata("t", 1).await;
        let handler = |_: Delivery| async move { Outcome::Complete(vec![Record::new("t", "out")]) };
        let running = tokio::spawn(member.run(handler, std::future::pending()));
        let asked = soon(connection.expect_past_credit::<message::Complete>(Api::Complete)).await;
        connection.refuse(&asked, code).await;
        let (settlements, details) = soon(next_settled(&mut connection)).await;
        assert_eq!(settlements, [(0, message::Outcome::Nack)]);
        assert_eq!((&*details[0].class, !details[0].not_counted), (class, counted));
        running.abort();
    }
}

/// Answers extensions and subscriptions until the next settlement of another kind, which is answered with `OK`.
async fn next_settled(connection: &mut FakeConnection) -> (Settled, Vec<message::SettlementDetail>) {
    loop {
        let frame = connection.request().await.expect("a request");
        let (api, correlation, payload) =
            (Api::try_from(frame.api).unwrap(), frame.correlation, Bytes::new());
        match api {
            Api::Settle => {
                let asked = Asked { api, correlation, message: frame.decode_message().unwrap(), payload };
                let settled = settled(&asked.message);
                let details = asked.message.batches.iter().flat_map(|batch| &batch.settlements);
                let details =
                    details.map(|settlement| settlement.detail.clone().unwrap_or_default()).collect();
                connection.reply(&asked, &statuses(&vec![SettleStatus::Ok; settled.len()])).await;
                if settled.iter().any(|(_, outcome)| *outcome != message::Outcome::Extend) {
                    return (settled, details);
                }
            }
            _ if correlation == 0 => {}
            _ => {
                connection.reply(&Asked { api, correlation, message: (), payload }, &message::Empty {}).await;
            }
        }
    }
}

#[tokio::test]
async fn a_handler_that_takes_too_long_is_dropped_and_its_record_nacked() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.share_consumer("g").handler_timeout(Duration::from_millis(50));
    let (member, subscription) = joined(&mut connection, builder).await;
    lease(&mut connection, subscription, 0..1, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let held = Arc::new(());
    let probe = held.clone();
    let handler = move |_: Delivery| {
        let held = held.clone();
        async move {
            std::future::pending::<()>().await;
            drop(held);
        }
    };
    let running = tokio::spawn(member.run(handler, std::future::pending()));
    let (settlements, details) = soon(next_settled(&mut connection)).await;
    assert_eq!(settlements, [(0, message::Outcome::Nack)]);
    assert_eq!((&*details[0].class, details[0].not_counted), ("timeout", false));
    assert_eq!(Arc::strong_count(&probe), 2, "the handler's future is gone");
    running.abort();
}

#[tokio::test]
async fn at_the_end_of_its_lease_a_handler_is_dropped_although_the_broker_is_gone() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..1, 300).await;
    connection.metadata("t", 1).await;
    let (began, dropped) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begun, end) = (began.clone(), dropped.clone());
    struct Told(Arc<Notify>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    let handler = move |_: Delivery| {
        let told = Told(dropped.clone());
        began.notify_one();
        async move {
            std::future::pending::<()>().await;
            drop(told);
        }
    };
    let running = tokio::spawn(member.run(handler, std::future::pending()));
    soon(begun.notified()).await;
    let since = std::time::Instant::now();
    drop(connection);
    soon(end.notified()).await;
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    let mut connection = broker.accept().await;
    let subscribed = loop {
        let frame = soon(connection.request()).await.unwrap();
        if frame.api == u8::from(Api::ShareSubscribe) {
            break frame.decode_message::<message::ShareSubscribe>().unwrap();
        }
    };
    assert_eq!(subscribed.held.len(), 0, "nobody works on it any more");
    running.abort();
}

#[tokio::test]
async fn a_value_that_cannot_be_decoded_is_rejected_and_others_are_handed_over_decoded() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..2, LEASE_MS).await;
    connection.metadata("t", 1).await;
    // Values are their offsets; only 1 is a number above zero.
    let handler = json(|number: std::num::NonZeroU8, delivery: Delivery| async move {
        assert_eq!(u64::from(number.get()), delivery.offset);
    });
    let running = tokio::spawn(member.run(handler, std::future::pending()));
    let mut all = Vec::new();
    while all.len() < 2 {
        let (settlements, details) = soon(next_settled(&mut connection)).await;
        all.extend(settlements.into_iter().zip(details.into_iter().map(|detail| detail.class)));
    }
    all.sort();
    let reject = ((0, message::Outcome::Reject), "undecodable".to_owned());
    assert_eq!(all, [reject, ((1, message::Outcome::Ack), String::new())]);
    running.abort();
}

#[tokio::test]
async fn a_batch_is_gathered_and_each_of_its_records_has_its_own_outcome() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..5, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let handler = |batch: Vec<Delivery>| async move {
        match batch.len() {
            // One outcome less than records.
            3 => vec![Outcome::Ack, Outcome::reject("bad", "by nature")],
            2 => panic!("both"),
            other => panic!("{other} records"),
        }
    };
    let linger = Duration::from_millis(50);
    let running = tokio::spawn(member.run_batches(3, linger, handler, std::future::pending()));
    let mut all = Vec::new();
    while all.len() < 5 {
        let (settlements, details) = soon(next_settled(&mut connection)).await;
        all.extend(settlements.into_iter().zip(details.into_iter().map(|detail| detail.class)));
    }
    all.sort();
    let nack = message::Outcome::Nack;
    let expected = [
        ((0, message::Outcome::Ack), ""),
        ((1, message::Outcome::Reject), "bad"),
        ((2, nack), "no-outcome"),
        ((3, nack), "panic"),
        ((4, nack), "panic"),
    ];
    let all: Vec<_> = all.iter().map(|(settled, class)| (*settled, class.as_str())).collect();
    assert_eq!(all, expected);
    running.abort();
}

#[tokio::test]
async fn while_the_handlers_dependency_is_down_the_subscription_pauses_and_then_begins_with_one_record() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let builder = client.share_consumer("g").concurrency(1).prefetch(8);
    let (member, subscription) = joined(&mut connection, builder).await;
    lease(&mut connection, subscription, 0..4, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let calls = AtomicUsize::new(0);
    let handler = move |_: Delivery| {
        let down = calls.fetch_add(1, Ordering::Relaxed) < 2;
        async move { if down { Err(Nack::new("down", "no answer")) } else { Ok(()) } }
    };
    let breaker = Breaker::new(2).pause(Duration::from_millis(600), Duration::from_secs(1));
    let running = tokio::spawn(member.serve(breaker.guard(handler), std::future::pending()));
    let (mut settlements, mut credits) = (Vec::new(), Vec::new());
    // Two fail, two are released; a subscription without credit; then credit for one.
    let mut open = subscription;
    let trial = loop {
        let frame = soon(connection.request()).await.expect("a request");
        let (api, correlation, payload) =
            (Api::try_from(frame.api).unwrap(), frame.correlation, Bytes::new());
        match api {
            Api::Settle => {
                let asked = Asked { api, correlation, message: frame.decode_message().unwrap(), payload };
                let settled = settled(&asked.message);
                connection.reply(&asked, &statuses(&vec![SettleStatus::Ok; settled.len()])).await;
                settlements.extend(settled);
            }
            Api::ShareSubscribe => {
                let message: message::ShareSubscribe = frame.decode_message().unwrap();
                assert_eq!((message.credit_records, settlements.len() >= 2), (0, true));
                open = message.subscription;
                let asked = Asked { api, correlation, message, payload };
                connection.reply(&asked, &message::Empty {}).await;
            }
            Api::Credit => {
                let credit: message::Credit = frame.decode_message().unwrap();
                // Bytes alone may come back earlier: nothing is delivered for them.
                if open != subscription && credit.subscription == open && credit.records > 0 {
                    break credit.records;
                }
                credits.push(credit.records);
            }
            _ => {}
        }
    };
    assert_eq!(trial, 1, "to see whether it is up again");
    settlements.sort_unstable();
    let (nack, release) = (message::Outcome::Nack, message::Outcome::Release);
    assert_eq!(settlements, [(0, nack), (1, nack), (2, release), (3, release)]);
    lease(&mut connection, open, 4..5, LEASE_MS).await;
    let mut granted = 0;
    while granted < 8 {
        let frame = soon(connection.request()).await.expect("a request");
        let (api, correlation, payload) =
            (Api::try_from(frame.api).unwrap(), frame.correlation, Bytes::new());
        match api {
            Api::Settle => {
                let asked = Asked { api, correlation, message: frame.decode_message().unwrap(), payload };
                assert_eq!(settled(&asked.message), [(4, message::Outcome::Ack)]);
                connection.reply(&asked, &statuses(&[SettleStatus::Ok])).await;
            }
            Api::Credit => granted += frame.decode_message::<message::Credit>().unwrap().records,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(granted, 8, "all of the prefetch again");
    running.abort();
}

#[tokio::test]
async fn a_service_with_towers_layers_is_served_and_its_errors_are_nacks() {
    let broker = FakeBroker::start().await;
    let (client, mut connection) = broker.client().await;
    let (member, subscription) = joined(&mut connection, client.share_consumer("g")).await;
    lease(&mut connection, subscription, 0..2, LEASE_MS).await;
    connection.metadata("t", 1).await;
    let handler = HandlerFn(|delivery: Delivery| async move {
        match delivery.offset {
            0 => std::future::pending().await,
            _ => Outcome::Ack,
        }
    });
    let service = tower::ServiceBuilder::new()
        .concurrency_limit(1)
        .timeout(Duration::from_millis(50))
        .layer(Breaker::new(3))
        .service(handler);
    let running = tokio::spawn(member.serve(service, std::future::pending()));
    let mut all = Vec::new();
    while all.len() < 2 {
        let (settlements, details) = soon(next_settled(&mut connection)).await;
        all.extend(settlements.into_iter().zip(details));
    }
    assert_eq!(all[0].0, (0, message::Outcome::Nack));
    assert_eq!((&*all[0].1.class, &*all[0].1.reason), ("service", "request timed out"));
    assert_eq!(all[1].0, (1, message::Outcome::Ack), "one after the other");
    running.abort();
}
