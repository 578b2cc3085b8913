//! The end of records: what is deleted by age, by size and by command, and what is kept of it for share groups.
//!
//! Deleting means raising the log start, for every reader at once. Then every segment that ends at or below it goes, unless a
//! share group has a record of it in hand: leased, scheduled, held or about to be dead-lettered. Such a segment is *detached*: it
//! stays in the list, and only share groups read it. What was never handed out expires.
//!
//! Retention looks at whole segments, so that it costs nothing per record, and at the times of records, not of files. A look at
//! all partitions is taken in pieces, and nothing of it is remembered over a restart: what it decides are events.

use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use super::Engine;
use super::effect::{Effects, Reply};
use super::error::EngineError;
use super::event::{self, event::Kind};
use super::partition::Partition;
use super::stage::TimerKey;
use super::types::{Lsn, Now, PartitionKey};
use crate::plants::planted;

/// Partitions that are looked at in one piece, and the pause before the next.
const PIECE: usize = 2_000;
const PAUSE_MS: u64 = 10;
/// A segment is at most that part of the time for which its records are kept: so a record is kept for little longer than
/// asked for, however slowly its partition fills.
const SEGMENTS_PER_RETENTION: u64 = 8;

impl Engine {
    /// Deletes the records of a partition below `before`.
    pub(super) fn delete_records(
        &mut self,
        now: Now,
        lsn: Lsn,
        topic: &str,
        partition: u32,
        before: u64,
        out: &mut Effects,
    ) -> Result<Reply, EngineError> {
        let key = PartitionKey { topic: self.catalog.require(topic)?.id, partition };
        let Some(log) = self.partitions.get(&key) else { return Err(EngineError::UnknownPartition(key)) };
        let visible = self.high_watermark(&key);
        if before > visible {
            return Err(EngineError::OffsetOutOfRange { partition: key, offset: before, end: visible });
        }
        let log_start = log.log_start.max(before);
        self.raise_log_start(now, lsn, key, log_start, out);
        Ok(Reply::RecordsDeleted { log_start })
    }

    pub(super) fn high_watermark(&self, key: &PartitionKey) -> u64 {
        self.desk.high_watermarks.get(key).copied().unwrap_or(0)
    }

    /// Sets the timer for the next look; `cursor`: where it goes on.
    pub(super) fn look_at_retention_in(&mut self, now: Now, cursor: Option<PartitionKey>) {
        let interval = u64::try_from(self.settings.retention_interval.as_millis()).unwrap_or(u64::MAX / 2);
        let pause = if cursor.is_some() { PAUSE_MS } else { interval };
        self.retention_cursor = cursor;
        self.desk.timers.insert((now.monotonic_ms + pause, TimerKey::Retention));
    }

    /// Looks at some partitions, and sets the timer for the next ones.
    pub(super) fn look_at_retention(&mut self, now: Now, lsn: Lsn, out: &mut Effects) {
        let from = self.retention_cursor.map_or(Unbounded, Excluded);
        let keys: Vec<PartitionKey> =
            self.partitions.range((from, Unbounded)).take(PIECE).map(|(key, _)| *key).collect();
        for key in &keys {
            self.apply_retention(now, lsn, *key, out);
            self.note_cleanable(now, *key);
        }
        let cursor = keys.last().copied().filter(|_| keys.len() == PIECE);
        self.look_at_retention_in(now, cursor);
    }

    fn apply_retention(&mut self, now: Now, lsn: Lsn, key: PartitionKey, out: &mut Effects) {
        let Some(config) = self.catalog.get(&key.topic).map(|topic| &topic.config) else { return };
        let Some(log) = self.partitions.get(&key) else { return };
        let retention_ms = config.retention_ms.filter(|_| config.delete);
        let retention_bytes = config.retention_bytes.filter(|_| config.delete);
        let active = log.active();
        let age_ms = |time_ms: i64| u64::try_from(now.wall_ms.saturating_sub(time_ms)).unwrap_or(0);
        let for_retention = retention_ms.map(|limit| limit / SEGMENTS_PER_RETENTION);
        let for_compaction = config.max_compaction_lag_ms.unwrap_or(u64::MAX).min(config.segment_ms);
        let for_compaction = config.compact.then_some(for_compaction);
        let oldest = for_retention.into_iter().chain(for_compaction).min();
        if oldest.is_some_and(|limit| active.bytes > 0 && age_ms(active.first_ms) > limit) {
            self.begin_segment(key, out);
        }
        let Some(log) = self.partitions.get(&key) else { return };
        let visible = self.high_watermark(&key);
        let mut kept: u64 = live(log).map(|(segment, _)| segment.bytes).sum();
        let mut log_start = log.log_start;
        for (segment, end) in live(log) {
            let too_old = retention_ms.is_some_and(|limit| age_ms(segment.last_ms) > limit);
            let too_much = retention_bytes.is_some_and(|limit| kept - segment.bytes >= limit);
            if segment == log.active() || end > visible || !(too_old || too_much) {
                break;
            }
            kept -= segment.bytes;
            log_start = end;
        }
        self.raise_log_start(now, lsn, key, log_start, out);
    }

