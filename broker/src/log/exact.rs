//! Reading records one by one, by their offsets: what was leased is seldom all of a batch.

use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchError, BatchHeader};

use super::error::ReadError;
use super::segment::PlacedBatch;
use super::view::ReadView;

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
        exactly(offsets, |offset, max_bytes| self.reread_memory(offset, max_bytes))
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
        let on_disk = self.on_disk_thread(move |view| {
            Ok(exactly(&offsets, |offset, max_bytes| view.read_kept(offset, max_bytes).map(Some)))
        });
        // Every read answers, so there is something.
        on_disk.await.map_err(|cause| ExactReadError::Read { offset, cause })?.map(Option::unwrap_or_default)
    }
}

/// `read` gives the batches from an offset on, up to so many bytes, or `None` where it cannot say.
fn exactly(
    offsets: &[u64],
    read: impl Fn(u64, usize) -> Result<Option<Vec<PlacedBatch>>, ReadError>,
) -> Result<Option<Vec<Bytes>>, ExactReadError> {
    let span = offsets.last().zip(offsets.first()).map_or(0, |(last, first)| last - first);
    // Of records that lie far apart, one batch at a time.
    let max_bytes = if span / 4 < offsets.len() as u64 { READ_BYTES } else { 0 };
    let mut found = Vec::new();
    let mut rest = offsets;
    while let Some(&offset) = rest.first() {
        let batches = match read(offset, max_bytes) {
            Ok(Some(batches)) => batches,
            Ok(None) => return Ok(None),
            Err(cause) => return Err(ExactReadError::Read { offset, cause }),
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
