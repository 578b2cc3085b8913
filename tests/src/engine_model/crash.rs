//! Crashes, and opening again: from the journal alone, and from a checkpoint with the rest of the journal.

use felucca_broker::engine::Engine;
use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::{Effects, Reply, ViewChange};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::event::{MetaRow, PartitionRow, ShareRow};
use felucca_broker::engine::types::{RequestId, SubscriptionId};
use prost::Message;
use roaring::RoaringTreemap;

use super::store::{Logs, Rows, put_rows};
use super::world::World;

/// Tags of checkpoint rows, and states in them, as docs and `journal.proto` number them.
const META_ROW: u8 = 0;
const PARTITION_ROW: u8 = 2;
const SHARE_ROW: u8 = 5;
const AVAILABLE: u32 = 1;
const SCHEDULED: u32 = 2;

impl World {
    /// The process is killed (everything written stays) or the power goes (some of what was not synced stays).
    /// After a stop (`stopped`) nothing may be missing.
    pub(crate) fn crash(&mut self, power: bool, stopped: bool) {
        let written = self.written();
        let survived = if power { self.rng.between(self.synced, written) } else { written };
        self.note(|| format!("CRASH power={power}: frames up to {survived} of {written} survive"));
        if power {
            self.machine += 1;
        }
        let facts = self.promises.crash(survived);
        self.checkpoints.retain(|(lsn, _)| *lsn <= self.synced);
        self.journal.truncate(survived as usize);
        self.snapshots.split_off(&(survived + 1));
        self.model = self.snapshots[&survived].clone();
        let sessions: Vec<_> = std::mem::take(&mut self.live.subscriptions).into_values().collect();
        self.note(|| format!("{} subscriptions gone", sessions.len()));

        let (mut full, full_rows) = self.replay_all();
        let choice = self.rng.below(self.checkpoints.len() as u64 + 1) as usize;
        let forgotten = match self.checkpoints.get(choice).cloned() {
            None => {
                self.rows = full_rows;
                std::mem::swap(&mut self.engine, &mut full);
                0
            }
            Some((lsn, rows)) => {
                self.note(|| format!("from the checkpoint at {lsn}"));
                let (engine, rows) = self.replay_from(lsn, rows);
                let monotonic_ms = engine.monotonic_ms();
                assert!(monotonic_ms >= full.monotonic_ms());
                assert_same_rows(&full_rows, &rows, monotonic_ms);
                (self.engine, self.rows) = (engine, rows);
                lsn
            }
        };
        for fact in facts {
            self.check_fact(&fact);
        }
        if self.rng.chance(20) {
            self.open_damaged(self.machine - u64::from(power));
        }
        self.synced = survived;
        let pause = if self.rng.chance(50) { 0 } else { self.rng.below(500) };
        self.now.monotonic_ms = self.engine.monotonic_ms() + pause;
        self.now.wall_ms += self.rng.below(100_000).cast_signed() - 20_000;
        self.now.entropy = self.rng.bits();
        self.boot(forgotten, power && !stopped);
        self.compare_groups();
    }

    /// Opens the journal without a checkpoint; its batches must be the log that the model has.
    fn replay_all(&mut self) -> (Engine, Rows) {
        let mut engine = Engine::new(self.settings.clone());
        self.logs = Logs::default();
        for (events, batches) in &self.journal {
            let mut out = Effects::default();
            engine.replay(events, batches.clone(), &mut out).expect("a frame that was written is good");
            for write in &out.segment_writes {
                self.logs.write(write);
            }
            for change in &out.view_changes {
                if let ViewChange::SegmentsRemoved { segments } = change {
                    for segment in segments {
                        self.logs.remove(*segment);
                    }
                }
            }
        }
        for (key, log) in &self.model.logs {
            let found = self.logs.records.get(key);
            let found = found.into_iter().flatten().map(|(offset, (entry, _))| (*offset, *entry));
            assert!(found.eq(log.entries.iter().map(|(o, e)| (*o, *e))), "log of {key} after the crash");
        }
        let mut rows = Rows::new();
        put_rows(&mut rows, engine.take_dirty_rows());
        (engine, rows)
    }

    fn replay_from(&self, lsn: u64, mut rows: Rows) -> (Engine, Rows) {
        let mut engine = Engine::new(self.settings.clone());
        for (key, value) in &rows {
            engine.restore_row(key, value).expect("a row that was written is good");
        }
        for (events, batches) in &self.journal[lsn as usize..] {
            let replayed = engine.replay(events, batches.clone(), &mut Effects::default());
            replayed.expect("a frame that was written is good");
        }
        put_rows(&mut rows, engine.take_dirty_rows());
        (engine, rows)
    }

