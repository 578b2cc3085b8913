//! The writer: limits, failures, removal.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::disk::{Disk, WriteFault};
use crate::log::ReadError;

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn a_failed_write_ends_writing_and_nothing_else() {
    for fault in [WriteFault::Io, WriteFault::NoSpace, WriteFault::Torn(100), WriteFault::Short(0)] {
        let disk = MemDisk::new();
        let woken = Arc::new(AtomicUsize::new(0));
        let wake = {
            let woken = Arc::clone(&woken);
            Box::new(move || {
                woken.fetch_add(1, Ordering::SeqCst);
            })
        };
        let log = SegmentWriter::start(Arc::new(disk.clone()), Path::new(ROOT), &forgetful(), wake).unwrap();
        let mut model = Model::new(0, 1_000_000);
        model.create(&log);
        for at in 0..10 {
            model.append(&log, &[at], 1000);
        }
        log.sync().unwrap();
        assert!(log.failure().is_none());
        let checkpoint = (model.info.clone(), model.batches.len());
        disk.fail_write(0, fault);
        let write = model.decide(&[10], 1000);
        // It may be told of the failure already.
        let _appended = log.append(vec![write]);
        wait_until("the failure", || log.failure().is_some());
        wait_until("the call", || woken.load(Ordering::SeqCst) > 0);
        let failure = log.failure().unwrap().to_string();
        assert!(failure.starts_with("cannot write /log/"), "{failure}");
        assert_eq!(log.sync().unwrap_err().to_string(), failure);
        assert_eq!(log.wait_for_room(Duration::ZERO).unwrap_err().to_string(), failure);
        // What was journaled is shown, although it is in no segment.
        model.publish(&log);
        model.check(&log, 5000);
        assert!(log.append(Vec::new()).is_ok());
        assert!(log.shutdown().is_err());

        let log = start(&disk, &forgetful());
        model.info = checkpoint.0;
        log.restore(&model.info);
        for at in checkpoint.1..model.batches.len() {
            model.append_again(&log, at);
        }
        model.publish(&log);
        log.sync().unwrap();
        model.check(&log, 5000);
    }
}

#[test]
fn a_failed_sync_is_not_tried_again() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 1_000_000);
    model.create(&log);
    model.append(&log, &[1], 1000);
    disk.fail_sync(0);
    let failure = log.sync().unwrap_err().to_string();
    assert!(failure.starts_with("cannot sync"), "{failure}");
    assert_eq!(log.sync().unwrap_err().to_string(), failure);
}

#[test]
fn a_position_that_does_not_follow_is_refused() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 1_000_000);
    model.create(&log);
    model.append(&log, &[1], 10);
    model.info.segments[0].1 += 1;
    model.append(&log, &[2], 10);
    let failure = log.sync().unwrap_err().to_string();
    assert!(failure.contains("was decided"), "{failure}");
}

#[test]
fn room_is_told_of_when_there_is_some_again() {
    let disk = MemDisk::new();
    let woken = Arc::new(AtomicUsize::new(0));
    let wake = {
        let woken = Arc::clone(&woken);
        Box::new(move || {
            woken.fetch_add(1, Ordering::SeqCst);
        })
    };
    let options = LogOptions { unwritten_bytes: 100_000, linger: Duration::from_secs(600), ..forgetful() };
    let log = SegmentWriter::start(Arc::new(disk.clone()), Path::new(ROOT), &options, wake).unwrap();
    let mut model = Model::new(0, 1_000_000);
    model.create(&log);
    model.append(&log, &[1], 10_000);
    assert!(log.has_room());
    assert!(log.unwritten_bytes() > 0, "it lingers");
    // Over the limit: everything becomes due, whatever the linger says.
    model.append(&log, &[2], 120_000);
    let had_room = log.has_room();
    assert!(log.wait_for_room(Duration::from_secs(20)).unwrap());
    if !had_room {
        wait_until("the call", || woken.load(Ordering::SeqCst) == 1);
    }
    assert!(log.has_room());
    model.publish(&log);
    model.check(&log, 1000);
}

#[test]
fn the_tail_keeps_to_its_budget_over_all_partitions() {
    let disk = MemDisk::new();
    let log = start(&disk, &LogOptions { tail_bytes: 50_000, ..options() });
    let mut models: Vec<Model> = (0..20).map(|at| Model::new(at, 1_000_000)).collect();
    for model in &mut models {
        model.create(&log);
        for at in 0..10 {
            model.append(&log, &[at], 1000);
        }
        model.publish(&log);
    }
    log.sync().unwrap();
    assert!(log.tail_bytes() <= 50_000, "{} bytes", log.tail_bytes());
    assert!(log.tail_bytes() > 40_000, "{} bytes", log.tail_bytes());
    for model in &models {
        model.check(&log, 3000);
    }
    for model in &models {
        log.apply(&ViewChange::Removed { partition: model.info.partition });
    }
    assert_eq!(log.tail_bytes(), 0);
}

