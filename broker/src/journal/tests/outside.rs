//! Frames that refer to bytes in another file.

use super::*;
use crate::disk::DiskFile;
use crate::journal::{Completed, Outside, OutsideFile, Replay};

const LENGTH: usize = 3000;

/// The other file. A batch in it is so many equal bytes; its frame has the position and the byte.
#[derive(Clone, Debug)]
struct Other {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
}

impl Other {
    fn create(disk: &MemDisk) -> Self {
        let path = PathBuf::from("/data/other");
        let file = disk.create(&path).unwrap();
        disk.sync_dir(Path::new("/data")).unwrap();
        Self { path, file }
    }

    fn append(&self, journal: &mut Journal, position: u64, byte: u8) -> Result<Lsn, JournalError> {
        self.file.write_all_at(&[byte; LENGTH], position).unwrap();
        let batch = [&position.to_be_bytes()[..], &[byte]].concat();
        let outside = Outside { bytes: LENGTH as u64, files: vec![Arc::new(self.clone())] };
        journal.append_with(b"refers", &[batch.into()], outside)
    }
}

impl OutsideFile for Other {
    fn path(&self) -> &Path {
        &self.path
    }

    fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

#[derive(Default)]
struct Found {
    disk: MemDisk,
    asked: u64,
    frames: Vec<(Lsn, Vec<Bytes>)>,
}

impl Replay<Infallible> for Found {
    fn apply(&mut self, lsn: Lsn, _: &[u8], batches: Vec<Bytes>) -> Result<(), Infallible> {
        self.frames.push((lsn, batches));
        Ok(())
    }

    fn complete(&mut self, _: &[u8], batches: &mut [Bytes]) -> Result<Completed, (PathBuf, std::io::Error)> {
        self.asked += 1;
        let Ok(file) = self.disk.open(Path::new("/data/other")) else { return Ok(Completed::Gone) };
        let position = u64::from_be_bytes(batches[0][..8].try_into().unwrap());
        let mut bytes = vec![0; LENGTH];
        file.read_full_at(&mut bytes, position).unwrap();
        let whole = bytes.iter().all(|byte| *byte == batches[0][8]);
        batches[0] = bytes.into();
        Ok(if whole { Completed::Whole } else { Completed::Torn })
    }
}

fn find(disk: &MemDisk) -> (Journal, Found) {
    let mut found = Found { disk: disk.clone(), ..Found::default() };
    let journal = Journal::recover(Arc::new(disk.clone()), &dir(), small(), 0, &mut found).unwrap();
    (journal, found)
}

#[test]
fn a_synced_frame_has_synced_what_it_refers_to_and_nobody_looks_there_again() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    for at in 0..5 {
        other.append(&mut journal, at * LENGTH as u64, at as u8 + 1).unwrap();
    }
    assert!(journal.unsynced_bytes() > 5 * LENGTH as u64);
    assert_eq!(journal.syncer().sync().unwrap(), 5);
    assert_eq!(journal.unsynced_bytes(), 0);
    assert!(journal.mark().unwrap());
    journal.syncer().sync().unwrap();
    disk.power_cut_losing_all();
    let (_, found) = find(&disk);
    assert_eq!((found.frames.len(), found.asked), (5, 0));
    assert!(found.frames.iter().all(|(_, batches)| batches[0].len() == 9));
    let mut bytes = vec![0; 5 * LENGTH];
    disk.open(&other.path).unwrap().read_full_at(&mut bytes, 0).unwrap();
    assert!(bytes.chunks(LENGTH).zip(1..).all(|(batch, byte)| batch.iter().all(|found| *found == byte)));
}

#[test]
fn a_later_frame_vouches_for_what_an_earlier_one_refers_to() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    other.append(&mut journal, 0, 1).unwrap();
    journal.syncer().sync().unwrap();
    for tag in 2..6 {
        append(&mut journal, &content(tag, 10, &[4000])).unwrap();
    }
    other.append(&mut journal, LENGTH as u64, 2).unwrap();
    // Damage where the journal only refers to is none of its business.
    other.file.write_all_at(&[9], 7).unwrap();
    disk.kill();
    let (_, found) = find(&disk);
    assert_eq!((found.frames.len(), found.asked), (6, 1));
    assert_eq!(found.frames[0].1[0].len(), 9);
    assert_eq!(found.frames[5].1[0], [2; LENGTH][..]);
}

#[test]
fn what_an_unsynced_frame_refers_to_is_written_with_it_by_the_next_start() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    other.append(&mut journal, 0, 7).unwrap();
    append(&mut journal, &content(2, 10, &[])).unwrap();
    disk.kill();
    let (_, found) = find(&disk);
    assert_eq!((found.frames.len(), found.asked), (2, 1));
    // As if the sync of the other file had failed once, long ago.
    disk.power_cut_losing_all();
    let (_, found) = find(&disk);
    assert_eq!((found.frames.len(), found.asked), (2, 0));
    assert_eq!(found.frames[0].1[0], [7; LENGTH][..]);
}

#[test]
fn a_frame_ends_the_journal_when_what_it_refers_to_is_not_whole() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    append(&mut journal, &content(1, 10, &[])).unwrap();
    other.append(&mut journal, 0, 7).unwrap();
    append(&mut journal, &content(3, 10, &[])).unwrap();
    other.file.write_all_at(&[9], LENGTH as u64 - 1).unwrap();
    disk.kill();
    let (mut journal, found) = find(&disk);
    assert_eq!(found.frames.len(), 1);
    assert!(journal.recovered().torn.is_some());
    assert_eq!(other_lsn(&mut journal), 2);
    disk.kill();
    let (_, found) = find(&disk);
    assert_eq!(found.frames.len(), 2, "nothing comes back");
}

fn other_lsn(journal: &mut Journal) -> Lsn {
    append(journal, &content(9, 10, &[])).unwrap()
}

#[test]
fn a_frame_whose_other_file_is_gone_was_synced() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    other.append(&mut journal, 0, 7).unwrap();
    append(&mut journal, &content(2, 10, &[])).unwrap();
    journal.syncer().sync().unwrap();
    disk.remove(&other.path).unwrap();
    disk.kill();
    for asked in [1, 0] {
        let (_, found) = find(&disk);
        assert_eq!((found.frames.len(), found.asked), (2, asked));
        assert_eq!(found.frames[0].1[0].len(), 9);
        disk.power_cut_losing_all();
    }
}

#[test]
fn a_failed_sync_of_the_other_file_stops_the_journal() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    other.append(&mut journal, 0, 7).unwrap();
    disk.fail_sync(0);
    let failed = journal.syncer().sync().unwrap_err().to_string();
    assert!(failed.contains("/data/other"), "{failed}");
    assert_eq!(journal.synced(), 0);
    assert_eq!(append(&mut journal, &content(2, 10, &[])).unwrap_err().to_string(), failed);
}

#[test]
fn a_frame_must_fit_with_all_that_it_refers_to() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let other = Other::create(&disk);
    let outside = Outside { bytes: 5_990, files: vec![Arc::new(other)] };
    let refused = journal.append_with(b"refers", &[Bytes::from_static(b"batch")], outside);
    assert!(
        matches!(refused, Err(JournalError::FrameTooLarge { bytes: 6_069, limit: 6_000 })),
        "{refused:?}"
    );
}
