use std::time::{Duration, Instant};

use super::*;
use crate::disk::{RealDisk, WriteFault};
use crate::journal::{Dump, DumpItem, FailedAction, FrameKind, FrameState, file};

#[test]
fn what_was_appended_is_replayed_in_order() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    assert_eq!((journal.next_lsn(), journal.written(), journal.synced()), (1, 0, 0));
    let frames: Vec<Content> =
        (0..40).map(|tag| content(tag, tag as usize * 7, &[tag as usize * 30, 0, 9])).collect();
    for (index, frame) in frames.iter().enumerate() {
        assert_eq!(append(&mut journal, frame).unwrap(), index as u64 + 1);
    }
    assert!(journal.files.len() > 4, "the history crosses files");
    assert_eq!((journal.written(), journal.synced()), (40, 0));
    drop(journal);
    let (journal, replayed) = recover(&disk, 0).unwrap();
    assert_eq!(replayed.len(), 40);
    assert_dense(&replayed, 0, &frames);
    assert_eq!((journal.next_lsn(), journal.synced(), journal.recovered().rewritten), (41, 40, 40));
    let (_, replayed) = recover(&disk, 33).unwrap();
    assert_eq!(replayed.len(), 7);
    assert_dense(&replayed, 33, &frames);
}

#[test]
fn a_frame_may_be_empty_or_have_more_batches_than_one_write_takes() {
    let disk = MemDisk::new();
    let options = JournalOptions { max_frame_bytes: 100_000, ..small() };
    let frames =
        [content(1, 0, &[]), content(2, 3, &[7; 5000]), content(3, 0, &[0; 3000]), content(4, 1, &[])];
    let open = || recover_with(Arc::new(disk.clone()), &dir(), options.clone(), 0).unwrap();
    let (mut journal, _) = open();
    for frame in &frames {
        append(&mut journal, frame).unwrap();
    }
    let (_, replayed) = open();
    assert_eq!(replayed.len(), 4);
    assert_dense(&replayed, 0, &frames);
}

#[test]
fn a_frame_over_the_limit_is_refused_and_changes_nothing() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let largest = content(1, 5932, &[0]);
    assert_eq!(append(&mut journal, &largest).unwrap(), 1, "larger than the first file");
    match append(&mut journal, &content(2, 5933, &[0])) {
        Err(JournalError::FrameTooLarge { bytes: 6001, limit: 6000 }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(append(&mut journal, &content(3, 1, &[])).unwrap(), 2);
    for tag in 4..9 {
        append(&mut journal, &content(tag, 5932, &[0])).unwrap();
    }
}

#[test]
fn files_are_never_too_small_for_the_largest_frame() {
    let disk = MemDisk::new();
    let options = JournalOptions { first_file_bytes: 0, file_bytes: 1, max_frame_bytes: 3000, ..small() };
    let (mut journal, _) = recover_with(Arc::new(disk.clone()), &dir(), options.clone(), 0).unwrap();
    let frames: Vec<Content> = (0..5).map(|tag| content(tag, 2900, &[])).collect();
    frames.iter().for_each(|frame| assert!(append(&mut journal, frame).is_ok()));
    let (_, replayed) = recover_with(Arc::new(disk), &dir(), options, 0).unwrap();
    assert_eq!(replayed.len(), 5);
    assert_dense(&replayed, 0, &frames);
}

#[test]
fn syncs_cover_what_was_written_before_also_across_files() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    assert_eq!(syncer.sync().unwrap(), 0);
    for tag in 0..20 {
        append(&mut journal, &content(tag, 1000, &[])).unwrap();
    }
    assert_eq!(journal.unsynced_bytes(), 20 * 1536);
    assert_eq!(syncer.clone().sync().unwrap(), 20);
    assert_eq!((journal.unsynced_bytes(), syncer.synced(), journal.synced()), (0, 20, 20));
    disk.power_cut(5);
    assert_eq!(recover(&disk, 0).unwrap().1.len(), 20);
}

