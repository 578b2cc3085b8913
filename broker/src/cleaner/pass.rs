//! One cleaning of one partition: read what is new, then write anew what has changed, oldest first.
//!
//! ```text
//!   ├──────────── clean ────────────┼──────── dirty ────────┤ active ┤
//!                              cleaned_until        └─▶ 1. latest offset of each key
//!   └─ group ─┘└─ group ─┘└──────── group ────────┘     2. each group of neighbours into one segment
//! ```
//!
//! Each group is put into its place before the next one is begun. Oldest first is what makes that safe: when a tombstone is
//! marked to go some time, everything older of its key has gone already. A cleaning that ends early has done a part of the work,
//! and the next one begins with the same dirty part.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchError, BatchHeader};
use roaring::RoaringTreemap;

use super::judge::{Judge, Verdict};
use super::keys::KeyMap;
use super::pace::Pace;
use crate::broker::{Broker, BrokerError};
use crate::engine::cleaning::{CleanSegment, Cleaning, Goal, Replacement, SealedSegment};
use crate::engine::command::Command;
use crate::engine::effect::{Reply, SegmentName};
use crate::engine::error::EngineError;
use crate::engine::types::PartitionKey;
use crate::log::{ReadError, ReadView, Rewritten, SegmentRewriter, discard};

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;
/// Bytes that a record takes at least, as a guess for how many keys there can be.
const RECORD_BYTES: u64 = 16;

/// Why a cleaning ended early. What it had done until then stands.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("batch at offset {offset}: {cause}")]
    Batch { offset: u64, cause: BatchError },
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("the broker is stopping")]
    Stopping,
}

/// What a cleaning did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Bytes of segments that were written anew, before and after.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Records that are gone.
    pub dropped: u64,
    /// The log changed meanwhile, so that some of the work is left to the next cleaning.
    pub cut_short: bool,
}

/// Carries out a cleaning. Blocks. `key_bytes`: memory for keys.
///
/// # Errors
/// See [`CleanError`].
pub(super) fn run(
    broker: &Broker,
    cleaning: Cleaning,
    key_bytes: u64,
    pace: &mut Pace<'_>,
) -> Result<Cleaned, CleanError> {
    let mut pass = Pass::begin(broker, cleaning, key_bytes, pace)?;
    while let Some(command) = pass.next(pace)? {
        pass.answered(broker.call_blocking(command))?;
    }
    Ok(pass.done)
}

/// Neighbours that fit one segment together, up to the last that begins below `until`.
fn groups(cleaning: &Cleaning, until: u64) -> VecDeque<Vec<SealedSegment>> {
    let count = cleaning.segments.partition_point(|segment| segment.base_offset < until);
    let mut rest = &cleaning.segments[..count];
    let mut groups = VecDeque::new();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fitting = rest.iter().take_while(|segment| {
            bytes += segment.bytes;
            bytes <= cleaning.segment_bytes
        });
        let (group, later) = rest.split_at(fitting.count().max(1));
        groups.push_back(group.to_vec());
        rest = later;
    }
    groups
}

/// A cleaning, as far as it has come. Whoever carries it out asks the shard what [`Pass::next`] says and brings the answer
/// to [`Pass::answered`], in turns; dropped in between it leaves its files to the next start, for the shard may have been
/// told of them.
#[derive(Debug)]
pub(super) struct Pass {
    partition: PartitionKey,
    view: Arc<ReadView>,
    judge: Judge,
    groups: VecDeque<Vec<SealedSegment>>,
    next_generation: u32,
    /// The shard is asked to put these into their place.
    placing: Option<Placing>,
    /// Keys of a part of the log only had room.
    more: bool,
    /// What there is to say at the end has been said.
    said: bool,
    pub(super) goal: Goal,
    pub(super) done: Cleaned,
}

#[derive(Debug)]
struct Placing {
    output: Output,
    bytes_before: u64,
    bytes_after: u64,
    dropped: u64,
}

impl Pass {
    /// Reads what is dirty. Blocks.
    ///
    /// # Errors
    /// See [`CleanError`].
    pub(super) fn begin(
        broker: &Broker,
        cleaning: Cleaning,
        key_bytes: u64,
        pace: &mut Pace<'_>,
    ) -> Result<Self, CleanError> {
        let partition = cleaning.partition;
        let view = broker.view(partition).map_err(BrokerError::from)?;
        let (keys, mapped_until) = map_keys(&view, &cleaning, key_bytes, pace)?;
        Ok(Self {
            partition,
            groups: groups(&cleaning, mapped_until),
            next_generation: cleaning.generation,
            placing: None,
            more: cleaning.segments.last().is_some_and(|last| mapped_until < last.end),
            said: !matches!(cleaning.goal, Goal::Compact { .. }),
            goal: cleaning.goal,
            done: Cleaned::default(),
            judge: Judge::new(cleaning, keys, mapped_until),
            view,
        })
    }

