//! One partition's log as the engine knows it: offsets, segments, producers. The bytes are elsewhere.
//!
//! `log_start ≤ end`; `end` is the offset that the next record gets. Offsets are never minted twice: see [`Partition::ceiling`].

use std::collections::{BTreeMap, VecDeque};

use bytes::BytesMut;
use felucca_protocol::batch::{self, BatchHeader};

use super::effect::{SegmentName, SegmentWrite};
use super::error::EngineError;
use super::event::{PartitionRow, ProducerBatchRow, ProducerRow, SegmentRow};
use super::types::{Level, PartitionKey, RESUME_STEP};

/// Batches remembered per producer: as many as a producer may have in flight (Kafka's `max.in.flight.requests` with
/// idempotence).
const REMEMBERED_BATCHES: usize = 5;
/// Sequences wrap to 0 after it, as Kafka's do.
const MAX_SEQUENCE: u32 = i32::MAX as u32;
/// How far a ceiling is raised ahead of the end, and how near the end may come before it is raised again: the raise is
/// synced long before the end has passed the old ceiling, and nobody waits for it.
const CEILING_AHEAD: u64 = 16 << 20;
const CEILING_MARGIN: u64 = 8 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) base_offset: u64,
    pub(crate) generation: u32,
    pub(crate) bytes: u64,
    /// Times of the first and of the newest record, Unix ms, as retention counts them; 0 while there is none.
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
}

impl Segment {
    pub(crate) fn new(base_offset: u64, generation: u32) -> Self {
        Self { base_offset, generation, bytes: 0, first_ms: 0, last_ms: 0 }
    }

    pub(crate) fn to_row(self) -> SegmentRow {
        let Self { base_offset, generation, bytes, first_ms, last_ms } = self;
        SegmentRow { base_offset, generation, bytes, first_ms, last_ms }
    }

    pub(crate) fn from_row(row: &SegmentRow) -> Self {
        let SegmentRow { base_offset, generation, bytes, first_ms, last_ms } = *row;
        Self { base_offset, generation, bytes, first_ms, last_ms }
    }
}

#[derive(Clone, Copy, Debug)]
struct ProducerBatch {
    first_sequence: u32,
    last_sequence: u32,
    base_offset: u64,
}

#[derive(Debug)]
struct Producer {
    epoch: u16,
    batches: VecDeque<ProducerBatch>,
}

#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) key: PartitionKey,
    /// Raised when a power loss may have taken offsets that had been shown.
    pub(crate) epoch: i32,
    pub(crate) log_start: u64,
    pub(crate) end: u64,
    /// Every offset below it may have been shown before it was synced; 0 on a partition that shows synced records only.
    pub(crate) ceiling: u64,
    /// The ceiling that is on the device: derived. What lies below it may be shown before it is synced.
    pub(crate) covered: u64,
    /// Ascending and never empty; the last one is written to. Those that end below the log start are kept for share groups,
    /// and others may be missing between them.
    pub(crate) segments: Vec<Segment>,
    /// Of the next segment: names of files are never used again.
    pub(crate) next_generation: u32,
    /// No key has two records below it.
    pub(crate) cleaned_until: u64,
    /// When the next tombstone below it may go, Unix ms.
    pub(crate) tombstones_due_ms: Option<i64>,
    /// How far the last cleaning was to go, and when, Unix ms; derived, and not remembered over a restart.
    pub(crate) last_cleaning: Option<(u64, i64)>,
    producers: BTreeMap<u64, Producer>,
}

/// What a producer's batch is to a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sequence {
    Next,
    /// It had been appended before, at this offset.
    Duplicate(u64),
}

impl Partition {
    pub(crate) fn new(key: PartitionKey) -> Self {
        Self {
            key,
            epoch: 0,
            log_start: 0,
            end: 0,
            ceiling: 0,
            covered: 0,
            segments: vec![Segment::new(0, 0)],
            next_generation: 1,
            cleaned_until: 0,
            tombstones_due_ms: None,
            last_cleaning: None,
            producers: BTreeMap::new(),
        }
    }

    pub(crate) fn active(&self) -> Segment {
        // The list is never empty: `new` and `from_row` see to it, and the last one is never removed.
        self.segments.last().copied().unwrap_or(Segment::new(self.end, self.next_generation))
    }

    pub(crate) fn segment_name(&self, segment: &Segment) -> SegmentName {
        SegmentName { partition: self.key, base_offset: segment.base_offset, generation: segment.generation }
    }

