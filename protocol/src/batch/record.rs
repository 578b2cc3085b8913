//! The records of a batch, one after the other: the borrowed walk that everything is built on, and owned records.
//!
//! The walk is forced inline for the reason given in `varint`.

use bytes::Bytes;

use super::compression;
use super::error::{BatchError, RecordFault};
use super::header::{BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};
use super::varint::{take_i32, take_i64};

/// A record as it lies in the batch; its headers are not taken apart yet.
#[derive(Clone, Copy)]
pub(super) struct RawRecord<'a> {
    /// All of it, the length field included.
    pub encoded: &'a [u8],
    pub timestamp_delta: i64,
    pub offset_delta: u32,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub header_count: u32,
    headers: &'a [u8],
}

impl<'a> RawRecord<'a> {
    #[inline(always)]
    fn take(input: &mut &'a [u8]) -> Result<Self, RecordFault> {
        let start = *input;
        let length = usize::try_from(take_i32(input)?).map_err(|_| RecordFault::Length)?;
        let (mut body, rest) = input.split_at_checked(length).ok_or(RecordFault::Truncated)?;
        *input = rest;
        let encoded = &start[..start.len() - rest.len()];
        // Attributes: none are defined.
        body = body.get(1..).ok_or(RecordFault::Truncated)?;
        let timestamp_delta = take_i64(&mut body)?;
        let offset_delta = u32::try_from(take_i32(&mut body)?).map_err(|_| RecordFault::Offset)?;
        let key = take_bytes(&mut body)?;
        let value = take_bytes(&mut body)?;
        let header_count = u32::try_from(take_i32(&mut body)?).map_err(|_| RecordFault::HeaderCount)?;
        if header_count == 0 && !body.is_empty() {
            return Err(RecordFault::TrailingBytes);
        }
        // A header takes two bytes at least, so a count beyond that is a lie.
        if header_count as usize > body.len() / 2 {
            return Err(RecordFault::HeaderCount);
        }
        Ok(Self { encoded, timestamp_delta, offset_delta, key, value, header_count, headers: body })
    }

    /// Calls `each` with every header's name and value.
    #[inline]
    pub(super) fn for_each_header(
        &self,
        mut each: impl FnMut(&'a str, Option<&'a [u8]>),
    ) -> Result<(), RecordFault> {
        let mut rest = self.headers;
        for _ in 0..self.header_count {
            let name = take_bytes(&mut rest)?.ok_or(RecordFault::Length)?;
            let name = str::from_utf8(name).map_err(|_| RecordFault::HeaderName)?;
            each(name, take_bytes(&mut rest)?);
        }
        if rest.is_empty() { Ok(()) } else { Err(RecordFault::TrailingBytes) }
    }

    /// Bytes of key, value, header names and header values: what a limit on records is about.
    #[inline]
    pub(super) fn content_len(&self) -> Result<u64, RecordFault> {
        let len = |part: Option<&[u8]>| part.map_or(0, |bytes| bytes.len() as u64);
        let mut total = len(self.key) + len(self.value);
        self.for_each_header(|name, value| total += name.len() as u64 + len(value))?;
        Ok(total)
    }
}

#[inline(always)]
fn take_bytes<'a>(input: &mut &'a [u8]) -> Result<Option<&'a [u8]>, RecordFault> {
    let length = take_i32(input)?;
    if length == -1 {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| RecordFault::Length)?;
    let (bytes, rest) = input.split_at_checked(length).ok_or(RecordFault::Length)?;
    *input = rest;
    Ok(Some(bytes))
}

/// Walks uncompressed records, checking that they are as many as the header says, in ascending offsets within its range,
/// and nothing after them. Ends after the first error.
#[derive(Clone, Debug)]
pub(super) struct Walk<'a> {
    rest: &'a [u8],
    pub(super) state: WalkState,
}

/// Where a walk is, apart from the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalkState {
    index: u32,
    count: u32,
    /// Smallest delta that the next record may have.
    next_delta: u32,
    last_delta: u32,
    ended: bool,
}

