//! The engine: Felucca's deterministic core. No I/O, no clock, no randomness of its own, no async.
//!
//! The shard drives it in turns, one turn for one journal frame: any number of [`Engine::step`], [`Engine::progress`] and
//! [`Engine::tick`], then [`Engine::finish`]; then the frame of what was staged is written, and the effects are released as
//! [`effect`] says. State runs ahead of the write within a turn; a failed write stops the shard, nothing is undone.
//!
//! Invariants: the state is a fold over the events ([`fold`]), live and on replay; events carry decided results, so replay
//! decides nothing; what is derived (queues, timers, what is visible) is rebuilt by [`Engine::boot`].
//!
//! The way of a command: [`topics`], [`append`], [`retention`], [`members`] (consumer groups), [`groups`] (share groups), [`redrive`] decide; [`share`]
//! holds what is particular to share groups; [`checkpoint`] turns state into rows and back.

mod append;
mod catalog;
pub mod checkpoint;
pub mod cleaning;
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
pub mod redrive;
mod retention;
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
use error::{EngineError, NoRoom};
use event::{Booted, EpochStarted, Event, MetaRow, RedriveRow, Stopped, event::Kind};
use partition::Partition;
use prost::Message;
use share::ShareGroup;
use share::acks::OpenAcks;
use share::budget::Budget;
use stage::{RowKey, Stage, TimerKey, Timers};
use types::{Level, Lsn, Now, PartitionKey, RESUME_STEP, RequestId, SubscriptionId, TopicId};

use crate::plants::planted;

/// Offsets that a partition passes over when an unknown number of its records was lost.
const PASSED_OVER: u64 = 256 << 20;

/// Leases that end and records that are due in one turn: about so many changes fit well into one frame.
const DUE_PER_TURN: usize = 16_384;

/// What steps of every kind share, apart from the topics and groups themselves.
#[derive(Debug)]
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
    max_span: u64,
    /// Memory of share groups.
    budget: Budget,
    /// Share groups that could go on if the budget were not spent.
    starved: BTreeSet<Arc<str>>,
    /// Share partitions in which a key waits for a settlement to be synced.
    uncommitted: BTreeSet<(Arc<str>, PartitionKey)>,
    acks: OpenAcks,
}

impl Desk {
    fn new(settings: &EngineSettings) -> Self {
        Self {
            timers: Timers::new(),
            dirty: BTreeSet::new(),
            pump: BTreeSet::new(),
            high_watermarks: BTreeMap::new(),
            boot_epoch: 0,
            next_sequence: 0,
            steps: 0,
            session_timeout_ms: u64::try_from(settings.session_timeout.as_millis()).unwrap_or(u64::MAX / 2),
            max_leases: settings.max_leases,
            max_exceptions: settings.max_exceptions,
            max_span: settings.max_span,
            budget: Budget::new(settings.share_state_bytes, settings.max_parked_per_slot),
            starved: BTreeSet::new(),
            uncommitted: BTreeSet::new(),
            acks: OpenAcks::default(),
        }
    }

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
            max_span: self.max_span,
            starved: &mut self.starved,
            uncommitted: &mut self.uncommitted,
            acks: &mut self.acks,
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
    redrives: BTreeMap<Arc<str>, RedriveRow>,
    subscriptions: BTreeMap<SubscriptionId, Arc<str>>,
    /// Share groups with subscriptions, by topic: the others need not be told of new records.
    awake: BTreeMap<TopicId, BTreeSet<Arc<str>>>,
    meta: MetaRow,
    desk: Desk,
    /// Wall time of the frame that is staged or replayed.
    wall_ms: i64,
    /// The last partition that a look at retention, which is taken in pieces, has come to.
    retention_cursor: Option<PartitionKey>,
    /// Partitions that the last look at retention found in need of cleaning, and how much they are.
    cleanable: BTreeMap<PartitionKey, f64>,
    /// High watermarks to come: (frame, partition, end), for each level in the order of frames.
    unwritten: VecDeque<(Lsn, PartitionKey, u64)>,
    unsynced: VecDeque<(Lsn, PartitionKey, u64)>,
    /// Ceilings that were raised and are not synced yet, in the order of frames.
    ceilings: VecDeque<(Lsn, PartitionKey, u64)>,
    /// Why producers are refused for now; no state, for the disk of the next run is another.
    no_room: Option<NoRoom>,
    /// See [`Engine::note_lost_records`].
    records_lost: bool,
}

