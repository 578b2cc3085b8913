//! Reading records one by one, by their offsets: what was leased is seldom all of a batch.

use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchError, BatchHeader};

use super::error::ReadError;
use super::segment::PlacedBatch;
use super::view::{ReadView, Reread};

/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;

/// Why the records at given offsets cannot all be read.
#[derive(Debug, thiserror::Error)]
pub enum ExactReadError {
    #[error("offset {offset}: {cause}")]
    Read { offset: u64, cause: ReadError },
    #[error("offset {offset}: {cause}")]
    Batch { offset: u64, cause: BatchError },
    #[error("offset {offset} is not there")]
    Missing { offset: u64 },
}

impl ExactReadError {
    /// The record that could not be read, or the first of those in its batch.
    pub fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Batch { offset, .. } | Self::Missing { offset } => *offset,
        }
    }
}

impl ReadView {
    /// The records at `offsets` (ascending), as batches that hold nothing else, also below the log start as far as they are kept;
    /// `None` when the disk must be asked for one of them. Never blocks.
    ///
    /// # Errors
    /// One of them cannot be read; which, and why.
    pub fn read_exactly_from_memory(&self, offsets: &[u64]) -> Result<Option<Vec<Bytes>>, ExactReadError> {
        self.exactly(offsets, Depth::Memory)
    }

    /// As [`Self::read_exactly_from_memory`], reading from disk what is not in memory, on one of a bounded number of
    /// threads. Dropping the future is safe; but it must be polled until it ends or is dropped: others wait for its thread.
    ///
    /// # Errors
    /// One of the records cannot be read; which, and why.
    pub async fn read_exactly(self: &Arc<Self>, offsets: Vec<u64>) -> Result<Vec<Bytes>, ExactReadError> {
        let Some(&offset) = offsets.first() else { return Ok(Vec::new()) };
        if let Some(found) = self.read_exactly_from_memory(&offsets)? {
            return Ok(found);
        }
        let on_disk = self.on_disk_thread(move |view| Ok(view.exactly(&offsets, Depth::Disk)));
        // On disk there is an answer to everything.
        on_disk.await.map_err(|cause| ExactReadError::Read { offset, cause })?.map(Option::unwrap_or_default)
    }

    fn exactly(&self, offsets: &[u64], depth: Depth) -> Result<Option<Vec<Bytes>>, ExactReadError> {
        let span = offsets.last().zip(offsets.first()).map_or(0, |(last, first)| last - first);
        let close = span / 4 < offsets.len() as u64;
        let mut found = Vec::new();
        let mut rest = offsets;
        while let Some(&offset) = rest.first() {
            let part =
                self.part(rest, close, depth).map_err(|cause| ExactReadError::Read { offset, cause })?;
            let batches = match part {
                Some(Part::Batches(batches)) => batches,
                Some(Part::Records(records, count)) => {
                    found.push(records);
                    rest = &rest[count..];
                    continue;
                }
                None => return Ok(None),
            };
            let before = rest.len();
            for batch in batches {
                let corrupt = |cause| ExactReadError::Batch { offset, cause };
                let header = BatchHeader::parse(&batch.bytes).map_err(corrupt)?;
                let within = rest.partition_point(|offset| *offset <= header.last_offset());
                if within > 0 {
                    let (wanted, later) = rest.split_at(within);
                    found.push(batch::filter(&batch.bytes, wanted).map_err(corrupt)?);
                    rest = later;
                }
            }
            if rest.len() == before {
                return Err(ExactReadError::Missing { offset });
            }
        }
        Ok(Some(found))
    }

    /// Something with the first of `offsets`; `None` when it is on disk and that is too deep.
    fn part(&self, offsets: &[u64], close: bool, depth: Depth) -> Result<Option<Part>, ReadError> {
        let Some(&offset) = offsets.first() else { return Ok(None) };
        // Of records that lie far apart, one batch at a time.
        let max_bytes = if close { READ_BYTES } else { 0 };
        match (self.reread_memory(offset, max_bytes)?, depth) {
            (Some(Reread::Batches(batches)), _) => return Ok(Some(Part::Batches(batches))),
            (_, Depth::Memory) => return Ok(None),
            (Some(Reread::Places(places)), Depth::Disk) => {
                // Whatever is wrong: what follows finds it out and says so.
                if let Some(few) = places.few(offsets)
                    && let Ok(records) = places.read(&self.context().files, few)
                {
                    return Ok(Some(Part::Records(records, few.len())));
                }
            }
            (None, Depth::Disk) => {}
        }
        let batches =
            if close { self.read_kept(offset, max_bytes) } else { self.read_keeping_places(offset) };
        batches.map(|batches| Some(Part::Batches(batches)))
    }
}

/// How far to go for records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    Memory,
    Disk,
}

#[derive(Debug)]
enum Part {
    Batches(Vec<PlacedBatch>),
    /// A batch of what was asked for first, so many.
    Records(Bytes, usize),
}
