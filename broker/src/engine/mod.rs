//! The engine: Felucca's deterministic core. No I/O, no clock, no randomness of its own, no async.
//!
//! The shard drives it in turns, one turn for one journal frame: any number of [`Engine::step`], [`Engine::progress`] and
//! [`Engine::tick`], then [`Engine::finish`]; then the frame of what was staged is written, and the effects are released as
//! [`effect`] says. State runs ahead of the write within a turn; a failed write stops the shard, nothing is undone.
//!
//! Invariants: the state is a fold over the events ([`fold`]), live and on replay; events carry decided results, so replay
//! decides nothing; what is derived (queues, timers, what is visible) is rebuilt by [`Engine::boot`].
//!
//! The way of a command: [`topics`], [`append`], [`members`] (consumer groups), [`groups`] (share groups) decide; [`share`]
//! holds what is particular to share groups; [`checkpoint`] turns state into rows and back.

mod append;
mod catalog;
pub mod checkpoint;
pub mod command;
pub mod config;
mod consumer_group;
pub mod dead_letter;
pub mod effect;
pub mod error;
pub mod event;
mod fold;
mod groups;
mod members;
mod partition;
pub mod share;
mod stage;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod topics;
pub mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use catalog::Catalog;
use command::Command;
use config::EngineSettings;
use consumer_group::ConsumerGroup;
use effect::{Advance, Effects, PendingReply, Reply, SegmentName};
use error::EngineError;
use event::{Booted, EpochStarted, Event, MetaRow, Stopped, event::Kind};
use partition::Partition;
use prost::Message;
use share::ShareGroup;
use stage::{RowKey, Stage, TimerKey, Timers};
use types::{Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId};

/// What steps of every kind share, apart from the topics and groups themselves.
#[derive(Debug, Default)]
struct Desk {
    timers: Timers,
    dirty: BTreeSet<RowKey>,
    pump: BTreeSet<Arc<str>>,
    /// High watermark of every partition.
    high_watermarks: BTreeMap<PartitionKey, u64>,
    boot_epoch: u64,
    next_sequence: u64,
    /// Steps so far: the steps of a turn are given the same entropy, and must not draw the same from it.
    steps: u64,
    session_timeout_ms: u64,
    max_leases: u64,
    max_exceptions: u64,
}

impl Desk {
    fn stage<'a>(&'a mut self, now: Now, lsn: Lsn, out: &'a mut Effects) -> Stage<'a> {
        Stage {
            now,
            lsn,
            out,
            dirty: &mut self.dirty,
            timers: &mut self.timers,
            pump: &mut self.pump,
            high_watermarks: &self.high_watermarks,
            boot_epoch: self.boot_epoch,
            next_sequence: &mut self.next_sequence,
            session_timeout_ms: self.session_timeout_ms,
            max_leases: self.max_leases,
            max_exceptions: self.max_exceptions,
        }
    }
}

/// A partition as the log must open it after a start.
#[derive(Clone, Debug)]
pub struct PartitionInfo {
    pub partition: PartitionKey,
    pub topic: String,
    pub log_start: u64,
    /// Offset of the next record: everything below is in the journal or the segments.
    pub end: u64,
    /// Segments in order with their length in bytes; the last one is written to.
    pub segments: Vec<(SegmentName, u64)>,
}

/// Refusal of something that was stored: the journal or a checkpoint row does not make sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stored state does not make sense: {0}")]
pub struct CorruptState(pub String);

/// The state machine. See the module's documentation.
#[derive(Debug)]
pub struct Engine {
    settings: EngineSettings,
    catalog: Catalog,
    partitions: BTreeMap<PartitionKey, Partition>,
    groups: BTreeMap<Arc<str>, ShareGroup>,
    consumers: BTreeMap<Arc<str>, ConsumerGroup>,
    subscriptions: BTreeMap<SubscriptionId, Arc<str>>,
    meta: MetaRow,
    desk: Desk,
    /// High watermarks to come: (frame, partition, end), for each level in the order of frames.
    unwritten: VecDeque<(Lsn, PartitionKey, u64)>,
    unsynced: VecDeque<(Lsn, PartitionKey, u64)>,
    /// Ceilings that were raised and are not synced yet, in the order of frames.
    ceilings: VecDeque<(Lsn, PartitionKey, u64)>,
    /// Share partitions in which a key waits for a settlement to be synced.
    uncommitted: BTreeSet<(Arc<str>, PartitionKey)>,
}

