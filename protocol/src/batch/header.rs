//! The fixed header of a batch, and what needs no more than that.

use bytes::Bytes;

use super::compression::{Codec, Compression};
use super::error::BatchError;

/// Bytes before the records.
pub const HEADER_LEN: usize = 61;

/// The largest batch, compressed or not, that any configuration may allow: every buffer made for a batch is bounded by it.
pub const MAX_BATCH_BYTES: u32 = 64 * 1024 * 1024;

/// Bytes that the length field does not count: base offset and the field itself.
const LENGTH_EXCLUDES: u32 = 12;

const PARTITION_EPOCH: usize = 12;
const MAGIC: usize = 16;
const CRC: usize = 17;
/// Where the bytes under the CRC begin.
const CRC_FROM: usize = 21;

pub(super) const APPEND_TIME: u16 = 1 << 3;
/// `base_timestamp` is a delete horizon.
pub(super) const DELETE_HORIZON: u16 = 1 << 6;
const CODEC_MASK: u16 = 0b111;

/// The fields of a batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    pub base_offset: u64,
    /// Bytes of the whole batch, header included.
    pub length: u32,
    pub partition_epoch: i32,
    pub crc: u32,
    pub attributes: u16,
    pub last_offset_delta: u32,
    /// Unix milliseconds.
    pub base_timestamp: i64,
    /// Unix milliseconds.
    pub max_timestamp: i64,
    /// −1: none.
    pub producer_id: i64,
    /// −1: none.
    pub producer_epoch: i16,
    /// −1: none.
    pub base_sequence: i32,
    pub record_count: u32,
}

