//! Compression of the records of a batch.

use std::borrow::Cow;
use std::io::{BufRead, Write};

use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};

use super::error::BatchError;
use super::header::{BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};

/// How a batch's records are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    #[default]
    None,
    Lz4,
}

/// Every codec that the format has a number for.
#[derive(Clone, Copy)]
pub(super) enum Codec {
    Supported(Compression),
    Unsupported(&'static str),
}

impl Codec {
    pub(super) fn from_bits(bits: u16) -> Self {
        match bits {
            0 => Self::Supported(Compression::None),
            1 => Self::Unsupported("gzip"),
            2 => Self::Unsupported("snappy"),
            3 => Self::Supported(Compression::Lz4),
            4 => Self::Unsupported("zstd"),
            _ => Self::Unsupported("of an unknown codec"),
        }
    }

    pub(super) fn supported(self) -> Result<Compression, BatchError> {
        match self {
            Self::Supported(compression) => Ok(compression),
            Self::Unsupported(name) => Err(BatchError::Compression(name)),
        }
    }
}

impl Compression {
    pub(super) fn bits(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Lz4 => 3,
        }
    }
}

/// Magic number of an LZ4 frame, little-endian.
const LZ4_MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];
/// In the flags, which follow the magic number: no block refers to another one. Kafka's clients read nothing else.
const LZ4_INDEPENDENT_BLOCKS: u8 = 1 << 5;

/// The uncompressed records of `batch`, whose header is `header`. With the header they may take `limit` bytes.
pub(super) fn open<'a>(
    batch: &'a [u8],
    header: &BatchHeader,
    limit: u32,
) -> Result<Cow<'a, [u8]>, BatchError> {
    let length = header.length as usize;
    if batch.len() < length {
        return Err(BatchError::Truncated { needed: length, have: batch.len() });
    }
    let body = &batch[HEADER_LEN..length];
    match header.compression()? {
        Compression::None => Ok(Cow::Borrowed(body)),
        Compression::Lz4 => decompress_lz4(body, limit.min(MAX_BATCH_BYTES)).map(Cow::Owned),
    }
}

fn decompress_lz4(body: &[u8], limit: u32) -> Result<Vec<u8>, BatchError> {
    // The decoder would also take the legacy format and linked blocks, which no Kafka client could read later.
    match body.strip_prefix(&LZ4_MAGIC) {
        Some([flags, ..]) if flags & LZ4_INDEPENDENT_BLOCKS != 0 => {}
        _ => return Err(BatchError::Decompress("not an LZ4 frame of independent blocks".to_owned())),
    }
    let room = (limit as usize).saturating_sub(HEADER_LEN);
    // Grows with what comes out: a frame's own claim of its size is not believed.
    let mut records = Vec::with_capacity(room.min(body.len().saturating_mul(2)));
    let mut decoder = FrameDecoder::new(body);
    loop {
        let block = decoder.fill_buf().map_err(|error| BatchError::Decompress(error.to_string()))?;
        let read = block.len();
        if read == 0 {
            break;
        }
        let total = records.len() + read;
        if total > room {
            return Err(BatchError::TooLarge { bytes: (HEADER_LEN + total) as u64, limit });
        }
        records.extend_from_slice(block);
        decoder.consume(read);
    }
    if !decoder.get_ref().is_empty() {
        return Err(BatchError::Decompress("bytes follow the LZ4 frame".to_owned()));
    }
    Ok(records)
}

/// `records` as an LZ4 frame, or `None` when that would not be smaller.
pub(super) fn compress_lz4(records: &[u8]) -> Option<Vec<u8>> {
    let info = FrameInfo::new().block_mode(BlockMode::Independent).block_size(BlockSize::Max64KB);
    let mut encoder = FrameEncoder::with_frame_info(info, Vec::with_capacity(records.len() / 2));
    // Writing to memory does not fail; if it did, uncompressed records are as good.
    encoder.write_all(records).ok()?;
    let compressed = encoder.finish().ok()?;
    (compressed.len() < records.len()).then_some(compressed)
}
