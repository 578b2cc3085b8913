//! What is to be sent, by partition, and which partitions may send now.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_protocol::batch::Compression;
use felucca_protocol::partitioner::partition_for_key;

use super::completion::{Completion, Slot};
use super::lane::{Identity, Lane, Outbound};
use crate::backoff::entropy;
use crate::client::TopicRef;
use crate::error::{Error, Result};
use crate::record::Record;

/// A batch on its way, with the place of its lane.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) lane: usize,
    pub(super) outbound: Outbound,
}

#[derive(Debug)]
struct TopicLanes {
    topic: TopicRef,
    /// By partition: the place of its lane, once it has one.
    lanes: Vec<Option<usize>>,
    /// Where records without a key go.
    sticky: u32,
}

#[derive(Debug)]
pub(super) struct Accumulator {
    topics: HashMap<Arc<str>, TopicLanes>,
    lanes: Vec<Option<Lane>>,
    /// Places without a lane.
    free: Vec<usize>,
    /// Lanes that may have something to send, in turn.
    ready: VecDeque<usize>,
    /// Lanes that wait for a time.
    delayed: Vec<usize>,
    identity: Option<Identity>,
    max_batch_bytes: usize,
    compression: Compression,
}

impl Accumulator {
    pub(super) fn new(max_batch_bytes: usize, compression: Compression) -> Self {
        Self {
            topics: HashMap::new(),
            lanes: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            delayed: Vec::new(),
            identity: None,
            max_batch_bytes,
            compression,
        }
    }

    pub(super) fn set_max_batch_bytes(&mut self, bytes: usize) {
        self.max_batch_bytes = bytes;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().flatten().all(Lane::is_empty)
    }

    // ---- Records in ----

    /// What is known of a topic from now on.
    pub(super) fn learn(&mut self, topic: TopicRef) {
        let name = topic.name.clone();
        if self.topics.get(&name).is_some_and(|known| known.topic.id == topic.id) {
            return;
        }
        self.forget(&name);
        let partitions = topic.partitions.max(1);
        // Not every producer begins with the same partition.
        let sticky = (entropy() % u64::from(partitions)) as u32;
        let lanes = vec![None; partitions as usize];
        self.topics.insert(name, TopicLanes { topic, lanes, sticky });
    }

    /// Encodes a record into its partition's batch: its place, and whether the sender should look. `None` when the topic is
    /// not known yet.
    pub(super) fn push(
        &mut self,
        record: &Record,
        headers: &[(&str, Option<&[u8]>)],
        timestamp: i64,
        permits: usize,
    ) -> Result<Option<(Slot, bool)>> {
        let Some(known) = self.topics.get_mut(&record.topic) else { return Ok(None) };
        let partitions = known.lanes.len() as u32;
        let key = record.key.as_deref();
        let partition = match (record.partition, key) {
            (Some(partition), _) if partition < partitions => partition,
            (Some(partition), _) => {
                return Err(Error::Record(format!("topic {:?} has no partition {partition}", record.topic)));
            }
            (None, Some(key)) => partition_for_key(key, partitions),
            (None, None) => {
                let lane = known.lanes[known.sticky as usize].and_then(|place| self.lanes[place].as_ref());
                // The same while its batches fill or are in flight, so that batches grow; the next one when a batch is full
                // or all are acknowledged, so that all partitions are used.
                let stay = lane.is_none_or(|lane| {
                    lane.has_room(permits, self.max_batch_bytes)
                        || (lane.gathers_nothing() && !lane.is_empty())
                });
                if !stay {
                    known.sticky = (known.sticky + 1) % partitions;
                }
                known.sticky
            }
        };
        let place = match known.lanes[partition as usize] {
            Some(place) => place,
            None => {
                let place = self.free.pop().unwrap_or_else(|| {
                    self.lanes.push(None);
                    self.lanes.len() - 1
                });
                self.lanes[place] = Some(Lane::new(known.topic.clone(), partition));
                known.lanes[partition as usize] = Some(place);
                place
            }
        };
        let Some(lane) = self.lanes[place].as_mut() else { return Err(Error::Closed) };
        let begin = !lane.has_room(permits, self.max_batch_bytes);
        if begin {
            lane.begin(permits, self.max_batch_bytes, self.compression);
        }
        let slot = match lane.push(timestamp, key, record.value.as_deref(), headers, permits) {
            Ok(slot) => slot,
            Err(error) => {
                lane.forget_empty();
                return Err(error);
            }
        };
        if begin {
            self.make_ready(place);
        }
        Ok(Some((slot, begin)))
    }

    // ---- Identity ----

    /// Whether a partition waits for a producer id that is not here yet.
    pub(super) fn needs_identity(&self) -> bool {
        let unfit = |lane: &Lane| self.identity.is_none_or(|identity| !lane.accepts(identity));
        self.lanes.iter().flatten().any(|lane| lane.needs_identity() && unfit(lane))
    }