    /// Whether a batch of an idempotent producer comes next, came before, or must be refused.
    pub(crate) fn check_sequence(&self, header: &BatchHeader) -> Result<Sequence, EngineError> {
        let Ok(producer_id) = u64::try_from(header.producer_id) else { return Ok(Sequence::Next) };
        let epoch = header.producer_epoch.cast_unsigned();
        let first = header.base_sequence.cast_unsigned();
        let Some(producer) = self.producers.get(&producer_id) else {
            return expect_sequence(producer_id, first, 0);
        };
        if epoch < producer.epoch {
            return Err(EngineError::ProducerFenced { producer_id, got: epoch, current: producer.epoch });
        }
        if epoch > producer.epoch {
            return expect_sequence(producer_id, first, 0);
        }
        let last = last_sequence(header);
        let seen =
            producer.batches.iter().find(|seen| seen.first_sequence == first && seen.last_sequence == last);
        if let Some(seen) = seen {
            return Ok(Sequence::Duplicate(seen.base_offset));
        }
        let expected = producer.batches.back().map_or(0, |batch| next_sequence(batch.last_sequence));
        expect_sequence(producer_id, first, expected)
    }

    /// Whether the active segment is too full for a batch of `length` bytes.
    pub(crate) fn is_full(&self, length: u64, segment_bytes: u64) -> bool {
        let active = self.active();
        active.bytes > 0 && active.bytes + length > segment_bytes
    }

    /// The segment that would begin at the end.
    pub(crate) fn following_segment(&self) -> Segment {
        Segment::new(self.end, self.next_generation)
    }

