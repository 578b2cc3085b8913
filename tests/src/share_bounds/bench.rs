//! A stand-in for the shard that costs next to nothing: frames are encoded and dropped, every write is on the device by the
//! next turn, and records exist only as what a scan would say of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use felucca_broker::engine::Engine;
use felucca_broker::engine::command::{
    AppendEntry, Command, LeaseRef, Outcome, ScannedRecord, Settlement, StagedBatch,
};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::effect::{Delivery, Effects, GroupPartitionInfo, Reply, Scan, SettleResult};
use felucca_broker::engine::types::{
    LeaseId, Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId, TopicId,
};
use felucca_protocol::batch::{BatchBuilder, BatchHeader};

/// Scans answered within one turn, as the shard does.
const SCAN_ROUNDS: usize = 4;
/// Records of one appended batch.
const BATCH_RECORDS: u64 = 1 << 20;
/// Where a batch's header has the last offset's distance from the first.
const LAST_OFFSET_DELTA: std::ops::Range<usize> = 23..27;

pub(crate) const TOPIC: TopicId = TopicId([1; 16]);

/// Partition `partition` of the only topic.
pub(crate) fn key(partition: u32) -> PartitionKey {
    PartitionKey { topic: TOPIC, partition }
}

/// What a scan would find at an offset.
type RecordAt = Box<dyn Fn(u64) -> ScannedRecord>;

/// See the module's documentation. One topic, `orders`.
pub(crate) struct Bench {
    pub(crate) engine: Engine,
    pub(crate) now: Now,
    lsn: Lsn,
    record_at: RecordAt,
    out: Effects,
    /// Scans for the next turn.
    scans: Vec<Scan>,
    /// Granted since the last look, by subscription.
    granted: BTreeMap<SubscriptionId, Vec<LeaseRef>>,
    pub(crate) frame_bytes: u64,
    pub(crate) largest_frame: u64,
    /// Time on the processor within the engine.
    pub(crate) engine_time: Duration,
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bench").field("now", &self.now).field("lsn", &self.lsn).finish_non_exhaustive()
    }
}

