//! Runs a handler over the records of a share group.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use felucca_protocol::ErrorCode;
use felucca_protocol::message::Outcome as Settle;
use futures::FutureExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::ShareConsumer;
use super::complete::complete;
use super::delivery::{Delivery, Lease, Nack, Reject, SettleResult};
use super::settler::Settler;
use crate::error::{Error, Result};
use crate::record::Record;

/// How long `run` waits in the end until the broker knows that this member is gone.
const FAREWELL: Duration = Duration::from_secs(5);

/// What became of a record in a handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ack,
    /// Failed, to be tried again.
    Nack(Nack),
    /// Failed for good.
    Reject(Reject),
    /// Not started.
    Release,
    /// Done, and these records are appended with the acknowledgement, both or neither. Outputs with a key go to the key's
    /// partition.
    Complete(Vec<Record>),
}

impl Outcome {
    /// Failed, to be tried again after the group's backoff.
    pub fn nack(reason: impl Into<String>) -> Self {
        Self::Nack(Nack { reason: reason.into(), ..Nack::default() })
    }

    /// Failed for good.
    pub fn reject(class: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Reject(Reject { class: class.into(), reason: reason.into(), detail: String::new() })
    }
}

/// What a worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerReport {
    pub acked: u64,
    pub nacked: u64,
    pub rejected: u64,
    pub released: u64,
    /// The lease had ended, or the settlement got no answer: the record is or will be handed out again.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Counts {
    acked: AtomicU64,
    nacked: AtomicU64,
    rejected: AtomicU64,
    released: AtomicU64,
    lost: AtomicU64,
}

impl ShareConsumer {
    /// Runs the handler for each record, up to the set concurrency at a time, until `shutdown` is ready.
    ///
    /// Leases are extended at half of their time, of queued records too; a handler whose lease is lost all the same learns it
    /// from [`Delivery::lease_lost`], and its outcome counts as `lost`. A handler that panics is a nack of class `panic`.
    /// Outputs of [`Outcome::Complete`] that can never be appended are a reject of class `invalid-output`.
    ///
    /// After `shutdown` nothing new is started, what was not started is released, and running handlers have the drain timeout;
    /// what still runs then is aborted, a nack of class `shutdown`. When the future is dropped, handlers are aborted in the
    /// same way at once.
    ///
    /// # Errors
    /// The group was deleted, or the broker refuses this member; not for lost connections, which are resumed.
    pub async fn run<H, F>(mut self, handler: H, shutdown: impl Future<Output = ()>) -> Result<WorkerReport>
    where
        H: Fn(Delivery) -> F,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let counts = Arc::new(Counts::default());
        let mut running = JoinSet::new();
        tokio::pin!(shutdown);
        let ended = loop {
            let room = running.len() < self.settings.concurrency;
            tokio::select! {
                biased;
                () = &mut shutdown => break Ok(()),
                Some(_) = running.join_next(), if !running.is_empty() => {}
                delivery = self.deliveries.recv(), if room => match delivery {
                    Some(Ok(delivery)) => start(delivery, &handler, &counts, &mut running),
                    Some(Err(error)) => break Err(error),
                    None => break Err(Error::Closed),
                },
            }
        };
        let Self { settings, settler, mut deliveries, task } = self;
        deliveries.close();
        while let Ok(queued) = deliveries.try_recv() {
            // Dropping it releases it.
            counts.released.fetch_add(u64::from(queued.is_ok()), Ordering::Relaxed);
        }
        let drained = async { while running.join_next().await.is_some() {} };
        if timeout(settings.drain_timeout, drained).await.is_err() {
            tracing::warn!(group = settings.group, handlers = running.len(), "handlers did not end in time");
            running.shutdown().await;
        }
        drop((settler, deliveries));
        if timeout(FAREWELL, task).await.is_err() {
            tracing::debug!(group = settings.group, "the last settlements are not answered yet");
        }
        ended.map(|()| counts.report())
    }
}