impl Engine {
    /// An engine with no topics. Restore rows, replay frames, then [`Engine::boot`].
    pub fn new(settings: EngineSettings) -> Self {
        let desk = Desk::new(&settings);
        Self {
            settings,
            catalog: Catalog::default(),
            partitions: BTreeMap::new(),
            groups: BTreeMap::new(),
            consumers: BTreeMap::new(),
            redrives: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            awake: BTreeMap::new(),
            meta: MetaRow::default(),
            desk,
            wall_ms: 0,
            retention_cursor: None,
            cleanable: BTreeMap::new(),
            unwritten: VecDeque::new(),
            unsynced: VecDeque::new(),
            ceilings: VecDeque::new(),
            no_room: None,
            records_lost: false,
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
    pub fn topic_name(&self, topic: &TopicId) -> Option<&str> {
        self.catalog.get(topic).map(|topic| &*topic.name)
    }

    /// Groups of both kinds that are not served, and why.
    pub fn corrupt_groups(&self) -> impl Iterator<Item = (&str, &str)> {
        let shares = self.groups.iter().map(|(name, group)| (name, &group.corrupt));
        let consumers = self.consumers.iter().map(|(name, group)| (name, &group.corrupt));
        shares.chain(consumers).filter_map(|(name, corrupt)| Some((&**name, corrupt.as_deref()?)))
    }

    /// From now on new records are refused for this reason, or taken again.
    pub fn set_room(&mut self, no_room: Option<NoRoom>) {
        self.no_room = no_room;
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

    /// A repair has given up frames that had been synced: partitions are to resume above the offsets that were in them.
    pub fn note_lost_records(&mut self) {
        self.records_lost = true;
    }

    /// Begins a run: a new boot epoch, everything recovered becomes visible, derived state is built. The frame must be synced
    /// before anything is served. `machine_boot` names the run of the operating system: when it changed without a clean
    /// stop, unsynced writes may be gone, and partitions that had shown unsynced offsets resume above all of them.
    pub fn boot(&mut self, now: Now, lsn: Lsn, machine_boot: &str, out: &mut Effects) {
        self.wall_ms = now.wall_ms;
        let power_lost =
            !self.meta.stopped && self.meta.machine_boot != machine_boot && !planted("mint-offsets-twice");
        let boot_epoch = if planted("forget-boot-epoch") { 1 } else { self.meta.boot_epoch + 1 };
        self.stage_event(Kind::Booted(Booted { boot_epoch, machine_boot: machine_boot.to_owned() }), out);
        let records_lost = std::mem::take(&mut self.records_lost);
        let start_of = |partition: &Partition| {
            let ceiling = if power_lost { partition.ceiling } else { 0 };
            let above =
                if records_lost { (partition.end + PASSED_OVER).next_multiple_of(RESUME_STEP) } else { 0 };
            Some(ceiling.max(above)).filter(|start| *start > partition.end)
        };
        let epochs = self.partitions.values().filter_map(|partition| {
            Some(EpochStarted {
                topic_id: partition.key.topic.0.to_vec(),
                partition: partition.key.partition,
                epoch: partition.epoch + 1,
                start_offset: start_of(partition)?,
            })
        });
        for epoch in epochs.collect::<Vec<_>>() {
            self.stage_event(Kind::EpochStarted(epoch), out);
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
        self.look_at_retention_in(now, None);
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
        self.wall_ms = now.wall_ms;
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
            Command::DeleteRecords { topic, partition, before } => {
                self.delete_records(now, lsn, &topic, partition, before, out)
            }
            Command::NextCleaning => Ok(self.next_cleaning(now, out)),
            Command::ReplaceSegments(replacement) => self.replace_segments(now, lsn, &replacement, out),
            Command::EndCleaning { partition, cleaned_until, tombstones_due_ms, more } => {
                self.end_cleaning(partition, cleaned_until, tombstones_due_ms, more, out)
            }
            Command::Metadata { names } => Ok(self.metadata(names)),
            Command::InitProducer => Ok(self.init_producer(out)),
            Command::Append { level: asked, entries } => {
                let results;
                (results, level) = self.append(lsn, asked, entries, out);
                Ok(Reply::Appended(results))
            }
            Command::GroupHeartbeat { group, member, connection, topics, owned, generation, leave } => {
                self.meet_member(&group, &member, connection).and_then(|()| {
                    self.group_heartbeat(
                        now, &group, &member, connection, topics, &owned, generation, leave, out,
                    )
                })
            }
            Command::CommitOffsets { group, member, connection, generation, offsets } => self
                .meet_member(&group, &member, connection)
                .and_then(|()| self.commit_offsets(now, &group, &member, generation, offsets, out)),
            Command::FetchOffsets { group, partitions } => self.fetch_offsets(&group, &partitions),
            Command::CreateShareGroup { group, topics, config, from_end } => {
                self.create_share_group(now, &group, &topics, &config, from_end, out)
            }
            Command::AlterShareGroup { group, config } => {
                self.alter_share_group(now, lsn, &group, &config, out)
            }
            Command::DeleteGroup { group, force } => self.delete_group(&group, force, out),
            Command::PauseGroup { group, paused } => self.pause_group(&group, paused, out),
            Command::KickGroup { group, topic } => self.kick_group(now, lsn, &group, topic.as_deref(), out),
            Command::EndHeld { group, topic, fate } => {
                self.end_held(now, lsn, &group, topic.as_deref(), fate, out)
            }
            Command::SeekGroup { group, topic, positions, force } => {
                self.seek_group(now, lsn, &group, &topic, &positions, force, out)
            }
            Command::ListGroups => Ok(self.list_groups()),
            Command::DescribeGroup { group } => self.describe_group(now, &group),
            Command::ListDeadLetters { group } => Ok(self.list_dead_letters(group.as_deref())),
            Command::StartRedrive { id, spec } => self.start_redrive(now, &id, *spec, out),
            Command::PlanRedrive { spec } => {
                self.plan_redrive(now, "", *spec).map(|row| Reply::Redrive(Box::new(row)))
            }
            Command::AlterRedrive { id, action } => self.alter_redrive(now, &id, action, out),
            Command::ListRedrives { group } => Ok(self.list_redrives(group.as_deref())),
            Command::MoveLetters { id, found } => self.move_letters(now, lsn, &id, *found, out),
            Command::FailRedrive { id, failure } => self.fail_redrive(now, &id, failure, out),
            Command::PendingLetters { group, source_topic, partition, offsets } => {
                self.pending_letters(&group, &source_topic, partition, offsets)
            }
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
                if let Some(group) = self.groups.get_mut(group.as_str()) {
                    let mut stage = self.desk.stage(now, lsn, out);
                    group.scanned(&mut stage, partition, from, next, &records);
                }
                Ok(Reply::Done)
            }
            Command::ScanFailed { group, partition, from, reason } => {
                if let Some(group) = self.groups.get_mut(group.as_str()) {
                    group.scan_failed(&mut self.desk.stage(now, lsn, out), partition, from, reason);
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
                    for name in self.awake.get(&key.topic).into_iter().flatten() {
                        if let Some(group) = self.groups.get_mut(name) {
                            group.advanced(key);
                            self.desk.pump.insert(name.clone());
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
        let synced = if planted("free-key-early") { written } else { synced };
        for (name, key) in std::mem::take(&mut self.desk.uncommitted) {
            if let Some(group) = self.groups.get_mut(&name) {
                group.committed(&mut self.desk.stage(now, lsn, out), key, synced);
            }
        }
    }

    /// Fires what is due.
    pub fn tick(&mut self, now: Now, lsn: Lsn, out: &mut Effects) {
        self.wall_ms = now.wall_ms;
        let mut due = Vec::new();
        while self.desk.timers.first().is_some_and(|(at, _)| *at <= now.monotonic_ms) {
            due.extend(self.desk.timers.pop_first());
        }
        let mut due = due.into_iter();
        let mut records = 0;
        // What has more to do sets its timer anew, for the next turn.
        while records < DUE_PER_TURN
            && let Some((at, timer)) = due.next()
        {
            match timer {
                TimerKey::Share(name, key) => {
                    if let Some(group) = self.groups.get_mut(&name) {
                        records += group.partition_timer(&mut self.desk.stage(now, lsn, out), key, at);
                    }
                }
                TimerKey::Outage(name) => {
                    self.desk.pump.insert(name);
                }
                TimerKey::Forget(name) => {
                    if let Some(group) = self.groups.get_mut(&name) {
                        group.forget(&mut self.desk.stage(now, lsn, out));
                    }
                }
                TimerKey::Session(name, member) => {
                    if let Some(group) = self.groups.get_mut(&name) {
                        let already_ended = out.ended.len();
                        records += group.session_timer(&mut self.desk.stage(now, lsn, out), &member);
                        self.forget_ended(out, already_ended);
                        self.note_awake(&name);
                    }
                }
                TimerKey::Retention => self.look_at_retention(now, lsn, out),
                TimerKey::ConsumerSession(name, member) => {
                    self.consumer_session_timer(now, &name, &member, out);
                }
            }
        }
        self.desk.timers.extend(due);
    }

    /// Ends a turn: hands out to share members what became ready during it.
    pub fn finish(&mut self, now: Now, lsn: Lsn, out: &mut Effects) {
        // A checkpoint must know the time of the last frame that it stands for, also of one without commands.
        self.meta.monotonic_ms = now.monotonic_ms;
        if !self.desk.starved.is_empty() && !self.desk.budget.is_spent() {
            for name in std::mem::take(&mut self.desk.starved) {
                if let Some(group) = self.groups.get_mut(&name) {
                    group.look_again();
                    self.desk.pump.insert(name);
                }
            }
        }
        while let Some(name) = self.desk.pump.pop_first() {
            if let Some(group) = self.groups.get_mut(&name) {
                group.pump(&mut self.desk.stage(now, lsn, out));
            }
        }
    }

    /// Subscriptions of a share group came or went, or its topics changed.
    fn note_awake(&mut self, name: &str) {
        let Some(group) = self.groups.get_mut(name) else {
            self.awake.values_mut().for_each(|awake| {
                awake.remove(name);
            });
            return;
        };
        let is_awake = group.subscriptions().next().is_some();
        let mut woke = false;
        for topic in &group.topics {
            let awake = self.awake.entry(*topic).or_default();
            if is_awake {
                woke |= awake.insert(group.name.clone());
            } else {
                awake.remove(name);
            }
            if awake.is_empty() {
                self.awake.remove(topic);
            }
        }
        if woke {
            group.look_again();
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
}
