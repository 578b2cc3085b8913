//! Batches and partitions against Apache's own Kafka client library.
//!
//! `tests/fixtures/kafka/data` was written by `tests/fixtures/kafka/generate.sh`; its JSON files say what that library's
//! reader and partitioner make of it.
#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{self, BatchBuilder, BatchError, BatchHeader, BatchLimits, Header, Record};
use felucca_protocol::partitioner::{murmur2, partition_for_key};
use serde::{Deserialize, Deserializer, de};

const LIMITS: BatchLimits =
    BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 100 };

/// Bytes that the JSON gives in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hex(Bytes);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).map_err(de::Error::custom);
        (0..text.len()).step_by(2).map(byte).collect::<Result<Bytes, _>>().map(Hex)
    }
}

#[derive(Deserialize)]
struct File {
    file: String,
    batches: Vec<Batch>,
}

#[derive(Deserialize)]
struct Batch {
    base_offset: u64,
    last_offset: u64,
    length: u32,
    partition_epoch: i32,
    crc: u32,
    compression: String,
    append_time: bool,
    transactional: bool,
    control: bool,
    max_timestamp: i64,
    producer_id: i64,
    producer_epoch: i16,
    base_sequence: i32,
    record_count: u32,
    records: Vec<ExpectedRecord>,
}

#[derive(Deserialize)]
struct ExpectedRecord {
    offset: u64,
    timestamp: i64,
    key: Option<Hex>,
    value: Option<Hex>,
    headers: Vec<ExpectedHeader>,
}

#[derive(Deserialize)]
struct ExpectedHeader {
    name: Hex,
    value: Option<Hex>,
}

impl Batch {
    fn readable(&self) -> bool {
        matches!(self.compression.as_str(), "none" | "lz4")
    }

    /// True when a producer could have sent it.
    fn acceptable(&self) -> bool {
        let dense = u64::from(self.record_count) == self.last_offset - self.base_offset + 1;
        self.readable() && dense && !self.append_time && !self.transactional && !self.control
    }

    fn records(&self) -> Vec<Record> {
        self.records
            .iter()
            .map(|record| Record {
                offset: record.offset,
                timestamp: record.timestamp,
                key: record.key.clone().map(|hex| hex.0),
                value: record.value.clone().map(|hex| hex.0),
                headers: record
                    .headers
                    .iter()
                    .map(|header| Header {
                        name: String::from_utf8(header.name.0.to_vec()).unwrap(),
                        value: header.value.clone().map(|hex| hex.0),
                    })
                    .collect(),
            })
            .collect()
    }

    /// What our builder makes of the same records.
    fn rebuild(&self) -> BytesMut {
        let mut builder =
            BatchBuilder::new().producer(self.producer_id, self.producer_epoch, self.base_sequence);
        for record in self.records() {
            let headers: Vec<_> =
                record.headers.iter().map(|header| (header.name.as_str(), header.value.as_deref())).collect();
            builder.push(record.timestamp, record.key.as_deref(), record.value.as_deref(), &headers).unwrap();
        }
        let mut built = builder.finish();
        batch::assign(&mut built, self.base_offset, self.partition_epoch);
        built
    }
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/kafka/data")
}

/// Every batch of every file, with its description.
fn batches() -> Vec<(String, Batch, Bytes)> {
    let files: Vec<File> = serde_json::from_slice(&fs::read(data().join("batches.json")).unwrap()).unwrap();
    let mut all = Vec::new();
    for File { file, batches } in files {
        let bytes = Bytes::from(fs::read(data().join(&file)).unwrap());
        let parts: Vec<Bytes> = batch::split(&bytes).collect::<Result<_, _>>().unwrap();
        assert_eq!(parts.len(), batches.len(), "{file}");
        all.extend(batches.into_iter().zip(parts).map(|(batch, bytes)| (file.clone(), batch, bytes)));
    }
    assert!(all.len() >= 18);
    all
}

