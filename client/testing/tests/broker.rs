//! What the crate promises to those who test with it.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use felucca_client::{Client, Delivery, ErrorCode, Level, Nack, Outcome, Record, ShareConsumer, Start};
use felucca_testing::TestBroker;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);
const MINUTE: Duration = Duration::from_mins(1);

/// A topic `t` of one partition with a group `g` on it.
async fn prepared(broker: &TestBroker, config: &[(&str, &str)]) -> Client {
    let client = broker.client().await.unwrap();
    client
        .admin()
        .create_topic("t", 1, &[("allow-written", "true"), ("visibility", "written")])
        .await
        .unwrap();
    client.admin().create_share_group("g", &["t"], config).await.unwrap();
    client
}

async fn send(client: &Client, value: &str) {
    let producer = client.producer().build().await.unwrap();
    producer.send(Record::new("t", value.to_owned())).await.unwrap();
}

async fn next(member: &mut ShareConsumer) -> Delivery {
    timeout(SOON, member.next()).await.expect("a record in time").unwrap()
}

/// Nothing comes while the clock stands still.
async fn nothing(member: &mut ShareConsumer) {
    let waited = timeout(Duration::from_millis(50), member.next()).await;
    assert!(waited.is_err(), "{waited:?}");
}

#[tokio::test]
async fn it_starts_in_milliseconds() {
    let began = Instant::now();
    let broker = TestBroker::start().await.unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    broker.shutdown().await;
}

#[tokio::test]
async fn a_retry_comes_when_the_clock_has_passed_its_delay() {
    let broker = TestBroker::start().await.unwrap();
    let client = prepared(&broker, &[]).await;
    send(&client, "a").await;
    let mut member = client.share_consumer("g").build().await.unwrap();
    next(&mut member).await.nack(Nack::new("x", "y").delay(5 * MINUTE)).await.unwrap();
    broker.advance(5 * MINUTE - Duration::from_millis(1)).await;
    nothing(&mut member).await;
    broker.advance(Duration::from_millis(1)).await;
    assert_eq!(next(&mut member).await.failure_count, 1);
}

#[tokio::test]
async fn one_step_of_the_clock_sees_every_retry_in_its_turn() {
    let broker = TestBroker::start().await.unwrap();
    let config = [("backoff-initial", "1m"), ("backoff-max", "1m"), ("jitter", "0"), ("max-failures", "100")];
    let client = prepared(&broker, &config).await;
    send(&client, "a").await;
    let member = client.share_consumer("g").build().await.unwrap();
    let tries = Arc::new(AtomicU32::new(0));
    let seen = tries.clone();
    let handler = move |_: Delivery| {
        seen.fetch_add(1, Ordering::SeqCst);
        async { Outcome::nack("not yet") }
    };
    let worker = tokio::spawn(member.run(handler, std::future::pending()));
    assert!(broker.advance_until(MINUTE / 2, || tries.load(Ordering::SeqCst) == 1).await);
    broker.advance(10 * MINUTE).await;
    assert_eq!(tries.load(Ordering::SeqCst), 11);
    let before = broker.now();
    assert!(broker.advance_until(60 * MINUTE, || tries.load(Ordering::SeqCst) == 20).await);
    let passed = broker.now().duration_since(before).unwrap();
    assert!(passed > 8 * MINUTE && passed <= 9 * MINUTE, "{passed:?}");
    assert!(!broker.advance_until(MINUTE / 2, || tries.load(Ordering::SeqCst) == 25).await);
    worker.abort();
}

#[tokio::test]
async fn a_lease_ends_by_the_clock_and_a_session_does_not() {
    let broker = TestBroker::start().await.unwrap();
    let client = prepared(&broker, &[("lease", "30s")]).await;
    send(&client, "a").await;
    let mut member = client.share_consumer("g").build().await.unwrap();
    let late = next(&mut member).await;
    broker.advance(Duration::from_secs(45)).await;
    assert_eq!(next(&mut member).await.delivery_count, 2);
    assert!(!late.ack().await.unwrap().is_done());
}

#[tokio::test]
async fn records_have_the_time_of_the_clock() {
    let began = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let broker = TestBroker::builder().clock(began).start().await.unwrap();
    assert_eq!(broker.now(), began);
    broker.advance(Duration::from_secs(500)).await;
    assert_eq!(broker.now(), began + Duration::from_secs(500));
    broker.restart().await.unwrap();
    assert_eq!(broker.now(), began + Duration::from_secs(500));
}

