//! The producer: always idempotent, in order per partition, bounded in memory.
//!
//! A record is encoded into its partition's open batch at once. Batches are sent as soon as nothing of their partition is in
//! flight; what comes meanwhile gathers. After a lost connection or a retryable refusal the batches are sent again in their
//! order with their old sequence numbers, and the broker appends each once ([`lane`] has the rules).

mod accumulator;
mod completion;
mod lane;
mod sender;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use felucca_protocol::batch::{Compression, HEADER_LEN, record_size};
use felucca_protocol::message;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::record::{Record, now_ms};
use accumulator::Accumulator;
pub use completion::PendingAck;
use sender::Sender;

/// How durable a record is to be before it is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// On the device: survives power loss.
    #[default]
    Synced,
    /// In the broker's page cache: survives a killed broker. The topic must allow it.
    Written,
}

impl From<Level> for message::Level {
    fn from(level: Level) -> Self {
        match level {
            Level::Synced => Self::Synced,
            Level::Written => Self::Written,
        }
    }
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

    /// Requests in flight, and batches of one partition in flight; 1 to 5, default 5.
    #[must_use]
    pub fn max_in_flight(mut self, batches: usize) -> Self {
        self.settings.max_in_flight = batches.clamp(1, MAX_IN_FLIGHT);
        self
    }

    /// Bytes of records that are not acknowledged yet; default 32 MiB. At the bound `enqueue` waits.
    #[must_use]
    pub fn buffer_bytes(mut self, bytes: usize) -> Self {
        self.settings.buffer_bytes = bytes.clamp(1, u32::MAX as usize >> 1);
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
        let accumulator = Accumulator::new(self.settings.max_batch_bytes, self.settings.compression);
        let shared = Arc::new(Shared {
            buffer: Semaphore::new(self.settings.buffer_bytes),
            accumulator: Mutex::new(accumulator),
            work: Notify::new(),
            max_record_bytes: AtomicUsize::new(0),
            max_batch_bytes: AtomicUsize::new(0),
            settings: self.settings,
        });
        shared.learn_limits(&session.welcome);
        let sender = tokio::spawn(Sender::new(self.client.clone(), shared.clone()).run());
        Ok(Producer { client: self.client, handle: Arc::new(Handle { shared, sender }) })
    }
}

/// What the producer's clones and its sender share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// Bytes that may still be enqueued.
    buffer: Semaphore,
    accumulator: Mutex<Accumulator>,
    /// There may be something to send.
    work: Notify,
    /// The broker's limits.
    max_record_bytes: AtomicUsize,
    max_batch_bytes: AtomicUsize,
}

impl Shared {
    /// A broker that was restarted may have other limits.
    fn learn_limits(&self, welcome: &message::Welcome) {
        self.max_record_bytes.store(welcome.max_record_bytes as usize, Ordering::Relaxed);
        let max_batch_bytes = welcome.max_batch_bytes as usize;
        if self.max_batch_bytes.swap(max_batch_bytes, Ordering::Relaxed) != max_batch_bytes {
            let bytes = self.settings.max_batch_bytes.min(max_batch_bytes);
            self.accumulator.lock().set_max_batch_bytes(bytes);
        }
    }

    /// Refuses a record that the broker would refuse.
    fn check_size(&self, content: usize, encoded: usize) -> Result<()> {
        let limit = self.max_record_bytes.load(Ordering::Relaxed);
        if content > limit {
            let why = format!("{content} bytes are over the broker's limit of {limit} bytes");
            return Err(Error::Record(why));
        }
        let limit = self.max_batch_bytes.load(Ordering::Relaxed);
        if encoded + HEADER_LEN > limit {
            let why = format!(
                "{encoded} bytes do not fit into a batch, for which the broker's limit is {limit} bytes"
            );
            return Err(Error::Record(why));
        }
        Ok(())
    }
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
///
/// ```no_run
/// use felucca_client::{Client, Record, Result};
///
/// # async fn example(client: Client) -> Result<()> {
/// let producer = client.producer().build().await?;
/// let mut pending = Vec::new();
/// for line in ["first", "second", "third"] {
///     // Waits for room in the buffer only.
///     pending.push(producer.enqueue(Record::new("lines", line).key("file-1")).await?);
/// }
/// for ack in pending {
///     println!("at offset {}", ack.await?.offset);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    client: Client,
    handle: Arc<Handle>,
}

impl Producer {
    /// Sends a record and waits for its acknowledgement, at most for the delivery timeout once there was room for it. When the
    /// future is dropped the record may still be sent.
    ///
    /// # Errors
    /// As [`Producer::enqueue`], or why the broker did not take it.
    pub async fn send(&self, record: Record) -> Result<Ack> {
        self.enqueue(record).await?.await
    }

    /// Puts a record into the buffer, waiting for room only: at most for the delivery timeout, by which what is in the buffer
    /// has been acknowledged or has failed. Records of one caller keep their order in each partition. The record is sent
    /// whether or not the [`PendingAck`] is awaited. Cancellation safe: when the future is dropped the record is not sent.
    ///
    /// # Errors
    /// The topic or partition is unknown, or the record over the broker's limit, which the error names.
    pub async fn enqueue(&self, record: Record) -> Result<PendingAck> {
        let shared = &self.handle.shared;
        let headers = record.header_slices();
        let size = record_size(record.key.as_deref(), record.value.as_deref(), &headers);
        shared.check_size(record.content_bytes(), size)?;
        // Fits into 32 bits, as the buffer does.
        let permits = size.min(shared.settings.buffer_bytes);
        let room = match shared.buffer.try_acquire_many(permits as u32) {
            Ok(room) => room,
            Err(_) => shared.buffer.acquire_many(permits as u32).await.map_err(|_| Error::Closed)?,
        };
        let timestamp = record.timestamp.unwrap_or_else(now_ms);
        loop {
            let pushed = shared.accumulator.lock().push(&record, &headers, timestamp, permits)?;
            if let Some((slot, look)) = pushed {
                room.forget();
                if look {
                    shared.work.notify_one();
                }
                return Ok(slot.into_pending(shared.settings.level, timestamp));
            }
            let topic = self.client.topic(&record.topic).await?;
            shared.accumulator.lock().learn(topic);
        }
    }

    /// Waits until everything enqueued before is acknowledged or has failed. Cancellation safe.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it takes longer than the delivery timeout. A record that failed is no error here: its
    /// [`PendingAck`] says so.
    pub async fn flush(&self) -> Result<()> {
        let shared = &self.handle.shared;
        let waiting = shared.accumulator.lock().completions();
        let flushed = async {
            for completion in waiting {
                completion.ended().await;
            }
        };
        let patience = shared.settings.delivery_timeout + Duration::from_secs(2);
        tokio::time::timeout(patience, flushed).await.map_err(|_| Error::Timeout("flushing"))
    }
}
