//! What the broker says of itself to those who run it: whether it takes records, and why not; room on its disk; journal and
//! checkpoints; stored records that were found damaged.
//!
//! Each fact is noted by the thread that knows it, and read without asking the shard: so it can be had when the shard takes
//! nothing any more, or has much to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::disk::FileSystem;
use crate::engine::error::NoRoom;
use crate::engine::types::{Lsn, PartitionKey};
use crate::environment::Environment;
use crate::log::Damage;

/// Most damaged ranges that are listed; more are counted.
const MAX_LISTED: usize = 100;

/// Whether new records are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    Ok,
    /// New records are refused until there is room; everything else goes on.
    DiskFull(NoRoom),
    /// A write or sync failed, for this reason: nothing is taken any more until the broker is restarted.
    ReadOnly(String),
}

/// The broker as it is now. Times are Unix milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub condition: Condition,
    /// It has been in this condition since then.
    pub since_ms: i64,
    pub uptime: Duration,
    /// Bytes that may still be written to the disk; `None` when it cannot be asked.
    pub disk_available: Option<u64>,
    /// New records are refused while fewer are available; 0: never.
    pub disk_low_water: u64,
    /// Bytes of the journal that were used since the last checkpoint was begun: a start after a crash reads them.
    pub journal_bytes: u64,
    /// The last checkpoint: the frame that it stands on, and when it was stored, if that was in this run.
    pub checkpoint: Lsn,
    pub checkpoint_ms: Option<i64>,
    /// Bytes of sealed segments looked through in this run, and when that came to the end of all of them last.
    pub scrubbed_bytes: u64,
    pub scrubbed_ms: Option<i64>,
    /// What was found damaged and is there still as far as is known, the first 100 of it; and how many there are.
    pub damaged: Vec<Damage>,
    pub damaged_ranges: u64,
}

/// Where the facts are noted. See the module's documentation.
#[derive(Debug)]
pub struct StatusBoard {
    environment: Environment,
    began: Instant,
    file_system: Arc<dyn FileSystem>,
    disk_low_water: u64,
    journal_bytes: AtomicU64,
    scrubbed_bytes: AtomicU64,
    noted: Mutex<Noted>,
}

#[derive(Debug)]
struct Noted {
    condition: Condition,
    since_ms: i64,
    checkpoint: Lsn,
    checkpoint_ms: Option<i64>,
    scrubbed_ms: Option<i64>,
    /// Looks at everything that have ended.
    round: u64,
    /// By partition and first offset; with the round in which it was seen last. More than are listed are only counted.
    damaged: BTreeMap<(PartitionKey, u64), (u64, Damage)>,
    /// Not in `damaged`: found in this round, and in the one before.
    unlisted: (u64, u64),
}

impl StatusBoard {
    /// Of a broker that begins now, and whose last checkpoint stands on frame `checkpoint`.
    pub(crate) fn new(
        environment: Environment,
        file_system: Arc<dyn FileSystem>,
        disk_low_water: u64,
        checkpoint: Lsn,
    ) -> Self {
        let noted = Noted {
            condition: Condition::Ok,
            since_ms: environment.wall_ms(),
            checkpoint,
            checkpoint_ms: None,
            scrubbed_ms: None,
            round: 0,
            damaged: BTreeMap::new(),
            unlisted: (0, 0),
        };
        Self {
            began: environment.now(),
            environment,
            file_system,
            disk_low_water,
            journal_bytes: AtomicU64::new(0),
            scrubbed_bytes: AtomicU64::new(0),
            noted: Mutex::new(noted),
        }
    }

    /// The wall clock, in Unix milliseconds.
    pub(crate) fn wall_ms(&self) -> i64 {
        self.environment.wall_ms()
    }

    /// Reads it off. May ask the disk for its room.
    pub fn read(&self) -> Status {
        let disk_available = self.file_system.available().ok();
        let noted = self.noted.lock();
        Status {
            condition: noted.condition.clone(),
            since_ms: noted.since_ms,
            uptime: self.environment.now().saturating_duration_since(self.began),
            disk_available,
            disk_low_water: self.disk_low_water,
            journal_bytes: self.journal_bytes.load(Ordering::Relaxed),
            checkpoint: noted.checkpoint,
            checkpoint_ms: noted.checkpoint_ms,
            scrubbed_bytes: self.scrubbed_bytes.load(Ordering::Relaxed),
            scrubbed_ms: noted.scrubbed_ms,
            damaged: noted.damaged.values().map(|(_, damage)| damage.clone()).collect(),
            damaged_ranges: noted.damaged.len() as u64 + noted.unlisted.0.max(noted.unlisted.1),
        }
    }

    /// New records are refused for lack of room, or taken again.
    pub(crate) fn room(&self, no_room: Option<NoRoom>) {
        let mut noted = self.noted.lock();
        let condition = no_room.map_or(Condition::Ok, Condition::DiskFull);
        match (&noted.condition, &condition) {
            (Condition::ReadOnly(_), _) => {}
            // Full as before; only the figures differ.
            (Condition::DiskFull(_), Condition::DiskFull(_)) => noted.condition = condition,
            (before, now) if before == now => {}
            _ => (noted.condition, noted.since_ms) = (condition, self.environment.wall_ms()),
        }
    }

