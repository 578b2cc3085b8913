//! The engine's behaviour, command by command, on a stand-in for the shard that writes and syncs when told.

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchHeader};
use prost::Message;

use super::command::{
    AppendEntry, Command, FailureDetail, LeaseRef, OffsetCommit, Outcome, ScannedRecord, SeekTo, Settlement,
    StagedBatch,
};
use super::config::EngineSettings;
use super::effect::{Delivery, Effects, RecordState, Reply, SettleResult, SettleStatus};
use super::error::EngineError;
use super::event::PartitionRow;
use super::types::{LeaseId, Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId, TopicId};
use super::{Engine, share};

const TOPIC: TopicId = TopicId([1; 16]);
const P0: PartitionKey = PartitionKey { topic: TOPIC, partition: 0 };

/// Runs one command a turn; everything is written and synced at once unless `hold_sync` is set.
struct Bench {
    engine: Engine,
    now: Now,
    lsn: Lsn,
    frames: Vec<(Vec<u8>, Vec<Bytes>)>,
    log: Vec<(PartitionKey, ScannedRecord)>,
    deliveries: Vec<Delivery>,
    ended: Vec<SubscriptionId>,
    hold_sync: bool,
    /// Of the last answer.
    level: Level,
    /// Dead letters are made, but not yet handed in.
    hold_letters: bool,
    /// Dead letters cannot be made.
    unreadable: bool,
}

impl Bench {
    fn new() -> Self {
        Self::with(EngineSettings::default())
    }

    fn with(settings: EngineSettings) -> Self {
        let mut bench = Self {
            engine: Engine::new(settings),
            now: Now { monotonic_ms: 1_000, wall_ms: 1_700_000_000_000, entropy: 7 },
            lsn: 1,
            frames: Vec::new(),
            log: Vec::new(),
            deliveries: Vec::new(),
            ended: Vec::new(),
            hold_sync: false,
            level: Level::Synced,
            hold_letters: false,
            unreadable: false,
        };
        bench.boot_as("machine");
        bench
    }

    fn boot_as(&mut self, machine: &str) {
        let mut out = Effects::default();
        self.engine.boot(self.now, self.lsn, machine, &mut out);
        self.end_turn(out);
    }

    /// A killed process: everything written is there, everything else is gone.
    fn reopen(&mut self) {
        self.reopen_as("machine");
    }

    /// The same on another run of the machine, when that has another name.
    fn reopen_as(&mut self, machine: &str) {
        self.engine = Engine::new(EngineSettings::default());
        for (events, batches) in self.frames.clone() {
            self.engine.replay(&events, batches, &mut Effects::default()).unwrap();
        }
        self.deliveries.clear();
        self.boot_as(machine);
    }

    fn ask(&mut self, command: Command) -> Reply {
        let mut out = Effects::default();
        self.engine.step(self.now, self.lsn, Some(RequestId(1)), command, &mut out);
        self.end_turn(out).expect("every request is answered")
    }

    fn tell(&mut self, command: Command) {
        let mut out = Effects::default();
        self.engine.step(self.now, self.lsn, None, command, &mut out);
        self.end_turn(out);
    }

    fn advance(&mut self, ms: u64) {
        self.now.monotonic_ms += ms;
        self.now.wall_ms += ms.cast_signed();
        self.now.entropy = self.now.entropy.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut out = Effects::default();
        self.engine.tick(self.now, self.lsn, &mut out);
        self.end_turn(out);
    }

