//! Reading a journal without opening it: for people who want to see what is in it, damaged or not.
//!
//! Changes nothing, decides nothing and skips nothing: also frames that recovery would not replay are told of.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::file::{self, JournalFile, Listing};
use super::frame::{self, FrameKind};
use super::reader::FrameReader;
use super::{Lsn, RecoverError};
use crate::disk::Disk;

/// Everything in a journal's directory, file by file and frame by frame, in the order of sequence and position.
///
/// A broker may be running on it; what it writes and recycles meanwhile may or may not be seen.
#[derive(Debug)]
pub struct Dump {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    files: VecDeque<Planned>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Planned {
    sequence: u64,
    /// The lowest LSN that is void in this file, as later headers say.
    void_from: Lsn,
}

#[derive(Debug)]
struct Open {
    path: PathBuf,
    reader: FrameReader,
    position: u64,
    void_from: Lsn,
}

/// One thing found in a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DumpItem {
    /// A file; its frames follow.
    File(DumpedFile),
    /// A file of which nothing can be read.
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A frame.
    Frame(DumpedFrame),
    /// Bytes between two frames that belong to neither: a frame with a damaged header.
    Gap {
        /// The file.
        path: PathBuf,
        /// Where the gap begins.
        position: u64,
        /// How long it is.
        bytes: u64,
    },
}

/// A file's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedFile {
    /// The file.
    pub path: PathBuf,
    /// Its number.
    pub sequence: u64,
    /// Number of the file that it continues; 0 = none.
    pub previous: u64,
    /// What older files hold at or above this LSN is void; 0 = nothing.
    pub first_lsn: Lsn,
    /// Frames up to this LSN were on the device when the file came into use.
    pub synced: Lsn,
    /// Length in bytes.
    pub length: u64,
}

/// A frame's header and content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedFrame {
    /// Its file.
    pub path: PathBuf,
    /// Where it begins in the file.
    pub position: u64,
    /// Bytes that it occupies in the file.
    pub size: u64,
    /// What it is for.
    pub kind: FrameKind,
    /// Whether it counts.
    pub state: FrameState,
    /// Its LSN; of a mark, the LSN of the last data frame before it.
    pub lsn: Lsn,
    /// Frames up to this LSN were known to be on the device when it was written.
    pub synced: Lsn,
    /// Some of its batches lie elsewhere, and only their beginnings are here.
    pub refers: bool,
    /// Its events; empty when the frame is damaged.
    pub events: Bytes,
    /// Its batches; empty when the frame is damaged.
    pub batches: Vec<Bytes>,
}

/// Whether a frame counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameState {
    /// Whole, and part of the journal unless something before it is missing.
    Whole,
    /// Its header is right, its body is not.
    Damaged,
    /// Whole, but a later recovery has made it void.
    Void,
}

impl Dump {
    /// Looks at the journal in a directory.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> io::Result<Self> {
        let mut files = VecDeque::new();
        let mut void_from = Lsn::MAX;
        for sequence in Listing::read(&*disk, dir)?.journals.into_iter().rev() {
            files.push_front(Planned { sequence, void_from });
            if let Ok(file) = JournalFile::open::<Infallible>(&*disk, dir, sequence)
                && file.header.first_lsn != 0
            {
                void_from = void_from.min(file.header.first_lsn);
            }
        }
        Ok(Self { disk, dir: dir.to_path_buf(), files, open: None })
    }

    fn next_file(&mut self, planned: &Planned) -> DumpItem {
        let path = self.dir.join(file::name(planned.sequence));
        let file = match JournalFile::open::<Infallible>(&*self.disk, &self.dir, planned.sequence) {
            Ok(file) => file,
            Err(error) => {
                let reason = match error {
                    RecoverError::Corrupt { reason, .. } => reason,
                    other => other.to_string(),
                };
                return DumpItem::UnreadableFile { path, reason };
            }
        };
        let reader = match FrameReader::new(&file) {
            Ok(reader) => reader,
            Err(error) => return DumpItem::UnreadableFile { path, reason: error.to_string() },
        };
        let header = file.header;
        let item = DumpItem::File(DumpedFile {
            path: path.clone(),
            sequence: header.sequence,
            previous: header.previous,
            first_lsn: header.first_lsn,
            synced: header.synced,
            length: reader.file_length(),
        });
        self.open = Some(Open { path, reader, position: file::FIRST_FRAME, void_from: planned.void_from });
        item
    }
}

impl Open {
    /// The next frame of the file, or the gap before it; `None` when there is none.
    fn next(&mut self) -> io::Result<Option<DumpItem>> {
        let Some((found, header)) = self.reader.find_header(self.position)? else { return Ok(None) };
        let path = self.path.clone();
        if found - self.position > header.left_out {
            let (position, bytes) = (self.position, found - self.position - header.left_out);
            self.position = found;
            return Ok(Some(DumpItem::Gap { path, position, bytes }));
        }
        let size = frame::padded(header.length);
        let (state, events, batches) = match self.reader.read(found)? {
            Some(frame) => {
                // A mark has the LSN of the frame before it, and stands and falls with the one after.
                let lsn = header.lsn + u64::from(header.kind == FrameKind::Mark);
                let state = if lsn >= self.void_from { FrameState::Void } else { FrameState::Whole };
                (state, frame.events, frame.batches)
            }
            None => (FrameState::Damaged, Bytes::new(), Vec::new()),
        };
        self.position = found + size;
        Ok(Some(DumpItem::Frame(DumpedFrame {
            path,
            position: found,
            size,
            kind: header.kind,
            state,
            lsn: header.lsn,
            synced: header.synced,
            refers: header.refers,
            events,
            batches,
        })))
    }
}

impl Iterator for Dump {
    type Item = io::Result<DumpItem>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(open) = &mut self.open {
            let item = open.next().transpose();
            if !matches!(item, Some(Ok(_))) {
                self.open = None;
            }
            if item.is_some() {
                return item;
            }
        }
        let planned = self.files.pop_front()?;
        Some(Ok(self.next_file(&planned)))
    }
}
