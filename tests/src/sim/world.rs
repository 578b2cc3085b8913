//! Everything that is simulated, and the steps that it takes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use felucca_broker::broker::Broker;
use felucca_broker::cleaner::{CleanError, Step, SteppedCleaner};
use felucca_broker::disk::{Disk, MemDisk};
use felucca_broker::engine::cleaning::Goal;
use felucca_broker::engine::command::{Command, LeaseRef};
use felucca_broker::engine::effect::Delivery;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Lsn, PartitionKey, SubscriptionId, TopicId};
use felucca_broker::environment::Environment;
use felucca_broker::log::ReadError;
use felucca_broker::shard::{
    Answer, Did, Origin, Responder, Sink, Stepped, StorageOptions, Submission, Token,
};
use parking_lot::Mutex;

use super::Plan;
use super::admin::Admin;
use super::client::{Asked, Client, Known, Outgoing, Role, Target};
use super::coverage::Coverage;
use super::faults::Fault;
use super::history::{ANONYMOUS, History};
use super::leases::Leases;
use super::network::{ClientId, ConnectionId, Network, Push, Request};
use super::trace::Trace;
use super::worker::Manner;
use crate::engine_model::rng::Rng;

/// Where the broker keeps its data.
pub(crate) const DATA: &str = "/data";
/// When the simulated world begins.
const BEGINNING_MS: i64 = 1_700_000_000_000;
/// Requests taken from one connection in one step.
const BURST: u64 = 4;

/// What the broker says, in its order.
type Mail = Arc<Mutex<Vec<(ConnectionId, Push)>>>;

/// The broker's end of a connection.
#[derive(Debug)]
struct Line {
    connection: ConnectionId,
    mail: Mail,
}

impl Line {
    fn say(&self, push: Push) -> bool {
        self.mail.lock().push((self.connection, push));
        false
    }
}

impl Sink for Line {
    fn answer(&self, answer: Answer) -> bool {
        self.say(Push::Reply { correlation: answer.token.correlation, reply: answer.reply })
    }

    fn deliver(&self, delivery: Delivery) -> bool {
        self.say(Push::Delivery(delivery))
    }

    fn ended(&self, _: SubscriptionId, _: EngineError) -> bool {
        self.say(Push::Ended)
    }

    fn wake(&self) {}
}

/// A connection as the broker knows it.
#[derive(Debug)]
pub(crate) struct Served {
    origin: Arc<Origin>,
    subscriptions: Vec<SubscriptionId>,
}

/// A request that was not answered yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) asked: Asked,
    /// Monotonic time when the broker got it.
    pub(crate) handed_ms: u64,
    /// For each settlement: whether its lease was not the record's last then.
    pub(crate) stale: Vec<bool>,
    /// What was known to be committed then.
    pub(crate) floor: BTreeMap<PartitionKey, u64>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) seed: u64,
    /// Of the step.
    pub(crate) rng: Rng,
    trace: Rc<RefCell<Trace>>,
    pub(crate) coverage: Coverage,
    pub(crate) environment: Environment,
    pub(crate) disk: MemDisk,
    pub(crate) options: StorageOptions,
    pub(crate) shard: Option<Stepped>,
    pub(crate) broker: Option<Broker>,
    pub(crate) cleaner: Option<SteppedCleaner>,
    /// The last frame that is safe on the device, as of the last run.
    pub(crate) safe: Lsn,
    /// The engine's time when the last run ended.
    pub(crate) ended_ms: u64,
    /// The last frame written at that time.
    pub(crate) ended_at: Lsn,
    /// What each frame says was synced before it.
    pub(crate) told: BTreeMap<Lsn, Lsn>,
    mail: Mail,
    pub(crate) network: Network,
    pub(crate) clients: Vec<Client>,
    served: BTreeMap<ConnectionId, Served>,
    /// Group and member of each subscription.
    members: BTreeMap<SubscriptionId, (String, String)>,
    pub(crate) pending: BTreeMap<u64, Pending>,
    correlation: u64,
    pub(crate) now_ms: u64,
    pub(crate) history: History,
    pub(crate) leases: Leases,
    pub(crate) committed: BTreeMap<(String, PartitionKey), u64>,
    pub(crate) targets: Vec<Target>,
    pub(crate) done: PartitionKey,
    pub(crate) admin: Admin,
    /// Which fault comes in which step.
    pub(crate) plan: BTreeMap<u64, Fault>,
    pub(crate) faults: u64,
    /// A disk that was made full has room again then.
    pub(crate) room_at_ms: Option<u64>,
    /// Something was done to the disk so that the broker may fail to write, or to start.
    pub(crate) harmed: bool,
    /// Everything is healed: clients finish what they have.
    pub(crate) calm: bool,
    /// Connections by which the world itself asks.
    asks: ConnectionId,
}

