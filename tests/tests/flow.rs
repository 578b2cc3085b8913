//! The way of a record, from the producer through the log to readers and workers, in one process.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;
use std::time::Duration;

use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;
use felucca_client::{Client, Nack, Outcome, Record, RedriveTarget, SettleStatus};
use tokio::time::timeout;

async fn start(dir: &Path) -> (Server, Client) {
    let settings = ServerSettings {
        data_dir: dir.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        ..ServerSettings::default()
    };
    let server = Server::start(settings).await.unwrap();
    let client = Client::connect(server.local_addr().to_string()).await.unwrap();
    (server, client)
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_produced_record_is_consumed_as_it_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    client.admin().create_topic("orders", 3, &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let record = Record::new("orders", "two books")
        .key("customer-7")
        .header("trace", "abc")
        .timestamp(1_700_000_000_000);
    let ack = soon(producer.send(record)).await.unwrap();
    let mut consumer = client.consumer().topics(["orders"]).build().await.unwrap();
    let record = soon(consumer.next()).await.unwrap().unwrap();
    assert_eq!((&*record.topic, record.partition, record.offset), ("orders", ack.partition, ack.offset));
    assert_eq!(record.value.as_deref(), Some(&b"two books"[..]));
    assert_eq!(record.key.as_deref(), Some(&b"customer-7"[..]));
    assert_eq!(record.header("trace"), Some(&b"abc"[..]));
    assert_eq!(record.timestamp, 1_700_000_000_000);
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_there_after_a_clean_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    client.admin().create_topic("orders", 2, &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for i in 0..1000 {
        let _pending =
            producer.enqueue(Record::new("orders", i.to_string()).key((i % 7).to_string())).await.unwrap();
    }
    producer.flush().await.unwrap();
    let mut consumer = client.consumer().group("readers").topics(["orders"]).build().await.unwrap();
    for _ in 0..400 {
        soon(consumer.next()).await.unwrap().unwrap();
    }
    soon(consumer.close()).await.unwrap();
    server.shutdown().await;

    let (server, client) = start(dir.path()).await;
    let offsets = client.admin().offsets("orders").await.unwrap();
    assert_eq!(offsets.iter().map(|partition| partition.high_watermark).sum::<u64>(), 1000);
    let mut consumer = client.consumer().group("readers").topics(["orders"]).build().await.unwrap();
    for _ in 0..600 {
        soon(consumer.next()).await.unwrap().unwrap();
    }
    assert!(timeout(Duration::from_millis(200), consumer.next()).await.is_err(), "each record once");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_record_is_retried_dead_lettered_and_redriven_to_its_group_only() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let admin = client.admin();
    admin.create_topic("orders", 1, &[]).await.unwrap();
    let config = [("max-failures", "2"), ("backoff-initial", "10ms"), ("backoff-max", "10ms")];
    admin.create_share_group("payment", &["orders"], &config).await.unwrap();
    admin.create_share_group("email", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    producer.send(Record::new("orders", "cursed").key("k").header("h", "v")).await.unwrap();

    let mut payment = client.share_consumer("payment").build().await.unwrap();
    for failures in 0..2 {
        let delivery = soon(payment.next()).await.unwrap();
        assert_eq!((delivery.delivery_count, delivery.failure_count), (failures + 1, failures));
        let nack = Nack { class: "gateway".to_owned(), reason: "no answer".to_owned(), ..Nack::default() };
        assert_eq!(soon(delivery.nack(nack)).await.unwrap().status, SettleStatus::Ok);
    }
    let mut letters = client.consumer().topics(["dlq.payment.orders"]).build().await.unwrap();
    let letter = soon(letters.next()).await.unwrap().unwrap();
    assert_eq!(letter.value.as_deref(), Some(&b"cursed"[..]));
    assert_eq!(letter.header("h"), Some(&b"v"[..]));
    assert_eq!(letter.header("__dlq.errors.reason"), Some(&b"max_failures"[..]));
    assert_eq!(letter.header("__dlq.errors.class"), Some(&b"gateway"[..]));
    assert_eq!(letter.header("__dlq.errors.topic"), Some(&b"orders"[..]));
    assert_eq!(letter.header("__dlq.errors.delivery.count"), Some(&b"2"[..]));

    let redriven = soon(admin.redrive("payment", "orders", RedriveTarget::Group)).await.unwrap();
    assert_eq!((redriven.redriven, redriven.refused), (1, 0));
    let again = soon(payment.next()).await.unwrap();
    assert_eq!(again.value.as_deref(), Some(&b"cursed"[..]));
    assert_eq!(soon(again.ack()).await.unwrap().status, SettleStatus::Ok);
    let listed = admin.dead_letter_topics(Some("payment")).await.unwrap();
    assert_eq!((listed[0].pending, listed[0].redriven), (0, 1));

    let mut email = client.share_consumer("email").build().await.unwrap();
    soon(soon(email.next()).await.unwrap().ack()).await.unwrap();
    assert!(timeout(Duration::from_millis(200), email.next()).await.is_err(), "the other group sees it once");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_publishes_with_the_ack_and_workers_drain() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(dir.path()).await;
    let admin = client.admin();
    admin.create_topic("orders", 4, &[]).await.unwrap();
    admin.create_topic("payments", 4, &[]).await.unwrap();
    admin.create_share_group("payment", &["orders"], &[("ordering", "key")]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    for i in 0..2000 {
        let _pending =
            producer.enqueue(Record::new("orders", i.to_string()).key((i % 50).to_string())).await.unwrap();
    }
    producer.flush().await.unwrap();
    let worker = client.share_consumer("payment").concurrency(64).build().await.unwrap();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(worker.run(
        |delivery| async move {
            let value = delivery.value.clone().unwrap_or_default();
            Outcome::Complete(vec![
                Record::new("payments", value).key(delivery.key.clone().unwrap_or_default()),
            ])
        },
        async {
            finished.await.ok();
        },
    ));
    let mut consumer = client.consumer().topics(["payments"]).build().await.unwrap();
    let mut last = std::collections::HashMap::new();
    for _ in 0..2000 {
        let record = soon(consumer.next()).await.unwrap().unwrap();
        let number: u64 = std::str::from_utf8(record.value.as_deref().unwrap()).unwrap().parse().unwrap();
        let before = last.insert(record.key.clone(), number);
        assert!(before.is_none_or(|before| before + 50 == number), "{before:?} then {number}");
    }
    finish.send(()).unwrap();
    let report = soon(running).await.unwrap().unwrap();
    assert_eq!((report.acked, report.lost), (2000, 0));
    server.shutdown().await;
}