    /// Goes on in a new segment.
    pub(super) fn begin_segment(&mut self, key: PartitionKey, out: &mut Effects) {
        let Some(log) = self.partitions.get(&key) else { return };
        let segment = log.following_segment();
        let added = event::SegmentAdded {
            topic_id: key.topic.0.to_vec(),
            partition: key.partition,
            base_offset: segment.base_offset,
            generation: segment.generation,
        };
        self.stage_event(Kind::SegmentAdded(added), out);
    }

    /// Lets the log of a partition start at `log_start`, and removes the segments that nobody needs any more.
    fn raise_log_start(&mut self, now: Now, lsn: Lsn, key: PartitionKey, log_start: u64, out: &mut Effects) {
        let Some(log) = self.partitions.get(&key) else { return };
        if log_start > log.log_start {
            let (topic_id, partition) = (key.topic.0.to_vec(), key.partition);
            let raised = event::LogStartRaised { topic_id, partition, log_start };
            self.stage_event(Kind::LogStartRaised(raised), out);
            if planted("forget-deletions") {
                out.events.pop();
            }
            for name in self.share_groups_on(&key) {
                if let Some(group) = self.groups.get_mut(&name) {
                    group.expire(&mut self.desk.stage(now, lsn, out), key, log_start);
                }
            }
        }
        self.remove_segments(key, out);
    }

    pub(super) fn share_groups_on(&self, key: &PartitionKey) -> Vec<Arc<str>> {
        self.catalog
            .get(&key.topic)
            .map_or_else(Vec::new, |topic| topic.share_groups.iter().cloned().collect())
    }

    fn remove_segments(&mut self, key: PartitionKey, out: &mut Effects) {
        let Some(log) = self.partitions.get(&key) else { return };
        if log.active().bytes > 0 && log.log_start >= log.end {
            // Nothing of it is to be read any more, and what is written to is never removed.
            self.begin_segment(key, out);
        }
        let Some(log) = self.partitions.get(&key) else { return };
        if log.detached().next().is_none() {
            return;
        }
        let groups = self.share_groups_on(&key);
        let states: Vec<_> = groups
            .iter()
            .filter_map(|name| self.groups.get(name)?.partition(&key))
            .map(|partition| &partition.state)
            .collect();
        let is_needed = |from: u64, until: u64| states.iter().any(|state| state.has_in_hand(from, until));
        let unneeded = log.detached().filter(|(segment, end)| !is_needed(segment.base_offset, *end));
        let segments: Vec<event::SegmentRef> = unneeded
            .map(|(segment, _)| event::SegmentRef {
                base_offset: segment.base_offset,
                generation: segment.generation,
            })
            .collect();
        if !segments.is_empty() {
            let (topic_id, partition) = (key.topic.0.to_vec(), key.partition);
            let removed = event::SegmentsRemoved { topic_id, partition, segments };
            self.stage_event(Kind::SegmentsRemoved(removed), out);
        }
    }
}

/// The segments that hold something at or above the log start, with their ends.
fn live(log: &Partition) -> impl Iterator<Item = (super::partition::Segment, u64)> {
    let detached = log.detached().count();
    log.ranges().skip(detached)
}

#[cfg(test)]
mod tests {
    use felucca_protocol::batch::{BatchBuilder, BatchHeader};

    use super::*;
    use crate::engine::PartitionInfo;
    use crate::engine::command::{AppendEntry, Command, Outcome, StagedBatch};
    use crate::engine::effect::TopicKind;
    use crate::engine::testing::{Bench, P0, leased, nack, pairs, reject};
    use crate::engine::types::Level;

