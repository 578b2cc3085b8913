//! The cleaner on a shard whose disk loses power, against a reference; with share groups; with many keys.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchHeader, BatchLimits, Compression};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::pace::Stop;
use super::{CleanError, CleanerOptions, clean_next};
use crate::broker::{Broker, BrokerLimits};
use crate::disk::{Disk, MemDisk, RealDisk};
use crate::engine::command::{
    AppendEntry, Command, FailureDetail, LeaseRef, Outcome, Settlement, StagedBatch,
};
use crate::engine::config::{EngineSettings, mix};
use crate::engine::effect::{Delivery, GroupPartitionInfo, Reply};
use crate::engine::error::EngineError;
use crate::engine::types::{LeaseId, Level, PartitionKey, SubscriptionId, TopicId};
use crate::environment::Environment;
use crate::journal::JournalOptions;
use crate::log::{LogOptions, ReadError, ReadView, ScrubOptions};
use crate::shard::{
    self, Answer, CheckpointOptions, Gate, Origin, ReferenceOptions, Responder, RoomOptions, Running,
    ShardOptions, Sink, StorageOptions, Submission, Token,
};

const TOPIC: TopicId = TopicId([7; 16]);
const PARTITION: PartitionKey = PartitionKey { topic: TOPIC, partition: 0 };
const COMPACT: [(&str, &str); 4] = [
    ("cleanup.policy", "compact"),
    ("min.cleanable.dirty.ratio", "0"),
    ("delete.retention.ms", "0"),
    ("segment.bytes", "64KiB"),
];

fn storage() -> StorageOptions {
    StorageOptions {
        engine: EngineSettings { retention_interval: Duration::from_millis(5), ..EngineSettings::default() },
        journal: JournalOptions {
            first_file_bytes: 64 << 10,
            file_bytes: 1 << 20,
            ..JournalOptions::default()
        },
        log: LogOptions { linger: Duration::from_millis(1), ..LogOptions::default() },
        shard: ShardOptions { max_unsynced_bytes: 16 << 20, reference: ReferenceOptions::default() },
        checkpoint: CheckpointOptions { interval: Duration::from_millis(50), journal_bytes: 256 << 10 },
        room: RoomOptions::default(),
        scrub: ScrubOptions::default(),
        sync_interval: Duration::from_millis(5),
        environment: Environment::default(),
    }
}

fn cleaner(key_bytes: u64) -> CleanerOptions {
    CleanerOptions { interval: Duration::from_millis(10), key_bytes, bytes_per_second: 1 << 40 }
}

async fn open(disk: Arc<dyn Disk>, root: &Path, options: StorageOptions) -> (Running, Broker) {
    let (root, runtime) = (root.to_path_buf(), Handle::current());
    let running =
        spawn_blocking(move || shard::start(&disk, &root, options, runtime)).await.unwrap().unwrap();
    let limits = BrokerLimits {
        batch: BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 10 },
        session_timeout: Duration::from_secs(10),
    };
    let gate = Gate::new(64 << 20, Duration::from_secs(1));
    let broker = Broker::new(
        running.inbox.clone(),
        running.views.clone(),
        gate,
        limits,
        running.boot_epoch,
        running.status.clone(),
    );
    (running, broker)
}

async fn close(running: Running) {
    spawn_blocking(move || running.stop()).await.unwrap();
}

async fn create_topic(broker: &Broker, config: &[(&str, &str)]) {
    let config = pairs(config);
    let create = Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions: 1, config };
    broker.call(create).await.unwrap();
}

