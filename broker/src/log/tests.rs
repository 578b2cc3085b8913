//! The log as a whole, on a disk in memory.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchHeader};

use super::{LogOptions, ReadError, ReadView, SegmentWriter};
use crate::disk::MemDisk;
use crate::engine::PartitionInfo;
use crate::engine::effect::{SegmentName, SegmentWrite, ViewChange};
use crate::engine::types::{PartitionKey, TopicId};

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
        Self { info, epoch: 0, segment_bytes, batches: Vec::new() }
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
        self.append_again(log, self.batches.len() - 1);
    }

    /// Appends a batch that was decided on before, as replay does.
    fn append_again(&mut self, log: &SegmentWriter, at: usize) {
        let (header, bytes) = self.batches[at].clone();
        let (last, filled) = *self.info.segments.last().unwrap();
        if filled > 0 && filled + bytes.len() as u64 > self.segment_bytes {
            let segment =
                SegmentName { base_offset: header.base_offset, generation: last.generation + 1, ..last };
            log.apply(&ViewChange::SegmentAdded { segment });
            self.info.segments.push((segment, 0));
        }
        let (segment, filled) = self.info.segments.last_mut().unwrap();
        let write = SegmentWrite {
            segment: *segment,
            position: *filled,
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            max_timestamp: header.max_timestamp,
            bytes: bytes.clone(),
        };
        *filled += bytes.len() as u64;
        self.info.end = header.last_offset() + 1;
        log.append(vec![write]).unwrap();
    }

    fn view(&self, log: &SegmentWriter) -> Arc<ReadView> {
        log.views().get(self.info.partition).unwrap()
    }

    fn publish(&self, log: &SegmentWriter) {
        self.view(log).publish(self.info.end);
    }

    /// Reads everything visible and compares it.
    fn check(&self, log: &SegmentWriter, max_bytes: usize) {
        let view = self.view(log);
        let mut offset = self.info.log_start;
        let start = self.info.log_start;
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
        let next = expected.next().map(|(header, _)| header.base_offset);
        assert!(next.is_none_or(|next| next >= view.high_watermark()), "{next:?} is missing");
        assert_eq!(view.bytes(), self.info.segments.iter().map(|(_, bytes)| bytes).sum::<u64>());
    }
}

#[test]
fn batches_are_read_from_memory_and_from_disk_alike() {
    for options in [options(), forgetful()] {
        let disk = MemDisk::new();
        let log = start(&disk, &options);
        let mut model = Model::new(0, 100_000);
        model.create(&log);
        for at in 0..300 {
            model.append(&log, &[at, at + 1, at + 2], 1 + (at as usize * 37) % 3000);
        }
        model.check(&log, 10_000);
        assert!(model.view(&log).read(0, 1).unwrap().is_empty(), "not visible yet");
        model.publish(&log);
        for max_bytes in [1, 5000, 200_000, usize::MAX] {
            model.check(&log, max_bytes);
        }
        log.sync().unwrap();
        assert_eq!(log.unwritten_bytes(), 0);
        for max_bytes in [1, 5000, 200_000, usize::MAX] {
            model.check(&log, max_bytes);
        }
        if options.tail_bytes == 0 {
            assert_eq!(log.tail_bytes(), 0);
        }
        let error = model.view(&log).read(model.info.end + 1, 1).unwrap_err();
        assert!(matches!(error, ReadError::AboveEnd { high_watermark } if high_watermark == model.info.end));
    }
}

#[test]
fn a_restart_reads_what_was_written_and_goes_on() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 50_000);
    model.create(&log);
    for at in 0..100 {
        model.append(&log, &[at, at], 1000);
    }
    log.sync().unwrap();
    log.shutdown().unwrap();
    for _ in 0..3 {
        let log = start(&disk, &forgetful());
        log.restore(&model.info);
        model.check(&log, 20_000);
        for at in 0..30 {
            model.append(&log, &[at, at], 1000);
        }
        model.publish(&log);
        model.check(&log, 20_000);
        log.sync().unwrap();
        model.check(&log, 20_000);
        log.shutdown().unwrap();
    }
}
