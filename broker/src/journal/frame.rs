//! One frame of the journal, byte by byte. All numbers are big-endian.
//!
//! ```text
//! offset size
//!      0    8  tag: the file's salt plus the frame's position in the file, wrapping
//!      8    4  header checksum: CRC-32 of bytes 12..64
//!     12    4  body checksum: CRC-32 of bytes 64..length
//!     16    8  lsn of a data frame; of a mark, the LSN of the last data frame before it (0 = none)
//!     24    8  synced: every data frame up to this LSN was known to be on the device when this frame was written
//!     32    4  length of the frame in bytes, from its tag to the end of its last batch
//!     36    4  length of the events in bytes
//!     40    4  number of batches
//!     44    1  kind: 1 data, 2 mark
//!     45    1  refers: 1 = of some batches only the beginning is here, and the rest lies elsewhere; else 0
//!     46    1  sectors left out before the frame, so that it begins on a page of its own: 0 to 7
//!     47   17  zero
//!     64  4×n  length of each batch in bytes
//!      …       events, then the batches one after the other
//!      …       zeros up to the next multiple of 512 bytes, not covered by a checksum
//! ```
//!
//! Both checksums start from the CRC-32 of the file's salt and the frame's position (8 bytes each), so that a frame is
//! valid in one place of one file only: neither bytes inside a batch nor frames from a recycled file's earlier life can
//! pass for a frame. The header has its own checksum so that lengths are trusted only when they are sound, and so that
//! a scan reads one sector per frame. A mark has no events and no batches.
//!
//! To change this layout, follow the procedure in `docs/formats.md`.

use bytes::Bytes;
use crc32fast::Hasher;

use super::Lsn;
use crate::disk::SECTOR;
use crate::plants::planted;

/// Bytes before the table of batch lengths.
pub(super) const HEADER_BYTES: u64 = 64;

const DATA: u8 = 1;
const MARK: u8 = 2;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Carries events and batches under an LSN of its own.
    Data,
    /// Only tells how far the journal was known to be on the device.
    Mark,
}

/// A frame's header after its checksum was found right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) kind: FrameKind,
    pub(super) lsn: Lsn,
    pub(super) synced: Lsn,
    pub(super) length: u64,
    pub(super) events_length: u32,
    pub(super) batch_count: u32,
    /// Of some batches only the beginning is here.
    pub(super) refers: bool,
    /// Bytes between the end of the frame before and this one.
    pub(super) left_out: u64,
    body_checksum: u32,
}

/// A whole, valid frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) header: FrameHeader,
    pub(super) events: Bytes,
    pub(super) batches: Vec<Bytes>,
}

/// The place that a frame's checksums are tied to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) salt: u64,
    pub(super) position: u64,
}

impl Place {
    /// The first eight bytes of a frame in this place.
    pub(super) fn tag(self) -> [u8; 8] {
        self.salt.wrapping_add(self.position).to_be_bytes()
    }

    fn hasher(self) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.update(&self.salt.to_be_bytes());
        hasher.update(&self.position.to_be_bytes());
        hasher
    }
}

/// Length in bytes of a data frame, without its padding.
pub(super) fn length(events: &[u8], batches: &[Bytes]) -> u64 {
    let batches: u64 = batches.iter().map(|batch| 4 + batch.len() as u64).sum();
    HEADER_BYTES + events.len() as u64 + batches
}

/// Bytes that a frame of this length occupies in its file.
pub(super) fn padded(length: u64) -> u64 {
    length.next_multiple_of(SECTOR)
}

/// What a header says besides what follows from the content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) kind: FrameKind,
    pub(super) lsn: Lsn,
    pub(super) synced: Lsn,
    pub(super) refers: bool,
    /// Whole sectors, less than a page.
    pub(super) left_out: u64,
}

/// Writes the header and the table of batch lengths into `out`, replacing its content; events and batches follow
/// in the file as they are. The frame's length must fit 32 bits.
pub(super) fn encode(out: &mut Vec<u8>, place: Place, label: Label, events: &[u8], batches: &[Bytes]) {
    out.clear();
    out.resize(HEADER_BYTES as usize, 0);
    let mut body = place.hasher();
    for batch in batches {
        out.extend_from_slice(&(batch.len() as u32).to_be_bytes());
    }
    body.update(&out[HEADER_BYTES as usize..]);
    body.update(events);
    for batch in batches {
        body.update(batch);
    }
    out[0..8].copy_from_slice(&place.tag());
    out[12..16].copy_from_slice(&body.finalize().to_be_bytes());
    out[16..24].copy_from_slice(&label.lsn.to_be_bytes());
    out[24..32].copy_from_slice(&label.synced.to_be_bytes());
    out[32..36].copy_from_slice(&(length(events, batches) as u32).to_be_bytes());
    out[36..40].copy_from_slice(&(events.len() as u32).to_be_bytes());
    out[40..44].copy_from_slice(&(batches.len() as u32).to_be_bytes());
    out[44] = match label.kind {
        FrameKind::Data => DATA,
        FrameKind::Mark => MARK,
    };
    out[45] = u8::from(label.refers);
    out[46] = (label.left_out / SECTOR) as u8;
    let checksum = header_checksum(place, out);
    out[8..12].copy_from_slice(&checksum.to_be_bytes());
}

