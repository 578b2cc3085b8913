//! Opening a journal after whatever happened to it: a clean stop, a killed process, a lost device cache, damage.
//!
//! The rule, in the order of the code:
//!
//! 1. The newest file names the one it continues, and so on, back to the file with the first frame asked for. A file
//!    missing from that chain, or one with a damaged header, is corruption: headers are on the device before their
//!    file is used. Files outside the chain are leftovers.
//! 2. Frames are read in LSN order and replayed one by one. What is not the frame due ends the reading; let its LSN be
//!    `e`. Nor is a frame the one due that nothing proves to have been synced, and that refers to bytes outside which are
//!    not whole: the power failed before they were on the device. If anything in the rest of the chain, or in any header, or the caller's checkpoint, says that `e` had been
//!    synced, then this is corruption and the journal is refused, naming file and position. Otherwise nobody was ever
//!    told that `e` is safe, and the journal ends before it.
//!    A frame that was synced needs no such look: damage in what it refers to is the business of whoever reads it.
//! 3. Let `m` be the highest LSN said to be synced. The frames above `m` may be in the page cache only. They are written
//!    into a new file whose header says that it begins at `m + 1`, which voids whatever older files hold from there
//!    on, torn or whole, and that all its frames are synced. The file gets its name, by which all of it becomes part of
//!    the journal at once, only when it is on the device. What they refer to is put into them: where it is, it may be in the
//!    page cache only.
//!
//! So a crash at any moment of a recovery leaves the journal as it was, or recovered. Nothing is removed before the new
//! file's name is durable. Every start makes a new file, also where nothing was torn: a frame that did not survive may
//! lie behind the end unseen, and must not become reachable when the end grows up to it.
//!
//! Undecidable by any journal: damage to the last frames synced before anything said so.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;

use super::file::{self, FileHeader, JournalFile, Listing};
use super::frame::{self, Frame, FrameKind, Label, Place};
use super::prepare::Preparer;
use super::reader::FrameReader;
use super::syncer::Progress;
use super::writer::{Asked, HeldFile, Recovered, write_frame};
use super::{Journal, JournalOptions, Lsn, RecoverError};
use crate::disk::Disk;
use crate::plants::planted;

/// Takes what is found in a journal.
pub trait Replay<E> {
    /// Takes one frame: its LSN, its events and its batches. Of those that lie elsewhere it gets what is in the frame.
    fn apply(&mut self, lsn: Lsn, events: &[u8], batches: Vec<Bytes>) -> Result<(), E>;

    /// Puts the whole batch into the place of every one that lies elsewhere, if there it is whole. Asked, before
    /// [`apply`](Self::apply), for frames only that nothing proves to have been synced.
    ///
    /// # Errors
    /// The disk failed, and what it said of which file.
    fn complete(&mut self, events: &[u8], batches: &mut [Bytes]) -> Result<Completed, (PathBuf, io::Error)>;
}

/// What became of the batches that lie elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// All are whole.
    Whole,
    /// Some are in files that are gone, which proves that the frame was synced; the others are whole.
    Gone,
    /// Some did not reach the device.
    Torn,
}

/// For journals whose frames refer to nothing outside.
impl<E, F: FnMut(Lsn, &[u8], Vec<Bytes>) -> Result<(), E>> Replay<E> for F {
    fn apply(&mut self, lsn: Lsn, events: &[u8], batches: Vec<Bytes>) -> Result<(), E> {
        self(lsn, events, batches)
    }

    fn complete(&mut self, _: &[u8], _: &mut [Bytes]) -> Result<Completed, (PathBuf, io::Error)> {
        Ok(Completed::Torn)
    }
}