impl World {
    pub(crate) fn new(plan: &Plan, trace: Rc<RefCell<Trace>>) -> Self {
        let mut rng = Rng::new(plan.seed);
        let environment = Environment::simulated(rng.bits(), BEGINNING_MS);
        let options = super::setup::storage(&mut rng, environment.clone());
        let disk = MemDisk::new();
        disk.create_dir(Path::new(DATA)).expect("a disk without faults");
        let faults = Fault::plan(&mut rng, plan.steps);
        let mut leases = Leases::default();
        leases.session_ms = u64::try_from(options.engine.session_timeout.as_millis()).expect("a few seconds");
        Self {
            seed: plan.seed,
            rng,
            trace,
            coverage: Coverage::default(),
            environment,
            disk,
            options,
            shard: None,
            broker: None,
            cleaner: None,
            safe: 0,
            ended_ms: 0,
            ended_at: 0,
            told: BTreeMap::new(),
            mail: Mail::default(),
            network: Network::default(),
            clients: Vec::new(),
            served: BTreeMap::new(),
            members: BTreeMap::new(),
            pending: BTreeMap::new(),
            correlation: 0,
            now_ms: 0,
            history: History::default(),
            leases,
            committed: BTreeMap::new(),
            targets: Vec::new(),
            done: PartitionKey { topic: TopicId([0; 16]), partition: 0 },
            admin: Admin::default(),
            plan: faults,
            faults: 0,
            room_at_ms: None,
            harmed: false,
            calm: false,
            asks: ConnectionId::MAX,
        }
    }

    pub(crate) fn note(&self, line: impl FnOnce() -> String) {
        self.trace.borrow_mut().note(line());
    }

    pub(crate) fn faults_met(&self) -> u64 {
        self.faults
    }

    /// The disk as the broker has it.
    pub(crate) fn storage(&self) -> Arc<dyn Disk> {
        Arc::new(self.disk.clone())
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.environment.pass(Duration::from_millis(ms));
    }

    /// The engine's time; without a broker, when the last one ended.
    pub(crate) fn monotonic_ms(&self) -> u64 {
        self.shard.as_ref().map_or(self.ended_ms, Stepped::monotonic_ms)
    }

    /// The last frame that may have been written.
    pub(crate) fn written(&self) -> Lsn {
        self.shard.as_ref().map_or(self.ended_at, Stepped::written)
    }

    /// One step: drawn from the seed and its number.
    pub(crate) fn step(&mut self, number: u64) {
        self.rng =
            Rng::new(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (number + 1).wrapping_mul(0x85eb_ca77));
        if self.rng.chance(60) {
            let ms = self.rng.below(4);
            self.pass(ms);
        }
        match self.plan.get(&number).copied() {
            Some(fault) => self.suffer(fault),
            None => self.act(),
        }
        self.recover_from_harm();
        self.check_step();
    }

    fn act(&mut self) {
        match self.rng.below(100) {
            0..24 => {
                let client = self.rng.below(self.clients.len() as u64) as usize;
                self.client_acts(client);
            }
            24..40 => self.some_arrive_up(),
            40..50 => self.some_arrive_down(),
            50..64 => self.shard_steps("turn", Stepped::turn),
            64..71 => self.shard_steps("sync", Stepped::sync),
            71..78 => self.shard_steps("release", Stepped::release),
            78..83 => self.shard_steps("checkpoint", Stepped::checkpoint),
            83..86 => self.shard_steps("segments", Stepped::write_segments),
            86..87 => {
                if let Some(shard) = &mut self.shard {
                    shard.prepare_files();
                }
            }
            87..91 => self.shard_steps("read", Stepped::read),
            91..94 => self.read_some(),
            94..97 => {
                for _ in 0..self.rng.between(1, 3) {
                    self.clean();
                }
            }
            _ => {
                let ms = if self.rng.chance(20) { self.rng.between(200, 2_000) } else { self.rng.below(60) };
                self.note(|| format!("{ms} ms pass"));
                self.pass(ms);
            }
        }
    }

