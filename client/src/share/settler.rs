//! Sends settlements: gathers what comes while a request is in flight, repeats over reconnects.
//!
//! A settlement names its lease, so repeating it is safe: the broker answers a repetition with `DUPLICATE`, or
//! `ALREADY_SETTLED` when it no longer remembers; after a repetition both mean that it was done.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::BatchBuilder;
use felucca_protocol::message::{self, Outcome, SettleStatus, Settlement};
use felucca_protocol::partitioner::partition_for_key;
use felucca_protocol::{Api, ErrorCode};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::delivery::{Lease, SettleResult};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::link::Backoff;
use crate::record::{Record, now_ms};

/// Settlements of one request at most.
const MAX_SETTLEMENTS: usize = 10_000;
/// How long a settlement is repeated; leases are long over by then.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
enum Message {
    Settle(Queued),
    /// Answered when everything queued before it has been.
    Flush(oneshot::Sender<()>),
}

#[derive(Debug)]
struct Queued {
    lease: Lease,
    settlement: Settlement,
    answer: oneshot::Sender<Result<SettleResult>>,
}

/// The answer to a settlement, to come.
#[derive(Debug)]
pub(crate) struct Waiting(oneshot::Receiver<Result<SettleResult>>);

impl Waiting {
    pub(crate) async fn result(self) -> Result<SettleResult> {
        self.0.await.map_err(|_| Error::Closed)?
    }

    pub(crate) fn forget(self) {}
}

/// What this member holds, by partition and offset, with its bytes.
type Held = HashMap<(Bytes, u32, u64), (Lease, u32)>;

#[derive(Debug)]
pub(crate) struct Settler {
    client: Client,
    group: String,
    member_id: String,
    queue: mpsc::UnboundedSender<Message>,
    held: Mutex<Held>,
    /// The open subscription, which gets credit for what is settled.
    subscription: Mutex<u64>,
}

impl Settler {
    pub(crate) fn start(client: Client, group: String, member_id: String) -> Arc<Self> {
        // Bounded by the leases that the member holds.
        let (queue, queued) = mpsc::unbounded_channel();
        let settler = Arc::new(Self {
            client,
            group,
            member_id,
            queue,
            held: Mutex::default(),
            subscription: Mutex::new(0),
        });
        tokio::spawn(run(Arc::downgrade(&settler), queued));
        settler
    }

    pub(crate) fn settle(&self, lease: Lease, settlement: Settlement) -> Waiting {
        let (answer, waiting) = oneshot::channel();
        // Without a task the answer is dropped with the message: `Closed`.
        let _closed = self.queue.send(Message::Settle(Queued { lease, settlement, answer }));
        Waiting(waiting)
    }