impl Journal {
    /// Opens the journal in a directory, which is created when missing, and replays every frame above `from`, the LSN
    /// that the caller's checkpoint contains, into `replay`.
    ///
    /// When it returns, every frame that was replayed is on the device. Frames are held one at a time. Blocks.
    pub fn recover<E>(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: JournalOptions,
        from: Lsn,
        replay: &mut dyn Replay<E>,
    ) -> Result<Self, RecoverError<E>> {
        let options = options.settled();
        let io = |source| RecoverError::Io { path: dir.to_path_buf(), source };
        disk.create_dir(dir).map_err(io)?;
        let listing = Listing::read(&*disk, dir).map_err(io)?;
        let chain = Chain::load(&*disk, dir, &listing, from)?;
        let mut scan = Scan::run(&chain, from, replay)?;
        if planted("trust-page-cache") {
            scan.proven = scan.next - 1;
            scan.forget_synced();
        }
        scan.recovered.rewritten = scan.unsynced.len() as u64;
        scan.recovered.given_up = scan.given_up != 0;
        let (current, position, kept) = rebuild(&*disk, dir, &options, &listing, &chain, &scan)?;

        let mut files: VecDeque<HeldFile> = chain.older.into();
        for (read, entered) in chain.files.iter().zip(&scan.entered).take(kept) {
            let HeldFile { sequence, fixed, .. } = read.held;
            files.push_back(HeldFile { sequence, first_lsn: *entered, fixed });
        }
        let first_lsn = current.header.first_lsn;
        files.push_back(HeldFile { sequence: current.header.sequence, first_lsn, fixed: true });

        let preparer = Preparer::start(disk, dir, &options).map_err(io)?;
        let used = |sequence| files.iter().any(|file| file.sequence == sequence);
        let leftovers = listing.journals.iter().filter(|sequence| !used(**sequence));
        preparer.retire(leftovers.map(|sequence| file::name(*sequence)));
        preparer.retire(listing.spares);
        // The new file may have taken over the name of one whose making was cut short.
        let taken = file::temporary_name(current.header.sequence);
        preparer.retire(listing.temporaries.into_iter().filter(|name| *name != taken));
        Ok(Self {
            progress: Arc::new(Progress::new(scan.next - 1)),
            preparer,
            files,
            current: Arc::new(current),
            position,
            capacity: options.first_file_bytes.max(position),
            options,
            asked: Asked::NotYet,
            next_lsn: scan.next,
            used: 0,
            told: scan.next - 1,
            header: Vec::new(),
            recovered: scan.recovered,
        })
    }
}

impl Journal {
    /// Whether [`Self::recover`] would open the journal. Changes nothing.
    pub(super) fn check(disk: &dyn Disk, dir: &Path, from: Lsn) -> Result<(), RecoverError<Infallible>> {
        let io = |source| RecoverError::Io { path: dir.to_path_buf(), source };
        let listing = Listing::read(disk, dir).map_err(io)?;
        let chain = Chain::load(disk, dir, &listing, from)?;
        let mut nothing = |_: Lsn, _: &[u8], _: Vec<Bytes>| Ok(());
        Scan::run(&chain, from, &mut nothing).map(drop)
    }
}

/// The files that hold the journal from the LSN asked for on.
struct Chain {
    /// Oldest first; empty only where there is no journal yet.
    files: Vec<ChainFile>,
    /// Files before those, kept by an earlier run for an older checkpoint.
    older: Vec<HeldFile>,
}

struct ChainFile {
    file: JournalFile,
    held: HeldFile,
}

impl Chain {
    fn load<E>(disk: &dyn Disk, dir: &Path, listing: &Listing, from: Lsn) -> Result<Self, RecoverError<E>> {
        let mut files = Vec::new();
        let Some(mut sequence) = listing.journals.last().copied() else {
            if from > 0 {
                let reason = format!("it holds no journal file, yet the checkpoint contains frame {from}");
                return Err(corrupt(dir, 0, reason));
            }
            return Ok(Self { files, older: Vec::new() });
        };
        loop {
            let link = ChainFile::open(disk, dir, sequence)?;
            let (previous, first_lsn) = (link.file.header.previous, link.held.first_lsn);
            let path = link.file.path.clone();
            files.push(link);
            if first_lsn != 0 && first_lsn <= from + 1 {
                break;
            }
            if previous == 0 {
                return Err(corrupt(
                    &path,
                    0,
                    format!("it continues no file, yet frame {} is not in it", from + 1),
                ));
            }
            if !listing.journals.contains(&previous) {
                if first_lsn == 0 {
                    let reason = format!("no frame begins here, and the file before, {previous}, is gone");
                    return Err(corrupt(&path, file::FIRST_FRAME, reason));
                }
                let reason = format!("it is missing, with the frames before {first_lsn}");
                return Err(corrupt(&dir.join(file::name(previous)), 0, reason));
            }
            sequence = previous;
        }
        files.reverse();
        let older = Self::older(disk, dir, listing, files[0].file.header.previous);
        Ok(Self { files, older })
    }

