//! Members of share groups: they take records, settle them in every way, and sometimes say the same twice, something else,
//! or something about a record that is not theirs.

use felucca_broker::engine::command::{AppendEntry, Command, FailureDetail, LeaseRef, Outcome, Settlement};
use felucca_broker::engine::effect::{Delivery, RecordState, Reply, SettleResult, SettleStatus};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{LeaseId, Level, SubscriptionId};

use super::client::{Asked, Known, Outgoing};
use super::content::{Identity, batch, staged};
use super::history::OUTPUTS;
use crate::engine_model::rng::Rng;

/// Records that a worker takes at a time.
const CREDIT_RECORDS: u32 = 8;
const CREDIT_BYTES: u32 = 64 << 10;
/// More than a record takes.
const RECORD_BYTES: u32 = 12_000;
/// How often a worker lets itself be seen.
const SEEN_MS: u64 = 1_000;
/// Old leases that a worker remembers, to settle them again.
const REMEMBERED: usize = 12;

#[derive(Clone, Debug)]
struct Held {
    record: LeaseRef,
    /// A settlement is under way.
    settling: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) group: String,
    pub(crate) member: String,
    number: u32,
    held: Vec<Held>,
    /// Settled before, with what was said then.
    past: Vec<Settlement>,
    /// Leases of others that it has heard of.
    foreign: Vec<LeaseRef>,
    subscribed: bool,
    outputs: u32,
    seen_at_ms: u64,
}

/// How a worker does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Random,
    /// Acknowledges everything.
    Obedient,
}

impl Worker {
    pub(crate) fn new(group: &str, member: &str, number: u32) -> Self {
        Self {
            group: group.to_owned(),
            member: member.to_owned(),
            number,
            held: Vec::new(),
            past: Vec::new(),
            foreign: Vec::new(),
            subscribed: false,
            outputs: 0,
            seen_at_ms: 0,
        }
    }

    /// On a new connection, or when its subscription ended.
    pub(crate) fn subscribe(&mut self, out: &mut Outgoing) {
        self.held.iter_mut().for_each(|held| held.settling = false);
        self.subscribed = true;
        let held: Vec<LeaseRef> = self.held.iter().map(|held| held.record).collect();
        let command = Command::ShareSubscribe {
            // The broker's end of the connection names it.
            subscription: SubscriptionId(0),
            group: self.group.clone(),
            member: self.member.clone(),
            credit_records: CREDIT_RECORDS.saturating_sub(held.len() as u32),
            credit_bytes: CREDIT_BYTES,
            held: held.clone(),
        };
        out.push((
            Asked::Subscribe { group: self.group.clone(), member: self.member.clone(), held },
            command,
        ));
    }

    pub(crate) fn delivered(&mut self, delivery: &Delivery, out: &mut Outgoing) {
        let before = self.held.len() + delivery.records.len();
        for (at, record) in (0..).zip(&delivery.records) {
            let LeaseId { boot_epoch, sequence } = delivery.first_lease;
            let lease = LeaseId { boot_epoch, sequence: sequence + at };
            let record = LeaseRef { partition: delivery.partition, offset: record.offset, lease };
            self.held.retain(|held| {
                (held.record.partition, held.record.offset) != (record.partition, record.offset)
            });
            self.held.push(Held { record, settling: false });
        }
        self.give_credit(before - self.held.len(), out);
    }

    /// For records that are not held any more.
    fn give_credit(&self, records: usize, out: &mut Outgoing) {
        if records > 0 {
            let (subscription, records) = (SubscriptionId(0), records as u32);
            let bytes = records * RECORD_BYTES;
            out.push((Asked::Credit, Command::ShareCredit { subscription, records, bytes }));
        }
    }

    /// A lease that another worker was given.
    pub(crate) fn hear_of(&mut self, record: LeaseRef) {
        self.foreign.truncate(2);
        self.foreign.insert(0, record);
    }

    pub(crate) fn act(&mut self, rng: &mut Rng, known: &Known<'_>, manner: Manner, out: &mut Outgoing) {
        if !self.subscribed {
            self.subscribe(out);
            return;
        }
        if known.now_ms >= self.seen_at_ms {
            self.seen_at_ms = known.now_ms + SEEN_MS;
            let (group, member) = (self.group.clone(), self.member.clone());
            let command = Command::MembersSeen { members: vec![(group.clone(), member.clone())] };
            out.push((Asked::Seen { group, member }, command));
        }
        let free: Vec<usize> = (0..self.held.len())
            .filter(|at| manner == Manner::Obedient || !self.held[*at].settling)
            .collect();
        if manner == Manner::Obedient {
            let all: Vec<Settlement> = free
                .iter()
                .filter(|at| !self.held[**at].settling)
                .map(|at| Settlement { record: self.held[*at].record, outcome: Outcome::Ack })
                .collect();
            self.settle(Level::Synced, all, out);
            return;
        }
        match rng.below(100) {
            0..7 => self.complete(rng, known, &free, out),
            7..20 => self.settle_strangely(rng, out),
            _ => {
                let count = rng.between(1, 4) as usize;
                let first = rng.below(free.len() as u64 + 1) as usize;
                let chosen: Vec<Settlement> = free
                    .iter()
                    .skip(first.min(free.len().saturating_sub(count)))
                    .take(count)
                    .map(|at| Settlement { record: self.held[*at].record, outcome: outcome(rng) })
                    .collect();
                let level = if rng.chance(20) { Level::Written } else { Level::Synced };
                self.settle(level, chosen, out);
            }
        }
    }

