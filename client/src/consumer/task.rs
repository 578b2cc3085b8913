//! What works behind a consumer: subscription, assignment, commits.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use felucca_protocol::batch;
use felucca_protocol::frame::Frame;
use felucca_protocol::{Api, ErrorCode, message};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::{Fetched, Key, Position, Positions, Settings, Start};
use crate::client::Client;
use crate::error::{Error, Result};

/// What the consumer asks of its task.
pub(super) enum Order {
    Commit(oneshot::Sender<Result<()>>),
    Resubscribe(oneshot::Sender<Result<()>>),
    Close(oneshot::Sender<Result<()>>),
}

pub(super) struct Task {
    client: Client,
    settings: Settings,
    positions: Arc<Mutex<Positions>>,
    fetched: mpsc::UnboundedSender<Result<Fetched>>,
    orders: mpsc::Receiver<Order>,
    pushes: Option<(u64, mpsc::UnboundedReceiver<Frame>)>,
    generation: u64,
    heartbeat_interval: Duration,
}

impl Task {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        positions: Arc<Mutex<Positions>>,
        fetched: mpsc::UnboundedSender<Result<Fetched>>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        let heartbeat_interval = Duration::from_millis(500);
        Self { client, settings, positions, fetched, orders, pushes: None, generation: 0, heartbeat_interval }
    }

    fn is_member(&self) -> bool {
        self.settings.group.is_some() && self.settings.assigned.is_empty()
    }

    /// Finds the first partitions and where to begin.
    pub(super) async fn begin(&mut self) -> Result<()> {
        if self.is_member() {
            for topic in &self.settings.topics {
                self.client.topic(topic).await?;
            }
            return self.heartbeat(false).await;
        }
        let mut keys = Vec::new();
        for topic in &self.settings.topics {
            let topic = self.client.topic(topic).await?;
            keys.extend((0..topic.partitions).map(|partition| (topic.id.clone(), partition)));
        }
        for (topic, partitions) in &self.settings.assigned {
            let topic = self.client.topic(topic).await?;
            if let Some(unknown) = partitions.iter().find(|partition| **partition >= topic.partitions) {
                return Err(Error::Record(format!("topic {:?} has no partition {unknown}", &*topic.name)));
            }
            keys.extend(partitions.iter().map(|partition| (topic.id.clone(), *partition)));
        }
        self.add_partitions(keys).await?;
        self.subscribe().await
    }

    pub(super) async fn run(mut self) {
        let mut sessions = self.client.link.sessions();
        let mut session = sessions.borrow_and_update().as_ref().map(|session| session.number);
        let mut heartbeat = Instant::now() + self.heartbeat_interval;
        let mut commit = self.settings.auto_commit.map(|interval| Instant::now() + interval);
        let far = Duration::from_secs(3600);
        loop {
            let next_heartbeat = if self.is_member() { heartbeat } else { Instant::now() + far };
            let next_commit =
                commit.filter(|_| self.settings.group.is_some()).unwrap_or_else(|| Instant::now() + far);
            let result = tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(Order::Commit(done)) => {
                        let _gone = done.send(self.commit().await);
                        Ok(())
                    }
                    Some(Order::Resubscribe(done)) => {
                        let _gone = done.send(self.subscribe().await);
                        Ok(())
                    }
                    Some(Order::Close(done)) => {
                        let _gone = done.send(self.close().await);
                        return;
                    }
                    // Dropped without close: the session will time out.
                    None => return self.end_subscription(),
                },
                changed = sessions.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = sessions.borrow_and_update().as_ref().map(|session| session.number);
                    if now.is_some() && now != session {
                        session = now;
                        self.resume().await
                    } else {
                        Ok(())
                    }
                }
                Some(push) = receive(&mut self.pushes) => self.pushed(push).await,
                () = tokio::time::sleep_until(next_heartbeat.into()) => {
                    heartbeat = Instant::now() + self.heartbeat_interval;
                    self.heartbeat(false).await
                }
                () = tokio::time::sleep_until(next_commit.into()) => {
                    commit = self.settings.auto_commit.map(|interval| Instant::now() + interval);
                    self.commit().await
                }
            };
            match result {
                Ok(()) => {}
                Err(error) if error.retryable() => {
                    tracing::debug!(%error, "consumer will try again");
                    // A lost connection is resumed by its successor; anything else is tried again soon.
                    heartbeat = Instant::now() + Duration::from_millis(100);
                    if session.is_some() && self.pushes.is_none() {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        session = None;
                        sessions.mark_changed();
                    }
                }
                Err(error) => {
                    self.end_subscription();
                    let _gone = self.fetched.send(Err(error));
                    return;
                }
            }
        }
    }

    /// After a new connection: the old subscription is gone with the old one.
    async fn resume(&mut self) -> Result<()> {
        self.end_subscription();
        if self.is_member() { self.heartbeat(true).await } else { self.subscribe().await }
    }

    // ---- Assignment ----

    /// Tells what is owned, learns what should be. `renew` opens the subscription anew in any case.
    async fn heartbeat(&mut self, renew: bool) -> Result<()> {
        let owned: BTreeSet<Key> = self.positions.lock().partitions.keys().cloned().collect();
        let reply = self.send_heartbeat(&owned, false).await?;
        self.generation = reply.generation;
        self.heartbeat_interval = Duration::from_millis(u64::from(reply.interval_ms.max(10)));
        let assigned: BTreeSet<Key> =
            reply.assigned.into_iter().map(|partition| (partition.topic_id, partition.partition)).collect();
        let lost: Vec<Key> = owned.difference(&assigned).cloned().collect();
        let added: Vec<Key> = assigned.difference(&owned).cloned().collect();
        if !lost.is_empty() {
            if self.settings.auto_commit.is_some() {
                self.commit().await?;
            }
            let mut positions = self.positions.lock();
            for key in &lost {
                positions.partitions.remove(key);
            }
        }
        if !added.is_empty() {
            self.add_partitions(added.clone()).await?;
        }
        if renew || self.pushes.is_none() || !lost.is_empty() || !added.is_empty() {
            self.subscribe().await?;
        }
        if !lost.is_empty() {
            // At once, so that the next owner need not wait for the interval.
            let owned = self.positions.lock().partitions.keys().cloned().collect();
            self.send_heartbeat(&owned, false).await?;
        }
        Ok(())
    }

    async fn send_heartbeat(
        &self,
        owned: &BTreeSet<Key>,
        leave: bool,
    ) -> Result<message::GroupHeartbeatReply> {
        let owned = owned.iter();
        let request = message::GroupHeartbeat {
            group: self.settings.group.clone().unwrap_or_default(),
            member_id: self.settings.member_id.clone(),
            topics: self.settings.topics.clone(),
            owned: owned.map(|(id, partition)| topic_partition(id, *partition)).collect(),
            generation: self.generation,
            leave,
        };
        Ok(self.client.link.ask(Api::GroupHeartbeat, &request, Vec::new()).await?.0)
    }

    /// Takes in partitions at their committed offset, or where the settings say.
    async fn add_partitions(&mut self, keys: Vec<Key>) -> Result<()> {
        let mut committed = std::collections::HashMap::new();
        if let Some(group) = &self.settings.group {
            let partitions = keys.iter().map(|(id, partition)| topic_partition(id, *partition)).collect();
            let request = message::FetchOffsets { group: group.clone(), partitions };
            let (reply, _): (message::FetchOffsetsReply, _) =
                self.client.link.ask_until(Api::FetchOffsets, &request, Vec::new()).await?;
            committed.extend(
                reply.offsets.into_iter().map(|offset| ((offset.topic_id, offset.partition), offset.offset)),
            );
        }
        for key in keys {
            let at = committed.get(&key).copied();
            let next = match at {
                Some(offset) => offset,
                None => self.start_offset(&key).await?,
            };
            let position = Position { next, processed: next, committed: at };
            self.positions.lock().partitions.insert(key, position);
        }
        Ok(())
    }

    async fn start_offset(&self, key: &Key) -> Result<u64> {
        let timestamp = match self.settings.start {
            Start::Offset(offset) => return Ok(offset),
            Start::Beginning | Start::End => None,
            Start::Timestamp(timestamp) => Some(timestamp),
        };
        let request = message::ListOffsets { topic_id: key.0.clone(), partitions: vec![key.1], timestamp };
        let (reply, _): (message::ListOffsetsReply, _) =
            self.client.link.ask_until(Api::ListOffsets, &request, Vec::new()).await?;
        let Some(offsets) = reply.partitions.first() else {
            return Err(Error::Protocol("no offsets".to_owned()));
        };
        Ok(match self.settings.start {
            Start::Beginning => offsets.log_start,
            _ => offsets.offset_for_timestamp.unwrap_or(offsets.high_watermark),
        })
    }

    // ---- Subscription ----

    async fn subscribe(&mut self) -> Result<()> {
        self.end_subscription();
        let (subscription, pushes) = self.client.link.open_subscription();
        let wanted: Vec<message::Position> = {
            let mut positions = self.positions.lock();
            positions.subscription = subscription;
            let of = |((topic_id, partition), position): (&Key, &Position)| message::Position {
                topic_id: topic_id.clone(),
                partition: *partition,
                offset: position.next,
            };
            positions.partitions.iter().map(of).collect()
        };
        self.pushes = Some((subscription, pushes));
        if wanted.is_empty() {
            return Ok(());
        }
        let request = message::Subscribe {
            subscription,
            positions: wanted,
            credit_records: self.settings.credit_records,
            credit_bytes: self.settings.credit_bytes,
        };
        let subscribed: Result<(message::Empty, _)> =
            self.client.link.ask(Api::Subscribe, &request, Vec::new()).await;
        if let Err(error) = subscribed {
            self.end_subscription();
            return Err(error);
        }
        Ok(())
    }

    fn end_subscription(&mut self) {
        if let Some((subscription, _)) = self.pushes.take() {
            self.client.link.close_subscription(subscription);
            self.client.link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription });
        }
    }

    async fn pushed(&mut self, push: Frame) -> Result<()> {
        let malformed = |error: prost::DecodeError| Error::Protocol(error.to_string());
        if push.api == u8::from(Api::SubscriptionEnded) {
            let ended: message::SubscriptionEnded = push.decode_message().map_err(malformed)?;
            self.end_subscription();
            let error = ended.error.map_or(Error::Disconnected, Error::from);
            // What concerns the connection is resumed; what concerns the log is the caller's.
            return Err(match error.code() {
                Some(ErrorCode::Stopping) => Error::Disconnected,
                _ => error,
            });
        }
        let records: message::Records = push.decode_message().map_err(malformed)?;
        let topic = self.client.topic_by_id(&records.topic_id).await?.name;
        let payload = push.payload.freeze();
        for batch in batch::split(&payload) {
            let batch = batch?;
            let key = (records.topic_id.clone(), records.partition);
            let fetched = Fetched { subscription: records.subscription, topic: topic.clone(), key, batch };
            let _gone = self.fetched.send(Ok(fetched));
        }
        Ok(())
    }

    // ---- Commits ----

    async fn commit(&mut self) -> Result<()> {
        let Some(group) = self.settings.group.clone() else {
            return Err(Error::Record("a consumer without a group has nothing to commit to".to_owned()));
        };
        let (keys, offsets): (Vec<(Key, u64)>, Vec<message::CommittedOffset>) = {
            let positions = self.positions.lock();
            let moved = positions
                .partitions
                .iter()
                .filter(|(_, position)| position.committed != Some(position.processed));
            moved
                .map(|(key, position)| {
                    let offset = message::CommittedOffset {
                        topic_id: key.0.clone(),
                        partition: key.1,
                        offset: position.processed,
                        metadata: String::new(),
                    };
                    ((key.clone(), position.processed), offset)
                })
                .unzip()
        };
        if keys.is_empty() {
            return Ok(());
        }
        let member_id = if self.is_member() { self.settings.member_id.clone() } else { String::new() };
        let request = message::CommitOffsets { group, member_id, generation: self.generation, offsets };
        let (reply, _): (message::CommitOffsetsReply, _) =
            self.client.link.ask_until(Api::CommitOffsets, &request, Vec::new()).await?;
        let mut first_error = None;
        for ((key, offset), result) in keys.into_iter().zip(reply.results) {
            match result.error.map(Error::from) {
                None => {
                    if let Some(position) = self.positions.lock().partitions.get_mut(&key) {
                        position.committed = Some(offset);
                    }
                }
                // The partition has another owner, or the session ended and is joined again by the next heartbeat.
                Some(error)
                    if matches!(
                        error.code(),
                        Some(ErrorCode::NotAssigned | ErrorCode::StaleGeneration | ErrorCode::UnknownMember)
                    ) => {}
                Some(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    async fn close(&mut self) -> Result<()> {
        let committed = if self.settings.group.is_some() && self.settings.auto_commit.is_some() {
            self.commit().await
        } else {
            Ok(())
        };
        self.end_subscription();
        if self.is_member() {
            self.send_heartbeat(&BTreeSet::new(), true).await?;
        }
        committed
    }
}

fn topic_partition(topic_id: &bytes::Bytes, partition: u32) -> message::TopicPartition {
    message::TopicPartition { topic_id: topic_id.clone(), partition }
}

/// The next push; never without a subscription.
async fn receive(pushes: &mut Option<(u64, mpsc::UnboundedReceiver<Frame>)>) -> Option<Frame> {
    match pushes {
        Some((_, pushes)) => pushes.recv().await,
        None => std::future::pending().await,
    }
}
