//! The shard with its threads on a disk that fails and loses power.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::batch::{self, BatchBuilder, BatchHeader, BatchLimits};
use tokio::runtime::Handle;

use super::core::ShardOptions;
use super::recovery::{Running, StorageOptions, start};
use super::reference::ReferenceOptions;
use super::room::RoomOptions;
use super::runner::CheckpointOptions;
use super::stepped::{Did, Stepped};
use super::{Gate, StartError};
use crate::broker::{Broker, BrokerError, BrokerLimits};
use crate::disk::{Disk, MemDisk, WriteFault};
use crate::engine::command::{AppendEntry, Command, StagedBatch};
use crate::engine::config::EngineSettings;
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;
use crate::engine::types::{Level, PartitionKey, TopicId};
use crate::environment::Environment;
use crate::journal::JournalOptions;
use crate::log::{LogOptions, ScrubOptions};

const TOPIC: TopicId = TopicId([7; 16]);
const PARTITION: PartitionKey = PartitionKey { topic: TOPIC, partition: 0 };

fn options() -> StorageOptions {
    StorageOptions {
        engine: EngineSettings { segment_bytes: 64 << 10, ..EngineSettings::default() },
        journal: JournalOptions {
            first_file_bytes: 64 << 10,
            file_bytes: 1 << 20,
            ..JournalOptions::default()
        },
        log: LogOptions { linger: Duration::from_millis(1), ..LogOptions::default() },
        shard: ShardOptions {
            max_unsynced_bytes: 1 << 20,
            reference: ReferenceOptions { batch_bytes: 20_000, synced_bytes: 0, segments: 4 },
        },
        // Often, so that every test runs over some.
        checkpoint: CheckpointOptions { interval: Duration::from_millis(50), journal_bytes: 32 << 10 },
        room: RoomOptions::default(),
        scrub: ScrubOptions::default(),
        sync_interval: Duration::from_millis(5),
        environment: Environment::default(),
    }
}

fn limits() -> BrokerLimits {
    BrokerLimits {
        batch: BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 10 },
        session_timeout: Duration::from_secs(10),
    }
}

/// A shard on the disk, and its door.
async fn open(disk: &MemDisk) -> Result<(Running, Broker), StartError> {
    open_with(disk, options()).await
}

async fn open_with(disk: &MemDisk, options: StorageOptions) -> Result<(Running, Broker), StartError> {
    // None of its threads may do anything after a power cut.
    let disk: Arc<dyn Disk> = Arc::new(disk.mount());
    let runtime = Handle::current();
    let running = tokio::task::spawn_blocking(move || start(&disk, Path::new("/data"), options, runtime));
    let running = running.await.unwrap()?;
    let gate = Gate::new(1 << 20, Duration::from_secs(1));
    let broker = Broker::new(
        running.inbox.clone(),
        running.views.clone(),
        gate,
        limits(),
        running.boot_epoch,
        running.status.clone(),
    );
    Ok((running, broker))
}

async fn close(running: Running) {
    tokio::task::spawn_blocking(move || running.stop()).await.unwrap();
}

async fn create_topic(broker: &Broker, config: &[(&str, &str)]) {
    let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let create = Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions: 1, config };
    broker.call(create).await.unwrap();
}

async fn append(broker: &Broker, level: Level, value: u64) -> Result<u64, BrokerError> {
    let mut builder = BatchBuilder::new();
    // Of some the journal holds all, of others only where they are.
    let text = format!("{value:0width$}", width = if value.is_multiple_of(3) { 20_000 } else { 1 });
    builder.push(0, None, Some(text.as_bytes()), &[]).unwrap();
    let bytes = builder.finish();
    let batch = StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
    let entries = vec![AppendEntry { partition: PARTITION, batch }];
    match broker.call(Command::Append { level, entries }).await? {
        Reply::Appended(mut results) => Ok(results.remove(0)?.base_offset),
        other => panic!("{other:?}"),
    }
}