impl Engine {
    /// An engine with no topics. Restore rows, replay frames, then [`Engine::boot`].
    pub fn new(settings: EngineSettings) -> Self {
        let millis = u64::try_from(settings.session_timeout.as_millis()).unwrap_or(u64::MAX / 2);
        let desk = Desk {
            session_timeout_ms: millis,
            max_leases: settings.max_leases,
            max_exceptions: settings.max_exceptions,
            ..Desk::default()
        };
        Self {
            settings,
            catalog: Catalog::default(),
            partitions: BTreeMap::new(),
            groups: BTreeMap::new(),
            consumers: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            meta: MetaRow::default(),
            desk,
            unwritten: VecDeque::new(),
            unsynced: VecDeque::new(),
            ceilings: VecDeque::new(),
            uncommitted: BTreeSet::new(),
        }
    }

    /// The boot epoch in force; 0 before the first boot.
    pub fn boot_epoch(&self) -> u64 {
        self.meta.boot_epoch
    }

    /// The highest monotonic time known: a new run's clock goes on from here.
    pub fn monotonic_ms(&self) -> u64 {
        self.meta.monotonic_ms
    }

    /// Every partition, for opening the log.
    pub fn partitions(&self) -> impl Iterator<Item = PartitionInfo> {
        self.partitions.values().map(|partition| {
            let topic = self.catalog.get(&partition.key.topic);
            PartitionInfo {
                partition: partition.key,
                topic: topic.map_or_else(String::new, |topic| topic.name.to_string()),
                log_start: partition.log_start,
                end: partition.end,
                segments: partition
                    .segments
                    .iter()
                    .map(|segment| (partition.segment_name(segment), segment.bytes))
                    .collect(),
            }
        })
    }

    /// Name of a topic, for the headers of a dead letter.
    pub fn topic_name(&self, topic: &types::TopicId) -> Option<&str> {
        self.catalog.get(topic).map(|topic| &*topic.name)
    }

