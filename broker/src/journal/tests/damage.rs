//! Damage in every place, against a description of the rule that shares no code with recovery: the layout noted while
//! writing, and what each frame and header claimed.

use super::*;
use crate::journal::file;

/// A journal with everything in it that a history leaves behind, and what is known about it.
struct History {
    disk: MemDisk,
    appended: Vec<Content>,
    /// Files in the order of the chain.
    files: Vec<Layout>,
    /// Whether nothing of the history before its last start is void.
    last: Lsn,
}

#[derive(Clone)]
struct Layout {
    sequence: u64,
    first_lsn: Lsn,
    proves: Lsn,
    frames: Vec<Placed>,
}

#[derive(Clone, Copy)]
struct Placed {
    position: u64,
    /// Where the frame before it ends: what is between was left out.
    due: u64,
    length: u64,
    /// LSN of the first data frame that is lost when this frame is.
    lsn: Lsn,
    claim: Lsn,
}

/// What recovery must do about one piece of damage.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// Replay the frames up to this LSN.
    Prefix(Lsn),
    /// Name the file, and one of these positions: where the frame is, as its header tells if it is left, or where it may be.
    Refuse(u64, [u64; 2]),
}

struct Writer {
    journal: Journal,
    history: History,
}

impl Writer {
    fn new() -> Self {
        let disk = MemDisk::new();
        let journal = open(&disk);
        let history = History { disk, appended: Vec::new(), files: Vec::new(), last: 0 };
        let mut writer = Self { journal, history };
        writer.note_file();
        writer
    }

    fn note_file(&mut self) {
        let header = &self.journal.current.header;
        if self.history.files.last().is_some_and(|file| file.sequence == header.sequence) {
            return;
        }
        self.history.files.push(Layout {
            sequence: header.sequence,
            first_lsn: header.first_lsn,
            proves: header.synced.max(header.first_lsn.max(1) - 1),
            frames: Vec::new(),
        });
    }

    fn note_frame(&mut self, length: u64, lsn: Lsn) {
        self.note_file();
        let position = self.journal.position - length.next_multiple_of(512);
        let file = self.history.files.last_mut().unwrap();
        let due = file.frames.last().map_or(512, |last| last.position + last.length.next_multiple_of(512));
        file.frames.push(Placed { position, due, length, lsn, claim: self.journal.told });
    }

    fn append(&mut self, events: usize, batches: &[usize]) {
        let content = content(self.history.appended.len() as u64 + 1000, events, batches);
        let lsn = append(&mut self.journal, &content).unwrap();
        self.history.appended.push(content);
        let length = 64 + events + batches.iter().map(|batch| batch + 4).sum::<usize>();
        self.note_frame(length as u64, lsn);
        self.history.last = lsn;
    }

    fn sync(&mut self) {
        self.journal.syncer().sync().unwrap();
    }

    fn mark(&mut self) {
        assert!(self.journal.mark().unwrap());
        self.note_frame(64, self.journal.next_lsn());
    }

    /// Ends and starts the journal, and notes where the frames were rewritten to.
    fn restart(&mut self) {
        let rewritten_from =
            self.journal.told.max(self.history.files.iter().map(|file| file.proves).max().unwrap()) + 1;
        self.journal = open(&self.history.disk);
        let header = self.journal.current.header;
        assert_eq!(header.first_lsn, rewritten_from);
        while self.history.files.last().is_some_and(|file| file.sequence != header.previous) {
            self.history.files.pop();
        }
        self.note_file();
        let mut position = 512;
        for lsn in rewritten_from..=self.history.last {
            let (events, batches) = &self.history.appended[lsn as usize - 1];
            let length =
                (64 + events.len() + batches.iter().map(|batch| batch.len() + 4).sum::<usize>()) as u64;
            // What a rewritten frame claims is at most what its original did, and is proven by its file's header.
            let placed = Placed { position, due: position, length, lsn, claim: 0 };
            self.history.files.last_mut().unwrap().frames.push(placed);
            position += length.next_multiple_of(512);
        }
        assert_eq!(position, self.journal.position);
    }

    /// Puts everything on the device, so that copies of the disk are cheap and the damage is all there is.
    fn finish(self) -> History {
        let Self { journal, history } = self;
        drop(journal);
        for name in history.disk.list(&dir()).unwrap() {
            history.disk.open(&dir().join(name)).unwrap().sync_data().unwrap();
        }
        history.disk.sync_dir(&dir()).unwrap();
        history
    }
}

