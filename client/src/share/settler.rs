//! Sends settlements: gathers what comes while a request is in flight, repeats over reconnects.
//!
//! A settlement names its lease, so repeating it is safe: the broker answers a repetition with `DUPLICATE`, or
//! `ALREADY_SETTLED` when it no longer remembers; after a repetition both mean that it was done.
//!
//! The queue lives as long as anybody can settle: the consumer and its deliveries. When the last of them is gone and what
//! they left has been sent, [`Core::ended`] tells the member's task to leave.

use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::Api;
use felucca_protocol::message::{self, Outcome, SettleStatus, Settlement, SettlementDetail};
use prost::Message;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Settings;
use super::delivery::{Lease, SettleResult};
use super::leases::{Change, Leases};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::producer::Level;

/// Settlements of one request at most, by number and by bytes.
const MAX_SETTLEMENTS: usize = 10_000;
const MAX_REQUEST_BYTES: usize = 512 << 10;
/// How long a settlement is repeated; its lease is over by then.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Who waits for the answer.
#[derive(Debug)]
enum Answer {
    Caller(oneshot::Sender<Result<SettleResult>>),
    /// An extension that the member makes by itself.
    Keeper,
}

#[derive(Debug)]
struct Queued {
    lease: Lease,
    outcome: Outcome,
    detail: Option<SettlementDetail>,
    answer: Answer,
}

/// The answer to a settlement, to come.
#[derive(Debug)]
pub(super) struct Waiting(oneshot::Receiver<Result<SettleResult>>);

impl Waiting {
    pub(super) async fn result(self) -> Result<SettleResult> {
        self.0.await.map_err(|_| Error::Closed)?
    }

    /// Nobody waits; the settlement is made all the same.
    pub(super) fn forget(self) {}
}

/// What consumer, deliveries and tasks share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) client: Client,
    pub(super) group: String,
    pub(super) member_id: String,
    level: Level,
    pub(super) leases: Leases,
    /// The member wants fewer records than the open subscription has credit for.
    pub(super) shrunk: Notify,
    /// Nobody can settle any more, and all settlements are answered.
    pub(super) ended: CancellationToken,
}

impl Core {
    /// Gives up records; their credit goes to the open subscription.
    pub(super) fn let_go<'a>(&self, leases: impl IntoIterator<Item = &'a Lease>) {
        if let Some(credit) = self.leases.let_go(leases) {
            self.client.link.tell(Api::Credit, &credit);
        }
    }

    /// Wants to hold so many records from now on.
    pub(super) fn want(&self, records: u32) {
        match self.leases.want(records) {
            Change::Credit(Some(credit)) => self.client.link.tell(Api::Credit, &credit),
            Change::Credit(None) => {}
            Change::Resubscribe => self.shrunk.notify_one(),
        }
    }

    /// Takes in what the broker said to an extension.
    fn extended(&self, lease: &Lease, result: &Result<SettleResult>) {
        match result {
            Ok(result) if result.is_done() => self.leases.extended(lease, result.remaining),
            Ok(result) => {
                let (group, partition, offset) = (&self.group, lease.partition, lease.offset);
                tracing::debug!(group, partition, offset, status = ?result.status, "a lease has ended");
                self.let_go([lease]);
            }
            Err(error) => tracing::debug!(group = self.group, %error, "a lease could not be extended"),
        }
    }
}

/// The handle of those who settle.
#[derive(Debug)]
pub(super) struct Settler {
    pub(super) core: Arc<Core>,
    /// Bounded by the leases that the member holds.
    queue: mpsc::UnboundedSender<Queued>,
}

impl Settler {
    pub(super) fn start(client: Client, settings: &Settings) -> Arc<Self> {
        let (queue, queued) = mpsc::unbounded_channel();
        let leases = Leases::new(settings.prefetch, settings.prefetch_bytes);
        let (group, member_id) = (settings.group.clone(), settings.member_id.clone());
        let level = settings.level;
        let (shrunk, ended) = (Notify::new(), CancellationToken::new());
        let core = Arc::new(Core { client, group, member_id, level, leases, shrunk, ended });
        tokio::spawn(run(core.clone(), queued));
        Arc::new(Self { core, queue })
    }

    /// Queues a settlement; it is sent whether or not its answer is waited for.
    pub(super) fn settle(
        &self,
        lease: &Lease,
        outcome: Outcome,
        detail: Option<SettlementDetail>,
    ) -> Waiting {
        let (answer, waiting) = oneshot::channel();
        if outcome != Outcome::Extend {
            self.core.leases.set_settling(lease, true);
        }
        let queued = Queued { lease: *lease, outcome, detail, answer: Answer::Caller(answer) };
        // Without a runtime the answer is dropped with the message: `Closed`.
        let _closed = self.queue.send(queued);
        Waiting(waiting)
    }

