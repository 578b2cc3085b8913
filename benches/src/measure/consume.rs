//! Reading in order what was produced before, from the first record to the last.

use std::time::Duration;

use anyhow::{Context, ensure};
use felucca_client::{Client, Consumer, Start};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::window::Meter;
use super::{PATIENCE, Session, Topic, join};
use crate::row::Row;
use crate::workload::{Ack, Consume};

/// Longest pause between two records.
const PAUSE: Duration = Duration::from_secs(10);
/// Records between two looks at the clock.
const STRIDE: u64 = 1000;

pub(super) async fn measure(session: &Session, work: &Consume, consumers: u32) -> anyhow::Result<Row> {
    let records = session.effort.records(work.records);
    let topic = Topic::create(session, work.partitions, Ack::Written).await?;
    topic.fill(records, work.record_bytes, work.batch_bytes, Ack::Written).await?;
    let parts = topic.client.admin().offsets(&topic.name).await?;
    let stored: u64 = parts.iter().map(|part| part.high_watermark - part.log_start).sum();
    ensure!(stored == records, "{records} records were acknowledged, {stored} are there");

    let mut readers = Vec::new();
    for index in 0..consumers.min(topic.partitions) {
        let mine: Vec<_> = parts.iter().filter(|part| part.partition % consumers == index).copied().collect();
        let expected = mine.iter().map(|part| part.high_watermark - part.log_start).sum();
        let partitions = mine.iter().map(|part| part.partition).collect();
        let client = Client::connect(topic.address.clone()).await?;
        readers.push((client, partitions, expected));
    }
    let meter = Meter::start(session);
    let mut tasks = JoinSet::new();
    for (client, partitions, expected) in readers {
        tasks.spawn(read(client, topic.name.clone(), partitions, expected, work.record_bytes));
    }
    join(tasks).await?;
    let row = meter.finish(records, work.record_bytes as u64);
    topic.discard(session, &[]).await?;
    Ok(row)
}

async fn read(
    client: Client,
    topic: String,
    partitions: Vec<u32>,
    expected: u64,
    record_bytes: usize,
) -> anyhow::Result<()> {
    let mut consumer = client.consumer().assign(topic, partitions).start(Start::Beginning).build().await?;
    let mut left = expected;
    while left > 0 {
        let stride = left.min(STRIDE);
        timeout(PAUSE, read_some(&mut consumer, stride, record_bytes)).await.context("no more records")??;
        left -= stride;
    }
    timeout(PATIENCE, consumer.close()).await.context("the consumer does not close")??;
    Ok(())
}

async fn read_some(consumer: &mut Consumer, records: u64, record_bytes: usize) -> anyhow::Result<()> {
    for _ in 0..records {
        let record = consumer.next().await.context("the stream ended")??;
        let length = record.value.map_or(0, |value| value.len());
        ensure!(length == record_bytes, "a record of {length} bytes");
    }
    Ok(())
}
