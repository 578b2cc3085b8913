//! Batches that are written ahead of those that wait, and frames that refer to them.

use super::*;
use crate::disk::Disk;

/// A log in which nothing is written before somebody asks for it.
fn slow() -> LogOptions {
    LogOptions { linger: Duration::from_secs(3600), background: false, ..options() }
}

fn length(disk: &MemDisk, model: &Model, log: &SegmentWriter) -> u64 {
    disk.open(&log.segment_path(model.info.segments.last().unwrap().0)).unwrap().len().unwrap()
}

#[test]
fn a_batch_written_ahead_stands_behind_those_that_wait() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 60_000);
    model.create(&log);
    log.condemn_unknown().unwrap();
    for at in 0..20 {
        model.append(&log, &[at, at], 100);
        model.append_ahead(&log, &[at], 9_000);
    }
    model.publish(&log);
    model.check(&log, 20_000);
    assert_eq!(model.view(&log).segments()[0].written(), 0, "nothing counts as written before its turn");
    log.sync().unwrap();
    model.check(&log, 20_000);
    model.check_lookups(&log);
    drop(log);

    disk.power_cut_losing_all();
    let log = start(&disk, &forgetful());
    log.restore(&model.info);
    model.check(&log, 20_000);
    model.check_lookups(&log);
}

#[test]
fn its_sync_is_of_the_batch_and_of_the_name_of_its_segment() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 1 << 20);
    model.create(&log);
    log.condemn_unknown().unwrap();
    model.append_ahead(&log, &[1], 9_000);
    disk.power_cut_losing_all();
    let (segment, _) = model.info.segments[0];
    let log = start(&disk, &slow());
    let (header, bytes) = &model.batches[0];
    let found = log.find_stored(segment, 0, &bytes[..batch::HEADER_LEN]).unwrap();
    assert_eq!(found, Stored::Whole(bytes.clone()));
    let mut other = bytes[..batch::HEADER_LEN].to_vec();
    batch::assign(&mut other, header.base_offset + 1, 0);
    assert_eq!(log.find_stored(segment, 0, &other).unwrap(), Stored::Torn);
    assert_eq!(log.find_stored(segment, 1, &bytes[..batch::HEADER_LEN]).unwrap(), Stored::Torn);
    let unknown = SegmentName { generation: 9, ..segment };
    assert_eq!(log.find_stored(unknown, 0, &bytes[..batch::HEADER_LEN]).unwrap(), Stored::Gone);
    let last = log.segment_path(segment);
    assert!(disk.flip_bit(&last, bytes.len() as u64 - 1, 3));
    assert_eq!(log.find_stored(segment, 0, &bytes[..batch::HEADER_LEN]).unwrap(), Stored::Torn);
}

#[test]
fn a_replay_leaves_alone_what_frames_refer_to_and_readers_find_it() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 40_000);
    model.create(&log);
    log.condemn_unknown().unwrap();
    for at in 0..20 {
        model.append(&log, &[at, at], 100);
        model.append_ahead(&log, &[at], 9_000);
        model.append_ahead(&log, &[at], 5_000);
    }
    // Only what was written ahead is on the disk.
    drop(log);
    disk.power_cut_losing_all();

    let log = start(&disk, &slow());
    let info = std::mem::replace(&mut model.info, Model::new(0, 0).info);
    model.create(&log);
    for at in 0..model.batches.len() {
        model.append_again(&log, at);
    }
    assert_eq!(model.info.segments, info.segments);
    model.publish(&log);
    log.condemn_unknown().unwrap();
    model.check(&log, 20_000);
    model.check_lookups(&log);
    // What is left over behind the end is cut off by the first write after the replay.
    let file = disk.open(&log.segment_path(info.segments.last().unwrap().0)).unwrap();
    let end = file.len().unwrap();
    file.write_all_at(&[1; 100], end).unwrap();
    model.append(&log, &[1], 10);
    model.publish(&log);
    log.sync().unwrap();
    assert_eq!(length(&disk, &model, &log), model.info.segments.last().unwrap().1);
    model.check(&log, 20_000);
    model.check_lookups(&log);
}

#[test]
fn a_replay_does_without_segments_that_were_removed() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 40_000);
    model.create(&log);
    log.condemn_unknown().unwrap();
    for at in 0..20 {
        model.append_ahead(&log, &[at], 9_000);
        model.append(&log, &[at, at], 100);
    }
    log.sync().unwrap();
    let names: Vec<SegmentName> = model.info.segments.iter().map(|(name, _)| *name).collect();
    for name in &names {
        disk.remove(&log.segment_path(*name)).unwrap();
    }
    drop(log);
    let log = start(&disk, &slow());
    model.info = Model::new(0, 0).info;
    model.create(&log);
    for at in 0..model.batches.len() {
        model.append_again(&log, at);
    }
    log.apply(&ViewChange::Removed { partition: key(0) });
    log.condemn_unknown().unwrap();
    log.sync().unwrap();
}

#[test]
fn a_failed_write_ahead_is_the_end_of_all_writing() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 1 << 20);
    model.create(&log);
    log.condemn_unknown().unwrap();
    model.append_ahead(&log, &[1], 9_000);
    disk.fail_write(0, crate::disk::WriteFault::NoSpace);
    let write = model.decide(&[1], 9_000);
    assert!(log.write_ahead(&[&write]).is_err());
    assert!(log.failure().is_some());
    assert!(log.write_ahead(&[&write]).is_err());
}

#[test]
fn one_failed_sync_of_a_segment_is_known_to_all_who_sync_it() {
    let disk = MemDisk::new();
    let log = start(&disk, &slow());
    let mut model = Model::new(0, 1 << 20);
    model.create(&log);
    log.condemn_unknown().unwrap();
    model.append(&log, &[1], 100);
    let write = model.decide(&[1], 9_000);
    let file = log.write_ahead(&[&write]).unwrap().unwrap();
    disk.fail_sync(0);
    assert!(log.sync().is_err());
    assert!(file.sync().is_err(), "the disk would not fail again");
}
