//! The log as a whole, on a disk in memory, against a model that knows every batch.

mod ahead;
mod crash;
mod damage;
mod reading;
mod writing;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchHeader};

use super::{LogOptions, ReadView, SegmentWriter, Stored, read_record, scan};
use crate::disk::MemDisk;
use crate::engine::PartitionInfo;
use crate::engine::command::ScannedRecord;
use crate::engine::effect::{Scan, SegmentName, SegmentWrite, ViewChange};
use crate::engine::share::key_slot;
use crate::engine::types::{PartitionKey, RESUME_STEP, TopicId};

const ROOT: &str = "/log";

fn options() -> LogOptions {
    LogOptions { linger: Duration::from_millis(1), ..LogOptions::default() }
}

/// A log that keeps nothing in memory which it may let go.
fn forgetful() -> LogOptions {
    LogOptions { tail_bytes: 0, index_bytes: 0, open_files: 1, ..options() }
}

fn start(disk: &MemDisk, options: &LogOptions) -> SegmentWriter {
    SegmentWriter::start(Arc::new(disk.clone()), Path::new(ROOT), options, Box::new(|| {})).unwrap()
}

fn key(partition: u32) -> PartitionKey {
    PartitionKey { topic: TopicId([7; 16]), partition }
}

/// What the engine knows of a partition, and the batches that it decided on.
#[derive(Clone, Debug)]
struct Model {
    info: PartitionInfo,
    epoch: i32,
    segment_bytes: u64,
    batches: Vec<(BatchHeader, Bytes)>,
    /// Of those: the ones that were written ahead, and that frames only refer to.
    referred: BTreeSet<usize>,
}

impl Model {
    fn new(partition: u32, segment_bytes: u64) -> Self {
        let first = SegmentName { partition: key(partition), base_offset: 0, generation: 0 };
        let info = PartitionInfo {
            partition: key(partition),
            topic: "orders".into(),
            log_start: 0,
            end: 0,
            segments: vec![(first, 0)],
        };
        Self { info, epoch: 0, segment_bytes, batches: Vec::new(), referred: BTreeSet::new() }
    }

    fn create(&self, log: &SegmentWriter) {
        log.apply(&ViewChange::Created {
            partition: self.info.partition,
            topic: self.info.topic.clone(),
            first_segment: self.info.segments[0].0,
        });
    }

    /// Decides on a batch of one record per timestamp, and appends it.
    fn append(&mut self, log: &SegmentWriter, timestamps: &[i64], value_bytes: usize) {
        self.make(timestamps, value_bytes);
        self.append_again(log, self.batches.len() - 1);
    }

    /// As [`Self::append`], written ahead; it is on the disk then.
    fn append_ahead(&mut self, log: &SegmentWriter, timestamps: &[i64], value_bytes: usize) {
        self.make(timestamps, value_bytes);
        self.referred.insert(self.batches.len() - 1);
        let write = self.place(Some(log), self.batches.len() - 1);
        let file = log.write_ahead(&[&write]).unwrap().unwrap();
        file.sync().unwrap();
        log.append(vec![SegmentWrite { stored: true, ..write }]).unwrap();
    }

    /// Decides on a batch and where it goes.
    fn decide(&mut self, timestamps: &[i64], value_bytes: usize) -> SegmentWrite {
        self.make(timestamps, value_bytes);
        self.place(None, self.batches.len() - 1)
    }

    fn make(&mut self, timestamps: &[i64], value_bytes: usize) {
        let mut builder = BatchBuilder::new();
        for (at, timestamp) in timestamps.iter().enumerate() {
            let key = format!("key {}", self.info.end + at as u64);
            builder.push(*timestamp, Some(key.as_bytes()), Some(&vec![b'v'; value_bytes]), &[]).unwrap();
        }
        let mut bytes = builder.finish();
        batch::assign(&mut bytes, self.info.end, self.epoch);
        let bytes = bytes.freeze();
        let header = BatchHeader::parse(&bytes).unwrap();
        self.batches.push((header, bytes));
    }

    /// Appends a batch that was decided on before, as replay does.
    fn append_again(&mut self, log: &SegmentWriter, at: usize) {
        let mut write = self.place(Some(log), at);
        if self.referred.contains(&at) {
            write.bytes.truncate(batch::HEADER_LEN);
            write.stored = true;
        }
        log.append(vec![write]).unwrap();
    }

    fn place(&mut self, log: Option<&SegmentWriter>, at: usize) -> SegmentWrite {
        let (header, bytes) = self.batches[at].clone();
        let (last, filled) = *self.info.segments.last().unwrap();
        if filled > 0 && filled + bytes.len() as u64 > self.segment_bytes {
            let segment =
                SegmentName { base_offset: header.base_offset, generation: last.generation + 1, ..last };
            log.iter().for_each(|log| log.apply(&ViewChange::SegmentAdded { segment }));
            self.info.segments.push((segment, 0));
        }
        let (segment, filled) = self.info.segments.last_mut().unwrap();
        let write = SegmentWrite {
            segment: *segment,
            position: *filled,
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            max_timestamp: header.max_timestamp,
            length: bytes.len() as u64,
            bytes: bytes.clone(),
            stored: false,
        };
        *filled += bytes.len() as u64;
        self.info.end = header.last_offset() + 1;
        write
    }