    fn end_turn(&mut self, mut out: Effects) -> Option<Reply> {
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
        self.ended.extend(out.ended.iter().map(|(id, _)| *id));
        let mut follow_up = Effects::default();
        let synced = if self.hold_sync { 0 } else { self.lsn - 1 };
        self.engine.progress(self.now, self.lsn, self.lsn - 1, synced, &mut follow_up);
        for scan in out.scans {
            let in_range = |(key, record): &&(PartitionKey, ScannedRecord)| {
                *key == scan.partition && (scan.from..scan.until).contains(&record.offset)
            };
            let records = self.log.iter().filter(in_range).map(|(_, record)| *record).collect();
            let scanned = Command::Scanned {
                group: scan.group,
                partition: scan.partition,
                from: scan.from,
                next: scan.until,
                records,
            };
            self.engine.step(self.now, self.lsn, None, scanned, &mut follow_up);
        }
        if !self.hold_letters {
            for read in out.dead_letter_reads {
                let letter =
                    if self.unreadable { Err("damaged".to_owned()) } else { Ok(staged(Some(b"k"), 1)) };
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

    fn write(&mut self, out: &mut Effects) {
        if !out.events.is_empty() {
            let events = Engine::encode_frame(self.now, out);
            self.frames.push((events, std::mem::take(&mut out.batches)));
            self.lsn += 1;
        }
    }

    // ---- Shorthand ----

    fn topic(&mut self, config: &[(&str, &str)]) {
        let config = pairs(config);
        let reply =
            self.ask(Command::CreateTopic { id: TOPIC, name: "orders".to_owned(), partitions: 2, config });
        assert!(matches!(reply, Reply::Topic(_)), "{reply:?}");
    }

    fn group(&mut self, config: &[(&str, &str)]) {
        let reply = self.ask(Command::CreateShareGroup {
            group: "pay".to_owned(),
            topics: vec!["orders".to_owned()],
            config: pairs(config),
            from_end: false,
        });
        assert_eq!(reply, Reply::Done);
    }

    fn append(&mut self, key: Option<&[u8]>, count: usize) -> Result<super::effect::Appended, EngineError> {
        let entry = AppendEntry { partition: P0, batch: staged(key, count) };
        self.append_entry(entry, Level::Synced)
    }

    fn append_entry(
        &mut self,
        entry: AppendEntry,
        level: Level,
    ) -> Result<super::effect::Appended, EngineError> {
        match self.ask(Command::Append { level, entries: vec![entry] }) {
            Reply::Appended(mut results) => results.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn subscribe(&mut self, id: u64, member: &str, credit: u32) {
        self.subscribe_holding(id, member, credit, Vec::new());
    }

    fn subscribe_holding(&mut self, id: u64, member: &str, credit: u32, held: Vec<LeaseRef>) {
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
    fn delivered(&mut self) -> Vec<(LeaseRef, u32, u32)> {
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

    fn offsets(&mut self) -> Vec<u64> {
        self.delivered().iter().map(|(lease, _, _)| lease.offset).collect()
    }

    fn take_one(&mut self) -> LeaseRef {
        let delivered = self.delivered();
        assert_eq!(delivered.len(), 1, "{delivered:?}");
        delivered[0].0
    }

    fn settle(&mut self, member: &str, record: LeaseRef, outcome: Outcome) -> SettleResult {
        let settlements = vec![Settlement { record, outcome }];
        let (group, member) = ("pay".to_owned(), member.to_owned());
        match self.ask(Command::Settle { group, member, level: Level::Synced, settlements }) {
            Reply::Settled(results) => results[0],
            other => panic!("{other:?}"),
        }
    }

    fn status(&mut self, member: &str, record: LeaseRef, outcome: Outcome) -> SettleStatus {
        self.settle(member, record, outcome).status
    }

    fn counts(&mut self) -> super::effect::GroupPartitionInfo {
        match self.ask(Command::DescribeGroup { group: "pay".to_owned() }) {
            Reply::Group(description) => {
                description.partitions.into_iter().find(|info| info.partition == Some(P0)).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }
}

fn pairs(entries: &[(&str, &str)]) -> Vec<(String, String)> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn staged(key: Option<&[u8]>, count: usize) -> StagedBatch {
    finish(BatchBuilder::new(), key, count)
}

fn finish(mut builder: BatchBuilder, key: Option<&[u8]>, count: usize) -> StagedBatch {
    for _ in 0..count {
        builder.push(1_700_000_000_000, key, Some(b"value"), &[]).unwrap();
    }
    let bytes = builder.finish();
    StagedBatch { header: BatchHeader::parse(&bytes).unwrap(), bytes }
}

fn nack() -> Outcome {
    Outcome::Nack { delay_ms: Some(100), counted: true, detail: FailureDetail::default() }
}

fn reject() -> Outcome {
    Outcome::Reject { detail: FailureDetail { class: "bad".to_owned(), ..FailureDetail::default() } }
}

const EXTEND: Outcome = Outcome::Extend { remaining_ms: None };

/// A group with one record leased by member `a`.
fn leased(config: &[(&str, &str)]) -> (Bench, LeaseRef) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(config);
    bench.append(None, 1).unwrap();
    bench.subscribe(1, "a", 1);
    let lease = bench.take_one();
    (bench, lease)
}

#[test]
fn a_retried_batch_is_answered_with_its_first_offset_also_after_a_crash() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let Reply::Producer { producer_id, epoch } = bench.ask(Command::InitProducer) else { panic!() };
    let batch = |sequence: i32| {
        let builder = BatchBuilder::new().producer(producer_id.cast_signed(), epoch.cast_signed(), sequence);
        AppendEntry { partition: P0, batch: finish(builder, None, 3) }
    };
    assert_eq!(bench.append_entry(batch(0), Level::Synced).unwrap().base_offset, 0);
    assert_eq!(bench.append_entry(batch(3), Level::Synced).unwrap().base_offset, 3);
    bench.reopen();
    let again = bench.append_entry(batch(0), Level::Synced).unwrap();
    assert!(again.duplicate && again.base_offset == 0);
    let error = bench.append_entry(batch(9), Level::Synced).unwrap_err();
    assert_eq!(error, EngineError::OutOfOrderSequence { producer_id, got: 9, expected: 6 });
    assert_eq!(bench.append_entry(batch(6), Level::Synced).unwrap().base_offset, 6);
}

#[test]
fn a_producer_id_that_was_never_given_out_is_refused() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let entry = AppendEntry { partition: P0, batch: finish(BatchBuilder::new().producer(99, 0, 0), None, 1) };
    assert_eq!(bench.append_entry(entry, Level::Synced), Err(EngineError::UnknownProducer(99)));
}

#[test]
fn written_is_refused_unless_the_topic_allows_it() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let entry = AppendEntry { partition: P0, batch: staged(None, 1) };
    assert!(matches!(bench.append_entry(entry, Level::Written), Err(EngineError::WrittenNotAllowed(_))));
}

#[test]
fn after_a_power_loss_a_partition_that_showed_unsynced_offsets_resumes_above_them() {
    let mut bench = Bench::new();
    bench.topic(&[("allow-written", "true"), ("visibility", "written")]);
    let entry = || AppendEntry { partition: P0, batch: staged(None, 1) };
    bench.append_entry(entry(), Level::Written).unwrap();
    bench.reopen_as("another run of the machine");
    let next = bench.append_entry(entry(), Level::Written).unwrap().base_offset;
    assert!(next > 1, "{next}");
}

#[test]
fn offsets_are_shown_unsynced_only_when_a_synced_ceiling_covers_them() {
    let mut bench = Bench::new();
    bench.topic(&[("allow-written", "true")]);
    let Reply::Producer { producer_id, epoch } = bench.ask(Command::InitProducer) else { panic!() };
    let batch = |sequence: i32| {
        let builder = BatchBuilder::new().producer(producer_id.cast_signed(), epoch.cast_signed(), sequence);
        AppendEntry { partition: P0, batch: finish(builder, None, 1) }
    };
    bench.hold_sync = true;
    for (sequence, what) in [(0, "raises the ceiling"), (1, "comes before its sync"), (0, "is repeated")] {
        bench.append_entry(batch(sequence), Level::Written).unwrap();
        assert_eq!(bench.level, Level::Synced, "{what}");
    }
    bench.hold_sync = false;
    bench.advance(1);
    bench.hold_sync = true;
    for (sequence, what) in [(2, "is covered"), (0, "is repeated")] {
        bench.append_entry(batch(sequence), Level::Written).unwrap();
        assert_eq!(bench.level, Level::Written, "{what}");
    }
}

#[test]
fn reply_table_current_lease() {
    let (mut bench, lease) = leased(&[]);
    let extended = bench.settle("a", lease, EXTEND);
    assert_eq!((extended.status, extended.state), (SettleStatus::Ok, Some(RecordState::Leased)));
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Ok);
    let (mut bench, lease) = leased(&[]);
    let nacked = bench.settle("a", lease, nack());
    assert_eq!((nacked.state, nacked.remaining_ms), (Some(RecordState::Scheduled), 100));
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.settle("a", lease, reject()).state, Some(RecordState::DeadLettered));
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.settle("a", lease, Outcome::Release).state, Some(RecordState::Available));
}

#[test]
fn reply_table_repeated() {
    let (mut bench, lease) = leased(&[]);
    bench.settle("a", lease, Outcome::Ack);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Duplicate);
    assert_eq!(bench.status("a", lease, nack()), SettleStatus::Conflict);
    assert_eq!(bench.status("a", lease, EXTEND), SettleStatus::Gone);
    let (mut bench, lease) = leased(&[]);
    bench.settle("a", lease, nack());
    assert_eq!(bench.status("a", lease, nack()), SettleStatus::Duplicate);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Conflict);
}