    /// Waits until everything queued so far is answered.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        let _closed = self.queue.send(Message::Flush(done));
        let _ended = flushed.await;
    }

    pub(crate) fn held(&self) -> Vec<Lease> {
        self.held.lock().values().map(|(lease, _)| lease.clone()).collect()
    }

    /// Records and bytes held.
    pub(crate) fn held_credit(&self) -> (u32, u32) {
        let held = self.held.lock();
        let bytes = held.values().map(|(_, bytes)| *bytes).fold(0_u32, u32::saturating_add);
        (u32::try_from(held.len()).unwrap_or(u32::MAX), bytes)
    }

    pub(crate) fn hold(&self, lease: &Lease, bytes: u32) {
        let key = (lease.topic_id.clone(), lease.partition, lease.offset);
        self.held.lock().insert(key, (lease.clone(), bytes));
    }

    /// The subscription that was opened last.
    pub(crate) fn subscribed(&self, subscription: u64) {
        *self.subscription.lock() = subscription;
    }

    /// Gives up records; their credit goes to the subscription.
    fn let_go<'a>(&self, leases: impl Iterator<Item = &'a Lease>) {
        let (mut records, mut bytes) = (0_u32, 0_u32);
        {
            let mut held = self.held.lock();
            for lease in leases {
                let key = (lease.topic_id.clone(), lease.partition, lease.offset);
                if held.get(&key).is_some_and(|(current, _)| current == lease)
                    && let Some((_, size)) = held.remove(&key)
                {
                    records += 1;
                    bytes = bytes.saturating_add(size);
                }
            }
        }
        let subscription = *self.subscription.lock();
        if records > 0 && subscription != 0 {
            self.client.link.tell(Api::Credit, &message::Credit { subscription, records, bytes });
        }
    }

    /// Acknowledges and appends, repeated over reconnects.
    pub(crate) async fn complete(&self, lease: &Lease, outputs: &[Record]) -> Result<SettleResult> {
        let mut builders: BTreeMap<(Bytes, u32), BatchBuilder> = BTreeMap::new();
        for record in outputs {
            let topic = self.client.topic(&record.topic).await?;
            let partition = match (record.partition, &record.key) {
                (Some(partition), _) if partition >= topic.partitions => {
                    let why = format!("topic {:?} has no partition {partition}", &*topic.name);
                    return Err(Error::Record(why));
                }
                (Some(partition), _) => partition,
                (None, Some(key)) => partition_for_key(key, topic.partitions),
                (None, None) => u32::try_from(lease.offset % u64::from(topic.partitions.max(1))).unwrap_or(0),
            };
            let builder = builders.entry((topic.id, partition)).or_default();
            let timestamp = record.timestamp.unwrap_or_else(now_ms);
            builder
                .push(timestamp, record.key.as_deref(), record.value.as_deref(), &record.header_slices())
                .map_err(|error| Error::Record(error.to_string()))?;
        }
        let (targets, payload): (Vec<_>, Vec<Bytes>) =
            builders.into_iter().map(|(target, builder)| (target, builder.finish().freeze())).unzip();
        let entry = |((topic_id, partition), batch): ((Bytes, u32), &Bytes)| message::ProduceEntry {
            topic_id,
            partition,
            length: u32::try_from(batch.len()).unwrap_or(u32::MAX),
        };
        let request = message::Complete {
            group: self.group.clone(),
            member_id: self.member_id.clone(),
            lease: Some(lease.to_message()),
            outputs: targets.into_iter().zip(&payload).map(entry).collect(),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut backoff = Backoff::default();
        let mut repeated = false;
        loop {
            let answer = self.client.link.ask(Api::Complete, &request, payload.clone()).await;
            match answer {
                Ok((reply, _)) => {
                    let reply: message::CompleteReply = reply;
                    let result = reply.result.ok_or_else(|| Error::Protocol("no result".to_owned()))?;
                    let result = understood(SettleResult::from_message(&result), repeated);
                    self.let_go(std::iter::once(lease));
                    return Ok(result);
                }
                Err(error) if error.retryable() && Instant::now() < deadline => {
                    repeated = true;
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// After a repetition, what is settled was settled by the first try.
fn understood(mut result: SettleResult, repeated: bool) -> SettleResult {
    if repeated && result.status == SettleStatus::AlreadySettled {
        result.status = SettleStatus::Duplicate;
    }
    result
}

async fn run(settler: std::sync::Weak<Settler>, mut queued: mpsc::UnboundedReceiver<Message>) {
    let mut messages = Vec::new();
    while queued.recv_many(&mut messages, MAX_SETTLEMENTS).await > 0 {
        let mut batch = Vec::with_capacity(messages.len());
        let mut flushes = Vec::new();
        for message in messages.drain(..) {
            match message {
                Message::Settle(queued) => batch.push(queued),
                Message::Flush(done) => flushes.push(done),
            }
        }
        // The last settlements of a consumer that was dropped have nobody left to send them; its leases run out.
        let Some(settler) = settler.upgrade() else { return };
        batch.sort_by(|a: &Queued, b: &Queued| {
            (&a.lease.topic_id, a.lease.partition, a.lease.boot_epoch).cmp(&(
                &b.lease.topic_id,
                b.lease.partition,
                b.lease.boot_epoch,
            ))
        });
        let same = |a: &Queued, b: &Queued| {
            (&a.lease.topic_id, a.lease.partition, a.lease.boot_epoch)
                == (&b.lease.topic_id, b.lease.partition, b.lease.boot_epoch)
        };
        let batches = batch.chunk_by(same).map(|run| message::SettleBatch {
            topic_id: run[0].lease.topic_id.clone(),
            partition: run[0].lease.partition,
            boot_epoch: run[0].lease.boot_epoch,
            settlements: run.iter().map(|queued| queued.settlement.clone()).collect(),
        });
        let request = message::Settle {
            group: settler.group.clone(),
            member_id: settler.member_id.clone(),
            batches: batches.collect(),
            level: message::Level::Synced.into(),
        };
        let outcome =
            if batch.is_empty() { Ok(Default::default()) } else { send(&settler.client, &request).await };
        let settled = batch.iter().filter(|queued| queued.settlement.outcome() != Outcome::Extend);
        settler.let_go(settled.map(|queued| &queued.lease));
        answer(batch.drain(..), outcome);
        for done in flushes {
            let _gone = done.send(());
        }
    }
}

fn answer(batch: impl ExactSizeIterator<Item = Queued>, outcome: Result<(message::SettleReply, bool)>) {
    let count = batch.len();
    let outcome = outcome.and_then(|(reply, repeated)| {
        let complete = reply.results.len() == count;
        if complete {
            Ok((reply, repeated))
        } else {
            Err(Error::Protocol("a settle answer of another length".to_owned()))
        }
    });
    match outcome {
        Ok((reply, repeated)) => {
            for (queued, result) in batch.zip(&reply.results) {
                let result = understood(SettleResult::from_message(result), repeated);
                // Nobody waits for a release by drop.
                let _gone = queued.answer.send(Ok(result));
            }
        }
        Err(error) => {
            for queued in batch {
                let _gone = queued.answer.send(Err(error.clone()));
            }
        }
    }
}

async fn send(client: &Client, request: &message::Settle) -> Result<(message::SettleReply, bool)> {
    let mut repeated = false;
    let mut backoff = Backoff::default();
    let trying = async {
        loop {
            match client.link.ask(Api::Settle, request, Vec::new()).await {
                Ok((reply, _)) => return Ok((reply, repeated)),
                Err(error) if error.retryable() && error.code() != Some(ErrorCode::UnknownMember) => {
                    repeated = true;
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    timeout(PATIENCE, trying).await.unwrap_or(Err(Error::Timeout("settling")))
}
