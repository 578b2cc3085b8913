//! The member itself: keeps it subscribed, over reconnects and lost sessions, turns pushes into deliveries, and extends the
//! leases of what is queued or in a worker's handler.
//!
//! When the consumer is gone the member *drains*: it stays subscribed without credit, which releases what was on its way to
//! it and keeps its session alive for the handlers that still run, until the last delivery is settled.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use felucca_protocol::batch;
use felucca_protocol::frame::Frame;
use felucca_protocol::{Api, ErrorCode, message};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use uuid::Uuid;

use super::delivery::{Delivery, Lease};
use super::settler::{Core, Settler};
use crate::backoff::Backoff;
use crate::error::{Error, Result};
use crate::record::ConsumedRecord;

const NEVER: Duration = Duration::from_secs(3600);
/// How long the member takes to leave in order.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often leases are looked at: an eighth of their time, within these.
const SHORTEST_TICK: Duration = Duration::from_millis(10);
const LONGEST_TICK: Duration = Duration::from_secs(1);

pub(super) struct Task {
    core: Arc<Core>,
    /// Alive as long as anybody can settle.
    settler: Weak<Settler>,
    deliveries: mpsc::UnboundedSender<Result<Delivery>>,
    subscription: Option<(u64, mpsc::UnboundedReceiver<Frame>)>,
    /// The connection that the subscription was opened on.
    session: Option<u64>,
    draining: bool,
    tick: Duration,
    backoff: Backoff,
    not_before: Instant,
}

impl Task {
    pub(super) fn new(settler: &Arc<Settler>, deliveries: mpsc::UnboundedSender<Result<Delivery>>) -> Self {
        Self {
            core: settler.core.clone(),
            settler: Arc::downgrade(settler),
            deliveries,
            subscription: None,
            session: None,
            draining: false,
            tick: LONGEST_TICK,
            backoff: Backoff::default(),
            not_before: Instant::now(),
        }
    }