    /// Works until the shard is needed: what it is to be asked, `None` when the cleaning is done. Blocks.
    ///
    /// # Errors
    /// See [`CleanError`].
    pub(super) fn next(&mut self, pace: &mut Pace<'_>) -> Result<Option<Command>, CleanError> {
        while let Some(group) = self.groups.pop_front() {
            if let Some(replacement) = self.rewrite(&group, pace)? {
                return Ok(Some(Command::ReplaceSegments(replacement)));
            }
        }
        if std::mem::replace(&mut self.said, true) {
            return Ok(None);
        }
        Ok(Some(Command::EndCleaning {
            partition: self.partition,
            cleaned_until: self.judge.cleaned_until(),
            tombstones_due_ms: self.judge.tombstones_due_ms(),
            more: self.more,
        }))
    }

    /// Takes in the shard's answer.
    ///
    /// # Errors
    /// See [`CleanError`].
    pub(super) fn answered(&mut self, answer: Result<Reply, BrokerError>) -> Result<(), CleanError> {
        let Some(mut placing) = self.placing.take() else { return Ok(answer.map(drop)?) };
        match answer {
            Ok(_) => {
                self.done.bytes_before += placing.bytes_before;
                self.done.bytes_after += placing.bytes_after;
                self.done.dropped += placing.dropped;
                return Ok(());
            }
            Err(BrokerError::Engine(EngineError::StaleCleaning(reason))) => {
                tracing::debug!(partition = %self.partition, reason, "a cleaning is cut short");
            }
            Err(BrokerError::Engine(EngineError::UnknownPartition(_))) => {}
            // It may have been carried out all the same.
            Err(error) => return Err(error.into()),
        }
        placing.output.kept = false;
        self.groups.clear();
        self.said = true;
        self.done.cut_short = true;
        Ok(())
    }

    /// Writes a group anew, if that changes anything.
    fn rewrite(
        &mut self,
        group: &[SealedSegment],
        pace: &mut Pace<'_>,
    ) -> Result<Option<Replacement>, CleanError> {
        let Some((first, last)) = group.first().zip(group.last()) else { return Ok(None) };
        let (from, until) = (first.base_offset, last.end);
        let (view, judge) = (&self.view, &mut self.judge);
        let mut changes = group.len() > 1;
        if !changes {
            each_batch(view, from, until, pace, |_, bytes| {
                changes = judge.judge(bytes).map_err(|cause| damaged(bytes, cause))?.changes();
                Ok(!changes)
            })?;
        }
        if !changes {
            return Ok(None);
        }
        let mut output = Output {
            view: Arc::clone(view),
            next_generation: self.next_generation,
            writing: None,
            finished: Vec::new(),
            waiting: None,
            kept: false,
        };
        let mut dropped = RoaringTreemap::new();
        each_batch(view, from, until, pace, |pace, bytes| {
            let verdict = judge.judge(bytes).map_err(|cause| damaged(bytes, cause))?;
            dropped.extend(verdict.dropped.iter().copied());
            if !verdict.kept.is_empty() {
                pace.spend(output.push(bytes.clone(), verdict)?)?;
            }
            Ok(true)
        })?;
        output.end(until)?;
        self.next_generation = output.next_generation;
        let added = output.finished.iter().map(clean_segment).collect();
        // From now on the shard may know of them.
        output.kept = true;
        self.placing = Some(Placing {
            bytes_before: group.iter().map(|segment| segment.bytes).sum(),
            bytes_after: output.finished.iter().map(|segment| segment.bytes).sum(),
            dropped: dropped.len(),
            output,
        });
        Ok(Some(Replacement {
            partition: self.partition,
            removed: group.iter().map(|segment| (segment.base_offset, segment.generation)).collect(),
            added,
            dropped,
        }))
    }
}