    /// Files that are part of the journal but not needed now. Damage in them is of no concern now.
    fn older(disk: &dyn Disk, dir: &Path, listing: &Listing, newest: u64) -> Vec<HeldFile> {
        let mut older = Vec::new();
        let mut sequence = newest;
        while listing.journals.contains(&sequence) {
            if let Ok(link) = ChainFile::open::<Infallible>(disk, dir, sequence) {
                older.push(link.held);
                sequence = link.file.header.previous;
                continue;
            }
            // What continues what is not known from here on; all may be of use to somebody with better tools.
            let unknown = listing.journals.iter().rev().filter(|listed| **listed <= sequence);
            older.extend(unknown.map(|listed| HeldFile { sequence: *listed, first_lsn: 0, fixed: false }));
            break;
        }
        older.reverse();
        older
    }
}

impl ChainFile {
    fn open<E>(disk: &dyn Disk, dir: &Path, sequence: u64) -> Result<Self, RecoverError<E>> {
        let file = JournalFile::open(disk, dir, sequence)?;
        if file.header.previous >= sequence {
            return Err(corrupt(
                &file.path,
                0,
                format!("it claims to continue file {}", file.header.previous),
            ));
        }
        let fixed = file.header.first_lsn != 0;
        let first_lsn = if fixed {
            file.header.first_lsn
        } else {
            let io = |source| RecoverError::Io { path: file.path.clone(), source };
            let first = FrameReader::new(&file).and_then(|mut reader| reader.header(file::FIRST_FRAME));
            match first.map_err(io)? {
                Some(header) if header.kind == FrameKind::Mark => header.lsn + 1,
                Some(header) => header.lsn,
                None => 0,
            }
        };
        Ok(Self { file, held: HeldFile { sequence, first_lsn, fixed } })
    }
}

/// What reading the chain has shown.
struct Scan {
    /// LSN of the first frame that is not part of the journal.
    next: Lsn,
    /// The highest LSN that anything proves to have been synced; below `next`.
    proven: Lsn,
    /// LSN that was due at the beginning of each file that was read.
    entered: Vec<Lsn>,
    /// Where the frames above `proven` are, rising and dense.
    unsynced: VecDeque<Location>,
    /// `proven` is all that the rest of the chain proves.
    searched: bool,
    /// What the newest file says of that, if nothing came after it.
    given_up: Lsn,
    recovered: Recovered,
}

struct Location {
    lsn: Lsn,
    file: usize,
    position: u64,
    /// Its batches where they were not all in it, and whether they are now.
    completed: Option<(Vec<Bytes>, Completed)>,
}

impl Scan {
    fn run<E>(chain: &Chain, from: Lsn, replay: &mut dyn Replay<E>) -> Result<Self, RecoverError<E>> {
        let mut scan = Self {
            next: chain.files.first().map_or(1, |first| first.held.first_lsn),
            proven: chain.files.iter().map(|link| link.file.header.proves()).fold(from, Lsn::max),
            entered: Vec::new(),
            unsynced: VecDeque::new(),
            searched: false,
            given_up: 0,
            recovered: Recovered::default(),
        };
        for index in 0..chain.files.len() {
            scan.entered.push(scan.next);
            let end = scan.read_file(chain, index, from, replay)?;
            let follower = chain.files.get(index + 1);
            if follower.is_none_or(|follower| follower.held.first_lsn != scan.next) {
                scan.decide(chain, index, end)?;
                break;
            }
        }
        scan.forget_synced();
        let given_up = chain.files.last().map_or(0, |newest| newest.file.header.given_up);
        scan.given_up = if scan.next <= given_up { given_up } else { 0 };
        Ok(scan)
    }