    /// Opens a subscription that goes on with what is held; whatever else the broker has leased to this member goes back.
    pub(super) async fn subscribe(&mut self) -> Result<()> {
        self.unsubscribe();
        let link = &self.core.client.link;
        let session = link.connected(link.request_timeout()).await?;
        let (subscription, pushes) = link.open_subscription();
        let (credit_records, credit_bytes, held) = self.core.leases.open();
        let request = message::ShareSubscribe {
            subscription,
            group: self.core.group.clone(),
            member_id: self.core.member_id.clone(),
            credit_records,
            credit_bytes,
            held,
        };
        let subscribed: Result<(message::Empty, _)> =
            link.ask(Api::ShareSubscribe, &request, Vec::new()).await;
        if let Err(error) = subscribed {
            link.close_subscription(subscription);
            link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription });
            return Err(error);
        }
        if let Some(owed) = self.core.leases.opened(subscription) {
            link.tell(Api::Credit, &owed);
        }
        self.subscription = Some((subscription, pushes));
        self.session = Some(session.number);
        Ok(())
    }

    /// Ends the subscription. What it has pushed and nobody looked at goes back with the next one.
    fn unsubscribe(&mut self) {
        self.core.leases.closed();
        if let Some((subscription, _)) = self.subscription.take() {
            let link = &self.core.client.link;
            link.close_subscription(subscription);
            if link.session().map(|session| session.number) == self.session {
                link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription });
            }
        }
    }

    pub(super) async fn run(mut self) {
        let mut status = self.core.client.link.status();
        let ended = self.core.ended.clone();
        let mut tick_at = Instant::now() + self.tick;
        loop {
            let now = Instant::now();
            let number = status.borrow_and_update().number();
            let lapsed = number.is_some() && (self.subscription.is_none() || self.session != number);
            let resume_at = if lapsed { self.not_before.max(now) } else { now + NEVER };
            let result = tokio::select! {
                biased;
                () = ended.cancelled() => {
                    self.farewell().await;
                    return;
                }
                () = self.deliveries.closed(), if !self.draining => {
                    self.drain();
                    Ok(())
                }
                changed = status.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
                () = sleep_until(resume_at.into()) => self.subscribe().await,
                () = sleep_until(tick_at.into()) => {
                    tick_at = self.look_at_leases();
                    Ok(())
                }
                () = self.core.shrunk.notified() => {
                    // One with less credit is opened at once.
                    self.unsubscribe();
                    self.not_before = Instant::now();
                    Ok(())
                }
                push = next_push(&mut self.subscription) => match push {
                    Some(push) => self.pushed(push).await,
                    None => Err(Error::Disconnected),
                },
            };
            match result {
                Ok(()) => {
                    if self.subscription.is_some() {
                        self.backoff = Backoff::default();
                    }
                }
                Err(error) if error.retryable() => {
                    tracing::debug!(group = self.core.group, %error, "share subscription will be opened again");
                    self.unsubscribe();
                    self.not_before = Instant::now() + self.backoff.next_after(&error);
                }
                Err(error) => {
                    self.unsubscribe();
                    // A consumer that is gone needs no error.
                    let _gone = self.deliveries.send(Err(error));
                    return;
                }
            }
            tick_at = tick_at.min(Instant::now() + self.tick);
        }
    }

    fn drain(&mut self) {
        self.draining = true;
        self.core.leases.drain();
        // The next one is opened at once.
        self.unsubscribe();
        self.not_before = Instant::now();
    }

    /// Leaves, so that nothing stays leased to a member that is gone.
    async fn farewell(&mut self) {
        let link = self.core.client.link.clone();
        if link.session().is_none() {
            return;
        }
        let leaving = async {
            let drained = self.draining && self.subscription.is_some();
            if !drained {
                self.drain();
                self.subscribe().await?;
            }
            let Some((subscription, _)) = self.subscription.take() else { return Ok(()) };
            link.close_subscription(subscription);
            let request = message::Unsubscribe { subscription };
            let _: (message::Empty, _) = link.ask(Api::Unsubscribe, &request, Vec::new()).await?;
            Ok::<(), Error>(())
        };
        let left = timeout(FAREWELL, leaving).await;
        if !matches!(left, Ok(Ok(()))) {
            tracing::debug!(group = self.core.group, ?left, "a member did not leave in order");
        }
    }

    /// Ends and extends leases; answers when to look again.
    fn look_at_leases(&self) -> Instant {
        let now = Instant::now();
        let due = self.core.leases.due(now);
        if let Some(credit) = due.credit {
            self.core.client.link.tell(Api::Credit, &credit);
        }
        if let Some(settler) = self.settler.upgrade() {
            due.extend.into_iter().for_each(|lease| settler.keep(lease));
        }
        due.next_end.map_or(now + self.tick, |end| end.min(now + self.tick))
    }

    async fn pushed(&mut self, push: Frame) -> Result<()> {
        let malformed = |error: prost::DecodeError| Error::Protocol(error.to_string());
        if push.api == u8::from(Api::SubscriptionEnded) {
            let ended: message::SubscriptionEnded = push.decode_message().map_err(malformed)?;
            let error = ended.error.map_or(Error::Disconnected, Error::from);
            return Err(match error.code() {
                // The session ended while the connection did not; the member joins again.
                Some(ErrorCode::Stopping | ErrorCode::UnknownMember) => Error::Disconnected,
                _ => error,
            });
        }
        if push.api != u8::from(Api::LeasedRecords) {
            return Err(Error::Protocol(format!("push {} for a share subscription", push.api)));
        }
        let leased: message::LeasedRecords = push.decode_message().map_err(malformed)?;
        let topic = self.core.client.topic_by_id(&leased.topic_id).await?;
        let lease_duration = Duration::from_millis(u64::from(leased.lease_ms));
        self.tick = self.tick.min((lease_duration / 8).clamp(SHORTEST_TICK, LONGEST_TICK));
        let topic_id =
            Uuid::from_slice(&leased.topic_id).map_err(|error| Error::Protocol(error.to_string()))?;
        let now = Instant::now();
        let payload = push.payload.freeze();
        let mut index = 0;
        for batch in batch::split(&payload) {
            let batch = batch?;
            batch::check(&batch)?;
            // The broker takes a record's own bytes from the credit, and expects exactly these back.
            let scanned = batch::scan(&batch)?;
            for (record, meta) in batch::records(&batch)?.zip(&scanned) {
                let (record, size) = (record?, meta?.size);
                let lease = Lease {
                    topic_id,
                    partition: leased.partition,
                    offset: record.offset,
                    boot_epoch: leased.boot_epoch,
                    sequence: leased.first_sequence + index as u64,
                };
                // Without anybody to settle it, it goes back with the farewell.
                let Some(settler) = self.settler.upgrade() else { return Ok(()) };
                if let Some(credit) = self.core.leases.hold(&lease, size, now, lease_duration) {
                    self.core.client.link.tell(Api::Credit, &credit);
                }
                let delivery = Delivery {
                    record: ConsumedRecord {
                        topic: topic.name.clone(),
                        partition: leased.partition,
                        offset: record.offset,
                        timestamp: record.timestamp,
                        key: record.key,
                        value: record.value,
                        headers: record.headers,
                    },
                    lease,
                    delivery_count: leased.delivery_counts.get(index).copied().unwrap_or(1),
                    failure_count: leased.failure_counts.get(index).copied().unwrap_or(0),
                    lease_duration,
                    settler,
                    settled: false,
                };
                index += 1;
                // A consumer that is gone releases by dropping the delivery.
                let _gone = self.deliveries.send(Ok(delivery));
            }
        }
        Ok(())
    }
}

async fn next_push(subscription: &mut Option<(u64, mpsc::UnboundedReceiver<Frame>)>) -> Option<Frame> {
    match subscription {
        Some((_, pushes)) => pushes.recv().await,
        None => std::future::pending().await,
    }
}