#[test]
fn reply_table_expired() {
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "10s"), ("backoff-max", "10s")]);
    bench.advance(1_000);
    assert_eq!(bench.counts().failures, 1);
    assert_eq!(bench.status("a", lease, nack()), SettleStatus::Stale);
    assert_eq!(bench.status("a", lease, EXTEND), SettleStatus::Stale);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Late);
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "0s"), ("backoff-max", "0s")]);
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 1, bytes: 0 });
    bench.advance(1_000);
    bench.advance(0);
    assert_eq!(bench.offsets(), [0], "leased again");
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Stale);
}

#[test]
fn reply_table_others() {
    let (mut bench, lease) = leased(&[]);
    assert_eq!(bench.status("b", lease, Outcome::Ack), SettleStatus::NotOwner);
    bench.ask(Command::SeekGroup {
        group: "pay".to_owned(),
        topic: "orders".to_owned(),
        positions: vec![(0, SeekTo::Beginning)],
    });
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Fenced);
}

#[test]
fn reply_table_repeated_after_the_record_was_leased_again() {
    let (mut bench, lease) = leased(&[]);
    let retry = Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() };
    bench.settle("a", lease, retry.clone());
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 1, bytes: 0 });
    bench.advance(0);
    assert_eq!(bench.offsets(), [0]);
    assert_eq!(bench.status("a", lease, retry), SettleStatus::Duplicate);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Conflict);
    assert_eq!(bench.status("a", lease, EXTEND), SettleStatus::Gone);
}

