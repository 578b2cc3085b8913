//! What goes wrong, and when.

use std::collections::BTreeMap;

use felucca_broker::disk::WriteFault;
use felucca_broker::shard::Stepped;

use super::FAULTS;
use super::copies::Rotten;
use super::world::World;
use crate::engine_model::rng::Rng;

/// As many as a checkpoint takes until it is committed, from its beginning on.
const CHECKPOINT_STEPS: u64 = 4;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Kill,
    PowerCut,
    PowerCutLosingAll,
    PowerFails,
    PowerCutBehindCheckpoint,
    CrashInRecovery,
    CleanRestart,
    WriteIo,
    WriteNoSpace,
    WriteShort,
    WriteTorn,
    SyncIo,
    ReadIo,
    DiskFull,
    Rot(Rotten),
    ClockBack,
    ClockAhead,
    ConnectionCut,
    ConnectionLeft,
    SlowConnections,
    ClientPause,
    Stall,
    LongPause,
}

/// How often each comes, of so many as all have together.
const WEIGHTS: &[(u64, Fault)] = &[
    (10, Fault::Kill),
    (12, Fault::PowerCut),
    (5, Fault::PowerCutLosingAll),
    (8, Fault::PowerFails),
    (5, Fault::PowerCutBehindCheckpoint),
    (6, Fault::CrashInRecovery),
    (4, Fault::CleanRestart),
    (3, Fault::WriteIo),
    (2, Fault::WriteNoSpace),
    (4, Fault::WriteShort),
    (4, Fault::WriteTorn),
    (5, Fault::SyncIo),
    (3, Fault::ReadIo),
    (2, Fault::DiskFull),
    (6, Fault::Rot(Rotten::Journal)),
    (3, Fault::Rot(Rotten::Log)),
    (3, Fault::Rot(Rotten::Checkpoint)),
    (3, Fault::ClockBack),
    (3, Fault::ClockAhead),
    (6, Fault::ConnectionCut),
    (8, Fault::ConnectionLeft),
    (3, Fault::SlowConnections),
    (4, Fault::ClientPause),
    (4, Fault::Stall),
    (2, Fault::LongPause),
];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::PowerCut => "power cut",
            Self::PowerCutLosingAll => "power cut losing all",
            Self::PowerFails => "power fails in the middle",
            Self::PowerCutBehindCheckpoint => "power cut behind a checkpoint",
            Self::CrashInRecovery => "crash in recovery",
            Self::CleanRestart => "clean restart",
            Self::WriteIo => "write: EIO",
            Self::WriteNoSpace => "write: ENOSPC",
            Self::WriteShort => "write: short",
            Self::WriteTorn => "write: torn",
            Self::SyncIo => "sync: EIO",
            Self::ReadIo => "read: EIO",
            Self::DiskFull => "disk full",
            Self::Rot(Rotten::Journal) => "bit rot: journal",
            Self::Rot(Rotten::Log) => "bit rot: log",
            Self::Rot(Rotten::Checkpoint) => "bit rot: checkpoint",
            Self::ClockBack => "clock: back",
            Self::ClockAhead => "clock: ahead",
            Self::ConnectionCut => "connection cut",
            Self::ConnectionLeft => "connection left",
            Self::SlowConnections => "slow connections",
            Self::ClientPause => "client pause",
            Self::Stall => "stall",
            Self::LongPause => "long pause",
        }
    }

    /// At least [`FAULTS`] of a thousand steps, most of them more.
    pub(crate) fn plan(rng: &mut Rng, steps: u64) -> BTreeMap<u64, Self> {
        let many = rng.between(FAULTS, 14) * steps / 1_000;
        let all: u64 = WEIGHTS.iter().map(|(weight, _)| weight).sum();
        let mut plan = BTreeMap::new();
        while (plan.len() as u64) < many.min(steps) {
            let mut drawn = rng.below(all);
            for (weight, fault) in WEIGHTS {
                if drawn < *weight {
                    plan.insert(rng.below(steps), *fault);
                    break;
                }
                drawn -= weight;
            }
        }
        plan
    }
}

