//! Ordered subscriptions and fetches: records pushed, or answered, from the read views.
//!
//! One task per subscription. It sleeps on one [`Notify`], which the views of its partitions ring when their high watermark
//! rises and the connection rings when credit comes. Partitions take turns, so that a long backlog in one does not hold up
//! the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::BatchHeader;
use felucca_protocol::{Api, ErrorCode, message as wire};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::convert;
use super::outbox::{OutFrame, Outbox};
use crate::broker::Broker;
use crate::engine::types::PartitionKey;
use crate::log::ReadView;

/// Most bytes of one push, unless a single batch is larger.
const PUSH_BYTES: i64 = 1 << 20;

/// What a subscription may still push.
#[derive(Debug)]
pub(super) struct Credit {
    records: AtomicI64,
    bytes: AtomicI64,
    changed: Arc<Notify>,
}

impl Credit {
    pub(super) fn new(records: u32, bytes: u32) -> Arc<Self> {
        Arc::new(Self {
            records: AtomicI64::new(records.into()),
            bytes: AtomicI64::new(bytes.into()),
            changed: Arc::new(Notify::new()),
        })
    }

    pub(super) fn add(&self, records: u32, bytes: u32) {
        self.records.fetch_add(records.into(), Ordering::Relaxed);
        self.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
        self.changed.notify_one();
    }

    fn bytes(&self) -> i64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn records(&self) -> i64 {
        self.records.load(Ordering::Relaxed)
    }

    fn any(&self) -> bool {
        self.bytes() > 0 && self.records() > 0
    }

    fn take(&self, records: i64, bytes: i64) {
        self.records.fetch_sub(records, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A partition and the next offset to push.
#[derive(Debug)]
struct Position {
    view: Arc<ReadView>,
    offset: u64,
}

/// An open subscription.
#[derive(Debug)]
pub(super) struct Subscription {
    broker: Broker,
    outbox: Arc<Outbox>,
    id: u64,
    positions: Vec<Position>,
    credit: Arc<Credit>,
}

impl Subscription {
    /// Opens a subscription without starting it.
    ///
    /// # Errors
    /// A partition does not exist.
    pub(super) fn open(
        broker: Broker,
        outbox: Arc<Outbox>,
        id: u64,
        positions: &[wire::Position],
        credit: Arc<Credit>,
    ) -> Result<Self, wire::Error> {
        let positions = positions.iter().map(|position| {
            let key = convert::partition_key(&position.topic_id, position.partition)?;
            let view = broker.view(key).map_err(|error| convert::engine_error(&error))?;
            view.interest(&credit.changed);
            Ok(Position { view, offset: position.offset })
        });
        let positions = positions.collect::<Result<_, wire::Error>>()?;
        Ok(Self { broker, outbox, id, positions, credit })
    }

    /// Pushes until the subscription cannot go on, and says so to the client. Aborting the task ends it silently.
    pub(super) async fn run(mut self) {
        let (partition, error) = self.push_all().await;
        tracing::info!(subscription = self.id, %partition, reason = error.message, "subscription ended");
        let head = convert::ended_frame(self.id, error, Some(partition));
        self.outbox.send(OutFrame { head, payload: Vec::new(), origin: None });
    }

    async fn push_all(&mut self) -> (PartitionKey, wire::Error) {
        loop {
            let mut pushed = false;
            for index in 0..self.positions.len() {
                match self.push(index).await {
                    Ok(any) => pushed |= any,
                    Err(error) => return (self.positions[index].view.partition(), error),
                }
            }
            if !pushed {
                self.credit.changed.notified().await;
                if let Some(gone) = self.gone() {
                    return gone;
                }
            }
        }
    }

    /// Pushes what there is and credit allows of one partition; false if that is nothing.
    async fn push(&mut self, index: usize) -> Result<bool, wire::Error> {
        let position = &mut self.positions[index];
        let high_watermark = position.view.high_watermark();
        if position.offset == high_watermark || !self.credit.any() {
            return Ok(false);
        }
        let _turn = self.outbox.room().await;
        // Between 1 and 2^20.
        let max_bytes = self.credit.bytes().clamp(1, PUSH_BYTES) as usize;
        let batches = position
            .view
            .fetch(position.offset, max_bytes)
            .await
            .map_err(|error| convert::read_error(&error))?;
        let mut payload = Vec::with_capacity(batches.len());
        let mut bytes = 0;
        for batch in batches {
            if !self.credit.any() {
                break;
            }
            let header = BatchHeader::parse(&batch).map_err(|error| convert::batch_error(&error))?;
            self.credit.take(header.record_count.into(), batch.len() as i64);
            position.offset = header.last_offset() + 1;
            bytes += batch.len();
            payload.push(batch);
        }
        if payload.is_empty() {
            return Ok(false);
        }
        let key = position.view.partition();
        let push = wire::Records {
            subscription: self.id,
            topic_id: Bytes::copy_from_slice(&key.topic.0),
            partition: key.partition,
            high_watermark,
        };
        let head = convert::push_frame(Api::Records, self.id, &push, bytes);
        self.outbox.send(OutFrame { head, payload, origin: None });
        Ok(true)
    }

    /// The first partition that does not exist any more.
    fn gone(&self) -> Option<(PartitionKey, wire::Error)> {
        self.positions.iter().find_map(|position| {
            let key = position.view.partition();
            let error = self.broker.view(key).err()?;
            Some((key, convert::engine_error(&error)))
        })
    }
}

/// A one-shot read.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) correlation: u64,
    pub(super) view: Arc<ReadView>,
    pub(super) offset: u64,
    pub(super) max_bytes: usize,
    pub(super) max_wait: Duration,
}

impl Fetch {
    /// Reads, waiting for a record up to the time asked for, and queues the answer.
    pub(super) async fn run(self, broker: Broker, outbox: Arc<Outbox>) {
        if self.offset == self.view.high_watermark() && !self.max_wait.is_zero() {
            let changed = Arc::new(Notify::new());
            self.view.interest(&changed);
            let risen = async {
                while self.view.high_watermark() == self.offset && broker.view(self.view.partition()).is_ok()
                {
                    changed.notified().await;
                }
            };
            // However the wait ends, what is there then is the answer.
            tokio::select! {
                _ = timeout(self.max_wait, risen) => {}
                () = broker.stopping() => {}
            }
        }
        let _turn = outbox.room().await;
        let frame = match self.view.fetch(self.offset, self.max_bytes).await {
            Ok(payload) => {
                let reply = wire::FetchReply {
                    log_start: self.view.log_start(),
                    high_watermark: self.view.high_watermark(),
                };
                let bytes = payload.iter().map(Bytes::len).sum();
                let head = convert::reply_frame(Api::Fetch, self.correlation, &reply, bytes);
                OutFrame { head, payload, origin: None }
            }
            Err(error) => {
                let error = convert::read_error(&error);
                if error.error_code() != ErrorCode::OffsetOutOfRange {
                    tracing::error!(partition = %self.view.partition(), error = error.message, "cannot read the log");
                }
                let head = convert::error_frame(Api::Fetch.into(), self.correlation, &error);
                OutFrame { head, payload: Vec::new(), origin: None }
            }
        };
        outbox.send(frame);
    }
}
