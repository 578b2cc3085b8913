//! From the time at which a record was due to be sent until an ordered consumer has it, at a fixed rate.
//!
//! Open loop: a record is due whether or not those before it have come through, and its latency counts from then; a stall
//! is felt by every record that was due meanwhile. Producer and consumer have a connection each.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::{Bytes, BytesMut};
use felucca_client::{Client, Consumer, PendingAck, Start};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::pacing::{Schedule, Timer};
use super::produce::{Sender, acknowledged};
use super::window::Meter;
use super::{PATIENCE, Session, Topic, join, value};
use crate::row::{Row, latencies, record};
use crate::workload::{Ack, EndToEnd};

/// The producer closes batches far above what gathers at a fixed rate.
const BATCH_BYTES: usize = 100 << 10;
/// Unacknowledged records at most; far more than any sound broker lets gather.
const MAX_PENDING: usize = 100_000;

/// Longest wait for the next record.
const PAUSE: Duration = Duration::from_secs(10);

pub(super) async fn measure(session: &Session, work: &EndToEnd, ack: Ack) -> anyhow::Result<Row> {
    let count = |time: Duration| (time.as_secs_f64() * f64::from(work.rate)) as u64;
    let warm_up = count(session.effort.warm_up(work.warm_up_seconds));
    let measured = count(session.effort.measured(work.seconds)).max(1);
    let topic = Topic::create(session, work.partitions, ack).await?;
    let client = Client::connect(topic.address.clone()).await?;
    let consumer =
        client.consumer().assign(&topic.name, 0..topic.partitions).start(Start::Beginning).build().await?;
    let sender = Sender::new(&topic, BATCH_BYTES, ack).await?;
    let schedule = Schedule::new(Instant::now(), work.rate);

    let mut sending = JoinSet::new();
    let (pending, acks) = mpsc::channel(MAX_PENDING);
    sending.spawn(send(sender, schedule, warm_up + measured, value(work.record_bytes), pending));
    sending.spawn(look_at(acks));
    let received = receive(session, consumer, schedule, warm_up, measured, work.record_bytes).await;
    // Why records were not sent explains why they did not come.
    join(sending).await?;
    let row = received?;
    topic.discard(session, &[]).await?;
    Ok(row)
}

/// Sends each record when it is due, or as soon after that as there is room.
async fn send(
    sender: Sender,
    schedule: Schedule,
    records: u64,
    template: Bytes,
    pending: mpsc::Sender<PendingAck>,
) -> anyhow::Result<()> {
    let timer = Timer::new()?;
    for index in 0..records {
        timer.wait_until(schedule.due(index)).await?;
        let mut value = BytesMut::from(&template[..]);
        value[..8].copy_from_slice(&index.to_be_bytes());
        let sent = sender.enqueue(value.freeze()).await?;
        pending.send(sent).await.context("nobody looks at the acknowledgements any more")?;
    }
    // A producer that ends takes along what is not acknowledged.
    sender.flush().await
}

async fn look_at(mut acks: mpsc::Receiver<PendingAck>) -> anyhow::Result<()> {
    while let Some(mut ack) = acks.recv().await {
        acknowledged(&mut ack).await?;
    }
    Ok(())
}

/// Takes every record once, in whatever order the partitions come.
async fn receive(
    session: &Session,
    mut consumer: Consumer,
    schedule: Schedule,
    warm_up: u64,
    measured: u64,
    record_bytes: usize,
) -> anyhow::Result<Row> {
    let mut seen = vec![false; (warm_up + measured) as usize];
    let mut histogram = latencies();
    let mut meter = None;
    for _ in 0..warm_up + measured {
        let next = timeout(PAUSE, consumer.next()).await.context("no more records")?;
        let now = Instant::now();
        let value = next.context("the stream ended")??.value.unwrap_or_default();
        ensure!(value.len() == record_bytes, "a record of {} bytes", value.len());
        let index = u64::from_be_bytes(*value.first_chunk().context("a record without its number")?);
        let first = seen.get_mut(index as usize).is_some_and(|seen| !std::mem::replace(seen, true));
        ensure!(first, "record {index} came twice, or was never sent");
        if index >= warm_up {
            meter.get_or_insert_with(|| Meter::start(session));
            record(&mut histogram, now.saturating_duration_since(schedule.due(index)));
        }
    }
    let mut row = meter.context("nothing was measured")?.finish(measured, record_bytes as u64);
    row.set_latencies(&histogram);
    timeout(PATIENCE, consumer.close()).await.context("the consumer does not close")??;
    Ok(row)
}