#[test]
fn a_mark_is_written_once_and_takes_no_lsn() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    assert!(!journal.mark().unwrap(), "nothing to tell");
    append(&mut journal, &content(1, 10, &[])).unwrap();
    assert!(!journal.mark().unwrap(), "nothing synced since");
    syncer.sync().unwrap();
    assert!(journal.mark().unwrap());
    assert!(!journal.mark().unwrap(), "told already");
    assert_eq!(journal.unsynced_bytes(), 512);
    assert_eq!(syncer.sync().unwrap(), 1);
    assert_eq!(append(&mut journal, &content(2, 10, &[])).unwrap(), 2);
    drop(journal);
    let (journal, replayed) = recover(&disk, 0).unwrap();
    assert_eq!((replayed.len(), journal.recovered().rewritten), (2, 1), "the mark covers the first frame");
}

#[test]
fn a_page_that_a_sync_has_taken_is_not_written_again() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    let frames: Vec<Content> = (0..6).map(|tag| content(tag, 600, &[])).collect();
    for (at, frame) in frames.iter().enumerate() {
        append(&mut journal, frame).unwrap();
        if at % 2 == 1 {
            syncer.sync().unwrap();
        }
    }
    assert_eq!(journal.files.len(), 2);
    // The third pair does not fit behind the second, on a page of its own.
    assert_eq!((journal.position, journal.used_bytes()), (512 + 2 * 1024, 6 * 1024 + 1536));
    drop(journal);
    let items = Dump::open(Arc::new(disk.clone()), &dir()).unwrap();
    let positions: Vec<u64> = items
        .filter_map(|item| match item.unwrap() {
            DumpItem::Frame(frame) => Some(frame.position),
            DumpItem::File(_) => None,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(positions, [512, 1536, 4096, 5120, 512, 1536]);
    let (mut journal, replayed) = recover(&disk, 0).unwrap();
    assert_dense(&replayed, 0, &frames);
    assert_eq!(replayed.len(), 6);
    // What the start has written is synced as well.
    append(&mut journal, &frames[0]).unwrap();
    assert_eq!(journal.position, 4096 + 1024);
}

#[test]
fn released_files_are_recycled_with_a_new_salt() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    let mut frames = Vec::new();
    for tag in 0..100u64 {
        frames.push(content(tag, 3000, &[]));
        append(&mut journal, &frames[tag as usize]).unwrap();
        if tag % 5 == 0 {
            let synced = syncer.sync().unwrap();
            journal.release(synced.saturating_sub(3));
            journal.preparer.work_now();
        }
        assert!(disk.list(&dir()).unwrap().len() <= 8, "{:?}", disk.list(&dir()).unwrap());
    }
    assert!(journal.current.header.sequence > 40);
    let first = journal.files[0].first_lsn;
    let (_, replayed) = recover(&disk, first - 1).unwrap();
    assert_eq!(replayed.len() as u64, 101 - first);
    assert_dense(&replayed, first - 1, &frames);
    match recover(&disk, 1) {
        Err(RecoverError::Corrupt { position: 0, .. }) => {}
        other => panic!("what was released is not there: {other:?}"),
    }
}

#[test]
fn many_idle_restarts_leave_one_file_and_release_works_after_them() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    for tag in 0..20 {
        append(&mut journal, &content(tag, 1000, &[])).unwrap();
    }
    let held = journal.files.len();
    drop(journal);
    for _ in 0..10 {
        let mut journal = recover(&disk, 20).unwrap().0;
        assert!(journal.files.len() <= held + 1);
        journal.preparer.work_now();
        assert_eq!(journal.mark().ok(), Some(false));
    }
    let mut journal = recover(&disk, 20).unwrap().0;
    journal.release(21);
    assert_eq!(journal.files.len(), 1);
    journal.preparer.work_now();
    drop(journal);
    assert!(disk.list(&dir()).unwrap().len() <= 3);
    assert_eq!(append(&mut recover(&disk, 20).unwrap().0, &content(20, 1, &[])).unwrap(), 21);
}

