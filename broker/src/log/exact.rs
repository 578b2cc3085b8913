//! Reading records one by one, by their offsets: what was leased is seldom all of a batch.

use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchError, BatchHeader};

use super::error::ReadError;
use super::segment::PlacedBatch;
use super::view::{ReadView, Reader};

/// Bytes read at a time. Small, because leased records may lie far apart.
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
        exactly(offsets, |offset| self.read_memory(Reader::ShareGroup, offset, READ_BYTES))
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
            Ok(exactly(&offsets, |offset| view.read_placed(Reader::ShareGroup, offset, READ_BYTES).map(Some)))
        });
        // Every read answers, so there is something.
        on_disk.await.map_err(|cause| ExactReadError::Read { offset, cause })?.map(Option::unwrap_or_default)
    }
}

/// `read` gives the batches from an offset on, or `None` where it cannot say.
fn exactly(
    offsets: &[u64],
    read: impl Fn(u64) -> Result<Option<Vec<PlacedBatch>>, ReadError>,
) -> Result<Option<Vec<Bytes>>, ExactReadError> {
    let mut found = Vec::new();
    let mut rest = offsets;
    while let Some(&offset) = rest.first() {
        let batches = match read(offset) {
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
