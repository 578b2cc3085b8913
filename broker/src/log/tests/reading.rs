//! What readers get, from memory and from disk.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use tokio::sync::Notify;

use super::*;
use crate::log::ReadError;

/// Timestamps that mostly rise and sometimes do not.
fn times(at: i64) -> [i64; 3] {
    let base = at * 10 - if at % 7 == 0 { 45 } else { 0 };
    [base, base + 13, base + 2]
}

#[test]
fn batches_are_read_from_memory_and_from_disk_alike() {
    for options in [options(), forgetful()] {
        let disk = MemDisk::new();
        let log = start(&disk, &options);
        let mut model = Model::new(0, 100_000);
        model.create(&log);
        for at in 0..300 {
            model.append(&log, &times(at), 1 + (at as usize * 37) % 3000);
        }
        assert!(model.view(&log).read(0, 1).unwrap().is_empty(), "not visible yet");
        model.publish(&log);
        for max_bytes in [1, 5000, 200_000, usize::MAX] {
            model.check(&log, max_bytes);
        }
        model.check_lookups(&log);
        log.sync().unwrap();
        assert_eq!(log.unwritten_bytes(), 0);
        for max_bytes in [1, 5000, 200_000, usize::MAX] {
            model.check(&log, max_bytes);
        }
        model.check_lookups(&log);
        if options.tail_bytes == 0 {
            assert_eq!(log.tail_bytes(), 0);
        }
        let error = model.view(&log).read(model.info.end + 1, 1).unwrap_err();
        assert!(matches!(error, ReadError::AboveEnd { high_watermark } if high_watermark == model.info.end));
    }
}

#[test]
fn only_what_is_published_is_read_also_from_disk() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 100_000);
    model.create(&log);
    for at in 0..20 {
        model.append(&log, &times(at), 100);
    }
    model.publish(&log);
    let shown = model.info.end;
    for at in 20..40 {
        model.append(&log, &times(at), 100);
    }
    log.sync().unwrap();
    model.check(&log, 1000);
    model.check_lookups(&log);
    assert_eq!(model.view(&log).offset_for_timestamp(times(30)[0]).unwrap(), None);
    assert_eq!(model.view(&log).high_watermark(), shown);
    model.view(&log).publish(shown - 3);
    assert_eq!(model.view(&log).high_watermark(), shown, "it never falls");
}

#[test]
fn reading_what_is_old_takes_nothing_from_the_tails() {
    let disk = MemDisk::new();
    let log = start(&disk, &LogOptions { tail_bytes: 50_000, ..options() });
    let mut old = Model::new(0, 100_000);
    let mut new = Model::new(1, 100_000);
    for (model, batches) in [(&mut old, 300), (&mut new, 20)] {
        model.create(&log);
        for at in 0..batches {
            model.append(&log, &times(at), 2_000);
        }
        model.publish(&log);
        log.sync().unwrap();
    }
    let tail =
        || (log.tail_bytes(), new.view(&log).tail().lock().start(), old.view(&log).tail().lock().start());
    let before = tail();
    assert!(before.1.is_some() && before.2 != Some(0), "{before:?}");
    for max_bytes in [1, 5_000, 1 << 20] {
        old.check(&log, max_bytes);
    }
    old.check_lookups(&log);
    assert_eq!(tail(), before);
}

#[test]
fn nothing_is_read_below_the_log_start() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 10_000);
    model.create(&log);
    for at in 0..50 {
        model.append(&log, &times(at), 500);
    }
    log.sync().unwrap();
    drop(log);
    model.info.log_start = 31;
    let log = start(&disk, &forgetful());
    log.restore(&model.info);
    model.check(&log, 5000);
    model.check_lookups(&log);
    let error = model.view(&log).read(30, 1).unwrap_err();
    assert!(matches!(error, ReadError::BelowStart { log_start: 31 }));
    let wanted = Scan {
        group: String::new(),
        partition: model.info.partition,
        from: 0,
        until: model.info.end,
        max_records: 5,
        soon: true,
    };
    // Share groups see what is left.
    let scanned = scan(&model.view(&log), &wanted).unwrap();
    assert_eq!((scanned.next, scanned.records.len()), (5, 5));
    assert_eq!(read_record(&model.view(&log), 30).unwrap().map(|record| record.offset), Some(30));
}

#[test]
fn holes_are_passed_over() {
    // A hole at the start, within a segment, at a segment's end, and at the end of the log.
    for segment_bytes in [u64::MAX, 1] {
        for options in [options(), forgetful()] {
            let disk = MemDisk::new();
            let log = start(&disk, &options);
            let mut model = Model::new(0, segment_bytes);
            model.create(&log);
            model.raise_epoch(100);
            for at in 0..5 {
                model.append(&log, &times(at), 10);
                if at % 2 == 0 {
                    model.raise_epoch(50);
                }
            }
            model.publish(&log);
            model.check(&log, 100_000);
            model.check_lookups(&log);
            log.sync().unwrap();
            model.check(&log, 1);
            model.check_lookups(&log);
            drop(log);
            let log = start(&disk, &options);
            log.restore(&model.info);
            model.check(&log, 1);
            model.check_lookups(&log);
            assert!(model.view(&log).read(model.info.end - 1, 1).unwrap().is_empty());
            model.append(&log, &times(9), 10);
            model.publish(&log);
            model.check(&log, 1);
            model.check_lookups(&log);
        }
    }
}

