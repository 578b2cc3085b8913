//! A stand-in for the shard, for tests of the engine: one command a turn, written and synced when told.

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchHeader};

use super::command::{
    AppendEntry, Command, FailureDetail, LeaseRef, LetterError, Outcome, ScannedRecord, SeekTo, Settlement,
    StagedBatch,
};
use super::config::EngineSettings;
use super::dead_letter::DeadLetterContext;
use super::effect::{
    Appended, Delivery, Effects, GroupDescription, GroupPartitionInfo, Reply, SettleResult, SettleStatus,
};
use super::error::EngineError;
use super::types::{LeaseId, Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId, TopicId};
use super::{Engine, share};

pub(crate) const TOPIC: TopicId = TopicId([1; 16]);
pub(crate) const P0: PartitionKey = PartitionKey { topic: TOPIC, partition: 0 };

/// Runs one command a turn; everything is written and synced at once unless `hold_sync` is set.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) engine: Engine,
    pub(crate) now: Now,
    pub(crate) lsn: Lsn,
    pub(crate) frames: Vec<(Vec<u8>, Vec<Bytes>)>,
    pub(crate) log: Vec<(PartitionKey, ScannedRecord)>,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) ended: Vec<(SubscriptionId, EngineError)>,
    /// What the dead letters that were asked for say.
    pub(crate) contexts: Vec<DeadLetterContext>,
    pub(crate) hold_sync: bool,
    /// Of the last answer.
    pub(crate) level: Level,
    /// Dead letters are made, but not yet handed in.
    pub(crate) hold_letters: bool,
    /// Dead letters cannot be made.
    pub(crate) unreadable: Option<LetterError>,
    /// The log cannot be scanned.
    pub(crate) unscannable: Option<String>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(EngineSettings::default())
    }

    pub(crate) fn with(settings: EngineSettings) -> Self {
        let mut bench = Self {
            engine: Engine::new(settings),
            now: Now { monotonic_ms: 1_000, wall_ms: 1_700_000_000_000, entropy: 7 },
            lsn: 1,
            frames: Vec::new(),
            log: Vec::new(),
            deliveries: Vec::new(),
            ended: Vec::new(),
            contexts: Vec::new(),
            hold_sync: false,
            level: Level::Synced,
            hold_letters: false,
            unreadable: None,
            unscannable: None,
        };
        bench.boot_as("machine");
        bench
    }

    pub(crate) fn boot_as(&mut self, machine: &str) {
        let mut out = Effects::default();
        self.engine.boot(self.now, self.lsn, machine, &mut out);
        self.end_turn(out);
    }

    /// A killed process: everything written is there, everything else is gone.
    pub(crate) fn reopen(&mut self) {
        self.reopen_as("machine");
    }

    /// The same on another run of the machine, when that has another name.
    pub(crate) fn reopen_as(&mut self, machine: &str) {
        self.engine = Engine::new(EngineSettings::default());
        for (events, batches) in self.frames.clone() {
            self.engine.replay(&events, batches, &mut Effects::default()).unwrap();
        }
        self.deliveries.clear();
        self.boot_as(machine);
    }

    pub(crate) fn ask(&mut self, command: Command) -> Reply {
        let mut out = Effects::default();
        self.engine.step(self.now, self.lsn, Some(RequestId(1)), command, &mut out);
        self.end_turn(out).expect("every request is answered")
    }

    pub(crate) fn tell(&mut self, command: Command) {
        let mut out = Effects::default();
        self.engine.step(self.now, self.lsn, None, command, &mut out);
        self.end_turn(out);
    }

    pub(crate) fn advance(&mut self, ms: u64) {
        self.now.monotonic_ms += ms;
        self.now.wall_ms += ms.cast_signed();
        self.now.entropy = self.now.entropy.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut out = Effects::default();
        self.engine.tick(self.now, self.lsn, &mut out);
        self.end_turn(out);
    }

    pub(crate) fn end_turn(&mut self, mut out: Effects) -> Option<Reply> {
        self.engine.finish(self.now, self.lsn, &mut out);
        let reply = out.replies.pop().map(|pending| {
            self.level = pending.level;
            pending.reply
        });
        self.write(&mut out);
        for write in &out.segment_writes {
            for record in &batch::scan(&write.bytes).unwrap() {
                let record = record.unwrap();
                let found = ScannedRecord {
                    offset: record.offset,
                    slot: record.key.map(share::key_slot),
                    size: record.size,
                };
                self.log.push((write.segment.partition, found));
            }
        }
        self.deliveries.append(&mut out.deliveries);
        self.ended.append(&mut out.ended);
        self.contexts.extend(out.dead_letter_reads.iter().map(|read| read.context.clone()));
        let mut follow_up = Effects::default();
        let synced = if self.hold_sync { 0 } else { self.lsn - 1 };
        self.engine.progress(self.now, self.lsn, self.lsn - 1, synced, &mut follow_up);
        for scan in out.scans {
            let in_range = |(key, record): &&(PartitionKey, ScannedRecord)| {
                *key == scan.partition && (scan.from..scan.until).contains(&record.offset)
            };
            let records = self.log.iter().filter(in_range).map(|(_, record)| *record).collect();
            let (group, partition, from) = (scan.group, scan.partition, scan.from);
            let scanned = match self.unscannable.clone() {
                Some(reason) => Command::ScanFailed { group, partition, from, reason },
                None => Command::Scanned { group, partition, from, next: scan.until, records },
            };
            self.engine.step(self.now, self.lsn, None, scanned, &mut follow_up);
        }
        if !self.hold_letters {
            for read in out.dead_letter_reads {
                let letter = if let Some(error) = self.unreadable.clone() {
                    Err(error)
                } else {
                    Ok(staged(Some(b"k"), 1))
                };
                let (group, partition, offset) = (read.group, read.partition, read.offset);
                let built = Command::DeadLetterBuilt { group, partition, offset, letter };
                self.engine.step(self.now, self.lsn, None, built, &mut follow_up);
            }
        }
        self.engine.finish(self.now, self.lsn, &mut follow_up);
        let idle = follow_up.events.is_empty() && follow_up.scans.is_empty();
        if !idle {
            self.end_turn(follow_up);
        }
        reply
    }

    pub(crate) fn write(&mut self, out: &mut Effects) {
        if !out.events.is_empty() {
            let events = Engine::encode_frame(self.now, out);
            self.frames.push((events, std::mem::take(&mut out.batches)));
            self.lsn += 1;
        }
    }

    // ---- Shorthand ----

    pub(crate) fn topic(&mut self, config: &[(&str, &str)]) {
        let config = pairs(config);
        let reply =
            self.ask(Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions: 2, config });
        assert!(matches!(reply, Reply::Topic(_)), "{reply:?}");
    }

    pub(crate) fn group(&mut self, config: &[(&str, &str)]) {
        let reply = self.ask(Command::CreateShareGroup {
            group: "pay".to_owned(),
            topics: vec!["orders".to_owned()],
            config: pairs(config),
            from_end: false,
        });
        assert_eq!(reply, Reply::Done);
    }

    pub(crate) fn append(&mut self, key: Option<&[u8]>, count: usize) -> Result<Appended, EngineError> {
        let entry = AppendEntry { partition: P0, batch: staged(key, count) };
        self.append_entry(entry, Level::Synced)
    }

    pub(crate) fn append_entry(&mut self, entry: AppendEntry, level: Level) -> Result<Appended, EngineError> {
        match self.ask(Command::Append { level, entries: vec![entry] }) {
            Reply::Appended(mut results) => results.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn subscribe(&mut self, id: u64, member: &str, credit: u32) {
        self.subscribe_holding(id, member, credit, Vec::new());
    }

    pub(crate) fn subscribe_holding(&mut self, id: u64, member: &str, credit: u32, held: Vec<LeaseRef>) {
        let reply = self.ask(Command::ShareSubscribe {
            subscription: SubscriptionId(id),
            group: "pay".to_owned(),
            member: member.to_owned(),
            credit_records: credit,
            credit_bytes: 1 << 20,
            held,
        });
        assert_eq!(reply, Reply::Done);
    }

    /// Takes what was delivered since the last call, as (lease, deliveries, failures).
    pub(crate) fn delivered(&mut self) -> Vec<(LeaseRef, u32, u32)> {
        let mut all = Vec::new();
        for delivery in self.deliveries.drain(..) {
            for (i, record) in delivery.records.iter().enumerate() {
                let lease = LeaseId {
                    boot_epoch: delivery.first_lease.boot_epoch,
                    sequence: delivery.first_lease.sequence + i as u64,
                };
                let record_ref = LeaseRef { partition: delivery.partition, offset: record.offset, lease };
                all.push((record_ref, record.deliveries, record.failures));
            }
        }
        all
    }

    pub(crate) fn offsets(&mut self) -> Vec<u64> {
        self.delivered().iter().map(|(lease, _, _)| lease.offset).collect()
    }

    pub(crate) fn take_one(&mut self) -> LeaseRef {
        let delivered = self.delivered();
        assert_eq!(delivered.len(), 1, "{delivered:?}");
        delivered[0].0
    }

    pub(crate) fn settle(&mut self, member: &str, record: LeaseRef, outcome: Outcome) -> SettleResult {
        self.settle_all(member, &[record], &outcome)[0]
    }

    /// In one request.
    pub(crate) fn settle_all(
        &mut self,
        member: &str,
        records: &[LeaseRef],
        outcome: &Outcome,
    ) -> Vec<SettleResult> {
        let settlement = |record: &LeaseRef| Settlement { record: *record, outcome: outcome.clone() };
        let settlements = records.iter().map(settlement).collect();
        let (group, member) = ("pay".to_owned(), member.to_owned());
        match self.ask(Command::Settle { group, member, level: Level::Synced, settlements }) {
            Reply::Settled(results) => results,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn status(&mut self, member: &str, record: LeaseRef, outcome: Outcome) -> SettleStatus {
        self.settle(member, record, outcome).status
    }

    pub(crate) fn describe(&mut self) -> GroupDescription {
        match self.ask(Command::DescribeGroup { group: "pay".to_owned() }) {
            Reply::Group(description) => description,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn counts(&mut self) -> GroupPartitionInfo {
        self.describe().partitions.into_iter().find(|info| info.partition == Some(P0)).unwrap()
    }

    pub(crate) fn alter(&mut self, config: &[(&str, &str)]) {
        let altered = Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(config) };
        assert_eq!(self.ask(altered), Reply::Done);
    }

    pub(crate) fn seek(&mut self, to: SeekTo) {
        let (group, topic) = ("pay".to_owned(), "orders".to_owned());
        assert_eq!(
            self.ask(Command::SeekGroup { group, topic, positions: vec![(0, to)], force: true }),
            Reply::Done
        );
    }

    pub(crate) fn credit(&mut self, id: u64, records: u32) {
        self.tell(Command::ShareCredit { subscription: SubscriptionId(id), records, bytes: 0 });
    }
}

pub(crate) fn pairs(entries: &[(&str, &str)]) -> Vec<(String, String)> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn staged(key: Option<&[u8]>, count: usize) -> StagedBatch {
    finish(BatchBuilder::new(), key, count)
}

pub(crate) fn finish(mut builder: BatchBuilder, key: Option<&[u8]>, count: usize) -> StagedBatch {
    for _ in 0..count {
        builder.push(1_700_000_000_000, key, Some(b"value"), &[]).unwrap();
    }
    let bytes = builder.finish();
    StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes }
}

pub(crate) fn nack() -> Outcome {
    Outcome::Nack { delay_ms: Some(100), counted: true, detail: FailureDetail::default() }
}

pub(crate) fn reject() -> Outcome {
    Outcome::Reject { detail: FailureDetail { class: "bad".to_owned(), ..FailureDetail::default() } }
}

pub(crate) const EXTEND: Outcome = Outcome::Extend { remaining_ms: None };

/// A group with one record leased by member `a`.
pub(crate) fn leased(config: &[(&str, &str)]) -> (Bench, LeaseRef) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(config);
    bench.append(None, 1).unwrap();
    bench.subscribe(1, "a", 1);
    let lease = bench.take_one();
    (bench, lease)
}
