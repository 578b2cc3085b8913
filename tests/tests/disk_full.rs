//! A broker whose disk is full: it refuses new records, does everything else, starts again, and recovers by itself.
//! Needs a mount namespace: root, or user namespaces.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use felucca_client::{BrokerCondition, Client, Error, Outcome, Record};
use felucca_tests::process::BrokerProcess;
use felucca_tests::small_disk::SmallDisk;
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};

const MIB: u64 = 1 << 20;
const LOW_WATER: u64 = 96 * MIB;
const RECORDS: usize = 300;
const PATIENCE: Duration = Duration::from_secs(60);

fn start(disk: &SmallDisk, listen: &str) -> BrokerProcess {
    let arguments = [
        ["--disk-low-water-bytes", "96MiB"],
        ["--disk-reserve-bytes", "16MiB"],
        ["--max-frame-bytes", "1MiB"],
        ["--max-batch-bytes", "512KiB"],
        ["--max-record-bytes", "256KiB"],
        ["--connection-in-flight-bytes", "1MiB"],
        ["--unwritten-bytes", "4MiB"],
        ["--journal-first-file-bytes", "1MiB"],
        ["--journal-file-bytes", "8MiB"],
        ["--checkpoint-interval", "2s"],
        ["--retention-check-interval", "200ms"],
    ];
    BrokerProcess::start_under(&disk.enter(), &disk.path().join("data"), listen, arguments.as_flattened())
}

async fn value_of(client: &Client, topic: &str) -> usize {
    let offsets = client.admin().offsets(topic).await.unwrap();
    offsets.iter().map(|one| usize::try_from(one.high_watermark - one.log_start).unwrap()).sum()
}

/// Reads the whole topic, which must hold `expected` records with these values in front.
async fn read_back(client: &Client, topic: &str, expected: usize) {
    let mut consumer = client.consumer().topics([topic]).build().await.unwrap();
    for at in 0..expected {
        let record =
            timeout(PATIENCE, consumer.next()).await.expect("the log is read to its end").unwrap().unwrap();
        let value = record.value.unwrap();
        assert!(value.starts_with(format!("{at} ").as_bytes()), "record {at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_records_only_and_recovers_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path(), 320);
    let mut broker = start(&disk, "127.0.0.1:0");
    let address = broker.address().to_string();
    let client = Client::connect(&address).await.unwrap();
    let admin = client.admin();
    admin.create_topic("orders", 1, &[]).await.unwrap();
    admin.create_topic("old", 1, &[]).await.unwrap();
    admin.create_share_group("work", &["orders"], &[]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let value = |at: usize| format!("{at} {}", "x".repeat(20_000));
    for at in 0..RECORDS {
        let _queued = producer.enqueue(Record::new("orders", value(at))).await.unwrap();
        let _queued = producer.enqueue(Record::new("old", value(at))).await.unwrap();
    }
    producer.flush().await.unwrap();
    assert!(disk.outside().join("data/RESERVE").exists());

    // Below the mark: no new records, everything else.
    disk.fill_until(LOW_WATER / 2);
    sleep(Duration::from_millis(600)).await;
    let impatient = client.producer().delivery_timeout(Duration::from_secs(3)).build().await.unwrap();
    let refused = impatient.send(Record::new("orders", "new")).await.unwrap_err();
    assert!(matches!(refused, Error::Timeout(_)), "it is tried until there is room, or no time: {refused}");
    let status = admin.describe_broker().await.unwrap();
    assert_eq!(status.condition(), BrokerCondition::DiskFull, "{status:?}");
    assert!(
        status.disk_available_bytes < Some(LOW_WATER) && status.reason.contains("nearly full"),
        "{status:?}"
    );
    assert_eq!(value_of(&client, "orders").await, RECORDS);
    read_back(&client, "orders", RECORDS).await;

    let handled: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    let worker = client.share_consumer("work").build().await.unwrap();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let seen = handled.clone();
    let working = tokio::spawn(worker.run(
        move |delivery| {
            seen.lock().insert(delivery.offset);
            async { Outcome::Ack }
        },
        async {
            finished.await.ok();
        },
    ));
    timeout(PATIENCE, async {
        while admin.describe_group("work").await.unwrap().partitions.iter().any(|one| one.lag > 0) {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("acks go on");
    finish.send(()).unwrap();
    timeout(PATIENCE, working).await.unwrap().unwrap().unwrap();
    assert_eq!(handled.lock().len(), RECORDS);

    // To the brim: the reserve is given up. Starts find room in it, one after the other.
    disk.fill_until(0);
    timeout(PATIENCE, async {
        while disk.outside().join("data/RESERVE").exists() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the reserve is given up");
    for _ in 0..3 {
        broker.kill();
        broker = start(&disk, &address);
        read_back(&client, "orders", RECORDS).await;
        sleep(Duration::from_millis(2500)).await;
    }
    assert!(disk.available() < LOW_WATER / 4, "{} bytes are free", disk.available());
    let group = admin.describe_group("work").await.unwrap();
    assert!(group.partitions.iter().all(|one| one.lag == 0), "no ack is lost");

    // A record that waits is taken when there is room, without anybody doing anything.
    let waiting = tokio::spawn({
        let producer = client.producer().build().await.unwrap();
        async move { producer.send(Record::new("orders", value(RECORDS))).await }
    });
    let before = disk.available();
    admin.delete_topic("old").await.unwrap();
    timeout(PATIENCE, async {
        while disk.available() < before + 2 * MIB {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("a deleted topic gives its room back");
    assert!(!waiting.is_finished());
    disk.empty();
    let ack = timeout(PATIENCE, waiting).await.expect("there is room again").unwrap().unwrap();
    assert_eq!(ack.offset, RECORDS as u64);
    read_back(&client, "orders", RECORDS + 1).await;
    assert!(disk.outside().join("data/RESERVE").exists(), "the reserve is made again");
    assert!(broker.stop(), "a clean stop");
}
