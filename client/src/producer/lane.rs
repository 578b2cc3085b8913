//! One partition's way to the broker: the batches that gather, and those that are closed and not yet acknowledged.
//!
//! A closed batch carries producer id, epoch and sequence, and the broker appends each sequence once and only after its
//! predecessor. From that follow the rules here:
//!
//! * Closed batches are sent in order. When one comes back, nothing more is sent until all that are in flight have come
//!   back too; then they are sent again in order, under their old sequences.
//! * A batch that failed for good leaves a hole, so its successors go on under a new producer id. Those that the broker is
//!   known not to have are given the new id; those that it may have appended (sent, and no answer came) fail with the same
//!   error, since under a new id they could be appended twice.
//!
//! Nothing here waits or reads a clock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{self, BatchBuilder, Compression};

use super::completion::{Completion, Slot};
use crate::backoff::Backoff;
use crate::client::TopicRef;
use crate::error::{Error, Result};

/// Room made for the first batch of a partition.
const FIRST_CAPACITY: usize = 1 << 10;

/// Who sends: the next sequence of the partition belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) producer_id: i64,
    pub(super) epoch: i16,
}

/// A batch that still takes records.
#[derive(Debug)]
struct Open {
    builder: BatchBuilder,
    permits: usize,
    created: Instant,
    completion: Arc<Completion>,
}

/// A batch under its sequence: sending it again is harmless.
#[derive(Debug)]
struct Closed {
    /// Ascending within the lane, whatever the sequences do.
    serial: u64,
    bytes: Bytes,
    records: u32,
    permits: usize,
    created: Instant,
    completion: Arc<Completion>,
    in_flight: bool,
    /// It was sent at least once without an answer: the broker may have it.
    unanswered: bool,
    /// To be sent in a request of its own, since one with others was refused as a whole.
    alone: bool,
}

/// A batch on its way.
#[derive(Debug)]
pub(super) struct Outbound {
    pub(super) serial: u64,
    pub(super) bytes: Bytes,
    pub(super) created: Instant,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) topic: TopicRef,
    pub(super) partition: u32,
    open: VecDeque<Open>,
    closed: VecDeque<Closed>,
    next_serial: u64,
    identity: Option<Identity>,
    next_sequence: i32,
    /// Used up: a hole is in its sequence.
    spent: Option<Identity>,
    in_flight: usize,
    /// Something came back: nothing more is sent until all that is in flight has.
    draining: bool,
    /// Something failed for good; looked at when nothing is in flight any more.
    broken: Option<Error>,
    backoff: Backoff,
    not_before: Option<Instant>,
    last_bytes: usize,
    /// In the accumulator's list of lanes that may send.
    pub(super) queued: bool,
    /// Its topic is gone; to be dropped when it is empty.
    pub(super) retired: bool,
}

impl Lane {
    pub(super) fn new(topic: TopicRef, partition: u32) -> Self {
        Self {
            topic,
            partition,
            open: VecDeque::new(),
            closed: VecDeque::new(),
            next_serial: 0,
            identity: None,
            next_sequence: 0,
            spent: None,
            in_flight: 0,
            draining: false,
            broken: None,
            backoff: Backoff::default(),
            not_before: None,
            last_bytes: FIRST_CAPACITY,
            queued: false,
            retired: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.closed.is_empty()
    }

    // ---- Gathering ----

    pub(super) fn gathers_nothing(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether a record of this size fits into the batch that gathers.
    pub(super) fn has_room(&self, size: usize, max_batch_bytes: usize) -> bool {
        self.open.back().is_some_and(|open| open.builder.len_bytes() + size <= max_batch_bytes)
    }

    /// Begins a batch.
    pub(super) fn begin(&mut self, size: usize, max_batch_bytes: usize, compression: Compression) {
        // What the last batch took, and a bit: under load that is a whole batch at once.
        let room = (self.last_bytes + self.last_bytes / 8).min(max_batch_bytes);
        let capacity = room.max(size + batch::HEADER_LEN);
        self.open.push_back(Open {
            builder: BatchBuilder::with_capacity(capacity).compression(compression),
            permits: 0,
            created: Instant::now(),
            completion: Completion::new(self.topic.name.clone(), self.partition),
        });
    }

    /// Encodes a record into the batch that gathers.
    pub(super) fn push(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&str, Option<&[u8]>)],
        permits: usize,
    ) -> Result<Slot> {
        let Some(open) = self.open.back_mut() else { return Err(Error::Closed) };
        let index = open.builder.count();
        open.builder
            .push(timestamp, key, value, headers)
            .map_err(|error| Error::Record(error.to_string()))?;
        open.permits += permits;
        Ok(Slot { completion: open.completion.clone(), index })
    }

