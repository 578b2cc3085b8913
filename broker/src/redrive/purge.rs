//! Purge: drops the dead letters that are there when it begins.
//!
//! A purge is an ordinary member of the topic's hidden group, which rejects each letter while the group discards what it gives up. It
//! ends with the connection that asked for it; asked for again it goes on with what is left.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use crate::broker::{Broker, BrokerError};
use crate::engine::command::{Command, FailureDetail, LeaseRef, Outcome, Settlement};
use crate::engine::effect::{DeadLetterInfo, Delivery, Reply, SettleStatus};
use crate::engine::error::EngineError;
use crate::engine::types::{LeaseId, Level, PartitionKey, SubscriptionId};
use crate::shard::{Answer, Origin, Responder, Sink, Submission, Token};

/// Letters that a job holds at a time: bounds its memory, with the size of the largest letter.
const CREDIT_RECORDS: u32 = 64;
/// How long a letter that is none of the job's business is put back.
const PUT_BACK: Duration = Duration::from_secs(10);
/// How often a job without news looks whether it is done.
const LOOK: Duration = Duration::from_millis(200);
/// Longest that a job goes on without any letter moving.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a purge ended early. What it had done until then stands.
#[derive(Debug, thiserror::Error)]
pub enum PurgeError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("share group {group:?} has no dead letters of topic {source_topic:?}")]
    NoDeadLetters { group: String, source_topic: String },
    #[error("no letter moved for {after:?}; {settled} were settled before")]
    Stalled { after: Duration, settled: u64 },
}

impl From<EngineError> for PurgeError {
    fn from(error: EngineError) -> Self {
        Self::Broker(error.into())
    }
}

/// Discards every dead letter of (group, source topic) that is there now; returns how many. Dropping the future ends the job.
///
/// # Errors
/// See [`PurgeError`].
pub async fn purge(broker: &Broker, group: &str, source: &str) -> Result<u64, PurgeError> {
    let letters = find(broker, group, source).await?;
    // What the hidden group gives up is held, except while a purge is on.
    broker.call(on_exhausted(&letters, "discard")).await?;
    let purged = match Job::begin(broker, &letters).await {
        Ok(job) => job.run().await,
        Err(error) => Err(error),
    };
    broker.call(on_exhausted(&letters, "hold")).await?;
    let purged = purged?;
    tracing::info!(group, source, purged, "dead letters purged");
    Ok(purged)
}

fn on_exhausted(letters: &DeadLetterInfo, value: &str) -> Command {
    Command::AlterShareGroup {
        group: letters.redrive_group.clone(),
        config: vec![("on-exhausted".to_owned(), value.to_owned())],
    }
}

async fn find(broker: &Broker, group: &str, source: &str) -> Result<DeadLetterInfo, PurgeError> {
    match broker.call(Command::ListDeadLetters { group: Some(group.to_owned()) }).await? {
        Reply::DeadLetters(all) => all.into_iter().find(|info| info.source == source).ok_or_else(|| {
            PurgeError::NoDeadLetters { group: group.to_owned(), source_topic: source.to_owned() }
        }),
        _ => Err(BrokerError::Unexpected("ListDeadLetters").into()),
    }
}

/// What comes back to a job.
#[derive(Debug)]
enum Mail {
    /// To the request with this correlation.
    Answer(u64, Reply),
    Delivery(Delivery),
    Ended(EngineError),
}

/// Bounded by the job's credit: every mail belongs to a letter that it holds.
#[derive(Debug)]
struct Mailbox(mpsc::UnboundedSender<Mail>);

impl Sink for Mailbox {
    fn answer(&self, answer: Answer) -> bool {
        // The job may have ended; its leases run out then.
        let _ = self.0.send(Mail::Answer(answer.token.correlation, answer.reply));
        false
    }

    fn deliver(&self, delivery: Delivery) -> bool {
        let _ = self.0.send(Mail::Delivery(delivery));
        false
    }

    fn ended(&self, _: SubscriptionId, error: EngineError) -> bool {
        let _ = self.0.send(Mail::Ended(error));
        false
    }

    fn wake(&self) {}
}

/// Correlation of the subscribing request, and of those that put letters back.
const SUBSCRIBED: u64 = 0;
const PUT: u64 = 1;
/// Correlation of those that settle a letter for good.
const SETTLED: u64 = 2;

/// A member of the hidden group.
#[derive(Debug)]
struct Job<'a> {
    broker: &'a Broker,
    group: String,
    member: String,
    subscription: SubscriptionId,
    origin: Arc<Origin>,
    mail: mpsc::UnboundedReceiver<Mail>,
    /// First offset of each partition that is none of this job's business.
    ends: Vec<u64>,
    /// Letters put back because they are too new.
    later: HashSet<(PartitionKey, u64)>,
    settled: u64,
    /// Letters whose settling is not answered yet.
    unanswered: u64,
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        let subscription = self.subscription;
        self.broker.submit([Submission::silent(Command::ShareUnsubscribe { subscription })]);
    }
}