#[test]
fn an_older_checkpoint_still_finds_its_files_after_a_start_from_a_newer_one() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let frames: Vec<Content> = (0..30).map(|tag| content(tag, 1000, &[])).collect();
    frames.iter().for_each(|frame| assert!(append(&mut journal, frame).is_ok()));
    drop(journal);
    let (journal, replayed) = recover(&disk, 30).unwrap();
    assert_eq!(replayed.len(), 0);
    journal.preparer.work_now();
    drop(journal);
    let (mut journal, replayed) = recover(&disk, 4).unwrap();
    assert_eq!(replayed.len(), 26);
    assert_dense(&replayed, 4, &frames);
    let before = journal.files.len();
    journal.release(20);
    assert!(journal.files.len() < before);
    journal.preparer.work_now();
    drop(journal);
    assert_eq!(recover(&disk, 19).unwrap().1.len(), 11);
    assert!(matches!(recover(&disk, 0), Err(RecoverError::Corrupt { .. })));
}

#[test]
fn the_first_failed_write_stops_the_journal() {
    let faults = [WriteFault::Io, WriteFault::NoSpace, WriteFault::Torn(100), WriteFault::Torn(1 << 20)];
    for fault in faults {
        let disk = MemDisk::new();
        let mut journal = open(&disk);
        let syncer = journal.syncer();
        append(&mut journal, &content(1, 700, &[])).unwrap();
        syncer.sync().unwrap();
        append(&mut journal, &content(2, 700, &[])).unwrap();
        disk.fail_write(0, fault);
        let first = append(&mut journal, &content(3, 700, &[])).unwrap_err().to_string();
        disk.fail_sync(0);
        for error in [
            append(&mut journal, &content(4, 1, &[])).unwrap_err(),
            journal.mark().unwrap_err(),
            syncer.sync().unwrap_err(),
        ] {
            assert_eq!(error.to_string(), first, "the first reason wins");
        }
        let failure = journal.failure().unwrap();
        assert_eq!(failure.action, FailedAction::Write);
        assert_eq!(failure.source.kind() == std::io::ErrorKind::StorageFull, fault == WriteFault::NoSpace);
        disk.power_cut(9);
        let (_, replayed) = recover(&disk, 0).unwrap();
        assert!((1..=3).contains(&replayed.len()));
        assert_dense(&replayed, 0, &[content(1, 700, &[]), content(2, 700, &[]), content(3, 700, &[])]);
    }
}

#[test]
fn the_first_failed_sync_stops_the_journal() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    append(&mut journal, &content(1, 700, &[])).unwrap();
    syncer.sync().unwrap();
    append(&mut journal, &content(2, 700, &[])).unwrap();
    disk.fail_sync(0);
    let first = syncer.sync().unwrap_err().to_string();
    assert!(first.contains("sync") && first.contains("injected"), "{first}");
    assert_eq!(syncer.sync().unwrap_err().to_string(), first);
    assert_eq!(append(&mut journal, &content(3, 1, &[])).unwrap_err().to_string(), first);
    assert_eq!((syncer.synced(), journal.failure().unwrap().action), (1, FailedAction::Sync));
    // The page cache still shows the second frame: it may be returned only because it is written anew.
    let (_, replayed) = recover(&disk, 0).unwrap();
    assert_eq!(replayed.len(), 2);
    disk.power_cut(1);
    assert_eq!(recover(&disk, 0).unwrap().1.len(), 2);
}