    pub(super) fn set_identity(&mut self, identity: Identity) {
        self.identity = Some(identity);
        for place in 0..self.lanes.len() {
            if self.lanes[place].as_ref().is_some_and(Lane::needs_identity) {
                self.make_ready(place);
            }
        }
    }

    /// No producer id can be had: what waits for one fails.
    pub(super) fn fail_without_identity(&mut self, error: &Error) -> usize {
        let waiting = self.lanes.iter_mut().flatten().filter(|lane| lane.needs_identity());
        waiting.map(|lane| lane.fail_all(error)).sum()
    }

    // ---- Batches out ----

    /// Takes what may be sent now in one request: about `max_bytes`, at most one batch of a partition.
    pub(super) fn take(&mut self, now: Instant, max_bytes: usize, max_in_flight: usize) -> Vec<Sent> {
        let mut taken: Vec<Sent> = Vec::new();
        let mut bytes = 0;
        for _ in 0..self.ready.len() {
            if bytes >= max_bytes {
                break;
            }
            let Some(place) = self.ready.pop_front() else { break };
            let Some(lane) = self.lanes[place].as_mut() else { continue };
            lane.queued = false;
            if let Some(identity) = self.identity
                && lane.accepts(identity)
            {
                lane.give_identity(identity);
            }
            let alone = lane.next_is_alone();
            if alone && !taken.is_empty() {
                self.make_ready(place);
                break;
            }
            match lane.take(now, max_in_flight) {
                Some(outbound) => {
                    bytes += outbound.bytes.len();
                    taken.push(Sent { lane: place, outbound });
                    self.make_ready(place);
                }
                None if lane.waits_until().is_some() => self.delayed.push(place),
                None => {}
            }
            if alone && !taken.is_empty() {
                break;
            }
        }
        taken
    }

    /// Puts lanes whose pause is over into the list again.
    pub(super) fn wake_delayed(&mut self, now: Instant) {
        let mut place = 0;
        while place < self.delayed.len() {
            let lane = self.lanes[self.delayed[place]].as_ref();
            if lane.and_then(Lane::waits_until).is_some_and(|at| at > now) {
                place += 1;
            } else {
                let lane = self.delayed.swap_remove(place);
                self.make_ready(lane);
            }
        }
    }

    /// When the first pause is over.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        let lanes = self.delayed.iter().filter_map(|place| self.lanes[*place].as_ref());
        lanes.filter_map(Lane::waits_until).min()
    }

    /// Acts on an answer; returns the buffer's bytes that are free again.
    pub(super) fn answered(&mut self, place: usize, act: impl FnOnce(&mut Lane) -> usize) -> usize {
        let Some(lane) = self.lanes[place].as_mut() else { return 0 };
        let permits = act(lane);
        let done = lane.retired && lane.is_empty();
        if done {
            self.drop_lane(place);
        } else {
            self.make_ready(place);
        }
        permits
    }

    /// Topic id and partition of a lane.
    pub(super) fn target(&self, place: usize) -> Option<(Bytes, u32)> {
        self.lanes[place].as_ref().map(|lane| (lane.topic.id.clone(), lane.partition))
    }

    /// The topic is gone: its next record asks for it anew.
    pub(super) fn gone(&mut self, place: usize) {
        if let Some(lane) = &self.lanes[place] {
            let name = lane.topic.name.clone();
            self.forget(&name);
        }
    }

    fn forget(&mut self, name: &Arc<str>) {
        let Some(known) = self.topics.remove(name) else { return };
        for place in known.lanes.into_iter().flatten() {
            match self.lanes[place].as_mut() {
                Some(lane) if lane.is_empty() => self.drop_lane(place),
                Some(lane) => lane.retired = true,
                None => {}
            }
        }
    }

    fn drop_lane(&mut self, place: usize) {
        self.lanes[place] = None;
        self.ready.retain(|ready| *ready != place);
        self.delayed.retain(|delayed| *delayed != place);
        self.free.push(place);
    }

    /// Fails what is older than `timeout`; returns the buffer's bytes that are free again.
    pub(super) fn expire(&mut self, now: Instant, timeout: Duration) -> usize {
        let mut permits = 0;
        for place in 0..self.lanes.len() {
            if self.lanes[place].as_ref().is_some_and(|lane| !lane.is_empty()) {
                permits += self.answered(place, |lane| lane.expire(now, timeout));
            }
        }
        permits
    }

    pub(super) fn fail_all(&mut self, error: &Error) {
        for lane in self.lanes.iter_mut().flatten() {
            // The buffer ends with the producer.
            let _bytes = lane.fail_all(error);
        }
    }

    /// Who waits for what is here now.
    pub(super) fn completions(&self) -> Vec<Arc<Completion>> {
        self.lanes.iter().flatten().flat_map(Lane::completions).collect()
    }

    fn make_ready(&mut self, place: usize) {
        if let Some(lane) = self.lanes[place].as_mut()
            && !lane.queued
        {
            lane.queued = true;
            self.ready.push_back(place);
        }
    }
}
