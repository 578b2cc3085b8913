//! Runs a handler over the records of a share group.
//!
//! [`Worker`] decides what happens next: waits for the handler to be ready, gathers a batch, starts it in a task of its own.
//! [`super::attempt`] sees to it that its records are settled however the handler ends.
//!
//! **A handler that is not ready pauses the subscription.** When it stays so for [`PATIENCE`], what was not started is
//! released and no more is asked for, so that other members can have it. When it is ready again one record is asked for; only
//! when the handler is ready after that too, the whole prefetch.

use std::fmt::Display;
use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tower_service::Service;

use super::attempt::{Attempt, Counts, WorkerReport, attempt};
use super::delivery::Delivery;
use super::handler::{HandlerFn, OneByOne};
use super::outcome::Outcome;
use super::settler::Settler;
use super::{Settings, ShareConsumer};
use crate::error::{Error, Result};

/// How long a handler may be not ready before the subscription pauses.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long `run` waits in the end until the broker knows that this member is gone.
const FAREWELL: Duration = Duration::from_secs(5);

impl ShareConsumer {
    /// Runs the handler for each record, up to the set concurrency at a time, until `shutdown` is ready.
    ///
    /// What the handler answers becomes the record's [`Outcome`]. Leases are extended at half of their time, of queued records
    /// too. A handler whose lease is lost all the same is dropped, since another member may begin with the record; the record
    /// counts as `lost`. One that panics is a nack of class `panic`, one that runs into the handler timeout a nack of class
    /// `timeout`. Outputs of [`Outcome::Complete`] that can never be appended are a reject of class `invalid-output`.
    ///
    /// After `shutdown` nothing new is started, what was not started is released, and running handlers have the drain timeout;
    /// what still runs then is aborted, a nack of class `shutdown`. When the future is dropped, handlers are aborted in the
    /// same way at once.
    ///
    /// # Errors
    /// The group was deleted, or the broker refuses this member; not for lost connections, which are resumed.
    pub async fn run<H, F, O>(self, handler: H, shutdown: impl Future<Output = ()>) -> Result<WorkerReport>
    where
        H: Fn(Delivery) -> F,
        F: Future<Output = O> + Send + 'static,
        O: Into<Outcome> + 'static,
    {
        self.serve(HandlerFn(handler), shutdown).await
    }

    /// As [`ShareConsumer::run`], with a tower service, and so with tower's layers: [`Breaker`](crate::Breaker), limits of
    /// rate, load shedding.
    ///
    /// A record is taken only when the service is ready. One that stays not ready for 200 ms pauses the subscription: what was
    /// not started is released and nothing is asked for; when it is ready again it gets one record, and all it may have once
    /// it is ready after that. An error of the service is a nack of class `service`.
    ///
    /// # Errors
    /// As [`ShareConsumer::run`], or the service will never be ready again.
    pub async fn serve<S>(self, service: S, shutdown: impl Future<Output = ()>) -> Result<WorkerReport>
    where
        S: Service<Delivery, Response = Outcome>,
        S::Future: Send + 'static,
        S::Error: Display + Send + 'static,
    {
        Worker::new(self, OneByOne(service), Gather { size: 1, linger: Duration::ZERO }).run(shutdown).await
    }

    /// As [`ShareConsumer::run`], with records in batches of up to `size`, for work that is cheaper together. A batch begins
    /// when it is full or its first record has waited for `linger`; the concurrency counts batches. The prefetch must be large
    /// enough for them. With key order, a batch never holds two records of a key.
    ///
    /// The handler answers one outcome per record, in the records' order; a record without one is a nack of class
    /// `no-outcome`. A panic or a timeout is that of every record of the batch. The handler is dropped when the leases of all
    /// its records are lost; [`Delivery::lease_is_lost`] tells about each.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use felucca_client::{Client, Delivery, Outcome, Result};
    ///
    /// # async fn insert_all(_: &[Delivery]) -> Vec<bool> { Vec::new() }
    /// # async fn example(client: Client, shutdown: impl Future<Output = ()>) -> Result<()> {
    /// let worker = client.share_consumer("search-index").concurrency(2).prefetch(400).build().await?;
    /// let handler = |batch: Vec<Delivery>| async move {
    ///     let indexed = insert_all(&batch).await;
    ///     indexed.iter().map(|ok| if *ok { Outcome::Ack } else { Outcome::nack("not indexed") }).collect()
    /// };
    /// worker.run_batches(100, Duration::from_millis(20), handler, shutdown).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ShareConsumer::run`].
    pub async fn run_batches<H, F>(
        self,
        size: usize,
        linger: Duration,
        handler: H,
        shutdown: impl Future<Output = ()>,
    ) -> Result<WorkerReport>
    where
        H: Fn(Vec<Delivery>) -> F,
        F: Future<Output = Vec<Outcome>> + Send + 'static,
    {
        Worker::new(self, HandlerFn(handler), Gather { size: size.max(1), linger }).run(shutdown).await
    }
}

/// How records become batches.
#[derive(Clone, Copy, Debug)]
struct Gather {
    size: usize,
    linger: Duration,
}

