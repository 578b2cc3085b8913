//! What the cleaner may do to the log: compaction by key, and copying aside what share groups pin.
//!
//! The cleaner works beside the shard ([`crate::cleaner`]). It asks for work, reads sealed segments, writes new ones, and says so
//! when they are on the device; only then does one event put them into the place of the old. So a crash leaves either the one or
//! the other, and files that nobody knows, which the next start removes. Offsets are preserved: what is dropped leaves holes.
//!
//! Invariants: what a share group has in hand is never dropped (a replacement that would is refused); names of files are
//! reserved, by an event that is on the device, before any of them is written; work is decided on records that are on the
//! device only, so that a newer value that outlives a power loss has superseded what was dropped for it.

use roaring::RoaringTreemap;

use super::Engine;
use super::effect::{Effects, Reply};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::partition::{Partition, Segment};
use super::types::{Lsn, Now, PartitionKey};
use crate::plants::planted;

/// How long a partition is left alone when there was nothing new since its last cleaning.
const PATIENCE_MS: i64 = 600_000;
/// Offsets that one batch can stand for: a longer hole needs a segment of its own behind it.
const MOST_OFFSETS: u64 = 1 << 31;

/// Work for the cleaner, on one partition.
#[derive(Clone, Debug, PartialEq)]
pub struct Cleaning {
    pub partition: PartitionKey,
    /// Records below it are for share groups only.
    pub log_start: u64,
    /// Neighbouring sealed segments, all of them to be looked at.
    pub segments: Vec<SealedSegment>,
    /// Generations from it on are the cleaner's, as many as it can need.
    pub generation: u32,
    /// Offsets in those segments that share groups have in hand.
    pub in_hand: RoaringTreemap,
    /// Most bytes of a segment, unless one was larger before.
    pub segment_bytes: u64,
    pub now_ms: i64,
    pub goal: Goal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Only what share groups have in hand is kept.
    Survivors,
    /// Only the latest record of each key is kept. No key has two records below `cleaned_until`.
    Compact { cleaned_until: u64, delete_retention_ms: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedSegment {
    pub base_offset: u64,
    /// Exclusive.
    pub end: u64,
    pub generation: u32,
    pub bytes: u64,
}

/// New segments in the place of old ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Replacement {
    pub partition: PartitionKey,
    /// Base offsets and generations, ascending.
    pub removed: Vec<(u64, u32)>,
    pub added: Vec<CleanSegment>,
    /// The offsets of records that the old ones have and the new ones have not.
    pub dropped: RoaringTreemap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CleanSegment {
    pub base_offset: u64,
    pub generation: u32,
    pub bytes: u64,
    /// Greatest timestamp of its records, Unix ms.
    pub max_timestamp: i64,
}

impl Engine {
    /// Notes whether the cleaner should come to a partition.
    pub(super) fn note_cleanable(&mut self, now: Now, key: PartitionKey) {
        match self.urgency(now.wall_ms, &key) {
            Some(urgency) => self.cleanable.insert(key, urgency),
            None => self.cleanable.remove(&key),
        };
    }

    /// How much a partition is in need of cleaning; `None`: not at all.
    fn urgency(&self, wall_ms: i64, key: &PartitionKey) -> Option<f64> {
        let config = &self.catalog.get(&key.topic)?.config;
        let log = self.partitions.get(key)?;
        let is_new = |until: u64| {
            log.last_cleaning.is_none_or(|(last, at_ms)| until > last || wall_ms - at_ms > PATIENCE_MS)
        };
        if let Some((_, end)) = pinned(log, self.settings.max_pinned_bytes).last()
            && is_new(*end)
        {
            // Before everything else: nobody can read those bytes but to try again.
            return Some(2.0);
        }
        if !config.compact {
            return None;
        }
        let clean = self.cleanable_segments(wall_ms, key);
        let (_, until) = *clean.last()?;
        let dirty: Vec<_> = clean.iter().filter(|(_, end)| *end > log.cleaned_until).collect();
        let bytes_of =
            |segments: &mut dyn Iterator<Item = &Segment>| segments.map(|s| s.bytes).sum::<u64>() as f64;
        let all = bytes_of(&mut clean.iter().map(|(segment, _)| segment));
        let ratio = bytes_of(&mut dirty.iter().map(|(segment, _)| segment)) / all.max(1.0);
        let is_old = config.max_compaction_lag_ms.is_some_and(|limit| {
            dirty.first().is_some_and(|(segment, _)| age_ms(wall_ms, segment.first_ms) > limit)
        });
        let has_due = log.tombstones_due_ms.is_some_and(|due_ms| due_ms <= wall_ms);
        let wanted = !dirty.is_empty() && (ratio >= config.min_dirty_ratio || is_old) || has_due;
        (wanted && (is_new(until) || has_due)).then_some(ratio)
    }

    /// The segments that may be compacted, with their ends: sealed, seen by all, and left alone for long enough.
    fn cleanable_segments(&self, wall_ms: i64, key: &PartitionKey) -> Vec<(Segment, u64)> {
        let (Some(topic), Some(log)) = (self.catalog.get(&key.topic), self.partitions.get(key)) else {
            return Vec::new();
        };
        let visible = self.high_watermark(key);
        let lag_ms = topic.config.min_compaction_lag_ms;
        let sealed = log.segments.len() - 1;
        let kept = log.detached().count();
        let is_free = |segment: &Segment, end: u64| {
            end <= log.cleaned_until || lag_ms == 0 || age_ms(wall_ms, segment.last_ms) > lag_ms
        };
        log.ranges()
            .take(sealed)
            .skip(kept)
            .take_while(|(segment, end)| *end <= visible && is_free(segment, *end))
            .collect()
    }

    /// The work that is most urgent.
    pub(super) fn next_cleaning(&mut self, now: Now, out: &mut Effects) -> Reply {
        while let Some(key) = self.most_urgent() {
            self.cleanable.remove(&key);
            // Much may have happened since it was noted.
            if self.urgency(now.wall_ms, &key).is_some()
                && let Some(cleaning) = self.begin_cleaning(now, key, out)
            {
                return Reply::Cleaning(Some(cleaning));
            }
        }
        Reply::Cleaning(None)
    }

    fn most_urgent(&self) -> Option<PartitionKey> {
        let most = self.cleanable.iter().max_by(|(_, one), (_, other)| one.total_cmp(other));
        most.map(|(key, _)| *key)
    }

    fn begin_cleaning(&mut self, now: Now, key: PartitionKey, out: &mut Effects) -> Option<Cleaning> {
        let config = &self.catalog.get(&key.topic)?.config;
        let log = self.partitions.get(&key)?;
        let survivors = pinned(log, self.settings.max_pinned_bytes);
        let (goal, segments) = if survivors.is_empty() {
            let delete_retention_ms = config.delete_retention_ms;
            let goal = Goal::Compact { cleaned_until: log.cleaned_until, delete_retention_ms };
            (goal, self.cleanable_segments(now.wall_ms, &key))
        } else {
            (Goal::Survivors, survivors)
        };
        let (from, until) = (segments.first()?.0.base_offset, segments.last()?.1);
        let segment_bytes = config.segment_bytes;
        let needed = segments.len() as u64 + (until - from) / MOST_OFFSETS + 1;
        let (log_start, generation) = (log.log_start, log.next_generation);
        let next_generation = generation.checked_add(u32::try_from(needed).ok()?)?;
        let (topic_id, partition) = (key.topic.0.to_vec(), key.partition);
        let reserved = event::GenerationsReserved { topic_id, partition, next_generation };
        self.stage_event(Kind::GenerationsReserved(reserved), out);
        self.partitions.get_mut(&key)?.last_cleaning = Some((until, now.wall_ms));
        let mut in_hand = RoaringTreemap::new();
        for name in self.share_groups_on(&key) {
            if let Some(group) = self.groups.get(&name).and_then(|group| group.partition(&key)) {
                in_hand.extend(group.state.in_hand(from, until).filter(|_| !planted("clean-in-hand")));
            }
        }
        let sealed = segments.into_iter().map(|(segment, end)| SealedSegment {
            base_offset: segment.base_offset,
            end,
            generation: segment.generation,
            bytes: segment.bytes,
        });
        Some(Cleaning {
            partition: key,
            log_start,
            segments: sealed.collect(),
            generation,
            in_hand,
            segment_bytes,
            now_ms: now.wall_ms,
            goal,
        })
    }

    pub(super) fn replace_segments(
        &mut self,
        now: Now,
        lsn: Lsn,
        replacement: &Replacement,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let Replacement { partition: key, removed, added, dropped } = replacement;
        let log = self.partitions.get_mut(key).ok_or(EngineError::UnknownPartition(*key))?;
        let added: Vec<Segment> = added
            .iter()
            .map(|segment| {
                let possible = (0..=now.wall_ms).contains(&segment.max_timestamp);
                let time_ms = if possible { segment.max_timestamp } else { now.wall_ms };
                Segment {
                    base_offset: segment.base_offset,
                    generation: segment.generation,
                    bytes: segment.bytes,
                    first_ms: time_ms,
                    last_ms: time_ms,
                }
            })
            .collect();
        let before = log.segments.clone();
        let fits = log.replace_segments(removed, &added);
        log.segments = before;
        if !fits {
            return Err(EngineError::StaleCleaning("the segments are not there any more"));
        }
        let groups = self.share_groups_on(key);
        let states = || groups.iter().filter_map(|name| self.groups.get(name)?.partition(key));
        let (from, until) = (dropped.min().unwrap_or(0), dropped.max().map_or(0, |last| last + 1));
        if states()
            .any(|partition| partition.state.in_hand(from, until).any(|offset| dropped.contains(offset)))
            && !planted("clean-in-hand")
        {
            // The group will be done with it, or the next cleaning knows of it.
            if let Some(log) = self.partitions.get_mut(key) {
                log.last_cleaning = None;
            }
            return Err(EngineError::StaleCleaning("a share group has one of the records in hand"));
        }
        let replaced = event::SegmentsReplaced {
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
            removed: removed
                .iter()
                .map(|&(base_offset, generation)| event::SegmentRef { base_offset, generation })
                .collect(),
            added: added.iter().copied().map(Segment::to_row).collect(),
        };
        self.stage_event(Kind::SegmentsReplaced(replaced), out);
        for name in groups {
            if let Some(group) = self.groups.get_mut(&name) {
                group.compacted(&mut self.desk.stage(now, lsn, out), *key, dropped);
            }
        }
        Ok(Reply::Done)
    }

    pub(super) fn end_cleaning(
        &mut self,
        key: PartitionKey,
        cleaned_until: u64,
        tombstones_due_ms: Option<i64>,
        more: bool,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let log = self.partitions.get_mut(&key).ok_or(EngineError::UnknownPartition(key))?;
        if more {
            log.last_cleaning = None;
        }
        if cleaned_until > log.end {
            return Err(EngineError::OffsetOutOfRange {
                partition: key,
                offset: cleaned_until,
                end: log.end,
            });
        }
        let (topic_id, partition) = (key.topic.0.to_vec(), key.partition);
        let cleaned = event::Cleaned { topic_id, partition, cleaned_until, tombstones_due_ms };
        self.stage_event(Kind::Cleaned(cleaned), out);
        Ok(Reply::Done)
    }
}

fn age_ms(wall_ms: i64, time_ms: i64) -> u64 {
    u64::try_from(wall_ms.saturating_sub(time_ms)).unwrap_or(0)
}

/// The segments that are kept for share groups only, when they are more bytes than allowed.
fn pinned(log: &Partition, limit: u64) -> Vec<(Segment, u64)> {
    let bytes: u64 = log.detached().map(|(segment, _)| segment.bytes).sum();
    if bytes > limit { log.detached().collect() } else { Vec::new() }
}
