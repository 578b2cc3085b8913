//! The engine turn by turn, as the shard drives it, without journal and log.

use bytes::BytesMut;
use felucca_broker::engine::Engine;
use felucca_broker::engine::command::{
    AppendEntry, Command, FailureDetail, LeaseRef, Outcome, ScannedRecord, Settlement,
};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::effect::{Effects, Reply, Scan, SettleStatus};
use felucca_broker::engine::share::key_slot;
use felucca_broker::engine::types::{
    LeaseId, Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId, TopicId,
};

use super::{BATCH, Work, batch, staged};

/// Records that a share group works through.
pub(crate) const RECORDS: u64 = 1000;
/// Settlements in one request, where there are several.
const TOGETHER: usize = 100;
/// Keys of records, where they have some.
const KEYS: u64 = 200;

const TOPIC: TopicId = TopicId([7; 16]);
const PARTITION: PartitionKey = PartitionKey { topic: TOPIC, partition: 0 };
const SUBSCRIPTION: SubscriptionId = SubscriptionId(1);
const GROUP: &str = "group";
const MEMBER: &str = "member";

/// An engine and what the shard knows beside it. Every frame is on the device before the next turn.
struct Desk {
    engine: Engine,
    now: Now,
    lsn: Lsn,
    requests: u64,
    keyed: bool,
    /// Leased and not settled.
    held: Vec<LeaseRef>,
    /// What left the engine.
    replies: Vec<Reply>,
    frames: Vec<Vec<u8>>,
}