impl BatchHeader {
    /// Reads the header at the start of `bytes`, which may end before the batch does.
    ///
    /// # Errors
    /// Fewer than [`HEADER_LEN`] bytes, another format, or a field that no batch can have. The CRC is not looked at.
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(BatchError::Truncated { needed: HEADER_LEN, have: bytes.len() });
        };
        // Older formats differ in everything after the magic, so it goes first.
        if header[MAGIC] != 2 {
            return Err(BatchError::Magic(header[MAGIC]));
        }
        let non_negative = |at, name| u32::try_from(i32_at(header, at)).map_err(|_| BatchError::Header(name));
        let length = non_negative(8, "length")?;
        if (length as usize) < HEADER_LEN - LENGTH_EXCLUDES as usize {
            return Err(BatchError::Header("length"));
        }
        Ok(Self {
            base_offset: u64::try_from(i64_at(header, 0)).map_err(|_| BatchError::Header("base_offset"))?,
            length: length + LENGTH_EXCLUDES,
            partition_epoch: i32_at(header, PARTITION_EPOCH),
            crc: i32_at(header, CRC) as u32,
            attributes: u16::from_be_bytes([header[21], header[22]]),
            last_offset_delta: non_negative(23, "last_offset_delta")?,
            base_timestamp: i64_at(header, 27),
            max_timestamp: i64_at(header, 35),
            producer_id: i64_at(header, 43),
            producer_epoch: i16::from_be_bytes([header[51], header[52]]),
            base_sequence: i32_at(header, 53),
            record_count: non_negative(57, "record_count")?,
        })
    }

    /// How the records are compressed.
    ///
    /// # Errors
    /// A codec that is not supported, by name.
    pub fn compression(&self) -> Result<Compression, BatchError> {
        Codec::from_bits(self.attributes & CODEC_MASK).supported()
    }

    /// The time (Unix ms) from which on the batch's tombstones may go; a log cleaner sets it.
    pub fn delete_horizon(&self) -> Option<i64> {
        (self.attributes & DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    /// Offset of the last record; for a batch made by [`super::filter()`] that of the last record of the original, for one
    /// made by [`super::compact()`] the last one that it stands for.
    pub fn last_offset(&self) -> u64 {
        // Both are below 2^63.
        self.base_offset + u64::from(self.last_offset_delta)
    }

    /// True when all records carry the broker's append time, `max_timestamp`.
    pub fn append_time(&self) -> bool {
        self.attributes & APPEND_TIME != 0
    }

    /// The timestamp of a record with this delta.
    pub(super) fn timestamp(&self, delta: i64) -> i64 {
        if self.append_time() { self.max_timestamp } else { self.base_timestamp.wrapping_add(delta) }
    }

    /// Writes the header over the first [`HEADER_LEN`] bytes of `batch`, with its length and CRC.
    pub(super) fn seal(&self, batch: &mut [u8]) {
        let length = batch.len() as u32 - LENGTH_EXCLUDES;
        batch[0..8].copy_from_slice(&self.base_offset.to_be_bytes());
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        batch[12..16].copy_from_slice(&self.partition_epoch.to_be_bytes());
        batch[MAGIC] = 2;
        batch[21..23].copy_from_slice(&self.attributes.to_be_bytes());
        batch[23..27].copy_from_slice(&self.last_offset_delta.to_be_bytes());
        batch[27..35].copy_from_slice(&self.base_timestamp.to_be_bytes());
        batch[35..43].copy_from_slice(&self.max_timestamp.to_be_bytes());
        batch[43..51].copy_from_slice(&self.producer_id.to_be_bytes());
        batch[51..53].copy_from_slice(&self.producer_epoch.to_be_bytes());
        batch[53..57].copy_from_slice(&self.base_sequence.to_be_bytes());
        batch[57..61].copy_from_slice(&self.record_count.to_be_bytes());
        seal_crc(batch);
    }
}

/// Checks that `bytes` are exactly one batch with the right CRC, without looking at its records: enough for bytes that
/// were validated once and come back from a disk or a peer.
///
/// # Errors
/// A malformed header, bytes missing or left over, a wrong CRC.
pub fn check(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = BatchHeader::parse(bytes)?;
    let length = header.length as usize;
    if bytes.len() < length {
        return Err(BatchError::Truncated { needed: length, have: bytes.len() });
    }
    if bytes.len() > length {
        return Err(BatchError::TrailingBytes(bytes.len() - length));
    }
    let computed = crc32c::crc32c(&bytes[CRC_FROM..]);
    if computed != header.crc {
        return Err(BatchError::Crc { stated: header.crc, computed });
    }
    Ok(header)
}

/// Gives a validated batch its place: writes the base offset and the partition's epoch, which the CRC leaves out.
///
/// # Panics
/// When `batch` is shorter than a header.
pub fn assign(batch: &mut [u8], base_offset: u64, partition_epoch: i32) {
    batch[0..8].copy_from_slice(&base_offset.to_be_bytes());
    batch[PARTITION_EPOCH..MAGIC].copy_from_slice(&partition_epoch.to_be_bytes());
}

/// Gives a batch that was never appended another producer identity, which the CRC covers: for a sender that has to begin a
/// new sequence.
///
/// # Panics
/// When `batch` is shorter than a header.
pub fn set_producer(batch: &mut [u8], id: i64, epoch: i16, base_sequence: i32) {
    batch[43..51].copy_from_slice(&id.to_be_bytes());
    batch[51..53].copy_from_slice(&epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&base_sequence.to_be_bytes());
    seal_crc(batch);
}

fn seal_crc(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[CRC_FROM..]);
    batch[CRC..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
}

/// Takes concatenated batches apart without copying. Looks only at headers; each batch is still to be validated.
pub fn split(bytes: &Bytes) -> Split {
    Split { rest: bytes.clone() }
}

/// The batches of a concatenation; ends after the first error.
#[derive(Clone, Debug)]
pub struct Split {
    rest: Bytes,
}

impl Iterator for Split {
    type Item = Result<Bytes, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let length = BatchHeader::parse(&self.rest).and_then(|header| {
            let needed = header.length as usize;
            if needed > self.rest.len() {
                return Err(BatchError::Truncated { needed, have: self.rest.len() });
            }
            Ok(needed)
        });
        Some(match length {
            Ok(length) => Ok(self.rest.split_to(length)),
            Err(error) => {
                self.rest.clear();
                Err(error)
            }
        })
    }
}

impl std::iter::FusedIterator for Split {}

fn i32_at(header: &[u8; HEADER_LEN], at: usize) -> i32 {
    i32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

fn i64_at(header: &[u8; HEADER_LEN], at: usize) -> i64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    i64::from_be_bytes(bytes)
}
