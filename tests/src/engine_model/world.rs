//! A stand-in for the shard: drives the engine in turns, keeps the journal, releases what may leave, and holds every step
//! against the model.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use felucca_broker::engine::Engine;
use felucca_broker::engine::command::{Command, LeaseRef};
use felucca_broker::engine::config::EngineSettings;
use felucca_broker::engine::effect::{
    DeadLetterRead, Delivery, Effects, Reply, Scan, SettleStatus, ViewChange,
};
use felucca_broker::engine::event::{Event, event::Kind};
use felucca_broker::engine::types::{Level, Lsn, Now, PartitionKey, RequestId, SubscriptionId, TopicId};

use super::Trace;
use super::model::live::Live;
use super::model::share::{Grant, Lapse};
use super::model::{Model, Moment};
use super::promises::{Fact, Promises};
use super::release::{Pending, nth};
use super::rng::Rng;
use super::store::{Appended, Frame, Logs, Rows};

/// Causes in the journal, as `journal.proto` numbers them.
const LEASE_EXPIRED: u32 = 3;
const MEMBER_LOST: u32 = 4;

/// A lease that a member knows of.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) group: String,
    pub(crate) member: String,
    pub(crate) record: LeaseRef,
}

/// What became of a turn's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Released,
    /// The process died before it was written.
    Unwritten,
    /// The process died before anything of it left.
    Unreleased,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) trace: Trace,
    pub(crate) settings: EngineSettings,
    pub(crate) session_ms: u64,
    pub(crate) engine: Engine,
    pub(crate) now: Now,
    /// Name of the machine's run.
    pub(crate) machine: u64,
    pub(crate) model: Model,
    pub(crate) live: Live,
    pub(crate) promises: Promises,

    pub(crate) journal: Vec<Frame>,
    pub(crate) synced: Lsn,
    /// The model as of each frame that a crash may end with.
    pub(crate) snapshots: BTreeMap<Lsn, Model>,
    pub(crate) rows: Rows,
    pub(crate) checkpoints: Vec<(Lsn, Rows)>,
    pub(crate) logs: Logs,

    out: Effects,
    /// Batches appended since the last look.
    fresh: Vec<Appended>,
    seen_writes: usize,
    seen_deliveries: usize,
    seen_reads: usize,
    seen_changes: usize,
    /// Records are being deleted by command.
    pub(crate) deleting: Option<(PartitionKey, u64)>,
    pub(crate) pending: VecDeque<Pending>,
    pub(crate) facts: BTreeMap<RequestId, Vec<Fact>>,
    last_request: u64,
    next_instance: u64,

    pub(crate) scans: Vec<Scan>,
    pub(crate) letters: Vec<DeadLetterRead>,
    pub(crate) held: Vec<Held>,
    /// Leases that were held once.
    pub(crate) archive: Vec<Held>,
    /// What each member of a consumer group, (group, member), was given last.
    pub(crate) assigned: BTreeMap<(String, String), BTreeSet<PartitionKey>>,
    /// Names of topics and groups that were deleted at some time.
    pub(crate) deleted: BTreeSet<String>,
    /// Every read succeeds for the moment.
    pub(crate) calm: bool,
    /// How many of a hundred dead letters cannot be made.
    pub(crate) unreadable: u64,
    /// How many of a hundred records have a key.
    pub(crate) keyed: u64,
    pub(crate) next_value: u64,
    pub(crate) next_subscription: u64,
    /// What became of the last turn: anything staged or asked for.
    pub(crate) was_busy: bool,
}

impl World {
    pub(crate) fn new(mut rng: Rng, trace: Trace, settings: EngineSettings) -> Self {
        let session_ms = settings.session_timeout.as_millis() as u64;
        let now = Now { monotonic_ms: 1_000, wall_ms: 1_700_000_000_000, entropy: rng.bits() };
        let mut world = Self {
            rng,
            trace,
            engine: Engine::new(settings.clone()),
            settings,
            session_ms,
            now,
            machine: 0,
            model: Model::default(),
            live: Live::default(),
            promises: Promises::default(),
            journal: Vec::new(),
            synced: 0,
            snapshots: BTreeMap::from([(0, Model::default())]),
            rows: Rows::new(),
            checkpoints: Vec::new(),
            logs: Logs::default(),
            out: Effects::default(),
            fresh: Vec::new(),
            seen_writes: 0,
            seen_deliveries: 0,
            seen_reads: 0,
            seen_changes: 0,
            deleting: None,
            pending: VecDeque::new(),
            facts: BTreeMap::new(),
            last_request: 0,
            next_instance: 0,
            scans: Vec::new(),
            letters: Vec::new(),
            held: Vec::new(),
            archive: Vec::new(),
            assigned: BTreeMap::new(),
            deleted: BTreeSet::new(),
            calm: false,
            unreadable: 0,
            keyed: 70,
            next_value: 0,
            next_subscription: 0,
            was_busy: false,
        };
        world.boot(0, false);
        world
    }