#[test]
fn many_partitions_need_few_descriptors() {
    let disk = MemDisk::new();
    let log = start(&disk, &LogOptions { open_files: 3, ..forgetful() });
    let mut models: Vec<Model> = (0..100).map(|at| Model::new(at, 5_000)).collect();
    for model in &mut models {
        model.create(&log);
    }
    for round in 0..5 {
        for model in &mut models {
            model.append(&log, &[round], 1500);
        }
    }
    log.sync().unwrap();
    for model in &models {
        model.publish(&log);
        model.check(&log, 100_000);
    }
    assert!(log.shared.context.files.open_count() <= 3);
    disk.power_cut(1);
    drop(log);
    let log = start(&disk, &forgetful());
    for model in &models {
        log.restore(&model.info);
        model.check(&log, 100_000);
    }
}

#[test]
fn a_deleted_partition_leaves_nothing_behind() {
    let disk = MemDisk::new();
    let log = start(&disk, &options());
    let mut models: Vec<Model> = (0..3).map(|at| Model::new(at, 10_000)).collect();
    for model in &mut models {
        model.create(&log);
        for at in 0..30 {
            model.append(&log, &[at], 1000);
        }
        model.publish(&log);
    }
    log.sync().unwrap();
    let directory =
        |partition: u32| Path::new(ROOT).join(key(0).topic.to_string()).join(partition.to_string());
    assert!(!disk.list(&directory(0)).unwrap().is_empty());
    for at in 0..30 {
        models[0].append(&log, &[at], 1000);
    }
    log.apply(&ViewChange::Removed { partition: key(0) });
    log.sync().unwrap();
    assert!(!disk.list(&directory(0)).unwrap().is_empty(), "the removal may not be on the device yet");
    log.unlink(log.take_freed());
    wait_until("the removal", || disk.list(&directory(0)).is_err());
    log.unlink(log.take_freed());
    assert_eq!(log.unwritten_bytes(), 0);
    models[1].check(&log, 5000);

    // Deleted before it was ever synced.
    let mut model = Model::new(3, 10_000);
    model.create(&log);
    model.append(&log, &[0], 1000);
    wait_until("the write", || log.unwritten_bytes() == 0);
    log.apply(&ViewChange::Removed { partition: key(3) });
    log.unlink(log.take_freed());
    wait_until("the removal", || disk.list(&directory(3)).is_err());
    log.sync().unwrap();

    // A crash before the removal: the next start finds what is left over.
    log.apply(&ViewChange::Removed { partition: key(1) });
    drop(log);
    let log = start(&disk, &options());
    log.restore(&models[2].info);
    log.condemn_unknown().unwrap();
    log.unlink(log.take_condemned());
    wait_until("the removal", || disk.list(&directory(1)).is_err());
    models[2].check(&log, 5000);
    log.apply(&ViewChange::Removed { partition: key(2) });
    log.unlink(log.take_freed());
    wait_until("the removal", || disk.list_dirs(Path::new(ROOT)).unwrap().is_empty());
    log.sync().unwrap();
}

#[test]
fn a_name_that_came_back_is_not_removed() {
    let disk = MemDisk::new();
    let log = start(&disk, &options());
    let mut model = Model::new(0, 1_000_000);
    model.create(&log);
    model.append(&log, &[1], 100);
    log.sync().unwrap();
    drop(log);
    // The frame that created the partition was lost in a crash, and the same name is given out again.
    let log = start(&disk, &options());
    log.condemn_unknown().unwrap();
    let mut model = Model::new(0, 1_000_000);
    model.create(&log);
    model.append(&log, &[7], 50);
    log.unlink(log.take_condemned());
    log.sync().unwrap();
    model.publish(&log);
    drop(log);
    let log = start(&disk, &forgetful());
    log.restore(&model.info);
    model.check(&log, 1000);
}

#[test]
fn a_sync_waits_for_all_that_came_before_it() {
    let disk = MemDisk::new();
    let log = start(&disk, &LogOptions { linger: Duration::from_secs(600), ..options() });
    let mut models: Vec<Model> = (0..50).map(|at| Model::new(at, 4_000)).collect();
    for model in &mut models {
        model.create(&log);
        for at in 0..6 {
            model.append(&log, &[at], 1000);
        }
    }
    assert!(log.unwritten_bytes() > 0);
    log.sync().unwrap();
    assert_eq!(log.unwritten_bytes(), 0);
    disk.power_cut(42);
    drop(log);
    let log = start(&disk, &options());
    for model in &models {
        log.restore(&model.info);
        model.check(&log, 5000);
        model.check_lookups(&log);
    }
}

/// What the engine does when it raises the log start to the base of a segment.
fn cut(model: &mut Model, log: &SegmentWriter, segments: usize, kept: &[usize]) {
    let log_start = model.info.segments[segments].0.base_offset;
    log.apply(&ViewChange::LogStartRaised { partition: model.info.partition, log_start });
    model.info.log_start = log_start;
    let names: Vec<SegmentName> = model.info.segments.iter().map(|(name, _)| *name).collect();
    let going: Vec<SegmentName> = (0..segments).filter(|at| !kept.contains(at)).map(|at| names[at]).collect();
    model.info.segments.retain(|(name, _)| !going.contains(name));
    log.apply(&ViewChange::SegmentsRemoved { segments: going });
}