impl History {
    /// The rule, applied to the loss of one frame: `survives` says which bytes are as they were.
    fn verdict(&self, damaged: usize, survives: impl Fn(&Placed) -> bool, header_survives: bool) -> Verdict {
        let file = &self.files[damaged];
        if !header_survives {
            return Verdict::Refuse(file.sequence, [0, 0]);
        }
        let void_from = self.files.get(damaged + 1).map_or(0, |next| next.first_lsn);
        let void_from = if void_from == 0 { Lsn::MAX } else { void_from };
        // A mark right before the void part is not needed any more either.
        let lost = file.frames.iter().find(|frame| frame.lsn < void_from && !survives(frame));
        let Some(lost) = lost else { return Verdict::Prefix(self.last) };
        let headers = self.files.iter().map(|file| file.proves);
        let beyond = file.frames.iter().filter(|frame| frame.position > lost.position && survives(frame));
        let later = self.files[damaged + 1..].iter().flat_map(|file| &file.frames);
        let claims = beyond.chain(later).map(|frame| frame.claim);
        let is_last_of_file = file.frames.last().is_some_and(|last| last.position == lost.position);
        let is_mark_at_end = is_last_of_file
            && self
                .files
                .get(damaged + 1)
                .and_then(|next| next.frames.first())
                .is_some_and(|next| next.lsn == lost.lsn);
        if is_mark_at_end {
            return Verdict::Prefix(self.last);
        }
        if headers.chain(claims).any(|claim| claim >= lost.lsn) {
            return Verdict::Refuse(file.sequence, [lost.due, lost.position]);
        }
        Verdict::Prefix(lost.lsn - 1)
    }

    /// Recovers a damaged copy and compares; also what recovery left behind must recover to the same.
    fn check(&self, disk: &MemDisk, expected: &Verdict, what: &str) {
        match (recover(disk, 0), expected) {
            (Ok((journal, frames)), Verdict::Prefix(last)) => {
                assert_eq!(frames.len() as u64, *last, "{what}");
                assert_dense(&frames, 0, &self.appended);
                assert_eq!(journal.next_lsn(), last + 1, "{what}");
                drop(journal);
                disk.power_cut(last * 31);
                let (_, again) =
                    recover(disk, 0).unwrap_or_else(|error| panic!("{what}, second start: {error}"));
                assert!(again == frames, "{what}: the second start differs");
            }
            (Err(RecoverError::Corrupt { file, position, .. }), Verdict::Refuse(sequence, expected)) => {
                assert_eq!(file, dir().join(file::name(*sequence)), "{what}");
                assert!(expected.contains(&position), "{what}: {position} is none of {expected:?}");
            }
            (Ok((_, frames)), _) => panic!("{what}: {} frames, expected {expected:?}", frames.len()),
            (Err(error), _) => panic!("{what}: {error}, expected {expected:?}"),
        }
    }