    fn settle(&mut self, level: Level, settlements: Vec<Settlement>, out: &mut Outgoing) {
        if settlements.is_empty() {
            return;
        }
        for held in &mut self.held {
            held.settling |= settlements.iter().any(|settlement| settlement.record == held.record);
        }
        let (group, member) = (self.group.clone(), self.member.clone());
        let asked = Asked::Settle {
            group: group.clone(),
            member: member.clone(),
            level,
            settlements: settlements.clone(),
        };
        out.push((asked, Command::Settle { group, member, level, settlements }));
    }

    /// Says once more what became of a record, or something else, or speaks about another's record.
    fn settle_strangely(&mut self, rng: &mut Rng, out: &mut Outgoing) {
        let mut settlements = Vec::new();
        if let Some(past) = rng.pick(&self.past).cloned() {
            let outcome = if rng.chance(50) { past.outcome } else { outcome(rng) };
            settlements.push(Settlement { record: past.record, outcome });
        }
        if rng.chance(40)
            && let Some(record) = rng.pick(&self.foreign).copied()
        {
            settlements.push(Settlement { record, outcome: outcome(rng) });
        }
        self.settle(Level::Synced, settlements, out);
    }

    fn complete(&mut self, rng: &mut Rng, known: &Known<'_>, free: &[usize], out: &mut Outgoing) {
        let Some(at) = rng.pick(free).copied() else { return };
        self.held[at].settling = true;
        let record = self.held[at].record;
        let (maker, first) = (OUTPUTS + self.number, self.outputs);
        self.outputs += 1;
        let staged = staged(batch(maker, first, 1, None, known.wall_ms));
        let output = Identity { maker, number: first, redrives: 0 };
        let partition = known.done;
        let outputs = vec![AppendEntry { partition: known.done, batch: staged }];
        let (group, member) = (self.group.clone(), self.member.clone());
        let asked =
            Asked::Complete { group: group.clone(), member: member.clone(), record, partition, output };
        out.push((asked, Command::Complete { group, member, record, outputs }));
    }

    pub(crate) fn answered(&mut self, asked: &Asked, reply: &Reply, out: &mut Outgoing) {
        match (asked, reply) {
            (Asked::Subscribe { .. }, Reply::Done) | (Asked::Credit | Asked::Seen { .. }, _) => {}
            (Asked::Settle { settlements, .. }, Reply::Settled(results)) => {
                for (settlement, result) in settlements.iter().zip(results) {
                    self.settled(settlement, result, out);
                }
            }
            (Asked::Complete { record, .. }, Reply::Completed { result, .. }) => {
                self.settled(&Settlement { record: *record, outcome: Outcome::Ack }, result, out);
            }
            (asked, Reply::Error(error)) => match error {
                EngineError::ReadOnly(_) | EngineError::Stopping | EngineError::LimitReached { .. } => {
                    self.subscribed &= !matches!(asked, Asked::Subscribe { .. });
                    self.held.iter_mut().for_each(|held| held.settling = false);
                }
                error => panic!("a worker is told: {error}"),
            },
            (asked, reply) => panic!("{reply:?} to {asked:?}"),
        }
    }

    fn settled(&mut self, settlement: &Settlement, result: &SettleResult, out: &mut Outgoing) {
        let still_leased = matches!(settlement.outcome, Outcome::Extend { .. })
            && result.status == SettleStatus::Ok
            && result.state == Some(RecordState::Leased);
        let before = self.held.len();
        if still_leased {
            let held = self.held.iter_mut().find(|held| held.record == settlement.record);
            if let Some(held) = held {
                held.settling = false;
            }
        } else {
            self.held.retain(|held| held.record != settlement.record);
            self.past.truncate(REMEMBERED - 1);
            self.past.insert(0, settlement.clone());
        }
        self.give_credit(before - self.held.len(), out);
    }

    pub(crate) fn ended(&mut self) {
        self.subscribed = false;
    }
}

fn outcome(rng: &mut Rng) -> Outcome {
    let detail = FailureDetail { class: "wrong".to_owned(), ..FailureDetail::default() };
    match rng.below(100) {
        0..52 => Outcome::Ack,
        52..72 => {
            let delay_ms = rng.chance(40).then(|| rng.below(2_000));
            Outcome::Nack { delay_ms, counted: rng.chance(80), detail }
        }
        72..78 => Outcome::Reject { detail },
        78..88 => Outcome::Release,
        _ => Outcome::Extend { remaining_ms: rng.chance(60).then(|| rng.below(4_000)) },
    }
}