    fn view(&self, log: &SegmentWriter) -> Arc<ReadView> {
        log.views().get(self.info.partition).unwrap()
    }

    fn publish(&self, log: &SegmentWriter) {
        self.view(log).publish(self.info.end);
    }

    /// Resumes higher up, as the engine does when a power loss may have taken offsets that it had shown.
    fn raise_epoch(&mut self, missing: u64) {
        self.epoch += 1;
        self.info.end = (self.info.end + missing).next_multiple_of(RESUME_STEP);
    }

    /// Records of the visible batches: offset, timestamp, slot, size.
    fn records(&self, log: &SegmentWriter) -> Vec<(i64, ScannedRecord)> {
        let end = self.view(log).high_watermark();
        let visible = self.batches.iter().filter(|(header, _)| header.last_offset() < end);
        visible
            .flat_map(|(_, bytes)| {
                let scan = batch::scan(bytes).unwrap();
                let record = |record: batch::RecordMeta<'_>| {
                    let slot = record.key.map(key_slot);
                    (record.timestamp, ScannedRecord { offset: record.offset, slot, size: record.size })
                };
                scan.iter().map(|meta| record(meta.unwrap())).collect::<Vec<_>>()
            })
            .filter(|(_, record)| record.offset >= self.info.log_start)
            .collect()
    }

    /// Reads everything visible in pieces of `max_bytes` and compares it.
    fn check(&self, log: &SegmentWriter, max_bytes: usize) {
        let view = self.view(log);
        let start = self.info.log_start;
        let mut offset = start;
        let mut expected = self.batches.iter().skip_while(|(header, _)| header.last_offset() < start);
        loop {
            let batches = view.read(offset, max_bytes).unwrap();
            if batches.is_empty() {
                break;
            }
            let total: usize = batches.iter().map(Bytes::len).sum();
            assert!(batches.len() == 1 || total <= max_bytes, "{total} bytes for {max_bytes}");
            for batch in batches {
                let (header, bytes) = expected.next().unwrap();
                assert_eq!(&batch, bytes, "at offset {offset}");
                offset = header.last_offset() + 1;
            }
        }
        let next = expected.next().map(|(header, _)| header.last_offset());
        assert!(next.is_none_or(|next| next >= view.high_watermark()), "{next:?} is missing");
        assert_eq!(view.bytes(), self.info.segments.iter().map(|(_, bytes)| bytes).sum::<u64>());
    }

    /// Looks records up in every way and compares with a plain search.
    fn check_lookups(&self, log: &SegmentWriter) {
        let view = self.view(log);
        let records = self.records(log);
        let end = view.high_watermark();
        let step = (end / 23).max(1);
        for offset in (self.info.log_start..end).step_by(step as usize) {
            let first = view.read(offset, 1).unwrap().into_iter().next();
            let expected = self.batches.iter().find(|(header, _)| header.last_offset() >= offset);
            let expected = expected.filter(|(header, _)| header.last_offset() < end);
            assert_eq!(first.as_ref(), expected.map(|(_, bytes)| bytes), "at offset {offset}");

            let record = read_record(&view, offset).unwrap().map(|record| record.offset);
            let exists = records.iter().any(|(_, record)| record.offset == offset);
            assert_eq!(record, exists.then_some(offset));

            let until = (offset + 3 * step).min(end);
            for max_records in [1, 7, usize::MAX] {
                let wanted = Scan {
                    group: String::new(),
                    partition: self.info.partition,
                    from: offset,
                    until,
                    max_records,
                    soon: max_records == 7,
                };
                let scanned = scan(&view, &wanted).unwrap();
                let inside = |record: &&ScannedRecord| (offset..until).contains(&record.offset);
                let expected: Vec<_> = records
                    .iter()
                    .map(|(_, record)| record)
                    .filter(inside)
                    .take(max_records)
                    .copied()
                    .collect();
                assert_eq!(scanned.records, expected);
                let reached = expected.last().map_or(offset, |last| last.offset + 1);
                assert!(reached <= scanned.next && scanned.next <= until, "{scanned:?} {wanted:?}");
                let complete = expected.len() < max_records;
                assert!(!complete || scanned.next == until, "{scanned:?} stops before {until}");
            }
        }
        let mut timestamps: Vec<i64> =
            records.iter().step_by(records.len() / 13 + 1).map(|found| found.0).collect();
        timestamps.extend([i64::MIN, 0, i64::MAX]);
        for timestamp in timestamps.iter().flat_map(|at| [at.saturating_sub(1), *at, at.saturating_add(1)]) {
            let expected = records.iter().find(|found| found.0 >= timestamp).map(|found| found.1.offset);
            assert_eq!(view.offset_for_timestamp(timestamp).unwrap(), expected, "at {timestamp}");
        }
    }
}
