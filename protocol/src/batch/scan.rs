//! A cheap look at every record of a batch: place, time, key and size, without touching values and headers.

use std::borrow::Cow;

use super::compression;
use super::error::BatchError;
use super::header::{BatchHeader, MAX_BATCH_BYTES};
use super::record::Walk;

/// What can be said of a record without copying any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordMeta<'a> {
    pub offset: u64,
    /// Unix milliseconds.
    pub timestamp: i64,
    pub key: Option<&'a [u8]>,
    /// True when the record has no value.
    pub tombstone: bool,
    /// Bytes that the record takes in an uncompressed batch.
    pub size: u32,
}

/// Opens a batch for a look at its records, `for meta in &scan(batch)? { … }`: borrowed from the batch, or from an
/// uncompressed copy (up to [`MAX_BATCH_BYTES`]) that the scan owns. Does not check the CRC.
///
/// # Errors
/// A malformed header, an incomplete batch, an unsupported codec, damaged or too much compressed data.
pub fn scan(batch: &[u8]) -> Result<Scan<'_>, BatchError> {
    let header = BatchHeader::parse(batch)?;
    let records = compression::open(batch, &header, MAX_BATCH_BYTES)?;
    Ok(Scan { header, records })
}

/// An opened batch; see [`scan`].
#[derive(Clone, Debug)]
pub struct Scan<'a> {
    header: BatchHeader,
    records: Cow<'a, [u8]>,
}

impl Scan<'_> {
    /// The header of the batch.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The records in the order of their offsets.
    pub fn iter(&self) -> ScanIter<'_> {
        ScanIter { header: &self.header, walk: Walk::new(&self.header, &self.records) }
    }
}

impl<'s> IntoIterator for &'s Scan<'_> {
    type Item = Result<RecordMeta<'s>, BatchError>;
    type IntoIter = ScanIter<'s>;

    fn into_iter(self) -> ScanIter<'s> {
        self.iter()
    }
}

/// Ends after the first error.
#[derive(Clone, Debug)]
pub struct ScanIter<'s> {
    header: &'s BatchHeader,
    walk: Walk<'s>,
}

impl<'s> Iterator for ScanIter<'s> {
    type Item = Result<RecordMeta<'s>, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        Some(self.walk.next()?.map(|raw| RecordMeta {
            offset: self.header.base_offset + u64::from(raw.offset_delta),
            timestamp: self.header.timestamp(raw.timestamp_delta),
            key: raw.key,
            tombstone: raw.value.is_none(),
            size: raw.encoded.len() as u32,
        }))
    }
}

impl std::iter::FusedIterator for ScanIter<'_> {}