    pub(crate) fn note(&self, line: impl FnOnce() -> String) {
        self.trace.note(|| format!("[{} @{}] {}", self.lsn(), self.now.monotonic_ms, line()));
    }

    pub(crate) fn written(&self) -> Lsn {
        self.journal.len() as u64
    }

    /// Number of the frame being staged.
    pub(crate) fn lsn(&self) -> Lsn {
        self.written() + 1
    }

    pub(crate) fn moment(&self) -> Moment {
        Moment { now_ms: self.now.monotonic_ms, lsn: self.lsn() }
    }

    pub(crate) fn instance(&mut self) -> u64 {
        self.next_instance += 1;
        self.next_instance
    }

    // ---- Turns ----

    /// Begins a run on what the engine holds; everything that it holds is on the device. `forgotten`: see [`Live`];
    /// `may_lack`: unsynced writes may be gone.
    pub(crate) fn boot(&mut self, forgotten: Lsn, may_lack: bool) {
        self.out = Effects::default();
        (self.seen_writes, self.seen_deliveries, self.seen_reads, self.seen_changes) = (0, 0, 0, 0);
        self.deleting = None;
        self.pending.clear();
        self.facts.clear();
        self.scans.clear();
        self.letters.clear();
        self.fresh.clear();
        let machine = format!("machine {}", self.machine);
        let (now, lsn) = (self.now, self.lsn());
        self.engine.boot(now, lsn, &machine, &mut self.out);
        self.adopt_gaps(may_lack);
        self.live = Live::boot(&self.model, now.monotonic_ms, lsn, forgotten);
        self.absorb();
        assert!(!self.out.events.is_empty(), "a boot is an event");
        self.end_turn(Fate::Released);
        self.sync(self.written());
    }

    /// After a power loss a partition that had shown unsynced offsets goes on above them.
    fn adopt_gaps(&mut self, may_lack: bool) {
        for info in self.engine.partitions() {
            let log = self.model.logs.get_mut(&info.partition).expect("a partition that the model has");
            assert!(
                info.end == log.end || (may_lack && log.was_written && info.end > log.end),
                "{} ends at {}, expected {}",
                info.partition,
                info.end,
                log.end
            );
            log.end = info.end;
        }
    }

    pub(crate) fn begin_turn(&mut self) {
        let (now, lsn, written, synced) = (self.now, self.lsn(), self.written(), self.synced);
        self.now.entropy = self.rng.bits();
        self.was_busy = false;
        if (self.live.written, self.live.synced) != (written, synced) {
            self.engine.progress(now, lsn, written, synced, &mut self.out);
        }
        (self.live.written, self.live.synced) = (written, synced);
        self.absorb();
        self.check_fresh();
    }

    pub(crate) fn tick(&mut self) {
        let (now, lsn) = (self.now, self.lsn());
        let lost = self.live.end_sessions(now.monotonic_ms, self.session_ms);
        if !lost.members.is_empty() || !lost.consumers.is_empty() {
            self.note(|| format!("sessions over: {lost:?}"));
        }
        let lapsing = self.model.lapsing(now.monotonic_ms, &lost.members);
        for (group, member) in &lost.consumers {
            if let Some(consumer) = self.model.consumers.get_mut(group) {
                consumer.gone(member);
            }
        }
        let already = self.out.ended.len();
        let already_staged = self.out.events.len();
        self.engine.tick(now, lsn, &mut self.out);
        // Which of them comes first is the engine's choice; what follows from it is not.
        let lapses = lapses_of(&self.out.events[already_staged..]);
        let lapsed: BTreeSet<Lapse> = lapses.iter().cloned().collect();
        assert_eq!((lapses.len(), &lapsed), (lapsing.len(), &lapsing), "leases that end unsettled");
        self.model.lapse(self.moment(), &lapses);
        assert_eq!(self.ended_since(already), lost.ended, "subscriptions ended by lost sessions");
        self.absorb();
        self.check_fresh();
    }