#[test]
fn a_file_that_cannot_be_prepared_is_tried_again_and_then_stops_the_journal() {
    for faults in [1, 2] {
        let disk = MemDisk::new();
        let mut journal = open(&disk);
        while journal.position < 8192 {
            append(&mut journal, &content(1, 200, &[])).unwrap();
        }
        disk.fail_write(0, WriteFault::NoSpace);
        if faults == 2 {
            journal.preparer.work_now();
            disk.fail_write(0, WriteFault::NoSpace);
        }
        let before = journal.next_lsn();
        match (append(&mut journal, &content(1, 200, &[])), faults) {
            (Ok(lsn), 1) => assert_eq!(lsn, before),
            (Err(JournalError::Stopped(failure)), 2) => assert_eq!(failure.action, FailedAction::Prepare),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_error_of_the_replay_names_the_frame() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    (0..3).for_each(|tag| assert!(append(&mut journal, &content(tag, 1, &[])).is_ok()));
    let refused = Journal::recover(
        Arc::new(disk.clone()),
        &dir(),
        small(),
        0,
        &mut |lsn: Lsn, _: &[u8], _: Vec<Bytes>| {
            if lsn == 2 { Err(std::io::Error::other("no")) } else { Ok(()) }
        },
    );
    assert!(matches!(refused, Err(RecoverError::Apply { lsn: 2, .. })));
    assert_eq!(recover(&disk, 0).unwrap().1.len(), 3, "nothing was changed by it");
}

#[test]
fn a_newer_format_is_refused_naming_both_versions() {
    let disk = MemDisk::new();
    let journal = open(&disk);
    let path = journal.current.path.clone();
    let mut block = journal.current.header.encode();
    block[11] = 9;
    block[12..16].fill(0);
    let checksum = crc32fast::hash(&block);
    block[12..16].copy_from_slice(&checksum.to_be_bytes());
    disk.open(&path).unwrap().write_all_at(&block, 0).unwrap();
    let error = recover(&disk, 0).unwrap_err();
    assert!(matches!(error, RecoverError::NewerFormat { found: 9, supported: 1, .. }));
    let text = error.to_string();
    assert!(text.contains("version 9") && text.contains("version 1"), "{text}");
}

#[test]
fn a_missing_file_is_damage_wherever_it_was() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    for tag in 0..30 {
        append(&mut journal, &content(tag, 1000, &[])).unwrap();
        syncer.sync().unwrap();
    }
    let sequences: Vec<u64> = journal.files.iter().map(|file| file.sequence).collect();
    assert!(sequences.len() >= 5);
    drop(journal);
    for sequence in &sequences[..sequences.len() - 1] {
        let disk = disk.fork();
        let path = dir().join(file::name(*sequence));
        disk.remove(&path).unwrap();
        match recover(&disk, 0) {
            Err(RecoverError::Corrupt { file, position: 0, .. }) => assert_eq!(file, path),
            other => panic!("{other:?}"),
        }
    }
    // The last files leave no trace but the checkpoint's LSN.
    sequences.iter().for_each(|sequence| disk.remove(&dir().join(file::name(*sequence))).unwrap());
    assert!(matches!(recover(&disk, 30), Err(RecoverError::Corrupt { .. })));
    assert_eq!(recover(&disk, 0).unwrap().1.len(), 0);
}

#[test]
fn a_checkpoint_ahead_of_the_journal_is_damage() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    (0..3).for_each(|tag| assert!(append(&mut journal, &content(tag, 1, &[])).is_ok()));
    assert_eq!(recover(&disk, 3).unwrap().1.len(), 0);
    assert!(matches!(recover(&disk, 4), Err(RecoverError::Corrupt { position: 512, .. })));
}

#[test]
fn foreign_files_in_the_directory_are_left_alone() {
    let disk = MemDisk::new();
    let names =
        ["1.journal", "0000000000000000000x.journal", "notes.txt", "00000000000000000000.journal", "a.tmp"];
    disk.create_dir(&dir()).unwrap();
    names.iter().for_each(|name| assert!(disk.create(&dir().join(name)).is_ok()));
    let journal = open(&disk);
    journal.preparer.work_now();
    assert_eq!(disk.list(&dir()).unwrap().len(), names.len() + 1);
}

