//! What records are made of, so that every byte that comes back can be checked.

use bytes::{Bytes, BytesMut};
use felucca_broker::engine::command::StagedBatch;
use felucca_broker::engine::dead_letter;
use felucca_protocol::batch::{BatchBuilder, BatchHeader, Record};

use super::history::PER_TARGET;
use crate::engine_model::rng::Rng;

/// Of this target many records are large.
const LARGE: u32 = 3;
/// The logs of these targets are compacted: some of their records are tombstones.
const COMPACTED: [u32; 2] = [4, 5];
/// Says what a tombstone is, which has no value to do so.
const MADE: &str = "made";

/// A record as the simulation sent it: who made it, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    /// Producer id of an idempotent producer, or a number of its own.
    pub(crate) maker: u32,
    /// Rises by one from record to record of a maker in a partition.
    pub(crate) number: u32,
    /// How often it was redriven.
    pub(crate) redrives: u32,
}

impl Identity {
    pub(crate) fn key(&self) -> Option<Vec<u8>> {
        key(self.maker, self.number)
    }

    pub(crate) fn is_tombstone(&self) -> bool {
        is_tombstone(self.maker, self.number)
    }
}

fn is_tombstone(maker: u32, number: u32) -> bool {
    let mut rng = Rng::new((u64::from(maker) << 32) ^ u64::from(number) ^ 0xdead);
    COMPACTED.contains(&(number / PER_TARGET)) && key(maker, number).is_some() && rng.chance(30)
}

fn name(maker: u32, number: u32) -> Vec<u8> {
    [maker.to_be_bytes(), number.to_be_bytes()].concat()
}

/// The value of a record: its name, and so many bytes as follow from it.
fn value(maker: u32, number: u32) -> Vec<u8> {
    let mut rng = Rng::new((u64::from(maker) << 32) | u64::from(number));
    let mut value = name(maker, number);
    let length = match rng.below(100) {
        // So that segments of this one fill up.
        0..40 if number / PER_TARGET == LARGE => rng.between(2_000, 9_000),
        40..50 => rng.between(200, 900),
        _ => rng.below(40),
    };
    value.extend((0..length.div_ceil(8)).flat_map(|_| rng.bits().to_be_bytes()));
    value
}

/// The key of a record; some have none.
pub(crate) fn key(maker: u32, number: u32) -> Option<Vec<u8>> {
    let mut rng = Rng::new((u64::from(number) << 32) ^ u64::from(maker) ^ 0x5eed);
    (!rng.chance(20)).then(|| format!("key-{}", rng.below(4)).into_bytes())
}

/// Reads back what a record is, and checks that it is whole.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn identify(record: &Record) -> Result<Identity, String> {
    let made = record.headers.iter().find(|header| header.name == MADE);
    let found = match &record.value {
        Some(value) => value,
        None => made.and_then(|header| header.value.as_ref()).ok_or("neither a value nor a name")?,
    };
    let name = found.first_chunk::<8>().ok_or("the value is too short")?;
    let maker = u32::from_be_bytes([name[0], name[1], name[2], name[3]]);
    let number = u32::from_be_bytes([name[4], name[5], name[6], name[7]]);
    if record.value.is_none() != is_tombstone(maker, number) {
        return Err(format!("{maker}/{number} is a tombstone, or should be one"));
    }
    if record.value.is_some() && found[..] != value(maker, number) {
        return Err(format!("the value of {maker}/{number} has other bytes"));
    }
    if record.key.as_deref() != key(maker, number).as_deref() {
        return Err(format!("the key of {maker}/{number} has other bytes"));
    }
    Ok(Identity { maker, number, redrives: dead_letter::redrive_count(record) })
}

/// A batch of `count` records of a maker. With `sequence` the maker is an idempotent producer.
pub(crate) fn batch(maker: u32, first: u32, count: u32, sequence: Option<u32>, wall_ms: i64) -> BytesMut {
    let mut builder = BatchBuilder::new();
    if let Some(sequence) = sequence {
        builder = builder.producer(i64::from(maker), 0, sequence.cast_signed());
    }
    for number in first..first + count {
        let key = key(maker, number);
        let pushed = if is_tombstone(maker, number) {
            builder.push(wall_ms, key.as_deref(), None, &[(MADE, Some(&name(maker, number)))])
        } else {
            builder.push(wall_ms, key.as_deref(), Some(&value(maker, number)), &[])
        };
        pushed.expect("a small record");
    }
    builder.finish()
}

pub(crate) fn staged(bytes: BytesMut) -> StagedBatch {
    let header = BatchHeader::parse(&bytes).expect("a batch that was just built");
    StagedBatch { header, bytes }
}

/// Where a dead letter came from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LetterSource {
    pub(crate) group: String,
    pub(crate) topic: String,
    pub(crate) partition: u32,
    pub(crate) offset: u64,
}

/// Reads a dead letter's headers.
pub(crate) fn letter_source(record: &Record) -> Option<LetterSource> {
    let header = |name: &str| {
        let full = format!("{}{name}", dead_letter::PREFIX);
        let header = record.headers.iter().find(|header| header.name == full)?;
        header.value.as_ref().and_then(|value: &Bytes| String::from_utf8(value.to_vec()).ok())
    };
    Some(LetterSource {
        group: header("group")?,
        topic: header("topic")?,
        partition: header("partition")?.parse().ok()?,
        offset: header("offset")?.parse().ok()?,
    })
}
