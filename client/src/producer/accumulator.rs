//! What is to be sent, by partition: the batch that gathers, and those that are closed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use felucca_protocol::batch::{BatchBuilder, Compression};

use super::completion::{Completion, Slot};
use crate::client::TopicRef;
use crate::error::{Error, Result};

/// A partition as the accumulator knows it: topic id and number.
pub(super) type Key = (Bytes, u32);

/// Who sends to a partition: the sequence of its next batch belongs to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) producer_id: i64,
    pub(super) epoch: i16,
    pub(super) next_sequence: i32,
}

/// A closed batch: its bytes carry the sequence, so that sending it again is harmless.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) bytes: Bytes,
    pub(super) sequence: i32,
    pub(super) records: u32,
    pub(super) permits: usize,
    pub(super) created: Instant,
    pub(super) completion: Arc<Completion>,
}

#[derive(Debug)]
struct Gathering {
    builder: BatchBuilder,
    permits: usize,
    created: Instant,
    completion: Arc<Completion>,
}

#[derive(Debug)]
struct Lane {
    topic: Arc<str>,
    gathering: VecDeque<Gathering>,
    /// Sent before and to be sent again, before anything new.
    returned: VecDeque<Batch>,
    in_flight: usize,
    /// Something failed: nothing more is sent until all that is in flight has come back.
    draining: bool,
    not_before: Option<Instant>,
    identity: Option<Identity>,
}

#[derive(Debug)]
pub(super) struct Accumulator {
    lanes: BTreeMap<Key, Lane>,
    sticky: BTreeMap<Bytes, u32>,
    max_batch_bytes: usize,
    compression: Compression,
    /// Records enqueued and neither acknowledged nor failed.
    open_records: usize,
}