    /// Ends the turn: what became ready is handed out, the frame is written, what may leave leaves.
    pub(crate) fn end_turn(&mut self, fate: Fate) {
        let (now, lsn) = (self.now, self.lsn());
        self.engine.finish(now, lsn, &mut self.out);
        self.absorb();
        self.check_fresh();
        if self.rng.chance(40) {
            // What can be read from memory is answered in the same turn.
            self.answer_scans(if self.calm { 100 } else { 90 });
            self.engine.finish(now, lsn, &mut self.out);
            self.absorb();
            self.check_fresh();
        }
        let mut out = std::mem::take(&mut self.out);
        (self.seen_writes, self.seen_deliveries, self.seen_reads, self.seen_changes) = (0, 0, 0, 0);
        self.was_busy |= !out.events.is_empty();
        if fate == Fate::Unwritten {
            return;
        }
        if out.events.is_empty() {
            assert!(out.batches.is_empty() && out.deliveries.is_empty(), "shown without a frame");
            let (_, before) = self.snapshots.last_key_value().expect("there is one of the start");
            assert!(*before == self.model, "changed without an event:\n{before:#?}\n{:#?}", self.model);
        } else {
            let events = Engine::encode_frame(now, &mut out);
            self.journal.push((events, std::mem::take(&mut out.batches)));
            self.snapshots.insert(self.written(), self.model.clone());
        }
        if fate == Fate::Unreleased {
            return;
        }
        let (advances, replies, deliveries) = (out.advances, out.replies, out.deliveries);
        let lsn = self.written();
        self.pending.push_back(Pending { lsn, advances, replies, deliveries });
        self.release();
    }

    /// Ends the run as it should end: the last frame says so and is synced.
    pub(crate) fn stop(&mut self) {
        self.note(|| "stop".to_owned());
        self.engine.stop(&mut self.out);
        self.end_turn(Fate::Released);
        self.sync(self.written());
    }

    /// Frames up to `lsn` have reached the device.
    pub(crate) fn sync(&mut self, lsn: Lsn) {
        assert!(lsn >= self.synced && lsn <= self.written());
        self.synced = lsn;
        while let Some((first, _)) = self.snapshots.first_key_value()
            && *first < lsn
        {
            self.snapshots.pop_first();
        }
        assert!(self.snapshots.contains_key(&lsn), "every frame has its snapshot");
        self.release();
    }

    // ---- Steps ----

    /// One command that is answered; the answer must not leave before `least`.
    pub(crate) fn ask(&mut self, command: Command, least: Level) -> Reply {
        self.last_request += 1;
        let request = RequestId(self.last_request);
        let before = self.out.replies.len();
        let (now, lsn) = (self.now, self.lsn());
        self.engine.step(now, lsn, Some(request), command, &mut self.out);
        assert_eq!(self.out.replies.len(), before + 1, "one answer");
        let reply = &self.out.replies[before];
        assert_eq!(reply.request, request);
        assert!(reply.level >= least, "{reply:?} may leave before {least:?}");
        let reply = reply.reply.clone();
        self.absorb();
        reply
    }

    /// One command without an answer.
    pub(crate) fn tell(&mut self, command: Command) {
        let before = self.out.replies.len();
        let (now, lsn) = (self.now, self.lsn());
        self.engine.step(now, lsn, None, command, &mut self.out);
        assert_eq!(self.out.replies.len(), before, "nobody asked");
        self.absorb();
    }

    /// Subscriptions that the engine ended in this turn, but for the first ones.
    pub(crate) fn ended_since(&self, already: usize) -> BTreeSet<SubscriptionId> {
        self.out.ended[already..].iter().map(|(id, _)| *id).collect()
    }

    pub(crate) fn ended(&self) -> usize {
        self.out.ended.len()
    }

    pub(crate) fn staged_events(&self) -> usize {
        self.out.events.len()
    }

    /// What the last answer promises once it leaves.
    pub(crate) fn promise(&mut self, fact: Fact) {
        self.facts.entry(RequestId(self.last_request)).or_default().push(fact);
    }

    /// The batches that the last step appended; every one must be expected by somebody.
    pub(crate) fn take_fresh(&mut self) -> Vec<Appended> {
        std::mem::take(&mut self.fresh)
    }

    pub(crate) fn put_back_fresh(&mut self, batches: Vec<Appended>) {
        self.fresh = batches;
    }

    /// After a command was told to the model: everything that the engine did must be accounted for.
    pub(crate) fn check_fresh(&mut self) {
        assert!(self.fresh.is_empty(), "nobody asked for these batches: {:?}", self.fresh);
        let reads = self.out.dead_letter_reads[self.seen_reads..].to_vec();
        self.seen_reads = self.out.dead_letter_reads.len();
        for read in reads {
            self.check_letter_read(&read);
            self.letters.push(read);
            self.was_busy = true;
        }
    }

    /// Takes in what the engine did since the last look.
    fn absorb(&mut self) {
        let writes = self.out.segment_writes[self.seen_writes..].to_vec();
        self.seen_writes = self.out.segment_writes.len();
        for write in writes {
            for offset in write.base_offset..=write.last_offset {
                self.promises.mint(write.segment.partition, offset);
            }
            let appended = self.logs.write(&write);
            self.fresh.push(appended);
        }
        let changes = self.out.view_changes[self.seen_changes..].to_vec();
        self.seen_changes = self.out.view_changes.len();
        for change in changes {
            self.log_changed(change);
        }
        for scan in std::mem::take(&mut self.out.scans) {
            assert!(
                scan.until <= self.live.may_show(&scan.partition),
                "looks at what may not be seen: {scan:?}"
            );
            self.scans.push(scan);
            self.was_busy = true;
        }
        let deliveries = self.out.deliveries[self.seen_deliveries..].to_vec();
        self.seen_deliveries = self.out.deliveries.len();
        for delivery in deliveries {
            self.grant(&delivery);
        }
    }

