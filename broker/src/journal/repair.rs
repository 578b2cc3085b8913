//! Going on with a damaged journal, when somebody has decided to do without what cannot be read.
//!
//! A start refuses a journal in which something is damaged that had been synced (`recovery.rs`). What a repair can save is what a
//! replay can use: the frames behind the checkpoint, up to the first that is missing, or refers to batches that may not be on
//! the device. Those are copied into one new file, with which the journal begins anew. The other files are kept under other
//! names, for people with better tools.
//!
//! Invariants: [`Repair::plan`] changes nothing; a crash at any moment of [`Repair::apply`] leaves the journal refused as
//! before, or repaired. The new file says that frames were given up, until the next run has begun: offsets of records that were
//! lost may have been seen, and must not be given to others.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dump::{Dump, DumpItem, DumpedFrame, FrameState};
use super::file::{self, FileHeader, JournalFile, Listing};
use super::frame::{self, FrameKind, Label, Place};
use super::reader::FrameReader;
use super::writer::write_frame;
use super::{Journal, Lsn, RecoverError};
use crate::disk::Disk;
use crate::environment::Environment;

/// What the files of the old journal are called afterwards, behind their names.
const SET_ASIDE: &str = "damaged";

/// A damaged journal, and what can be done about it. See the module's documentation.
#[derive(Debug)]
pub struct Repair {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    damage: Damage,
    /// The checkpoint has everything up to it.
    from: Lsn,
    /// Frames to keep: from the one behind `from` on, dense.
    kept: Vec<Location>,
    lost: Vec<Location>,
    unreadable: Vec<Unreadable>,
    next_sequence: u64,
}

/// The first thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub file: PathBuf,
    /// Bytes from the beginning of the file.
    pub position: u64,
    pub reason: String,
}

/// A part of the journal that is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub file: PathBuf,
    pub position: u64,
    /// `None`: the whole file.
    pub bytes: Option<u64>,
    /// The frame that was there, if that much can be read.
    pub lsn: Option<Lsn>,
}

/// Where a frame is.
#[derive(Clone, Copy, Debug)]
struct Location {
    lsn: Lsn,
    sequence: u64,
    position: u64,
    refers: bool,
}

/// Why a repair failed. The journal is as damaged as before.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    #[error(transparent)]
    Journal(#[from] RecoverError<Infallible>),
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// Nothing is left to begin with: no checkpoint, and the first frame is not there.
    #[error("there is no checkpoint, and the first frame cannot be read: nothing could be saved")]
    Hopeless,
}

impl Repair {
    /// Looks at a journal as a start would whose checkpoint contains the frames up to `from`; `None` when it is sound. Changes
    /// nothing. Not while a broker runs on it.
    ///
    /// # Errors
    /// The disk fails, a newer broker wrote the journal, or nothing could be saved.
    pub fn plan(disk: Arc<dyn Disk>, dir: &Path, from: Lsn) -> Result<Option<Self>, RepairError> {
        let damage = match Journal::check(&*disk, dir, from) {
            Ok(()) => return Ok(None),
            Err(RecoverError::Corrupt { file, position, reason }) => Damage { file, position, reason },
            Err(error) => return Err(error.into()),
        };
        let io = |source| RepairError::Io { path: dir.to_path_buf(), source };
        let listing = Listing::read(&*disk, dir).map_err(io)?;
        let mut found = Found::default();
        for item in Dump::open(disk.clone(), dir).map_err(io)? {
            found.take(item.map_err(io)?);
        }
        let mut frames = found.frames;
        frames.retain(|lsn, _| *lsn > from);
        let mut next = from + 1;
        let mut kept = Vec::new();
        // What nothing shows to be synced may refer to batches that are not on the device.
        let is_whole = |location: &Location| !location.refers || location.lsn <= found.synced;
        while let Some(location) = frames.get(&next).copied().filter(is_whole) {
            frames.remove(&next);
            kept.push(location);
            next += 1;
        }
        if from == 0 && kept.is_empty() {
            return Err(RepairError::Hopeless);
        }
        Ok(Some(Self {
            disk,
            dir: dir.to_path_buf(),
            damage,
            from,
            kept,
            lost: frames.into_values().collect(),
            unreadable: found.unreadable,
            next_sequence: listing.journals.last().map_or(1, |last| last + 1),
        }))
    }

    /// What a start names when it refuses the journal.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    /// Frames that will be replayed on top of the checkpoint.
    pub fn kept(&self) -> u64 {
        self.kept.len() as u64
    }

    /// The first frame that is given up, and all after it.
    pub fn cut(&self) -> Lsn {
        self.from + 1 + self.kept()
    }

    /// What cannot be read, in the order of the journal. Not all of it is needed: the checkpoint may have it.
    pub fn unreadable(&self) -> &[Unreadable] {
        &self.unreadable
    }

    /// How many frames can be read, and are given up because one before them is missing.
    pub fn lost(&self) -> u64 {
        self.lost.len() as u64
    }

    /// Those frames, in their order.
    ///
    /// # Errors
    /// The disk fails.
    pub fn each_lost(&self, each: impl FnMut(DumpedFrame)) -> io::Result<()> {
        self.each_dumped(&self.lost, each)
    }

    /// The frames that will be replayed, in their order.
    ///
    /// # Errors
    /// The disk fails.
    pub fn each_kept(&self, each: impl FnMut(DumpedFrame)) -> io::Result<()> {
        self.each_dumped(&self.kept, each)
    }