impl Accumulator {
    pub(super) fn new(max_batch_bytes: usize, compression: Compression) -> Self {
        Self {
            lanes: BTreeMap::new(),
            sticky: BTreeMap::new(),
            max_batch_bytes,
            compression,
            open_records: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open_records == 0
    }

    /// The partition that records without a key go to: the same while its batches fill or are in flight, so that batches
    /// grow; the next one when it is idle, so that a slow producer uses all partitions.
    pub(super) fn sticky_partition(&mut self, topic: &TopicRef) -> u32 {
        let partitions = topic.partitions.max(1);
        let sticky = self.sticky.entry(topic.id.clone()).or_insert(0);
        let lane = self.lanes.get(&(topic.id.clone(), *sticky % partitions));
        if lane.is_some_and(|lane| lane.gathering.is_empty() && lane.in_flight == 0) {
            *sticky = sticky.wrapping_add(1);
        }
        *sticky % partitions
    }

    /// Encodes a record into its partition's batch. Answers its place, and whether the sender has something to do.
    #[expect(clippy::too_many_arguments, reason = "the parts of one record")]
    pub(super) fn push(
        &mut self,
        topic: &TopicRef,
        partition: u32,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&str, Option<&[u8]>)],
        permits: usize,
    ) -> Result<(Slot, bool)> {
        let lane = self.lanes.entry((topic.id.clone(), partition)).or_insert_with(|| Lane {
            topic: topic.name.clone(),
            gathering: VecDeque::new(),
            returned: VecDeque::new(),
            in_flight: 0,
            draining: false,
            not_before: None,
            identity: None,
        });
        let full = |open: &Gathering| {
            open.builder.len_bytes() + permits > self.max_batch_bytes && !open.builder.is_empty()
        };
        let next = lane.gathering.back().is_none_or(full);
        if next {
            if !lane.gathering.is_empty() && key.is_none() {
                // The next records without a key go to the next partition.
                let sticky = self.sticky.entry(topic.id.clone()).or_insert(0);
                *sticky = sticky.wrapping_add(1);
            }
            let capacity = self.max_batch_bytes.min(16 << 10).max(permits + 128);
            lane.gathering.push_back(Gathering {
                builder: BatchBuilder::with_capacity(capacity).compression(self.compression),
                permits: 0,
                created: Instant::now(),
                completion: Completion::new(lane.topic.clone(), partition),
            });
        }
        let Some(open) = lane.gathering.back_mut() else { return Err(Error::Closed) };
        let index = open.builder.count();
        open.builder
            .push(timestamp, key, value, headers)
            .map_err(|error| Error::Record(error.to_string()))?;
        open.permits += permits;
        self.open_records += 1;
        let slot = Slot { completion: open.completion.clone(), index };
        Ok((slot, lane.in_flight == 0 || next))
    }

    /// Partitions that have something to send but no producer identity yet.
    pub(super) fn needs_identity(&self) -> bool {
        self.lanes.values().any(|lane| lane.identity.is_none() && !lane.gathering.is_empty())
    }

    pub(super) fn give_identity(&mut self, producer_id: i64, epoch: i16) {
        for lane in self.lanes.values_mut().filter(|lane| lane.identity.is_none()) {
            lane.identity = Some(Identity { producer_id, epoch, next_sequence: 0 });
        }
    }

    /// Takes what may be sent now, at most about `max_bytes` and one batch a partition. `max_in_flight` bounds the batches of
    /// a partition; a batch that is not full waits while another one of its partition is in flight.
    pub(super) fn take(&mut self, now: Instant, max_bytes: usize, max_in_flight: usize) -> Vec<(Key, Batch)> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        for (key, lane) in &mut self.lanes {
            if bytes >= max_bytes {
                break;
            }
            let waiting = lane.not_before.is_some_and(|at| at > now);
            if lane.draining || waiting || lane.in_flight >= max_in_flight {
                continue;
            }
            lane.not_before = None;
            let batch = match lane.returned.pop_front() {
                Some(batch) => batch,
                None if lane.in_flight == 0 || lane.gathering.len() > 1 => match lane.close() {
                    Some(batch) => batch,
                    None => continue,
                },
                None => continue,
            };
            lane.in_flight += 1;
            bytes += batch.bytes.len();
            taken.push((key.clone(), batch));
        }
        taken
    }

    /// When the earliest partition that waits for its backoff may go on.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        let waiting =
            self.lanes.values().filter(|lane| !lane.returned.is_empty() || !lane.gathering.is_empty());
        waiting.filter_map(|lane| lane.not_before).min()
    }

    /// The batch was appended at `base_offset`. Answers the bytes that are free again.
    pub(super) fn acknowledged(&mut self, key: &Key, batch: &Batch, base_offset: u64) -> usize {
        batch.completion.complete(Ok(base_offset));
        self.open_records -= batch.records as usize;
        self.came_back(key);
        batch.permits
    }

    /// The batch failed for good. Its sequence number is not used again, so the partition goes on under a new identity; what
    /// was sent of it and has no answer may have been appended and cannot be sent under another one: it fails as well.
    pub(super) fn failed(&mut self, key: &Key, batch: &Batch, error: &Error) -> usize {
        batch.completion.complete(Err(error.clone()));
        self.open_records -= batch.records as usize;
        let mut permits = batch.permits;
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.draining = true;
            lane.identity = None;
            for batch in lane.returned.drain(..) {
                batch.completion.complete(Err(error.clone()));
                self.open_records -= batch.records as usize;
                permits += batch.permits;
            }
        }
        self.came_back(key);
        permits
    }

    /// The batch is to be sent again, not before `at`.
    pub(super) fn returned(&mut self, key: &Key, batch: Batch, at: Instant) {
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.draining = true;
            lane.not_before = Some(lane.not_before.map_or(at, |before| before.max(at)));
            let place = lane.returned.iter().position(|other| batch.sequence < other.sequence);
            lane.returned.insert(place.unwrap_or(lane.returned.len()), batch);
        }
        self.came_back(key);
    }

    /// Whether an earlier batch of the partition is waiting to be sent again, so that this one was refused for the gap.
    pub(super) fn follows_returned(&self, key: &Key, batch: &Batch) -> bool {
        self.lanes
            .get(key)
            .is_some_and(|lane| lane.returned.iter().any(|other| other.sequence < batch.sequence))
    }

    fn came_back(&mut self, key: &Key) {
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.in_flight -= 1;
            if lane.in_flight == 0 {
                lane.draining = false;
            }
        }
    }

    pub(super) fn fail_all(&mut self, error: &Error) {
        for lane in std::mem::take(&mut self.lanes).into_values() {
            for open in lane.gathering {
                open.completion.complete(Err(error.clone()));
            }
            for batch in lane.returned {
                batch.completion.complete(Err(error.clone()));
            }
        }
        self.open_records = 0;
    }
}

impl Lane {
    fn close(&mut self) -> Option<Batch> {
        let identity = self.identity.as_mut()?;
        let open = self.gathering.pop_front()?;
        let records = open.builder.count();
        let sequence = identity.next_sequence;
        let next = (i64::from(sequence) + i64::from(records)) & i64::from(i32::MAX);
        identity.next_sequence = i32::try_from(next).unwrap_or(0);
        let bytes = open.builder.producer(identity.producer_id, identity.epoch, sequence).finish().freeze();
        let (permits, created, completion) = (open.permits, open.created, open.completion);
        Some(Batch { bytes, sequence, records, permits, created, completion })
    }
}