fn header_checksum(place: Place, frame: &[u8]) -> u32 {
    let mut hasher = place.hasher();
    hasher.update(&frame[12..HEADER_BYTES as usize]);
    hasher.finalize()
}

impl FrameHeader {
    /// Reads the header of the frame in `place`; `None` when no frame was written there, or its header is damaged.
    pub(super) fn parse(bytes: &[u8], place: Place) -> Option<Self> {
        let bytes = bytes.get(..HEADER_BYTES as usize)?;
        if bytes[..8] != place.tag() || read_u32(bytes, 8) != header_checksum(place, bytes) {
            return None;
        }
        let kind = match bytes[44] {
            DATA => FrameKind::Data,
            MARK => FrameKind::Mark,
            _ => return None,
        };
        let header = Self {
            kind,
            lsn: read_u64(bytes, 16),
            synced: read_u64(bytes, 24),
            length: u64::from(read_u32(bytes, 32)),
            events_length: read_u32(bytes, 36),
            batch_count: read_u32(bytes, 40),
            refers: bytes[45] != 0,
            left_out: u64::from(bytes[46]) * SECTOR,
            body_checksum: read_u32(bytes, 12),
        };
        let least = HEADER_BYTES + u64::from(header.events_length) + 4 * u64::from(header.batch_count);
        (header.length >= least).then_some(header)
    }

    /// Splits the body, the bytes from the table of batch lengths to the last batch, into events and batches, which
    /// share its memory; `None` when it is damaged.
    pub(super) fn open(self, place: Place, body: Bytes) -> Option<Frame> {
        let mut hasher = place.hasher();
        hasher.update(&body);
        let sound = hasher.finalize() == self.body_checksum || planted("skip-frame-crc");
        if body.len() as u64 != self.length - HEADER_BYTES || !sound {
            return None;
        }
        let table_bytes = 4 * self.batch_count as usize;
        let mut start = table_bytes + self.events_length as usize;
        let events = body.slice(table_bytes..start);
        let mut batches = Vec::with_capacity(self.batch_count as usize);
        for entry in body[..table_bytes].chunks_exact(4) {
            let end = start + read_u32(entry, 0) as usize;
            if end > body.len() {
                return None;
            }
            batches.push(body.slice(start..end));
            start = end;
        }
        (start == body.len()).then_some(Frame { header: self, events, batches })
    }
}

/// Reads a number at an offset that the caller has checked.
pub(super) fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_be_bytes(number)
}

/// Reads a number at an offset that the caller has checked.
pub(super) fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_be_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA_7: Label = Label { kind: FrameKind::Data, lsn: 7, synced: 5, refers: false, left_out: 0 };

    fn frame(place: Place) -> Vec<u8> {
        let batches = [Bytes::from_static(b"first"), Bytes::new(), Bytes::from_static(b"third batch")];
        let mut bytes = Vec::new();
        encode(&mut bytes, place, DATA_7, b"events", &batches);
        bytes.extend_from_slice(b"events");
        batches.iter().for_each(|batch| bytes.extend_from_slice(batch));
        assert_eq!(bytes.len() as u64, length(b"events", &batches));
        bytes
    }

    fn open(bytes: &[u8], place: Place) -> Option<Frame> {
        let header = FrameHeader::parse(bytes, place)?;
        header.open(place, Bytes::copy_from_slice(bytes.get(64..header.length as usize)?))
    }

    #[test]
    fn a_frame_reads_back_as_written() {
        let place = Place { salt: u64::MAX - 1, position: 1024 };
        let read = open(&frame(place), place).unwrap();
        assert_eq!((read.header.kind, read.header.lsn, read.header.synced), (FrameKind::Data, 7, 5));
        assert_eq!(read.events, "events");
        assert_eq!(read.batches, ["first", "", "third batch"]);
    }

    #[test]
    fn the_layout_is_pinned() {
        let place = Place { salt: 0x0102_0304_0506_0708, position: 512 };
        let mut bytes = Vec::new();
        let label = Label { refers: true, left_out: 3 * 512, ..DATA_7 };
        encode(&mut bytes, place, label, b"ev", &[Bytes::from_static(b"batch")]);
        let checksum_of = |bytes: &[u8]| {
            let mut hasher = Hasher::new();
            hasher.update(&[1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 2, 0]);
            hasher.update(bytes);
            hasher.finalize().to_be_bytes()
        };
        let body = checksum_of(b"\0\0\0\x05evbatch");
        let rest = [
            &body[..],
            &[0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 75, 0, 0, 0, 2, 0, 0, 0, 1, 1, 1, 3],
            &[0; 17],
        ]
        .concat();
        let header = checksum_of(&rest);
        let expected = [&[1, 2, 3, 4, 5, 6, 9, 8][..], &header, &rest, &[0, 0, 0, 5]].concat();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let place = Place { salt: 99, position: 512 };
        let bytes = frame(place);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&damaged, place), None, "bit {bit}");
        }
    }

    #[test]
    fn a_frame_is_valid_in_one_place_of_one_file_only() {
        let place = Place { salt: 99, position: 512 };
        let bytes = frame(place);
        assert!(open(&bytes, place).is_some());
        assert_eq!(open(&bytes, Place { position: 1024, ..place }), None);
        assert_eq!(open(&bytes, Place { salt: 100, ..place }), None);
        // Where salt and position add up to the same tag, the checksums still tell.
        assert_eq!(open(&bytes, Place { salt: 99 + 512, position: 0 }), None);
    }
}
