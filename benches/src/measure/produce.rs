//! Producing through the client: each record has its own acknowledgement, and each is looked at.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use felucca_client::{Client, Level, PendingAck, Producer, Record};
use futures::FutureExt;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::window::{Span, Window};
use super::{PATIENCE, Producers, Session, Topic, join, value};
use crate::row::{Row, latencies, record};
use crate::workload::{Ack, Produce};

/// A producer and where it sends to.
#[derive(Debug)]
pub(super) struct Sender {
    producer: Producer,
    topic: Arc<str>,
}

impl Sender {
    /// On a connection of its own.
    pub(super) async fn new(topic: &Topic, batch_bytes: usize, ack: Ack) -> anyhow::Result<Self> {
        let client = Client::connect(topic.address.clone()).await?;
        let level = match ack {
            Ack::Synced => Level::Synced,
            Ack::Written => Level::Written,
        };
        let producer = client.producer().level(level).max_batch_bytes(batch_bytes).build().await?;
        Ok(Self { producer, topic: topic.name.as_str().into() })
    }

    pub(super) async fn enqueue(&self, value: Bytes) -> anyhow::Result<PendingAck> {
        Ok(self.producer.enqueue(Record::new(self.topic.clone(), value)).await?)
    }

    /// Waits until everything is acknowledged.
    pub(super) async fn flush(&self) -> anyhow::Result<()> {
        timeout(PATIENCE, self.producer.flush()).await.context("no acknowledgement")??;
        Ok(())
    }

    /// Sends records and waits until all are acknowledged.
    pub(super) async fn send_all(&self, records: u64, value: &Bytes, in_flight: usize) -> anyhow::Result<()> {
        let mut pending = VecDeque::with_capacity(in_flight);
        for _ in 0..records {
            if pending.len() == in_flight
                && let Some(mut oldest) = pending.pop_front()
            {
                acknowledged(&mut oldest).await?;
            }
            pending.push_back(self.enqueue(value.clone()).await?);
        }
        for mut ack in pending {
            acknowledged(&mut ack).await?;
        }
        Ok(())
    }

    /// Keeps so many records in flight until the window is over.
    async fn saturate(
        self,
        value: Bytes,
        in_flight: usize,
        window: Arc<Window>,
        task: usize,
    ) -> anyhow::Result<Histogram<u64>> {
        let mut histogram = latencies();
        let mut pending: VecDeque<(Instant, PendingAck)> = VecDeque::with_capacity(in_flight);
        while !window.is_over() {
            pending.push_back((Instant::now(), self.enqueue(value.clone()).await?));
            // What has come is counted now; only at the bound is waited.
            let mut full = pending.len() >= in_flight;
            while let Some((enqueued, oldest)) = pending.front_mut() {
                match oldest.now_or_never() {
                    Some(outcome) => drop(outcome?),
                    None if full => acknowledged(oldest).await?,
                    None => break,
                }
                if window.is_counting() {
                    record(&mut histogram, enqueued.elapsed());
                }
                window.count(task).add(1);
                pending.pop_front();
                full = false;
            }
        }
        for (_, mut ack) in pending {
            acknowledged(&mut ack).await?;
        }
        Ok(histogram)
    }
}

/// Waits for an acknowledgement, without a timer when it is there already.
pub(super) async fn acknowledged(pending: &mut PendingAck) -> anyhow::Result<()> {
    match pending.now_or_never() {
        Some(outcome) => outcome?,
        None => timeout(PATIENCE, pending).await.context("no acknowledgement")??,
    };
    Ok(())
}

pub(super) async fn measure(
    session: &Session,
    work: &Produce,
    ack: Ack,
    producers: Producers,
) -> anyhow::Result<Row> {
    let topic = Topic::create(session, work.partitions, ack).await?;
    let window = Arc::new(Window::new(producers.connections as usize));
    let value = value(work.record_bytes);
    let mut tasks = JoinSet::new();
    for task in 0..producers.connections as usize {
        let sender = Sender::new(&topic, work.batch_bytes, ack).await?;
        tasks.spawn(sender.saturate(value.clone(), producers.in_flight, window.clone(), task));
    }
    let record_bytes = work.record_bytes as u64;
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        measured: session.effort.measured(work.seconds),
        most: session.effort.bytes(work.max_bytes) / record_bytes.max(1),
    };
    let mut row = window.observe(session, &span, record_bytes).await;
    let mut all = latencies();
    for histogram in join(tasks).await? {
        all.add(histogram)?;
    }
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was acknowledged");
    row.set_latencies(&all);
    topic.discard(session, &[]).await?;
    Ok(row)
}
