//! Compaction of a real broker that is killed meanwhile, against a reference that knows the latest record of each key.
//!
//! `FELUCCA_COMPACTION_RECORDS` sets how many records are written (at least 100,000), a quarter of them of keys of their own.
//! The memory of the broker has the same bound for any number.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::Path;
use std::time::{Duration, Instant};

use felucca_client::{Client, Record, Start};
use felucca_tests::process::BrokerProcess;
use tokio::time::sleep;

/// No pause that is not needed.
const SETTINGS: [&str; 7] = [
    "--cleaner-interval=20ms",
    "--retention-check-interval=100ms",
    "--tail-cache-bytes=8MiB",
    "--unwritten-bytes=32MiB",
    "--checkpoint-interval=1s",
    "--checkpoint-journal-bytes=32MiB",
    "--journal-file-bytes=16MiB",
];
const TOPIC: &[(&str, &str)] = &[
    ("cleanup.policy", "compact"),
    ("min.cleanable.dirty.ratio", "0.3"),
    ("delete.retention.ms", "0"),
    ("segment.bytes", "1MiB"),
];
/// Of the broker, in an unoptimized build too.
const MOST_MEMORY: u64 = 256 << 20;
/// Records of a segment that is still written to, and of some that are less than the part that must be new.
const SLACK: f64 = 1.6;

/// The state of a key after its latest record.
#[derive(Clone, Copy, Debug)]
struct Latest {
    offset: u64,
    is_tombstone: bool,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// The cleaner has room for so few keys that it needs several goes, and for so many that they are done in time.
fn start(data: &Path, listen: &str, records: u64) -> BrokerProcess {
    let room = format!("--cleaner-dedupe-buffer-bytes={}MiB", (records / 600_000).max(1));
    BrokerProcess::start_at(data, listen, &[&SETTINGS[..], &[&room]].concat())
}

/// Reads the whole log; answers how many records there are.
async fn check(client: &Client, count: u64, latest: &[Latest]) -> u64 {
    let consumer = client.consumer().assign("state", [0]).start(Start::Beginning);
    let mut consumer = consumer.build().await.unwrap();
    let mut found = vec![false; latest.len()];
    let (mut left, mut before) = (0, None);
    loop {
        let record = consumer.next().await.unwrap().unwrap();
        assert!(before < Some(record.offset), "{before:?}, then {}", record.offset);
        before = Some(record.offset);
        left += 1;
        let key = u64::from_be_bytes(record.key.as_deref().unwrap().try_into().unwrap()) as usize;
        if let Some(value) = &record.value {
            assert_eq!(value[..8], record.offset.to_be_bytes(), "offsets stay");
        }
        let is_latest = record.offset == latest[key].offset;
        if is_latest {
            assert_eq!(record.value.is_none(), latest[key].is_tombstone, "key {key}");
            found[key] = true;
        }
        if record.offset + 1 == count {
            break;
        }
    }
    for (key, (found, latest)) in found.iter().zip(latest).enumerate() {
        assert!(*found || latest.is_tombstone, "key {key} has lost its latest record: {latest:?}");
    }
    left
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_latest_record_of_each_key_stays_and_memory_is_flat() {
    let count = std::env::var("FELUCCA_COMPACTION_RECORDS").map_or(200_000, |count| count.parse().unwrap());
    let keys = count / 4;
    let dir = tempfile::tempdir().unwrap();
    let mut broker = start(dir.path(), "127.0.0.1:0", count);
    let address = broker.address().to_string();
    let client = Client::connect(&address).await.unwrap();
    client.admin().create_topic("state", 1, TOPIC).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let mut latest = vec![Latest { offset: u64::MAX, is_tombstone: false }; keys as usize];
    let mut random = Random(7);
    let mut peak = 0;
    for offset in 0..count {
        let key = if offset < keys { offset } else { random.below(keys) };
        let is_tombstone = random.below(10) == 0;
        latest[key as usize] = Latest { offset, is_tombstone };
        let name = key.to_be_bytes().to_vec();
        let value = [offset.to_be_bytes(); 6].concat();
        let record = if is_tombstone {
            Record::tombstone("state", name)
        } else {
            Record::new("state", value).key(name)
        };
        // The flush below says whether all of them were taken.
        drop(producer.enqueue(record).await.unwrap());
        if offset % (count / 4) == count / 8 {
            peak = peak.max(broker.peak_bytes());
            broker.kill();
            broker = start(dir.path(), &address, count);
        }
    }
    producer.flush().await.unwrap();
    let alive = latest.iter().filter(|latest| !latest.is_tombstone).count();
    let began = Instant::now();
    loop {
        let left = check(&client, count, &latest).await;
        if left as f64 <= alive as f64 * SLACK + 40_000.0 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "{left} records are left of {alive} keys");
        sleep(Duration::from_millis(300)).await;
    }
    peak = peak.max(broker.peak_bytes());
    assert!(peak < MOST_MEMORY, "{} MiB", peak >> 20);
    broker.kill();
    broker = start(dir.path(), &address, count);
    check(&client, count, &latest).await;
    assert!(broker.stop());
}