    fn bytes(&self, sequence: u64) -> Vec<u8> {
        let file = self.disk.open(&dir().join(file::name(sequence))).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_full_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Cuts the file short, or loses all its bytes, from each byte of `range` on.
    fn cut_everywhere(&self, index: usize, range: std::ops::Range<u64>) {
        let sequence = self.files[index].sequence;
        let path = dir().join(file::name(sequence));
        let bytes = self.bytes(sequence);
        for cut in range {
            let what = format!("file {sequence} ends at {cut}");
            let disk = self.disk.fork();
            disk.open(&path).unwrap().set_len(cut).unwrap();
            let verdict = self.verdict(index, |frame| frame.position + frame.length <= cut, cut >= 512);
            self.check(&disk, &verdict, &what);

            let what = format!("file {sequence} is zero from {cut} on");
            let disk = self.disk.fork();
            disk.open(&path).unwrap().write_all_at(&vec![0; bytes.len() - cut as usize], cut).unwrap();
            let survives = |frame: &Placed| {
                let end = frame.position + frame.length;
                bytes[frame.position.max(cut.min(end)) as usize..end as usize].iter().all(|byte| *byte == 0)
            };
            let header_survives = bytes[cut.min(512) as usize..512].iter().all(|byte| *byte == 0);
            self.check(&disk, &self.verdict(index, survives, header_survives), &what);
        }
    }

    /// Flips one bit, in turn, in every byte of every header and in some bytes of every sector of a file.
    fn flip_everywhere(&self, index: usize) {
        let sequence = self.files[index].sequence;
        let path = dir().join(file::name(sequence));
        let bytes = self.bytes(sequence);
        let headers = self.files[index].frames.iter().flat_map(|frame| frame.position..frame.position + 72);
        let sectors = (0..bytes.len() as u64 / 512)
            .flat_map(|sector| [0, 37, 80 + sector * 97 % 400, 511].map(|offset| sector * 512 + offset));
        for position in (0..60).chain(headers).chain(sectors) {
            let flipped = bytes[position as usize] ^ (1 << (position.wrapping_mul(0x9e37_79b9) >> 16 & 7));
            let disk = self.disk.fork();
            disk.open(&path).unwrap().write_all_at(&[flipped], position).unwrap();
            let survives =
                |frame: &Placed| position < frame.position || position >= frame.position + frame.length;
            let verdict = self.verdict(index, survives, position >= 512);
            self.check(&disk, &verdict, &format!("file {sequence}, a bit at {position}"));
        }
    }
}

/// Frames of many sizes over several files, the last synced ones marked, the very last not synced.
fn varied() -> History {
    let mut writer = Writer::new();
    for round in 0..6 {
        writer.append(round * 100, &[round * 211, 0, 17]);
        writer.append(3, &[]);
        if round % 2 == 1 {
            writer.sync();
        }
        writer.append(300, &[900]);
    }
    writer.sync();
    writer.mark();
    writer.append(1, &[1, 2, 3]);
    writer.append(500, &[300, 40]);
    writer.append(0, &[448]);
    writer.append(120, &[]);
    writer.finish()
}

/// The same with restarts in it: rewritten frames, void ones, files that begin at an LSN of their own.
fn restarted() -> History {
    let mut writer = Writer::new();
    for round in 0..3 {
        for size in [200, 900, 40, 1500] {
            writer.append(size, &[size / 2]);
        }
        writer.sync();
        writer.append(700, &[]);
        writer.append(900, &[40, 1]);
        if round == 1 {
            writer.sync();
            writer.mark();
        }
        writer.restart();
    }
    writer.append(90, &[100]);
    writer.append(80, &[]);
    writer.sync();
    writer.mark();
    writer.append(600, &[5]);
    writer.finish()
}

/// Nothing but one synced frame, which no frame or header tells of: the case that nobody can decide.
fn unmarked() -> History {
    let mut writer = Writer::new();
    writer.append(100, &[700]);
    writer.sync();
    writer.finish()
}

#[test]
fn the_journal_may_be_cut_at_every_byte_of_its_last_frames() {
    for history in [varied(), restarted(), unmarked()] {
        let index = history.files.len() - 1;
        let frames = &history.files[index].frames;
        let first = frames[frames.len().saturating_sub(5)].position;
        let end = frames.last().map(|last| last.position + last.length).unwrap();
        history.cut_everywhere(index, first..end + 3);
    }
}

#[test]
fn any_file_may_be_cut_anywhere() {
    for history in [varied(), restarted()] {
        for index in 0..history.files.len() {
            let length = history.bytes(history.files[index].sequence).len() as u64;
            for start in (0..length).step_by(101) {
                history.cut_everywhere(index, start..start + 1);
            }
        }
    }
}

#[test]
fn a_bit_may_flip_anywhere() {
    for history in [varied(), restarted(), unmarked()] {
        assert!(history.files.len() < 12);
        (0..history.files.len()).for_each(|index| history.flip_everywhere(index));
    }
}

#[test]
fn the_first_frame_of_a_file_is_named_when_it_is_the_damaged_one() {
    let history = varied();
    let file = &history.files[2];
    assert_eq!(file.first_lsn, 0);
    let disk = history.disk.fork();
    disk.open(&dir().join(file::name(file.sequence))).unwrap().write_all_at(&[0; 512], 512).unwrap();
    history.check(&disk, &Verdict::Refuse(file.sequence, [512, 512]), "no first frame");
}

#[test]
fn two_damages_are_refused_at_the_first() {
    let history = varied();
    let (first, second) = (&history.files[0], &history.files[2]);
    let disk = history.disk.fork();
    for file in [first, second] {
        let position = file.frames[1].position;
        disk.open(&dir().join(file::name(file.sequence))).unwrap().write_all_at(&[1; 700], position).unwrap();
    }
    history.check(&disk, &Verdict::Refuse(first.sequence, [first.frames[1].due; 2]), "two damages");
}