    /// The segments with the offset at which each ends (exclusive). A segment may end before that where others were removed
    /// behind it.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Segment, u64)> {
        let ends = self.segments.iter().skip(1).map(|next| next.base_offset).chain([self.end]);
        self.segments.iter().copied().zip(ends)
    }

    /// The segments that are kept below the log start, with their ends.
    pub(crate) fn detached(&self) -> impl Iterator<Item = (Segment, u64)> {
        let sealed = self.segments.len() - 1;
        self.ranges().take(sealed).take_while(|(_, end)| *end <= self.log_start)
    }

    /// The ceiling to raise to before more is shown unsynced, if it is time.
    pub(crate) fn next_ceiling(&self) -> Option<u64> {
        (self.end + CEILING_MARGIN > self.ceiling)
            .then_some((self.end + CEILING_AHEAD).next_multiple_of(RESUME_STEP))
    }

    /// The level before which offsets below `end` may not be shown: a power loss must not make room for others there.
    pub(crate) fn may_show(&self, end: u64) -> Level {
        if end <= self.covered { Level::Written } else { Level::Synced }
    }

    /// Writes offset and epoch into a batch that is about to be appended.
    pub(crate) fn assign(&self, bytes: &mut BytesMut) {
        batch::assign(bytes, self.end, self.epoch);
    }

    // ---- The fold ----

    /// Appends a batch whose offset is assigned; answers where its bytes go.
    pub(crate) fn append(
        &mut self,
        header: &BatchHeader,
        bytes: bytes::Bytes,
        wall_ms: i64,
        max_producers: u64,
    ) -> SegmentWrite {
        let last_offset = header.base_offset + u64::from(header.last_offset_delta);
        let length = u64::from(header.length);
        let mut position = 0;
        if let Some(active) = self.segments.last_mut() {
            position = active.bytes;
            active.bytes += length;
            let possible = (0..=wall_ms).contains(&header.max_timestamp);
            let time = if possible { header.max_timestamp } else { wall_ms };
            if position == 0 {
                active.first_ms = time;
            }
            active.last_ms = active.last_ms.max(time);
        }
        self.end = last_offset + 1;
        self.remember(header, max_producers);
        SegmentWrite {
            segment: self.segment_name(&self.active()),
            position,
            base_offset: header.base_offset,
            last_offset,
            max_timestamp: header.max_timestamp,
            length,
            stored: (bytes.len() as u64) < length,
            bytes,
        }
    }

    fn remember(&mut self, header: &BatchHeader, max_producers: u64) {
        let Ok(producer_id) = u64::try_from(header.producer_id) else { return };
        let epoch = header.producer_epoch.cast_unsigned();
        if !self.producers.contains_key(&producer_id) && self.producers.len() as u64 >= max_producers {
            let last_append =
                |producer: &Producer| producer.batches.back().map_or(0, |batch| batch.base_offset);
            let silent =
                self.producers.iter().min_by_key(|(_, producer)| last_append(producer)).map(|(id, _)| *id);
            if let Some(silent) = silent {
                self.producers.remove(&silent);
            }
        }
        let producer =
            self.producers.entry(producer_id).or_insert_with(|| Producer { epoch, batches: VecDeque::new() });
        if producer.epoch != epoch {
            producer.epoch = epoch;
            producer.batches.clear();
        }
        if producer.batches.len() == REMEMBERED_BATCHES {
            producer.batches.pop_front();
        }
        producer.batches.push_back(ProducerBatch {
            first_sequence: header.base_sequence.cast_unsigned(),
            last_sequence: last_sequence(header),
            base_offset: header.base_offset,
        });
    }

    pub(crate) fn add_segment(&mut self, segment: Segment) {
        self.next_generation = self.next_generation.max(segment.generation + 1);
        self.segments.push(segment);
    }

    /// Removes a segment, unless it is the one that is written to; false when there is no such one.
    pub(crate) fn remove_segment(&mut self, base_offset: u64, generation: u32) -> bool {
        let sealed = self.segments.len() - 1;
        let found = self.segments[..sealed]
            .iter()
            .position(|segment| (segment.base_offset, segment.generation) == (base_offset, generation));
        found.map(|at| self.segments.remove(at)).is_some()
    }

    /// Puts segments into the place of neighbouring ones; false, and nothing is changed, when those are not all there, or
    /// the others do not fit into their place.
    pub(crate) fn replace_segments(&mut self, removed: &[(u64, u32)], added: &[Segment]) -> bool {
        let sealed = self.segments.len() - 1;
        let is_first =
            |segment: &Segment| Some(&(segment.base_offset, segment.generation)) == removed.first();
        let Some(first) = self.segments[..sealed].iter().position(is_first) else { return false };
        let until = first + removed.len();
        let all = until <= sealed
            && self.segments[first..until]
                .iter()
                .map(|segment| (segment.base_offset, segment.generation))
                .eq(removed.iter().copied());
        let place = self.segments[first].base_offset..self.segments[until.min(sealed)].base_offset;
        let fit =
            added.iter().all(|new| place.contains(&new.base_offset) && new.generation < self.next_generation)
                && added.is_sorted_by(|one, next| one.base_offset < next.base_offset);
        if all && fit {
            self.segments.splice(first..until, added.iter().copied());
        }
        all && fit
    }

    pub(crate) fn start_epoch(&mut self, epoch: i32, start_offset: u64) {
        self.epoch = epoch;
        self.end = start_offset;
    }

    // ---- Checkpoint rows ----

    pub(crate) fn to_row(&self) -> PartitionRow {
        PartitionRow {
            topic_id: self.key.topic.0.to_vec(),
            partition: self.key.partition,
            epoch: self.epoch,
            log_start: self.log_start,
            end: self.end,
            ceiling: self.ceiling,
            segments: self.segments.iter().copied().map(Segment::to_row).collect(),
            next_generation: self.next_generation,
            cleaned_until: self.cleaned_until,
            tombstones_due_ms: self.tombstones_due_ms,
            producers: self.producers.iter().map(|(id, producer)| producer.to_row(*id)).collect(),
        }
    }

    pub(crate) fn from_row(key: PartitionKey, row: &PartitionRow) -> Result<Self, String> {
        if row.segments.is_empty() {
            return Err(format!("partition {key} has no segment"));
        }
        let mut partition = Self::new(key);
        partition.epoch = row.epoch;
        partition.log_start = row.log_start;
        partition.end = row.end;
        partition.ceiling = row.ceiling;
        partition.segments = row.segments.iter().map(Segment::from_row).collect();
        partition.next_generation = row.next_generation;
        (partition.cleaned_until, partition.tombstones_due_ms) = (row.cleaned_until, row.tombstones_due_ms);
        for row in &row.producers {
            let epoch = u16::try_from(row.epoch)
                .map_err(|_| format!("producer epoch {} in partition {key}", row.epoch))?;
            let batches = row.batches.iter().map(|batch| ProducerBatch {
                first_sequence: batch.first_sequence,
                last_sequence: batch.last_sequence,
                base_offset: batch.base_offset,
            });
            partition.producers.insert(row.producer_id, Producer { epoch, batches: batches.collect() });
        }
        Ok(partition)
    }
}

impl Producer {
    fn to_row(&self, producer_id: u64) -> ProducerRow {
        ProducerRow {
            producer_id,
            epoch: u32::from(self.epoch),
            batches: self
                .batches
                .iter()
                .map(|batch| ProducerBatchRow {
                    first_sequence: batch.first_sequence,
                    last_sequence: batch.last_sequence,
                    base_offset: batch.base_offset,
                })
                .collect(),
        }
    }
}

fn expect_sequence(producer_id: u64, got: u32, expected: u32) -> Result<Sequence, EngineError> {
    if got == expected {
        return Ok(Sequence::Next);
    }
    Err(EngineError::OutOfOrderSequence { producer_id, got, expected })
}

fn next_sequence(sequence: u32) -> u32 {
    if sequence >= MAX_SEQUENCE { 0 } else { sequence + 1 }
}

/// Sequence of the batch's last record, wrapped as Kafka does.
fn last_sequence(header: &BatchHeader) -> u32 {
    let last = u64::from(header.base_sequence.cast_unsigned()) + u64::from(header.last_offset_delta);
    (last % (u64::from(MAX_SEQUENCE) + 1)) as u32
}
