//! A journal file: its name, its header block, and how one comes into being.
//!
//! ```text
//! offset size
//!      0    8  magic "FELUJRNL"
//!      8    4  format version
//!     12    4  CRC-32 of the block with these four bytes zero
//!     16    8  salt: random, new for each life of the file
//!     24    8  sequence: the number in the file's name
//!     32    8  previous: sequence of the file that this one continues; 0 = none before it
//!     40    8  first lsn: what earlier files hold at or above it is void; 0 = the file voids nothing
//!     48    8  synced: every data frame up to this LSN was on the device when the file got its name
//!     56    8  given up: a repair gave up the frames from this LSN on, and no run has begun since; 0 = none were
//!     64  448  zero
//!    512       frames, each at a multiple of 512: behind the one before, or on the next page
//! ```
//!
//! Names: `N.journal`, N being the sequence in 20 digits; `N.tmp` while it is being made; `N.spare` once its frames are
//! no longer needed and it waits to be recycled.
//!
//! Invariants:
//! - A file gets its `.journal` name only after its header and the zeros behind it are on the device, and is used only
//!   after the name is too. The header is never written again under that name: a header that does not check out is
//!   damage, never a torn write.
//! - Magic, version and checksum keep their place, meaning and block length in every version, so that an old broker can
//!   tell a newer file from a damaged one.

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::frame::{read_u32, read_u64};
use super::{Lsn, RecoverError};
use crate::disk::{Disk, DiskFile, SECTOR};

/// The version of the journal's format that this build writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Pages of the page cache, which are what reaches the device.
pub(super) const PAGE: u64 = 4096;

/// Position of a file's first frame.
pub(super) const FIRST_FRAME: u64 = SECTOR;

const MAGIC: &[u8; 8] = b"FELUJRNL";
const BLOCK: usize = SECTOR as usize;

/// Zeros are written, and synced, in pieces of this size, so that a sync of the file in use never waits long.
const ZERO_PIECE: u64 = 4 << 20;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) salt: u64,
    pub(super) sequence: u64,
    /// 0 = the journal begins with this file.
    pub(super) previous: u64,
    /// 0 = not set; see the layout above.
    pub(super) first_lsn: Lsn,
    pub(super) synced: Lsn,
    /// 0 = nothing was given up.
    pub(super) given_up: Lsn,
}

impl FileHeader {
    /// A header with a salt of these random bits.
    pub(super) fn new(random: u64, sequence: u64, previous: u64, first_lsn: Lsn, synced: Lsn) -> Self {
        // Odd, so that the tag of no frame is zero: positions are even.
        let salt = random | 1;
        Self { salt, sequence, previous, first_lsn, synced, given_up: 0 }
    }

    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[0..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&FORMAT_VERSION.to_be_bytes());
        block[16..24].copy_from_slice(&self.salt.to_be_bytes());
        block[24..32].copy_from_slice(&self.sequence.to_be_bytes());
        block[32..40].copy_from_slice(&self.previous.to_be_bytes());
        block[40..48].copy_from_slice(&self.first_lsn.to_be_bytes());
        block[48..56].copy_from_slice(&self.synced.to_be_bytes());
        block[56..64].copy_from_slice(&self.given_up.to_be_bytes());
        let checksum = crc32fast::hash(&block);
        block[12..16].copy_from_slice(&checksum.to_be_bytes());
        block
    }

    fn parse(mut block: [u8; BLOCK]) -> Result<Self, HeaderError> {
        if &block[0..8] != MAGIC {
            return Err(HeaderError::Damaged("it does not begin like a journal file"));
        }
        let checksum = read_u32(&block, 12);
        block[12..16].fill(0);
        if checksum != crc32fast::hash(&block) {
            return Err(HeaderError::Damaged("the checksum of the file's header is wrong"));
        }
        match read_u32(&block, 8) {
            FORMAT_VERSION => Ok(Self {
                salt: read_u64(&block, 16),
                sequence: read_u64(&block, 24),
                previous: read_u64(&block, 32),
                first_lsn: read_u64(&block, 40),
                synced: read_u64(&block, 48),
                given_up: read_u64(&block, 56),
            }),
            0 => Err(HeaderError::Damaged("no journal ever had format version 0")),
            found => Err(HeaderError::Newer(found)),
        }
    }

    /// The highest LSN that this header proves to have been on the device when the file got its name.
    pub(super) fn proves(&self) -> Lsn {
        self.synced.max(self.first_lsn.saturating_sub(1))
    }
}

