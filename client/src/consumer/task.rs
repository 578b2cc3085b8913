//! What works behind a consumer: keeps its subscription, over reconnects; commits; heartbeats (see [`super::group`]).
//!
//! One loop owns all of it. What it finds out in the end (an error that is not retryable) it puts into the same queue as the
//! records, behind them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use felucca_protocol::batch;
use felucca_protocol::frame::Frame;
use felucca_protocol::{Api, ErrorCode, message};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep_until, timeout};

use super::group::Membership;
use super::positions::{Key, Partition, Positions};
use super::{Fetched, OutOfRange, Settings, Start};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::error::{Error, Result};

/// What the consumer asks of its task.
#[derive(Debug)]
pub(super) enum Order {
    /// What was processed, of every partition.
    Commit(oneshot::Sender<Result<()>>),
    CommitAt(Arc<Partition>, u64, oneshot::Sender<Result<()>>),
    Seek(Arc<Partition>, u64, oneshot::Sender<Result<()>>),
    Close(oneshot::Sender<Result<()>>),
}

/// Whether a request is made again when it got no answer or was refused for now.
#[derive(Clone, Copy, Debug)]
pub(super) enum Repeat {
    No,
    UntilAnswered,
}

/// How long a consumer that was dropped takes to commit and leave.
const LAST_WORDS: Duration = Duration::from_secs(2);
const NEVER: Duration = Duration::from_secs(3600);

pub(super) struct Task {
    pub(super) client: Client,
    pub(super) settings: Settings,
    pub(super) positions: Arc<Positions>,
    pub(super) membership: Membership,
    fetched: mpsc::UnboundedSender<Result<Fetched>>,
    orders: mpsc::Receiver<Order>,
    pushes: Option<(u64, mpsc::UnboundedReceiver<Frame>)>,
    /// The connection that the subscription was opened on.
    session: Option<u64>,
    /// Positions that the log does not have any more, to be moved as the settings say.
    displaced: Vec<Key>,
    /// A push said so while something else was asked for.
    pushed_error: Option<Error>,
    backoff: Backoff,
    not_before: Instant,
}