    /// Nothing is taken any more. The first reason counts.
    pub(crate) fn read_only(&self, reason: &str) {
        let mut noted = self.noted.lock();
        if !matches!(noted.condition, Condition::ReadOnly(_)) {
            noted.condition = Condition::ReadOnly(reason.to_owned());
            noted.since_ms = self.environment.wall_ms();
        }
    }

    /// So many bytes of the journal were used since the last checkpoint was begun.
    pub(crate) fn journaled(&self, bytes: u64) {
        self.journal_bytes.store(bytes, Ordering::Relaxed);
    }

    /// A checkpoint is on the device.
    pub(crate) fn checkpointed(&self, lsn: Lsn) {
        let mut noted = self.noted.lock();
        (noted.checkpoint, noted.checkpoint_ms) = (lsn, Some(self.environment.wall_ms()));
    }

    /// So many more bytes of sealed segments were looked through, and are whole.
    pub(crate) fn scrubbed(&self, bytes: usize) {
        self.scrubbed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// These records cannot be read.
    pub(crate) fn damaged(&self, damage: Damage) {
        let mut noted = self.noted.lock();
        let (key, round) = ((damage.partition, damage.offsets.start), noted.round);
        if noted.damaged.len() < MAX_LISTED || noted.damaged.contains_key(&key) {
            noted.damaged.insert(key, (round, damage));
        } else {
            noted.unlisted.0 += 1;
        }
    }

    /// Everything was looked through once: what was not found damaged any more is gone.
    pub(crate) fn scrubbed_all(&self) {
        let mut noted = self.noted.lock();
        let round = noted.round;
        noted.damaged.retain(|_, (seen, _)| *seen == round);
        noted.round += 1;
        noted.unlisted = (0, noted.unlisted.0);
        noted.scrubbed_ms = Some(self.environment.wall_ms());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk::{Disk, MemDisk};
    use crate::engine::types::TopicId;

    fn board() -> (Environment, StatusBoard) {
        let disk = MemDisk::new();
        disk.create_dir(Path::new("/data")).unwrap();
        let environment = Environment::simulated(1, 1_000_000);
        let file_system = disk.file_system(Path::new("/data")).unwrap();
        (environment.clone(), StatusBoard::new(environment, file_system, 500, 7))
    }

    fn damage(first: u64) -> Damage {
        Damage {
            topic: "orders".into(),
            partition: PartitionKey { topic: TopicId([1; 16]), partition: 0 },
            offsets: first..first + 1,
            file: "/data/log/x".into(),
            position: 9,
            reason: "bits".to_owned(),
        }
    }

    #[test]
    fn the_first_reason_counts_and_room_does_not_make_up_for_it() {
        let (environment, board) = board();
        assert_eq!((board.read().condition, board.read().since_ms), (Condition::Ok, 1_000_000));
        let full = |available| NoRoom { available, needed: 500 };
        environment.pass(Duration::from_secs(1));
        board.room(Some(full(10)));
        environment.pass(Duration::from_secs(1));
        board.room(Some(full(5)));
        let status = board.read();
        assert_eq!((status.condition, status.since_ms), (Condition::DiskFull(full(5)), 1_001_000));
        board.read_only("the first");
        board.read_only("the second");
        board.room(None);
        let status = board.read();
        assert_eq!(status.condition, Condition::ReadOnly("the first".to_owned()));
        assert_eq!((status.since_ms, status.uptime), (1_002_000, Duration::from_secs(2)));
    }

    #[test]
    fn a_full_disk_that_has_room_again_is_well() {
        let (environment, board) = board();
        board.room(Some(NoRoom { available: 10, needed: 500 }));
        environment.pass(Duration::from_secs(3));
        board.room(None);
        assert_eq!((board.read().condition, board.read().since_ms), (Condition::Ok, 1_003_000));
    }

    #[test]
    fn damage_stays_until_it_is_not_found_again() {
        let (_, board) = board();
        board.damaged(damage(3));
        board.damaged(damage(8));
        board.scrubbed_all();
        board.damaged(damage(3));
        assert_eq!(board.read().damaged_ranges, 2, "the second has not been looked for yet");
        board.scrubbed_all();
        let status = board.read();
        assert_eq!((status.damaged, status.damaged_ranges), (vec![damage(3)], 1));
        assert_eq!(status.scrubbed_ms, Some(1_000_000));
    }

    #[test]
    fn much_damage_is_counted_and_not_kept() {
        let (_, board) = board();
        for _ in 0..2 {
            for first in 0..1_000 {
                board.damaged(damage(first));
            }
            let status = board.read();
            assert_eq!((status.damaged.len(), status.damaged_ranges), (MAX_LISTED, 1_000));
            board.scrubbed_all();
            assert_eq!(board.read().damaged_ranges, 1_000);
        }
    }
}