    /// Queues an extension by the group's lease time; what comes of it is noted in the leases.
    pub(super) fn keep(&self, lease: Lease) {
        let queued = Queued { lease, outcome: Outcome::Extend, detail: None, answer: Answer::Keeper };
        let _closed = self.queue.send(queued);
    }
}

/// After a repetition, what is settled was settled by the first try.
pub(super) fn understood(mut result: SettleResult, repeated: bool) -> SettleResult {
    if repeated && result.status == SettleStatus::AlreadySettled {
        result.status = SettleStatus::Duplicate;
    }
    result
}

async fn run(core: Arc<Core>, mut queue: mpsc::UnboundedReceiver<Queued>) {
    while let Some(first) = queue.recv().await {
        let mut batch = gather(first, &mut queue);
        // Stable: what concerns one lease stays in its order.
        batch.sort_by_key(target);
        let request = request(&core, &mut batch);
        let outcome = send(&core.client, &request).await.and_then(|(reply, repeated)| {
            if reply.results.len() == batch.len() {
                Ok((reply, repeated))
            } else {
                Err(Error::Protocol("a settle answer of another length".to_owned()))
            }
        });
        let settled = batch.iter().filter(|queued| queued.outcome != Outcome::Extend);
        core.let_go(settled.map(|queued| &queued.lease));
        match outcome {
            Ok((reply, repeated)) => {
                for (queued, result) in batch.into_iter().zip(&reply.results) {
                    answer(&core, queued, Ok(understood(SettleResult::from_message(result), repeated)));
                }
            }
            Err(error) => batch.into_iter().for_each(|queued| answer(&core, queued, Err(error.clone()))),
        }
    }
    core.ended.cancel();
}

/// What is queued now, as much as fits one request.
fn gather(first: Queued, queue: &mut mpsc::UnboundedReceiver<Queued>) -> Vec<Queued> {
    let size = |queued: &Queued| 64 + queued.detail.as_ref().map_or(0, SettlementDetail::encoded_len);
    let mut bytes = size(&first);
    let mut batch = vec![first];
    while batch.len() < MAX_SETTLEMENTS && bytes < MAX_REQUEST_BYTES {
        let Ok(next) = queue.try_recv() else { break };
        bytes += size(&next);
        batch.push(next);
    }
    batch
}

fn target(queued: &Queued) -> (Uuid, u32, u64) {
    (queued.lease.topic_id, queued.lease.partition, queued.lease.boot_epoch)
}

fn request(core: &Core, batch: &mut [Queued]) -> message::Settle {
    let batches = batch.chunk_by_mut(|a, b| target(a) == target(b)).map(|run| {
        let (topic_id, partition) = (run[0].lease.topic_id_bytes(), run[0].lease.partition);
        let boot_epoch = run[0].lease.boot_epoch;
        let settlement = |queued: &mut Queued| Settlement {
            offset: queued.lease.offset,
            sequence: queued.lease.sequence,
            outcome: queued.outcome.into(),
            detail: queued.detail.take(),
        };
        let settlements = run.iter_mut().map(settlement).collect();
        message::SettleBatch { topic_id, partition, boot_epoch, settlements }
    });
    message::Settle {
        group: core.group.clone(),
        member_id: core.member_id.clone(),
        batches: batches.collect(),
        level: message::Level::from(core.level).into(),
    }
}

fn answer(core: &Core, queued: Queued, result: Result<SettleResult>) {
    if queued.outcome == Outcome::Extend {
        core.extended(&queued.lease, &result);
    }
    if let Answer::Caller(caller) = queued.answer {
        // Nobody waits for a release by drop.
        let _gone = caller.send(result);
    }
}

async fn send(client: &Client, request: &message::Settle) -> Result<(message::SettleReply, bool)> {
    let mut repeated = false;
    let mut backoff = Backoff::default();
    let trying = async {
        loop {
            match client.link.ask(Api::Settle, request, Vec::new()).await {
                Ok((reply, _)) => return Ok((reply, repeated)),
                Err(error) if error.retryable() => {
                    repeated = true;
                    backoff.wait_after(&error).await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    timeout(PATIENCE, trying).await.unwrap_or(Err(Error::Timeout("settling")))
}
