//! Reading the batches of one segment from disk, and proving that they are the ones that were written.
//!
//! The base offset, the length and the epoch of a batch lie outside its CRC. They are vouched for by the chain: each
//! batch begins where the one before ends, each block where the index says, and offsets follow each other. A hole
//! between offsets is legal only where the epoch rises, and ends at a multiple of [`RESUME_STEP`]: so the engine resumes after a
//! crash took records that it had not promised to keep. Where the last batch ends is known from the engine.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{self, BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};
use tracing::error;

use super::error::ReadError;
use super::files::SegmentFiles;
use super::index::{Block, Index};
use super::segment::Segment;
use crate::disk::DiskFile;
use crate::engine::effect::SegmentName;
use crate::engine::types::RESUME_STEP;
use crate::plants::planted;

/// Most bytes asked of the disk at once, unless a single batch is larger: it is memory of its reader.
const MAX_AHEAD: usize = 4 * 1024 * 1024;
/// Bytes asked of the disk at once when a whole segment is read.
const REBUILD_AHEAD: usize = 256 * 1024;

/// Bytes of a segment below an end, read in chunks.
struct Chunks<'a> {
    files: &'a SegmentFiles,
    name: SegmentName,
    file: Arc<dyn DiskFile>,
    /// Exclusive; nothing at or beyond it is looked at.
    end: u64,
    chunk: Bytes,
    chunk_position: u64,
}

impl<'a> Chunks<'a> {
    fn open(files: &'a SegmentFiles, name: SegmentName, end: u64) -> Result<Self, ReadError> {
        let file = files.open(name).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => files.corrupt(name, 0, name.base_offset, "the file is missing"),
            _ => files.io(name, error),
        })?;
        Ok(Self { files, name, file, end, chunk: Bytes::new(), chunk_position: 0 })
    }

    /// `length` bytes at `position`, which must end at or before `end`. Reads `ahead` bytes if it must read.
    fn bytes(&mut self, position: u64, length: usize, ahead: usize, offset: u64) -> Result<Bytes, ReadError> {
        if let Some(at) = position.checked_sub(self.chunk_position)
            && at + length as u64 <= self.chunk.len() as u64
        {
            let at = at as usize;
            return Ok(self.chunk.slice(at..at + length));
        }
        let available = self.end.saturating_sub(position);
        let wanted = (length.max(ahead.min(MAX_AHEAD)) as u64).min(available);
        let mut buffer = BytesMut::zeroed(wanted as usize);
        let read =
            self.file.read_full_at(&mut buffer, position).map_err(|error| self.files.io(self.name, error))?;
        buffer.truncate(read);
        self.chunk = buffer.freeze();
        self.chunk_position = position;
        if self.chunk.len() < length {
            return Err(self.files.corrupt(self.name, position, offset, "the file ends within a batch"));
        }
        Ok(self.chunk.slice(..length))
    }
}

/// Checks that each batch follows the one before it.
struct Chain {
    /// Offset that must come next.
    next_offset: u64,
    /// Epoch of the batch before; none at a start that the index vouches for.
    epoch: Option<i32>,
}

impl Chain {
    /// Says what is wrong if the batch may not come next.
    fn check(&self, header: &BatchHeader) -> Result<(), String> {
        let next = self.next_offset;
        let resumed = header.base_offset > next
            && header.base_offset.is_multiple_of(RESUME_STEP)
            && self.epoch.is_some_and(|epoch| header.partition_epoch > epoch);
        if header.base_offset == next || resumed {
            Ok(())
        } else {
            Err(format!("offset {next} was expected, {} found", header.base_offset))
        }
    }

    fn follow(&mut self, header: &BatchHeader) {
        self.next_offset = header.last_offset() + 1;
        self.epoch = Some(header.partition_epoch);
    }
}

/// Walks the batches of a segment from the start of a block on.
pub(super) struct Walker<'a> {
    segment: &'a Segment,
    chunks: Chunks<'a>,
    block: Block,
    position: u64,
    chain: Chain,
    /// The batch before was passed over although its CRC is wrong. What is wrong may be its last offset, so that it is
    /// passed over wrongly; only a batch that follows it exactly shows that it is not.
    doubt: Option<ReadError>,
}

impl<'a> Walker<'a> {
    /// Stops at `end`, which must be written and indexed.
    pub(super) fn new(
        files: &'a SegmentFiles,
        segment: &'a Segment,
        block: Block,
        end: u64,
    ) -> Result<Self, ReadError> {
        let chunks = Chunks::open(files, segment.name(), end)?;
        let chain = Chain { next_offset: block.offset, epoch: None };
        Ok(Self { segment, chunks, block, position: block.position, chain, doubt: None })
    }

    /// Position of the next batch.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The header of the next batch, its place checked, its CRC not; `None` at the end. Reads `ahead` bytes if it must.
    pub(super) fn peek(&mut self, ahead: usize) -> Result<Option<BatchHeader>, ReadError> {
        if let Some(doubt) = self.doubt.take() {
            return match self.peek_next(ahead) {
                Ok(Some(header)) if header.base_offset == self.chain.next_offset => Ok(Some(header)),
                _ => Err(doubt),
            };
        }
        self.peek_next(ahead)
    }

