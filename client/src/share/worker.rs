//! Runs a handler over the records of a share group.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::ShareConsumer;
use super::delivery::{Delivery, Nack, Reject, settlement};
use crate::error::Result;
use crate::record::Record;
use felucca_protocol::message::{Outcome as Settle, SettlementDetail};

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
    /// Done, and these records are appended with the acknowledgement, both or neither.
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
    /// Runs the handler for each record, up to the set concurrency at a time, until `shutdown` is ready. Leases are extended
    /// at half of their time while a handler runs. A handler that panics is a nack. After `shutdown` nothing new is started,
    /// what was not started is released, and running handlers have the drain timeout; what still runs then is aborted and its
    /// leases run out.
    ///
    /// # Errors
    /// The group was deleted, or the broker refuses it; not for lost connections, which are resumed.
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
                    Some(Ok(mut delivery)) => {
                        let held = delivery.hand_over();
                        running.spawn(handle(held, handler(delivery), counts.clone()));
                    }
                    Some(Err(error)) => break Err(error),
                    None => break Err(crate::error::Error::Closed),
                },
            }
        };
        // Dropping what was queued releases it.
        self.deliveries.close();
        while self.deliveries.try_recv().is_ok() {
            counts.released.fetch_add(1, Ordering::Relaxed);
        }
        let drained =
            timeout(self.settings.drain_timeout, async { while running.join_next().await.is_some() {} });
        if drained.await.is_err() {
            tracing::warn!(handlers = running.len(), "handlers did not end in time");
        }
        // Its answer says that everything queued before it, releases included, has reached the broker.
        let patience = self.settler.flush();
        let _late = timeout(Duration::from_secs(5), patience).await;
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
}

/// Runs one handler in a task of its own (so that a panic stays there), extends the lease meanwhile, settles.
async fn handle<F>(held: Delivery, handler: F, counts: Arc<Counts>)
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let mut task = AbortOnDrop(tokio::spawn(handler));
    let period = (held.lease_duration / 2).max(Duration::from_millis(10));
    let outcome = loop {
        tokio::select! {
            biased;
            outcome = &mut task.0 => break outcome,
            () = tokio::time::sleep(period) => extend(&held).await,
        }
    };
    let outcome = outcome.unwrap_or_else(|error| {
        Outcome::Nack(Nack { class: "panic".to_owned(), reason: error.to_string(), ..Nack::default() })
    });
    let (count, result) = match outcome {
        Outcome::Ack => (&counts.acked, held.ack().await),
        Outcome::Complete(records) => match held.settler.clone().complete(&held.lease, &records).await {
            // An output that can never be sent would fail for ever: that is for the operator to see.
            Err(error) if !error.retryable() => {
                let reject = Reject {
                    class: "invalid-output".to_owned(),
                    reason: error.to_string(),
                    detail: String::new(),
                };
                (&counts.rejected, held.reject(reject).await)
            }
            completed => (&counts.acked, completed),
        },
        Outcome::Nack(nack) => (&counts.nacked, held.nack(nack).await),
        Outcome::Reject(reject) => (&counts.rejected, held.reject(reject).await),
        Outcome::Release => (&counts.released, held.release().await),
    };
    match result {
        Ok(result) if result.is_done() => {
            count.fetch_add(1, Ordering::Relaxed);
        }
        other => {
            tracing::debug!(?other, "settlement did not hold");
            counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn extend(held: &Delivery) {
    let detail = SettlementDetail::default();
    let waiting =
        held.settler.settle(held.lease.clone(), settlement(&held.lease, Settle::Extend, Some(detail)));
    match waiting.result().await {
        Ok(result) if result.is_done() => {}
        other => tracing::warn!(?other, offset = held.offset, "the lease could not be extended"),
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