enum HeaderError {
    Damaged(&'static str),
    Newer(u32),
}

/// An open journal file.
#[derive(Clone, Debug)]
pub(super) struct JournalFile {
    pub(super) path: PathBuf,
    pub(super) header: FileHeader,
    pub(super) disk_file: Arc<dyn DiskFile>,
    /// Up to here the file's space is on the device, so that syncing frames written into it is cheap.
    pub(super) prepared: u64,
}

/// How far a new file of `bytes` is filled with zeros: on a disk with little room only as far as leaves most of it to what
/// must be written. A file with fewer zeros grows with its frames.
pub(super) fn zeros_until(disk: &dyn Disk, dir: &Path, bytes: u64) -> u64 {
    match disk.file_system(dir).and_then(|file_system| file_system.available()) {
        Ok(available) => bytes.min(FIRST_FRAME.max(available / 4)),
        Err(error) => {
            tracing::warn!(%error, "cannot ask how much room the disk has");
            bytes
        }
    }
}

impl JournalFile {
    /// Opens a file for reading and checks its header.
    pub(super) fn open<E>(disk: &dyn Disk, dir: &Path, sequence: u64) -> Result<Self, RecoverError<E>> {
        let path = dir.join(name(sequence));
        let io = |source| RecoverError::Io { path: path.clone(), source };
        let disk_file = disk.open_read(&path).map_err(io)?;
        let mut block = [0; BLOCK];
        let read = disk_file.read_full_at(&mut block, 0).map_err(io)?;
        let corrupt = |reason: &str| RecoverError::Corrupt {
            file: path.clone(),
            position: 0,
            reason: reason.to_owned(),
        };
        if read < BLOCK {
            return Err(corrupt("the file ends within its header"));
        }
        match FileHeader::parse(block) {
            Ok(header) if header.sequence != sequence => {
                Err(corrupt("the sequence in the file's header is not the one in its name"))
            }
            Ok(header) => {
                let prepared = disk_file.len().map_err(io)?;
                Ok(Self { path, header, disk_file, prepared })
            }
            Err(HeaderError::Damaged(reason)) => Err(corrupt(reason)),
            Err(HeaderError::Newer(found)) => {
                Err(RecoverError::NewerFormat { file: path, found, supported: FORMAT_VERSION })
            }
        }
    }

    /// Begins a new file under its `.tmp` name.
    pub(super) fn create(disk: &dyn Disk, dir: &Path, header: FileHeader) -> io::Result<Self> {
        let path = dir.join(temporary_name(header.sequence));
        let disk_file = disk.create(&path)?;
        disk_file.write_all_at(&header.encode(), 0)?;
        Ok(Self { path, header, disk_file, prepared: FIRST_FRAME })
    }

    /// Takes over a file that is no longer needed, under its `.spare` name; the rename away from its `.journal` name
    /// must be durable already.
    pub(super) fn recycle(disk: &dyn Disk, spare: &Path, header: FileHeader) -> io::Result<Self> {
        let disk_file = disk.open(spare)?;
        disk_file.write_all_at(&header.encode(), 0)?;
        let prepared = disk_file.len()?;
        Ok(Self { path: spare.to_path_buf(), header, disk_file, prepared })
    }

    /// Writes zeros over `from..to`, synced piece by piece; is content with less once `enough` says so.
    pub(super) fn fill_zeros(&mut self, from: u64, to: u64, enough: &AtomicBool) -> io::Result<()> {
        let mut position = from;
        while position < to && !enough.load(Ordering::Relaxed) {
            let end = to.min(position + ZERO_PIECE);
            let mut left = (end - position) as usize;
            let mut slices = Vec::with_capacity(left.div_ceil(ZEROS.len()));
            while left > 0 {
                let piece = left.min(ZEROS.len());
                slices.push(IoSlice::new(&ZEROS[..piece]));
                left -= piece;
            }
            self.disk_file.write_all_vectored_at(&mut slices, position)?;
            self.disk_file.sync_data()?;
            position = end;
        }
        self.prepared = self.prepared.max(position);
        Ok(())
    }

    /// Makes content and `.journal` name durable, in this order.
    pub(super) fn publish(&mut self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        self.disk_file.sync_data()?;
        let path = dir.join(name(self.header.sequence));
        disk.rename(&self.path, &path)?;
        self.path = path;
        disk.sync_dir(dir)
    }
}

pub(super) fn name(sequence: u64) -> String {
    format!("{sequence:020}.journal")
}

pub(super) fn temporary_name(sequence: u64) -> String {
    format!("{sequence:020}.tmp")
}

pub(super) fn spare_name(sequence: u64) -> String {
    format!("{sequence:020}.spare")
}

/// What the names in a journal's directory say.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Sequences of the `.journal` files, rising.
    pub(super) journals: Vec<u64>,
    pub(super) spares: Vec<String>,
    /// Files whose making was cut short.
    pub(super) temporaries: Vec<String>,
}

impl Listing {
    pub(super) fn read(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let mut listing = Self::default();
        for file in disk.list(dir)? {
            if let Some(sequence) = Self::sequence_of_journal(&file) {
                listing.journals.push(sequence);
            } else if sequence_before(&file, ".spare").is_some() {
                listing.spares.push(file);
            } else if sequence_before(&file, ".tmp").is_some() {
                listing.temporaries.push(file);
            }
        }
        Ok(listing)
    }

    /// The sequence in a `.journal` file's name.
    pub(super) fn sequence_of_journal(file: &str) -> Option<u64> {
        sequence_before(file, ".journal")
    }
}

/// Accepts the 20 digits only, so that no two names can claim the same sequence.
fn sequence_before(file: &str, extension: &str) -> Option<u64> {
    let digits = file.strip_suffix(extension)?;
    let sequence = digits.parse().ok()?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()) && sequence > 0)
        .then_some(sequence)
}
