//! The sparse index of one segment: where blocks of batches begin, by offset and by time.
//!
//! A *block* is a run of whole batches; a new one begins with the first batch that starts at least [`BLOCK_BYTES`] after
//! the block before it. One entry stands for each block, so that a lookup reads one block and no more.
//!
//! Invariants: the first entry stands at position 0; offsets and positions of entries ascend strictly; no batch spans
//! two blocks, so a batch ends at or before the position of the next entry; `max_before` never falls.
//!
//! An index that is rebuilt from a damaged segment ends at the damage with a block of its own, which stands for everything
//! from there on: so batches before it are found, and whoever looks for anything behind it runs into the damage.
//!
//! # File format, version 1 (integers big-endian)
//!
//! ```text
//!  0  8  magic "FELUCIDX"
//!  8  4  version = 1
//! 12  4  number of entries, n
//! 16  8  base offset of the segment
//! 24  8  end position: bytes of the segment
//! 32  8  end offset: last offset + 1
//! 40  8  greatest timestamp in the segment (i64, Unix ms)
//! 48 24n entries: offset − base offset (u64) · position (u64) · greatest timestamp before the block (i64)
//!  …  4  CRC-32 (IEEE) of all bytes before
//! ```
//!
//! The file is a cache of what the segment says: one that is missing, damaged or of another version is rebuilt from the
//! segment. To change the format, raise the version.

use thiserror::Error;

/// Least distance between two entries in bytes.
pub(super) const BLOCK_BYTES: u64 = 64 * 1024;

const MAGIC: [u8; 8] = *b"FELUCIDX";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    offset: u64,
    position: u64,
    /// Greatest timestamp of the segment's batches before this block; `i64::MIN` for the first.
    max_before: i64,
}

/// Where a block lies: it starts with the batch of base offset `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) offset: u64,
    pub(super) position: u64,
    /// Exclusive.
    pub(super) end: u64,
}

/// Index of the batches in `start_position..end_position` of a segment; of the whole segment when it starts at 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Index {
    entries: Vec<Entry>,
    /// Bytes covered (exclusive end position).
    end_position: u64,
    /// Last offset + 1, or the segment's base offset while it is empty; `u64::MAX` when damage hides it.
    end_offset: u64,
    max_timestamp: i64,
    damaged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum IndexError {
    #[error("not an index file")]
    Magic,
    #[error("index format {0} is not known")]
    Version(u32),
    #[error("wrong checksum")]
    Checksum,
    #[error("does not describe this segment")]
    Mismatch,
}

impl Index {
    /// The index of what is still to be written from `position` on.
    pub(super) fn starting_at(position: u64, offset: u64) -> Self {
        Self {
            entries: Vec::new(),
            end_position: position,
            end_offset: offset,
            max_timestamp: i64::MIN,
            damaged: false,
        }
    }

    pub(super) fn end_position(&self) -> u64 {
        self.end_position
    }

    pub(super) fn end_offset(&self) -> u64 {
        self.end_offset
    }

    /// Greatest timestamp of any batch; `i64::MIN` when empty.
    pub(super) fn max_timestamp(&self) -> i64 {
        self.max_timestamp
    }

    /// Base offset of the first indexed batch.
    pub(super) fn first_offset(&self) -> Option<u64> {
        self.entries.first().map(|entry| entry.offset)
    }