    /// Replays a file's frames up to the first that is not the one due; returns where the frames before it end.
    fn read_file<E>(
        &mut self,
        chain: &Chain,
        index: usize,
        from: Lsn,
        replay: &mut dyn Replay<E>,
    ) -> Result<u64, RecoverError<E>> {
        let file = &chain.files[index].file;
        let io = |source| RecoverError::Io { path: file.path.clone(), source };
        let void_from = chain.files.get(index + 1).map_or(0, |next| next.file.header.first_lsn);
        let mut reader = FrameReader::new(file).map_err(io)?;
        let mut end = file::FIRST_FRAME;
        while self.next != void_from {
            let position = reader.next_position(end).map_err(io)?;
            let Some(mut frame) = reader.read(position).map_err(io)? else { break };
            let header = frame.header;
            let due = self.next - u64::from(header.kind == FrameKind::Mark);
            if header.lsn != due {
                let reason = format!("a frame with LSN {} is where {due} is due", header.lsn);
                return Err(corrupt(&file.path, position, reason));
            }
            self.proven = self.proven.max(header.synced);
            if header.kind == FrameKind::Data {
                let completed = self.complete(chain, index, position, &mut reader, &mut frame, replay)?;
                if matches!(completed, Some((_, Completed::Torn))) {
                    break;
                }
                self.next += 1;
                self.unsynced.push_back(Location { lsn: header.lsn, file: index, position, completed });
                self.forget_synced();
                if header.lsn > from {
                    self.recovered.frames += 1;
                    self.recovered.bytes +=
                        header.length - frame::HEADER_BYTES - 4 * u64::from(header.batch_count);
                    replay
                        .apply(header.lsn, &frame.events, frame.batches)
                        .map_err(|source| RecoverError::Apply { lsn: header.lsn, source })?;
                }
            }
            end = position + frame::padded(header.length);
        }
        Ok(end)
    }

    /// Makes the frame at a position whole, if it refers to anything outside and nothing proves that it was synced.
    fn complete<E>(
        &mut self,
        chain: &Chain,
        index: usize,
        position: u64,
        reader: &mut FrameReader,
        frame: &mut Frame,
        replay: &mut dyn Replay<E>,
    ) -> Result<Option<(Vec<Bytes>, Completed)>, RecoverError<E>> {
        let lsn = frame.header.lsn;
        if !frame.header.refers
            || lsn <= self.proven
            || self.is_proven(chain, index, position, reader, lsn)?
        {
            return Ok(None);
        }
        let completed = replay
            .complete(&frame.events, &mut frame.batches)
            .map_err(|(path, source)| RecoverError::Io { path, source })?;
        Ok(Some((frame.batches.clone(), completed)))
    }

    /// Whether a frame behind the position says that `lsn` was synced. Looks no further than it must, and once only at
    /// the end.
    fn is_proven<E>(
        &mut self,
        chain: &Chain,
        index: usize,
        position: u64,
        reader: &mut FrameReader,
        lsn: Lsn,
    ) -> Result<bool, RecoverError<E>> {
        let mut start = position;
        for (at, link) in chain.files.iter().enumerate().skip(index) {
            if self.searched {
                break;
            }
            let io = |source| RecoverError::Io { path: link.file.path.clone(), source };
            let mut next;
            let reader = if at == index {
                &mut *reader
            } else {
                next = FrameReader::new(&link.file).map_err(io)?;
                &mut next
            };
            while let Some((found, header)) = reader.find_header(start).map_err(io)? {
                self.proven = self.proven.max(header.synced);
                if self.proven >= lsn {
                    return Ok(true);
                }
                start = found + frame::padded(header.length);
            }
            start = file::FIRST_FRAME;
        }
        self.searched = true;
        Ok(false)
    }

    /// Decides whether what ends the frames of a file is damage or the end of all that was ever promised.
    fn decide<E>(&mut self, chain: &Chain, index: usize, end: u64) -> Result<(), RecoverError<E>> {
        let mut witness = (self.proven >= self.next)
            .then(|| "another frame, a file's header, or the checkpoint".to_owned());
        let mut seen_in = None;
        let mut start = end;
        for (seen, link) in chain.files.iter().enumerate().skip(index) {
            let path = &link.file.path;
            let io = |source| RecoverError::Io { path: path.clone(), source };
            let mut reader = FrameReader::new(&link.file).map_err(io)?;
            while let Some((found, header)) = reader.find_header(start).map_err(io)? {
                seen_in.get_or_insert(seen);
                self.proven = self.proven.max(header.synced);
                // The header suffices: what it claims was true when it was written, whatever became of its body.
                if header.synced >= self.next {
                    witness.get_or_insert_with(|| format!("the frame at byte {found} of {}", path.display()));
                }
                start = found + frame::padded(header.length);
            }
            start = file::FIRST_FRAME;
        }
        let here = &chain.files[index].file;
        let Some(witness) = witness.filter(|_| !planted("cut-the-middle")) else {
            if seen_in.is_some() {
                self.recovered.torn = Some((here.path.clone(), end));
            }
            return Ok(());
        };
        let reason = format!("frame {} cannot be read, but {witness} shows that it was synced", self.next);
        // A file that is followed ends anywhere. When nothing is left here, and the follower lacks the frame that every
        // file begins with although it has others, or is followed itself, then that frame is the damage.
        let has_begun = |next: usize| seen_in.map_or(next + 1 < chain.files.len(), |seen| seen >= next);
        match chain.files.get(index + 1) {
            Some(next) if next.held.first_lsn == 0 && has_begun(index + 1) => {
                Err(corrupt(&next.file.path, file::FIRST_FRAME, reason))
            }
            _ => {
                let io = |source| RecoverError::Io { path: here.path.clone(), source };
                let position = FrameReader::new(here).and_then(|mut reader| reader.next_position(end));
                Err(corrupt(&here.path, position.map_err(io)?, reason))
            }
        }
    }

