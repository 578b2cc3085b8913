//! Record batches: Kafka's RecordBatch v2 (magic 2), the one form of record data on the wire and on disk.
//!
//! The source of the format is "Record Batch" in the Kafka protocol guide's message format chapter and KIP-98; batches
//! are byte for byte what Kafka's own clients write. Fixed-width numbers are big-endian:
//!
//! ```text
//!  0  i64  base_offset        offset of the first record           ┐
//!  8  i32  length             bytes after this field               │ outside the CRC: the broker fills in
//! 12  i32  partition_epoch    epoch of the partition that took it  │ offset and epoch
//! 16  i8   magic              2                                    │
//! 17  u32  crc                CRC-32C of everything from 21 on     ┘
//! 21  i16  attributes         bits 0–2 compression (0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd), 3 timestamps are the
//!                             broker's append time, 4 transactional, 5 control, 6 base_timestamp is a delete horizon
//! 23  i32  last_offset_delta  last record's offset − base_offset
//! 27  i64  base_timestamp     Unix milliseconds, the first record's
//! 35  i64  max_timestamp      Unix milliseconds
//! 43  i64  producer_id        −1: none
//! 51  i16  producer_epoch     −1: none
//! 53  i32  base_sequence      −1: none; the first record's, later ones follow
//! 57  i32  record_count
//! 61  …    records            compressed as a whole when attributes say so
//! ```
//!
//! A record; `varint` and `varlong` are zigzag, base 128, least significant group first:
//!
//! ```text
//! varint   length           bytes after this field
//! i8       attributes       unused
//! varlong  timestamp_delta  from base_timestamp, modulo 2^64
//! varint   offset_delta     from base_offset
//! varint   key_length       −1: no key;        key
//! varint   value_length     −1: no value;      value
//! varint   header_count     then of each header:
//!   varint   name_length    name, UTF-8
//!   varint   value_length   −1: no value;      value
//! ```
//!
//! LZ4 data is one LZ4 frame of independent blocks. The other codecs are refused by name.
//!
//! **Invariants.** Offset deltas ascend strictly within `0..=last_offset_delta`; they are dense in a batch that a
//! producer sends ([`validate()`]) and may have gaps in one that [`filter()`] or [`compact()`] made. Nothing here panics on foreign bytes,
//! and decompression stops at a limit.
//!
//! ```
//! use felucca_protocol::batch::{self, BatchBuilder, BatchError, BatchLimits};
//!
//! let mut builder = BatchBuilder::new();
//! builder.push(1_700_000_000_000, Some(b"customer-7"), Some(b"order 1"), &[("ce-type", Some(b"OrderCreated"))])?;
//! let mut bytes = builder.finish();
//!
//! let limits = BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 64 };
//! batch::validate(&bytes, &limits)?;
//! batch::assign(&mut bytes, 42, 0);
//!
//! for record in batch::records(&bytes.freeze())? {
//!     assert_eq!(record?.offset, 42);
//! }
//! # Ok::<(), BatchError>(())
//! ```

mod builder;
mod compact;
mod compression;
mod error;
mod filter;
mod header;
mod places;
mod record;
mod scan;
mod validate;
mod varint;

pub use builder::{BatchBuilder, record_size};
pub use compact::compact;
pub use compression::Compression;
pub use error::{BatchError, RecordFault};
pub use filter::filter;
pub use header::{BatchHeader, HEADER_LEN, MAX_BATCH_BYTES, Split, assign, check, set_producer, split};
pub use places::RecordPlaces;
pub use record::{Header, Record, Records, records};
pub use scan::{RecordMeta, Scan, ScanIter, scan};
pub use validate::{BatchLimits, validate};