#[test]
fn reply_table_dead() {
    for on_exhausted in ["dead-letter", "discard"] {
        let (mut bench, lease) =
            leased(&[("lease", "1s"), ("max-failures", "1"), ("on-exhausted", on_exhausted)]);
        bench.advance(1_000);
        let counts = bench.counts();
        assert_eq!(counts.dead_lettered + counts.discarded, 1);
        for outcome in [Outcome::Ack, nack(), EXTEND] {
            assert_eq!(bench.status("a", lease, outcome), SettleStatus::Stale, "{on_exhausted}");
        }
    }
}

#[test]
fn only_the_last_holder_may_acknowledge_late() {
    let (mut bench, lease) = leased(&[("lease", "1s"), ("backoff-initial", "10s"), ("backoff-max", "10s")]);
    bench.advance(1_000);
    assert_eq!(bench.status("b", lease, Outcome::Ack), SettleStatus::NotOwner);
    assert_eq!(bench.status("a", lease, Outcome::Ack), SettleStatus::Late);
}

#[test]
fn a_lease_that_was_lost_with_the_power_settles_nothing_and_is_told_so() {
    let (mut bench, lease) = leased(&[]);
    // The frame of the grant is gone.
    bench.frames.pop();
    bench.lsn -= 1;
    bench.reopen_as("another run of the machine");
    for outcome in [Outcome::Ack, nack(), EXTEND] {
        assert_eq!(bench.status("a", lease, outcome), SettleStatus::Stale);
    }
    bench.subscribe(2, "a", 1);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn a_member_that_dies_on_a_record_and_comes_back_under_its_name_does_not_get_it_for_ever() {
    let (mut bench, _) = leased(&[("max-deliveries", "3")]);
    for subscription in 2..10 {
        bench.subscribe(subscription, "a", 1);
    }
    let counts = bench.counts();
    assert_eq!((counts.deliveries, counts.failures, counts.dead_lettered), (3, 0, 1));
}

#[test]
fn dead_letters_that_cannot_be_made_do_not_use_up_the_places_of_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 100).unwrap();
    bench.subscribe(1, "a", 100);
    bench.unreadable = true;
    for (lease, _, _) in bench.delivered() {
        bench.settle("a", lease, reject());
    }
    assert_eq!(bench.counts().held, 100);
}

#[test]
fn one_stuck_record_does_not_stop_the_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(None, 100).unwrap();
    bench.subscribe(1, "a", 100);
    let all = bench.delivered();
    assert_eq!(all.len(), 100);
    bench.settle("a", all[0].0, nack());
    for (lease, _, _) in &all[1..] {
        bench.settle("a", *lease, Outcome::Ack);
    }
    let counts = bench.counts();
    assert_eq!((counts.position, counts.lag, counts.scheduled, counts.acked), (Some(100), 1, 1, 99));
}

#[test]
fn failures_and_leases_survive_a_crash_and_the_old_name_still_settles() {
    let (mut bench, lease) = leased(&[]);
    bench.settle(
        "a",
        lease,
        Outcome::Nack { delay_ms: Some(0), counted: true, detail: FailureDetail::default() },
    );
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 1, bytes: 0 });
    bench.advance(0);
    let second = bench.delivered()[0];
    assert_eq!((second.1, second.2), (2, 1));
    bench.reopen();
    bench.subscribe_holding(2, "a", 1, vec![second.0]);
    assert!(bench.delivered().is_empty(), "the member holds it still");
    assert_eq!(bench.status("a", second.0, Outcome::Ack), SettleStatus::Ok);
}

#[test]
fn leases_that_a_returning_member_does_not_name_go_back_without_a_failure() {
    let (mut bench, _) = leased(&[]);
    bench.subscribe(2, "a", 1);
    let again = bench.delivered();
    assert_eq!((again[0].1, again[0].2), (2, 0));
}

