//! A broker process that is killed again and again under load: what it acknowledged is there, once, in order.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use felucca_client::{Client, Outcome, Record};
use felucca_tests::process::BrokerProcess;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

const KEYS: u64 = 20;

/// Kills of the short form; `FELUCCA_CRASH_KILLS` asks for more.
fn kills() -> usize {
    std::env::var("FELUCCA_CRASH_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(8)
}

/// Time between kills: irregular, but the same in every run.
fn pause(round: usize) -> Duration {
    let mixed = (round as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    Duration::from_millis(150 + mixed % 700)
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_records_survive_kills_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(dir.path());
    let client = Client::connect(broker.address().to_string()).await.unwrap();
    let admin = client.admin();
    admin.create_topic("orders", 4, &[]).await.unwrap();
    admin.create_topic("done", 4, &[]).await.unwrap();
    let config = [("ordering", "key"), ("backoff-initial", "50ms"), ("backoff-max", "500ms")];
    admin.create_share_group("work", &["orders"], &config).await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let producing = tokio::spawn(produce(client.clone(), stop.clone()));
    let handled: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let worker = client.share_consumer("work").member_id("worker").concurrency(8).build().await.unwrap();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let log = handled.clone();
    let working = tokio::spawn(worker.run(
        move |delivery| {
            let log = log.clone();
            async move {
                let (key, value) = parse(delivery.value.as_deref().unwrap());
                log.lock().await.push((key, value));
                Outcome::Complete(vec![Record::new("done", format!("{key} {value}")).key(key.to_string())])
            }
        },
        async {
            finished.await.ok();
        },
    ));

    for round in 0..kills() {
        sleep(pause(round)).await;
        broker.kill_and_restart();
    }
    sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::Relaxed);
    let acknowledged = timeout(Duration::from_secs(60), producing).await.expect("the producer ends").unwrap();
    assert!(acknowledged.len() > 100, "only {} records were produced", acknowledged.len());

    // Every group drains within bounded time after the last fault.
    timeout(Duration::from_secs(60), async {
        loop {
            let group = admin.describe_group("work").await.unwrap();
            if group.partitions.iter().all(|partition| partition.lag == 0) {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("the share group drains");
    finish.send(()).unwrap();
    timeout(Duration::from_secs(60), working).await.expect("the worker ends").unwrap().unwrap();

    let orders = read_all(&client, "orders").await;
    let by_place: HashMap<(u32, u64), (u64, u64)> =
        orders.iter().map(|(partition, offset, value)| ((*partition, *offset), *value)).collect();
    for (place, value) in &acknowledged {
        assert_eq!(by_place.get(place), Some(value), "an acknowledged record is where it was said to be");
    }
    per_key_once_and_in_order("orders", &orders);
    let done = read_all(&client, "done").await;
    per_key_once_and_in_order("done", &done);
    assert_eq!(done.len(), orders.len(), "every order was completed exactly once");

    // A handler may see a record again after a crash, but never an older one of its key after a newer one.
    let mut last: BTreeMap<u64, u64> = BTreeMap::new();
    for (key, value) in handled.lock().await.iter() {
        let newest = last.entry(*key).or_insert(*value);
        assert!(*value >= *newest, "key {key}: {value} after {newest}");
        *newest = *value;
    }
    assert!(broker.stop(), "a clean stop");
}

/// Numbers per key, ascending; answers what was acknowledged, by place.
async fn produce(client: Client, stop: Arc<AtomicBool>) -> Vec<((u32, u64), (u64, u64))> {
    let producer = client.producer().build().await.unwrap();
    let mut pending = Vec::new();
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let (key, value) = (next % KEYS, next / KEYS);
        next += 1;
        let record = Record::new("orders", format!("{key} {value}")).key(key.to_string());
        pending.push(((key, value), producer.enqueue(record).await.unwrap()));
        if next % KEYS == 0 {
            sleep(Duration::from_millis(50)).await;
        }
    }
    let mut acknowledged = Vec::with_capacity(pending.len());
    for (value, ack) in pending {
        let ack = ack.await.expect("the producer tries until it succeeds");
        acknowledged.push(((ack.partition, ack.offset), value));
    }
    acknowledged
}

fn parse(value: &[u8]) -> (u64, u64) {
    let text = std::str::from_utf8(value).unwrap();
    let (key, value) = text.split_once(' ').unwrap();
    (key.parse().unwrap(), value.parse().unwrap())
}

/// Everything in a topic up to its high watermarks, by partition and offset.
async fn read_all(client: &Client, topic: &str) -> Vec<(u32, u64, (u64, u64))> {
    let offsets = client.admin().offsets(topic).await.unwrap();
    let total: u64 = offsets.iter().map(|partition| partition.high_watermark).sum();
    let mut consumer = client.consumer().topics([topic]).build().await.unwrap();
    let mut records = Vec::new();
    while (records.len() as u64) < total {
        let next =
            timeout(Duration::from_secs(20), consumer.next()).await.expect("the log is read to its end");
        let record = next.unwrap().unwrap();
        records.push((record.partition, record.offset, parse(record.value.as_deref().unwrap())));
    }
    records.sort_unstable();
    records
}

/// Numbers of each key: 0, 1, 2, … without a gap or a repetition, in the order of the log.
fn per_key_once_and_in_order(topic: &str, records: &[(u32, u64, (u64, u64))]) {
    let mut next: BTreeMap<u64, u64> = BTreeMap::new();
    for (partition, offset, (key, value)) in records {
        let expected = next.entry(*key).or_default();
        assert_eq!(value, expected, "{topic}/{partition} at {offset}, key {key}");
        *expected += 1;
    }
}