#[test]
fn interest_is_woken_by_what_becomes_visible() {
    let disk = MemDisk::new();
    let log = start(&disk, &options());
    let mut model = Model::new(0, 10_000);
    model.create(&log);
    let view = model.view(&log);
    let woken = |notify: &Arc<Notify>| {
        let mut future = std::pin::pin!(notify.notified());
        future.as_mut().enable()
    };
    let (one, other) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    view.interest(&one);
    view.interest(&one);
    view.interest(&other);
    assert!(!woken(&one) && !woken(&other));
    model.append(&log, &times(0), 10);
    assert!(!woken(&one), "staged, not visible");
    model.publish(&log);
    assert!(woken(&one) && woken(&other));
    model.publish(&log);
    assert!(!woken(&one), "nothing new");
    drop(other);
    for _ in 0..100 {
        view.interest(&Arc::new(Notify::new()));
    }
    model.append(&log, &times(1), 10);
    model.publish(&log);
    assert!(woken(&one));
    log.apply(&ViewChange::Removed { partition: model.info.partition });
    assert!(woken(&one));
    assert!(matches!(view.read(0, 1), Err(ReadError::Removed)));
    assert!(log.views().get(model.info.partition).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fetching_does_not_block_and_ends_with_its_caller() {
    let disk = MemDisk::new();
    let log = start(&disk, &LogOptions { disk_reads: 2, ..forgetful() });
    let mut model = Model::new(0, 30_000);
    model.create(&log);
    for at in 0..100 {
        model.append(&log, &times(at), 500);
    }
    model.publish(&log);
    log.sync().unwrap();
    let view = model.view(&log);
    let fetches = (0..50_u64).map(|at| {
        let view = Arc::clone(&view);
        tokio::spawn(async move { view.fetch(at * 6, 2000).await })
    });
    for (at, fetch) in fetches.collect::<Vec<_>>().into_iter().enumerate() {
        let batches = fetch.await.unwrap().unwrap();
        assert_eq!(BatchHeader::parse(&batches[0]).unwrap().base_offset, at as u64 * 6);
    }
    for _ in 0..20 {
        // Polled once, then dropped.
        let fetch = tokio::time::timeout(Duration::ZERO, view.fetch(0, 1000)).await;
        drop(fetch);
    }
    assert_eq!(view.fetch(0, 1).await.unwrap().len(), 1, "no permit was lost");
    let expected = model.view(&log).offset_for_timestamp(500).unwrap();
    assert_eq!(view.find_timestamp(500).await.unwrap(), expected);
    assert_eq!(view.record(7).await.unwrap().unwrap().offset, 7);
    assert!(matches!(view.fetch(1000, 1).await, Err(ReadError::AboveEnd { .. })));
}

#[test]
fn readers_race_the_writer_and_miss_nothing() {
    let disk = MemDisk::new();
    let options = LogOptions { tail_bytes: 20_000, linger: Duration::ZERO, ..forgetful() };
    let log = start(&disk, &options);
    let mut model = Model::new(0, 40_000);
    model.create(&log);
    let view = model.view(&log);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..3_usize {
            let (view, done) = (&view, &done);
            scope.spawn(move || {
                let mut offset = 0;
                loop {
                    let finished = done.load(Ordering::SeqCst);
                    let batches = view.read(offset, 3000 * (1 + reader)).unwrap();
                    if batches.is_empty() && finished {
                        break;
                    }
                    for batch in batches {
                        let header = batch::check(&batch).unwrap();
                        assert_eq!(header.base_offset, offset);
                        offset = header.last_offset() + 1;
                    }
                    // Readers that lag behind go to disk.
                    if reader > 0 {
                        std::thread::yield_now();
                    }
                }
                assert_eq!(offset, view.high_watermark());
            });
        }
        for at in 0..1500 {
            model.append(&log, &times(at), 20 + (at as usize * 31) % 800);
            model.publish(&log);
        }
        done.store(true, Ordering::SeqCst);
    });
    model.check(&log, 10_000);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn lookups_agree_with_a_plain_search(
        batches in prop::collection::vec((prop::collection::vec(0..500_i64, 1..6), 0..30_000_usize), 1..50),
        published in 0..50_usize,
        segment_bytes in 1_000..400_000_u64,
        forget in any::<bool>(),
    ) {
        let disk = MemDisk::new();
        let log = start(&disk, &if forget { forgetful() } else { options() });
        let mut model = Model::new(0, segment_bytes);
        model.create(&log);
        for (at, (timestamps, value_bytes)) in batches.iter().enumerate() {
            model.append(&log, timestamps, *value_bytes);
            if at == published {
                model.publish(&log);
                log.sync().unwrap();
            }
        }
        model.check_lookups(&log);
        model.publish(&log);
        model.check(&log, 50_000);
        model.check_lookups(&log);
        log.sync().unwrap();
        model.check_lookups(&log);
    }
}