    /// Memory held, in bytes.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + self.entries.len() * size_of::<Entry>()
    }

    /// Whether part of the segment is damaged; such an index is not kept on disk.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// Ends the index with a block that stands for the bytes up to `end_position`, which make no sense.
    pub(super) fn push_damage(&mut self, end_position: u64) {
        self.entries.push(Entry {
            offset: self.end_offset,
            position: self.end_position,
            max_before: self.max_timestamp,
        });
        self.end_position = end_position;
        self.end_offset = u64::MAX;
        self.max_timestamp = i64::MAX;
        self.damaged = true;
    }

    /// Takes in a batch whose header may lie about its time, but not about its place.
    pub(super) fn push_doubted(&mut self, base_offset: u64, last_offset: u64, length: u64) {
        self.push(base_offset, last_offset, i64::MAX, length);
        self.damaged = true;
    }

    /// Takes in the batch that follows the last one.
    pub(super) fn push(&mut self, base_offset: u64, last_offset: u64, max_timestamp: i64, length: u64) {
        let after_damage = self.end_offset == u64::MAX;
        let full = |last: &Entry| self.end_position - last.position >= BLOCK_BYTES;
        if after_damage || self.entries.last().is_none_or(full) {
            let entry =
                Entry { offset: base_offset, position: self.end_position, max_before: self.max_timestamp };
            self.entries.push(entry);
        }
        self.end_position += length;
        self.end_offset = last_offset + 1;
        self.max_timestamp = self.max_timestamp.max(max_timestamp);
    }

    /// Appends what was indexed beyond this one's end.
    pub(super) fn extend(&mut self, later: &Self) {
        debug_assert!(later.entries.first().is_none_or(|first| first.position == self.end_position));
        let before = self.max_timestamp;
        self.entries.extend(
            later.entries.iter().map(|entry| Entry { max_before: entry.max_before.max(before), ..*entry }),
        );
        if !later.entries.is_empty() {
            self.end_position = later.end_position;
            self.end_offset = later.end_offset;
            self.max_timestamp = before.max(later.max_timestamp);
            self.damaged |= later.damaged;
        }
    }

    fn block(&self, at: usize) -> Option<Block> {
        let entry = self.entries.get(at)?;
        let end = self.entries.get(at + 1).map_or(self.end_position, |next| next.position);
        Some(Block { offset: entry.offset, position: entry.position, end })
    }

    /// The block that would hold `offset`: the last that begins at or below it, or the first of all.
    pub(super) fn block_for_offset(&self, offset: u64) -> Option<Block> {
        self.block(self.entries.partition_point(|entry| entry.offset <= offset).saturating_sub(1))
    }

    /// The block that begins exactly at `position`.
    pub(super) fn block_at(&self, position: u64) -> Option<Block> {
        let at = self.entries.binary_search_by_key(&position, |entry| entry.position).ok()?;
        self.block(at)
    }

    /// The block with the first batch whose greatest timestamp is at least `timestamp`.
    ///
    /// Exact: the greatest timestamp so far first reaches `timestamp` within this block.
    pub(super) fn block_for_timestamp(&self, timestamp: i64) -> Option<Block> {
        if self.max_timestamp < timestamp {
            return None;
        }
        // Block i holds it when everything before block i + 1 reaches the timestamp, and everything before i does not.
        let reached = self.entries.partition_point(|entry| entry.max_before < timestamp);
        self.block(reached.saturating_sub(1))
    }

    pub(super) fn encode(&self, base_offset: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.entries.len() * ENTRY_BYTES + 4);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        // At least 64 KiB of segment stand behind each entry, so 2³² entries would need 256 TiB.
        out.extend_from_slice(&u32::try_from(self.entries.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(&base_offset.to_be_bytes());
        out.extend_from_slice(&self.end_position.to_be_bytes());
        out.extend_from_slice(&self.end_offset.to_be_bytes());
        out.extend_from_slice(&self.max_timestamp.to_be_bytes());
        for entry in &self.entries {
            out.extend_from_slice(&(entry.offset - base_offset).to_be_bytes());
            out.extend_from_slice(&entry.position.to_be_bytes());
            out.extend_from_slice(&entry.max_before.to_be_bytes());
        }
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_be_bytes());
        out
    }

    /// Reads the index of the segment with this base offset.
    pub(super) fn decode(bytes: &[u8], base_offset: u64) -> Result<Self, IndexError> {
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(IndexError::Magic);
        }
        let (body, crc) = bytes.split_last_chunk::<4>().ok_or(IndexError::Checksum)?;
        if body.len() < HEADER_BYTES || crc32fast::hash(body) != u32::from_be_bytes(*crc) {
            return Err(IndexError::Checksum);
        }
        let version = u32::from_be_bytes(field(body, 8)?);
        if version != VERSION {
            return Err(IndexError::Version(version));
        }
        let count = u32::from_be_bytes(field(body, 12)?);
        let entries = &body[HEADER_BYTES..];
        if u64::from_be_bytes(field(body, 16)?) != base_offset
            || entries.len() as u64 != u64::from(count) * ENTRY_BYTES as u64
        {
            return Err(IndexError::Mismatch);
        }
        let entries = entries
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| {
                let relative = u64::from_be_bytes(field(entry, 0)?);
                Ok(Entry {
                    offset: base_offset.checked_add(relative).ok_or(IndexError::Mismatch)?,
                    position: u64::from_be_bytes(field(entry, 8)?),
                    max_before: i64::from_be_bytes(field(entry, 16)?),
                })
            })
            .collect::<Result<Vec<_>, IndexError>>()?;
        let index = Self {
            entries,
            end_position: u64::from_be_bytes(field(body, 24)?),
            end_offset: u64::from_be_bytes(field(body, 32)?),
            max_timestamp: i64::from_be_bytes(field(body, 40)?),
            damaged: false,
        };
        // The checksum vouches for the bytes; this keeps a file written by a faulty build from misleading a reader.
        let ascending = index.entries.is_sorted_by(|a, b| a.position < b.position && a.offset < b.offset);
        let within = index.entries.last().is_none_or(|last| last.position < index.end_position);
        let from_start = index.entries.first().is_none_or(|first| first.position == 0);
        if ascending && within && from_start { Ok(index) } else { Err(IndexError::Mismatch) }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], IndexError> {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(IndexError::Mismatch)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 1000;

    /// Batches as (base offset, last offset, max timestamp, position, length).
    fn batches(shape: &[(u64, i64, u64)]) -> Vec<(u64, u64, i64, u64, u64)> {
        let (mut offset, mut position) = (BASE, 0);
        shape
            .iter()
            .map(|&(records, timestamp, length)| {
                let batch = (offset, offset + records - 1, timestamp, position, length);
                offset += records;
                position += length;
                batch
            })
            .collect()
    }

    fn index(batches: &[(u64, u64, i64, u64, u64)]) -> Index {
        let mut index = Index::starting_at(0, BASE);
        for &(base, last, timestamp, position, length) in batches {
            assert_eq!(index.end_position(), position);
            index.push(base, last, timestamp, length);
        }
        index
    }

    fn shape() -> impl Strategy<Value = Vec<(u64, i64, u64)>> {
        prop::collection::vec((1..50_u64, 0..1000_i64, 61..90_000_u64), 1..60)
    }

    proptest! {
        #[test]
        fn every_offset_lies_in_its_block(shape in shape()) {
            let batches = batches(&shape);
            let index = index(&batches);
            for &(base, last, _, position, length) in &batches {
                for offset in [base, last] {
                    let block = index.block_for_offset(offset).unwrap();
                    prop_assert!(block.position <= position && position + length <= block.end);
                    prop_assert!(block.offset <= base);
                    prop_assert_eq!(index.block_at(block.position), Some(block));
                }
            }
        }

        #[test]
        fn a_timestamp_leads_to_the_block_of_its_first_batch(shape in shape(), timestamp in 0..1100_i64) {
            let batches = batches(&shape);
            let index = index(&batches);
            let expected = batches.iter().find(|batch| batch.2 >= timestamp);
            match (index.block_for_timestamp(timestamp), expected) {
                (None, None) => {}
                (Some(block), Some(batch)) => {
                    prop_assert!(block.position <= batch.3 && batch.3 < block.end);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn survives_encoding_and_a_split_at_any_batch(shape in shape(), cut in 0..60_usize) {
            let batches = batches(&shape);
            let whole = index(&batches);
            prop_assert_eq!(Index::decode(&whole.encode(BASE), BASE), Ok(whole.clone()));

            let cut = cut.min(batches.len());
            let mut head = index(&batches[..cut]);
            let mut tail = Index::starting_at(head.end_position(), head.end_offset());
            for &(base, last, timestamp, _, length) in &batches[cut..] {
                tail.push(base, last, timestamp, length);
            }
            head.extend(&tail);
            prop_assert_eq!(head.end_position(), whole.end_position());
            prop_assert_eq!(head.end_offset(), whole.end_offset());
            prop_assert_eq!(head.max_timestamp(), whole.max_timestamp());
            for &(base, _, timestamp, position, _) in &batches {
                let block = head.block_for_offset(base).unwrap();
                prop_assert!(block.position <= position && position < block.end);
                let block = head.block_for_timestamp(timestamp).unwrap();
                let first = batches.iter().find(|batch| batch.2 >= timestamp).unwrap();
                prop_assert!(block.position <= first.3 && first.3 < block.end);
            }
        }

        #[test]
        fn a_flipped_bit_is_noticed(shape in shape(), bit in any::<prop::sample::Index>()) {
            let index = index(&batches(&shape));
            let mut bytes = index.encode(BASE);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Index::decode(&bytes, BASE).is_err());
        }
    }

    #[test]
    fn another_segments_index_is_refused() {
        let index = index(&batches(&[(1, 1, 100)]));
        assert_eq!(Index::decode(&index.encode(BASE), BASE + 1), Err(IndexError::Mismatch));
        assert_eq!(Index::decode(&[], BASE), Err(IndexError::Magic));
        assert_eq!(Index::decode(&index.encode(BASE)[..50], BASE), Err(IndexError::Checksum));
    }
}
