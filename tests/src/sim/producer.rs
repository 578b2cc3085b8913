//! Those who send records: idempotent ones, which send again what was not answered, and others.

use std::collections::{BTreeMap, VecDeque};

use felucca_broker::engine::command::{AppendEntry, Command};
use felucca_broker::engine::effect::Reply;
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{Level, PartitionKey};

use super::client::{Asked, Known, Outgoing, Sent};
use super::content::{batch, staged};
use super::history::{ANONYMOUS, PER_TARGET};
use crate::engine_model::rng::Rng;

/// Batches under way in one partition: no more than the broker remembers of a producer.
const IN_FLIGHT: usize = 4;
/// Pause before what was refused is sent again.
const PAUSE_MS: u64 = 100;

/// A batch that was not acknowledged.
#[derive(Clone, Debug)]
struct Batch {
    first: u32,
    count: u32,
    level: Level,
    made_ms: i64,
}

/// What a producer has for one partition.
#[derive(Debug, Default)]
struct Lane {
    /// Records made for it so far.
    made: u32,
    waiting: VecDeque<Batch>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Producer {
    /// Its number as a maker: fixed for one that is not idempotent, otherwise given by the broker.
    maker: Option<u32>,
    idempotent: bool,
    asked_for_id: bool,
    lanes: BTreeMap<usize, Lane>,
    resend_at_ms: Option<u64>,
}

impl Producer {
    pub(crate) fn idempotent() -> Self {
        Self {
            maker: None,
            idempotent: true,
            asked_for_id: false,
            lanes: BTreeMap::new(),
            resend_at_ms: None,
        }
    }

    pub(crate) fn anonymous(number: u32) -> Self {
        Self { maker: Some(ANONYMOUS + number), idempotent: false, ..Self::idempotent() }
    }

    pub(crate) fn connected(&mut self, known: &Known<'_>, out: &mut Outgoing) {
        self.asked_for_id = false;
        self.resend(known, out);
    }

    fn resend(&mut self, known: &Known<'_>, out: &mut Outgoing) {
        self.resend_at_ms = None;
        let Some(maker) = self.maker else { return };
        for (&target, lane) in &self.lanes {
            for batch in &lane.waiting {
                out.push(request(maker, self.idempotent, known, &[(target, batch)]));
            }
        }
    }

    /// Whether everything that was sent has been acknowledged.
    pub(crate) fn is_done(&self) -> bool {
        self.lanes.values().all(|lane| lane.waiting.is_empty())
    }

    /// Sends what is new, if `fresh`, and what has to be sent again.
    pub(crate) fn act(&mut self, rng: &mut Rng, known: &Known<'_>, fresh: bool, out: &mut Outgoing) {
        let Some(maker) = self.maker else {
            if !self.asked_for_id {
                self.asked_for_id = true;
                out.push((Asked::ProducerId, Command::InitProducer));
            }
            return;
        };
        if let Some(at_ms) = self.resend_at_ms {
            if known.now_ms >= at_ms {
                self.resend(known, out);
            }
            return;
        }
        if !fresh {
            return;
        }
        let count = if rng.chance(15) { 2 } else { 1 };
        let first = rng.below(known.targets.len() as u64) as usize;
        let mut batches = Vec::new();
        for target in (first..known.targets.len()).take(count) {
            let lane = self.lanes.entry(target).or_default();
            if lane.waiting.len() >= IN_FLIGHT {
                continue;
            }
            let may_write = known.targets[target].allow_written && !self.idempotent;
            let level = if may_write && rng.chance(70) { Level::Written } else { Level::Synced };
            let records = if rng.chance(20) { rng.between(2, 12) as u32 } else { 1 };
            let first = target as u32 * PER_TARGET + lane.made;
            let batch = Batch { first, count: records, level, made_ms: known.wall_ms };
            lane.made += records;
            lane.waiting.push_back(batch.clone());
            batches.push((target, batch));
        }
        // One level holds for a request.
        let level = batches.iter().map(|(_, batch)| batch.level).max();
        batches.iter_mut().for_each(|(_, batch)| batch.level = level.unwrap_or(Level::Synced));
        let entries: Vec<_> = batches.iter().map(|(target, batch)| (*target, batch)).collect();
        if !entries.is_empty() {
            out.push(request(maker, self.idempotent, known, &entries));
        }
    }

    pub(crate) fn answered(&mut self, known: &Known<'_>, asked: &Asked, reply: &Reply) {
        match (asked, reply) {
            (Asked::ProducerId, Reply::Producer { producer_id, .. }) => {
                let maker = u32::try_from(*producer_id).expect("a small number");
                assert!(maker < ANONYMOUS, "so many producers there were not: {maker}");
                self.maker = Some(maker);
            }
            (Asked::ProducerId, _) => self.asked_for_id = false,
            (Asked::Append { sent, .. }, Reply::Appended(results)) => {
                for (sent, result) in sent.iter().zip(results) {
                    match result {
                        Ok(_) => self.acknowledged(sent),
                        Err(error) => self.refused(known, error),
                    }
                }
            }
            (Asked::Append { .. }, Reply::Error(error)) => self.refused(known, error),
            (asked, reply) => panic!("{reply:?} to {asked:?}"),
        }
    }

    fn acknowledged(&mut self, sent: &Sent) {
        if let Some(lane) = self.lanes.get_mut(&sent.target) {
            lane.waiting.retain(|batch| batch.first != sent.first);
        }
    }

    fn refused(&mut self, known: &Known<'_>, error: &EngineError) {
        match error {
            EngineError::OutOfOrderSequence { .. }
            | EngineError::ReadOnly(_)
            | EngineError::LimitReached { .. }
            | EngineError::Stopping => {
                self.resend_at_ms.get_or_insert(known.now_ms + PAUSE_MS);
            }
            error => panic!("a producer is told: {error}"),
        }
    }
}

fn request(maker: u32, idempotent: bool, known: &Known<'_>, batches: &[(usize, &Batch)]) -> (Asked, Command) {
    let mut sent = Vec::new();
    let mut entries = Vec::new();
    let mut level = Level::Written;
    for &(target, Batch { first, count, level: wanted, made_ms }) in batches {
        let partition: PartitionKey = known.targets[target].key;
        let sequence = idempotent.then_some(*first % PER_TARGET);
        let batch = staged(batch(maker, *first, *count, sequence, *made_ms));
        entries.push(AppendEntry { partition, batch });
        sent.push(Sent { target, partition, maker, first: *first, count: *count });
        level = level.max(*wanted);
    }
    (Asked::Append { sent, level }, Command::Append { level, entries })
}