    /// When [`Engine::tick`] is next due, in monotonic milliseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        self.desk.timers.first().map(|(at, _)| *at)
    }

    /// Encodes the events staged in `effects` as the journal keeps them.
    pub fn encode_frame(now: Now, effects: &mut Effects) -> Vec<u8> {
        let events = std::mem::take(&mut effects.events);
        event::Frame { monotonic_ms: now.monotonic_ms, wall_ms: now.wall_ms, events }.encode_to_vec()
    }

    /// Begins a run: a new boot epoch, everything recovered becomes visible, derived state is built. The frame must be synced
    /// before anything is served. `machine_boot` names the run of the operating system: when it changed without a clean
    /// stop, unsynced writes may be gone, and partitions that had shown unsynced offsets resume above all of them.
    pub fn boot(&mut self, now: Now, lsn: Lsn, machine_boot: &str, out: &mut Effects) {
        let power_lost = !self.meta.stopped && self.meta.machine_boot != machine_boot;
        let boot_epoch = self.meta.boot_epoch + 1;
        self.stage_event(Kind::Booted(Booted { boot_epoch, machine_boot: machine_boot.to_owned() }), out);
        if power_lost {
            let shown = self.partitions.values().filter(|partition| partition.ceiling > partition.end);
            let epochs: Vec<EpochStarted> = shown
                .map(|partition| EpochStarted {
                    topic_id: partition.key.topic.0.to_vec(),
                    partition: partition.key.partition,
                    epoch: partition.epoch + 1,
                    start_offset: partition.ceiling,
                })
                .collect();
            for epoch in epochs {
                self.stage_event(Kind::EpochStarted(epoch), out);
            }
        }
        self.desk.boot_epoch = boot_epoch;
        self.desk.next_sequence = 0;
        self.desk.timers.clear();
        for partition in self.partitions.values_mut() {
            partition.covered = partition.ceiling;
            self.desk.high_watermarks.insert(partition.key, partition.end);
            out.advances.push(Advance {
                partition: partition.key,
                high_watermark: partition.end,
                level: Level::Synced,
            });
        }
        let names: Vec<Arc<str>> = self.groups.keys().cloned().collect();
        for name in names {
            self.link_dead_letters(&name);
            self.check_ends(&name);
            if let Some(group) = self.groups.get_mut(&name) {
                let mut stage = self.desk.stage(now, lsn, out);
                group.rebuild();
                group.adopt_members(&mut stage);
                group.settle_in(&mut stage);
            }
        }
        let names: Vec<Arc<str>> = self.consumers.keys().cloned().collect();
        for name in names {
            self.check_ends(&name);
        }
        self.watch_consumers(now);
    }

    /// Looks whether a group of either kind knows of records that its partitions do not have; it is not served then.
    fn check_ends(&mut self, name: &str) {
        let partitions = &self.partitions;
        let end_of = |key: &PartitionKey| partitions.get(key).map_or(0, |partition| partition.end);
        if let Some(group) = self.groups.get_mut(name) {
            group.check_ends(end_of);
        }
        if let Some(group) = self.consumers.get_mut(name) {
            group.check_ends(end_of);
        }
    }

    /// Ends a run cleanly; nothing may be staged after it.
    pub fn stop(&mut self, out: &mut Effects) {
        self.stage_event(Kind::Stopped(Stopped {}), out);
    }

    /// Carries out one command, staging its events and effects. A command with a request id is answered exactly once.
    pub fn step(
        &mut self,
        now: Now,
        lsn: Lsn,
        request: Option<RequestId>,
        command: Command,
        out: &mut Effects,
    ) {
        self.desk.steps += 1;
        let already_ended = out.ended.len();
        let entropy = config::mix(now.entropy.wrapping_add(self.desk.steps));
        let (reply, level) = self.dispatch(Now { entropy, ..now }, lsn, command, out);
        self.forget_ended(out, already_ended);
        if let Some(request) = request {
            out.replies.push(PendingReply { request, level, reply });
        }
    }

    fn dispatch(&mut self, now: Now, lsn: Lsn, command: Command, out: &mut Effects) -> (Reply, Level) {
        let mut level = Level::Synced;
        let reply = match command {
            Command::CreateTopic { id, name, partitions, config } => {
                self.create_topic(id, &name, partitions, &config, out)
            }
            Command::AlterTopic { name, config } => self.alter_topic(&name, &config, out),
            Command::DeleteTopic { name } => self.delete_topic(&name, out),
            Command::Metadata { names } => Ok(self.metadata(names)),
            Command::InitProducer => Ok(self.init_producer(out)),
            Command::Append { level: asked, entries } => {
                let results;
                (results, level) = self.append(lsn, asked, entries, out);
                Ok(Reply::Appended(results))
            }
            Command::GroupHeartbeat { group, member, topics, owned, generation, leave } => {
                self.group_heartbeat(now, &group, &member, topics, &owned, generation, leave, out)
            }
            Command::CommitOffsets { group, member, generation, offsets } => {
                self.commit_offsets(now, &group, &member, generation, offsets, out)
            }
            Command::FetchOffsets { group, partitions } => self.fetch_offsets(&group, &partitions),
            Command::CreateShareGroup { group, topics, config, from_end } => {
                self.create_share_group(now, &group, &topics, &config, from_end, out)
            }
            Command::AlterShareGroup { group, config } => {
                self.alter_share_group(now, lsn, &group, &config, out)
            }
            Command::DeleteGroup { group } => self.delete_group(&group, out),
            Command::PauseGroup { group, paused } => self.pause_group(&group, paused, out),
            Command::KickGroup { group, topic } => self.kick_group(now, lsn, &group, topic.as_deref(), out),
            Command::SeekGroup { group, topic, positions } => {
                self.seek_group(now, lsn, &group, &topic, &positions, out)
            }
            Command::ListGroups => Ok(self.list_groups()),
            Command::DescribeGroup { group } => self.describe_group(now, &group),
            Command::ListDeadLetters { group } => Ok(self.list_dead_letters(group.as_deref())),
            Command::ShareSubscribe { subscription, group, member, credit_records, credit_bytes, held } => {
                let credit = (credit_records, credit_bytes);
                self.share_subscribe(now, lsn, subscription, &group, &member, credit, &held, out)
            }
            Command::ShareCredit { subscription, records, bytes } => {
                self.share_credit(subscription, records, bytes);
                Ok(Reply::Done)
            }
            Command::ShareUnsubscribe { subscription } => {
                self.share_unsubscribe(subscription);
                Ok(Reply::Done)
            }
            Command::MembersSeen { members } => {
                self.members_seen(now, lsn, &members, out);
                Ok(Reply::Done)
            }
            Command::Settle { group, member, level: asked, settlements } => {
                level = asked;
                self.settle(now, lsn, &group, &member, &settlements, out)
            }
            Command::Complete { group, member, record, outputs } => {
                self.complete(now, lsn, &group, &member, &record, outputs, out)
            }
            Command::Scanned { group, partition, from, next, records } => {
                let log_start = self.partitions.get(&partition).map_or(0, |partition| partition.log_start);
                if let Some(group) = self.groups.get_mut(group.as_str()) {
                    let mut stage = self.desk.stage(now, lsn, out);
                    group.scanned(&mut stage, partition, log_start, from, next, &records);
                }
                Ok(Reply::Done)
            }
            Command::ScanFailed { group, partition, from: _, reason: _ } => {
                if let Some(group) = self.groups.get_mut(group.as_str()) {
                    group.scan_failed(&mut self.desk.stage(now, lsn, out), partition);
                }
                Ok(Reply::Done)
            }
            Command::DeadLetterBuilt { group, partition, offset, letter } => {
                self.dead_letter_built(now, lsn, &group, partition, offset, letter, out);
                Ok(Reply::Done)
            }
        };
        (reply.unwrap_or_else(Reply::Error), level)
    }

    /// Frames up to `written` and `synced` have reached these levels: what they appended becomes visible, keys that they freed
    /// may go on.
    pub fn progress(&mut self, now: Now, lsn: Lsn, written: Lsn, synced: Lsn, out: &mut Effects) {
        for (queue, reached) in [(&mut self.unwritten, written), (&mut self.unsynced, synced)] {
            while let Some(&(at, key, end)) = queue.front()
                && at <= reached
            {
                queue.pop_front();
                if let Some(high_watermark) = self.desk.high_watermarks.get_mut(&key) {
                    *high_watermark = (*high_watermark).max(end);
                    if let Some(topic) = self.catalog.get(&key.topic) {
                        for name in &topic.share_groups {
                            if let Some(group) = self.groups.get_mut(name) {
                                group.advanced(key);
                                self.desk.pump.insert(name.clone());
                            }
                        }
                    }
                }
            }
        }
        while let Some(&(at, key, ceiling)) = self.ceilings.front()
            && at <= synced
        {
            self.ceilings.pop_front();
            if let Some(partition) = self.partitions.get_mut(&key) {
                partition.covered = ceiling;
            }
        }
        let waiting = std::mem::take(&mut self.uncommitted);
        for (name, key) in waiting {
            let Some(group) = self.groups.get_mut(&name) else { continue };
            if group.committed(&mut self.desk.stage(now, lsn, out), key, synced) {
                self.uncommitted.insert((name, key));
            }
        }
    }

    /// Fires what is due.
    pub fn tick(&mut self, now: Now, lsn: Lsn, out: &mut Effects) {
        while let Some((at, _)) = self.desk.timers.first()
            && *at <= now.monotonic_ms
            && let Some((at, timer)) = self.desk.timers.pop_first()
        {
            match timer {
                TimerKey::Share(name, key) => {
                    if let Some(group) = self.groups.get_mut(&name) {
                        group.partition_timer(&mut self.desk.stage(now, lsn, out), key, at);
                        self.uncommitted.insert((name, key));
                    }
                }
                TimerKey::Outage(name) => {
                    self.desk.pump.insert(name);
                }
                TimerKey::Session(name, member) => {
                    if let Some(group) = self.groups.get_mut(&name) {
                        let already_ended = out.ended.len();
                        group.session_timer(&mut self.desk.stage(now, lsn, out), &member);
                        self.forget_ended(out, already_ended);
                        self.watch_commits(&name);
                    }
                }
                TimerKey::ConsumerSession(name, member) => {
                    self.consumer_session_timer(now, &name, &member, out);
                }
            }
        }
    }

    /// Ends a turn: hands out to share members what became ready during it.
    pub fn finish(&mut self, now: Now, lsn: Lsn, out: &mut Effects) {
        // A checkpoint must know the time of the last frame that it stands for, also of one without commands.
        self.meta.monotonic_ms = now.monotonic_ms;
        while let Some(name) = self.desk.pump.pop_first() {
            if let Some(group) = self.groups.get_mut(&name) {
                group.pump(&mut self.desk.stage(now, lsn, out));
            }
        }
    }

    /// Forgets the subscriptions that the engine ended itself; their connections need not say so again.
    fn forget_ended(&mut self, out: &Effects, already: usize) {
        for (id, _) in &out.ended[already..] {
            self.subscriptions.remove(id);
        }
    }

    /// Applies an event and stages it.
    fn stage_event(&mut self, kind: Kind, out: &mut Effects) {
        // Events staged here come from decisions on the present state, which the fold accepts.
        let applied = self.apply(&kind, &mut std::iter::empty(), out);
        debug_assert!(applied.is_ok(), "{applied:?}");
        out.events.push(Event { kind: Some(kind) });
    }

    fn share_group(&mut self, name: &str) -> Result<&mut ShareGroup, EngineError> {
        if self.consumers.contains_key(name) && !self.groups.contains_key(name) {
            return Err(EngineError::WrongGroupKind { group: name.to_owned(), actual: "consumer" });
        }
        self.groups.get_mut(name).ok_or_else(|| EngineError::UnknownGroup(name.to_owned()))
    }

    /// A share group whose members may be served.
    fn served_group(&mut self, name: &str) -> Result<&mut ShareGroup, EngineError> {
        let group = self.share_group(name)?;
        match &group.corrupt {
            None => Ok(group),
            Some(reason) => Err(EngineError::GroupCorrupt { group: name.to_owned(), reason: reason.clone() }),
        }
    }

    /// Notes the partitions of a group in which keys may wait for a commit.
    fn watch_commits(&mut self, name: &Arc<str>) {
        if let Some(group) = self.groups.get(name) {
            let waiting =
                group.partitions().iter().filter(|(_, partition)| partition.queue.waits_for_commit());
            self.uncommitted.extend(waiting.map(|(key, _)| (name.clone(), *key)));
        }
    }
}