impl WalkState {
    pub(super) fn new(header: &BatchHeader) -> Self {
        Self {
            index: 0,
            count: header.record_count,
            next_delta: 0,
            last_delta: header.last_offset_delta,
            ended: false,
        }
    }

    /// Takes the next record off the front of `rest`.
    #[inline(always)]
    pub(super) fn next<'a>(&mut self, rest: &mut &'a [u8]) -> Option<Result<RawRecord<'a>, BatchError>> {
        if self.ended {
            return None;
        }
        if self.index == self.count {
            self.ended = true;
            return (!rest.is_empty()).then_some(Err(BatchError::TrailingBytes(rest.len())));
        }
        let record = RawRecord::take(rest).and_then(|record| {
            if record.offset_delta < self.next_delta || record.offset_delta > self.last_delta {
                return Err(RecordFault::Offset);
            }
            Ok(record)
        });
        match record {
            Ok(record) => {
                // Below 2^31, so one more fits.
                self.next_delta = record.offset_delta + 1;
                self.index += 1;
                Some(Ok(record))
            }
            Err(fault) => {
                self.ended = true;
                Some(Err(BatchError::Record { index: self.index, fault }))
            }
        }
    }

    /// The error of the record that was returned last.
    pub(super) fn fault(&mut self, fault: RecordFault) -> BatchError {
        self.ended = true;
        BatchError::Record { index: self.index.saturating_sub(1), fault }
    }
}

impl<'a> Walk<'a> {
    pub(super) fn new(header: &BatchHeader, records: &'a [u8]) -> Self {
        Self { rest: records, state: WalkState::new(header) }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<RawRecord<'a>, BatchError>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        self.state.next(&mut self.rest)
    }
}

/// A header of a record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    pub name: String,
    pub value: Option<Bytes>,
}

/// A record with its place in the partition. Shares the memory of the batch, or of its uncompressed copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub offset: u64,
    /// Unix milliseconds.
    pub timestamp: i64,
    pub key: Option<Bytes>,
    /// Absent: a tombstone.
    pub value: Option<Bytes>,
    pub headers: Vec<Header>,
}

/// The records of one batch, decompressed when needed (up to [`MAX_BATCH_BYTES`]). Does not check the CRC.
///
/// # Errors
/// A malformed header, an incomplete batch, an unsupported codec, damaged or too much compressed data.
pub fn records(batch: &Bytes) -> Result<Records, BatchError> {
    let header = BatchHeader::parse(batch)?;
    let body = match compression::open(batch, &header, MAX_BATCH_BYTES)? {
        std::borrow::Cow::Borrowed(_) => batch.slice(HEADER_LEN..header.length as usize),
        std::borrow::Cow::Owned(records) => Bytes::from(records),
    };
    Ok(Records { state: WalkState::new(&header), header, position: 0, body })
}

/// Owned records in the order of their offsets; ends after the first error.
#[derive(Clone, Debug)]
pub struct Records {
    header: BatchHeader,
    body: Bytes,
    position: usize,
    state: WalkState,
}

impl Records {
    /// The header of the batch.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }
}

impl Iterator for Records {
    type Item = Result<Record, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut rest = &self.body[self.position..];
        let raw = match self.state.next(&mut rest)? {
            Ok(raw) => raw,
            Err(error) => return Some(Err(error)),
        };
        self.position = self.body.len() - rest.len();
        let owned = |bytes: Option<&[u8]>| bytes.map(|bytes| self.body.slice_ref(bytes));
        let mut headers = Vec::new();
        // Most records have none.
        let walked = if raw.header_count == 0 {
            Ok(())
        } else {
            // The count was checked against the bytes that are there.
            headers.reserve_exact(raw.header_count as usize);
            raw.for_each_header(|name, value| {
                headers.push(Header { name: name.to_owned(), value: owned(value) });
            })
        };
        Some(match walked {
            Ok(()) => Ok(Record {
                offset: self.header.base_offset + u64::from(raw.offset_delta),
                timestamp: self.header.timestamp(raw.timestamp_delta),
                key: owned(raw.key),
                value: owned(raw.value),
                headers,
            }),
            Err(fault) => Err(self.state.fault(fault)),
        })
    }
}

impl std::iter::FusedIterator for Records {}
