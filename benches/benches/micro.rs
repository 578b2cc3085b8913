//! Hot work by the clock: codecs and engine, what touches files (journal, log, recovery), and synced produce as a whole.

mod scenarios;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use felucca_broker::disk::RealDisk;
use felucca_broker::engine::effect::{SegmentName, SegmentWrite, ViewChange};
use felucca_broker::engine::types::{PartitionKey, TopicId};
use felucca_broker::journal::{Journal, JournalOptions};
use felucca_broker::log::{LogOptions, ReadView, SegmentWriter};
use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;
use felucca_client::{Client, Producer, Record};
use scenarios::{BATCH, SCENARIOS, batch};

/// Frames that become durable with one sync.
const GROUP: u64 = 64;
/// Journal that is recovered; a share of the GiB that the figure is for.
const RECOVERED_BYTES: u64 = 128 << 20;
/// Records of 1 KiB that are produced before all of them are waited for.
const PRODUCED: u32 = 20_000;

fn scenarios(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hot work");
    for scenario in SCENARIOS {
        group.throughput(Throughput::Elements(scenario.records));
        group.bench_function(scenario.name, |bencher| {
            bencher.iter_batched(scenario.prepare, |work| work(), BatchSize::PerIteration);
        });
    }
}

fn journal(directory: &Path) -> Journal {
    let replay = &mut |_: u64, _: &[u8], _: Vec<Bytes>| Ok::<_, Infallible>(());
    Journal::recover(Arc::new(RealDisk), directory, JournalOptions::default(), 0, replay).expect("a journal")
}

fn journals(criterion: &mut Criterion) {
    let bytes = batch(BATCH).freeze();
    let directory = tempfile::tempdir().expect("a directory");
    let mut journal_here = journal(directory.path());
    let mut group = criterion.benchmark_group("journal");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("append", |bencher| {
        bencher.iter(|| {
            let lsn = journal_here.append(&[7; 64], std::slice::from_ref(&bytes)).expect("a write");
            // As after a checkpoint: files are used again, and the disk does not fill.
            journal_here.release(lsn.saturating_sub(1000));
        });
    });
    let syncer = journal_here.syncer();
    group.throughput(Throughput::Elements(GROUP));
    group.bench_function("group commit of 64", |bencher| {
        bencher.iter(|| {
            for _ in 0..GROUP {
                journal_here.append(&[7; 64], &[Bytes::from_static(&[7; 1024])]).expect("a write");
            }
            let lsn = syncer.sync().expect("a sync");
            journal_here.release(lsn.saturating_sub(1000));
        });
    });
    group.finish();
    recovery(criterion, &bytes);
}

fn recovery(criterion: &mut Criterion, bytes: &Bytes) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut filled = journal(directory.path());
    for _ in 0..RECOVERED_BYTES / bytes.len() as u64 {
        filled.append(&[7; 64], std::slice::from_ref(bytes)).expect("a write");
    }
    filled.syncer().sync().expect("a sync");
    drop(filled);
    let mut group = criterion.benchmark_group("recovery");
    group.sample_size(10).throughput(Throughput::Bytes(RECOVERED_BYTES));
    group.bench_function("journal", |bencher| bencher.iter(|| journal(directory.path()).next_lsn()));
}

/// A log with one partition of so many batches, all of them in their segment.
fn log(directory: &Path, tail_bytes: usize, batches: u64, bytes: &Bytes) -> (SegmentWriter, Arc<ReadView>) {
    let options = LogOptions { tail_bytes, ..LogOptions::default() };
    let writer =
        SegmentWriter::start(Arc::new(RealDisk), directory, &options, Box::new(|| {})).expect("a log");
    let partition = PartitionKey { topic: TopicId([7; 16]), partition: 0 };
    let segment = SegmentName { partition, base_offset: 0, generation: 0 };
    writer.apply(&ViewChange::Created { partition, topic: "topic".to_owned(), first_segment: segment });
    let write = |index: u64| {
        let mut assigned = bytes::BytesMut::from(&bytes[..]);
        felucca_protocol::batch::assign(&mut assigned, index * BATCH, 0);
        SegmentWrite {
            segment,
            position: index * bytes.len() as u64,
            base_offset: index * BATCH,
            last_offset: (index + 1) * BATCH - 1,
            max_timestamp: 1_700_000_000_000,
            length: assigned.len() as u64,
            bytes: assigned.freeze(),
            stored: false,
        }
    };
    writer.append((0..batches).map(write).collect()).expect("a write");
    let view = writer.views().get(partition).expect("a partition");
    view.publish(batches * BATCH);
    let began = Instant::now();
    while writer.unwritten_bytes() > 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "the log is not written");
        std::thread::park_timeout(Duration::from_millis(1));
    }
    (writer, view)
}

fn reads(criterion: &mut Criterion) {
    let bytes = batch(BATCH).freeze();
    let batches = 100;
    for (name, tail_bytes) in [("segment read", 0), ("tail read", 64 << 20)] {
        let directory = tempfile::tempdir().expect("a directory");
        let (writer, view) = log(directory.path(), tail_bytes, batches, &bytes);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(batches * bytes.len() as u64));
        group.bench_function("1 MiB at a time", |bencher| {
            bencher.iter(|| {
                let mut offset = 0;
                while offset < batches * BATCH {
                    let read = view.read(offset, 1 << 20).expect("a read");
                    assert!(!read.is_empty());
                    offset += read.len() as u64 * BATCH;
                }
            });
        });
        group.finish();
        writer.shutdown().expect("an end");
    }
}

/// Enqueues records for partitions in turns, and waits until all of them are on the device.
async fn produce(producer: &Producer, partitions: u32, value: &Bytes) {
    for number in 0..PRODUCED {
        let record = Record::new("orders", value.clone()).partition(number % partitions);
        drop(producer.enqueue(record).await.expect("room"));
    }
    producer.flush().await.expect("everything to be acknowledged");
}

/// What the journal that all partitions share is for: how many of them are written to should make little difference.
fn active_partitions(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let value = Bytes::from_static(&[7; 1024]);
    let mut group = criterion.benchmark_group("synced produce, active partitions");
    group.sample_size(10).throughput(Throughput::Bytes(u64::from(PRODUCED) * value.len() as u64));
    for partitions in [1, 10, 1_000] {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = ServerSettings {
            data_dir: directory.path().to_owned(),
            listen: "127.0.0.1:0".parse().expect("an address"),
            ..ServerSettings::default()
        };
        let (server, producer) = runtime.block_on(async {
            let server = Server::start(settings).await.expect("a broker");
            let client = Client::connect(server.local_addr().to_string()).await.expect("a connection");
            client.admin().create_topic("orders", partitions, &[]).await.expect("a topic");
            (server, client.producer().build().await.expect("a producer"))
        });
        group.bench_function(BenchmarkId::from_parameter(partitions), |bencher| {
            bencher.iter(|| runtime.block_on(produce(&producer, partitions, &value)));
        });
        drop(producer);
        runtime.block_on(server.shutdown());
    }
}

criterion_group!(benches, scenarios, journals, reads, active_partitions);
criterion_main!(benches);