#[test]
fn a_dump_shows_files_frames_marks_gaps_and_what_is_void() {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let syncer = journal.syncer();
    append(&mut journal, &content(1, 600, &[5, 6])).unwrap();
    syncer.sync().unwrap();
    journal.mark().unwrap();
    append(&mut journal, &content(2, 600, &[])).unwrap();
    append(&mut journal, &content(3, 600, &[])).unwrap();
    drop(open(&disk));
    let first = disk.open(&dir().join(file::name(1))).unwrap();
    let dump = || -> Vec<String> {
        Dump::open(Arc::new(disk.clone()), &dir()).unwrap().map(|item| describe(&item.unwrap())).collect()
    };
    let expected = [
        "file 1 after 0 first 1 synced 0",
        "512+1024 Data 1 synced 0 Whole 600 2",
        "4096+512 Mark 1 synced 1 Void 0 0",
        "4608+1024 Data 2 synced 1 Void 600 0",
        "5632+1024 Data 3 synced 1 Void 600 0",
        "file 2 after 1 first 2 synced 3",
        "512+1024 Data 2 synced 1 Whole 600 0",
        "1536+1024 Data 3 synced 1 Whole 600 0",
    ];
    assert_eq!(dump(), expected);
    first.write_all_at(b"x", 600).unwrap();
    first.write_all_at(b"x", 4100).unwrap();
    let found = dump();
    assert_eq!(found[1], "512+1024 Data 1 synced 0 Damaged 0 0");
    assert_eq!(found[2], "1536+3072 gap", "what was left out before a mark is known to the mark alone");
    assert_eq!(found[3..], expected[3..]);
    first.write_all_at(b"x", 0).unwrap();
    assert_eq!(dump()[0], "unreadable: it does not begin like a journal file");
}

fn describe(item: &DumpItem) -> String {
    match item {
        DumpItem::File(file) => {
            format!(
                "file {} after {} first {} synced {}",
                file.sequence, file.previous, file.first_lsn, file.synced
            )
        }
        DumpItem::UnreadableFile { reason, .. } => format!("unreadable: {reason}"),
        DumpItem::Gap { position, bytes, .. } => format!("{position}+{bytes} gap"),
        DumpItem::Frame(frame) => {
            assert_eq!(
                frame.kind == FrameKind::Mark,
                frame.size == 512 && frame.state != FrameState::Damaged
            );
            format!(
                "{}+{} {:?} {} synced {} {:?} {} {}",
                frame.position,
                frame.size,
                frame.kind,
                frame.lsn,
                frame.synced,
                frame.state,
                frame.events.len(),
                frame.batches.len()
            )
        }
    }
}

#[test]
fn an_empty_directory_is_opened_at_once() {
    let root = tempfile::tempdir().unwrap();
    let fastest = (0..5)
        .map(|attempt| {
            let dir = root.path().join(attempt.to_string());
            let start = Instant::now();
            recover_with(Arc::new(RealDisk), &dir, JournalOptions::default(), 0).unwrap();
            start.elapsed()
        })
        .min();
    // Far above what it takes, for machines that are busy with something else.
    assert!(fastest < Some(Duration::from_millis(100)), "{fastest:?}");
}

#[test]
fn a_writing_a_syncing_and_a_preparing_thread_work_together_on_a_real_disk() {
    let root = tempfile::tempdir().unwrap();
    let options = JournalOptions {
        first_file_bytes: 4096,
        file_bytes: 64 << 10,
        max_frame_bytes: 16 << 10,
        spare_files: 2,
        background: true,
        environment: Environment::default(),
    };
    let open = |from| recover_with(Arc::new(RealDisk), root.path(), options.clone(), from).unwrap();
    let (mut journal, _) = open(0);
    let syncer = journal.syncer();
    let syncing = std::thread::spawn(move || {
        let mut last = 0;
        while last < 600 {
            let synced = syncer.sync().unwrap();
            assert!(synced >= last);
            last = synced;
        }
    });
    let frames: Vec<Content> = (0..600).map(|tag| content(tag, 100, &[tag as usize * 13, 50])).collect();
    for frame in &frames {
        let lsn = append(&mut journal, frame).unwrap();
        if lsn.is_multiple_of(100) {
            journal.release(journal.synced() / 2);
        }
        if lsn.is_multiple_of(7) {
            journal.mark().unwrap();
        }
    }
    syncing.join().unwrap();
    let first = journal.files[0].first_lsn;
    assert!(first > 1 && journal.current.header.sequence > 20);
    drop(journal);
    let (journal, replayed) = open(first - 1);
    assert_eq!(journal.next_lsn(), 601);
    assert_eq!(replayed.len() as u64, 601 - first);
    assert_dense(&replayed, first - 1, &frames);
}
