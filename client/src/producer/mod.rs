//! The producer: always idempotent, in order per partition, bounded in memory.
//!
//! A record is encoded into its partition's open batch at once. Batches are sent as soon as nothing of their partition is in
//! flight; what comes meanwhile gathers. After a lost connection or a retryable refusal the batches are sent again in their
//! order with their old sequence numbers, and the broker appends each once.

mod accumulator;
mod completion;
mod sender;

use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::batch::{Compression, record_size};
use felucca_protocol::partitioner::partition_for_key;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use crate::client::{Client, TopicRef};
use crate::error::{Error, Result};
use crate::record::{Record, now_ms};
use accumulator::Accumulator;
pub use completion::PendingAck;

/// How durable a record is to be before it is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// On the device: survives power loss.
    #[default]
    Synced,
    /// In the broker's page cache: survives a killed broker. The topic must allow it.
    Written,
}

/// Where a record is, and how durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    pub topic: Arc<str>,
    pub partition: u32,
    pub offset: u64,
    /// Unix milliseconds, as sent.
    pub timestamp: i64,
    pub level: Level,
}

/// Settings of a producer.
#[derive(Clone, Debug)]
pub struct ProducerBuilder {
    client: Client,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    level: Level,
    max_batch_bytes: usize,
    max_in_flight: usize,
    buffer_bytes: usize,
    compression: Compression,
    delivery_timeout: Duration,
}

/// Batches of one partition in flight: as many as the broker remembers of a producer.
const MAX_IN_FLIGHT: usize = 5;

impl ProducerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        let settings = Settings {
            level: Level::Synced,
            max_batch_bytes: 128 << 10,
            max_in_flight: MAX_IN_FLIGHT,
            buffer_bytes: 32 << 20,
            compression: Compression::None,
            delivery_timeout: Duration::from_secs(120),
        };
        Self { client, settings }
    }

    /// Durability before the acknowledgement; default [`Level::Synced`].
    #[must_use]
    pub fn level(mut self, level: Level) -> Self {
        self.settings.level = level;
        self
    }

    /// A batch is closed at this size; default 128 KiB. A larger record has a batch of its own.
    #[must_use]
    pub fn max_batch_bytes(mut self, bytes: usize) -> Self {
        self.settings.max_batch_bytes = bytes;
        self
    }

    /// Batches of one partition in flight, 1 to 5; default 5.
    #[must_use]
    pub fn max_in_flight(mut self, batches: usize) -> Self {
        self.settings.max_in_flight = batches.clamp(1, MAX_IN_FLIGHT);
        self
    }

    /// Bytes of records that are not acknowledged yet; default 32 MiB. At the bound `enqueue` waits.
    #[must_use]
    pub fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.settings.buffer_bytes = bytes.min(Semaphore::MAX_PERMITS >> 1);
        self
    }

    /// Compression of batches; default none.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.settings.compression = compression;
        self
    }

    /// How long a record is tried, reconnects included; default 120 s.
    #[must_use]
    pub fn delivery_timeout(mut self, timeout: Duration) -> Self {
        self.settings.delivery_timeout = timeout;
        self
    }

    /// Starts the producer.
    ///
    /// # Errors
    /// No connection within the request timeout.
    pub async fn build(self) -> Result<Producer> {
        let session = self.client.link.connected(self.client.link.request_timeout()).await?;
        let shared = Arc::new(Shared {
            buffer: Arc::new(Semaphore::new(self.settings.buffer_bytes)),
            accumulator: Mutex::new(Accumulator::new(
                self.settings.max_batch_bytes,
                self.settings.compression,
            )),
            work: Notify::new(),
            idle: Notify::new(),
            settings: self.settings,
        });
        let sender = tokio::spawn(sender::run(self.client.clone(), shared.clone()));
        let handle = Handle { shared, sender };
        let max_record_bytes = session.welcome.max_record_bytes as usize;
        Ok(Producer { client: self.client, handle: Arc::new(handle), max_record_bytes })
    }
}