    /// One step of the shard, and what it says.
    pub(crate) fn shard_steps(&mut self, name: &str, step: impl FnOnce(&mut Stepped) -> Did) {
        let Some(shard) = &mut self.shard else { return };
        let before = (shard.written(), shard.synced());
        let did = step(shard);
        let (written, synced) = (shard.written(), shard.synced());
        if did == Did::Nothing {
            return;
        }
        if written > before.0 {
            self.told.insert(written, before.1);
        }
        if !(name == "turn" && written == before.0) {
            let ms = self.monotonic_ms();
            self.note(|| format!("{name} at {ms}: {written} written, {synced} synced"));
        }
        self.hear_broker();
    }

    /// The cleaner goes on.
    pub(crate) fn clean(&mut self) {
        let Some(cleaner) = &mut self.cleaner else { return };
        match cleaner.step() {
            Ok(Step::Nothing | Step::Work) => {}
            Ok(Step::Cleaned(goal, done)) => {
                self.note(|| format!("cleaned: {goal:?} {done:?}"));
                let what = if goal == Goal::Survivors {
                    "pinned records copied aside"
                } else {
                    "records compacted away"
                };
                self.coverage.meet_often("log", what, done.dropped);
                self.coverage.meet_often("log", "cleaning cut short", u64::from(done.cut_short));
            }
            Err(CleanError::Read(ReadError::Corrupt { reason, .. })) => {
                panic!("the cleaner finds damage: {reason}")
            }
            Err(error @ CleanError::Batch { .. }) => panic!("the cleaner finds damage: {error}"),
            Err(error) => {
                self.note(|| format!("not cleaned: {error}"));
                self.coverage.meet("log", "cleaning failed");
            }
        }
    }

    /// What the broker has said goes on its way.
    pub(crate) fn hear_broker(&mut self) {
        let said = std::mem::take(&mut *self.mail.lock());
        for (connection, push) in said {
            match &push {
                Push::Reply { correlation, reply } => self.reply_left(*correlation, reply),
                Push::Delivery(delivery) => self.delivery_left(delivery),
                Push::Ended => {}
            }
            self.network.send_down(&mut self.rng, self.now_ms, connection, push);
        }
    }

    /// What the broker said last is lost with its process.
    pub(crate) fn forget_mail(&mut self) {
        self.mail.lock().clear();
        self.served.clear();
        self.members.clear();
    }

    pub(crate) fn client_acts(&mut self, client: ClientId) {
        if self.clients[client].sleeps_until_ms > self.now_ms {
            return;
        }
        let mut out = Outgoing::new();
        let known = Known {
            now_ms: self.now_ms,
            wall_ms: self.environment.wall_ms(),
            targets: &self.targets,
            done: self.done,
        };
        if self.clients[client].connection.is_none() {
            if self.shard.is_none() {
                return;
            }
            let connection = self.network.connect(&mut self.rng, client);
            let line = Line { connection, mail: self.mail.clone() };
            let served = Served { origin: Origin::new(Arc::new(line), None), subscriptions: Vec::new() };
            self.served.insert(connection, served);
            self.clients[client].connection = Some(connection);
            match &mut self.clients[client].role {
                Role::Producer(producer) => producer.connected(&known, &mut out),
                Role::Consumer(consumer) => consumer.connected(),
                Role::Worker(worker) => worker.subscribe(&mut out),
                Role::Redriver(redriver) => redriver.subscribe(&mut out),
                Role::Admin => self.admin.connected(),
            }
        }
        let manner = if self.calm { Manner::Obedient } else { Manner::Random };
        match &mut self.clients[client].role {
            Role::Producer(producer) => producer.act(&mut self.rng, &known, !self.calm, &mut out),
            Role::Worker(worker) => worker.act(&mut self.rng, &known, manner, &mut out),
            Role::Redriver(redriver) => {
                redriver.act(&mut self.rng, &known, self.broker.as_ref(), self.calm, &mut out);
            }
            Role::Admin => {
                let calm = self.calm;
                self.admin.act(&mut self.rng, &known, &self.history, calm, &mut out);
            }
            Role::Consumer(consumer) => {
                if let Some(broker) = &self.broker {
                    super::reader::consume(broker, consumer);
                }
                consumer.act(&mut self.rng, &known, &mut out);
            }
        }
        self.send(client, out);
    }

