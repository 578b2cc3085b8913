//! What waits to be written to one connection, and the task that writes it.
//!
//! Answers come from the shard and the sync thread, frames from the connection's own tasks; all only queue. The writer
//! takes everything that gathered, encodes it into one buffer, and writes that with the payloads beside it, vectored.
//!
//! Bounds: answers are bounded by the bytes admitted for their requests, deliveries by the credit of their members; who
//! queues frames with payload waits for [`Outbox::room`] first. A client that takes nothing for too long is disconnected.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::convert;
use super::share::Shares;
use crate::engine::effect::Delivery;
use crate::engine::error::EngineError;
use crate::engine::types::SubscriptionId;
use crate::shard::{Answer, Origin, Sink};

/// Payloads from this size on are written from where they are; smaller ones are copied together.
const COPY_BELOW: usize = 4 << 10;
/// What the writer gathers before it writes.
const WRITE_BYTES: usize = 256 << 10;
/// Most slices in one write.
const MAX_SLICES: usize = 64;
/// How far a queue may go over its limit, in frames.
const TURNS: usize = 4;
/// Room kept in the write buffer between writes.
const KEPT_BUFFER: usize = 64 << 10;

/// A frame ready to be sent: header and message in one piece, batches after it.
#[derive(Debug)]
pub(super) struct OutFrame {
    pub(super) head: BytesMut,
    pub(super) payload: Vec<Bytes>,
    /// The request that it answers, held until it is written.
    pub(super) origin: Option<Arc<Origin>>,
}

impl OutFrame {
    fn bytes(&self) -> usize {
        self.head.len() + self.payload.iter().map(Bytes::len).sum::<usize>()
    }
}

#[derive(Debug)]
enum Outgoing {
    Answer(Answer),
    Delivery(Delivery),
    Ended(SubscriptionId, EngineError),
    Frame(OutFrame),
}

#[derive(Debug, Default)]
struct Queue {
    items: Vec<Outgoing>,
    closed: bool,
}

/// The queue of one connection.
#[derive(Debug)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    work: Notify,
    /// Of queued frames.
    bytes: AtomicUsize,
    limit: usize,
    room: Notify,
    /// Bounds how many read at a time what they are about to queue.
    turns: Semaphore,
}

impl Outbox {
    /// Frames wait when `limit` bytes of them are queued.
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            work: Notify::new(),
            bytes: AtomicUsize::new(0),
            limit,
            room: Notify::new(),
            turns: Semaphore::new(TURNS),
        })
    }

    /// Queues a frame and wakes the writer.
    pub(super) fn send(&self, frame: OutFrame) {
        self.bytes.fetch_add(frame.bytes(), Ordering::Relaxed);
        if self.push(Outgoing::Frame(frame)) {
            self.work.notify_one();
        }
    }

    /// Waits until fewer bytes than the limit are queued (or nothing is taken any more) and few others are about to queue
    /// something: what is returned is held from before the bytes are read until they are queued. Cancellation safe.
    pub(super) async fn room(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        let turn = self.turns.acquire().await.ok();
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            // Registered before the bytes are read, so that no write is missed.
            notified.as_mut().enable();
            if self.bytes.load(Ordering::Relaxed) < self.limit || self.queue.lock().closed {
                return turn;
            }
            notified.await;
        }
    }

    /// Nothing more is taken; the writer ends when it has written what is queued.
    pub(super) fn close(&self) {
        self.queue.lock().closed = true;
        self.work.notify_one();
        self.room.notify_waiters();
    }

    fn push(&self, item: Outgoing) -> bool {
        let mut queue = self.queue.lock();
        if queue.closed {
            // Dropped after the lock: that may give admitted bytes back and wake others.
            drop(queue);
            drop(item);
            return false;
        }
        queue.items.push(item);
        queue.items.len() == 1
    }

    /// Swaps what is queued into `items`, which is empty; false when closed and empty.
    async fn take(&self, items: &mut Vec<Outgoing>) -> bool {
        loop {
            {
                let mut queue = self.queue.lock();
                if !queue.items.is_empty() {
                    std::mem::swap(&mut queue.items, items);
                    return true;
                }
                if queue.closed {
                    return false;
                }
            }
            self.work.notified().await;
        }
    }

    fn wrote(&self, bytes: usize) {
        let before = self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        if before >= self.limit && before - bytes < self.limit {
            self.room.notify_waiters();
        }
    }
}