    /// Drops a batch that was begun and took nothing.
    pub(super) fn forget_empty(&mut self) {
        if self.open.back().is_some_and(|open| open.builder.is_empty()) {
            self.open.pop_back();
        }
    }

    // ---- Sending ----

    pub(super) fn needs_identity(&self) -> bool {
        self.identity.is_none() && !self.is_empty()
    }

    /// Whether this identity may be given: not the one that has a hole here.
    pub(super) fn accepts(&self, identity: Identity) -> bool {
        self.identity.is_none() && self.spent != Some(identity)
    }

    /// Begins a new sequence; batches that wait are numbered anew.
    pub(super) fn give_identity(&mut self, identity: Identity) {
        self.identity = Some(identity);
        self.next_sequence = 0;
        for batch in &mut self.closed {
            let bytes = std::mem::take(&mut batch.bytes);
            let mut bytes = bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
            let sequence = self.next_sequence;
            batch::set_producer(&mut bytes, identity.producer_id, identity.epoch, sequence);
            batch.bytes = bytes.freeze();
            self.next_sequence = after(sequence, batch.records);
        }
    }

    /// Whether the batch to be sent next must not ride with others.
    pub(super) fn next_is_alone(&self) -> bool {
        self.closed.iter().find(|batch| !batch.in_flight).is_some_and(|batch| batch.alone)
    }

    /// Takes what may be sent now. A batch that is not full waits while another one is in flight.
    pub(super) fn take(&mut self, now: Instant, max_in_flight: usize) -> Option<Outbound> {
        let waits = self.not_before.is_some_and(|at| at > now);
        if self.draining || waits || self.identity.is_none() || self.in_flight >= max_in_flight {
            return None;
        }
        self.not_before = None;
        if self.in_flight == self.closed.len() {
            if self.in_flight > 0 && self.open.len() < 2 {
                return None;
            }
            self.close()?;
        }
        // In flight are the oldest, always.
        let batch = self.closed.get_mut(self.in_flight)?;
        batch.in_flight = true;
        self.in_flight += 1;
        Some(Outbound { serial: batch.serial, bytes: batch.bytes.clone(), created: batch.created })
    }

    fn close(&mut self) -> Option<()> {
        let identity = self.identity?;
        let open = self.open.pop_front()?;
        let records = open.builder.count();
        self.last_bytes = open.builder.len_bytes();
        let (id, epoch, sequence) = (identity.producer_id, identity.epoch, self.next_sequence);
        self.next_sequence = after(sequence, records);
        self.closed.push_back(Closed {
            serial: self.next_serial,
            bytes: open.builder.producer(id, epoch, sequence).finish().freeze(),
            records,
            permits: open.permits,
            created: open.created,
            completion: open.completion,
            in_flight: false,
            unanswered: false,
            alone: false,
        });
        self.next_serial += 1;
        Some(())
    }