/// After a start nothing is scanned yet; what then goes back must not be missed because everything before it is settled
/// first, nor be overtaken by its key's successor.
#[test]
fn a_record_that_goes_back_before_it_was_scanned_is_handed_out_in_its_turn() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"first"), 1).unwrap();
    bench.append(Some(b"second"), 2).unwrap();
    bench.subscribe(1, "a", 10);
    let leases = bench.delivered();
    assert_eq!(leases.len(), 2);
    bench.reopen();
    bench.subscribe_holding(2, "a", 0, vec![leases[0].0]);
    assert_eq!(bench.status("a", leases[0].0, Outcome::Ack), SettleStatus::Ok);
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(2), records: 10, bytes: 0 });
    assert_eq!(bench.offsets(), [1]);
    assert_eq!(bench.counts().lag, 2);
}

#[test]
fn a_silent_member_is_lost_and_its_records_are_tried_again() {
    let (mut bench, _) = leased(&[("backoff-initial", "1s"), ("backoff-max", "1s"), ("jitter", "0")]);
    bench.advance(10_000);
    assert_eq!(bench.ended, [SubscriptionId(1)]);
    let counts = bench.counts();
    assert_eq!((counts.leased, counts.scheduled, counts.failures), (0, 1, 1));
    bench.subscribe(2, "b", 1);
    bench.advance(1_000);
    assert_eq!(bench.offsets(), [0]);
}

#[test]
fn an_exhausted_record_is_dead_lettered_in_one_frame_and_once_also_after_a_crash_in_between() {
    let (mut bench, lease) = leased(&[("max-failures", "1")]);
    bench.hold_letters = true;
    assert_eq!(bench.settle("a", lease, nack()).state, Some(RecordState::DeadLettered));
    assert_eq!(bench.counts().dead_lettered, 0);
    bench.hold_letters = false;
    bench.reopen();
    let frames = bench.frames.len();
    assert_eq!(bench.counts().dead_lettered, 1);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    assert_eq!((letters[0].topic.name.as_str(), letters[0].pending), ("dlq.pay.orders", 1));
    bench.reopen();
    assert_eq!(bench.counts().dead_lettered, 1);
    let with_batch = bench.frames[..frames].iter().filter(|(_, batches)| !batches.is_empty()).count();
    assert_eq!(with_batch, 2, "the record and its dead letter");
}

#[test]
fn a_redrive_may_write_to_its_own_topic_and_no_other_that_belongs_to_a_group() {
    let (mut bench, record) = leased(&[]);
    bench.settle("a", record, reject());
    let group = "redrive.pay.orders";
    let reply = bench.ask(Command::ShareSubscribe {
        subscription: SubscriptionId(2),
        group: group.to_owned(),
        member: "a".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    });
    assert_eq!(reply, Reply::Done);
    let record = bench.take_one();
    let Reply::Metadata { topics, .. } = bench.ask(Command::Metadata { names: Vec::new() }) else { panic!() };
    let mut complete = |name: &str| {
        let topic = topics.iter().find(|topic| topic.name == name).unwrap().id;
        let output = AppendEntry { partition: PartitionKey { topic, partition: 0 }, batch: staged(None, 1) };
        let (group, member) = (group.to_owned(), "a".to_owned());
        bench.ask(Command::Complete { group, member, record, outputs: vec![output] })
    };
    assert!(matches!(complete("dlq.pay.orders"), Reply::Error(EngineError::ForeignProducer(_))));
    assert!(matches!(complete(group), Reply::Completed { .. }));
}

#[test]
fn who_redrives_a_dead_letter_topic_is_told_when_it_goes() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let reply = bench.ask(Command::ShareSubscribe {
        subscription: SubscriptionId(1),
        group: "redrive.pay.orders".to_owned(),
        member: "redriver".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    });
    assert_eq!(reply, Reply::Done);
    bench.ask(Command::DeleteGroup { group: "pay".to_owned() });
    bench.ask(Command::DeleteTopic { name: "dlq.pay.orders".to_owned() });
    assert_eq!(bench.ended, [SubscriptionId(1)]);
    assert!(bench.engine.subscriptions.is_empty());
}

#[test]
fn producers_may_not_write_to_a_dead_letter_topic() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let partition = PartitionKey { topic: letters[0].topic.id, partition: 0 };
    let entry = AppendEntry { partition, batch: staged(None, 1) };
    assert!(matches!(bench.append_entry(entry, Level::Synced), Err(EngineError::ForeignProducer(_))));
}