impl Counts {
    fn report(&self) -> WorkerReport {
        WorkerReport {
            acked: self.acked.load(Ordering::Relaxed),
            nacked: self.nacked.load(Ordering::Relaxed),
            rejected: self.rejected.load(Ordering::Relaxed),
            released: self.released.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    fn note(&self, count: &AtomicU64, result: &Result<SettleResult>) {
        match result {
            Ok(result) if result.is_done() => {
                count.fetch_add(1, Ordering::Relaxed);
            }
            other => {
                tracing::debug!(?other, "a settlement did not hold");
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Begins the handler of one record in a task of its own.
fn start<H, F>(mut delivery: Delivery, handler: &H, counts: &Arc<Counts>, running: &mut JoinSet<()>)
where
    H: Fn(Delivery) -> F,
    F: Future<Output = Outcome> + Send + 'static,
{
    // From here on the lease is settled by what the handler answers, not by the drop of the delivery.
    delivery.settled = true;
    let attempt = Attempt {
        settler: delivery.settler.clone(),
        lease: delivery.lease.clone(),
        counts: counts.clone(),
        ended: false,
    };
    let handling = std::panic::catch_unwind(AssertUnwindSafe(|| handler(delivery)));
    running.spawn(async move {
        let outcome = match handling {
            Ok(handling) => AssertUnwindSafe(handling).catch_unwind().await,
            Err(panic) => Err(panic),
        };
        attempt.settle(outcome.unwrap_or_else(|panic| panicked(&*panic))).await;
    });
}

fn panicked(panic: &(dyn Any + Send)) -> Outcome {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    let reason = format!("the handler panicked: {text}");
    Outcome::Nack(Nack { class: "panic".to_owned(), reason, ..Nack::default() })
}

/// One record in a handler.
struct Attempt {
    settler: Arc<Settler>,
    lease: Lease,
    counts: Arc<Counts>,
    /// The handler ended, in whatever way.
    ended: bool,
}

impl Attempt {
    async fn settle(mut self, outcome: Outcome) {
        self.ended = true;
        let (settler, lease, counts) = (&self.settler, &self.lease, &self.counts);
        let (count, result) = match outcome {
            Outcome::Ack => (&counts.acked, settler.settle(lease, Settle::Ack, None).result().await),
            Outcome::Release => {
                (&counts.released, settler.settle(lease, Settle::Release, None).result().await)
            }
            Outcome::Nack(nack) => (&counts.nacked, self.nack(nack).await),
            Outcome::Reject(reject) => (&counts.rejected, self.reject(reject).await),
            Outcome::Complete(records) => match complete(&settler.core, lease, &records).await {
                // It would fail for ever: that is for a person to see.
                Err(error) if is_invalid_output(&error) => {
                    let (class, reason) = ("invalid-output".to_owned(), error.to_string());
                    let reject = Reject { class, reason, detail: String::new() };
                    (&counts.rejected, self.reject(reject).await)
                }
                completed => (&counts.acked, completed),
            },
        };
        counts.note(count, &result);
    }

    async fn nack(&self, nack: Nack) -> Result<SettleResult> {
        self.settler.settle(&self.lease, Settle::Nack, Some(nack.into_detail())).result().await
    }

    async fn reject(&self, reject: Reject) -> Result<SettleResult> {
        self.settler.settle(&self.lease, Settle::Reject, Some(reject.into_detail())).result().await
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.ended {
            let nack = Nack {
                class: "shutdown".to_owned(),
                reason: "the worker stopped before the handler ended".to_owned(),
                ..Nack::default()
            };
            self.counts.nacked.fetch_add(1, Ordering::Relaxed);
            self.settler.settle(&self.lease, Settle::Nack, Some(nack.into_detail())).forget();
        }
    }
}

/// Whether the outputs themselves are what the broker refuses.
fn is_invalid_output(error: &Error) -> bool {
    match error {
        Error::Record(_) => true,
        Error::Broker { code, .. } => matches!(
            code,
            ErrorCode::InvalidRequest
                | ErrorCode::UnknownTopic
                | ErrorCode::UnknownPartition
                | ErrorCode::CorruptBatch
                | ErrorCode::RecordTooLarge
                | ErrorCode::BatchTooLarge
                | ErrorCode::ForeignProducer
        ),
        _ => false,
    }
}