/// Notes the latest offset of each key in what is dirty, as far as there is room for keys; answers how far that is.
fn map_keys(
    view: &ReadView,
    cleaning: &Cleaning,
    key_bytes: u64,
    pace: &mut Pace<'_>,
) -> Result<(KeyMap, u64), CleanError> {
    let Some((first, last)) = cleaning.segments.first().zip(cleaning.segments.last()) else {
        return Ok((KeyMap::with_bytes(0), 0));
    };
    let Goal::Compact { cleaned_until, .. } = cleaning.goal else {
        return Ok((KeyMap::with_bytes(0), last.end));
    };
    let from = cleaned_until.max(first.base_offset).max(cleaning.log_start);
    let dirty = cleaning.segments.iter().filter(|segment| segment.end > from);
    let dirty: u64 = dirty.map(|segment| segment.bytes).sum();
    // A map that is too small for many small records ends this cleaning early, and the next one goes on.
    let most = dirty / RECORD_BYTES * 32 + 64 * 1024;
    let mut keys = KeyMap::with_bytes(key_bytes.min(most));
    let mut until = last.end;
    each_batch(view, from, last.end, pace, |_, bytes| {
        let offset_of = |cause| damaged(bytes, cause);
        let opened = batch::scan(bytes).map_err(offset_of)?;
        for record in &opened {
            let record = record.map_err(offset_of)?;
            let Some(key) = record.key.filter(|_| record.offset >= from) else { continue };
            let hash = keys.hash(key);
            if !keys.insert(hash, record.offset) {
                until = record.offset;
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    Ok((keys, until))
}

fn damaged(bytes: &Bytes, cause: BatchError) -> CleanError {
    let offset = BatchHeader::parse(bytes).map_or(0, |header| header.base_offset);
    CleanError::Batch { offset, cause }
}

/// Hands the batches that begin in `from..until`, or hold `from`, to `each`, for as long as it says so.
fn each_batch(
    view: &ReadView,
    from: u64,
    until: u64,
    pace: &mut Pace<'_>,
    mut each: impl FnMut(&mut Pace<'_>, &Bytes) -> Result<bool, CleanError>,
) -> Result<(), CleanError> {
    let mut offset = from;
    while offset < until {
        let batches = view.read_stored(offset, READ_BYTES)?;
        if batches.is_empty() {
            return Ok(());
        }
        for bytes in &batches {
            let header = BatchHeader::parse(bytes).map_err(|cause| damaged(bytes, cause))?;
            if header.base_offset >= until {
                return Ok(());
            }
            pace.spend(bytes.len() as u64)?;
            if !each(pace, bytes)? {
                return Ok(());
            }
            offset = header.last_offset() + 1;
        }
    }
    Ok(())
}

fn clean_segment(segment: &Rewritten) -> CleanSegment {
    CleanSegment {
        base_offset: segment.name.base_offset,
        generation: segment.name.generation,
        bytes: segment.bytes,
        max_timestamp: segment.max_timestamp,
    }
}

/// The segments that a group becomes: one, unless holes are too long for a batch to stand for them.
#[derive(Debug)]
struct Output {
    view: Arc<ReadView>,
    next_generation: u32,
    writing: Option<SegmentRewriter>,
    finished: Vec<Rewritten>,
    /// The last batch; how far it reaches is known when the next one comes.
    waiting: Option<(Bytes, Verdict)>,
    /// The files are wanted.
    kept: bool,
}

impl Output {
    /// Takes in a batch of which something is kept; answers the bytes that were written for the one before.
    fn push(&mut self, bytes: Bytes, verdict: Verdict) -> Result<u64, CleanError> {
        let next = verdict.header.base_offset;
        let written = self.settle(next)?;
        self.waiting = Some((bytes, verdict));
        Ok(written)
    }

    /// Writes the batch that waits: it ends before `next`, if it can.
    fn settle(&mut self, next: u64) -> Result<u64, CleanError> {
        let Some((bytes, verdict)) = self.waiting.take() else { return Ok(0) };
        let header = verdict.header;
        let reaches = next - header.base_offset <= i32::MAX as u64;
        let last = if reaches { next - 1 } else { header.last_offset() };
        let damaged = |cause| CleanError::Batch { offset: header.base_offset, cause };
        let clean = batch::compact(&bytes, &verdict.kept, last, verdict.horizon).map_err(damaged)?;
        let header = BatchHeader::parse(&clean).map_err(damaged)?;
        let length = clean.len() as u64;
        let mut writing = match self.writing.take() {
            Some(writing) => writing,
            None => self.begin(header.base_offset)?,
        };
        let appended = writing.append(&header, clean);
        self.writing = Some(writing);
        appended?;
        if !reaches {
            self.finish()?;
        }
        Ok(length)
    }

    fn begin(&mut self, base_offset: u64) -> Result<SegmentRewriter, CleanError> {
        let name =
            SegmentName { partition: self.view.partition(), base_offset, generation: self.next_generation };
        self.next_generation += 1;
        Ok(SegmentRewriter::create(&self.view, name)?)
    }

    fn finish(&mut self) -> Result<(), CleanError> {
        if let Some(writing) = self.writing.take() {
            let name = writing.name();
            let finished = writing.finish();
            if finished.is_err() {
                discard(&self.view, &[name]);
            }
            self.finished.push(finished?);
        }
        Ok(())
    }

    /// Ends the group at `until` (exclusive).
    fn end(&mut self, until: u64) -> Result<(), CleanError> {
        self.settle(until)?;
        self.finish()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.kept {
            let writing = self.writing.take().map(|writing| writing.name());
            let names: Vec<_> = self.finished.iter().map(|segment| segment.name).chain(writing).collect();
            discard(&self.view, &names);
        }
    }
}