#[test]
fn a_key_stays_in_order_through_a_nack_while_others_flow() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    for key in [b"a", b"a", b"b", b"a"] {
        bench.append(Some(key), 1).unwrap();
    }
    bench.subscribe(1, "m", 10);
    let first = bench.delivered();
    assert_eq!(first.iter().map(|(lease, _, _)| lease.offset).collect::<Vec<_>>(), [0, 2]);
    bench.settle("m", first[0].0, nack());
    assert!(bench.offsets().is_empty(), "the key waits for its first record");
    bench.advance(100);
    let retried = bench.take_one();
    assert_eq!(retried.offset, 0);
    bench.settle("m", retried, Outcome::Ack);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_key_is_free_only_when_the_settlement_before_is_synced() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"a"), 2).unwrap();
    bench.subscribe(1, "m", 10);
    let first = bench.take_one();
    bench.hold_sync = true;
    bench.settle("m", first, Outcome::Ack);
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
}

/// After a restart, the records from 0 to 2 of one key or two, leased or returned before anything is scanned again.
fn reopened_with_leases(keys: [&[u8]; 4]) -> (Bench, Vec<LeaseRef>) {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key"), ("max-failures", "10")]);
    for key in keys {
        bench.append(Some(key), 1).unwrap();
    }
    bench.subscribe(1, "m", 10);
    let leases: Vec<LeaseRef> = bench.delivered().into_iter().map(|(lease, _, _)| lease).collect();
    bench.reopen();
    (bench, leases)
}

#[test]
fn a_returned_record_that_the_low_watermark_passed_after_a_restart_is_not_forgotten() {
    let (mut bench, leases) = reopened_with_leases([b"a", b"b", b"c", b"b"]);
    assert_eq!(leases.len(), 3);
    bench.settle("m", leases[1], nack());
    bench.settle("m", leases[0], Outcome::Ack);
    bench.settle("m", leases[2], Outcome::Ack);
    assert_eq!(bench.counts().position, Some(3));
    bench.subscribe(2, "m", 10);
    assert!(bench.offsets().is_empty(), "the third b waits for the second record, which is scheduled");
    bench.advance(100);
    assert_eq!(bench.take_one().offset, 1);
}

#[test]
fn a_key_that_was_settled_before_it_was_scanned_again_waits_for_the_sync_too() {
    let (mut bench, leases) = reopened_with_leases([b"a", b"a", b"a", b"a"]);
    bench.hold_sync = true;
    bench.settle("m", leases[0], Outcome::Ack);
    bench.subscribe(2, "m", 10);
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn complete_appends_its_outputs_with_the_ack_or_not_at_all() {
    let (mut bench, record) = leased(&[]);
    let complete = |bench: &mut Bench| {
        let other = PartitionKey { topic: TOPIC, partition: 1 };
        let outputs = vec![AppendEntry { partition: other, batch: staged(None, 2) }];
        let (group, member) = ("pay".to_owned(), "a".to_owned());
        match bench.ask(Command::Complete { group, member, record, outputs }) {
            Reply::Completed { result, base_offsets } => (result.status, base_offsets),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(complete(&mut bench), (SettleStatus::Ok, vec![0]));
    assert_eq!(complete(&mut bench), (SettleStatus::Duplicate, vec![]));
    bench.reopen();
    assert_eq!(complete(&mut bench), (SettleStatus::Duplicate, vec![]));
}

#[test]
fn replay_of_the_journal_and_a_checkpoint_with_the_rest_of_it_agree() {
    let (mut bench, lease) = leased(&[("max-failures", "2")]);
    bench.append(Some(b"k"), 50).unwrap();
    let rows = bench.engine.take_dirty_rows();
    let at = bench.frames.len();
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 20, bytes: 0 });
    let taken = bench.delivered();
    bench.settle("a", lease, nack());
    for (lease, _, _) in taken.iter().step_by(2) {
        bench.settle("a", *lease, Outcome::Ack);
    }
    let mut full = Engine::new(EngineSettings::default());
    for (events, batches) in &bench.frames {
        full.replay(events, batches.clone(), &mut Effects::default()).unwrap();
    }
    let mut short = Engine::new(EngineSettings::default());
    for (key, value) in &rows {
        if let Some(value) = value {
            short.restore_row(key, value).unwrap();
        }
    }
    for (events, batches) in &bench.frames[at..] {
        short.replay(events, batches.clone(), &mut Effects::default()).unwrap();
    }
    let all: std::collections::BTreeMap<_, _> = full.take_dirty_rows().into_iter().collect();
    for (key, value) in short.take_dirty_rows() {
        assert_eq!(all[&key], value);
    }
}

#[test]
fn a_commit_beyond_the_end_is_refused() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.append(None, 5).unwrap();
    let commit = |offset| OffsetCommit { partition: P0, offset, metadata: String::new() };
    let reply = bench.ask(Command::CommitOffsets {
        group: "readers".to_owned(),
        member: String::new(),
        generation: 0,
        offsets: vec![commit(5), commit(6)],
    });
    let Reply::OffsetsCommitted(results) = reply else { panic!() };
    assert_eq!(results[0], Ok(()));
    assert_eq!(results[1], Err(EngineError::OffsetOutOfRange { partition: P0, offset: 6, end: 5 }));
    bench.reopen();
    let reply = bench.ask(Command::FetchOffsets { group: "readers".to_owned(), partitions: Vec::new() });
    assert_eq!(reply, Reply::Offsets(vec![commit(5)]));
}