fn pairs(config: &[(&str, &str)]) -> Vec<(String, String)> {
    config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Cleans until there is nothing to clean for some looks at retention.
async fn clean(broker: &Broker, key_bytes: u64) -> Result<u32, CleanError> {
    let broker = broker.clone();
    let work = move || {
        let stop = Stop::default();
        let (mut idle, mut done) = (0, 0);
        while idle < 3 {
            stop.wait(Duration::from_millis(10));
            if clean_next(&broker, &cleaner(key_bytes), &stop)? {
                (idle, done) = (0, done + 1);
            } else {
                idle += 1;
            }
        }
        Ok(done)
    };
    spawn_blocking(work).await.unwrap()
}

#[derive(Clone, Debug, PartialEq)]
struct Record {
    key: Option<Bytes>,
    value: Option<Bytes>,
    timestamp: i64,
}

async fn append(broker: &Broker, records: &[Record], compression: Compression) -> Option<u64> {
    let mut builder = BatchBuilder::new().compression(compression);
    for record in records {
        builder.push(record.timestamp, record.key.as_deref(), record.value.as_deref(), &[]).unwrap();
    }
    let bytes = builder.finish();
    let batch = StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
    let entries = vec![AppendEntry { partition: PARTITION, batch }];
    match broker.call(Command::Append { level: Level::Synced, entries }).await {
        Ok(Reply::Appended(mut results)) => Some(results.remove(0).unwrap().base_offset),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    }
}

/// Everything that a reader sees, from where the log starts.
fn read_all(view: &ReadView) -> BTreeMap<u64, Record> {
    let mut found = BTreeMap::new();
    let mut offset = view.log_start();
    while offset < view.high_watermark() {
        let batches = match view.read(offset, 8192) {
            Ok(batches) if batches.is_empty() => break,
            Ok(batches) => batches,
            Err(ReadError::BelowStart { log_start }) => {
                offset = log_start;
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        for bytes in batches {
            let header = batch::check(&bytes).unwrap();
            for record in batch::records(&bytes).unwrap().map(Result::unwrap) {
                if record.offset >= offset {
                    let (key, value, timestamp) = (record.key, record.value, record.timestamp);
                    assert!(found.insert(record.offset, Record { key, value, timestamp }).is_none());
                }
            }
            offset = header.last_offset() + 1;
        }
    }
    found.split_off(&view.log_start())
}

/// What is left is what was written, the latest of each key is there, and nothing deleted is back.
fn check(view: &ReadView, reference: &BTreeMap<u64, Record>) {
    let found = read_all(view);
    for (offset, record) in &found {
        assert_eq!(reference.get(offset), Some(record), "offset {offset}");
    }
    let log_start = view.log_start();
    let mut latest = HashMap::new();
    let mut left = HashMap::new();
    for (offset, record) in reference.range(log_start..) {
        let Some(key) = &record.key else {
            assert!(found.contains_key(offset), "a record without a key went from {offset}");
            continue;
        };
        latest.insert(key.clone(), *offset);
        if found.contains_key(offset) {
            left.insert(key.clone(), *offset);
        }
    }
    for (key, offset) in latest {
        match left.get(&key) {
            Some(last) => assert_eq!(*last, offset, "latest of {key:?}"),
            None => assert_eq!(reference[&offset].value, None, "{key:?} is gone from {offset}"),
        }
    }
    for timestamp in [0, 1, 17, 500, 501, 998, 1_000] {
        let expected =
            found.iter().find(|(_, record)| record.timestamp >= timestamp).map(|(offset, _)| *offset);
        let answer = view.offset_for_timestamp(timestamp).unwrap();
        if view.log_start() == log_start {
            assert_eq!(answer, expected, "first record of at least {timestamp}");
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = mix(self.0.wrapping_add(1));
        self.0 % bound
    }

    fn record(&mut self) -> Record {
        let key = (self.below(20) > 0).then(|| Bytes::from(format!("key {}", self.below(25))));
        let value =
            (self.below(5) > 0).then(|| Bytes::from(vec![self.below(256) as u8; self.below(2_000) as usize]));
        Record { key, value, timestamp: self.below(1_000).cast_signed() }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_compacted_whatever_happens_meanwhile() {
    let seeds: u64 = std::env::var("FELUCCA_CLEANER_SEEDS").map_or(12, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut random = Random(seed);
        let disk = MemDisk::new();
        let mut config = COMPACT.to_vec();
        if seed % 3 == 2 {
            config.extend([("cleanup.policy", "compact,delete"), ("retention.bytes", "192KiB")]);
        }
        let mut reference = BTreeMap::new();
        for round in 0..6 {
            let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), storage()).await;
            if round == 0 {
                create_topic(&broker, &config).await;
            }
            let view = broker.view(PARTITION).unwrap();
            check(&view, &reference);
            for _ in 0..60 {
                let records: Vec<_> = (0..1 + random.below(6)).map(|_| random.record()).collect();
                let compression = if random.below(2) == 0 { Compression::None } else { Compression::Lz4 };
                let base = append(&broker, &records, compression).await.unwrap();
                assert_eq!(base, reference.last_key_value().map_or(0, |(last, _)| last + 1), "offsets go on");
                reference.extend((base..).zip(records));
            }
            // A small map, so that some cleanings take several goes.
            let key_bytes = if random.below(2) == 0 { 24 * 20 } else { 1 << 20 };
            if random.below(3) == 0 {
                assert!(clean(&broker, key_bytes).await.unwrap() > 0);
                check(&view, &reference);
            } else {
                disk.power_fails_after(random.below(80));
                // It may have come to its end before.
                let _ = clean(&broker, key_bytes).await;
                if random.below(2) == 0 { disk.power_cut(seed + round) } else { disk.kill() }
            }
            close(running).await;
        }
        let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), storage()).await;
        let view = broker.view(PARTITION).unwrap();
        // Until every tombstone is due.
        for _ in 0..2 {
            clean(&broker, 1 << 20).await.unwrap();
        }
        check(&view, &reference);
        let active = reference.len() as u64 - 200;
        let mut keys = std::collections::HashSet::new();
        for (offset, record) in read_all(&view).range(..active) {
            let Some(key) = &record.key else { continue };
            assert!(keys.insert(key.clone()), "seed {seed}: {key:?} is there twice, again at {offset}");
            assert!(record.value.is_some() || seed % 3 == 2, "seed {seed}: a tombstone stays at {offset}");
        }
        close(running).await;
    }
}

/// Offset of the only record of a key that is left, and whether it is a tombstone; `None` when there is none.
fn only(view: &ReadView, key: &str) -> Option<(u64, bool)> {
    let all = read_all(view);
    let mut found = all.iter().filter(|(_, record)| record.key.as_deref() == Some(key.as_bytes()));
    let only = found.next().map(|(offset, record)| (*offset, record.value.is_none()));
    assert_eq!(found.next(), None, "another record of {key}");
    only
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_stays_for_its_time_after_the_first_cleaning() {
    const STAYS: Duration = Duration::from_secs(3);
    let disk = MemDisk::new();
    let open = || open(Arc::new(disk.clone()), Path::new("/data"), storage());
    let (running, broker) = open().await;
    let config = [&COMPACT[..], &[("delete.retention.ms", "3000")]].concat();
    create_topic(&broker, &config).await;
    let tombstone = Record { value: None, ..large("a", 1) };
    let others = ["b", "c", "d", "e"].map(|key| large(key, 2));
    for record in [&large("a", 0), &tombstone].into_iter().chain(&others) {
        append(&broker, std::slice::from_ref(record), Compression::None).await.unwrap();
    }
    let began = std::time::Instant::now();
    assert!(clean(&broker, 1 << 20).await.unwrap() > 0);
    let found = only(&broker.view(PARTITION).unwrap(), "a");
    assert!(began.elapsed() > STAYS || found == Some((1, true)), "{found:?}");
    close(running).await;
    // The time goes on over a restart.
    let (running, broker) = open().await;
    let view = broker.view(PARTITION).unwrap();
    while only(&view, "a").is_some() {
        assert!(began.elapsed() < 10 * STAYS, "the tombstone stays for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
        clean(&broker, 1 << 20).await.unwrap();
    }
    assert!(began.elapsed() >= STAYS, "it went after {:?}", began.elapsed());
    assert_eq!(only(&view, "b"), Some((2, false)));
    assert_eq!(append(&broker, &[large("a", 3)], Compression::None).await, Some(6));
    close(running).await;
}

/// Takes what a share group hands out.
#[derive(Debug, Default)]
struct Taken(Mutex<Vec<Delivery>>);

impl Sink for Taken {
    fn answer(&self, _: Answer) -> bool {
        false
    }

    fn deliver(&self, delivery: Delivery) -> bool {
        self.0.lock().push(delivery);
        false
    }

    fn ended(&self, _: SubscriptionId, _: EngineError) -> bool {
        false
    }

    fn wake(&self) {}
}

/// A share group with one member.
struct Worker {
    broker: Broker,
    taken: Arc<Taken>,
    origin: Arc<Origin>,
}

impl Worker {
    async fn new(broker: &Broker, config: &[(&str, &str)]) -> Self {
        let group = Command::CreateShareGroup {
            group: "g".to_owned(),
            topics: vec!["orders".to_owned()],
            config: pairs(config),
            from_end: false,
        };
        broker.call(group).await.unwrap();
        let taken = Arc::new(Taken::default());
        let origin = Origin::new(taken.clone(), None);
        let worker = Self { broker: broker.clone(), taken, origin };
        let subscribe = Command::ShareSubscribe {
            subscription: SubscriptionId(1),
            group: "g".to_owned(),
            member: "m".to_owned(),
            credit_records: 0,
            credit_bytes: 1 << 30,
            held: Vec::new(),
        };
        let responder = Responder::new(&worker.origin, Token { correlation: 1, tag: 0 });
        broker.submit([Submission::new(subscribe, responder, 0)]);
        worker
    }

    /// Asks for so many records more and waits for them: their offsets and leases.
    async fn take(&self, count: u32) -> Vec<(u64, LeaseId)> {
        let credit = Command::ShareCredit { subscription: SubscriptionId(1), records: count, bytes: 0 };
        self.broker.submit([Submission::silent(credit)]);
        let mut found = Vec::new();
        for _ in 0..1_000 {
            for delivery in self.taken.0.lock().drain(..) {
                let LeaseId { boot_epoch, sequence } = delivery.first_lease;
                let leases = (sequence..).map(|sequence| LeaseId { boot_epoch, sequence });
                found.extend(delivery.records.iter().map(|record| record.offset).zip(leases));
            }
            if found.len() >= count as usize {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} of {count} records were handed out", found.len());
    }

    async fn settle(&self, taken: &[(u64, LeaseId)], outcome: Outcome) {
        let settlements = taken.iter().map(|(offset, lease)| Settlement {
            record: LeaseRef { partition: PARTITION, offset: *offset, lease: *lease },
            outcome: outcome.clone(),
        });
        let settle = Command::Settle {
            group: "g".to_owned(),
            member: "m".to_owned(),
            level: Level::Synced,
            settlements: settlements.collect(),
        };
        self.broker.call(settle).await.unwrap();
    }

    async fn counts(&self) -> GroupPartitionInfo {
        match self.broker.call(Command::DescribeGroup { group: "g".to_owned() }).await.unwrap() {
            // The group's own topic for what is redriven is there too.
            Reply::Group(description) => {
                let mut partitions = description.partitions.into_iter();
                partitions.find(|info| info.partition == Some(PARTITION)).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }
}

/// 30,000 bytes: two fill a segment.
fn large(key: &str, timestamp: i64) -> Record {
    let value = Some(Bytes::from(vec![key.as_bytes()[0]; 30_000]));
    Record { key: Some(Bytes::from(key.to_owned())), value, timestamp }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_share_group_has_in_hand_is_kept_and_what_it_was_not_given_is_skipped() {
    for ordering in ["none", "key"] {
        let disk = MemDisk::new();
        let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), storage()).await;
        create_topic(&broker, &COMPACT).await;
        let view = broker.view(PARTITION).unwrap();
        let mut reference = BTreeMap::new();
        // Offsets 0 to 3 and 4 to 7 are of the keys a to d, twice; others follow.
        for (offset, key) in ["a", "b", "c", "d", "a", "b", "c", "d", "x", "y", "z"].into_iter().enumerate() {
            let record = large(key, offset as i64);
            append(&broker, std::slice::from_ref(&record), Compression::None).await.unwrap();
            reference.insert(offset as u64, record);
        }
        let worker = Worker::new(&broker, &[("ordering", ordering), ("lease", "1h")]).await;
        let taken = worker.take(2).await;
        assert_eq!([taken[0].0, taken[1].0], [0, 1]);
        assert!(clean(&broker, 1 << 20).await.unwrap() > 0);
        check(&view, &reference);
        let left: Vec<u64> = read_all(&view).into_keys().collect();
        assert_eq!(left, [0, 1, 4, 5, 6, 7, 8, 9, 10], "{ordering}");
        let counts = worker.counts().await;
        assert_eq!(counts.skipped, 2, "2 and 3 were read ahead: {counts:?}");
        view.read_exactly(vec![0, 1]).await.unwrap();
        // Tried again, from what is kept.
        let again = Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() };
        worker.settle(&taken[..1], again).await;
        worker.settle(&taken[1..], Outcome::Ack).await;
        let mut offsets = Vec::new();
        for _ in 0..8 {
            let taken = worker.take(1).await;
            let offset = taken[0].0;
            view.read_exactly(vec![offset]).await.unwrap();
            worker.settle(&taken, Outcome::Ack).await;
            offsets.push(offset);
        }
        offsets.sort_unstable();
        assert_eq!(offsets, [0, 4, 5, 6, 7, 8, 9, 10], "{ordering}");
        let counts = worker.counts().await;
        assert_eq!((counts.acked, counts.skipped, counts.lag), (9, 2, 0), "{ordering}");
        // Nobody needs them any more; more that is new makes the cleaner look again.
        for offset in 11..16 {
            let record = large("x", offset);
            append(&broker, std::slice::from_ref(&record), Compression::None).await.unwrap();
            reference.insert(offset as u64, record);
        }
        clean(&broker, 1 << 20).await.unwrap();
        check(&view, &reference);
        let left: Vec<u64> = read_all(&view).into_keys().collect();
        assert_eq!(left[..5], [4, 5, 6, 7, 9], "{ordering}");
        // Nor is it found in what was read for the group before.
        view.read_exactly(vec![1]).await.unwrap_err();
        close(running).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_read_for_while_its_log_changes_is_given_what_is_left() {
    let disk = MemDisk::new();
    let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), storage()).await;
    create_topic(&broker, &COMPACT).await;
    let view = broker.view(PARTITION).unwrap();
    let mut random = Random(5);
    let mut reference = BTreeMap::new();
    let worker = Worker::new(&broker, &[("lease", "1h")]).await;
    let mut taken = Vec::new();
    let mut settled = std::collections::BTreeSet::new();
    for round in 0..30 {
        for _ in 0..20 {
            let records: Vec<_> = (0..1 + random.below(6)).map(|_| random.record()).collect();
            let base = append(&broker, &records, Compression::None).await.unwrap();
            reference.extend((base..).zip(records));
        }
        let cleaning = tokio::spawn({
            let broker = broker.clone();
            async move { clean(&broker, 1 << 20).await }
        });
        for _ in 0..10 {
            taken.extend(worker.take(1).await);
            if round % 2 == 0 {
                let at = random.below(taken.len() as u64) as usize;
                let one = taken.swap_remove(at);
                // Whatever was handed out can be read for as long as it is in hand.
                let exactly = view.read_exactly(vec![one.0]).await.unwrap();
                let found = batch::records(&exactly[0]).unwrap().next().unwrap().unwrap();
                assert_eq!(found.value, reference[&one.0].value);
                worker.settle(&[one], Outcome::Ack).await;
                assert!(settled.insert(one.0), "{} comes twice", one.0);
            }
        }
        cleaning.await.unwrap().unwrap();
        check(&view, &reference);
        for (offset, _) in &taken {
            view.read_exactly(vec![*offset]).await.unwrap();
        }
    }
    let counts = worker.counts().await;
    assert!(counts.skipped > 100, "{counts:?}");
    close(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_beyond_the_limit_is_copied_aside() {
    let disk = MemDisk::new();
    let mut options = storage();
    options.engine.max_pinned_bytes = 200_000;
    let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), options.clone()).await;
    create_topic(&broker, &[("segment.bytes", "64KiB")]).await;
    let view = broker.view(PARTITION).unwrap();
    for offset in 0..20 {
        append(&broker, &[large("a", offset), large("b", offset)], Compression::None).await.unwrap();
    }
    let worker = Worker::new(&broker, &[("lease", "1h")]).await;
    let mut taken = worker.take(20).await;
    // One in each of ten segments stays in hand.
    let rest = taken.split_off(1);
    let (kept, done): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(offset, _)| offset % 4 == 0);
    worker.settle(&done, Outcome::Ack).await;
    let delete = Command::DeleteRecords { topic: "orders".to_owned(), partition: 0, before: 40 };
    broker.call(delete).await.unwrap();
    let before = worker.counts().await.pinned_bytes;
    assert!(before > 200_000, "{before}");
    assert_eq!(clean(&broker, 1 << 20).await.unwrap(), 1);
    let counts = worker.counts().await;
    assert!(counts.pinned_bytes < 160_000, "{counts:?}");
    assert_eq!(counts.leased, 5);
    let offsets: Vec<u64> = taken.iter().chain(&kept).map(|(offset, _)| *offset).collect();
    view.read_exactly(offsets.clone()).await.unwrap();
    disk.power_cut(3);
    close(running).await;
    let (running, broker) = open(Arc::new(disk.clone()), Path::new("/data"), options).await;
    let view = broker.view(PARTITION).unwrap();
    view.read_exactly(offsets).await.unwrap();
    assert_eq!((view.log_start(), view.high_watermark()), (40, 40));
    close(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_keys_than_memory_are_compacted_in_several_goes() {
    let count = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let mut options = storage();
    options.checkpoint = CheckpointOptions { interval: Duration::from_secs(2), journal_bytes: 64 << 20 };
    options.journal.file_bytes = 16 << 20;
    let (running, broker) = open(Arc::new(RealDisk), dir.path(), options).await;
    let mut config = COMPACT.to_vec();
    config.push(("segment.bytes", "1MiB"));
    create_topic(&broker, &config).await;
    let (keys, per_batch) = (count / 4, 1_000);
    // The latest offset of each key and whether it is a tombstone: all that the reference has to know.
    let mut latest = vec![(u64::MAX, false); keys as usize];
    let mut random = Random(11);
    for base in (0..count).step_by(per_batch) {
        let records: Vec<_> = (base..base + per_batch as u64)
            .map(|offset| {
                let key = if offset < keys { offset } else { random.below(keys) };
                let tombstone = random.below(10) == 0;
                latest[key as usize] = (offset, tombstone);
                let value = (!tombstone).then(|| Bytes::copy_from_slice(&offset.to_be_bytes()));
                Record { key: Some(Bytes::copy_from_slice(&key.to_be_bytes())), value, timestamp: 1 }
            })
            .collect();
        assert_eq!(append(&broker, &records, Compression::None).await, Some(base));
    }
    let view = broker.view(PARTITION).unwrap();
    let bytes = view.bytes();
    // Room for a fifth of the keys.
    let goes = clean(&broker, keys / 5 * 24).await.unwrap();
    // What is not sealed is not compacted.
    let mut found = vec![0_u8; keys as usize];
    let mut left = 0;
    let mut offset = 0;
    while offset < view.high_watermark() {
        for bytes in view.fetch(offset, 1 << 20).await.unwrap() {
            for record in batch::records(&bytes).unwrap().map(Result::unwrap) {
                let key = u64::from_be_bytes(record.key.as_deref().unwrap().try_into().unwrap()) as usize;
                left += 1;
                found[key] += u8::from(record.offset == latest[key].0);
            }
            offset = BatchHeader::parse(&bytes).unwrap().last_offset() + 1;
        }
    }
    for (key, (offset, tombstone)) in latest.iter().enumerate() {
        assert!(found[key] == 1 || *tombstone, "key {key}, latest {offset}");
    }
    let report = format!(
        "{count} records of {keys} keys, {bytes} bytes: {left} records, {} bytes after {goes} goes",
        view.bytes()
    );
    assert!(goes > 3, "{report}");
    assert!(left < keys + 80_000, "{report}");
    close(running).await;
}
