//! Producing as fast as what may be in flight allows: each record has its own acknowledgement, and each is looked at.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::FutureExt;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::window::{Span, Window};
use super::{FILL_IN_FLIGHT, PATIENCE, Producers, Session, create_topic, join, value};
use crate::driver::{Driver, Gathering, Producer, Topic};
use crate::row::{Row, latencies, record};
use crate::workload::Produce;

/// Records of which nothing is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filling {
    /// At the most.
    pub(super) records: u64,
    /// Ends early after this: a slow server is measured with fewer records.
    pub(super) longest: Duration,
    pub(super) record_bytes: usize,
    pub(super) batch_bytes: usize,
    pub(super) keys: u32,
}

impl Filling {
    /// Sends them, waits until all are acknowledged, and returns how many they were.
    pub(super) async fn fill<D: Driver>(&self, driver: &D, topic: &Topic) -> anyhow::Result<u64> {
        let gathering =
            Gathering { batch_bytes: self.batch_bytes, in_flight: FILL_IN_FLIGHT, keys: self.keys };
        let mut producer = driver.producer(topic, 0, gathering).await?;
        let value = value(self.record_bytes);
        let began = Instant::now();
        let mut sent = 0;
        let mut pending = VecDeque::with_capacity(FILL_IN_FLIGHT);
        while sent < self.records && began.elapsed() < self.longest {
            if pending.len() == FILL_IN_FLIGHT
                && let Some(mut oldest) = pending.pop_front()
            {
                acknowledged(&mut oldest).await?;
            }
            pending.push_back(producer.enqueue(value.clone()).await?);
            sent += 1;
        }
        for mut ack in pending {
            acknowledged(&mut ack).await?;
        }
        producer.close().await?;
        Ok(sent)
    }
}

/// Waits for an acknowledgement, without a timer when it is there already.
pub(super) async fn acknowledged(
    pending: &mut (impl Future<Output = anyhow::Result<()>> + Unpin),
) -> anyhow::Result<()> {
    match pending.now_or_never() {
        Some(outcome) => outcome,
        None => timeout(PATIENCE, pending).await.context("no acknowledgement")?,
    }
}

/// What one connection does.
pub(super) struct Load {
    pub(super) value: Bytes,
    /// Records (or blocks) that are unacknowledged.
    pub(super) in_flight: usize,
    /// Records that are handed over together.
    pub(super) block: Option<usize>,
    pub(super) window: Arc<Window>,
    pub(super) task: usize,
}

/// What was sent, and since when it is on its way.
struct Sent<P> {
    at: Instant,
    pending: P,
    records: u64,
}

impl Load {
    pub(super) async fn run<P: Producer>(self, mut producer: P) -> anyhow::Result<Histogram<u64>> {
        let mut histogram = latencies();
        match self.block {
            None => {
                let mut flight: VecDeque<Sent<P::Pending>> = VecDeque::with_capacity(self.in_flight);
                while !self.window.is_over() {
                    let at = Instant::now();
                    let pending = producer.enqueue(self.value.clone()).await?;
                    flight.push_back(Sent { at, pending, records: 1 });
                    self.settle(&mut flight, &mut histogram).await?;
                }
                self.drain(flight).await?;
            }
            Some(records) => {
                let values = vec![self.value.clone(); records];
                let mut flight = VecDeque::with_capacity(self.in_flight);
                while !self.window.is_over() {
                    let at = Instant::now();
                    let pending = producer.enqueue_block(&values).await?;
                    flight.push_back(Sent { at, pending, records: records as u64 });
                    self.settle(&mut flight, &mut histogram).await?;
                }
                self.drain(flight).await?;
            }
        }
        producer.close().await?;
        Ok(histogram)
    }

    /// What has come is counted now; only at the bound is waited.
    async fn settle<P: Future<Output = anyhow::Result<()>> + Unpin>(
        &self,
        flight: &mut VecDeque<Sent<P>>,
        histogram: &mut Histogram<u64>,
    ) -> anyhow::Result<()> {
        let mut full = flight.len() >= self.in_flight;
        while let Some(oldest) = flight.front_mut() {
            match (&mut oldest.pending).now_or_never() {
                Some(outcome) => outcome?,
                None if full => acknowledged(&mut oldest.pending).await?,
                None => break,
            }
            if self.window.is_counting() {
                record(histogram, oldest.at.elapsed());
            }
            self.window.count(self.task).add(oldest.records);
            flight.pop_front();
            full = false;
        }
        Ok(())
    }

    async fn drain<P: Future<Output = anyhow::Result<()>> + Unpin>(
        &self,
        flight: VecDeque<Sent<P>>,
    ) -> anyhow::Result<()> {
        for mut sent in flight {
            acknowledged(&mut sent.pending).await?;
            self.window.count(self.task).add(sent.records);
        }
        Ok(())
    }
}

pub(super) async fn measure<D: Driver>(
    session: &Session,
    work: &Produce,
    producers: Producers,
) -> anyhow::Result<Row> {
    let driver = D::open(&session.address, session.level).await?;
    let topic = create_topic(&driver, producers.partitions.unwrap_or(work.partitions)).await?;
    let gathering = Gathering {
        batch_bytes: work.batch_bytes,
        in_flight: producers.in_flight * producers.block_records.unwrap_or(1),
        keys: 0,
    };
    let window = Arc::new(Window::new(producers.connections as usize));
    let value = value(work.record_bytes);
    let mut tasks = JoinSet::new();
    for task in 0..producers.connections {
        let producer = driver.producer(&topic, task, gathering).await?;
        let load = Load {
            value: value.clone(),
            in_flight: producers.in_flight,
            block: producers.block_records,
            window: window.clone(),
            task: task as usize,
        };
        tasks.spawn(load.run(producer));
    }
    let record_bytes = work.record_bytes as u64;
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        warm_up_units: session.effort.bytes(D::WARM_UP_BYTES) / record_bytes.max(1),
        measured: session.effort.measured(work.seconds),
        most: session.effort.bytes(work.max_bytes) / record_bytes.max(1),
    };
    let (mut row, opening) = window.observe(session, &span, record_bytes).await;
    let mut all = latencies();
    for histogram in join(tasks).await? {
        all.add(histogram)?;
    }
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was acknowledged");
    opening.check()?;
    row.set_latencies(&all);
    opening.sustained(session, &window, record_bytes, &mut row).await;
    session.discard(&driver, &topic, &[]).await?;
    Ok(row)
}