    fn forget_synced(&mut self) {
        while self.unsynced.front().is_some_and(|frame| frame.lsn <= self.proven) {
            self.unsynced.pop_front();
        }
    }
}

/// Writes the file that the journal goes on in. Returns it with the end of its frames, and how many of the chain's files
/// remain part of the journal.
fn rebuild<E>(
    disk: &dyn Disk,
    dir: &Path,
    options: &JournalOptions,
    listing: &Listing,
    chain: &Chain,
    scan: &Scan,
) -> Result<(JournalFile, u64, usize), RecoverError<E>> {
    let sequence = listing.journals.last().map_or(1, |newest| newest + 1);
    let first_lsn = scan.proven + 1;
    // A file stays when it holds a frame that is not void: one at or above the LSN that was due at its beginning, below
    // the one due at the next file's, and below the new file's first.
    let ends = scan.entered.iter().skip(1).chain([&scan.next]);
    let holds = scan.entered.iter().zip(ends).map(|(entered, end)| *entered < *end.min(&first_lsn));
    let kept = holds.enumerate().filter(|(_, holds)| *holds).last().map_or(0, |(index, _)| index + 1);
    let previous = match kept.checked_sub(1) {
        Some(last) => chain.files[last].held.sequence,
        None => chain.files.first().map_or(0, |first| first.file.header.previous),
    };
    let path = dir.join(file::name(sequence));
    let io = |source| RecoverError::Io { path: path.clone(), source };
    let mut header =
        FileHeader::new(options.environment.random(), sequence, previous, first_lsn, scan.next - 1);
    header.given_up = scan.given_up;
    // The names relied on may be from a start that died before it had synced them.
    if !chain.files.is_empty() {
        disk.sync_dir(dir).map_err(io)?;
    }
    let mut file = JournalFile::create(disk, dir, header).map_err(io)?;
    let mut position = file::FIRST_FRAME;
    let mut encoded = Vec::new();
    let mut reader: Option<(usize, FrameReader)> = None;
    for location in &scan.unsynced {
        let source = &chain.files[location.file].file;
        let source_io = |error| RecoverError::Io { path: source.path.clone(), source: error };
        let reader = match &mut reader {
            Some((index, reader)) if *index == location.file => reader,
            stale => &mut stale.insert((location.file, FrameReader::new(source).map_err(source_io)?)).1,
        };
        let Some(frame) = reader.read(location.position).map_err(source_io)? else {
            let reason = format!("frame {} could be read once, but not again", location.lsn);
            return Err(corrupt(&source.path, location.position, reason));
        };
        let place = Place { salt: header.salt, position };
        let (batches, refers) = match &location.completed {
            Some((batches, completed)) => (batches, *completed != Completed::Whole),
            None => (&frame.batches, frame.header.refers),
        };
        let synced = frame.header.synced;
        let label = Label { kind: FrameKind::Data, lsn: location.lsn, synced, refers, left_out: 0 };
        let events = &frame.events;
        frame::encode(&mut encoded, place, label, events, batches);
        position +=
            write_frame(&file, position, options.file_bytes, &encoded, events, batches).map_err(io)?;
    }
    let never = AtomicBool::new(false);
    file.fill_zeros(position, file::zeros_until(disk, dir, options.first_file_bytes), &never).map_err(io)?;
    file.publish(disk, dir).map_err(io)?;
    Ok((file, position, kept))
}

fn corrupt<E>(file: &Path, position: u64, reason: String) -> RecoverError<E> {
    RecoverError::Corrupt { file: PathBuf::from(file), position, reason }
}