/// How much is asked of the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intake {
    /// The prefetch.
    Open,
    /// One record, to see whether the handler is ready after it.
    Probing,
    /// Nothing.
    Paused,
}

struct Worker<S> {
    settings: Settings,
    settler: Arc<Settler>,
    deliveries: mpsc::UnboundedReceiver<Result<Delivery>>,
    task: tokio::task::JoinHandle<()>,
    service: S,
    gather: Gather,
    /// Not started yet.
    batch: Vec<Delivery>,
    /// When what was gathered is started.
    start_at: Instant,
    ready: bool,
    /// When the handler was last seen to be ready, or asked first.
    ready_at: Instant,
    intake: Intake,
    running: JoinSet<()>,
    counts: Arc<Counts>,
}

impl<S> Worker<S>
where
    S: Service<Vec<Delivery>, Response = Vec<Outcome>>,
    S::Future: Send + 'static,
    S::Error: Display + Send + 'static,
{
    fn new(consumer: ShareConsumer, service: S, gather: Gather) -> Self {
        let ShareConsumer { settings, settler, deliveries, task } = consumer;
        let now = Instant::now();
        Self {
            settings,
            settler,
            deliveries,
            task,
            service,
            gather,
            batch: Vec::new(),
            start_at: now,
            ready: false,
            ready_at: now,
            intake: Intake::Open,
            running: JoinSet::new(),
            counts: Arc::default(),
        }
    }

    async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<WorkerReport> {
        tokio::pin!(shutdown);
        let ended = loop {
            // Asked no earlier than that: what is running may change what the handler says.
            let room = self.running.len() < self.settings.concurrency;
            let waiting = room && !self.ready;
            let room = room && self.ready;
            let gathering = !self.batch.is_empty();
            tokio::select! {
                biased;
                () = &mut shutdown => break Ok(()),
                Some(_) = self.running.join_next(), if !self.running.is_empty() => {}
                ready = poll_fn(|cx| self.service.poll_ready(cx)), if waiting => match ready {
                    Ok(()) => self.is_ready(),
                    Err(error) => break Err(Error::Handler(error.to_string())),
                },
                delivery = self.deliveries.recv(), if room => match delivery {
                    Some(Ok(delivery)) => self.take(delivery),
                    Some(Err(error)) => break Err(error),
                    None => break Err(Error::Closed),
                },
                () = sleep_until(self.start_at), if room && gathering => self.start(),
                () = sleep_until(self.ready_at + PATIENCE), if waiting && self.intake != Intake::Paused => {
                    self.pause();
                }
            }
        };
        let report = self.end().await;
        ended.map(|()| report)
    }

    fn is_ready(&mut self) {
        self.ready = true;
        self.intake = match self.intake {
            Intake::Paused => {
                self.settler.core.want(1);
                Intake::Probing
            }
            Intake::Probing => {
                self.settler.core.want(self.settings.prefetch);
                Intake::Open
            }
            Intake::Open => Intake::Open,
        };
    }

    fn take(&mut self, mut delivery: Delivery) {
        // Its time was over before its turn came.
        if delivery.lease_is_lost() {
            delivery.settled = true;
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.batch.is_empty() {
            self.start_at = Instant::now() + self.gather.linger;
        }
        self.batch.push(delivery);
        // While probing no more can come.
        if self.batch.len() >= self.gather.size || self.intake == Intake::Probing {
            self.start();
        }
    }

    /// Begins the handler of what was gathered.
    fn start(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        let attempts = batch.iter_mut().map(|delivery| Attempt::new(delivery, &self.counts)).collect();
        let handling = std::panic::catch_unwind(AssertUnwindSafe(|| self.service.call(batch)));
        self.ready = false;
        self.ready_at = Instant::now();
        self.running.spawn(attempt(attempts, handling, self.settings.handler_timeout));
    }

    /// Gives back what was not started and asks for nothing more.
    fn pause(&mut self) {
        tracing::debug!(group = self.settings.group, "the handler is not ready: paused");
        self.intake = Intake::Paused;
        self.settler.core.want(0);
        self.release();
    }

    fn release(&mut self) {
        let mut released = self.batch.len() as u64;
        self.batch.clear();
        while let Ok(queued) = self.deliveries.try_recv() {
            // Dropping it releases it.
            released += u64::from(queued.is_ok());
        }
        self.counts.released.fetch_add(released, Ordering::Relaxed);
    }

    async fn end(mut self) -> WorkerReport {
        self.deliveries.close();
        self.release();
        let Self { settings, settler, deliveries, task, mut running, counts, .. } = self;
        let drained = async { while running.join_next().await.is_some() {} };
        if timeout(settings.drain_timeout, drained).await.is_err() {
            tracing::warn!(group = settings.group, handlers = running.len(), "handlers did not end in time");
            running.shutdown().await;
        }
        drop((settler, deliveries));
        if timeout(FAREWELL, task).await.is_err() {
            tracing::debug!(group = settings.group, "the last settlements are not answered yet");
        }
        counts.report()
    }
}
