//! The door for batches from outside: what passes here is stored and served as it is, byte for byte.

use super::compression;
use super::error::BatchError;
use super::header::{BatchHeader, MAX_BATCH_BYTES, check};
use super::record::Walk;

/// What a receiver accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Bytes of a batch, as it comes and uncompressed; [`MAX_BATCH_BYTES`] when that is less.
    pub max_batch_bytes: u32,
    /// Bytes of a record's key, value, header names and header values together.
    pub max_record_bytes: u32,
    /// Headers of one record.
    pub max_headers: u32,
}

/// The attributes that a producer may set: the compression.
const ALLOWED_ATTRIBUTES: u16 = 0b111;

/// Checks that `bytes` are exactly one batch as a producer sends it: the CRC is right; every record parses and keeps to
/// the limits; offsets are dense from the first; `max_timestamp` is that of the latest record; nothing is left over; the
/// producer fields are all there or all absent; no flag is set that only a broker sets or that is not supported
/// (append time, transactional, control, delete horizon).
///
/// # Errors
/// The first violation found. A batch over the limit is refused before its CRC is computed.
pub fn validate(bytes: &[u8], limits: &BatchLimits) -> Result<BatchHeader, BatchError> {
    let limit = limits.max_batch_bytes.min(MAX_BATCH_BYTES);
    if bytes.len() > limit as usize {
        return Err(BatchError::TooLarge { bytes: bytes.len() as u64, limit });
    }
    let header = check(bytes)?;
    if header.attributes & !ALLOWED_ATTRIBUTES != 0 {
        return Err(BatchError::Attributes(header.attributes));
    }
    if header.record_count == 0 {
        return Err(BatchError::Empty);
    }
    // Ascending offsets within a range as large as their number are dense.
    let range = u64::from(header.last_offset_delta) + 1;
    if u64::from(header.record_count) != range {
        return Err(BatchError::Sparse { count: header.record_count, range });
    }
    let produced = header.producer_id >= 0 && header.producer_epoch >= 0 && header.base_sequence >= 0;
    let anonymous = header.producer_id == -1 && header.producer_epoch == -1 && header.base_sequence == -1;
    if !produced && !anonymous {
        return Err(BatchError::Header("producer"));
    }
    let records = compression::open(bytes, &header, limit)?;
    let mut latest = i64::MIN;
    let mut walk = Walk::new(&header, &records);
    let mut index = 0;
    while let Some(record) = walk.next() {
        let record = record?;
        if record.header_count > limits.max_headers {
            let (count, limit) = (record.header_count, limits.max_headers);
            return Err(BatchError::TooManyHeaders { index, count, limit });
        }
        let bytes = record.content_len().map_err(|fault| walk.state.fault(fault))?;
        if bytes > u64::from(limits.max_record_bytes) {
            return Err(BatchError::RecordTooLarge { index, bytes, limit: limits.max_record_bytes });
        }
        latest = latest.max(header.timestamp(record.timestamp_delta));
        index += 1;
    }
    if latest != header.max_timestamp {
        return Err(BatchError::MaxTimestamp { stated: header.max_timestamp, actual: latest });
    }
    Ok(header)
}
