//! From the time at which a record was due to be sent until an ordered consumer has it, at a fixed rate.
//!
//! Open loop: a record is due whether or not those before it have come through, and its latency counts from then; a stall
//! is felt by every record that was due meanwhile. Producer and consumer have a connection each. The rate is a number, or
//! half of what this server took in just before from the same producer as fast as it could.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::pacing::{Schedule, Timer};
use super::produce::{self, acknowledged};
use super::window::Meter;
use super::{PATIENCE, Session, create_topic, join, value};
use crate::driver::{Consumer, Driver, Gathering, Producer};
use crate::row::{Row, latencies, record};
use crate::workload::{EndToEnd, Producers, Rate};

/// The producer closes batches far above what gathers at a fixed rate.
const BATCH_BYTES: usize = 100 << 10;
/// Unacknowledged records at most; far more than any sound broker lets gather.
const MAX_PENDING: usize = 100_000;

/// Longest wait for the next record.
const PAUSE: Duration = Duration::from_secs(10);

/// What finds out how fast a server is: as W1 with records one by one.
const FASTEST: Producers =
    Producers { connections: 1, in_flight: 16_384, block_records: None, partitions: None };
/// How long that is measured.
const FASTEST_SECONDS: f64 = 2.0;

pub(super) async fn measure<D: Driver>(
    session: &Session,
    work: &EndToEnd,
    rate: Rate,
) -> anyhow::Result<Row> {
    let rate = match rate {
        Rate::Fixed(rate) => rate,
        Rate::Half => half::<D>(session, work).await?,
    };
    let count = |time: Duration| (time.as_secs_f64() * f64::from(rate)) as u64;
    let warm_up = count(session.effort.warm_up(work.warm_up_seconds));
    let measured = count(session.effort.measured(work.seconds)).max(1);
    let driver = D::open(&session.address, session.level).await?;
    let topic = create_topic(&driver, work.partitions).await?;
    let consumer = driver.consumer(&topic, topic.share_of(0, 1)).await?;
    let gathering = Gathering { batch_bytes: BATCH_BYTES, in_flight: MAX_PENDING, keys: 0 };
    let producer = driver.producer(&topic, 0, gathering).await?;
    let schedule = Schedule::new(Instant::now(), rate);

    let (mut sending, mut looking) = (JoinSet::new(), JoinSet::new());
    let (pending, acks) = mpsc::channel(MAX_PENDING);
    sending.spawn(send(producer, schedule, warm_up + measured, value(work.record_bytes), pending));
    looking.spawn(look_at(acks));
    let received = receive(session, consumer, schedule, warm_up, measured, work.record_bytes).await;
    // Why records were not sent explains why they did not come. A producer that ends may take along what is not acknowledged.
    let producers = join(sending).await?;
    join(looking).await?;
    for producer in producers {
        producer.close().await?;
    }
    let mut row = received?;
    row.rate = Some(rate);
    session.discard(&driver, &topic, &[]).await?;
    Ok(row)
}

/// Half of what one connection can send, in records per second.
async fn half<D: Driver>(session: &Session, work: &EndToEnd) -> anyhow::Result<u32> {
    let fastest = crate::workload::Produce {
        ack: vec![session.level],
        record_bytes: work.record_bytes,
        partitions: work.partitions,
        batch_bytes: BATCH_BYTES,
        producers: vec![FASTEST],
        warm_up_seconds: FASTEST_SECONDS / 2.0,
        seconds: FASTEST_SECONDS,
        max_bytes: 8 << 30,
    };
    let row = produce::measure::<D>(session, &fastest, FASTEST).await?;
    let rate = row.records_per_s.context("nothing was acknowledged")?;
    Ok((rate / 2.0) as u32)
}

/// Sends each record when it is due, or as soon after that as there is room, and gives the producer back.
async fn send<P: Producer>(
    mut producer: P,
    schedule: Schedule,
    records: u64,
    template: Bytes,
    pending: mpsc::Sender<P::Pending>,
) -> anyhow::Result<P> {
    let timer = Timer::new()?;
    for index in 0..records {
        timer.wait_until(schedule.due(index)).await?;
        let mut value = BytesMut::from(&template[..]);
        value[..8].copy_from_slice(&index.to_be_bytes());
        let sent = producer.enqueue(value.freeze()).await?;
        pending.send(sent).await.ok().context("nobody looks at the acknowledgements any more")?;
    }
    Ok(producer)
}

async fn look_at<P: Future<Output = anyhow::Result<()>> + Unpin>(
    mut acks: mpsc::Receiver<P>,
) -> anyhow::Result<()> {
    while let Some(mut ack) = acks.recv().await {
        acknowledged(&mut ack).await?;
    }
    Ok(())
}

/// Takes every record once, in whatever order the partitions come.
async fn receive<C: Consumer>(
    session: &Session,
    mut consumer: C,
    schedule: Schedule,
    warm_up: u64,
    measured: u64,
    record_bytes: usize,
) -> anyhow::Result<Row> {
    let mut seen = vec![false; (warm_up + measured) as usize];
    let mut histogram = latencies();
    let mut meter = None;
    let (mut values, mut left) = (Vec::new(), warm_up + measured);
    while left > 0 {
        timeout(PAUSE, consumer.next(&mut values)).await.context("no more records")??;
        let now = Instant::now();
        for value in values.drain(..) {
            ensure!(value.len() == record_bytes, "a record of {} bytes", value.len());
            let index = u64::from_be_bytes(*value.first_chunk().context("a record without its number")?);
            let first = seen.get_mut(index as usize).is_some_and(|seen| !std::mem::replace(seen, true));
            ensure!(first, "record {index} came twice, or was never sent");
            if index >= warm_up {
                meter.get_or_insert_with(|| Meter::start(session));
                record(&mut histogram, now.saturating_duration_since(schedule.due(index)));
            }
            left -= 1;
        }
    }
    let mut row = meter.context("nothing was measured")?.finish(measured, record_bytes as u64);
    row.set_latencies(&histogram);
    timeout(PATIENCE, consumer.close()).await.context("the consumer does not close")??;
    Ok(row)
}