impl Sink for Outbox {
    fn answer(&self, answer: Answer) -> bool {
        self.push(Outgoing::Answer(answer))
    }

    fn deliver(&self, delivery: Delivery) -> bool {
        self.push(Outgoing::Delivery(delivery))
    }

    fn ended(&self, subscription: SubscriptionId, error: EngineError) -> bool {
        self.push(Outgoing::Ended(subscription, error))
    }

    fn wake(&self) {
        self.work.notify_one();
    }
}

/// Writes what is queued until the outbox is closed and empty.
///
/// # Errors
/// The connection broke, or the client took nothing for `patience` ([`io::ErrorKind::TimedOut`]).
pub(super) async fn write_all(
    outbox: &Arc<Outbox>,
    shares: &Shares,
    socket: &mut (impl AsyncWrite + Unpin),
    patience: Duration,
) -> io::Result<()> {
    let mut items = Vec::new();
    let mut gathered = Gathered::default();
    while outbox.take(&mut items).await {
        for item in items.drain(..) {
            match item {
                Outgoing::Answer(answer) => {
                    let token = answer.token;
                    let ready = shares.answered(token, &answer.reply);
                    convert::encode_reply(&mut gathered.buffer, token.tag, token.correlation, answer.reply);
                    gathered.origins.extend(answer.origin);
                    for delivery in ready {
                        shares.send(outbox, delivery);
                    }
                }
                Outgoing::Delivery(delivery) => {
                    if let Some(frames) = shares.deliver(outbox, delivery) {
                        for frame in frames {
                            gathered.frame(frame);
                        }
                    }
                }
                Outgoing::Ended(subscription, error) => {
                    if let Some(id) = shares.ended(subscription) {
                        let frame = convert::ended_frame(id, convert::engine_error(&error), None);
                        gathered.buffer.extend_from_slice(&frame);
                    }
                }
                Outgoing::Frame(frame) => {
                    gathered.counted += frame.bytes();
                    gathered.frame(frame);
                }
            }
            if gathered.len() >= WRITE_BYTES {
                gathered.write(socket, patience).await?;
                outbox.wrote(std::mem::take(&mut gathered.counted));
            }
        }
        gathered.write(socket, patience).await?;
        outbox.wrote(std::mem::take(&mut gathered.counted));
    }
    timeout(patience, socket.shutdown()).await?
}

/// What is encoded and not yet written.
#[derive(Debug, Default)]
struct Gathered {
    /// In order; large payloads stand between pieces of the buffer.
    pieces: VecDeque<Bytes>,
    /// Comes after the pieces.
    buffer: BytesMut,
    piece_bytes: usize,
    /// Bytes of frames that the outbox counted.
    counted: usize,
    /// Answered requests, held until their answers are written.
    origins: Vec<Arc<Origin>>,
}

impl Gathered {
    fn len(&self) -> usize {
        self.piece_bytes + self.buffer.len()
    }

    fn frame(&mut self, frame: OutFrame) {
        self.buffer.extend_from_slice(&frame.head);
        for batch in frame.payload {
            if batch.len() < COPY_BELOW {
                self.buffer.extend_from_slice(&batch);
                continue;
            }
            let before = self.buffer.split().freeze();
            self.piece_bytes += before.len() + batch.len();
            self.pieces.push_back(before);
            self.pieces.push_back(batch);
        }
        self.origins.extend(frame.origin);
    }

    async fn write(&mut self, socket: &mut (impl AsyncWrite + Unpin), patience: Duration) -> io::Result<()> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut count = 0;
            for piece in self.pieces.iter().take(MAX_SLICES - 1) {
                slices[count] = IoSlice::new(piece);
                count += 1;
            }
            if self.pieces.len() < MAX_SLICES {
                slices[count] = IoSlice::new(&self.buffer);
                count += 1;
            }
            let written = match timeout(patience, socket.write_vectored(&slices[..count])).await? {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(error) => return Err(error),
            };
            self.advance(written);
        }
        while !self.buffer.is_empty() {
            match timeout(patience, socket.write(&self.buffer)).await? {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.buffer.advance(written),
                Err(error) => return Err(error),
            }
        }
        self.piece_bytes = 0;
        self.origins.clear();
        if self.buffer.capacity() < KEPT_BUFFER {
            self.buffer.reserve(KEPT_BUFFER);
        }
        Ok(())
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
        self.buffer.advance(written);
    }
}