    pub(crate) fn send(&mut self, client: ClientId, out: Outgoing) {
        let Some(connection) = self.clients[client].connection else { return };
        for (asked, command) in out {
            self.correlation += 1;
            let correlation = self.correlation;
            self.note(|| format!("client {client} on {connection} sends {correlation}: {}", asked.text()));
            let pending = Pending { asked, handed_ms: 0, stale: Vec::new(), floor: BTreeMap::new() };
            self.pending.insert(correlation, pending);
            let request = Request { correlation, command };
            self.network.send_up(&mut self.rng, self.now_ms, connection, request);
        }
    }

    fn some_arrive_up(&mut self) {
        let ready = self.network.ready_up(self.now_ms);
        let Some(connection) = self.rng.pick(&ready).copied() else { return };
        for _ in 0..self.rng.between(1, BURST) {
            if !self.arrives_up(connection) {
                return;
            }
        }
    }

    /// The next request of a connection reaches the broker, or its end does; false if there is nothing (more).
    pub(crate) fn arrives_up(&mut self, connection: ConnectionId) -> bool {
        if !self.network.ready_up(self.now_ms).contains(&connection) {
            return false;
        }
        match self.network.take_up(connection) {
            Some(request) => {
                self.hand_in(connection, request);
                true
            }
            None => {
                self.end_served(connection);
                false
            }
        }
    }

    /// The broker finds a connection closed.
    pub(crate) fn end_served(&mut self, connection: ConnectionId) {
        let Some(served) = self.served.remove(&connection) else { return };
        let Some(broker) = &self.broker else { return };
        let left = served.subscriptions.into_iter();
        broker
            .submit(left.map(|subscription| Submission::silent(Command::ShareUnsubscribe { subscription })));
    }

    fn hand_in(&mut self, connection: ConnectionId, request: Request) {
        let Request { correlation, mut command } = request;
        let monotonic_ms = self.monotonic_ms();
        let (Some(broker), Some(served)) = (&self.broker, self.served.get_mut(&connection)) else { return };
        match &mut command {
            Command::ShareSubscribe { subscription, .. } => {
                *subscription = broker.new_subscription();
                served.subscriptions.push(*subscription);
            }
            Command::GroupHeartbeat { connection: on, .. }
            | Command::CommitOffsets { connection: on, .. } => {
                *on = connection;
            }
            Command::ShareCredit { subscription, .. } => match served.subscriptions.last() {
                Some(last) => *subscription = *last,
                None => return,
            },
            _ => {}
        }
        let Some(pending) = self.pending.get_mut(&correlation) else { return };
        pending.handed_ms = monotonic_ms;
        match &pending.asked {
            Asked::Append { sent, .. } => {
                for sent in sent {
                    self.history.send(sent.partition, sent.identities());
                }
                let records = sent.iter().flat_map(super::client::Sent::identities);
                self.history.hand(records.filter(|identity| identity.maker >= ANONYMOUS));
            }
            Asked::Complete { group, member, output, record, .. } => {
                self.history.hand([*output].into_iter());
                let ack = super::answers::ack(*record);
                pending.stale = self.leases.asked(monotonic_ms, group, member, &[ack]);
            }
            Asked::Settle { group, member, settlements, .. } => {
                pending.stale = self.leases.asked(monotonic_ms, group, member, settlements);
            }
            Asked::Subscribe { group, member, held } => {
                let name = (group.clone(), member.clone());
                self.members.extend(served.subscriptions.last().map(|id| (*id, name)));
                self.leases.subscribed(monotonic_ms, group, member, held);
            }
            Asked::Seen { group, member } => self.leases.hear(monotonic_ms, group, member),
            Asked::Fetch { group, partitions } => {
                let asked = partitions.iter().map(|key| (group.clone(), *key));
                let known = asked.filter_map(|name| Some((name.1, *self.committed.get(&name)?)));
                pending.floor = known.collect();
            }
            Asked::DeleteRecords { key, before } => self.history.delete_below(*key, *before, false),
            Asked::DeleteTopic { topic } => self.history.remove_topic(topic),
            Asked::Seek { group } => {
                self.leases.moved.insert(group.clone());
            }
            _ => {}
        }
        let responder = Responder::new(&served.origin, Token { correlation, tag: 0 });
        broker.submit([Submission::new(command, responder, 0)]);
    }

    fn some_arrive_down(&mut self) {
        let ready = self.network.ready_down(self.now_ms);
        let Some(connection) = self.rng.pick(&ready).copied() else { return };
        for _ in 0..self.rng.between(1, BURST) {
            if !self.arrives_down(connection) {
                return;
            }
        }
    }

