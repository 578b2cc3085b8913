//! Reading in order what was produced before, from the first record to the last; again and again, where that is soon done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::produce::Filling;
use super::window::Meter;
use super::{Session, create_topic, join_within};
use crate::driver::{Consumer, Driver, Topic};
use crate::process;
use crate::row::Row;
use crate::workload::{Cache, Consume};

/// Longest time in which records are produced.
const FILL_TIME: Duration = Duration::from_secs(4);
/// Longest pause between two records.
const PAUSE: Duration = Duration::from_secs(10);
/// Longest time for all of them.
const ALL: Duration = Duration::from_secs(600);

/// What all readers together have read. None knows how many records are in its own partitions.
#[derive(Debug)]
struct Tally {
    expected: u64,
    read: AtomicU64,
    complete: watch::Sender<bool>,
}

impl Tally {
    fn add(&self, records: u64) {
        if self.read.fetch_add(records, Ordering::Relaxed) + records >= self.expected {
            self.complete.send_replace(true);
        }
    }
}

pub(super) async fn measure<D: Driver>(
    session: &Session,
    work: &Consume,
    consumers: u32,
    cache: Cache,
) -> anyhow::Result<Row> {
    let driver = D::open(&session.address, session.level).await?;
    let topic = create_topic(&driver, work.partitions).await?;
    let readers = consumers.min(topic.partitions);
    let filling = Filling {
        records: session.effort.records(work.records),
        longest: FILL_TIME,
        record_bytes: work.record_bytes,
        batch_bytes: work.batch_bytes,
        keys: 0,
    };
    let mut records = filling.fill(&driver, &topic).await?;
    let mut passes: Option<Row> = None;
    loop {
        if cache == Cache::Cold {
            let data = session.data.clone().context("only a server that is started here can be read cold")?;
            tokio::task::spawn_blocking(move || process::drop_from_cache(&data)).await??;
        }
        let pass = pass(session, &driver, &topic, readers, records, work.record_bytes).await?;
        let row = match passes.take() {
            Some(before) => before.and(&pass),
            None => pass,
        };
        if row.seconds.is_some_and(|seconds| seconds >= session.effort.shortest.as_secs_f64()) {
            session.discard(&driver, &topic, &[]).await?;
            return Ok(row);
        }
        passes = Some(row);
        if D::READING_REMOVES {
            records = filling.fill(&driver, &topic).await?;
        }
    }
}

/// Reads everything once.
async fn pass<D: Driver>(
    session: &Session,
    driver: &D,
    topic: &Topic,
    readers: u32,
    records: u64,
    record_bytes: usize,
) -> anyhow::Result<Row> {
    let mut ready = Vec::new();
    for index in 0..readers {
        ready.push(driver.consumer(topic, topic.share_of(index, readers)).await?);
    }
    let tally =
        Arc::new(Tally { expected: records, read: AtomicU64::new(0), complete: watch::Sender::new(false) });
    let meter = Meter::start(session);
    let mut tasks = JoinSet::new();
    for consumer in ready {
        tasks.spawn(read(consumer, tally.clone(), record_bytes));
    }
    let consumers = join_within(ALL, tasks).await?;
    let row = meter.finish(records, record_bytes as u64);
    for consumer in consumers {
        consumer.close().await?;
    }
    let read = tally.read.load(Ordering::Relaxed);
    ensure!(records > 0 && read == records, "{records} records were acknowledged, {read} were read");
    Ok(row)
}

/// Reads until all readers together have everything.
async fn read<C: Consumer>(mut consumer: C, tally: Arc<Tally>, record_bytes: usize) -> anyhow::Result<C> {
    let mut complete = tally.complete.subscribe();
    let mut values = Vec::new();
    loop {
        tokio::select! {
            biased;
            next = timeout(PAUSE, consumer.next(&mut values)) => next.context("no more records")??,
            _ = complete.wait_for(|complete| *complete) => return Ok(consumer),
        }
        for value in &values {
            ensure!(value.len() == record_bytes, "a record of {} bytes", value.len());
        }
        tally.add(values.len() as u64);
        values.clear();
    }
}