impl Task {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        positions: Arc<Positions>,
        fetched: mpsc::UnboundedSender<Result<Fetched>>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        Self {
            client,
            settings,
            positions,
            membership: Membership::default(),
            fetched,
            orders,
            pushes: None,
            session: None,
            displaced: Vec::new(),
            pushed_error: None,
            backoff: Backoff::default(),
            not_before: Instant::now(),
        }
    }

    /// Finds the first partitions and where to begin.
    pub(super) async fn begin(&mut self) -> Result<()> {
        let mut keys: Vec<Key> = Vec::new();
        for topic in &self.settings.topics {
            let topic = self.client.look_up(topic).await?;
            keys.extend((0..topic.partitions).map(|partition| (topic.id.clone(), partition)));
        }
        if self.is_member() {
            // Which of them is not for this member to say.
            return self.resume().await;
        }
        for (topic, partitions) in &self.settings.assigned {
            let topic = self.client.look_up(topic).await?;
            if let Some(unknown) = partitions.iter().find(|partition| **partition >= topic.partitions) {
                return Err(Error::Record(format!("topic {:?} has no partition {unknown}", &*topic.name)));
            }
            keys.extend(partitions.iter().map(|partition| (topic.id.clone(), *partition)));
        }
        self.add_partitions(keys).await?;
        self.resume().await
    }

    pub(super) async fn run(mut self) {
        let mut status = self.client.link.status();
        let mut commit = self.settings.auto_commit.map(|interval| Instant::now() + interval);
        loop {
            let number = status.borrow_and_update().number();
            let now = Instant::now();
            let lapsed = number.is_some() && (self.pushes.is_none() || self.session != number);
            let resume_at = if lapsed { self.not_before.max(now) } else { now + NEVER };
            let heartbeat_at = self.next_heartbeat().filter(|_| !lapsed).unwrap_or(now + NEVER);
            let commit_at =
                commit.filter(|_| self.settings.group.is_some() && !lapsed).unwrap_or(now + NEVER);
            let result = tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(Order::Commit(done)) => {
                        let _gone = done.send(self.commit().await);
                        Ok(())
                    }
                    Some(Order::CommitAt(partition, offset, done)) => {
                        let _gone = done.send(self.commit_at(partition, offset).await);
                        Ok(())
                    }
                    Some(Order::Seek(partition, offset, done)) => {
                        self.end_subscription();
                        self.positions.set_subscription(0);
                        partition.seek(offset);
                        let _gone = done.send(Ok(()));
                        Ok(())
                    }
                    Some(Order::Close(done)) => {
                        let _gone = done.send(self.close().await);
                        return;
                    }
                    None => return self.abandon().await,
                },
                // A record could not be decoded: the consumer reads no further.
                () = self.fetched.closed() => return self.abandon().await,
                changed = status.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
                () = sleep_until(resume_at.into()) => self.resume().await,
                () = sleep_until(heartbeat_at.into()) => self.heartbeat().await,
                () = sleep_until(commit_at.into()) => {
                    commit = self.settings.auto_commit.map(|interval| Instant::now() + interval);
                    self.commit().await
                }
                push = next_push(&mut self.pushes) => self.pushed(push),
            };
            let result = result.and(self.pushed_error.take().map_or(Ok(()), Err));
            match result {
                Ok(()) => {}
                Err(error) if error.retryable() => {
                    tracing::debug!(%error, "consumer will try again");
                    let pause = self.backoff.next_after(&error);
                    self.not_before = Instant::now() + pause;
                    self.heartbeat_in(pause);
                }
                Err(error) => {
                    self.end_subscription();
                    // A caller that is gone needs no error.
                    let _gone = self.fetched.send(Err(error));
                    return self.abandon().await;
                }
            }
        }
    }

    /// Reads on over a new connection, or after the subscription was lost.
    async fn resume(&mut self) -> Result<()> {
        self.end_subscription();
        if self.is_member() {
            self.heartbeat().await?;
        }
        self.move_displaced().await?;
        if self.pushes.is_none() {
            self.subscribe().await?;
        }
        self.backoff = Backoff::default();
        Ok(())
    }

    /// Takes in partitions at their committed offset, or where the settings say.
    pub(super) async fn add_partitions(&self, keys: Vec<Key>) -> Result<()> {
        let committed = self.fetch_committed(&keys).await?;
        let fresh: Vec<&Key> = keys.iter().filter(|key| !committed.contains_key(*key)).collect();
        let mut begin = std::collections::HashMap::new();
        for of_topic in fresh.chunk_by(|a, b| a.0 == b.0) {
            begin.extend(self.start_offsets(of_topic).await?);
        }
        for key in keys {
            let at = committed.get(&key).copied();
            let Some(next) = at.or_else(|| begin.get(&key).copied()) else {
                return Err(Error::Protocol("the broker left out a partition's offsets".to_owned()));
            };
            let topic = self.client.topic_by_id(&key.0).await?.name;
            self.positions.insert(Partition::new(key, topic, next, at));
        }
        Ok(())
    }

    /// Moves the positions that the log does not have any more.
    async fn move_displaced(&mut self) -> Result<()> {
        while let Some(key) = self.displaced.last() {
            let offsets = self.offsets(&[key], None).await?;
            if let (Some(partition), Some(offsets)) = (self.positions.get(key), offsets.first()) {
                let to_end = self.settings.out_of_range == OutOfRange::End;
                let next = if to_end { offsets.high_watermark } else { offsets.log_start };
                let (topic, number, from) = (&partition.topic, key.1, partition.next());
                tracing::warn!(%topic, partition = number, from, next, "records were deleted before they were read");
                self.positions.set_subscription(0);
                partition.seek(next);
            }
            self.displaced.pop();
        }
        Ok(())
    }

    /// Where the settings say to begin, on partitions of one topic.
    async fn start_offsets(&self, keys: &[&Key]) -> Result<Vec<(Key, u64)>> {
        let timestamp = match self.settings.start {
            Start::Offset(offset) => return Ok(keys.iter().map(|key| ((*key).clone(), offset)).collect()),
            Start::Beginning | Start::End => None,
            Start::Timestamp(timestamp) => Some(timestamp),
        };
        let Some((topic_id, _)) = keys.first() else { return Ok(Vec::new()) };
        let of = |offsets: message::PartitionOffsets| {
            let begin = match self.settings.start {
                Start::Beginning => offsets.log_start,
                _ => offsets.offset_for_timestamp.unwrap_or(offsets.high_watermark),
            };
            ((topic_id.clone(), offsets.partition), begin)
        };
        Ok(self.offsets(keys, timestamp).await?.into_iter().map(of).collect())
    }

    /// What the log says of partitions of one topic.
    async fn offsets(&self, keys: &[&Key], timestamp: Option<i64>) -> Result<Vec<message::PartitionOffsets>> {
        let Some((topic_id, _)) = keys.first() else { return Ok(Vec::new()) };
        let partitions = keys.iter().map(|(_, partition)| *partition).collect();
        let request = message::ListOffsets { topic_id: topic_id.clone(), partitions, timestamp };
        let (reply, _): (message::ListOffsetsReply, _) =
            self.client.link.ask_until(Api::ListOffsets, &request, Vec::new()).await?;
        Ok(reply.partitions)
    }

    /// Asks the broker while pushes go on to the consumer: reading does not wait for heartbeats and commits.
    pub(super) async fn ask<R: prost::Message + Default>(
        &mut self,
        api: Api,
        request: &impl prost::Message,
        repeat: Repeat,
    ) -> Result<R> {
        let link = self.client.link.clone();
        let asking = async {
            match repeat {
                Repeat::No => link.ask(api, request, Vec::new()).await,
                Repeat::UntilAnswered => link.ask_until(api, request, Vec::new()).await,
            }
        };
        tokio::pin!(asking);
        loop {
            tokio::select! {
                biased;
                answer = &mut asking => return answer.map(|(reply, _)| reply),
                push = next_push(&mut self.pushes) => {
                    if let Err(error) = self.pushed(push) {
                        self.pushed_error.get_or_insert(error);
                    }
                }
            }
        }
    }

    // ---- Subscription ----

    pub(super) async fn subscribe(&mut self) -> Result<()> {
        self.end_subscription();
        let patience = self.client.link.request_timeout();
        let session = self.client.link.connected(patience).await?.number;
        let (subscription, pushes) = self.client.link.open_subscription();
        self.positions.set_subscription(subscription);
        let of = |partition: Arc<Partition>| message::Position {
            topic_id: partition.key.0.clone(),
            partition: partition.key.1,
            offset: partition.next(),
        };
        let positions: Vec<message::Position> = self.positions.all().into_iter().map(of).collect();
        self.pushes = Some((subscription, pushes));
        self.session = Some(session);
        if positions.is_empty() {
            return Ok(());
        }
        let request = message::Subscribe {
            subscription,
            positions,
            credit_records: self.settings.credit_records,
            credit_bytes: self.settings.credit_bytes,
        };
        let subscribed: Result<(message::Empty, _)> =
            self.client.link.ask(Api::Subscribe, &request, Vec::new()).await;
        if subscribed.is_err() {
            self.end_subscription();
        }
        subscribed.map(|_| ())
    }

    pub(super) fn end_subscription(&mut self) {
        if let Some((subscription, _)) = self.pushes.take() {
            self.client.link.close_subscription(subscription);
            if self.client.link.session().map(|session| session.number) == self.session {
                self.client.link.tell(Api::Unsubscribe, &message::Unsubscribe { subscription });
            }
        }
    }

    fn pushed(&mut self, push: Option<Frame>) -> Result<()> {
        let Some(push) = push else {
            self.end_subscription();
            return Err(Error::Disconnected);
        };
        let malformed = |error: prost::DecodeError| Error::Protocol(error.to_string());
        if push.api == u8::from(Api::SubscriptionEnded) {
            let ended: message::SubscriptionEnded = push.decode_message().map_err(malformed)?;
            self.end_subscription();
            let partition = self.positions.get(&(ended.topic_id, ended.partition));
            let error = ended.error.map(Error::from);
            let displaced = error.as_ref().and_then(Error::code) == Some(ErrorCode::OffsetOutOfRange);
            if let Some(partition) = partition.as_ref().filter(|_| displaced)
                && self.settings.out_of_range != OutOfRange::Fail
            {
                self.displaced.push(partition.key.clone());
                return Ok(());
            }
            return Err(match (error, partition) {
                (Some(Error::Broker { code, message, retry_after }), Some(partition)) => {
                    let message = format!("{}/{}: {message}", partition.topic, partition.key.1);
                    Error::Broker { code, message, retry_after }
                }
                (Some(error), _) => error,
                (None, _) => Error::Disconnected,
            });
        }
        if push.api != u8::from(Api::Records) {
            return Err(Error::Protocol(format!("push {} for an ordered subscription", push.api)));
        }
        let records: message::Records = push.decode_message().map_err(malformed)?;
        // Given up meanwhile: the next subscription does without it.
        let Some(partition) = self.positions.get(&(records.topic_id, records.partition)) else {
            return Ok(());
        };
        let payload = push.payload.freeze();
        for batch in batch::split(&payload) {
            let (subscription, partition) = (records.subscription, partition.clone());
            let fetched = Fetched { subscription, partition, batch: batch? };
            // A consumer that is gone needs no records.
            let _gone = self.fetched.send(Ok(fetched));
        }
        Ok(())
    }

    // ---- The end ----

    async fn close(&mut self) -> Result<()> {
        let committed = match (&self.settings.group, self.settings.auto_commit) {
            (Some(_), Some(_)) => self.commit().await,
            _ => Ok(()),
        };
        self.end_subscription();
        let left = if self.is_member() { self.leave().await } else { Ok(()) };
        committed.and(left)
    }

    /// [`Task::close`] for a consumer that was dropped: for a moment, while there is a connection.
    async fn abandon(&mut self) {
        if self.client.link.session().is_some() {
            let closed = timeout(LAST_WORDS, self.close()).await;
            if !matches!(closed, Ok(Ok(()))) {
                tracing::debug!(?closed, "a dropped consumer did not leave in order");
            }
        }
    }
}

/// The next push; never without a subscription.
async fn next_push(pushes: &mut Option<(u64, mpsc::UnboundedReceiver<Frame>)>) -> Option<Frame> {
    match pushes {
        Some((_, pushes)) => pushes.recv().await,
        None => std::future::pending().await,
    }
}