#[tokio::test]
async fn records_live_through_a_restart_a_kill_and_a_power_cut() {
    let broker = TestBroker::start().await.unwrap();
    let client = prepared(&broker, &[]).await;
    send(&client, "1").await;
    broker.restart().await.unwrap();
    send(&client, "2").await;
    broker.kill().await.unwrap();
    send(&client, "3").await;
    broker.cut_power().await.unwrap();
    let mut consumer = client.consumer().assign("t", [0]).start(Start::Beginning).build().await.unwrap();
    for expected in ["1", "2", "3"] {
        let record = timeout(SOON, consumer.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(record.value.unwrap(), expected);
    }
}

#[tokio::test]
async fn what_was_only_written_is_gone_after_a_power_cut_and_there_after_a_kill() {
    for (power, there) in [(false, true), (true, false)] {
        let broker = TestBroker::start().await.unwrap();
        let client = prepared(&broker, &[]).await;
        let producer = client.producer().level(Level::Written).build().await.unwrap();
        producer.send(Record::new("t", "before")).await.unwrap();
        broker.advance(Duration::ZERO).await;
        // Else it would be synced soon after it was written.
        broker.fail_next_sync();
        producer.send(Record::new("t", "a")).await.unwrap();
        drop(producer);
        if power {
            broker.cut_power().await.unwrap();
        } else {
            broker.kill().await.unwrap();
        }
        let mut member = client.share_consumer("g").build().await.unwrap();
        let before = next(&mut member).await;
        assert_eq!(before.value.as_deref(), Some(&b"before"[..]));
        before.ack().await.unwrap();
        if there {
            assert_eq!(next(&mut member).await.value.as_deref(), Some(&b"a"[..]));
        } else {
            nothing(&mut member).await;
        }
    }
}

#[tokio::test]
async fn after_a_failed_write_or_sync_nothing_is_taken_until_it_is_started_again() {
    for sync in [false, true] {
        let broker = TestBroker::start().await.unwrap();
        let client = prepared(&broker, &[]).await;
        // What was begun has been written.
        broker.advance(Duration::ZERO).await;
        if sync {
            broker.fail_next_sync();
        } else {
            broker.fail_next_write();
        }
        let refused = client.admin().create_topic("other", 1, &[]).await.unwrap_err();
        assert_eq!(refused.code(), Some(ErrorCode::ReadOnly), "{refused}");
        broker.restart().await.unwrap();
        client.admin().create_topic("another", 1, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn clients_live_through_a_cut_connection() {
    let broker = TestBroker::start().await.unwrap();
    let client = prepared(&broker, &[]).await;
    let mut member = client.share_consumer("g").build().await.unwrap();
    broker.disconnect_clients();
    send(&client, "a").await;
    assert!(next(&mut member).await.ack().await.unwrap().is_done());
}

#[tokio::test]
async fn replies_can_be_delayed() {
    let broker = TestBroker::start().await.unwrap();
    let client = prepared(&broker, &[]).await;
    let delay = Duration::from_millis(100);
    broker.delay_replies(delay);
    let began = Instant::now();
    client.admin().create_topic("slow", 1, &[]).await.unwrap();
    assert!(began.elapsed() >= delay);
    broker.delay_replies(Duration::ZERO);
    let began = Instant::now();
    client.admin().create_topic("fast", 1, &[]).await.unwrap();
    assert!(began.elapsed() < delay);
}

#[tokio::test]
async fn one_on_a_directory_keeps_its_records_over_a_restart() {
    let broker = TestBroker::builder().on_disk().start().await.unwrap();
    let client = prepared(&broker, &[]).await;
    send(&client, "a").await;
    broker.restart().await.unwrap();
    let mut member = client.share_consumer("g").build().await.unwrap();
    next(&mut member).await.ack().await.unwrap();
}

#[tokio::test]
async fn a_setting_that_is_none_is_named() {
    let error = TestBroker::builder().setting("max-recrod-bytes", "1").start().await.unwrap_err().to_string();
    assert!(error.contains("max-record-bytes"), "{error}");
}
