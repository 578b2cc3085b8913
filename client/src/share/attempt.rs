//! Records in a handler: run to its end, and settled however that comes.

use std::any::Any;
use std::fmt::Display;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use felucca_protocol::ErrorCode;
use felucca_protocol::message::Outcome as Settle;
use futures::FutureExt;
use futures::future::join_all;
use tokio::time::sleep;

use super::complete::complete;
use super::delivery::{Delivery, Lease, Nack, Reject, SettleResult};
use super::handler::service_failed;
use super::outcome::Outcome;
use super::settler::Settler;
use crate::error::{Error, Result};

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

/// A report in the making.
#[derive(Debug, Default)]
pub(super) struct Counts {
    acked: AtomicU64,
    nacked: AtomicU64,
    rejected: AtomicU64,
    pub(super) released: AtomicU64,
    pub(super) lost: AtomicU64,
}

impl Counts {
    pub(super) fn report(&self) -> WorkerReport {
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

/// What the handler of a batch began with, or its panic.
pub(super) type Begun<F> = std::thread::Result<F>;

/// Runs the handler of a batch to its end and settles each record.
pub(super) async fn attempt<F, E>(attempts: Vec<Attempt>, begun: Begun<F>, limit: Option<Duration>)
where
    F: Future<Output = std::result::Result<Vec<Outcome>, E>>,
    E: Display,
{
    let count = attempts.len();
    let all = |nack: Nack| vec![Outcome::Nack(nack); count];
    let handling = async {
        match begun {
            Ok(handling) => AssertUnwindSafe(handling).catch_unwind().await,
            Err(panic) => Err(panic),
        }
    };
    let mut outcomes = tokio::select! {
        biased;
        handled = handling => match handled {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(error)) => all(service_failed(&error)),
            Err(panic) => all(panicked(&*panic)),
        },
        () = all_lost(&attempts) => {
            attempts.into_iter().for_each(Attempt::lost);
            return;
        }
        limit = limit_of(limit) => all(Nack::new("timeout", format!("the handler took longer than {limit:?}"))),
    };
    outcomes.resize(count, Nack::new("no-outcome", "the handler answered nothing about this record").into());
    join_all(attempts.into_iter().zip(outcomes).map(|(attempt, outcome)| attempt.settle(outcome))).await;
}

async fn all_lost(attempts: &[Attempt]) {
    for attempt in attempts {
        attempt.settler.core.leases.lost(&attempt.lease).cancelled().await;
    }
}

async fn limit_of(limit: Option<Duration>) -> Duration {
    match limit {
        Some(limit) => {
            sleep(limit).await;
            limit
        }
        None => std::future::pending().await,
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Nack {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    Nack::new("panic", format!("the handler panicked: {text}"))
}

/// One record in a handler.
pub(super) struct Attempt {
    settler: Arc<Settler>,
    lease: Lease,
    counts: Arc<Counts>,
    /// The handler ended, in whatever way.
    ended: bool,
}

impl Attempt {
    pub(super) fn new(delivery: &mut Delivery, counts: &Arc<Counts>) -> Self {
        // From here on the lease is settled by what the handler answers, not by the drop of the delivery.
        delivery.settled = true;
        let (settler, lease) = (delivery.settler.clone(), delivery.lease);
        Self { settler, lease, counts: counts.clone(), ended: false }
    }

    /// Another member may have the record: there is nothing to settle.
    fn lost(mut self) {
        self.ended = true;
        let (partition, offset) = (self.lease.partition, self.lease.offset);
        tracing::warn!(
            group = self.settler.core.group,
            partition,
            offset,
            "a lease ended, and its handler with it"
        );
        self.counts.lost.fetch_add(1, Ordering::Relaxed);
    }

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
                    let reject = Reject::new("invalid-output", error.to_string());
                    (&counts.rejected, self.reject(reject).await)
                }
                // Not the record's fault, and whether it was completed is not known; if it was, this changes nothing.
                Err(error) => {
                    let class = if is_unknown_output(&error) { "output-topic" } else { "complete-failed" };
                    let counted = is_unknown_output(&error);
                    let nack = Nack { counted, ..Nack::new(class, error.to_string()) };
                    (&counts.nacked, self.nack(nack).await)
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
            let nack = Nack::new("shutdown", "the worker stopped before the handler ended");
            self.counts.nacked.fetch_add(1, Ordering::Relaxed);
            self.settler.settle(&self.lease, Settle::Nack, Some(nack.into_detail())).forget();
        }
    }
}

/// Whether there is no such place for an output: it may be made yet.
fn is_unknown_output(error: &Error) -> bool {
    matches!(error.code(), Some(ErrorCode::UnknownTopic | ErrorCode::UnknownPartition))
}

/// Whether the outputs themselves are what the broker refuses.
fn is_invalid_output(error: &Error) -> bool {
    match error {
        Error::Record(_) => true,
        Error::Broker { code, .. } => matches!(
            code,
            ErrorCode::InvalidRequest
                | ErrorCode::CorruptBatch
                | ErrorCode::RecordTooLarge
                | ErrorCode::BatchTooLarge
                | ErrorCode::ForeignProducer
        ),
        _ => false,
    }
}