#[test]
fn a_member_that_leaves_does_not_end_the_sessions_of_the_others() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let heartbeat = |bench: &mut Bench, member: &str, leave| {
        bench.ask(Command::GroupHeartbeat {
            group: "readers".to_owned(),
            member: member.to_owned(),
            topics: vec!["orders".to_owned()],
            owned: Vec::new(),
            generation: 0,
            leave,
        });
    };
    heartbeat(&mut bench, "a", false);
    heartbeat(&mut bench, "b", false);
    bench.advance(9_000);
    heartbeat(&mut bench, "a", false);
    heartbeat(&mut bench, "b", true);
    bench.advance(1_500);
    let Reply::Group(readers) = bench.ask(Command::DescribeGroup { group: "readers".to_owned() }) else {
        panic!()
    };
    assert_eq!(readers.members.len(), 1);
    heartbeat(&mut bench, "a", true);
    bench.ask(Command::DeleteGroup { group: "readers".to_owned() });
    heartbeat(&mut bench, "c", true);
    assert_eq!(bench.ask(Command::ListGroups), Reply::Groups(Vec::new()), "who leaves no group makes none");
}

#[test]
fn a_share_group_that_finds_no_room_for_its_topics_is_refused_as_a_whole() {
    let settings = EngineSettings { max_topics: 4, ..EngineSettings::default() };
    let mut bench = Bench::with(settings);
    bench.topic(&[]);
    let (id, name) = (TopicId([2; 16]), "returns".to_owned());
    bench.ask(Command::CreateTopic { id, name, partitions: 1, config: Vec::new() });
    let create = Command::CreateShareGroup {
        group: "pay".to_owned(),
        topics: vec!["orders".to_owned(), "returns".to_owned()],
        config: Vec::new(),
        from_end: false,
    };
    let frames = bench.frames.len();
    let reply = bench.ask(create);
    assert!(matches!(reply, Reply::Error(EngineError::LimitReached { what: "topics", .. })), "{reply:?}");
    assert_eq!(bench.frames.len(), frames);
}

#[test]
fn a_group_whose_order_changes_goes_on_by_itself() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[("ordering", "key")]);
    bench.append(Some(b"k"), 2).unwrap();
    bench.subscribe(1, "a", 10);
    assert_eq!(bench.offsets(), [0]);
    bench.ask(Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(&[("ordering", "none")]) });
    assert_eq!(bench.offsets(), [1]);
}

#[test]
fn a_key_waits_for_the_sync_of_a_move_and_of_a_change_of_order() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.append(Some(b"k"), 5).unwrap();
    bench.subscribe(1, "a", 1);
    let first = bench.take_one();
    bench.hold_sync = true;
    bench.settle("a", first, Outcome::Ack);
    bench.ask(Command::AlterShareGroup { group: "pay".to_owned(), config: pairs(&[("ordering", "key")]) });
    bench.tell(Command::ShareCredit { subscription: SubscriptionId(1), records: 10, bytes: 0 });
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [1]);
    bench.hold_sync = true;
    let positions = vec![(0, SeekTo::Offset(3))];
    bench.ask(Command::SeekGroup { group: "pay".to_owned(), topic: "orders".to_owned(), positions });
    assert!(bench.offsets().is_empty());
    bench.hold_sync = false;
    bench.advance(1);
    assert_eq!(bench.offsets(), [3]);
}

#[test]
fn the_clock_does_not_fall_when_it_goes_on_from_a_checkpoint() {
    let (mut bench, _) = leased(&[("lease", "1s")]);
    bench.advance(1_000);
    let mut restored = Engine::new(EngineSettings::default());
    for (key, value) in bench.engine.take_dirty_rows() {
        restored.restore_row(&key, &value.unwrap()).unwrap();
    }
    assert_eq!(restored.monotonic_ms(), bench.now.monotonic_ms);
}