/// What the producer's clones and its sender share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// Bytes that may still be enqueued.
    buffer: Arc<Semaphore>,
    accumulator: Mutex<Accumulator>,
    /// There may be something to send.
    work: Notify,
    /// Nothing is left to be acknowledged.
    idle: Notify,
}

/// Ends the sender with the last clone.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    sender: tokio::task::JoinHandle<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.sender.abort();
        self.shared.accumulator.lock().fail_all(&Error::Closed);
    }
}

/// Sends records. Cheap to clone; all clones share buffer and order. Records that are not acknowledged when the last clone
/// is dropped fail with [`Error::Closed`]: `flush` first.
#[derive(Clone, Debug)]
pub struct Producer {
    client: Client,
    handle: Arc<Handle>,
    max_record_bytes: usize,
}

impl Producer {
    /// Sends a record and waits for its acknowledgement. When the future is dropped the record may still be sent.
    ///
    /// # Errors
    /// As [`Producer::enqueue`], or why the broker did not take it.
    pub async fn send(&self, record: Record) -> Result<Ack> {
        self.enqueue(record).await?.await
    }

    /// Puts a record into the buffer, waiting for room only. Records of one caller keep their order in each partition. The
    /// record is sent whether or not the [`PendingAck`] is awaited. When the future is dropped the record is not enqueued.
    ///
    /// # Errors
    /// The topic is unknown, or the record over the broker's limit.
    pub async fn enqueue(&self, record: Record) -> Result<PendingAck> {
        let content = record.content_bytes();
        if content > self.max_record_bytes {
            let limit = self.max_record_bytes;
            return Err(Error::Record(format!(
                "{content} bytes are over the broker's limit of {limit} bytes"
            )));
        }
        let topic = match self.client.known_topic(&record.topic) {
            Some(topic) => topic,
            None => self.client.topic(&record.topic).await?,
        };
        let shared = &self.handle.shared;
        let headers = record.header_slices();
        let size = record_size(record.key.as_deref(), record.value.as_deref(), &headers);
        let permits = size.min(shared.settings.buffer_bytes);
        let room = shared.buffer.acquire_many(u32::try_from(permits).unwrap_or(u32::MAX)).await;
        room.map_err(|_| Error::Closed)?.forget();
        let timestamp = record.timestamp.unwrap_or_else(now_ms);
        let pushed = {
            let mut accumulator = shared.accumulator.lock();
            choose_partition(&record, &topic, &mut accumulator).and_then(|partition| {
                let (key, value) = (record.key.as_deref(), record.value.as_deref());
                accumulator.push(&topic, partition, timestamp, key, value, &headers, permits)
            })
        };
        match pushed {
            Ok((ack, wake)) => {
                if wake {
                    shared.work.notify_one();
                }
                Ok(ack.into_pending(shared.settings.level, timestamp))
            }
            Err(error) => {
                shared.buffer.add_permits(permits);
                Err(error)
            }
        }
    }

    /// Waits until everything enqueued so far is acknowledged or has failed. Cancellation safe.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it takes longer than the delivery timeout.
    pub async fn flush(&self) -> Result<()> {
        let shared = &self.handle.shared;
        let flushed = async {
            loop {
                let idle = shared.idle.notified();
                if shared.accumulator.lock().is_empty() {
                    return;
                }
                idle.await;
            }
        };
        let patience = shared.settings.delivery_timeout + Duration::from_secs(1);
        tokio::time::timeout(patience, flushed).await.map_err(|_| Error::Timeout("flushing"))
    }
}

fn choose_partition(record: &Record, topic: &TopicRef, accumulator: &mut Accumulator) -> Result<u32> {
    match (record.partition, &record.key) {
        (Some(partition), _) if partition < topic.partitions => Ok(partition),
        (Some(partition), _) => {
            Err(Error::Record(format!("topic {:?} has no partition {partition}", &*topic.name)))
        }
        (None, Some(key)) => Ok(partition_for_key(key, topic.partitions)),
        (None, None) => Ok(accumulator.sticky_partition(topic)),
    }
}