    /// Records go only when they may, and their bytes only when nobody has them in hand.
    fn log_changed(&mut self, change: ViewChange) {
        match change {
            ViewChange::LogStartRaised { partition, log_start } => {
                self.note(|| format!("    {partition} starts at {log_start}"));
                let asked = self.deleting == Some((partition, log_start));
                assert!(
                    asked || self.model.has_outlived(&partition, log_start, self.now.wall_ms),
                    "{partition} may not start at {log_start}"
                );
                assert!(log_start <= self.live.may_show(&partition), "nobody has seen what is deleted");
                self.model.raise_log_start(&partition, log_start);
            }
            ViewChange::SegmentsRemoved { segments } => {
                for segment in segments {
                    let gone = self.logs.remove(segment);
                    let key = segment.partition;
                    let live = gone.end > self.model.logs[&key].log_start && !gone.is_empty();
                    let in_hand = self.model.in_hand(&key, gone.start, gone.end);
                    assert!(!live && !in_hand, "{segment:?} to {} is needed", gone.end);
                }
            }
            _ => {}
        }
    }

    /// There was room for as many leases, and for as many new records among them.
    fn check_room(&self, delivery: &Delivery) {
        let group = &self.live.subscriptions[&delivery.subscription].group;
        let records = &self.model.shares[group].parts[&delivery.partition].records;
        let leases = records.values().filter(|record| record.lease_deadline().is_some()).count() as u64;
        let new =
            delivery.records.iter().filter(|record| !records.contains_key(&record.offset)).count() as u64;
        let all = delivery.records.len() as u64;
        let has_room = leases + all <= self.most_leases();
        assert!(has_room && (new == 0 || leases + new <= self.settings.max_leases), "no room: {delivery:?}");
    }

    fn grant(&mut self, delivery: &Delivery) {
        let key = delivery.partition;
        let (may_show, synced) = (self.live.may_show(&key), self.live.synced);
        self.check_room(delivery);
        let subscription = self.live.subscriptions.get_mut(&delivery.subscription);
        let subscription = subscription.expect("handed out to a subscription that is not open");
        let group = subscription.group.clone();
        let member = subscription.member.clone();
        for (i, record) in delivery.records.iter().enumerate() {
            let lease = nth(delivery.first_lease, i);
            let size = self.model.logs[&key].entries.get(&record.offset).map_or(0, |entry| entry.size);
            assert!(delivery.records.len() > 1 || subscription.has_credit(), "no credit: {delivery:?}");
            subscription.records -= 1;
            subscription.bytes -= i64::from(size);
            let grant = Grant {
                offset: record.offset,
                lease,
                member: member.as_str().into(),
                deliveries: record.deliveries,
                failures: record.failures,
            };
            let at = Moment { now_ms: self.now.monotonic_ms, lsn: self.journal.len() as u64 + 1 };
            self.trace.note(|| format!("    grant {group} {key} {} {lease:?} to {member}", record.offset));
            self.model.granted(at, &group, key, &grant, may_show, synced);
            let instance = self.model.shares[&group].parts[&key].instance;
            self.promises.name_lease(lease, (group.clone(), key, instance), record.offset);
        }
        assert!(subscription.records >= 0, "more than the credit in records: {delivery:?}");
        assert_eq!(delivery.lease_ms, self.model.shares[&group].config.lease_ms);
    }

    /// Whether an answer to an ack says that the record is done with.
    pub(crate) fn says_done(status: SettleStatus) -> bool {
        use SettleStatus::{AlreadySettled, Duplicate, Late, Ok};
        matches!(status, Ok | Late | Duplicate | AlreadySettled)
    }
}

/// The leases that these events end because nobody settled them in time.
fn lapses_of(events: &[Event]) -> Vec<Lapse> {
    let mut lapses = Vec::new();
    for event in events {
        let Some(Kind::Settled(settled)) = &event.kind else { continue };
        let topic = TopicId::from_slice(&settled.topic_id).expect("the id of a topic");
        let key = PartitionKey { topic, partition: settled.partition };
        let ended =
            settled.changes.iter().filter(|change| [LEASE_EXPIRED, MEMBER_LOST].contains(&change.cause));
        lapses.extend(ended.map(|change| (settled.group.clone(), key, change.offset)));
    }
    lapses
}