#[test]
fn headers_say_what_kafka_reads() {
    for (file, expected, bytes) in batches() {
        let header = BatchHeader::parse(&bytes).unwrap();
        assert_eq!(header.base_offset, expected.base_offset, "{file}");
        assert_eq!(header.last_offset(), expected.last_offset, "{file}");
        assert_eq!(header.length, expected.length, "{file}");
        assert_eq!(header.partition_epoch, expected.partition_epoch, "{file}");
        assert_eq!(header.crc, expected.crc, "{file}");
        assert_eq!(header.append_time(), expected.append_time, "{file}");
        assert_eq!(header.max_timestamp, expected.max_timestamp, "{file}");
        assert_eq!(header.producer_id, expected.producer_id, "{file}");
        assert_eq!(header.producer_epoch, expected.producer_epoch, "{file}");
        assert_eq!(header.base_sequence, expected.base_sequence, "{file}");
        assert_eq!(header.record_count, expected.record_count, "{file}");
        assert_eq!(batch::check(&bytes).unwrap(), header, "{file}");
    }
}

#[test]
fn records_are_those_that_kafka_reads() {
    for (file, expected, bytes) in batches() {
        if !expected.readable() {
            let refused =
                BatchError::Compression(if expected.compression == "zstd" { "zstd" } else { "snappy" });
            assert_eq!(batch::records(&bytes).unwrap_err(), refused, "{file}");
            assert_eq!(batch::validate(&bytes, &LIMITS).unwrap_err(), refused, "{file}");
            continue;
        }
        let records: Vec<Record> = batch::records(&bytes).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(records, expected.records(), "{file}");
        let scan = batch::scan(&bytes).unwrap();
        let metas: Vec<_> = scan.iter().collect::<Result<_, _>>().unwrap();
        for (meta, record) in metas.iter().zip(&records) {
            assert_eq!((meta.offset, meta.timestamp), (record.offset, record.timestamp), "{file}");
            assert_eq!(meta.key, record.key.as_deref(), "{file}");
            assert_eq!(meta.tombstone, record.value.is_none(), "{file}");
        }
        assert_eq!(metas.len(), records.len(), "{file}");
    }
}

#[test]
fn validation_takes_what_a_producer_may_send_and_nothing_else() {
    for (file, expected, bytes) in batches() {
        let validated = batch::validate(&bytes, &LIMITS);
        assert_eq!(validated.is_ok(), expected.acceptable(), "{file}: {validated:?}");
    }
}

#[test]
fn the_builder_writes_the_same_bytes() {
    let mut compared = 0;
    for (file, expected, bytes) in batches() {
        if expected.acceptable() && expected.compression == "none" {
            assert_eq!(expected.rebuild(), bytes, "{file}");
            compared += 1;
        }
    }
    assert!(compared >= 9);
}

#[test]
fn a_filtered_batch_holds_the_same_records() {
    for (file, expected, bytes) in batches() {
        if !expected.readable() || expected.record_count < 2 {
            continue;
        }
        let kept: Vec<Record> = expected.records().into_iter().step_by(2).collect();
        let offsets: Vec<u64> = kept.iter().map(|record| record.offset).collect();
        let filtered = batch::filter(&bytes, &offsets).unwrap();
        let header = batch::check(&filtered).unwrap();
        assert_eq!(header.last_offset(), expected.last_offset, "{file}");
        let records: Vec<Record> = batch::records(&filtered).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(records, kept, "{file}");
    }
}

#[test]
fn keys_fall_into_kafkas_partitions() {
    #[derive(Deserialize)]
    struct Partitions {
        counts: Vec<u32>,
        keys: Vec<Key>,
    }
    #[derive(Deserialize)]
    struct Key {
        key: Hex,
        murmur2: i32,
        partitions: Vec<u32>,
    }
    let expected: Partitions =
        serde_json::from_slice(&fs::read(data().join("partitions.json")).unwrap()).unwrap();
    assert!(expected.keys.len() >= 60);
    for key in expected.keys {
        assert_eq!(murmur2(&key.key.0), key.murmur2, "{:?}", key.key);
        for (count, partition) in expected.counts.iter().zip(key.partitions) {
            assert_eq!(partition_for_key(&key.key.0, *count), partition, "{:?} of {count}", key.key);
        }
    }
}
