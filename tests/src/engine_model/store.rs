//! What is on the disk: frames, checkpoints, and the log that readers see.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use bytes::Bytes;
use felucca_broker::engine::checkpoint::Row;
use felucca_broker::engine::effect::{SegmentName, SegmentWrite};
use felucca_broker::engine::share::key_slot;
use felucca_broker::engine::types::PartitionKey;
use felucca_protocol::batch::{self, Record};

use super::model::log::Entry;

/// Rows of a checkpoint as they stand: what is gone is not in it.
pub(crate) type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// Events and batches of a frame; the frame with number n is the n-th.
pub(crate) type Frame = (Vec<u8>, Vec<Bytes>);

pub(crate) fn put_rows(rows: &mut Rows, changed: Vec<Row>) {
    for (key, value) in changed {
        match value {
            Some(value) => rows.insert(key, value),
            None => rows.remove(&key),
        };
    }
}

/// A batch as it was appended.
#[derive(Clone, Debug)]
pub(crate) struct Appended {
    pub(crate) key: PartitionKey,
    pub(crate) base: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) records: Vec<Record>,
    pub(crate) bytes: Bytes,
}

/// The log of every partition, as its readers would find it.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    pub(crate) records: BTreeMap<PartitionKey, BTreeMap<u64, (Entry, Record)>>,
    /// Length of every segment that there is, and where it ends.
    segments: BTreeMap<SegmentName, (u64, u64)>,
    /// Names that may not come again.
    removed: BTreeSet<SegmentName>,
}

impl Logs {
    /// Takes in a batch; its place in the segment must be the next free one.
    pub(crate) fn write(&mut self, write: &SegmentWrite) -> Appended {
        assert!(!self.removed.contains(&write.segment), "{:?} was removed", write.segment);
        let (length, end) = self.segments.entry(write.segment).or_default();
        *end = write.last_offset + 1;
        assert_eq!(write.position, *length, "batch {} of {:?}", write.base_offset, write.segment);
        *length += write.bytes.len() as u64;
        let appended = parse(write);
        let records = self.records.entry(appended.key).or_default();
        let pairs = appended.entries.iter().copied().zip(appended.records.iter().cloned());
        records.extend((appended.base..).zip(pairs));
        appended
    }
}

impl Logs {
    /// Removes a segment; answers the offsets that it held, at most.
    pub(crate) fn remove(&mut self, segment: SegmentName) -> Range<u64> {
        assert!(self.removed.insert(segment), "{segment:?} was removed before");
        let (_, end) = self.segments.remove(&segment).unwrap_or((0, segment.base_offset));
        segment.base_offset..end
    }
}

fn parse(write: &SegmentWrite) -> Appended {
    let scanned = batch::scan(&write.bytes).expect("a whole batch");
    assert_eq!(scanned.header().base_offset, write.base_offset);
    assert_eq!(scanned.header().last_offset(), write.last_offset);
    let records: Vec<Record> =
        batch::records(&write.bytes).expect("a whole batch").map(|r| r.expect("a whole record")).collect();
    let mut entries = Vec::new();
    for (meta, record) in scanned.iter().zip(&records) {
        let meta = meta.expect("a whole record");
        let mut hasher = DefaultHasher::new();
        (&record.key, &record.value, &record.headers, record.timestamp).hash(&mut hasher);
        entries.push(Entry { identity: hasher.finish(), slot: meta.key.map(key_slot), size: meta.size });
    }
    Appended {
        key: write.segment.partition,
        base: write.base_offset,
        entries,
        records,
        bytes: write.bytes.clone(),
    }
}
