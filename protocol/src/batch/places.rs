//! Where the records of a batch stand, so that a few of them can be read from a file without the others.
//!
//! The CRC of a batch is of no use to who reads a part of it, so each record has its own here, taken from the whole batch.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::compression::Compression;
use super::error::BatchError;
use super::filter::seal_part;
use super::header::{BatchHeader, HEADER_LEN};
use super::record::{RawRecord, Walk};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Where the record ends, counted from the start of the batch; it begins where the one before ends.
    end: u32,
    /// CRC-32C of its bytes.
    crc: u32,
    timestamp: i64,
}

/// The places of the records of one uncompressed batch without gaps between its offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordPlaces {
    header: BatchHeader,
    places: Box<[Place]>,
}

impl RecordPlaces {
    /// Looks at every record of `batch`, whose CRC the caller has checked. `None` when its records cannot be read one by one:
    /// they are compressed, or there are gaps between their offsets.
    ///
    /// # Errors
    /// A malformed batch.
    pub fn of(batch: &[u8]) -> Result<Option<Self>, BatchError> {
        let header = BatchHeader::parse(batch)?;
        let dense = u64::from(header.record_count) == u64::from(header.last_offset_delta) + 1;
        if !dense || header.compression()? != Compression::None {
            return Ok(None);
        }
        let needed = header.length as usize;
        let truncated = BatchError::Truncated { needed, have: batch.len() };
        let records = batch.get(HEADER_LEN..needed).ok_or(truncated)?;
        let mut end = HEADER_LEN as u32;
        let place = |record: Result<RawRecord<'_>, BatchError>| {
            let record = record?;
            // Within the batch, whose length is a `u32`.
            end += record.encoded.len() as u32;
            let timestamp = header.timestamp(record.timestamp_delta);
            Ok(Place { end, crc: crc32c::crc32c(record.encoded), timestamp })
        };
        let places = Walk::new(&header, records).map(place).collect::<Result<_, BatchError>>()?;
        Ok(Some(Self { header, places }))
    }

    /// The header of the batch.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Bytes of memory, roughly.
    pub fn memory(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.places)
    }

    /// As [`super::filter()`] on the whole batch, except that never the batch itself is returned. Asks `read` to fill a buffer
    /// with the bytes of the batch from a position on, once for records that follow each other.
    ///
    /// # Errors
    /// Those of `read`; [`BatchError::NoSuchOffset`] and [`BatchError::Empty`] as there; [`BatchError::Crc`] when what was read
    /// are not the bytes that stood there.
    pub fn filter<E: From<BatchError>>(
        &self,
        offsets: &[u64],
        mut read: impl FnMut(u32, &mut [u8]) -> Result<(), E>,
    ) -> Result<Bytes, E> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &offset in offsets {
            let at = self.index(offset).ok_or(BatchError::NoSuchOffset(offset))?;
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                Some(run) if run.end > at => return Err(BatchError::NoSuchOffset(offset).into()),
                _ => runs.push(at..at + 1),
            }
        }
        if runs.is_empty() {
            return Err(BatchError::Empty.into());
        }
        let length: u32 = runs.iter().map(|run| self.span(run)).map(|span| span.end - span.start).sum();
        let mut kept = BytesMut::zeroed(HEADER_LEN + length as usize);
        let mut max_timestamp = i64::MIN;
        let mut rest = &mut kept[HEADER_LEN..];
        for run in runs {
            let span = self.span(&run);
            let (mut records, later) = rest.split_at_mut((span.end - span.start) as usize);
            read(span.start, records)?;
            for at in run {
                let span = self.span(&(at..at + 1));
                let (record, following) = records.split_at_mut((span.end - span.start) as usize);
                max_timestamp = max_timestamp.max(self.check(at, record)?);
                records = following;
            }
            rest = later;
        }
        // No more than the batch has, for each was found there.
        Ok(seal_part(&self.header, kept, offsets.len() as u32, max_timestamp))
    }

    fn index(&self, offset: u64) -> Option<usize> {
        let at = usize::try_from(offset.checked_sub(self.header.base_offset)?).ok()?;
        (at < self.places.len()).then_some(at)
    }

    /// Bytes of records within the batch.
    fn span(&self, run: &Range<usize>) -> Range<u32> {
        let end_before = |at: usize| at.checked_sub(1).map_or(HEADER_LEN as u32, |at| self.places[at].end);
        end_before(run.start)..end_before(run.end)
    }

    /// The timestamp of a record, if these are its bytes.
    fn check(&self, at: usize, record: &[u8]) -> Result<i64, BatchError> {
        let place = &self.places[at];
        let (stated, computed) = (place.crc, crc32c::crc32c(record));
        if stated == computed { Ok(place.timestamp) } else { Err(BatchError::Crc { stated, computed }) }
    }
}