impl World {
    pub(crate) fn suffer(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {}", fault.name()));
        self.faults += 1;
        self.coverage.meet("fault", fault.name());
        let soon = self.rng.below(6);
        match fault {
            Fault::Kill => self.kill(),
            Fault::PowerCut => self.power_cut(false),
            Fault::PowerCutLosingAll => self.power_cut(true),
            Fault::PowerFails => {
                self.harmed = true;
                self.disk.power_fails_after(self.rng.below(20));
            }
            Fault::PowerCutBehindCheckpoint => {
                self.shard_steps("turn", Stepped::turn);
                for _ in 0..CHECKPOINT_STEPS {
                    self.shard_steps("checkpoint", Stepped::checkpoint);
                }
                self.power_cut(false);
            }
            Fault::CrashInRecovery => self.crash_in_recovery(),
            Fault::CleanRestart => self.stop(),
            Fault::WriteIo => self.fail_write(soon, WriteFault::Io),
            Fault::WriteNoSpace => self.fail_write(soon, WriteFault::NoSpace),
            Fault::WriteShort => {
                let bytes = self.rng.below(900) as usize;
                self.disk.fail_write(soon, WriteFault::Short(bytes));
                self.harmed |= bytes == 0;
            }
            Fault::WriteTorn => {
                let bytes = self.rng.below(2_000) as usize;
                self.fail_write(soon, WriteFault::Torn(bytes));
            }
            Fault::SyncIo => {
                self.harmed = true;
                self.disk.fail_sync(self.rng.below(4));
            }
            Fault::ReadIo => {
                self.harmed = true;
                self.disk.fail_read(soon);
            }
            Fault::DiskFull => {
                self.harmed = true;
                let room = self.rng.below(8 << 10);
                self.disk.set_capacity(Some(self.disk.used() + room));
                self.room_at_ms = Some(self.now_ms + self.rng.below(500));
            }
            Fault::Rot(place) => self.open_rotten(place),
            Fault::ClockBack => self.shift_clock(-1),
            Fault::ClockAhead => self.shift_clock(1),
            Fault::ConnectionCut => {
                let used = self.network.in_use();
                if let Some(connection) = self.rng.pick(&used).copied() {
                    self.network.cut(connection);
                    self.end_served(connection);
                }
            }
            Fault::ConnectionLeft => {
                let used = self.network.in_use();
                if let Some(connection) = self.rng.pick(&used).copied() {
                    let client = self.network.client_of(connection);
                    self.network.leave(&mut self.rng, self.now_ms, connection, |_| true);
                    if let Some(client) = client {
                        self.clients[client].connection = None;
                    }
                }
            }
            Fault::SlowConnections => self.network.slow = [0, 30, 100][self.rng.below(3) as usize],
            Fault::ClientPause => {
                let client = self.rng.below(self.clients.len() as u64) as usize;
                self.clients[client].sleeps_until_ms = self.now_ms + self.rng.between(1_000, 8_000);
            }
            Fault::Stall => {
                let ms = self.rng.between(1_000, 6_000);
                self.pass(ms);
            }
            Fault::LongPause => {
                let ms = [70_000, 700_000][self.rng.below(2) as usize];
                self.pass(ms);
            }
        }
    }

    fn fail_write(&mut self, after: u64, fault: WriteFault) {
        self.harmed = true;
        self.disk.fail_write(after, fault);
    }

    fn shift_clock(&mut self, sign: i64) {
        let by_ms = self.rng.between(1, 40_000).cast_signed() * sign;
        self.environment.set_wall_ms(self.environment.wall_ms() + by_ms);
    }

    /// A broker that cannot write any more, or is not there, is restarted sooner or later.
    pub(crate) fn recover_from_harm(&mut self) {
        if self.room_at_ms.is_some_and(|at| at <= self.now_ms) {
            self.room_at_ms = None;
            self.disk.set_capacity(None);
        }
        match self.shard.as_ref().map(|shard| shard.read_only().is_some()) {
            Some(false) => {}
            Some(true) => {
                assert!(self.harmed, "the broker writes nothing any more, and nothing was done to it");
                if self.rng.chance(15) {
                    match self.rng.below(4) {
                        0 => self.stop(),
                        1 => self.power_cut(false),
                        _ => self.kill(),
                    }
                }
            }
            None => {
                if self.rng.chance(25) {
                    self.start();
                }
            }
        }
    }
}
