//! The writing end of a journal.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::file::{self, JournalFile, PAGE};
use super::frame::{self, FrameKind, Label, Place};
use super::prepare::{Preparer, Wanted};
use super::syncer::{Progress, Reached, Syncer};
use super::{FailedAction, Failure, JournalError, JournalOptions, Lsn, Outside};

/// Writes end where a page of the page cache ends. The page that the next frame begins in is then always in memory whole,
/// and never has to be read from a recycled file first.
static PADDING: [u8; PAGE as usize] = [0; PAGE as usize];

/// An open journal, owned by the one thread that writes it. Made by [`Journal::recover`].
///
/// Nothing needs closing: dropping it at any moment is as good as a crash that loses nothing written.
#[derive(Debug)]
pub struct Journal {
    pub(super) options: JournalOptions,
    pub(super) progress: Arc<Progress>,
    pub(super) preparer: Preparer,
    /// Files that hold frames, oldest first; the last one is written.
    pub(super) files: VecDeque<HeldFile>,
    pub(super) current: Arc<JournalFile>,
    /// Where the next frame goes in the current file.
    pub(super) position: u64,
    /// End of the current file's preallocated part.
    pub(super) capacity: u64,
    /// Whether the next file has been asked for, and urgently.
    pub(super) asked: Asked,
    pub(super) next_lsn: Lsn,
    /// Bytes of files that were used, since the start.
    pub(super) used: u64,
    /// The highest synced LSN that some frame or header of the journal already tells.
    pub(super) told: Lsn,
    pub(super) header: Vec<u8>,
    pub(super) recovered: Recovered,
}

/// How the next file has been asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    NotYet,
    InGoodTime,
    /// As it is, rather than later.
    AtOnce,
}

/// A file that the journal consists of.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldFile {
    pub(super) sequence: u64,
    /// LSN that its first frame has or will have; 0 = not known.
    pub(super) first_lsn: Lsn,
    /// Whether `first_lsn` is in the file's header, rather than only in its first frame.
    pub(super) fixed: bool,
}

/// What a recovery found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Frames replayed.
    pub frames: u64,
    /// Bytes of events and batches in them.
    pub bytes: u64,
    /// Frames that were not known to be synced and were written anew.
    pub rewritten: u64,
    /// File and position at which a torn tail was cut.
    pub torn: Option<(PathBuf, u64)>,
    /// A repair has given up frames that had been synced, and no run has begun since.
    pub given_up: bool,
}

impl Journal {
    /// LSN that the next appended frame will have.
    pub fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Longest frame that can be appended, in bytes.
    pub fn max_frame_bytes(&self) -> u64 {
        self.options.max_frame_bytes
    }

    /// LSN of the last frame written; every frame up to it survives the death of the process.
    pub fn written(&self) -> Lsn {
        self.progress.written()
    }

    /// The highest LSN known to be on the device; every frame up to it survives the loss of power.
    pub fn synced(&self) -> Lsn {
        self.progress.synced()
    }

    /// Bytes written but not known to be on the device.
    pub fn unsynced_bytes(&self) -> u64 {
        self.progress.unsynced_bytes()
    }

    /// Bytes of files that frames have taken since the start, what was left out between them included.
    pub fn used_bytes(&self) -> u64 {
        self.used
    }

    /// The failure that has stopped the journal, if any.
    pub fn failure(&self) -> Option<Arc<Failure>> {
        self.progress.failure()
    }

    /// What the recovery that opened this journal found.
    pub fn recovered(&self) -> &Recovered {
        &self.recovered
    }

    /// A handle that syncs this journal, for another thread.
    pub fn syncer(&self) -> Syncer {
        Syncer::new(self.progress.clone())
    }

    /// Writes one frame with one vectored write (several beyond some thousand batches) and returns its LSN. The frame
    /// then survives the death of the process; it survives the loss of power once [`Syncer::sync`] returned its LSN.
    ///
    /// Blocks for a copy into the page cache, and for the preparation of a file where that has fallen far behind.
    /// A frame over the limit changes nothing. Any other error stops the journal; whether the frame is in it shows
    /// only after a restart.
    pub fn append(&mut self, events: &[u8], batches: &[Bytes]) -> Result<Lsn, JournalError> {
        self.append_with(events, batches, Outside::default())
    }

    /// As [`append`](Self::append), for a frame of which some batches lie elsewhere: they were written already, and a
    /// sync of the frame is also one of them. In the limit they count as if they were here, where a recovery may put them.
    pub fn append_with(
        &mut self,
        events: &[u8],
        batches: &[Bytes],
        outside: Outside,
    ) -> Result<Lsn, JournalError> {
        let length = frame::length(events, batches);
        let (bytes, limit) = (length + outside.bytes, self.options.max_frame_bytes);
        if bytes > limit {
            return Err(JournalError::FrameTooLarge { bytes, limit });
        }
        let lsn = self.next_lsn;
        self.write(FrameKind::Data, lsn, length, events, batches, outside)?;
        self.next_lsn += 1;
        Ok(lsn)
    }

