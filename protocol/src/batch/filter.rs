//! Batches with some of the records of another.

use bytes::{Bytes, BytesMut};

use super::compression;
use super::error::BatchError;
use super::header::{BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};
use super::record::Walk;

/// A batch with only the records at `offsets`, which ascend: uncompressed, with the original offsets, timestamps, producer
/// fields and range (`base_offset` to `last_offset_delta`). The same bytes are returned when every record is kept. The
/// CRC of `batch` is not checked.
///
/// # Errors
/// A malformed batch; [`BatchError::NoSuchOffset`] when a record asked for is not there; [`BatchError::Empty`] when none
/// is asked for.
pub fn filter(batch: &Bytes, offsets: &[u64]) -> Result<Bytes, BatchError> {
    let header = BatchHeader::parse(batch)?;
    let dense = u64::from(header.record_count) == u64::from(header.last_offset_delta) + 1;
    let all = dense && offsets.iter().copied().eq(header.base_offset..=header.last_offset());
    if all && batch.len() == header.length as usize {
        return Ok(batch.clone());
    }
    if offsets.is_empty() {
        return Err(BatchError::Empty);
    }
    let records = compression::open(batch, &header, MAX_BATCH_BYTES)?;
    let mut wanted = offsets.iter().copied().peekable();
    let mut kept = BytesMut::with_capacity(HEADER_LEN + room(&records, offsets.len(), header.record_count));
    kept.resize(HEADER_LEN, 0);
    let mut max_timestamp = i64::MIN;
    for record in Walk::new(&header, &records) {
        let record = record?;
        let offset = header.base_offset + u64::from(record.offset_delta);
        if wanted.next_if_eq(&offset).is_some() {
            kept.extend_from_slice(record.encoded);
            max_timestamp = max_timestamp.max(header.timestamp(record.timestamp_delta));
        }
    }
    if let Some(missing) = wanted.next() {
        return Err(BatchError::NoSuchOffset(missing));
    }
    if offsets.len() == header.record_count as usize && batch.len() == header.length as usize {
        return Ok(batch.clone());
    }
    // No more than the batch's own count, for each was found there.
    Ok(seal_part(&header, kept, offsets.len() as u32, max_timestamp))
}

const COMPRESSION_BITS: u16 = 0b111;

/// Makes a batch of some records of a batch: `kept` has them, uncompressed, behind room for the header.
pub(super) fn seal_part(
    header: &BatchHeader,
    mut kept: BytesMut,
    record_count: u32,
    max_timestamp: i64,
) -> Bytes {
    let part = BatchHeader {
        attributes: header.attributes & !COMPRESSION_BITS,
        max_timestamp,
        record_count,
        ..*header
    };
    part.seal(&mut kept);
    kept.freeze()
}

/// A guess at the bytes of `kept` of `count` records: their share of all.
fn room(records: &[u8], kept: usize, count: u32) -> usize {
    let share = records.len() as u64 * kept as u64 / u64::from(count.max(1));
    (share as usize).min(records.len())
}