    /// When sending may go on, while it may not.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        self.not_before.filter(|_| !self.is_empty())
    }

    // ---- Answers: each returns the buffer's bytes that are free again ----

    /// The batch is at `base_offset`.
    pub(super) fn acknowledged(&mut self, serial: u64, base_offset: u64) -> usize {
        self.backoff = Backoff::default();
        let permits = self.end(serial, Ok(base_offset));
        permits + self.came_back()
    }

    /// The broker does not have the batch, or (`unanswered`) may have it; it is to be sent again.
    pub(super) fn returned(&mut self, serial: u64, unanswered: bool, alone: bool) -> usize {
        if let Some(batch) = self.closed.iter_mut().find(|batch| batch.serial == serial) {
            batch.in_flight = false;
            batch.unanswered |= unanswered;
            batch.alone |= alone;
        }
        self.draining = true;
        self.came_back()
    }

    /// The broker has too much to do: [`Lane::returned`], after a pause.
    pub(super) fn postponed(&mut self, serial: u64, error: &Error, now: Instant) -> usize {
        let until = now + self.backoff.next_after(error);
        self.not_before = Some(self.not_before.map_or(until, |before| before.max(until)));
        self.returned(serial, false, false)
    }

    /// The broker misses a predecessor, or does not know the producer.
    pub(super) fn out_of_sequence(&mut self, serial: u64, error: Error, now: Instant) -> usize {
        let first = self.closed.front().is_some_and(|batch| batch.serial == serial);
        if !first || self.broken.is_some() {
            // Its predecessor came back or failed, or will.
            return self.returned(serial, false, false);
        }
        if self.closed.front().is_some_and(|batch| batch.unanswered) {
            return self.refused(serial, error);
        }
        // The broker lost its memory of this producer, and this batch is certainly not appended.
        self.broken = Some(error.clone());
        self.postponed(serial, &error, now)
    }

    /// The batch failed for good.
    pub(super) fn refused(&mut self, serial: u64, error: Error) -> usize {
        let permits = self.end(serial, Err(error.clone()));
        self.broken.get_or_insert(error);
        self.draining = true;
        permits + self.came_back()
    }

    /// Fails what is older than `timeout` and not in flight.
    pub(super) fn expire(&mut self, now: Instant, timeout: Duration) -> usize {
        let late = |created: Instant| now.saturating_duration_since(created) >= timeout;
        let mut permits = 0;
        while let Some(serial) = self
            .closed
            .front()
            .filter(|batch| !batch.in_flight && late(batch.created))
            .map(|batch| batch.serial)
        {
            permits += self.end(serial, Err(Error::Timeout("delivering a record")));
            self.broken = Some(Error::Timeout("delivering a record"));
        }
        if self.broken.is_some() && self.in_flight == 0 {
            permits += self.begin_anew();
        }
        while self.open.front().is_some_and(|open| late(open.created)) {
            if let Some(open) = self.open.pop_front() {
                open.completion.complete(Err(Error::Timeout("delivering a record")));
                permits += open.permits;
            }
        }
        permits
    }

    /// Fails everything, for good.
    pub(super) fn fail_all(&mut self, error: &Error) -> usize {
        let mut permits = 0;
        for open in self.open.drain(..) {
            open.completion.complete(Err(error.clone()));
            permits += open.permits;
        }
        // What is in flight stays noted, so that its answer finds its place.
        for batch in &self.closed {
            batch.completion.complete(Err(error.clone()));
        }
        self.closed.retain(|batch| {
            permits += if batch.in_flight { 0 } else { batch.permits };
            batch.in_flight
        });
        permits
    }

    fn end(&mut self, serial: u64, outcome: Result<u64>) -> usize {
        let Some(place) = self.closed.iter().position(|batch| batch.serial == serial) else { return 0 };
        let Some(batch) = self.closed.remove(place) else { return 0 };
        batch.completion.complete(outcome);
        batch.permits
    }

    fn came_back(&mut self) -> usize {
        self.in_flight = self.closed.iter().filter(|batch| batch.in_flight).count();
        if self.in_flight > 0 {
            return 0;
        }
        self.draining = false;
        if self.broken.is_some() { self.begin_anew() } else { 0 }
    }

    /// With a hole in the sequence: a new producer id for what the broker does not have, the error for what it may have.
    fn begin_anew(&mut self) -> usize {
        let Some(error) = self.broken.take() else { return 0 };
        self.spent = self.identity.take().or(self.spent);
        let mut permits = 0;
        self.closed.retain(|batch| {
            if batch.unanswered {
                batch.completion.complete(Err(error.clone()));
                permits += batch.permits;
            }
            !batch.unanswered
        });
        permits
    }

    /// Who waits for what is in this lane now.
    pub(super) fn completions(&self) -> impl Iterator<Item = Arc<Completion>> {
        let closed = self.closed.iter().map(|batch| &batch.completion);
        closed.chain(self.open.iter().map(|open| &open.completion)).cloned()
    }
}

/// The sequence after `records` more; wraps as the broker's does.
fn after(sequence: i32, records: u32) -> i32 {
    let next = (i64::from(sequence) + i64::from(records)) & i64::from(i32::MAX);
    i32::try_from(next).unwrap_or(0)
}