impl Bench {
    pub(crate) fn new(
        settings: EngineSettings,
        partitions: u32,
        record_at: impl Fn(u64) -> ScannedRecord + 'static,
    ) -> Self {
        let mut bench = Self {
            engine: Engine::new(settings),
            now: Now { monotonic_ms: 1_000, wall_ms: 1_700_000_000_000, entropy: 7 },
            lsn: 1,
            record_at: Box::new(record_at),
            out: Effects::default(),
            scans: Vec::new(),
            granted: BTreeMap::new(),
            frame_bytes: 0,
            largest_frame: 0,
            engine_time: Duration::ZERO,
        };
        bench.engine.boot(bench.now, bench.lsn, "machine", &mut bench.out);
        bench.write();
        let create =
            Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions, config: Vec::new() };
        let reply = bench.ask(create);
        assert!(matches!(reply, Reply::Topic(_)), "{reply:?}");
        bench
    }

    pub(crate) fn create_group(&mut self, name: &str, config: &[(&str, &str)]) {
        let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let (group, topics) = (name.to_owned(), vec!["orders".to_owned()]);
        let reply = self.ask(Command::CreateShareGroup { group, topics, config, from_end: false });
        assert_eq!(reply, Reply::Done);
    }

    /// Appends so many records, in batches that say of themselves that they hold them.
    pub(crate) fn append(&mut self, partition: u32, count: u64) {
        let mut left = count;
        while left > 0 {
            let records = left.min(BATCH_RECORDS);
            left -= records;
            let mut builder = BatchBuilder::new();
            builder.push(1_700_000_000_000, None, Some(b"value"), &[]).expect("a small record");
            let mut bytes = builder.finish();
            bytes[LAST_OFFSET_DELTA].copy_from_slice(&(records as u32 - 1).to_be_bytes());
            let header = BatchHeader::parse(&bytes).expect("a batch");
            let entry = AppendEntry { partition: key(partition), batch: StagedBatch { header, bytes } };
            let reply = self.ask(Command::Append { level: Level::Synced, entries: vec![entry] });
            assert!(matches!(&reply, Reply::Appended(results) if results[0].is_ok()), "{reply:?}");
        }
    }

    pub(crate) fn subscribe(&mut self, group: &str, id: u64, member: &str, records: u32) {
        self.resubscribe(group, id, member, records, Vec::new());
    }

    /// Subscribes a member that still works on what it holds.
    pub(crate) fn resubscribe(
        &mut self,
        group: &str,
        id: u64,
        member: &str,
        records: u32,
        held: Vec<LeaseRef>,
    ) {
        let reply = self.ask(Command::ShareSubscribe {
            subscription: SubscriptionId(id),
            group: group.to_owned(),
            member: member.to_owned(),
            credit_records: records,
            credit_bytes: u32::MAX,
            held,
        });
        assert_eq!(reply, Reply::Done);
    }

    pub(crate) fn credit(id: u64, records: u32) -> Command {
        Command::ShareCredit { subscription: SubscriptionId(id), records, bytes: records * 1_000 }
    }

    pub(crate) fn settlement(group: &str, member: &str, settlements: Vec<Settlement>) -> Command {
        let (group, member) = (group.to_owned(), member.to_owned());
        Command::Settle { group, member, level: Level::Synced, settlements }
    }

    pub(crate) fn settle(
        &mut self,
        group: &str,
        member: &str,
        records: &[LeaseRef],
        outcome: &Outcome,
    ) -> Vec<SettleResult> {
        let settlements: Vec<Settlement> =
            records.iter().map(|record| Settlement { record: *record, outcome: outcome.clone() }).collect();
        match self.ask(Self::settlement(group, member, settlements)) {
            Reply::Settled(results) => results,
            other => panic!("{other:?}"),
        }
    }

    /// Keeps the sessions of members alive.
    pub(crate) fn seen(&mut self, group: &str, members: &[String]) {
        let members = members.iter().map(|member| (group.to_owned(), member.clone())).collect();
        self.turn(vec![Command::MembersSeen { members }]);
    }

    pub(crate) fn describe(&mut self, group: &str) -> Vec<GroupPartitionInfo> {
        match self.ask(Command::DescribeGroup { group: group.to_owned() }) {
            Reply::Group(description) => description.partitions,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn partition(&mut self, group: &str, partition: u32) -> GroupPartitionInfo {
        let found = self.describe(group).into_iter().find(|info| info.partition == Some(key(partition)));
        found.expect("the group is on the partition")
    }

    pub(crate) fn ask(&mut self, command: Command) -> Reply {
        let mut replies = self.turn(vec![command]);
        replies.pop().expect("every request is answered")
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        self.now.monotonic_ms += ms;
        self.now.wall_ms += ms.cast_signed();
    }

    /// Passes time and lets the engine do what is due, with what follows from it.
    pub(crate) fn advance(&mut self, ms: u64) {
        self.pass(ms);
        self.rest();
    }

    /// Takes turns until nothing is left to do at this time.
    pub(crate) fn rest(&mut self) {
        loop {
            let before = self.lsn;
            self.turn(Vec::new());
            let due = self.engine.next_deadline().is_some_and(|at| at <= self.now.monotonic_ms);
            if self.lsn == before && self.scans.is_empty() && !due {
                break;
            }
        }
    }

    /// One turn: everything that is written is synced, then the commands, what is due, and what is to be handed out.
    pub(crate) fn turn(&mut self, commands: Vec<Command>) -> Vec<Reply> {
        self.now.entropy = self.now.entropy.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (now, lsn) = (self.now, self.lsn);
        let scans = std::mem::take(&mut self.scans);
        let scanned: Vec<Command> = scans.iter().map(|scan| self.answer(scan)).collect();
        let began = cpu_time();
        self.engine.progress(now, lsn, lsn - 1, lsn - 1, &mut self.out);
        for answer in scanned {
            self.engine.step(now, lsn, None, answer, &mut self.out);
        }
        for command in commands {
            self.engine.step(now, lsn, Some(RequestId(1)), command, &mut self.out);
        }
        self.engine.tick(now, lsn, &mut self.out);
        self.engine.finish(now, lsn, &mut self.out);
        self.engine_time += cpu_time() - began;
        for _ in 0..SCAN_ROUNDS {
            let scans = std::mem::take(&mut self.out.scans);
            if scans.is_empty() {
                break;
            }
            let scanned: Vec<Command> = scans.iter().map(|scan| self.answer(scan)).collect();
            let began = cpu_time();
            for answer in scanned {
                self.engine.step(now, lsn, None, answer, &mut self.out);
            }
            self.engine.finish(now, lsn, &mut self.out);
            self.engine_time += cpu_time() - began;
        }
        self.scans = std::mem::take(&mut self.out.scans);
        let replies = self.out.replies.drain(..).map(|pending| pending.reply).collect();
        for delivery in self.out.deliveries.drain(..) {
            let leases = self.granted.entry(delivery.subscription).or_default();
            leases.extend(leases_of(&delivery));
        }
        self.write();
        replies
    }

    fn answer(&self, scan: &Scan) -> Command {
        let next = scan.until.min(scan.from + scan.max_records as u64);
        Command::Scanned {
            group: scan.group.clone(),
            partition: scan.partition,
            from: scan.from,
            next,
            records: (scan.from..next).map(&self.record_at).collect(),
        }
    }

    fn write(&mut self) {
        if !self.out.events.is_empty() {
            let began = cpu_time();
            let bytes = Engine::encode_frame(self.now, &mut self.out).len() as u64;
            self.frame_bytes += bytes;
            self.largest_frame = self.largest_frame.max(bytes);
            self.engine_time += cpu_time() - began;
            self.lsn += 1;
        }
        self.out.batches.clear();
        self.out.segment_writes.clear();
        self.out.view_changes.clear();
        self.out.advances.clear();
        self.out.dead_letter_reads.clear();
    }

    /// What was granted to a subscription since the last call.
    pub(crate) fn take_granted(&mut self, id: u64) -> Vec<LeaseRef> {
        self.granted.get_mut(&SubscriptionId(id)).map(std::mem::take).unwrap_or_default()
    }
}

fn leases_of(delivery: &Delivery) -> impl Iterator<Item = LeaseRef> {
    let first = delivery.first_lease;
    (first.sequence..).zip(&delivery.records).map(move |(sequence, record)| LeaseRef {
        partition: delivery.partition,
        offset: record.offset,
        lease: LeaseId { boot_epoch: first.boot_epoch, sequence },
    })
}

/// Time that this thread has spent on a processor: what others do on the machine does not count.
pub(crate) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// Resident memory of this process, in bytes.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("the second field") * rustix::param::page_size() as u64
}