    /// The next thing that the broker said on a connection reaches its client, or its end does; false if there is no more.
    pub(crate) fn arrives_down(&mut self, connection: ConnectionId) -> bool {
        if !self.network.ready_down(self.now_ms).contains(&connection) {
            return false;
        }
        let Some(client) = self.network.client_of(connection) else { return false };
        let push = self.network.take_down(connection);
        if self.clients[client].connection != Some(connection) {
            return true;
        }
        let Some(push) = push else {
            self.clients[client].connection = None;
            return false;
        };
        self.client_hears(client, push);
        true
    }

    fn client_hears(&mut self, client: ClientId, push: Push) {
        let known = Known {
            now_ms: self.now_ms,
            wall_ms: self.environment.wall_ms(),
            targets: &self.targets,
            done: self.done,
        };
        let mut out = Outgoing::new();
        match push {
            Push::Reply { correlation, reply } => {
                let Some(pending) = self.pending.remove(&correlation) else { return };
                match &mut self.clients[client].role {
                    Role::Producer(producer) => producer.answered(&known, &pending.asked, &reply),
                    Role::Consumer(consumer) => consumer.answered(&pending.asked, &reply),
                    Role::Worker(worker) => worker.answered(&pending.asked, &reply, &mut out),
                    Role::Redriver(redriver) => redriver.answered(&pending.asked, &reply, &mut out),
                    Role::Admin => self.admin.answered(&pending.asked, &reply),
                }
            }
            Push::Delivery(delivery) => match &mut self.clients[client].role {
                Role::Worker(worker) => {
                    worker.delivered(&delivery, &mut out);
                    self.spread_the_word(client, &delivery);
                }
                Role::Redriver(redriver) => redriver.delivered(&delivery),
                _ => {}
            },
            Push::Ended => match &mut self.clients[client].role {
                Role::Worker(worker) => worker.ended(),
                Role::Redriver(redriver) => redriver.ended(),
                _ => {}
            },
        }
        self.send(client, out);
    }

    /// Another worker of the group hears of a lease that is not its own.
    fn spread_the_word(&mut self, of: ClientId, delivery: &Delivery) {
        let Role::Worker(from) = &self.clients[of].role else { return };
        let group = from.group.clone();
        let Some(record) = delivery.records.first() else { return };
        let record =
            LeaseRef { partition: delivery.partition, offset: record.offset, lease: delivery.first_lease };
        for (at, client) in self.clients.iter_mut().enumerate() {
            if let Role::Worker(worker) = &mut client.role
                && at != of
                && worker.group == group
            {
                worker.hear_of(record);
            }
        }
    }

    /// Asks the broker something that it can answer at once; `None` if it cannot.
    pub(crate) fn ask(&mut self, command: Command) -> Option<felucca_broker::engine::effect::Reply> {
        let line = Line { connection: self.asks, mail: self.mail.clone() };
        let origin = Origin::new(Arc::new(line), None);
        let responder = Responder::new(&origin, Token { correlation: 0, tag: 0 });
        self.broker.as_ref()?.submit([Submission::new(command, responder, 0)]);
        for _ in 0..20 {
            let asks = self.asks;
            self.settle_shard();
            let mut mail = self.mail.lock();
            let at = mail.iter().position(|(connection, _)| *connection == asks);
            let answer = at.map(|at| mail.remove(at).1);
            drop(mail);
            self.hear_broker();
            if let Some(Push::Reply { reply, .. }) = answer {
                return Some(reply);
            }
        }
        None
    }

    /// Turn, sync and release, whose sayings wait to be heard.
    fn settle_shard(&mut self) {
        let Some(shard) = &mut self.shard else { return };
        for _ in 0..3 {
            let before = (shard.written(), shard.synced());
            shard.turn();
            if shard.written() > before.0 {
                self.told.insert(shard.written(), before.1);
            }
            shard.sync();
            shard.release();
        }
    }

    /// Group and member that a delivery is for.
    pub(crate) fn member_of(&self, delivery: &Delivery) -> Option<(String, String)> {
        self.members.get(&delivery.subscription).cloned()
    }

    /// Groups that have workers.
    pub(crate) fn share_groups(&self) -> BTreeSet<String> {
        let group = |client: &Client| match &client.role {
            Role::Worker(worker) => Some(worker.group.clone()),
            _ => None,
        };
        self.clients.iter().filter_map(group).collect()
    }
}