    fn peek_next(&mut self, ahead: usize) -> Result<Option<BatchHeader>, ReadError> {
        if self.position >= self.chunks.end {
            return Ok(None);
        }
        if self.position == self.block.end {
            let block = self.segment.block_at(self.chunks.files, self.position)?;
            self.block = block.ok_or_else(|| self.corrupt("the index knows no batch here"))?;
        }
        let header = self.chunks.bytes(self.position, HEADER_LEN, ahead, self.chain.next_offset)?;
        let header = BatchHeader::parse(&header).map_err(|error| self.corrupt(error.to_string()))?;
        // No batch spans two blocks, so a damaged length never makes us read more than a block.
        if !fits(&header, self.position, self.block.end) {
            return Err(self.corrupt(format!("a batch of {} bytes does not fit here", header.length)));
        }
        if self.position == self.block.position && header.base_offset != self.block.offset {
            let (found, indexed) = (header.base_offset, self.block.offset);
            return Err(self.corrupt(format!("offset {indexed} is indexed, {found} found")));
        }
        self.chain.check(&header).map_err(|reason| self.corrupt(reason))?;
        Ok(Some(header))
    }

    /// The bytes of the batch that `header` was peeked of, its CRC checked.
    pub(super) fn take(&mut self, header: &BatchHeader, ahead: usize) -> Result<Bytes, ReadError> {
        let length = header.length as usize;
        let bytes = self.chunks.bytes(self.position, length, ahead, header.base_offset)?;
        if !planted("skip-batch-crc") {
            batch::check(&bytes).map_err(|error| self.corrupt(error.to_string()))?;
        }
        self.chain.follow(header);
        self.position += u64::from(header.length);
        Ok(bytes)
    }

    /// Passes over the batch that `header` was peeked of. A damaged payload is no reason to stop here.
    pub(super) fn skip(&mut self, header: &BatchHeader, ahead: usize) -> Result<(), ReadError> {
        match self.take(header, ahead) {
            Ok(_) => {}
            Err(error @ ReadError::Corrupt { .. }) => {
                self.doubt = Some(error);
                self.chain.follow(header);
                self.position += u64::from(header.length);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn corrupt(&self, reason: impl Into<String>) -> ReadError {
        self.chunks.files.corrupt(self.chunks.name, self.position, self.chain.next_offset, reason)
    }
}

/// Whether the batch is of possible length and ends at or before `end`.
fn fits(header: &BatchHeader, position: u64, end: u64) -> bool {
    header.length <= MAX_BATCH_BYTES && position + u64::from(header.length) <= end
}

/// Indexes the first `end` bytes of a segment, all of which are of offsets below `bound`, up to where they make no sense.
///
/// A batch whose CRC is wrong does not hide those behind it, if they follow it exactly.
///
/// # Errors
/// The disk failed. Damage is in the index ([`Index::is_damaged`]), for those who read there.
pub(super) fn rebuild(
    files: &SegmentFiles,
    name: SegmentName,
    end: u64,
    bound: u64,
) -> Result<Index, ReadError> {
    let mut index = Index::starting_at(0, name.base_offset);
    match index_batches(files, name, end, bound, &mut index) {
        Err(error @ ReadError::Corrupt { .. }) => {
            error!(%error, "a segment is damaged");
            index.push_damage(end);
        }
        other => other?,
    }
    Ok(index)
}

fn index_batches(
    files: &SegmentFiles,
    name: SegmentName,
    end: u64,
    bound: u64,
    index: &mut Index,
) -> Result<(), ReadError> {
    let mut chunks = Chunks::open(files, name, end)?;
    // A partition begins with epoch 0: the first batch may stand above the base offset if the epoch was raised before.
    let mut chain = Chain { next_offset: name.base_offset, epoch: Some(0) };
    // A batch with a wrong CRC, until the next one shows that it may be passed over.
    let mut doubted: Option<(BatchHeader, ReadError)> = None;
    let mut position = 0;
    while position < end {
        let mut read = || {
            let offset = chain.next_offset;
            let corrupt = |reason| files.corrupt(name, position, offset, reason);
            let header = chunks.bytes(position, HEADER_LEN, REBUILD_AHEAD, offset)?;
            let header = BatchHeader::parse(&header).map_err(|error| corrupt(error.to_string()))?;
            if !fits(&header, position, end) {
                return Err(corrupt(format!("a batch of {} bytes does not fit here", header.length)));
            }
            chain.check(&header).map_err(corrupt)?;
            let last = header.last_offset();
            if last >= bound {
                return Err(corrupt(format!("offset {last} found, where none reaches {bound}")));
            }
            let bytes = chunks.bytes(position, header.length as usize, REBUILD_AHEAD, offset)?;
            let damage = batch::check(&bytes).err().map(|error| corrupt(error.to_string()));
            Ok((header, damage))
        };
        let (header, damage) = match (read(), doubted.take()) {
            (Ok((header, damage)), Some((before, doubt))) => {
                if header.base_offset != chain.next_offset {
                    return Err(doubt);
                }
                error!(error = %doubt, "a batch is damaged");
                index.push_doubted(before.base_offset, before.last_offset(), u64::from(before.length));
                (header, damage)
            }
            (Err(ReadError::Corrupt { .. }), Some((_, doubt))) => return Err(doubt),
            (read, _) => read?,
        };
        chain.follow(&header);
        position += u64::from(header.length);
        match damage {
            Some(doubt) => doubted = Some((header, doubt)),
            None => {
                index.push(
                    header.base_offset,
                    header.last_offset(),
                    header.max_timestamp,
                    u64::from(header.length),
                );
            }
        }
    }
    doubted.map_or(Ok(()), |(_, doubt)| Err(doubt))
}
