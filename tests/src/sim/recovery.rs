//! How runs of the broker end and begin.

use std::collections::BTreeMap;
use std::path::Path;

use felucca_broker::broker::BrokerLimits;
use felucca_broker::cleaner::SteppedCleaner;
use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::types::PartitionKey;
use felucca_broker::shard::Stepped;
use felucca_protocol::batch::BatchLimits;

use super::world::{DATA, World};

/// Bytes of requests that the front door admits; the world keeps within them.
const IN_FLIGHT_BYTES: u32 = 1 << 20;

/// More than there are keys.
const CLEANER_KEY_BYTES: u64 = 64 << 10;

pub(crate) fn limits() -> BrokerLimits {
    let batch = BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 100 };
    BrokerLimits { batch, session_timeout: std::time::Duration::from_secs(4) }
}

impl World {
    /// Nothing of the process is left.
    fn end(&mut self, shard: Stepped) {
        (self.safe, self.ended_ms, self.ended_at) = (shard.synced(), shard.monotonic_ms(), shard.written());
        drop(shard);
        (self.broker, self.cleaner) = (None, None);
        self.forget_mail();
        self.network.broker_died(&mut self.rng);
    }

    /// The process dies; the page cache stays.
    pub(crate) fn kill(&mut self) {
        if let Some(shard) = self.shard.take() {
            self.end(shard);
            self.history.crash(None);
            self.leases.crash(None);
        }
        self.disk.kill();
        self.whole_again();
    }

    /// The machine loses its power: of what was not synced, any part may be there.
    pub(crate) fn power_cut(&mut self, losing_all: bool) {
        if let Some(shard) = self.shard.take() {
            self.end(shard);
        }
        self.note(|| format!("frames up to {} are safe", self.safe));
        self.history.crash(Some(self.safe));
        self.leases.crash(Some(self.safe));
        if losing_all {
            self.disk.power_cut_losing_all();
        } else {
            self.disk.power_cut(self.rng.bits());
        }
        self.environment.restart_machine();
        self.whole_again();
    }

    /// Whatever was to befall the disk does not any more.
    fn whole_again(&mut self) {
        self.harmed = self.room_at_ms.is_some();
    }

    /// Ends the process in order, if it can.
    pub(crate) fn stop(&mut self) {
        let Some(shard) = self.shard.take() else { return };
        (self.safe, self.ended_ms) = (shard.synced(), shard.monotonic_ms());
        self.cleaner = None;
        self.ended_at = shard.stop();
        // What it says last it says of what it has written.
        self.hear_broker();
        self.broker = None;
        self.forget_mail();
        self.network.broker_died(&mut self.rng);
        self.history.crash(None);
        self.leases.crash(None);
        self.disk.kill();
        self.whole_again();
    }

    /// The start is cut short, by a kill or by lost power, again and again.
    pub(crate) fn crash_in_recovery(&mut self) {
        self.kill_or_cut();
        for _ in 0..self.rng.between(1, 3) {
            self.disk.power_fails_after(self.rng.below(25));
            self.harmed = true;
            if self.start() {
                // It failed behind the start.
                break;
            }
            self.kill_or_cut();
        }
    }

    fn kill_or_cut(&mut self) {
        if self.rng.chance(50) {
            self.kill();
        } else {
            self.power_cut(false);
        }
    }

    /// Starts the broker and looks at what it found; false if it could not start, because of what was done to the disk.
    pub(crate) fn start(&mut self) -> bool {
        let copy = (self.rng.chance(25) && !self.harmed).then(|| (self.disk.fork(), self.environment.fork()));
        let started = Stepped::start(&self.storage(), Path::new(DATA), self.options.clone());
        let shard = match started {
            Ok(shard) => shard,
            Err(error) => {
                self.note(|| format!("start: {error}"));
                assert!(self.harmed, "the broker does not start: {error}");
                self.coverage.meet("recovery", "start failed");
                // The process is gone, and with it what was planned for it.
                self.kill();
                return false;
            }
        };
        self.note(|| format!("started: frame {}, epoch {}", shard.written(), shard.engine().boot_epoch()));
        let broker = shard.broker(IN_FLIGHT_BYTES, limits());
        for topic in &self.history.deleted {
            let key = PartitionKey { topic: *topic, partition: 0 };
            assert!(broker.view(key).is_err(), "{topic} was deleted, and is back");
        }
        self.cleaner = Some(SteppedCleaner::new(broker.clone(), CLEANER_KEY_BYTES));
        self.broker = Some(broker);
        self.told.split_off(&shard.written());
        self.told.insert(shard.written(), shard.written() - 1);
        self.leases.booted(shard.monotonic_ms());
        let replayed = shard.replayed();
        self.shard = Some(shard);
        self.coverage.meet("recovery", "started");
        self.coverage.meet_often("recovery", "referred batch replayed", replayed.referring);
        self.coverage.meet_often("recovery", "referring frame completed", replayed.completed);
        self.coverage.meet_often("recovery", "referring frame cut", replayed.incomplete);
        if let Some((disk, environment)) = copy {
            self.compare_with_older_checkpoint(&disk, environment);
        }
        self.check_step();
        if !self.harmed {
            self.look_at_everything();
        }
        true
    }

    /// After a start: nothing is missing, and what was committed is.
    pub(crate) fn look_at_everything(&mut self) {
        self.read_everything();
        self.history.check_complete();
        self.check_in_hand();
        let groups: Vec<String> = self.committed.keys().map(|(group, _)| group.clone()).collect();
        for group in groups {
            let command = Command::FetchOffsets { group: group.clone(), partitions: Vec::new() };
            let Some(Reply::Offsets(offsets)) = self.ask(command) else { continue };
            let found: BTreeMap<PartitionKey, u64> =
                offsets.into_iter().map(|offset| (offset.partition, offset.offset)).collect();
            for ((name, key), floor) in &self.committed {
                assert!(
                    *name != group || found.get(key) >= Some(floor),
                    "{group} had committed {floor} in {key}, and now {:?}",
                    found.get(key)
                );
            }
        }
    }
}