impl<'a> Job<'a> {
    async fn begin(broker: &'a Broker, letters: &DeadLetterInfo) -> Result<Self, PurgeError> {
        let views = broker.views_of(letters.topic.id)?;
        let (sender, mail) = mpsc::unbounded_channel();
        let mut job = Self {
            broker,
            group: letters.redrive_group.clone(),
            member: format!("job-{}", Uuid::new_v4()),
            subscription: broker.new_subscription(),
            origin: Origin::new(Arc::new(Mailbox(sender)), None),
            mail,
            ends: views.iter().map(|view| view.high_watermark()).collect(),
            later: HashSet::new(),
            settled: 0,
            unanswered: 0,
        };
        let subscribe = Command::ShareSubscribe {
            subscription: job.subscription,
            group: job.group.clone(),
            member: job.member.clone(),
            credit_records: CREDIT_RECORDS,
            credit_bytes: u32::MAX,
            held: Vec::new(),
        };
        job.submit(subscribe, SUBSCRIBED);
        Ok(job)
    }

    fn submit(&mut self, command: Command, correlation: u64) {
        self.unanswered += u64::from(correlation == SETTLED);
        let responder = Responder::new(&self.origin, Token { correlation, tag: 0 });
        self.broker.submit([Submission::new(command, responder, 0)]);
    }

    /// Works through all letters; answers how many were dropped.
    async fn run(mut self) -> Result<u64, PurgeError> {
        let mut moved_last = Instant::now();
        let mut seen = Instant::now();
        loop {
            let before = self.settled;
            match timeout(LOOK, self.mail.recv()).await {
                Ok(Some(Mail::Delivery(delivery))) => self.take(&delivery),
                Ok(Some(Mail::Answer(SETTLED, reply))) => self.count(reply)?,
                Ok(Some(Mail::Answer(_, Reply::Error(error)) | Mail::Ended(error))) => {
                    return Err(error.into());
                }
                Ok(Some(Mail::Answer(PUT, Reply::Settled(results)))) => self.add_credit(results.len()),
                Ok(Some(Mail::Answer(..))) => {}
                // The mailbox cannot close, for this job holds it.
                Ok(None) | Err(_) => {
                    if self.unanswered == 0 && self.is_done().await? {
                        return Ok(self.settled);
                    }
                }
            }
            if self.settled != before {
                moved_last = Instant::now();
            }
            if moved_last.elapsed() > PATIENCE {
                return Err(PurgeError::Stalled { after: PATIENCE, settled: self.settled });
            }
            if seen.elapsed() > Duration::from_secs(1) {
                seen = Instant::now();
                let members = vec![(self.group.clone(), self.member.clone())];
                self.broker.submit([Submission::silent(Command::MembersSeen { members })]);
            }
        }
    }

    /// True when nothing is left but what was put back, or can never be read.
    async fn is_done(&self) -> Result<bool, PurgeError> {
        let (description, _) = self.broker.describe_group(&self.group).await?;
        let waiting: u64 =
            description.partitions.iter().map(|partition| partition.lag.saturating_sub(partition.held)).sum();
        Ok(waiting <= self.later.len() as u64)
    }

    /// Drops what was delivered, or puts it back.
    fn take(&mut self, delivery: &Delivery) {
        let key = delivery.partition;
        let end = self.ends.get(key.partition as usize).copied().unwrap_or(0);
        let mut settlements = Vec::new();
        for (index, record) in delivery.records.iter().enumerate() {
            let lease = LeaseId {
                boot_epoch: delivery.first_lease.boot_epoch,
                sequence: delivery.first_lease.sequence + index as u64,
            };
            let lease = LeaseRef { partition: key, offset: record.offset, lease };
            if record.offset >= end {
                self.later.insert((key, record.offset));
                settlements.push(put_back(lease));
            } else {
                let outcome = Outcome::Reject { detail: FailureDetail::default() };
                self.settle(vec![Settlement { record: lease, outcome }], SETTLED);
            }
        }
        if !settlements.is_empty() {
            self.settle(settlements, PUT);
        }
    }

    /// Makes room for as many letters as were let go.
    fn add_credit(&self, records: usize) {
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        // More than they can have taken: the bound is on the records.
        let bytes = self.broker.limits().batch.max_batch_bytes.saturating_mul(records);
        let credit = Command::ShareCredit { subscription: self.subscription, records, bytes };
        self.broker.submit([Submission::silent(credit)]);
    }

    fn settle(&mut self, settlements: Vec<Settlement>, correlation: u64) {
        let (group, member) = (self.group.clone(), self.member.clone());
        self.submit(Command::Settle { group, member, level: Level::Synced, settlements }, correlation);
    }

    /// Counts a letter that was settled for good.
    fn count(&mut self, reply: Reply) -> Result<(), PurgeError> {
        self.unanswered -= 1;
        let result = match reply {
            Reply::Settled(results) => results.first().copied(),
            Reply::Error(error) => return Err(error.into()),
            _ => None,
        };
        if result.is_some_and(|result| matches!(result.status, SettleStatus::Ok | SettleStatus::Late)) {
            self.settled += 1;
        }
        self.add_credit(1);
        Ok(())
    }
}

/// Leaves a letter where it is, out of this job's way, without a penalty.
fn put_back(record: LeaseRef) -> Settlement {
    let delay_ms = u64::try_from(PUT_BACK.as_millis()).ok();
    let outcome = Outcome::Nack { delay_ms, counted: false, detail: FailureDetail::default() };
    Settlement { record, outcome }
}
