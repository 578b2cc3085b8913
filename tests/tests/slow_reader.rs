//! A reader that lags holds no memory of the broker: what it has not read yet is on the disk, and nowhere else.

use std::time::Duration;

use felucca_client::{Client, Record, Start};
use felucca_tests::process::BrokerProcess;
use tokio::time::timeout;

const SETTINGS: [&str; 4] = [
    "--tail-cache-bytes=8MiB",
    "--unwritten-bytes=16MiB",
    "--journal-max-unsynced-bytes=8MiB",
    "--checkpoint-journal-bytes=32MiB",
];
const VALUE_BYTES: usize = 64 << 10;
const RECORDS: u64 = 4_000;
const READERS: usize = 8;
/// Of the broker, in an unoptimized build too; the readers lag by 250 MiB, each of them.
const MOST_GROWTH: u64 = 96 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_lag_hold_no_memory_and_miss_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_at(dir.path(), "127.0.0.1:0", &SETTINGS);
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    client.admin().create_topic("orders", 1, &[("allow-written", "true")]).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let value = vec![b'x'; VALUE_BYTES];
    producer.send(Record::new("orders", value.clone())).await.unwrap();
    let mut readers = Vec::new();
    for _ in 0..READERS {
        // A connection of its own, as a process of its own has.
        let client = Client::connect(broker.address().to_string()).await.unwrap();
        let reader = client.consumer().assign("orders", [0]).start(Start::Beginning).credit(100, 1 << 20);
        let mut reader = reader.build().await.unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap().offset, 0);
        readers.push((client, reader));
    }
    let before = broker.peak_bytes();
    for _ in 1..RECORDS {
        drop(producer.enqueue(Record::new("orders", value.clone())).await.unwrap());
    }
    producer.flush().await.unwrap();
    let growth = broker.peak_bytes() - before;
    assert!(growth < MOST_GROWTH, "{} MiB more", growth >> 20);
    for (_, reader) in &mut readers {
        for offset in 1..RECORDS {
            let record = timeout(Duration::from_secs(20), reader.next()).await.unwrap().unwrap().unwrap();
            assert_eq!(record.offset, offset);
        }
    }
    let growth = broker.peak_bytes() - before;
    assert!(growth < MOST_GROWTH, "{} MiB more after reading", growth >> 20);
}
