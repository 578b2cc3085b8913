//! The end of a run: faults stop, everything is healed, and comes to rest; then all is looked at once more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::{GroupDescription, Reply};
use felucca_broker::engine::types::PartitionKey;
use felucca_broker::shard::{Did, Stepped};

use super::client::Role;
use super::world::World;

/// Virtual time within which all must be done.
const PATIENCE_MS: u64 = 180_000;

impl World {
    /// Heals, waits, stops, starts and looks. Returns what the groups say of themselves at the end.
    pub(crate) fn finish(&mut self) -> String {
        self.note(|| "all is healed".to_owned());
        self.heal();
        let begun_ms = self.now_ms;
        let left = loop {
            self.everything_moves();
            let Some(left) = self.left_to_do() else { break None };
            if self.now_ms - begun_ms > PATIENCE_MS {
                break Some(left);
            }
        };
        if let Some(left) = left {
            panic!("after {PATIENCE_MS} ms without faults: {left}");
        }
        self.note(|| format!("at rest after {} ms", self.now_ms - begun_ms));
        self.look_at_everything();
        let before = self.metrics();
        let share: BTreeSet<String> = self.share_groups();
        self.stop();
        assert!(self.start(), "nothing is wrong any more");
        assert_eq!(before, self.metrics(), "groups after an orderly stop");
        self.check_letters(&share);
        self.coverage.meet_often("recovery", "offsets passed over after lost power", self.history.gaps);
        self.coverage.meet_often("log", "tombstone gone", self.history.tombstones_gone);
        self.coverage.meet_often("log", "records deleted by retention", self.history.expiries);
        before
    }

    fn heal(&mut self) {
        self.calm = true;
        self.plan.clear();
        self.room_at_ms = None;
        self.disk.set_capacity(None);
        self.network.heal();
        self.clients.iter_mut().for_each(|client| client.sleeps_until_ms = 0);
        // Whatever was to befall the disk goes with the process.
        self.kill();
        assert!(self.start(), "nothing is wrong any more");
    }

    /// Everybody does what there is to do, then a little time passes.
    fn everything_moves(&mut self) {
        let mut busy = false;
        for client in 0..self.clients.len() {
            self.client_acts(client);
        }
        for connection in self.network.ready_up(self.now_ms) {
            while self.arrives_up(connection) {
                busy = true;
            }
        }
        for _ in 0..6 {
            let mut worked = false;
            for (name, step) in [
                ("turn", Stepped::turn as fn(&mut Stepped) -> Did),
                ("sync", Stepped::sync),
                ("release", Stepped::release),
                ("segments", Stepped::write_segments),
                ("checkpoint", Stepped::checkpoint),
                ("read", Stepped::read),
            ] {
                let before = self.written();
                self.shard_steps(name, step);
                worked |= self.written() != before;
            }
            self.clean();
            if !worked {
                break;
            }
            busy = true;
        }
        for connection in self.network.ready_down(self.now_ms) {
            while self.arrives_down(connection) {
                busy = true;
            }
        }
        self.check_step();
        let shard = self.shard.as_ref();
        let reason = shard.and_then(Stepped::read_only);
        assert!(reason.is_none(), "the broker writes nothing any more: {reason:?}");
        let ms = if busy { 2 } else { self.rng.between(10, 60) };
        self.pass(ms);
    }

    /// What is not done yet, if anything.
    fn left_to_do(&mut self) -> Option<String> {
        for (number, client) in self.clients.iter().enumerate() {
            let done = match &client.role {
                Role::Producer(producer) => producer.is_done(),
                Role::Consumer(consumer) => consumer.has_committed(),
                Role::Admin => self.admin.is_done(),
                Role::Worker(_) | Role::Redriver(_) => true,
            };
            if !done {
                return Some(format!("client {number} is not done"));
            }
        }
        if let Some((key, at)) = self.unread_by_consumers() {
            return Some(format!("consumers are at {at} in {key}"));
        }
        for group in self.share_groups() {
            let Some(description) = self.describe(&group) else {
                return Some(format!("{group} cannot be seen"));
            };
            let keys = description.config.iter().any(|(key, value)| key == "ordering" && value == "key");
            for info in &description.partitions {
                // Behind what is held the others of its key wait.
                let behind = keys && info.held > 0;
                let waiting = info.leased + info.scheduled + info.exhausted;
                if waiting > 0 || (info.available > 0 && !behind) {
                    return Some(format!("{group} is not done: {info:?}"));
                }
            }
        }
        self.files_of_deleted_topics()
    }

    /// The space of what was deleted is free.
    fn files_of_deleted_topics(&self) -> Option<String> {
        let deleted: BTreeSet<String> = self.history.deleted.iter().map(ToString::to_string).collect();
        let is_deleted = |path: &Path| {
            path.components().any(|part| part.as_os_str().to_str().is_some_and(|name| deleted.contains(name)))
        };
        let found = self.disk.files().into_iter().find(|(path, _)| is_deleted(path));
        found.map(|(path, _)| format!("{} is there, and its topic was deleted", path.display()))
    }

    fn unread_by_consumers(&self) -> Option<(PartitionKey, u64)> {
        let broker = self.broker.as_ref()?;
        self.clients.iter().find_map(|client| {
            let Role::Consumer(consumer) = &client.role else { return None };
            let behind = |(key, at): &(PartitionKey, u64)| {
                broker.view(*key).is_ok_and(|view| *at < view.high_watermark())
            };
            consumer.positions().find(behind)
        })
    }

    fn describe(&mut self, group: &str) -> Option<GroupDescription> {
        match self.ask(Command::DescribeGroup { group: group.to_owned() }) {
            Some(Reply::Group(description)) => Some(description),
            _ => None,
        }
    }

    /// What share groups count; and what that covers.
    fn metrics(&mut self) -> String {
        let mut text = String::new();
        for group in self.share_groups() {
            let Some(description) = self.describe(&group) else { panic!("{group} cannot be seen") };
            for info in &description.partitions {
                self.coverage.meet_often("state", "Expired", info.expired);
                self.coverage.meet_often("state", "Skipped", info.skipped);
                // Writing to a string cannot fail.
                let _ = writeln!(
                    text,
                    "{group} {} {:?}: {} acked, {} dead-lettered, {} discarded, {} held, {} skipped, {} expired, {} deliveries, {} failures",
                    info.topic,
                    info.partition.map(|key| key.partition),
                    info.acked,
                    info.dead_lettered,
                    info.discarded,
                    info.held,
                    info.skipped,
                    info.expired,
                    info.deliveries,
                    info.failures
                );
            }
        }
        text
    }

    /// Whatever was said to be dead-lettered has its letter; or it is held, because it could not be read for it.
    fn check_letters(&mut self, groups: &BTreeSet<String>) {
        let mut held = BTreeMap::new();
        for group in groups {
            let description = self.describe(group).into_iter().flat_map(|description| description.partitions);
            held.extend(description.filter_map(|info| Some(((group.clone(), info.partition?), info.held))));
        }
        for (source, key) in self.leases.dead(groups, &self.history) {
            if self.history.has_letter(&source) {
                continue;
            }
            let held = held.entry((source.group.clone(), key)).or_default();
            assert!(*held > 0, "{source:?} ({key}) was given up and has no dead letter");
            *held -= 1;
            self.coverage.meet("recovery", "held without a letter");
        }
    }
}
