//! Batches as a log cleaner leaves them: some of their records, standing for all of their offsets.

use bytes::{Bytes, BytesMut};

use super::compression::{self, Compression};
use super::error::{BatchError, RecordFault};
use super::header::{BatchHeader, DELETE_HORIZON, HEADER_LEN, MAX_BATCH_BYTES};
use super::record::Walk;
use super::varint;

/// A batch with only the records at `offsets`, which ascend, compressed as it was. It ends at `last_offset`: so it can
/// stand for records behind it that are gone, and the next batch follows it without a hole. With a delete horizon (Unix
/// ms) it says from when on its tombstones may go; one that has a horizon keeps it. Everything else stays: base offset,
/// epoch, producer fields, times of the records. The same bytes are returned when nothing changes. The CRC of `batch` is not
/// checked.
///
/// # Errors
/// A malformed batch; [`BatchError::NoSuchOffset`] when a record asked for is not there, or lies above `last_offset`;
/// [`BatchError::Empty`] when none is asked for; [`BatchError::Range`] when `last_offset` is 2^31 or more above the base offset.
pub fn compact(
    batch: &Bytes,
    offsets: &[u64],
    last_offset: u64,
    delete_horizon: Option<i64>,
) -> Result<Bytes, BatchError> {
    let header = BatchHeader::parse(batch)?;
    let horizon = delete_horizon.filter(|_| header.delete_horizon().is_none());
    let last_offset_delta = last_offset
        .checked_sub(header.base_offset)
        .filter(|delta| *delta <= i32::MAX as u64)
        .ok_or(BatchError::Range { base_offset: header.base_offset, last_offset })?
        as u32;
    let all = offsets.len() == header.record_count as usize && batch.len() == header.length as usize;
    if all && horizon.is_none() && last_offset_delta == header.last_offset_delta {
        return Ok(batch.clone());
    }
    if offsets.is_empty() {
        return Err(BatchError::Empty);
    }
    let records = compression::open(batch, &header, MAX_BATCH_BYTES)?;
    let mut wanted = offsets.iter().copied().peekable();
    let mut kept = BytesMut::with_capacity(HEADER_LEN + records.len());
    kept.resize(HEADER_LEN, 0);
    let mut max_timestamp = i64::MIN;
    for record in Walk::new(&header, &records) {
        let record = record?;
        let offset = header.base_offset + u64::from(record.offset_delta);
        if wanted.next_if_eq(&offset).is_none() {
            continue;
        }
        let timestamp = header.timestamp(record.timestamp_delta);
        max_timestamp = max_timestamp.max(timestamp);
        match horizon {
            None => kept.extend_from_slice(record.encoded),
            Some(horizon) => put_moved(&mut kept, record.encoded, timestamp.wrapping_sub(horizon))
                .map_err(|fault| BatchError::Record { index: 0, fault })?,
        }
    }
    if let Some(missing) = wanted.next().or(offsets.last().copied().filter(|last| *last > last_offset)) {
        return Err(BatchError::NoSuchOffset(missing));
    }
    let mut attributes = header.attributes & !CODEC_MASK;
    if header.compression()? == Compression::Lz4
        && let Some(compressed) = compression::compress_lz4(&kept[HEADER_LEN..])
    {
        kept.truncate(HEADER_LEN);
        kept.extend_from_slice(&compressed);
        attributes |= Compression::Lz4.bits();
    }
    let mut compacted = BatchHeader {
        attributes,
        last_offset_delta,
        max_timestamp,
        // No more than the batch's own count, for each was found there.
        record_count: offsets.len() as u32,
        ..header
    };
    if let Some(horizon) = horizon {
        compacted.attributes |= DELETE_HORIZON;
        compacted.base_timestamp = horizon;
    }
    compacted.seal(&mut kept);
    Ok(kept.freeze())
}

const CODEC_MASK: u16 = 0b111;

/// Writes a record with another difference to the base timestamp.
fn put_moved(out: &mut BytesMut, encoded: &[u8], timestamp_delta: i64) -> Result<(), RecordFault> {
    let mut rest = encoded;
    varint::take_i32(&mut rest)?;
    let (attributes, mut rest) = rest.split_first().ok_or(RecordFault::Truncated)?;
    varint::take_i64(&mut rest)?;
    varint::put(out, (1 + varint::len(timestamp_delta) + rest.len()) as i64);
    out.extend_from_slice(&[*attributes]);
    varint::put(out, timestamp_delta);
    out.extend_from_slice(rest);
    Ok(())
}