    /// Opens rows in which a partition ends too early: groups that know more of it must not be served, others must.
    fn open_damaged(&self, machine: u64) {
        let Some((key, log)) = self.model.logs.iter().find(|(_, log)| log.end > 0) else { return };
        let mut engine = Engine::new(self.settings.clone());
        for (name, value) in &self.rows {
            let mut value = value.clone();
            if name.first() == Some(&PARTITION_ROW) {
                let mut row = PartitionRow::decode(value.as_slice()).expect("a partition row");
                if (row.topic_id.as_slice(), row.partition) == (&key.topic.0[..], key.partition) {
                    row.end = 0;
                    value = row.encode_to_vec();
                }
            }
            engine.restore_row(name, &value).expect("rows that can be read");
        }
        let mut out = Effects::default();
        // The same run of the machine: nothing is taken for lost with the power.
        engine.boot(self.now, self.lsn(), &format!("machine {machine}"), &mut out);
        self.note(|| format!("opened with {key} cut from {} to 0", log.end));
        let mut ask = |command: Command| {
            engine.step(self.now, self.lsn(), Some(RequestId(1)), command, &mut out);
            out.replies.pop().expect("an answer").reply
        };
        for (group, share) in &self.model.shares {
            let knows = share.parts.get(key).is_some_and(|part| part.start > 0 || !part.records.is_empty());
            let subscribe = Command::ShareSubscribe {
                subscription: SubscriptionId(1),
                group: group.clone(),
                member: "ann".to_owned(),
                credit_records: 1,
                credit_bytes: 1,
                held: Vec::new(),
            };
            let reply = ask(subscribe);
            let refused = matches!(reply, Reply::Error(EngineError::GroupCorrupt { .. }));
            assert!(refused || !knows, "{group} is served without its records: {reply:?}");
            assert!(!refused || share.parts.contains_key(key), "{group} has nothing there: {reply:?}");
        }
        for (group, consumer) in &self.model.consumers {
            let knows = consumer.offsets.get(key).is_some_and(|(offset, _)| *offset > 0);
            let reply = ask(Command::FetchOffsets { group: group.clone(), partitions: Vec::new() });
            let refused = matches!(reply, Reply::Error(EngineError::GroupCorrupt { .. }));
            assert_eq!(refused, knows, "{group}: {reply:?}");
        }
    }

    pub(crate) fn checkpoint(&mut self) {
        let changed = self.engine.take_dirty_rows();
        put_rows(&mut self.rows, changed);
        let lsn = self.written();
        self.note(|| format!("checkpoint at {lsn}"));
        self.checkpoints.push((lsn, self.rows.clone()));
        if self.checkpoints.len() > 3 {
            self.checkpoints.remove(0);
        }
    }
}

/// Full replay and a checkpoint with the rest must agree. A record whose time has come may be noted as due or not yet.
pub(crate) fn assert_same_rows(full: &Rows, short: &Rows, monotonic_ms: u64) {
    assert!(full.keys().eq(short.keys()), "rows are missing or too many");
    for (key, value) in full {
        let other = &short[key];
        match key.first() {
            Some(&META_ROW) => {
                let meta = |value: &[u8]| {
                    let row = MetaRow::decode(value).expect("a meta row");
                    MetaRow { monotonic_ms: 0, ..row }
                };
                assert_eq!(meta(value), meta(other));
            }
            Some(&SHARE_ROW) => {
                let (left, left_settled) = share(value, monotonic_ms);
                let (right, right_settled) = share(other, monotonic_ms);
                assert_eq!(left, right);
                assert_eq!(left_settled, right_settled, "settled offsets of {left:?}");
            }
            _ => assert_eq!(value, other, "row {key:?}"),
        }
    }
}

fn share(value: &[u8], monotonic_ms: u64) -> (ShareRow, RoaringTreemap) {
    let mut row = ShareRow::decode(value).expect("a share row");
    let settled = RoaringTreemap::deserialize_from(row.settled.as_slice()).expect("a bitmap");
    row.settled.clear();
    for exception in &mut row.exceptions {
        if exception.state == SCHEDULED && exception.due_ms <= monotonic_ms {
            exception.state = AVAILABLE;
        }
        exception.due_ms = if exception.state == SCHEDULED { exception.due_ms } else { 0 };
    }
    (row, settled)
}
