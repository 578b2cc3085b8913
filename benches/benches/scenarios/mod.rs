//! Pieces of hot work, each prepared apart from being done: for the clock (`micro`) and for counting instructions
//! (`instructions`).
//!
//! The same inputs every time: no clock, no randomness, no files.

mod engine;

use std::any::Any;

use bytes::{Bytes, BytesMut};
use felucca_broker::engine::command::StagedBatch;
use felucca_protocol::batch::{BatchBuilder, BatchLimits, records, validate};
use felucca_protocol::frame::{self, Kind};
use felucca_protocol::{Api, message};

/// Records in a batch.
pub(crate) const BATCH: u64 = 100;
/// What a broker accepts by default.
const LIMITS: BatchLimits =
    BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 64 };

/// What is left afterwards: dropping it is not part of the work.
pub(crate) type Left = Box<dyn Any>;
/// Work that is ready to be done once.
pub(crate) type Work = Box<dyn FnOnce() -> Left>;

/// One piece of work.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Records that it deals with.
    pub(crate) records: u64,
    pub(crate) prepare: fn() -> Work,
}

/// All of them.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "batch_build", records: BATCH, prepare: batch_build },
    Scenario { name: "batch_validate", records: BATCH, prepare: batch_validate },
    Scenario { name: "batch_read", records: BATCH, prepare: batch_read },
    Scenario { name: "frame_encode", records: BATCH, prepare: frame_encode },
    Scenario { name: "frame_decode", records: BATCH, prepare: frame_decode },
    Scenario { name: "engine_produce", records: 100 * BATCH, prepare: engine::produce },
    Scenario { name: "engine_produce_singles", records: 1000, prepare: engine::produce_singles },
    Scenario { name: "engine_lease", records: engine::RECORDS, prepare: engine::lease },
    Scenario { name: "engine_ack", records: engine::RECORDS, prepare: engine::ack },
    Scenario { name: "engine_ack_singles", records: engine::RECORDS, prepare: engine::ack_singles },
    Scenario { name: "engine_nack", records: engine::RECORDS, prepare: engine::nack },
    Scenario { name: "engine_keyed_ack", records: engine::RECORDS, prepare: engine::keyed_ack },
];

/// A batch of records of 1 KiB without keys.
pub(crate) fn batch(records: u64) -> BytesMut {
    let value = [7; 1024];
    let mut builder = BatchBuilder::new();
    for _ in 0..records {
        builder.push(1_700_000_000_000, None, Some(&value), &[]).expect("a record within the limits");
    }
    builder.finish()
}

fn staged(bytes: BytesMut) -> StagedBatch {
    let header = validate(&bytes, &LIMITS).expect("a sound batch");
    StagedBatch { header, bytes }
}

fn batch_build() -> Work {
    Box::new(|| Box::new(batch(BATCH)))
}

fn batch_validate() -> Work {
    let bytes = batch(BATCH);
    Box::new(move || Box::new((validate(&bytes, &LIMITS).is_ok(), bytes)))
}

fn batch_read() -> Work {
    let bytes = batch(BATCH).freeze();
    Box::new(move || {
        let records: Vec<_> = records(&bytes).expect("a sound batch").collect();
        Box::new(records)
    })
}

fn produce_frame(payload: &Bytes) -> BytesMut {
    let entry = message::ProduceEntry {
        topic_id: Bytes::from_static(&[7; 16]),
        partition: 3,
        length: payload.len() as u32,
    };
    let request = message::Produce { level: message::Level::Written.into(), entries: vec![entry] };
    let mut buffer = BytesMut::with_capacity(payload.len() + 128);
    frame::encode(&mut buffer, Kind::Request, Api::Produce, 1, &request, payload.len());
    buffer.extend_from_slice(payload);
    buffer
}

fn frame_encode() -> Work {
    let payload = batch(BATCH).freeze();
    Box::new(move || Box::new((produce_frame(&payload), payload)))
}

fn frame_decode() -> Work {
    let mut buffer = produce_frame(&batch(BATCH).freeze());
    Box::new(move || {
        let frame = frame::decode(&mut buffer, 1 << 21).ok().flatten().expect("a whole frame");
        let request: message::Produce = frame.decode_message().expect("a produce request");
        Box::new((frame, request))
    })
}