impl Desk {
    fn new() -> Self {
        let mut desk = Self {
            engine: Engine::new(EngineSettings::default()),
            now: Now { monotonic_ms: 1000, wall_ms: 1_700_000_000_000, entropy: 7 },
            lsn: 1,
            requests: 0,
            keyed: false,
            held: Vec::new(),
            replies: Vec::new(),
            frames: Vec::new(),
        };
        let mut out = Effects::default();
        desk.engine.boot(desk.now, desk.lsn, "machine", &mut out);
        desk.end_turn(out);
        let config = [("allow-written", "true"), ("visibility", "written")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        desk.ask(Command::CreateTopic {
            id: TOPIC,
            name: "topic".to_owned(),
            partitions: 1,
            config: config.to_vec(),
        });
        desk
    }

    /// One command in a turn of its own, with all that follows from it.
    fn ask(&mut self, command: Command) {
        let mut out = Effects::default();
        self.engine.progress(self.now, self.lsn, self.lsn - 1, self.lsn - 1, &mut out);
        self.requests += 1;
        let request = Some(RequestId(self.requests));
        self.engine.step(self.now, self.lsn, request, command, &mut out);
        self.end_turn(out);
    }

    /// Answers scans within the turn, as the shard does for what is in memory.
    fn end_turn(&mut self, mut out: Effects) {
        loop {
            self.engine.finish(self.now, self.lsn, &mut out);
            let scans = std::mem::take(&mut out.scans);
            if scans.is_empty() {
                break;
            }
            for scan in scans {
                let answer = self.scanned(scan);
                self.engine.step(self.now, self.lsn, None, answer, &mut out);
            }
        }
        for delivery in out.deliveries.drain(..) {
            let LeaseId { boot_epoch, sequence } = delivery.first_lease;
            let lease = |(index, offset)| LeaseRef {
                partition: delivery.partition,
                offset,
                lease: LeaseId { boot_epoch, sequence: sequence + index },
            };
            let offsets = delivery.records.iter().map(|record| record.offset);
            self.held.extend((0..).zip(offsets).map(lease));
        }
        self.frames.push(Engine::encode_frame(self.now, &mut out));
        self.replies.extend(out.replies.drain(..).map(|pending| pending.reply));
        self.lsn += 1;
    }

    fn scanned(&self, scan: Scan) -> Command {
        let next = scan.until.min(scan.from + scan.max_records as u64);
        let slot = |offset: u64| self.keyed.then(|| key_slot(&(offset % KEYS).to_be_bytes()));
        let record = |offset| ScannedRecord { offset, slot: slot(offset), size: 1100 };
        let records = (scan.from..next).map(record).collect();
        Command::Scanned { group: scan.group, partition: scan.partition, from: scan.from, next, records }
    }

    fn append(&mut self, bytes: BytesMut) {
        let entry = AppendEntry { partition: PARTITION, batch: staged(bytes) };
        self.ask(Command::Append { level: Level::Written, entries: vec![entry] });
    }

    /// With records, a group and its member, which has credit for so many.
    fn with_member(ordering: &str, credit: u64) -> Self {
        let mut desk = Self::new();
        desk.keyed = ordering == "key";
        for _ in 0..RECORDS / BATCH {
            desk.append(batch(BATCH));
        }
        desk.ask(Command::CreateShareGroup {
            group: GROUP.to_owned(),
            topics: vec!["topic".to_owned()],
            config: vec![("ordering".to_owned(), ordering.to_owned())],
            from_end: false,
        });
        desk.ask(Command::ShareSubscribe {
            subscription: SUBSCRIPTION,
            group: GROUP.to_owned(),
            member: MEMBER.to_owned(),
            credit_records: credit as u32,
            credit_bytes: u32::MAX,
            held: Vec::new(),
        });
        desk
    }

    fn credit(&mut self, records: usize) {
        self.ask(Command::ShareCredit { subscription: SUBSCRIPTION, records: records as u32, bytes: 0 });
    }

    fn settle(&mut self, records: &[LeaseRef], outcome: &Outcome) {
        let settle = |record: &LeaseRef| Settlement { record: *record, outcome: outcome.clone() };
        self.ask(Command::Settle {
            group: GROUP.to_owned(),
            member: MEMBER.to_owned(),
            level: Level::Written,
            settlements: records.iter().map(settle).collect(),
        });
    }

    /// Settles what is held, so many in a request.
    fn settle_held(mut self, outcome: &Outcome, together: usize) -> Self {
        for records in std::mem::take(&mut self.held).chunks(together) {
            self.settle(records, outcome);
        }
        self.check()
    }

    /// Nothing was refused: what is measured is the work, not its refusal.
    fn check(self) -> Self {
        for reply in &self.replies {
            match reply {
                Reply::Error(error) => panic!("refused: {error}"),
                Reply::Settled(results) => {
                    assert!(results.iter().all(|result| result.status == SettleStatus::Ok));
                }
                _ => {}
            }
        }
        self
    }
}

pub(crate) fn produce() -> Work {
    let mut desk = Desk::new();
    let batches = vec![batch(BATCH); 100];
    Box::new(move || {
        for bytes in batches {
            desk.append(bytes);
        }
        Box::new(desk.check())
    })
}

/// A batch of one record in each request.
pub(crate) fn produce_singles() -> Work {
    let mut desk = Desk::new();
    let batches = vec![batch(1); 1000];
    Box::new(move || {
        for bytes in batches {
            desk.append(bytes);
        }
        Box::new(desk.check())
    })
}

pub(crate) fn lease() -> Work {
    let mut desk = Desk::with_member("none", 0);
    Box::new(move || {
        desk.credit(RECORDS as usize);
        assert_eq!(desk.held.len() as u64, RECORDS);
        Box::new(desk.check())
    })
}

fn leased() -> Desk {
    let desk = Desk::with_member("none", RECORDS);
    assert_eq!(desk.held.len() as u64, RECORDS);
    desk
}

pub(crate) fn ack() -> Work {
    let desk = leased();
    Box::new(move || Box::new(desk.settle_held(&Outcome::Ack, TOGETHER)))
}

pub(crate) fn ack_singles() -> Work {
    let desk = leased();
    Box::new(move || Box::new(desk.settle_held(&Outcome::Ack, 1)))
}

pub(crate) fn nack() -> Work {
    let desk = leased();
    let outcome = Outcome::Nack {
        delay_ms: None,
        counted: true,
        detail: FailureDetail { class: "timeout".to_owned(), ..FailureDetail::default() },
    };
    Box::new(move || Box::new(desk.settle_held(&outcome, TOGETHER)))
}

/// An acknowledgement frees its key for the next record.
pub(crate) fn keyed_ack() -> Work {
    let mut desk = Desk::with_member("key", RECORDS);
    Box::new(move || {
        let mut settled = 0;
        while !desk.held.is_empty() {
            let held = std::mem::take(&mut desk.held);
            for records in held.chunks(TOGETHER) {
                desk.settle(records, &Outcome::Ack);
                desk.credit(records.len());
            }
            settled += held.len() as u64;
        }
        assert_eq!(settled, RECORDS);
        Box::new(desk.check())
    })
}
