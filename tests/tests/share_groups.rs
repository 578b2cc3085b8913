//! Share groups from end to end, in one process: two processes under one name, letters at the limits, an operator's kick, and
//! leases that live through a restart.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use felucca_broker::byte_size::ByteSize;
use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;
use felucca_client::{Client, ErrorCode, Nack, Record, RedriveTarget, Reject, SettleStatus};
use futures::future::try_join_all;
use tokio::time::timeout;

async fn start(settings: ServerSettings) -> (Server, Client) {
    let server = Server::start(settings).await.unwrap();
    let client = Client::connect(server.local_addr().to_string()).await.unwrap();
    (server, client)
}

fn settings(dir: &Path) -> ServerSettings {
    ServerSettings {
        data_dir: dir.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        ..ServerSettings::default()
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_live_processes_with_one_member_id_the_older_is_told_and_the_newer_works() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(settings(dir.path())).await;
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("payment", &["orders"], &[]).await.unwrap();
    let other = Client::connect(server.local_addr().to_string()).await.unwrap();
    let mut older = client.share_consumer("payment").member_id("till-1").build().await.unwrap();
    let mut newer = other.share_consumer("payment").member_id("till-1").build().await.unwrap();
    assert_eq!(soon(older.next()).await.unwrap_err().code(), Some(ErrorCode::MemberFenced));
    let producer = client.producer().build().await.unwrap();
    producer.send(Record::new("orders", "one")).await.unwrap();
    let delivery = soon(newer.next()).await.unwrap();
    assert_eq!(soon(delivery.ack()).await.unwrap().status, SettleStatus::Ok);
    assert!(timeout(Duration::from_millis(300), newer.next()).await.is_err(), "the newer one stays");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_at_the_limit_is_dead_lettered_read_and_redriven() {
    let dir = tempfile::tempdir().unwrap();
    let limit = ByteSize::kib(4);
    let (server, client) =
        start(ServerSettings { max_record_bytes: limit, max_batch_bytes: limit, ..settings(dir.path()) })
            .await;
    let admin = client.admin();
    admin.create_topic("orders", 1, &[]).await.unwrap();
    admin.create_share_group("payment", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    // What a batch and a record have around the value takes some sixty bytes; one byte more than fits is refused.
    let mut length = 4 * 1024;
    while soon(producer.send(Record::new("orders", vec![b'x'; length]))).await.is_err() {
        length -= 1;
    }
    assert!(length > 4_000, "{length}");
    let mut payment = client.share_consumer("payment").build().await.unwrap();
    let delivery = soon(payment.next()).await.unwrap();
    let reject = Reject { class: "size".to_owned(), reason: "r".repeat(1_000), detail: "d".repeat(8_000) };
    assert_eq!(soon(delivery.reject(reject)).await.unwrap().status, SettleStatus::Ok);
    let mut letters = client.consumer().topics(["dlq.payment.orders"]).build().await.unwrap();
    let letter = soon(letters.next()).await.unwrap().unwrap();
    assert_eq!(letter.value.as_deref().map(<[u8]>::len), Some(length));
    assert_eq!(letter.header("__dlq.errors.detail").map(<[u8]>::len), Some(8_000));
    let redriven = soon(admin.redrive("payment", "orders", RedriveTarget::Group)).await.unwrap();
    assert_eq!(redriven.redriven, 1);
    let again = soon(payment.next()).await.unwrap();
    assert_eq!(again.value.as_deref().map(<[u8]>::len), Some(length));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kick_brings_back_what_waits_and_the_counts_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(settings(dir.path())).await;
    let admin = client.admin();
    admin.create_topic("orders", 1, &[]).await.unwrap();
    let config = [("backoff-initial", "1h"), ("backoff-max", "1h")];
    admin.create_share_group("payment", &["orders"], &config).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    producer.send(Record::new("orders", "one")).await.unwrap();
    let mut payment = client.share_consumer("payment").build().await.unwrap();
    let delivery = soon(payment.next()).await.unwrap();
    soon(delivery.nack(Nack { reason: "no answer".to_owned(), ..Nack::default() })).await.unwrap();
    let counts = async |client: &Client| {
        let description = client.admin().describe_group("payment").await.unwrap();
        description.partitions.into_iter().find(|one| one.topic == "orders").unwrap()
    };
    let before = counts(&client).await;
    assert_eq!((before.scheduled, before.available, before.failures), (1, 0, 1));
    assert_eq!(admin.kick_group("payment", Some("orders")).await.unwrap(), 1);
    assert_eq!(admin.kick_group("payment", None).await.unwrap(), 0);
    let again = soon(payment.next()).await.unwrap();
    assert_eq!((again.delivery_count, again.failure_count), (2, 1));
    soon(again.ack()).await.unwrap();
    let unknown = admin.kick_group("nobody", None).await.unwrap_err();
    assert_eq!(unknown.code(), Some(ErrorCode::UnknownGroup));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_lives_through_a_restart_of_the_broker_and_is_settled_under_its_old_name() {
    let dir = tempfile::tempdir().unwrap();
    let (server, client) = start(settings(dir.path())).await;
    client.admin().create_topic("orders", 1, &[]).await.unwrap();
    client.admin().create_share_group("payment", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    producer.send(Record::new("orders", "one")).await.unwrap();
    let mut payment = client.share_consumer("payment").build().await.unwrap();
    let delivery = soon(payment.next()).await.unwrap();
    let address = server.local_addr();
    server.shutdown().await;
    let (server, other) = start(ServerSettings { listen: address, ..settings(dir.path()) }).await;
    let described = other.admin().describe_group("payment").await.unwrap();
    assert_eq!(described.members.len(), 1, "it holds a lease");
    assert_eq!(soon(delivery.ack()).await.unwrap().status, SettleStatus::Ok);
    let described = other.admin().describe_group("payment").await.unwrap();
    let orders = described.partitions.iter().find(|one| one.topic == "orders").unwrap();
    assert_eq!((orders.acked, orders.failures, orders.deliveries), (1, 0, 1));
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_asks_for_much_that_is_on_disk_gets_all_of_it() {
    const RECORDS: usize = 16_000;
    let dir = tempfile::tempdir().unwrap();
    let (server, client) =
        start(ServerSettings { tail_cache_bytes: ByteSize::mib(1), ..settings(dir.path()) }).await;
    client.admin().create_topic("orders", 16, &[]).await.unwrap();
    client.admin().create_share_group("payment", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let value = Bytes::from(vec![b'x'; 4 << 10]);
    for _ in 0..RECORDS / 1_000 {
        let record = |key: usize| Record::new("orders", value.clone()).key(key.to_string());
        let sends = (0..1_000).map(|at| producer.send(record(at)));
        soon(try_join_all(sends)).await.unwrap();
    }
    // Every push takes several readings of the disk, and there are more pushes than may read at a time.
    let prefetch = (RECORDS as u32, 256 << 20);
    let mut payment = client
        .share_consumer("payment")
        .prefetch(prefetch.0)
        .prefetch_bytes(prefetch.1)
        .build()
        .await
        .unwrap();
    for _ in 0..RECORDS {
        soon(payment.next()).await.unwrap();
    }
    server.shutdown().await;
}