    /// Writes a mark, which makes recovery certain that the last synced frames were synced; for moments of quiet.
    ///
    /// Does nothing, and returns `false`, when some frame tells as much already. The mark itself takes effect with
    /// the next sync. Errors as for [`append`](Self::append).
    pub fn mark(&mut self) -> Result<bool, JournalError> {
        if self.progress.check()?.synced <= self.told {
            return Ok(false);
        }
        let lsn = self.next_lsn - 1;
        self.write(FrameKind::Mark, lsn, frame::HEADER_BYTES, &[], &[], Outside::default())?;
        Ok(true)
    }

    /// Gives up the frames below an LSN: no later recovery will start before it. Files without any other frame are
    /// recycled or removed in the background.
    ///
    /// The caller keeps what the previous checkpoint needs by passing that one's LSN plus one.
    pub fn release(&mut self, below: Lsn) {
        let synced = self.progress.synced();
        // A file goes only when its successor's beginning is on the device: else recovery could find neither.
        let keep = self.files.iter().rposition(|file| {
            let begins_durably = file.fixed || file.first_lsn <= synced;
            file.first_lsn != 0 && file.first_lsn <= below && begins_durably
        });
        let released = self.files.drain(..keep.unwrap_or(0));
        self.preparer.retire(released.map(|file| file::name(file.sequence)));
    }

    /// Does on this thread what waits for the background thread: files to prepare, recycle and remove. For journals
    /// without one; with one there is nothing left to do here.
    pub fn prepare_files(&self) {
        self.preparer.work_now();
    }

    fn write(
        &mut self,
        kind: FrameKind,
        lsn: Lsn,
        length: u64,
        events: &[u8],
        batches: &[Bytes],
        outside: Outside,
    ) -> Result<(), JournalError> {
        let Reached { synced, all_taken } = self.progress.check()?;
        // A page that a sync has taken is not written again: the device would only get it once more, and nothing that
        // happens to that write can touch frames that were synced.
        let is_first = self.position == file::FIRST_FRAME;
        let start = if all_taken && !is_first { self.position.next_multiple_of(PAGE) } else { self.position };
        let first_lsn = lsn + u64::from(kind == FrameKind::Mark);
        let start = self.make_room(start, frame::padded(length), first_lsn, synced)?;
        let left_out = start.saturating_sub(self.position);
        self.position = start;
        let place = Place { salt: self.current.header.salt, position: start };
        let label = Label { kind, lsn, synced, refers: !outside.files.is_empty(), left_out };
        frame::encode(&mut self.header, place, label, events, batches);
        let written =
            write_frame(&self.current, start, self.options.file_bytes, &self.header, events, batches)
                .map_err(|source| self.progress.stop(FailedAction::Write, &self.current.path, source))?;
        self.progress.wrote(&self.current, lsn, written, outside);
        self.position += written;
        self.used += left_out + written;
        self.told = synced;
        Ok(())
    }

    /// Goes on to the next file when the frame does not fit the current one, and asks for the next in good time. Answers
    /// where the frame begins.
    fn make_room(&mut self, start: u64, bytes: u64, lsn: Lsn, synced: Lsn) -> Result<u64, JournalError> {
        let end = start + bytes;
        if self.asked == Asked::NotYet && end > self.capacity / 2 {
            self.preparer.request(self.wanted(synced));
            self.asked = Asked::InGoodTime;
        }
        if self.asked == Asked::InGoodTime && end > self.options.file_bytes / 8 * 7 {
            self.preparer.hurry();
            self.asked = Asked::AtOnce;
        }
        if end <= self.capacity {
            return Ok(start);
        }
        let next = match self.preparer.try_take() {
            Some(next) => next,
            // Growing the file costs its syncs a little; waiting costs every caller a lot.
            None if end <= self.options.file_bytes => return Ok(start),
            None => self
                .preparer
                .take(self.wanted(synced))
                .map_err(|source| self.progress.stop(FailedAction::Prepare, &self.current.path, source))?,
        };
        self.files.push_back(HeldFile { sequence: next.header.sequence, first_lsn: lsn, fixed: false });
        self.capacity = next.prepared.min(self.options.file_bytes);
        self.current = Arc::new(next);
        self.position = file::FIRST_FRAME;
        self.asked = Asked::NotYet;
        Ok(self.position)
    }

    fn wanted(&self, synced: Lsn) -> Wanted {
        let previous = self.current.header.sequence;
        Wanted { sequence: previous + 1, previous, synced }
    }
}

/// Writes a frame, whose encoded header is given, and zeros behind it up to the end of the page or the file; returns the
/// bytes that the frame occupies.
pub(super) fn write_frame(
    file: &JournalFile,
    position: u64,
    file_bytes: u64,
    header: &[u8],
    events: &[u8],
    batches: &[Bytes],
) -> io::Result<u64> {
    let length = (header.len() + events.len() + batches.iter().map(Bytes::len).sum::<usize>()) as u64;
    let size = frame::padded(length);
    let mut slices = Vec::with_capacity(batches.len() + 3);
    slices.push(IoSlice::new(header));
    slices.push(IoSlice::new(events));
    slices.extend(batches.iter().map(|batch| IoSlice::new(batch)));
    let page_end = (position + size).next_multiple_of(PAGE).min(file_bytes).max(position + size);
    slices.push(IoSlice::new(&PADDING[..(page_end - position - length) as usize]));
    file.disk_file.write_all_vectored_at(&mut slices, position)?;
    Ok(size)
}
