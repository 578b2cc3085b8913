//! Why bytes are not an acceptable batch.

/// What is wrong with a batch. None of these goes away by trying again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("the batch ends after {have} bytes, {needed} are needed")]
    Truncated { needed: usize, have: usize },
    #[error("{0} bytes are left over after the last record")]
    TrailingBytes(usize),
    #[error("record format {0} is not supported, only 2 is")]
    Magic(u8),
    #[error("the header's {0} is impossible")]
    Header(&'static str),
    #[error("wrong CRC: {stated:#010x} stated, {computed:#010x} computed")]
    Crc { stated: u32, computed: u32 },
    #[error("attributes {0:#06x} are not allowed here")]
    Attributes(u16),
    #[error("compression {0} is not supported")]
    Compression(&'static str),
    #[error("the compressed records are damaged: {0}")]
    Decompress(String),
    #[error("a batch of {bytes} bytes (uncompressed) is over the limit of {limit}")]
    TooLarge { bytes: u64, limit: u32 },
    #[error("the batch holds no record")]
    Empty,
    #[error("record {index} of {bytes} bytes is over the limit of {limit}")]
    RecordTooLarge { index: u32, bytes: u64, limit: u32 },
    #[error("record {index} has {count} headers, over the limit of {limit}")]
    TooManyHeaders { index: u32, count: u32, limit: u32 },
    #[error("record {index} is malformed: {fault}")]
    Record { index: u32, fault: RecordFault },
    #[error("the offsets of {count} records do not fill a range of {range}")]
    Sparse { count: u32, range: u64 },
    #[error("max_timestamp is {stated}, the latest record's is {actual}")]
    MaxTimestamp { stated: i64, actual: i64 },
    #[error("a batch at {base_offset} cannot reach to offset {last_offset}")]
    Range { base_offset: u64, last_offset: u64 },
    #[error("offset {0} is not in the batch, or the offsets asked for do not ascend")]
    NoSuchOffset(u64),
}

/// What is wrong with one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    #[error("it ends early")]
    Truncated,
    #[error("a number is longer than its type")]
    Varint,
    #[error("a length is negative or reaches beyond the record")]
    Length,
    #[error("its offset does not follow the one before within the batch's range")]
    Offset,
    #[error("the header count is impossible")]
    HeaderCount,
    #[error("a header name is not UTF-8")]
    HeaderName,
    #[error("bytes follow its last field")]
    TrailingBytes,
}
