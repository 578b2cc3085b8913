//! Repairs of journals in which every frame, one after the other, was damaged.

use super::*;
use crate::journal::{Dump, DumpItem, DumpedFrame, Repair, RepairError};

const FRAMES: u64 = 30;

/// A journal of several files whose frames are synced, but for the last.
fn written() -> (MemDisk, Vec<Content>) {
    let disk = MemDisk::new();
    let mut journal = open(&disk);
    let appended: Vec<Content> = (1..=FRAMES).map(|tag| content(tag, 700, &[900])).collect();
    for content in &appended {
        append(&mut journal, content).unwrap();
        journal.syncer().sync().unwrap();
    }
    (disk, appended)
}

fn frames(disk: &MemDisk) -> Vec<DumpedFrame> {
    let dump = Dump::open(Arc::new(disk.clone()), &dir()).unwrap();
    let frame = |item: std::io::Result<DumpItem>| match item.unwrap() {
        DumpItem::Frame(frame) => Some(frame),
        _ => None,
    };
    dump.filter_map(frame).collect()
}

fn plan(disk: &MemDisk, from: Lsn) -> Result<Option<Repair>, RepairError> {
    Repair::plan(Arc::new(disk.clone()), &dir(), from)
}

#[test]
fn what_is_in_front_of_the_damage_is_kept_and_nothing_behind_it_comes_back() {
    let (sound, appended) = written();
    for from in [0, 7] {
        assert!(plan(&sound, from).unwrap().is_none());
        for damaged in frames(&sound) {
            let disk = sound.fork();
            disk.flip_bit(&damaged.path, damaged.position + 600, 3);
            let refused = recover(&disk, from).err();
            let before = disk.digest();
            let plan = match plan(&disk, from) {
                Ok(None) => {
                    assert!(refused.is_none(), "{refused:?}");
                    continue;
                }
                Ok(Some(plan)) => plan,
                Err(RepairError::Hopeless) => {
                    assert_eq!((damaged.lsn, from), (1, 0));
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(plan.damage().position, damaged.position);
            let mut lost = Vec::new();
            plan.each_lost(|frame| lost.push(frame.lsn)).unwrap();
            assert_eq!(disk.digest(), before, "a plan changes nothing");
            // The checkpoint has what was damaged, or it ends what is kept.
            let end = if damaged.lsn <= from { FRAMES } else { damaged.lsn - 1 };
            assert_eq!((plan.cut(), plan.kept()), (end + 1, end - from));
            assert_eq!(lost, (end + 2..=FRAMES).collect::<Vec<_>>());
            plan.apply(&Environment::default()).unwrap();
            disk.power_cut(damaged.lsn);
            for start in 0..2 {
                let (journal, frames) = recover(&disk, from).unwrap();
                assert!(journal.recovered().given_up, "start {start}");
                assert_eq!(frames.last().map_or(from, |(lsn, _)| *lsn), end);
                assert_dense(&frames, from, &appended);
            }
            let (mut journal, _) = recover(&disk, from).unwrap();
            append(&mut journal, &appended[0]).unwrap();
            journal.syncer().sync().unwrap();
            let (journal, frames) = recover(&disk, from).unwrap();
            assert!(!journal.recovered().given_up, "a run has begun");
            assert_eq!(frames.last().map(|(lsn, content)| (*lsn, content)), Some((end + 1, &appended[0])));
        }
    }
}

#[test]
fn a_repair_that_is_cut_short_leaves_the_journal_refused_or_repaired() {
    let (sound, appended) = written();
    let damaged = frames(&sound).swap_remove(12);
    for operations in 0..40 {
        let disk = sound.fork();
        disk.flip_bit(&damaged.path, damaged.position + 600, 3);
        let plan = plan(&disk, 0).unwrap().unwrap();
        disk.power_fails_after(operations);
        let done = plan.apply(&Environment::default()).is_ok();
        disk.power_cut(operations);
        match recover(&disk, 0) {
            Ok((_, frames)) => {
                assert_eq!(frames.len() as u64, damaged.lsn - 1);
                assert_dense(&frames, 0, &appended);
            }
            Err(RecoverError::Corrupt { .. }) => assert!(!done),
            Err(error) => panic!("{error}"),
        }
    }
}
