//! Moves dead letters of a share group to its redrive topic, as the broker's redrive job does: each as a member of the
//! hidden group, with one `complete` for letter and record.

use felucca_broker::broker::Broker;
use felucca_broker::engine::command::{
    AppendEntry, Command, FailureDetail, LeaseRef, Outcome, Settlement, StagedBatch,
};
use felucca_broker::engine::dead_letter;
use felucca_broker::engine::effect::{Delivery, Reply};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{LeaseId, Level, PartitionKey, SubscriptionId, TopicId};
use felucca_broker::log::read_record;
use felucca_protocol::batch::BatchHeader;

use super::client::{Asked, Known, Outgoing};
use super::content::{Identity, identify};
use crate::engine_model::rng::Rng;

/// Letters held at a time.
const CREDIT_RECORDS: u32 = 4;
/// A letter that was redriven so often stays.
const MOST_REDRIVES: u32 = 2;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Redriver {
    group: String,
    target: TopicId,
    held: Vec<LeaseRef>,
    subscribed: bool,
}

impl Redriver {
    /// A member of a hidden group that appends to a topic.
    pub(crate) fn new(group: &str, target: TopicId) -> Self {
        Self { group: group.to_owned(), target, held: Vec::new(), subscribed: false }
    }

    fn member() -> String {
        "redriver".to_owned()
    }

    pub(crate) fn subscribe(&mut self, out: &mut Outgoing) {
        self.subscribed = true;
        let (group, member, held) = (self.group.clone(), Self::member(), std::mem::take(&mut self.held));
        let command = Command::ShareSubscribe {
            subscription: SubscriptionId(0),
            group: group.clone(),
            member: member.clone(),
            credit_records: CREDIT_RECORDS,
            credit_bytes: 64 << 10,
            held: Vec::new(),
        };
        // What it held is given back.
        drop(held);
        out.push((Asked::Subscribe { group, member, held: Vec::new() }, command));
    }

    pub(crate) fn delivered(&mut self, delivery: &Delivery) {
        for (at, record) in (0..).zip(&delivery.records) {
            let LeaseId { boot_epoch, sequence } = delivery.first_lease;
            let lease = LeaseId { boot_epoch, sequence: sequence + at };
            self.held.push(LeaseRef { partition: delivery.partition, offset: record.offset, lease });
        }
    }

    pub(crate) fn act(
        &mut self,
        rng: &mut Rng,
        known: &Known<'_>,
        broker: Option<&Broker>,
        calm: bool,
        out: &mut Outgoing,
    ) {
        if calm {
            return;
        }
        if !self.subscribed {
            self.subscribe(out);
            return;
        }
        let Some(record) = self.held.pop() else { return };
        let view = broker.and_then(|broker| broker.view(record.partition).ok());
        let letter = view.and_then(|view| read_record(&view, record.offset).ok().flatten());
        let redrives = letter.as_ref().map(dead_letter::redrive_count);
        if let Some(letter) = letter.filter(|_| redrives < Some(MOST_REDRIVES) && rng.chance(80)) {
            let Identity { maker, number, redrives } = identify(&letter).expect("a whole letter");
            let bytes = dead_letter::redriven(&letter, known.wall_ms).expect("a whole letter");
            let header = BatchHeader::parse(&bytes).expect("a batch that was just built");
            let partition = PartitionKey { topic: self.target, partition: record.partition.partition };
            let (group, member) = (self.group.clone(), Self::member());
            let output = Identity { maker, number, redrives: redrives + 1 };
            let asked =
                Asked::Complete { group: group.clone(), member: member.clone(), record, partition, output };
            let outputs = vec![AppendEntry { partition, batch: StagedBatch { header, bytes } }];
            out.push((asked, Command::Complete { group, member, record, outputs }));
            return;
        }
        let detail = FailureDetail::default();
        let outcome = if rng.chance(30) {
            Outcome::Reject { detail }
        } else {
            Outcome::Nack { delay_ms: Some(rng.below(3_000)), counted: false, detail }
        };
        let (group, member, level) = (self.group.clone(), Self::member(), Level::Synced);
        let settlements = vec![Settlement { record, outcome }];
        let asked = Asked::Settle {
            group: group.clone(),
            member: member.clone(),
            level,
            settlements: settlements.clone(),
        };
        out.push((asked, Command::Settle { group, member, level, settlements }));
    }

    pub(crate) fn answered(&mut self, asked: &Asked, reply: &Reply, out: &mut Outgoing) {
        match (asked, reply) {
            (Asked::Settle { .. }, Reply::Settled(_)) | (Asked::Complete { .. }, Reply::Completed { .. }) => {
                let subscription = SubscriptionId(0);
                out.push((Asked::Credit, Command::ShareCredit { subscription, records: 1, bytes: 12_000 }));
            }
            (Asked::Subscribe { .. }, Reply::Done) | (Asked::Credit, _) => {}
            (_, Reply::Error(error)) => match error {
                EngineError::ReadOnly(_) | EngineError::Stopping | EngineError::LimitReached { .. } => {
                    self.subscribed &= !matches!(asked, Asked::Subscribe { .. });
                }
                error => panic!("a redriver is told: {error}"),
            },
            (asked, reply) => panic!("{reply:?} to {asked:?}"),
        }
    }

    pub(crate) fn ended(&mut self) {
        self.subscribed = false;
    }
}
