//! Keeps a member subscribed, over reconnects and lost sessions, and turns pushes into deliveries.

use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::batch;
use felucca_protocol::frame::Frame;
use felucca_protocol::{Api, ErrorCode, message};
use tokio::sync::mpsc;

use super::Settings;
use super::delivery::{Delivery, Lease};
use super::settler::Settler;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::link::Backoff;
use crate::record::ConsumedRecord;

pub(super) struct Task {
    client: Client,
    settings: Settings,
    settler: Arc<Settler>,
    deliveries: mpsc::UnboundedSender<Result<Delivery>>,
    subscription: Option<(u64, mpsc::UnboundedReceiver<Frame>)>,
    /// The connection that the subscription was opened on.
    session: Option<u64>,
}

impl Task {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        settler: Arc<Settler>,
        deliveries: mpsc::UnboundedSender<Result<Delivery>>,
    ) -> Self {
        Self { client, settings, settler, deliveries, subscription: None, session: None }
    }

    /// Opens a subscription that goes on with what is held.
    pub(super) async fn subscribe(&mut self) -> Result<()> {
        self.unsubscribe();
        let session = self.client.link.connected(self.client.link.request_timeout()).await?;
        let (id, pushes) = self.client.link.open_subscription();
        self.subscription = Some((id, pushes));
        let (records, bytes) = self.settler.held_credit();
        let request = message::ShareSubscribe {
            subscription: id,
            group: self.settings.group.clone(),
            member_id: self.settings.member_id.clone(),
            credit_records: self.settings.prefetch.saturating_sub(records),
            credit_bytes: self.settings.prefetch_bytes.saturating_sub(bytes).max(1),
            held: self.settler.held().iter().map(Lease::to_message).collect(),
        };
        self.settler.subscribed(id);
        let subscribed: Result<(message::Empty, _)> =
            self.client.link.ask(Api::ShareSubscribe, &request, Vec::new()).await;
        if let Err(error) = subscribed {
            self.unsubscribe();
            return Err(error);
        }
        self.session = Some(session.number);
        Ok(())
    }

    fn unsubscribe(&mut self) {
        self.settler.subscribed(0);
        if let Some((subscription, _)) = self.subscription.take() {
            self.client.link.close_subscription(subscription);
            self.client.link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription });
        }
    }

    pub(super) async fn run(mut self) {
        let mut sessions = self.client.link.sessions();
        let mut backoff = Backoff::default();
        loop {
            let current = sessions.borrow_and_update().as_ref().map(|session| session.number);
            if current.is_some() && (current != self.session || self.subscription.is_none()) {
                match self.subscribe().await {
                    Ok(()) => backoff = Backoff::default(),
                    Err(error) if error.retryable() => {
                        tracing::debug!(%error, "share subscription will be tried again");
                        backoff.wait().await;
                        continue;
                    }
                    Err(error) => {
                        let _gone = self.deliveries.send(Err(error));
                        return;
                    }
                }
            }
            let push = tokio::select! {
                biased;
                () = self.deliveries.closed() => return self.unsubscribe(),
                changed = sessions.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                push = next_push(&mut self.subscription) => push,
            };
            let result = match push {
                Some(push) => self.pushed(push).await,
                None => Err(Error::Disconnected),
            };
            match result {
                Ok(()) => {}
                Err(error) if error.retryable() => {
                    self.unsubscribe();
                    backoff.wait().await;
                }
                Err(error) => {
                    self.unsubscribe();
                    let _gone = self.deliveries.send(Err(error));
                    return;
                }
            }
        }
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
        let leased: message::LeasedRecords = push.decode_message().map_err(malformed)?;
        let topic = self.client.topic_by_id(&leased.topic_id).await?;
        let payload = push.payload.freeze();
        let mut index = 0;
        for batch in batch::split(&payload) {
            let batch = batch?;
            let count = batch::BatchHeader::parse(&batch)?.record_count.max(1);
            let size = u32::try_from(batch.len()).unwrap_or(u32::MAX) / count;
            for record in batch::records(&batch)? {
                let record = record?;
                let lease = Lease {
                    topic_id: leased.topic_id.clone(),
                    partition: leased.partition,
                    offset: record.offset,
                    boot_epoch: leased.boot_epoch,
                    sequence: leased.first_sequence + index as u64,
                };
                self.settler.hold(&lease, size);
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
                    lease_duration: Duration::from_millis(u64::from(leased.lease_ms)),
                    settler: self.settler.clone(),
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
