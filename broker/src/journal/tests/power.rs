//! Crashes at any moment, with reopening as one of the things that happen at random.
//!
//! The model is the list of appended frames. Whatever happens, a recovery must return the model's frames, dense, from
//! the LSN asked for to one at or above the last acknowledged; after it, all that it returned counts as acknowledged,
//! and what it did not return is gone from the model, so that a frame which comes back later is found out.

use proptest::prelude::*;

use super::*;
use crate::disk::WriteFault;

#[derive(Clone, Debug)]
enum Op {
    Append {
        events: usize,
        batches: Vec<usize>,
    },
    Sync,
    Mark,
    /// Makes the next file if one is wanted, and recycles what was released.
    Prepare,
    /// Moves the oldest LSN to start from towards the acknowledged end, by so many percent, and releases what is below.
    Release {
        percent: u64,
    },
    Fault(Fault),
    Reopen {
        crash: Crash,
        newest: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Write { after: u64, fault: WriteFault },
    Sync { after: u64 },
    Power { after: u64 },
}

#[derive(Clone, Debug)]
struct Crash {
    /// The machine, rather than the process only.
    power: Option<u64>,
    /// Further crashes, each after so many operations of the recovery.
    recoveries: Vec<(u64, Option<u64>)>,
}

struct Run {
    disk: MemDisk,
    journal: Option<Journal>,
    /// Content of every frame from LSN 1 on that is or may be in the journal.
    frames: Vec<Content>,
    /// What the caller was told to be safe.
    acknowledged: Lsn,
    /// The oldest LSN that may still be started from.
    from: Lsn,
    /// Makes every content that was ever appended different.
    tag: u64,
    /// The failure that has stopped the journal.
    stopped: Option<String>,
}

impl Run {
    fn new() -> Self {
        let disk = MemDisk::new();
        let journal = Some(open(&disk));
        Self { disk, journal, frames: Vec::new(), acknowledged: 0, from: 0, tag: 0, stopped: None }
    }

    fn apply(&mut self, op: &Op) {
        let Some(journal) = &mut self.journal else { unreachable!("there is a journal between operations") };
        match op {
            Op::Append { events, batches } => {
                self.tag += 1;
                let content = content(self.tag, *events, batches);
                let outcome = append(journal, &content);
                if self.stopped.is_none() {
                    // After an error it may be there or not.
                    self.frames.push(content);
                }
                if let Some(lsn) = self.note(outcome) {
                    assert_eq!(lsn, self.frames.len() as u64);
                }
            }
            Op::Sync => {
                let outcome = journal.syncer().sync();
                if let Some(synced) = self.note(outcome) {
                    assert_eq!(synced, self.frames.len() as u64, "nothing is written meanwhile");
                    self.acknowledged = synced;
                }
            }
            Op::Mark => {
                let outcome = journal.mark();
                self.note(outcome);
            }
            Op::Prepare => journal.preparer.work_now(),
            Op::Release { percent } => {
                self.from += (self.acknowledged - self.from) * percent / 100;
                journal.release(self.from + 1);
            }
            Op::Fault(Fault::Write { after, fault }) => self.disk.fail_write(*after, *fault),
            Op::Fault(Fault::Sync { after }) => self.disk.fail_sync(*after),
            Op::Fault(Fault::Power { after }) => self.disk.power_fails_after(*after),
            Op::Reopen { crash, newest } => self.reopen(crash, *newest),
        }
    }

    /// Remembers the first failure, and asserts that it is the one that is told from then on.
    fn note<T>(&mut self, outcome: Result<T, JournalError>) -> Option<T> {
        match (outcome, &self.stopped) {
            (Ok(value), None) => Some(value),
            (Ok(_), Some(first)) => panic!("the journal goes on after {first}"),
            (Err(error), None) => {
                self.stopped = Some(error.to_string());
                None
            }
            (Err(error), Some(first)) => {
                assert_eq!(&error.to_string(), first);
                None
            }
        }
    }

