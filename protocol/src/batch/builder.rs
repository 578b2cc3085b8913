//! Writing a batch: records go straight into the buffer that becomes the batch.

use bytes::{BufMut, BytesMut};

use super::compression::{self, Compression};
use super::error::BatchError;
use super::header::{BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};
use super::varint;

/// Gathers records into one batch. Offsets count from 0 until [`super::assign`] gives the batch its place.
#[derive(Debug)]
pub struct BatchBuilder {
    /// Room for the header, then the records.
    buffer: BytesMut,
    compression: Compression,
    producer_id: i64,
    producer_epoch: i16,
    base_sequence: i32,
    base_timestamp: i64,
    max_timestamp: i64,
    count: u32,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    /// A builder without producer, uncompressed.
    pub fn new() -> Self {
        Self::with_capacity(HEADER_LEN)
    }

    /// As [`Self::new`], with room for a batch of `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut buffer = BytesMut::with_capacity(bytes.max(HEADER_LEN));
        buffer.resize(HEADER_LEN, 0);
        Self {
            buffer,
            compression: Compression::None,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            base_timestamp: 0,
            max_timestamp: i64::MIN,
            count: 0,
        }
    }

    /// Sets the producer fields, by which a broker recognises a repeated batch. −1 each: none.
    #[must_use]
    pub fn producer(mut self, id: i64, epoch: i16, base_sequence: i32) -> Self {
        self.producer_id = id;
        self.producer_epoch = epoch;
        self.base_sequence = base_sequence;
        self
    }

    /// Compresses the records at the end, if that makes them smaller.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Appends a record. `timestamp` is in Unix milliseconds.
    ///
    /// # Errors
    /// [`BatchError::TooLarge`] when the batch would exceed [`MAX_BATCH_BYTES`]; the record is then not in it.
    pub fn push(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&str, Option<&[u8]>)],
    ) -> Result<(), BatchError> {
        let base_timestamp = if self.count == 0 { timestamp } else { self.base_timestamp };
        let timestamp_delta = timestamp.wrapping_sub(base_timestamp);
        let body = body_len(timestamp_delta, self.count, key, value, headers);
        let total = self.buffer.len() + varint::len(body as i64) + body;
        if total > MAX_BATCH_BYTES as usize {
            return Err(BatchError::TooLarge { bytes: total as u64, limit: MAX_BATCH_BYTES });
        }
        let buffer = &mut self.buffer;
        buffer.reserve(total - buffer.len());
        varint::put(buffer, body as i64);
        buffer.put_u8(0);
        varint::put(buffer, timestamp_delta);
        varint::put(buffer, i64::from(self.count));
        put_bytes(buffer, key);
        put_bytes(buffer, value);
        varint::put(buffer, headers.len() as i64);
        for (name, value) in headers {
            put_bytes(buffer, Some(name.as_bytes()));
            put_bytes(buffer, *value);
        }
        self.base_timestamp = base_timestamp;
        self.max_timestamp = self.max_timestamp.max(timestamp);
        self.count += 1;
        Ok(())
    }

    /// Bytes of the batch as it stands, header included, uncompressed.
    pub fn len_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Records pushed.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// True before the first push.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Ends the batch. One without records is well-formed, but [`super::validate()`] refuses it.
    pub fn finish(mut self) -> BytesMut {
        let mut attributes = 0;
        if self.compression == Compression::Lz4
            && let Some(compressed) = compression::compress_lz4(&self.buffer[HEADER_LEN..])
        {
            self.buffer.truncate(HEADER_LEN);
            self.buffer.extend_from_slice(&compressed);
            attributes = Compression::Lz4.bits();
        }
        let header = BatchHeader {
            base_offset: 0,
            // Computed by `seal`, as is the CRC.
            length: 0,
            partition_epoch: -1,
            crc: 0,
            attributes,
            last_offset_delta: self.count.saturating_sub(1),
            base_timestamp: self.base_timestamp,
            max_timestamp: if self.count == 0 { self.base_timestamp } else { self.max_timestamp },
            producer_id: self.producer_id,
            producer_epoch: self.producer_epoch,
            base_sequence: self.base_sequence,
            record_count: self.count,
        };
        header.seal(&mut self.buffer);
        self.buffer
    }
}

/// The most bytes that a record with this content adds to a batch.
pub fn record_size(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[(&str, Option<&[u8]>)]) -> usize {
    // i64::MIN and i32::MAX take the most bytes as deltas.
    let body = body_len(i64::MIN, i32::MAX as u32, key, value, headers);
    varint::len(body as i64) + body
}

fn body_len(
    timestamp_delta: i64,
    offset_delta: u32,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    headers: &[(&str, Option<&[u8]>)],
) -> usize {
    let attributes = 1;
    let fixed = attributes + varint::len(timestamp_delta) + varint::len(i64::from(offset_delta));
    let headers_len: usize =
        headers.iter().map(|(name, value)| bytes_len(Some(name.as_bytes())) + bytes_len(*value)).sum();
    fixed + bytes_len(key) + bytes_len(value) + varint::len(headers.len() as i64) + headers_len
}

fn bytes_len(bytes: Option<&[u8]>) -> usize {
    bytes.map_or(varint::len(-1), |bytes| varint::len(bytes.len() as i64) + bytes.len())
}

fn put_bytes(buffer: &mut BytesMut, bytes: Option<&[u8]>) {
    match bytes {
        None => varint::put(buffer, -1),
        Some(bytes) => {
            varint::put(buffer, bytes.len() as i64);
            buffer.extend_from_slice(bytes);
        }
    }
}