#[test]
fn segments_below_the_log_start_go_and_share_groups_read_what_is_kept() {
    let disk = MemDisk::new();
    for options in [options(), forgetful()] {
        let disk = disk.fork();
        let log = start(&disk, &options);
        let mut model = Model::new(0, 10_000);
        model.create(&log);
        for at in 0..60 {
            model.append(&log, &[at, at], 900);
        }
        model.publish(&log);
        let kept = model.info.segments[1].0;
        cut(&mut model, &log, 4, &[1]);
        assert_eq!(model.view(&log).log_start(), model.info.log_start);
        model.check(&log, 3000);
        model.check_lookups(&log);
        let below = model.view(&log).read(kept.base_offset, 1).unwrap_err();
        assert!(matches!(below, ReadError::BelowStart { .. }), "{below}");
        let here = read_record(&model.view(&log), kept.base_offset + 1).unwrap();
        assert_eq!(here.map(|record| record.offset), Some(kept.base_offset + 1));
        log.sync().unwrap();
        log.unlink(log.take_condemned());
        let mut files = disk.list(&Path::new(ROOT).join(key(0).topic.to_string()).join("0")).unwrap();
        files.retain(|file| file.ends_with(".log"));
        assert_eq!(files.len(), model.info.segments.len());
        drop(log);
        let log = start(&disk, &forgetful());
        log.restore(&model.info);
        log.condemn_unknown().unwrap();
        assert!(log.take_condemned().is_empty());
        model.check(&log, 3000);
        let here = read_record(&model.view(&log), kept.base_offset + 1).unwrap();
        assert_eq!(here.map(|record| record.offset), Some(kept.base_offset + 1));
        // Nothing is found where nothing is left.
        assert_eq!(read_record(&model.view(&log), 0).unwrap(), None);
        let wanted = Scan {
            group: String::new(),
            partition: key(0),
            from: 0,
            until: model.info.end,
            max_records: 1,
            soon: true,
        };
        let scanned = scan(&model.view(&log), &wanted).unwrap();
        assert_eq!((scanned.records[0].offset, scanned.next), (kept.base_offset, kept.base_offset + 1));
    }
}

#[test]
fn a_segment_that_goes_while_it_is_read_is_no_damage() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 4_000);
    model.create(&log);
    for at in 0..400 {
        model.append(&log, &[at], 900);
    }
    model.publish(&log);
    log.sync().unwrap();
    let view = model.view(&log);
    let reader = std::thread::spawn(move || {
        let (mut offset, mut moved) = (0, 0);
        while offset < 400 {
            match view.read(offset, 1) {
                Ok(batches) => offset = BatchHeader::parse(&batches[0]).unwrap().last_offset() + 1,
                Err(ReadError::BelowStart { log_start }) => (offset, moved) = (log_start, moved + 1),
                Err(error) => panic!("{error}"),
            }
            view.offset_for_timestamp(offset.cast_signed()).unwrap();
        }
        moved
    });
    while model.info.segments.len() > 5 {
        cut(&mut model, &log, 4, &[]);
        log.unlink(log.take_condemned());
    }
    reader.join().unwrap();
    model.check(&log, 3000);
}

#[test]
fn what_a_crash_left_of_removed_segments_is_found() {
    let disk = MemDisk::new();
    let log = start(&disk, &options());
    let mut model = Model::new(0, 10_000);
    model.create(&log);
    for at in 0..60 {
        model.append(&log, &[at], 900);
    }
    model.publish(&log);
    log.sync().unwrap();
    cut(&mut model, &log, 2, &[]);
    drop(log);
    let log = start(&disk, &options());
    log.restore(&model.info);
    log.condemn_unknown().unwrap();
    log.unlink(log.take_condemned());
    let files = disk.list(&Path::new(ROOT).join(key(0).topic.to_string()).join("0")).unwrap();
    let logs = files.iter().filter(|file| file.ends_with(".log")).count();
    assert_eq!(logs, model.info.segments.len());
    model.check(&log, 5000);
}

#[test]
fn replaced_segments_take_nothing_along_that_waits_to_be_written() {
    let disk = MemDisk::new();
    let nothing_by_itself = LogOptions { linger: Duration::from_secs(3600), background: false, ..options() };
    let log = start(&disk, &nothing_by_itself);
    let mut model = Model::new(0, 1);
    model.create(&log);
    for at in 0..3 {
        model.append(&log, &[at], 100);
    }
    model.publish(&log);
    let [(first, _), (second, _), _] = model.info.segments[..] else { panic!() };
    // Of the second nothing is left.
    log.apply(&ViewChange::SegmentsReplaced { partition: key(0), removed: vec![second], added: Vec::new() });
    let offsets = |from| {
        let batches = model.view(&log).read_stored(from, 0).unwrap();
        batches.iter().map(|bytes| BatchHeader::parse(bytes).unwrap().base_offset).collect::<Vec<_>>()
    };
    assert_eq!(offsets(0), [0], "{first:?} is as it was");
    assert_eq!(offsets(1), [2]);
}