    fn reopen(&mut self, crash: &Crash, newest: bool) {
        self.journal = None;
        self.stopped = None;
        let fall = |power: Option<u64>| match power {
            Some(seed) => self.disk.power_cut(seed),
            None => self.disk.kill(),
        };
        fall(crash.power);
        let from = if newest { self.acknowledged } else { self.from };
        for (after, power) in &crash.recoveries {
            self.disk.power_fails_after(*after);
            match recover(&self.disk, from) {
                // It got through before the crash, and nothing that it returned may be missing from now on.
                Ok((journal, frames)) => {
                    assert_dense(&frames, from, &self.frames);
                    self.acknowledged = journal.next_lsn() - 1;
                    self.frames.truncate(self.acknowledged as usize);
                }
                Err(RecoverError::Io { .. }) => {}
                Err(error) => panic!("a crash is not damage: {error}"),
            }
            fall(*power);
        }
        let (journal, frames) =
            recover(&self.disk, from).unwrap_or_else(|error| panic!("a crash is not damage: {error}"));
        assert_dense(&frames, from, &self.frames);
        let last = journal.next_lsn() - 1;
        assert_eq!(last, from + frames.len() as u64);
        assert!(last >= self.acknowledged, "{last} recovered, {} acknowledged", self.acknowledged);
        self.frames.truncate(last as usize);
        self.acknowledged = last;
        self.journal = Some(journal);
    }
}

fn any_crash() -> impl Strategy<Value = Crash> {
    let power = || prop_oneof![1 => Just(None), 3 => any::<u64>().prop_map(Some)];
    (power(), prop::collection::vec((0u64..14, power()), 0..3))
        .prop_map(|(power, recoveries)| Crash { power, recoveries })
}

fn any_fault() -> impl Strategy<Value = Fault> {
    let write = prop_oneof![
        Just(WriteFault::Io),
        Just(WriteFault::NoSpace),
        (0usize..3000).prop_map(WriteFault::Short),
        (0usize..3000).prop_map(WriteFault::Torn),
    ];
    prop_oneof![
        (0u64..4, write).prop_map(|(after, fault)| Fault::Write { after, fault }),
        (0u64..4).prop_map(|after| Fault::Sync { after }),
        (0u64..12).prop_map(|after| Fault::Power { after }),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    // Many frames of one sector: then old frames lie exactly where new ones will be looked for.
    let size = || prop_oneof![3 => 0usize..300, 2 => 300usize..2500];
    prop_oneof![
        12 => (size(), prop::collection::vec(size(), 0..3)).prop_map(|(events, mut batches)| {
            while 64 + events + batches.iter().map(|batch| batch + 4).sum::<usize>() > 6000 {
                batches.pop();
            }
            Op::Append { events, batches }
        }),
        4 => Just(Op::Sync),
        2 => Just(Op::Mark),
        2 => Just(Op::Prepare),
        2 => (0u64..=100).prop_map(|percent| Op::Release { percent }),
        1 => any_fault().prop_map(Op::Fault),
        3 => (any_crash(), any::<bool>()).prop_map(|(crash, newest)| Op::Reopen { crash, newest }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_sync_returned_for_survives_any_history_and_nothing_lost_returns(
        ops in prop::collection::vec(any_op(), 1..80),
        last in any_crash(),
    ) {
        let mut run = Run::new();
        for op in ops.iter().chain([&Op::Reopen { crash: last, newest: false }]) {
            run.apply(op);
        }
    }
}

/// A history in which every kind of operation on the disk occurs.
fn script() -> Vec<Op> {
    let append = |events: usize, batch: usize| Op::Append { events, batches: vec![batch] };
    let reopen =
        |seed: u64| Op::Reopen { crash: Crash { power: Some(seed), recoveries: Vec::new() }, newest: false };
    let mut ops = Vec::new();
    for round in 0..3u64 {
        ops.extend([
            append(100, 700),
            append(40, 0),
            Op::Sync,
            append(2000, 1500),
            append(900, 30),
            Op::Prepare,
        ]);
        ops.extend([Op::Sync, Op::Mark, append(20, 20), append(3000, 1000), append(3000, 500), Op::Sync]);
        ops.extend([
            Op::Release { percent: 90 },
            append(10, 2000),
            append(10, 2000),
            Op::Prepare,
            append(10, 10),
        ]);
        ops.push(reopen(round));
        ops.extend([append(1, 1), append(200, 300), Op::Sync, append(1, 2)]);
    }
    ops
}

#[test]
fn the_power_may_fail_at_every_operation_and_again_at_every_operation_of_the_recovery() {
    let operations = |after: Option<u64>| {
        let mut run = Run::new();
        for op in &script() {
            let is_reopen = matches!(op, Op::Reopen { .. });
            // Where the power failed, the machine starts again as the test wants it, not as the script does.
            if is_reopen && run.stopped.is_some() {
                break;
            }
            if let Some(left) = after.and_then(|after| after.checked_sub(run.disk.operations()))
                && !is_reopen
            {
                run.disk.power_fails_after(left);
            }
            run.apply(op);
        }
        run
    };
    let count = operations(None).disk.operations();
    assert!(count > 80);
    for after in 0..count {
        for (in_recovery, seed) in [(1000, 0), (3, 1), (5, 2), (6, 3), (7, 4), (8, 5)] {
            let mut run = operations(Some(after));
            let seed = after * 10 + seed;
            let recoveries = vec![(in_recovery, Some(seed + 5))];
            run.apply(&Op::Reopen { crash: Crash { power: Some(seed), recoveries }, newest: false });
            run.apply(&Op::Append { events: 30, batches: vec![] });
            run.apply(&Op::Sync);
            run.apply(&Op::Reopen { crash: Crash { power: Some(seed), recoveries: vec![] }, newest: true });
        }
    }
}

#[test]
fn a_recovery_may_be_killed_and_the_next_one_lose_power_at_any_two_operations() {
    let mut run = Run::new();
    for op in script().iter().take(20) {
        run.apply(op);
    }
    run.journal = None;
    let before = run.disk.fork();
    for first in 0..10 {
        for second in 0..10 {
            for seed in 0..12 {
                let mut run = Run {
                    disk: before.fork(),
                    journal: None,
                    frames: run.frames.clone(),
                    stopped: None,
                    ..run
                };
                let recoveries = vec![(first, None), (second, Some(seed))];
                run.reopen(&Crash { power: None, recoveries }, false);
            }
        }
    }
}

#[test]
fn a_file_is_released_only_when_the_next_one_begins_durably() {
    let mut run = Run::new();
    let one = Op::Append { events: 500, batches: vec![] };
    let files = |run: &Run| run.journal.as_ref().unwrap().files.len();
    while files(&run) == 1 {
        run.apply(&Op::Sync);
        run.apply(&one);
    }
    let mut journal = run.journal.take().unwrap();
    journal.release(run.acknowledged + 1);
    journal.preparer.work_now();
    drop(journal);
    for seed in 0..50 {
        let disk = run.disk.fork();
        disk.power_cut(seed);
        recover(&disk, run.acknowledged).unwrap();
    }
}

#[test]
fn the_power_may_fail_at_every_operation_of_a_recycling() {
    let fill = |run: &mut Run| {
        for _ in 0..12 {
            run.apply(&Op::Append { events: 1000, batches: vec![400] });
        }
        run.apply(&Op::Sync);
    };
    let release = Op::Release { percent: 100 };
    for after in 0..10 {
        for seed in 0..30 {
            let mut run = Run::new();
            fill(&mut run);
            run.apply(&release);
            run.apply(&Op::Fault(Fault::Power { after }));
            run.apply(&Op::Prepare);
            for round in 0..4 {
                let crash = Crash { power: Some(seed + round), recoveries: vec![] };
                run.apply(&Op::Reopen { crash, newest: true });
                fill(&mut run);
                run.apply(&release);
                run.apply(&Op::Prepare);
            }
        }
    }
}

/// The history that a recycled file's old frames would need to come back: the same lengths in the same places.
#[test]
fn frames_of_a_recycled_file_never_come_back() {
    for seed in 0..200 {
        let mut run = Run::new();
        for round in 0..30 {
            for _ in 0..8 {
                run.apply(&Op::Append { events: 300, batches: vec![200, 80] });
            }
            run.apply(&Op::Sync);
            run.apply(&Op::Release { percent: 100 });
            run.apply(&Op::Prepare);
            run.apply(&Op::Append { events: 300, batches: vec![200, 80] });
            if (round + seed) % 3 == 0 {
                let crash = Crash { power: Some(seed * 100 + round), recoveries: vec![] };
                run.apply(&Op::Reopen { crash, newest: seed % 2 == 0 });
            }
        }
    }
}