#[test]
fn a_member_that_subscribes_again_gets_nothing_on_its_older_subscription() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    bench.subscribe(1, "m", 10);
    bench.subscribe(2, "m", 10);
    bench.append(None, 2).unwrap();
    bench.append(None, 2).unwrap();
    assert!(bench.deliveries.iter().all(|delivery| delivery.subscription == SubscriptionId(2)));
    assert_eq!(bench.offsets().len(), 4);
}

#[test]
fn a_member_cannot_claim_partitions_that_do_not_exist() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let reply = bench.ask(Command::GroupHeartbeat {
        group: "readers".to_owned(),
        member: "m".to_owned(),
        topics: vec!["orders".to_owned()],
        owned: vec![
            P0,
            PartitionKey { topic: TOPIC, partition: 7 },
            PartitionKey { topic: TopicId([9; 16]), partition: 0 },
        ],
        generation: 0,
        leave: false,
    });
    let Reply::Heartbeat { assigned, .. } = reply else { panic!("{reply:?}") };
    assert_eq!(assigned, [P0, PartitionKey { topic: TOPIC, partition: 1 }]);
    let Reply::Group(group) = bench.ask(Command::DescribeGroup { group: "readers".to_owned() }) else {
        panic!()
    };
    assert_eq!(group.members[0].assigned, assigned);
}

#[test]
fn the_group_behind_a_dead_letter_topic_cannot_be_deleted_alone() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    bench.group(&[]);
    let Reply::DeadLetters(letters) = bench.ask(Command::ListDeadLetters { group: None }) else { panic!() };
    let reply = bench.ask(Command::DeleteGroup { group: letters[0].redrive_group.clone() });
    assert!(matches!(reply, Reply::Error(EngineError::InvalidRequest(_))), "{reply:?}");
}

#[test]
fn a_group_that_knows_more_than_the_log_has_is_not_served_until_it_is_moved() {
    let (mut bench, lease) = leased(&[]);
    bench.append(None, 4).unwrap();
    bench.settle("a", lease, Outcome::Ack);
    let commit = OffsetCommit { partition: P0, offset: 5, metadata: String::new() };
    bench.ask(Command::CommitOffsets {
        group: "readers".to_owned(),
        member: String::new(),
        generation: 0,
        offsets: vec![commit.clone()],
    });
    let rows = bench.engine.take_dirty_rows();
    bench.engine = Engine::new(EngineSettings::default());
    for (key, value) in rows {
        let mut value = value.unwrap();
        if let Ok(mut row) = PartitionRow::decode(&value[..])
            && key[0] == 2
            && row.topic_id == TOPIC.0
        {
            row.end = 0;
            value = row.encode_to_vec();
        }
        bench.engine.restore_row(&key, &value).unwrap();
    }
    bench.boot_as("machine");
    let subscribe = || Command::ShareSubscribe {
        subscription: SubscriptionId(7),
        group: "pay".to_owned(),
        member: "a".to_owned(),
        credit_records: 1,
        credit_bytes: 1,
        held: Vec::new(),
    };
    let settle = Command::Settle {
        group: "pay".to_owned(),
        member: "a".to_owned(),
        level: Level::Synced,
        settlements: Vec::new(),
    };
    let fetch = || Command::FetchOffsets { group: "readers".to_owned(), partitions: Vec::new() };
    for command in [subscribe(), settle, fetch()] {
        let reply = bench.ask(command);
        assert!(matches!(reply, Reply::Error(EngineError::GroupCorrupt { .. })), "{reply:?}");
    }
    for group in ["pay", "readers"] {
        let (group, topic) = (group.to_owned(), "orders".to_owned());
        let positions = vec![(0, SeekTo::End)];
        assert_eq!(bench.ask(Command::SeekGroup { group, topic, positions }), Reply::Done);
    }
    assert_eq!(bench.ask(subscribe()), Reply::Done);
    assert_eq!(bench.ask(fetch()), Reply::Offsets(vec![OffsetCommit { offset: 0, ..commit }]));
}

#[test]
fn two_groups_created_in_one_turn_get_topics_of_their_own() {
    let mut bench = Bench::new();
    bench.topic(&[]);
    let mut out = Effects::default();
    for group in ["pay", "mail"] {
        let (group, topics, config) = (group.to_owned(), vec!["orders".to_owned()], Vec::new());
        let create = Command::CreateShareGroup { group, topics, config, from_end: false };
        bench.engine.step(bench.now, bench.lsn, Some(RequestId(1)), create, &mut out);
    }
    let replies: Vec<&Reply> = out.replies.iter().map(|pending| &pending.reply).collect();
    assert_eq!(replies, [&Reply::Done, &Reply::Done]);
}