    const HOUR_MS: u64 = 3_600_000;

    fn log(bench: &Bench) -> PartitionInfo {
        bench.engine.partitions().find(|info| info.partition == P0).unwrap()
    }

    /// Appends one record of about `bytes` with a time.
    fn append(bench: &mut Bench, time_ms: i64, bytes: usize) -> u64 {
        let mut builder = BatchBuilder::new();
        builder.push(time_ms, Some(b"key"), Some(&vec![7; bytes]), &[]).unwrap();
        let bytes = builder.finish();
        let batch = StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes };
        bench.append_entry(AppendEntry { partition: P0, batch }, Level::Synced).unwrap().base_offset
    }

    fn delete(bench: &mut Bench, before: u64) -> Reply {
        bench.ask(Command::DeleteRecords { topic: "orders".to_owned(), partition: 0, before })
    }

    fn look(bench: &mut Bench) {
        bench.advance(10_001);
    }

    #[test]
    fn records_go_when_their_time_is_over_and_their_offsets_never_come_again() {
        let mut bench = Bench::new();
        bench.topic(&[("segment.bytes", "64KiB"), ("retention.ms", "1h")]);
        for _ in 0..6 {
            let now = bench.now.wall_ms;
            append(&mut bench, now, 40_000);
            bench.advance(HOUR_MS / 6);
        }
        // The first is an hour old, not older.
        assert_eq!(log(&bench).log_start, 0);
        look(&mut bench);
        let info = log(&bench);
        assert_eq!((info.log_start, info.end), (1, 6));
        assert_eq!(info.segments[0].0.base_offset, 1);
        bench.reopen();
        assert_eq!(log(&bench).segments, info.segments);
        bench.advance(2 * HOUR_MS);
        look(&mut bench);
        let info = log(&bench);
        assert_eq!((info.log_start, info.end, info.segments.len()), (6, 6, 1));
        bench.reopen();
        assert_eq!(log(&bench).segments, info.segments);
        let now = bench.now.wall_ms;
        assert_eq!(append(&mut bench, now, 10), 6);
    }

    #[test]
    fn a_slow_partition_keeps_records_little_longer_than_asked_for() {
        let mut bench = Bench::new();
        bench.topic(&[("retention.ms", "8h")]);
        for _ in 0..24 {
            let now = bench.now.wall_ms;
            append(&mut bench, now, 10);
            bench.advance(HOUR_MS);
        }
        look(&mut bench);
        let kept = log(&bench).end - log(&bench).log_start;
        assert!((8..=10).contains(&kept), "{kept} hours are kept");
    }

    #[test]
    fn times_that_are_not_possible_count_as_now() {
        let mut bench = Bench::new();
        bench.topic(&[("retention.ms", "1h")]);
        for time_ms in [i64::MAX, -1] {
            append(&mut bench, time_ms, 10);
            bench.advance(HOUR_MS / 2);
        }
        assert_eq!(log(&bench).log_start, 0);
        bench.advance(2 * HOUR_MS);
        assert_eq!(log(&bench).log_start, 2);
    }

    #[test]
    fn the_newest_records_stay_up_to_a_size() {
        let mut bench = Bench::new();
        bench.topic(&[("segment.bytes", "64KiB"), ("retention.bytes", "100KiB")]);
        for _ in 0..10 {
            append(&mut bench, 0, 40_000);
        }
        look(&mut bench);
        let info = log(&bench);
        assert_eq!(info.log_start, 7);
        assert_eq!(info.segments.len(), 3);
    }

    #[test]
    fn dead_letters_stay_for_two_weeks() {
        let (mut bench, lease) = leased(&[]);
        bench.settle("a", lease, reject());
        let letters = |bench: &mut Bench| {
            let Reply::Metadata { topics, .. } = bench.ask(Command::Metadata { names: Vec::new() }) else {
                panic!()
            };
            let topic =
                topics.iter().find(|topic| matches!(topic.kind, TopicKind::DeadLetter { .. })).unwrap();
            let key = PartitionKey { topic: topic.id, partition: 0 };
            let info = bench.engine.partitions().find(|info| info.partition == key).unwrap();
            info.end - info.log_start
        };
        bench.advance(13 * 24 * HOUR_MS);
        look(&mut bench);
        assert_eq!(letters(&mut bench), 1);
        bench.advance(4 * 24 * HOUR_MS);
        look(&mut bench);
        assert_eq!(letters(&mut bench), 0);
    }

    #[test]
    fn records_are_deleted_up_to_the_high_watermark_and_no_further() {
        let mut bench = Bench::new();
        bench.topic(&[]);
        bench.append(None, 10).unwrap();
        assert_eq!(delete(&mut bench, 4), Reply::RecordsDeleted { log_start: 4 });
        assert_eq!(delete(&mut bench, 2), Reply::RecordsDeleted { log_start: 4 });
        let refused = EngineError::OffsetOutOfRange { partition: P0, offset: 11, end: 10 };
        assert_eq!(delete(&mut bench, 11), Reply::Error(refused));
        bench.hold_sync = true;
        bench.append(None, 1).unwrap();
        assert!(matches!(delete(&mut bench, 11), Reply::Error(_)), "it is not visible yet");
        bench.hold_sync = false;
        bench.reopen();
        assert_eq!(delete(&mut bench, 11), Reply::RecordsDeleted { log_start: 11 });
        assert_eq!(bench.append(None, 1).unwrap().base_offset, 11);
    }

    #[test]
    fn what_a_share_group_has_in_hand_outlives_its_log_and_the_rest_expires() {
        for ordered in ["none", "key"] {
            let mut bench = Bench::new();
            bench.topic(&[("segment.bytes", "64KiB")]);
            bench.group(&[("ordering", ordered), ("lease", "1h")]);
            for _ in 0..4 {
                append(&mut bench, 0, 40_000);
            }
            bench.subscribe(1, "a", 1);
            let lease = bench.take_one();
            assert_eq!(lease.offset, 0);
            assert_eq!(delete(&mut bench, 3), Reply::RecordsDeleted { log_start: 3 });
            let counts = bench.counts();
            assert_eq!((counts.expired, counts.leased, counts.lag), (2, 1, 2), "{ordered}");
            assert!(counts.pinned_bytes > 40_000 && counts.pinned_bytes < 50_000);
            let bases = |bench: &Bench| -> Vec<u64> {
                log(bench).segments.iter().map(|(name, _)| name.base_offset).collect()
            };
            assert_eq!(bases(&bench), [0, 3], "{ordered}");
            bench.reopen();
            bench.subscribe_holding(2, "a", 2, vec![lease]);
            if ordered == "key" {
                assert!(bench.offsets().is_empty(), "its key is taken");
            } else {
                assert_eq!(bench.offsets(), [3]);
            }
            // Tried again, from what is kept.
            bench.settle("a", lease, nack());
            bench.advance(1_000);
            let again = bench.take_one();
            assert_eq!(again.offset, 0);
            bench.settle("a", again, Outcome::Ack);
            look(&mut bench);
            assert_eq!(bases(&bench), [3], "{ordered}");
            let counts = bench.counts();
            assert_eq!((counts.expired, counts.acked, counts.pinned_bytes), (2, 1, 0));
        }
    }

    #[test]
    fn what_was_read_ahead_is_not_handed_out_once_it_is_deleted() {
        for ordered in ["none", "key"] {
            let mut bench = Bench::new();
            bench.topic(&[]);
            bench.group(&[("ordering", ordered)]);
            bench.append(Some(b"k"), 10).unwrap();
            bench.subscribe(1, "a", 1);
            let lease = bench.take_one();
            delete(&mut bench, 5);
            assert_eq!(bench.counts().expired, 4);
            bench.settle("a", lease, Outcome::Ack);
            bench.credit(1, 1);
            assert_eq!(bench.offsets(), [5], "{ordered}");
        }
    }

    #[test]
    fn segments_that_nobody_needs_go_when_their_topic_keeps_everything() {
        let (mut bench, lease) = leased(&[]);
        delete(&mut bench, 1);
        let config = pairs(&[("retention.ms", "-1")]);
        bench.ask(Command::AlterTopic { name: "orders".to_owned(), config });
        assert_eq!(log(&bench).segments.len(), 2);
        bench.settle("a", lease, Outcome::Ack);
        look(&mut bench);
        assert_eq!(log(&bench).segments.len(), 1);
    }
}
