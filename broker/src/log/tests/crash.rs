//! Restarts, killed processes and power cuts: what the checkpoint and the journal bring back is all there.

use proptest::prelude::*;

use super::*;

#[test]
fn a_restart_reads_what_was_written_and_goes_on() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 50_000);
    model.create(&log);
    for at in 0..100 {
        model.append(&log, &[at, at], 1000);
    }
    log.sync().unwrap();
    log.shutdown().unwrap();
    for _ in 0..3 {
        let log = start(&disk, &forgetful());
        log.restore(&model.info);
        model.check(&log, 20_000);
        for at in 0..30 {
            model.append(&log, &[at, at], 1000);
        }
        model.publish(&log);
        model.check(&log, 20_000);
        model.check_lookups(&log);
        log.sync().unwrap();
        model.check(&log, 20_000);
        log.shutdown().unwrap();
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Append { timestamps: Vec<i64>, value_bytes: usize, ahead: bool },
    Publish,
    Checkpoint,
    RaiseEpoch { missing: u64 },
    Read { max_bytes: usize },
    Crash(Crash),
}

#[derive(Clone, Debug)]
struct Crash {
    /// Loses what was not synced, with this seed; otherwise only the process dies.
    power: Option<u64>,
    /// The disk stops working this many operations before the crash.
    failing: Option<u64>,
    /// Which part of the batches after the checkpoint the journal brings back.
    replayed: prop::sample::Index,
    forget: bool,
}

fn operation() -> impl Strategy<Value = Operation> {
    let crash = (
        prop::option::of(any::<u64>()),
        prop::option::of(0..20_u64),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(power, failing, replayed, forget)| Crash { power, failing, replayed, forget });
    prop_oneof![
        8 => (prop::collection::vec(0..500_i64, 1..4), 0..8_000_usize, any::<bool>())
            .prop_map(|(timestamps, value_bytes, ahead)| Operation::Append { timestamps, value_bytes, ahead }),
        3 => Just(Operation::Publish),
        2 => Just(Operation::Checkpoint),
        1 => (1..10_u64).prop_map(|missing| Operation::RaiseEpoch { missing }),
        2 => (1..50_000_usize).prop_map(|max_bytes| Operation::Read { max_bytes }),
        2 => crash.prop_map(Operation::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn what_was_checkpointed_and_replayed_is_all_there(
        operations in prop::collection::vec(operation(), 1..40),
        segment_bytes in 1_000..60_000_u64,
    ) {
        let disk = MemDisk::new();
        let mut log = start(&disk, &forgetful());
        let mut model = Model::new(0, segment_bytes);
        model.create(&log);
        // What the checkpoint says, and how many batches it covers.
        let mut checkpoint = (model.info.clone(), 0);
        for operation in operations {
            match operation {
                Operation::Append { timestamps, value_bytes, ahead: true } => {
                    model.append_ahead(&log, &timestamps, value_bytes);
                }
                Operation::Append { timestamps, value_bytes, ahead: false } => {
                    model.append(&log, &timestamps, value_bytes);
                }
                Operation::Publish => model.publish(&log),
                Operation::Checkpoint => {
                    log.sync().unwrap();
                    checkpoint = (model.info.clone(), model.batches.len());
                }
                Operation::RaiseEpoch { missing } => model.raise_epoch(missing),
                Operation::Read { max_bytes } => model.check(&log, max_bytes),
                Operation::Crash(crash) => {
                    if let Some(operations) = crash.failing {
                        disk.power_fails_after(operations);
                        let _ = log.sync();
                    }
                    match crash.power {
                        Some(seed) => disk.power_cut(seed),
                        None => disk.kill(),
                    }
                    drop(log);
                    log = start(&disk, &if crash.forget { forgetful() } else { options() });
                    model.info = checkpoint.0.clone();
                    log.restore(&model.info);
                    let kept = checkpoint.1 + crash.replayed.index(model.batches.len() - checkpoint.1 + 1);
                    model.batches.truncate(kept);
                    model.referred.retain(|at| *at < kept);
                    for at in checkpoint.1..kept {
                        model.append_again(&log, at);
                    }
                    log.condemn_unknown().unwrap();
                    model.publish(&log);
                    model.check(&log, 10_000);
                }
            }
        }
        model.publish(&log);
        model.check(&log, 10_000);
        model.check_lookups(&log);
        log.sync().unwrap();
        model.check(&log, 10_000);
        model.check_lookups(&log);
    }
}