    fn each_dumped(&self, locations: &[Location], mut each: impl FnMut(DumpedFrame)) -> io::Result<()> {
        self.each(locations, |path, position, frame| {
            let frame::Frame { header, events, batches } = frame;
            each(DumpedFrame {
                path: path.to_path_buf(),
                position,
                size: frame::padded(header.length),
                kind: header.kind,
                state: FrameState::Whole,
                lsn: header.lsn,
                synced: header.synced,
                refers: header.refers,
                events,
                batches,
            });
            Ok(())
        })
    }

    fn each(
        &self,
        locations: &[Location],
        mut each: impl FnMut(&Path, u64, frame::Frame) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut open: Option<(JournalFile, FrameReader)> = None;
        for location in locations {
            let (file, reader) = match &mut open {
                Some(open) if open.0.header.sequence == location.sequence => open,
                stale => {
                    let file = JournalFile::open::<Infallible>(&*self.disk, &self.dir, location.sequence)
                        .map_err(io::Error::other)?;
                    let reader = FrameReader::new(&file)?;
                    stale.insert((file, reader))
                }
            };
            let frame = reader.read(location.position)?;
            let frame = frame.ok_or_else(|| {
                io::Error::other(format!("frame {} could be read once, but not again", location.lsn))
            })?;
            each(&file.path, location.position, frame)?;
        }
        Ok(())
    }

    /// Begins the journal anew with what is kept, and sets the old files aside; returns what they are called now.
    ///
    /// # Errors
    /// The disk fails: the journal is refused as before, or repaired with some of the old files still under their names,
    /// which harms nothing.
    pub fn apply(self, environment: &Environment) -> Result<Vec<PathBuf>, RepairError> {
        let old = Listing::read(&*self.disk, &self.dir).map_err(|source| self.failed(&self.dir, source))?;
        let path = self.dir.join(file::name(self.next_sequence));
        self.write(environment).map_err(|source| self.failed(&path, source))?;
        let mut set_aside = Vec::new();
        for sequence in old.journals {
            let from = self.dir.join(file::name(sequence));
            let to = self.dir.join(format!("{}.{SET_ASIDE}", file::name(sequence)));
            self.disk.rename(&from, &to).map_err(|source| self.failed(&from, source))?;
            set_aside.push(to);
        }
        self.disk.sync_dir(&self.dir).map_err(|source| self.failed(&self.dir, source))?;
        Ok(set_aside)
    }

    fn failed(&self, path: &Path, source: io::Error) -> RepairError {
        RepairError::Io { path: path.to_path_buf(), source }
    }

    fn write(&self, environment: &Environment) -> io::Result<()> {
        let mut header =
            FileHeader::new(environment.random(), self.next_sequence, 0, self.from + 1, self.cut() - 1);
        header.given_up = self.cut();
        let mut file = JournalFile::create(&*self.disk, &self.dir, header)?;
        let mut position = file::FIRST_FRAME;
        let mut encoded = Vec::new();
        self.each(&self.kept, |_, _, frame| {
            let place = Place { salt: header.salt, position };
            let (events, batches) = (&frame.events, &frame.batches);
            let frame::FrameHeader { lsn, synced, refers, .. } = frame.header;
            // What was known to be synced is, up to where the journal goes now.
            let label =
                Label { kind: FrameKind::Data, lsn, synced: synced.min(self.cut() - 1), refers, left_out: 0 };
            frame::encode(&mut encoded, place, label, events, batches);
            // However long: nothing is appended to this file.
            position += write_frame(&file, position, u64::MAX, &encoded, events, batches)?;
            Ok(())
        })?;
        file.publish(&*self.disk, &self.dir)
    }
}

/// What is in the files.
#[derive(Debug, Default)]
struct Found {
    sequence: u64,
    /// The highest frame that was said to be synced.
    synced: Lsn,
    /// Whole data frames that no later file has made void, by LSN.
    frames: BTreeMap<Lsn, Location>,
    unreadable: Vec<Unreadable>,
}

impl Found {
    fn take(&mut self, item: DumpItem) {
        match item {
            DumpItem::File(file) => {
                self.sequence = file.sequence;
                self.synced = self.synced.max(file.synced).max(file.first_lsn.saturating_sub(1));
            }
            DumpItem::UnreadableFile { path, .. } => {
                // It may have said that what was not synced before it is void.
                self.frames.retain(|lsn, _| *lsn <= self.synced);
                self.unreadable.push(Unreadable { file: path, position: 0, bytes: None, lsn: None });
            }
            DumpItem::Gap { path, position, bytes } => {
                self.unreadable.push(Unreadable { file: path, position, bytes: Some(bytes), lsn: None });
            }
            DumpItem::Frame(frame) => self.take_frame(frame),
        }
    }

    fn take_frame(&mut self, frame: DumpedFrame) {
        if frame.state == FrameState::Void {
            return;
        }
        self.synced = self.synced.max(frame.synced);
        let DumpedFrame { path, position, size, lsn, refers, .. } = frame;
        match (frame.state, frame.kind) {
            (FrameState::Damaged, _) => {
                self.unreadable.push(Unreadable { file: path, position, bytes: Some(size), lsn: Some(lsn) });
            }
            (_, FrameKind::Data) => {
                self.frames.insert(lsn, Location { lsn, sequence: self.sequence, position, refers });
            }
            _ => {}
        }
    }
}
