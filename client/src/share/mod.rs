//! The share consumer: works through records one by one, together with the other members of its share group.
//!
//! [`task`] keeps the subscription over reconnects, turns pushes into [`Delivery`] values and extends leases; [`leases`]
//! knows what is held and what credit follows; [`settler`] gathers settlements while one request is in flight and repeats
//! them over reconnects, so that each record has its own outcome; [`complete`] acknowledges with outputs; [`worker`] runs a
//! handler with bounded concurrency: a closure or a tower service ([`handler`]), which answers an [`outcome`]; [`breaker`] is a
//! layer around it that keeps records away while what it depends on is down.

mod attempt;
mod breaker;
mod complete;
mod delivery;
mod handler;
mod leases;
mod outcome;
mod settler;
mod task;
mod worker;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::producer::Level;
pub use attempt::WorkerReport;
pub use breaker::{Breaker, Guarded};
pub use delivery::{Delivery, Lease, Nack, Reject, SettleResult};
pub use handler::{HandlerFn, json};
pub use outcome::Outcome;
use settler::Settler;
use task::Task;

pub use felucca_protocol::message::{RecordState, SettleStatus};

/// Settings of a share consumer.
#[derive(Clone, Debug)]
pub struct ShareConsumerBuilder {
    client: Client,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    group: String,
    member_id: String,
    concurrency: usize,
    prefetch: u32,
    prefetch_bytes: u32,
    handler_timeout: Option<Duration>,
    drain_timeout: Duration,
    level: Level,
}

impl ShareConsumerBuilder {
    pub(crate) fn new(client: Client, group: String) -> Self {
        let settings = Settings {
            group,
            member_id: uuid::Uuid::new_v4().to_string(),
            concurrency: 16,
            prefetch: 64,
            prefetch_bytes: 8 << 20,
            handler_timeout: None,
            drain_timeout: Duration::from_secs(30),
            level: Level::Synced,
        };
        Self { client, settings }
    }

    /// Handlers of [`ShareConsumer::run`] at a time; default 16. The prefetch is raised to it.
    #[must_use]
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.settings.concurrency = handlers.max(1);
        self
    }

    /// Records leased ahead, those in work included; default 64.
    #[must_use]
    pub fn prefetch(mut self, records: u32) -> Self {
        self.settings.prefetch = records.max(1);
        self
    }

    /// When a settlement is answered; default [`Level::Synced`]. One that was answered as written may be forgotten when the
    /// broker's machine loses its power, and its record is then delivered once more.
    #[must_use]
    pub fn level(mut self, level: Level) -> Self {
        self.settings.level = level;
        self
    }

    /// Bytes leased ahead; default 8 MiB. A single larger record is still delivered.
    #[must_use]
    pub fn prefetch_bytes(mut self, bytes: u32) -> Self {
        self.settings.prefetch_bytes = bytes.max(1);
        self
    }

    /// A name for this member that outlives the process: a process that comes back under it within the session timeout does
    /// not count as lost; what it held goes back without a failure. Default random.
    #[must_use]
    pub fn member_id(mut self, member_id: impl Into<String>) -> Self {
        self.settings.member_id = member_id.into();
        self
    }

    /// How long a handler may take for its record or batch: it is dropped then, and the outcome is a nack of class `timeout`.
    /// Default: as long as the lease can be extended.
    #[must_use]
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.settings.handler_timeout = Some(timeout);
        self
    }

    /// How long `run` waits for running handlers after the shutdown signal; default 30 s.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.settings.drain_timeout = timeout;
        self
    }

    /// Joins the group. When the future is dropped the member may have joined; it leaves by itself.
    ///
    /// # Errors
    /// The group is unknown or no share group, or the broker cannot be reached within the request timeout.
    pub async fn build(mut self) -> Result<ShareConsumer> {
        let concurrency = u32::try_from(self.settings.concurrency).unwrap_or(u32::MAX);
        self.settings.prefetch = self.settings.prefetch.max(concurrency);
        let settler = Settler::start(self.client, &self.settings);
        // Bounded by the prefetch.
        let (sender, deliveries) = mpsc::unbounded_channel();
        let mut task = Task::new(&settler, sender);
        task.subscribe().await?;
        let task = tokio::spawn(task.run());
        Ok(ShareConsumer { settings: self.settings, settler, deliveries, task })
    }
}

/// A member of a share group. Dropping it releases what was not handed out; it leaves when the last delivery is settled.
///
/// ```no_run
/// use felucca_client::{Client, Delivery, Outcome, Result};
///
/// # async fn send_mail(_: &[u8]) -> std::io::Result<()> { Ok(()) }
/// # async fn example(client: Client) -> Result<()> {
/// let member = client.share_consumer("email").concurrency(8).build().await?;
/// let handler = |delivery: Delivery| async move {
///     match delivery.value.as_deref() {
///         None => Outcome::reject("empty", "an order without content"),
///         Some(order) => match send_mail(order).await {
///             Ok(()) => Outcome::Ack,
///             Err(error) => Outcome::nack(error.to_string()),
///         },
///     }
/// };
/// let report = member.run(handler, async { tokio::signal::ctrl_c().await.unwrap_or(()) }).await?;
/// println!("{} sent, {} to be tried again", report.acked, report.nacked);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ShareConsumer {
    settings: Settings,
    settler: Arc<Settler>,
    deliveries: mpsc::UnboundedReceiver<Result<Delivery>>,
    task: JoinHandle<()>,
}

impl ShareConsumer {
    /// The next leased record. Settle it before its lease ends, or extend it; dropping it unsettled releases it. Until it is
    /// returned here its lease is extended by itself. Waits as long as there is none. Cancellation safe.
    ///
    /// # Errors
    /// The group was deleted, or the broker refuses this member; not for lost connections, which are resumed.
    pub async fn next(&mut self) -> Result<Delivery> {
        loop {
            let mut delivery = self.deliveries.recv().await.unwrap_or(Err(Error::Closed))?;
            if self.settler.core.leases.hand_out(&delivery.lease) {
                return Ok(delivery);
            }
            // Its time was over before its turn came.
            delivery.settled = true;
        }
    }

    /// This member's name in the group.
    pub fn member_id(&self) -> &str {
        &self.settings.member_id
    }
}