/// Every visible record's offset and value.
async fn visible(broker: &Broker) -> Vec<(u64, u64)> {
    let view = broker.view(PARTITION).unwrap();
    let mut records = Vec::new();
    let mut offset = view.log_start();
    while offset < view.high_watermark() {
        for batch in view.fetch(offset, 64 << 10).await.unwrap() {
            for record in batch::records(&batch).unwrap() {
                let record = record.unwrap();
                let value = std::str::from_utf8(record.value.as_ref().unwrap()).unwrap().parse().unwrap();
                offset = record.offset + 1;
                records.push((record.offset, value));
            }
        }
    }
    records
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_synced_survives_any_power_cut() {
    for seed in 0..20 {
        let disk = MemDisk::new();
        let (running, broker) = open(&disk).await.unwrap();
        create_topic(&broker, &[]).await;
        let acknowledged = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let producers: Vec<_> = (0..4)
            .map(|producer| {
                let (broker, acknowledged) = (broker.clone(), acknowledged.clone());
                tokio::spawn(async move {
                    for at in 0..100 {
                        let value = producer * 1000 + at;
                        let Ok(offset) = append(&broker, Level::Synced, value).await else { return };
                        acknowledged.lock().push((offset, value));
                    }
                })
            })
            .collect();
        let enough = 20 + (seed as usize * 17) % 300;
        while acknowledged.lock().len() < enough {
            tokio::task::yield_now().await;
        }
        // From here on nothing is acknowledged any more: what is in flight meets a dead disk.
        let promised = acknowledged.lock().clone();
        disk.power_cut(seed);
        for producer in producers {
            producer.await.unwrap();
        }
        close(running).await;

        let (running, broker) = open(&disk).await.unwrap();
        let found = visible(&broker).await;
        for promise in &promised {
            assert!(found.contains(promise), "seed {seed}: {promise:?} was acknowledged and is lost");
        }
        assert!(found.iter().map(|(offset, _)| *offset).eq(0..found.len() as u64), "seed {seed}");
        assert_eq!(append(&broker, Level::Synced, 9999).await.unwrap(), found.len() as u64);
        close(running).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_keeps_everything_over_many_checkpoints() {
    let disk = MemDisk::new();
    for round in 0..5 {
        let (running, broker) = open(&disk).await.unwrap();
        if round == 0 {
            create_topic(&broker, &[]).await;
        }
        assert_eq!(visible(&broker).await.len(), round * 300);
        let appends = (0..300).map(|value| {
            let broker = broker.clone();
            tokio::spawn(async move { append(&broker, Level::Synced, value).await.unwrap() })
        });
        for append in appends.collect::<Vec<_>>() {
            append.await.unwrap();
        }
        close(running).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_latches_and_its_frame_is_never_shown() {
    let disk = MemDisk::new();
    let (running, broker) = open(&disk).await.unwrap();
    create_topic(&broker, &[]).await;
    append(&broker, Level::Synced, 1).await.unwrap();
    // Whatever writes next fails; the journal will meet it, or the segments, and both end the writing.
    disk.fail_write(0, WriteFault::Io);
    let mut accepted = vec![1];
    let refused = loop {
        let value = accepted.len() as u64 + 1;
        match append(&broker, Level::Synced, value).await {
            Ok(_) => accepted.push(value),
            Err(error) => break error,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    assert!(matches!(refused, BrokerError::Engine(EngineError::ReadOnly(_))), "{refused}");
    let again = append(&broker, Level::Synced, 100).await.unwrap_err();
    assert_eq!(refused.to_string(), again.to_string(), "the first reason wins");
    // Reads and queries go on.
    let shown = visible(&broker).await;
    assert!(shown.iter().map(|(_, value)| *value).eq(accepted.iter().copied()));
    assert_eq!(broker.topic("orders").await.unwrap().id, TOPIC);
    close(running).await;
    disk.kill();

    let (running, broker) = open(&disk).await.unwrap();
    let found: Vec<u64> = visible(&broker).await.into_iter().map(|(_, value)| value).collect();
    assert!(found.starts_with(&accepted), "{found:?} has lost some of {accepted:?}");
    close(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_answers_whoever_waits() {
    let disk = MemDisk::new();
    let (running, broker) = open(&disk).await.unwrap();
    create_topic(&broker, &[("allow-written", "true")]).await;
    append(&broker, Level::Synced, 1).await.unwrap();
    disk.fail_sync(0);
    let mut refused = None;
    for value in 2..1000 {
        if let Err(error) = append(&broker, Level::Synced, value).await {
            refused = Some(error);
            break;
        }
    }
    assert!(matches!(refused, Some(BrokerError::Engine(EngineError::ReadOnly(_)))), "{refused:?}");
    let later = append(&broker, Level::Written, 1001).await.unwrap_err();
    assert!(matches!(later, BrokerError::Engine(EngineError::ReadOnly(_))), "{later}");
    close(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_calls_a_stopped_shard_is_told() {
    let disk = MemDisk::new();
    let (running, broker) = open(&disk).await.unwrap();
    close(running).await;
    let error = broker.call(Command::ListGroups).await.unwrap_err();
    assert!(matches!(error, BrokerError::Engine(EngineError::Stopping)), "{error}");
}

/// The bytes of each segment on the disk, at one moment.
fn segments(disk: &MemDisk) -> Vec<u64> {
    let is_segment =
        |path: &Path| path.starts_with("/data/log") && path.extension().is_some_and(|end| end == "log");
    disk.files().into_iter().filter(|(path, _)| is_segment(path)).map(|(_, bytes)| bytes).collect()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} does not happen");
}

/// An append of 30,000 bytes.
fn large(partition: u32, level: Level, timestamp: i64) -> Command {
    sized(30_000, partition, level, timestamp)
}

fn sized(bytes: usize, partition: u32, level: Level, timestamp: i64) -> Command {
    let mut builder = BatchBuilder::new();
    builder.push(timestamp, None, Some(&vec![7; bytes]), &[]).unwrap();
    let bytes = builder.finish();
    let batch = StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
    let partition = PartitionKey { topic: TOPIC, partition };
    Command::Append { level, entries: vec![AppendEntry { partition, batch }] }
}

async fn append_large(broker: &Broker, timestamp: i64) -> u64 {
    match broker.call(large(0, Level::Synced, timestamp)).await.unwrap() {
        Reply::Appended(mut results) => results.remove(0).unwrap().base_offset,
        other => panic!("{other:?}"),
    }
}

/// No checkpoint but the last.
fn without_checkpoints() -> StorageOptions {
    let checkpoint = CheckpointOptions { interval: Duration::from_hours(1), journal_bytes: 1 << 40 };
    StorageOptions { checkpoint, ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_topic_gives_its_space_back_without_a_checkpoint_and_a_replay_does_without() {
    let disk = MemDisk::new();
    for round in 0..3 {
        let (running, broker) = open_with(&disk, without_checkpoints()).await.unwrap();
        create_topic(&broker, &[]).await;
        for _ in 0..10 {
            append_large(&broker, 0).await;
        }
        let delete = Command::DeleteTopic { name: "orders".to_owned() };
        eventually("a write", || segments(&disk).iter().sum::<u64>() > 250_000).await;
        if round == 1 {
            // A checkpoint that knows the topic, and then no other.
            close(running).await;
            let (again, broker) = open_with(&disk, without_checkpoints()).await.unwrap();
            broker.call(delete).await.unwrap();
            eventually("the removal", || segments(&disk).is_empty()).await;
            disk.kill();
            close(again).await;
        } else {
            broker.call(delete).await.unwrap();
            eventually("the removal", || segments(&disk).is_empty()).await;
            disk.power_cut(round);
            close(running).await;
        }
        let (running, broker) = open_with(&disk, without_checkpoints()).await.unwrap();
        assert!(broker.topic("orders").await.is_err());
        eventually("the removal after the replay", || segments(&disk).is_empty()).await;
        create_topic(&broker, &[]).await;
        assert_eq!(append_large(&broker, 0).await, 0);
        broker.call(Command::DeleteTopic { name: "orders".to_owned() }).await.unwrap();
        close(running).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_frees_space_and_offsets_go_on_over_crashes() {
    let mut options = options();
    options.engine.retention_interval = Duration::from_millis(20);
    let disk = MemDisk::new();
    let mut end = 0;
    for round in 0..4 {
        let (running, broker) = open_with(&disk, options.clone()).await.unwrap();
        if round == 0 {
            create_topic(&broker, &[("retention.bytes", "64KiB"), ("segment.bytes", "64KiB")]).await;
        }
        let view = broker.view(PARTITION).unwrap();
        assert_eq!(view.high_watermark(), end, "round {round}");
        let start = view.log_start();
        for _ in 0..20 {
            assert_eq!(append_large(&broker, i64::MAX).await, end);
            end += 1;
        }
        eventually("the deletion", || view.log_start() + 5 > end && view.log_start() > start).await;
        eventually("the removal", || segments(&disk).len() <= 4).await;
        let delete = Command::DeleteRecords { topic: "orders".to_owned(), partition: 0, before: end };
        broker.call(delete).await.unwrap();
        assert_eq!((view.log_start(), view.bytes()), (end, 0));
        disk.power_cut(round);
        close(running).await;
        let (running, broker) = open_with(&disk, options.clone()).await.unwrap();
        let view = broker.view(PARTITION).unwrap();
        assert_eq!((view.log_start(), view.high_watermark()), (end, end), "round {round}");
        close(running).await;
    }
}

/// Has a command carried out; nothing is synced unless that is said.
async fn carry_out(shard: &mut Stepped, broker: &Broker, command: Command, sync: bool) {
    let broker = broker.clone();
    let called = tokio::spawn(async move { broker.call(command).await.unwrap() });
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
        if called.is_finished() {
            return;
        }
        shard.turn();
        if sync && shard.sync() == Did::Work {
            shard.release();
        }
    }
    panic!("the command is not carried out");
}

#[tokio::test]
async fn few_segments_at_a_time_wait_for_a_sync_of_the_journal() {
    let disk = MemDisk::new();
    let mount: Arc<dyn Disk> = Arc::new(disk.mount());
    let mut options = without_checkpoints();
    // So the files are of batches that frames refer to.
    options.log.linger = Duration::from_hours(1);
    let mut shard = Stepped::start(&mount, Path::new("/data"), options).unwrap();
    let broker = shard.broker(1 << 20, limits());
    let config = [("allow-written".to_owned(), "true".to_owned())].into();
    let create = Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions: 7, config };
    carry_out(&mut shard, &broker, create, true).await;
    for partition in 0..7 {
        // So offsets that are not synced may be told of from here on.
        carry_out(&mut shard, &broker, sized(1, partition, Level::Synced, 0), true).await;
    }
    assert_eq!(segments(&disk).len(), 0);
    for partition in [0, 1, 2, 3, 4, 5, 0, 1, 2, 3] {
        carry_out(&mut shard, &broker, large(partition, Level::Written, 0), false).await;
    }
    assert_eq!(segments(&disk).len(), 4);
    assert!(segments(&disk).iter().all(|bytes| *bytes > 60_000), "what waits already makes it no more");
    carry_out(&mut shard, &broker, large(0, Level::Synced, 0), true).await;
    carry_out(&mut shard, &broker, large(6, Level::Written, 0), false).await;
    assert_eq!(segments(&disk).len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_no_frame_can_hold_is_refused_and_changes_nothing() {
    let mut options = options();
    options.journal.max_frame_bytes = 64 << 10;
    let disk = MemDisk::new();
    let (running, broker) = open_with(&disk, options.clone()).await.unwrap();
    create_topic(&broker, &[]).await;
    let large = |bytes: usize| {
        let mut builder = BatchBuilder::new();
        builder.push(0, None, Some(&vec![b'1'; bytes]), &[]).unwrap();
        let bytes = builder.finish();
        let batch = StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
        let entries = vec![AppendEntry { partition: PARTITION, batch }];
        Command::Append { level: Level::Synced, entries }
    };
    let refused = broker.call(large(100 << 10)).await;
    assert!(
        matches!(refused, Err(BrokerError::Engine(EngineError::RequestTooLarge { limit: 49_152, .. }))),
        "{refused:?}"
    );
    // Together they are too much for one frame, and are carried out all the same.
    let all = futures::future::join_all((0..40).map(|_| broker.call(large(20 << 10)))).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    assert_eq!(append(&broker, Level::Synced, 7).await.unwrap(), 40);
    close(running).await;
    let (running, broker) = open_with(&disk, options).await.unwrap();
    assert_eq!(broker.view(PARTITION).unwrap().high_watermark(), 41);
    close(running).await;
}
