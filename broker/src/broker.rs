//! The front door: what every listener calls, and all that it knows of the broker.
//!
//! Commands go to the shard and come back as [`Reply`] values at the caller's [`Sink`](crate::shard::Sink); reads of
//! records go straight to the read views. No wire format of any listener appears here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use felucca_protocol::batch::{self, BatchLimits};
use tokio::sync::Notify;
use tokio::sync::oneshot::Receiver;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::engine::command::{Command, SeekTo};
use crate::engine::effect::{GroupDescription, Reply, TopicInfo};
use crate::engine::error::EngineError;
use crate::engine::types::{PartitionKey, SubscriptionId, TopicId};
use crate::log::{ReadError, ReadView, Views};
use crate::shard::{Gate, Inbox, Once, Submission};
use crate::status::{Status, StatusBoard};

/// Longest that [`Broker::call`] waits for an answer.
const CALL_PATIENCE: Duration = Duration::from_secs(60);

/// What every listener tells its clients and holds them to.
#[derive(Clone, Debug)]
pub struct BrokerLimits {
    pub batch: BatchLimits,
    /// A member is lost when nothing was heard of it for so long.
    pub session_timeout: Duration,
}

/// Why a call through the front door failed.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The outcome is unknown; the request may still be carried out.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The shard answered something that this command has no use for: a fault of the broker.
    #[error("unexpected answer to {0}")]
    Unexpected(&'static str),
}

/// Cheap to clone; all clones are the same door.
#[derive(Clone, Debug)]
pub struct Broker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    inbox: Arc<Inbox>,
    views: Arc<Views>,
    gate: Gate,
    limits: BrokerLimits,
    boot_epoch: u64,
    status: Arc<StatusBoard>,
    next_subscription: AtomicU64,
    next_connection: AtomicU64,
    redrives: Notify,
    stopping: CancellationToken,
}

impl Broker {
    pub(crate) fn new(
        inbox: Arc<Inbox>,
        views: Arc<Views>,
        gate: Gate,
        limits: BrokerLimits,
        boot_epoch: u64,
        status: Arc<StatusBoard>,
    ) -> Self {
        let inner = Inner {
            inbox,
            views,
            gate,
            limits,
            boot_epoch,
            status,
            next_subscription: AtomicU64::new(1),
            next_connection: AtomicU64::new(1),
            redrives: Notify::new(),
            stopping: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    pub fn limits(&self) -> &BrokerLimits {
        &self.inner.limits
    }

    /// Changes at every start.
    pub fn boot_epoch(&self) -> u64 {
        self.inner.boot_epoch
    }

    /// How the broker is. Asks the disk for its room, and nobody else.
    pub fn status(&self) -> Status {
        self.inner.status.read()
    }

    /// The broker's wall clock, in Unix milliseconds.
    pub fn wall_ms(&self) -> i64 {
        self.inner.status.wall_ms()
    }

    /// Admission of request bytes: to be passed before a request is taken in.
    pub fn gate(&self) -> &Gate {
        &self.inner.gate
    }

    /// A fresh name for a share subscription.
    pub fn new_subscription(&self) -> SubscriptionId {
        SubscriptionId(self.inner.next_subscription.fetch_add(1, Ordering::Relaxed))
    }

    /// A number for a connection, larger than that of every older one.
    pub fn new_connection(&self) -> u64 {
        self.inner.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    /// Queues commands in order, without waiting. Each is answered at its responder.
    pub fn submit(&self, submissions: impl IntoIterator<Item = Submission>) {
        self.inner.inbox.submit(submissions);
    }

    /// Carries out one command. Dropping the future does not undo the command.
    ///
    /// # Errors
    /// The engine's refusal, or [`BrokerError::Timeout`].
    pub async fn call(&self, command: Command) -> Result<Reply, BrokerError> {
        match timeout(CALL_PATIENCE, self.ask(command)).await {
            Ok(Ok(Reply::Error(error))) => Err(error.into()),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(EngineError::Stopping.into()),
            Err(_) => Err(BrokerError::Timeout(CALL_PATIENCE)),
        }
    }

    /// Queues one command, whose answer comes to the receiver.
    pub(crate) fn ask(&self, command: Command) -> Receiver<Reply> {
        let (responder, answer) = Once::channel();
        self.submit([Submission::new(command, responder, 0)]);
        answer
    }

    /// As [`Self::call`], for a thread that may block; waits for as long as the shard lives.
    ///
    /// # Errors
    /// The engine's refusal.
    pub fn call_blocking(&self, command: Command) -> Result<Reply, BrokerError> {
        match self.ask(command).blocking_recv() {
            Ok(Reply::Error(error)) => Err(error.into()),
            Ok(reply) => Ok(reply),
            Err(_) => Err(EngineError::Stopping.into()),
        }
    }

    /// What readers see of a partition.
    ///
    /// # Errors
    /// [`EngineError::UnknownTopic`] or [`EngineError::UnknownPartition`].
    pub fn view(&self, partition: PartitionKey) -> Result<Arc<ReadView>, EngineError> {
        self.inner.views.get(partition).ok_or_else(|| {
            let first = PartitionKey { topic: partition.topic, partition: 0 };
            match self.inner.views.get(first) {
                Some(_) => EngineError::UnknownPartition(partition),
                None => EngineError::UnknownTopic(partition.topic.to_string()),
            }
        })
    }

    /// All partitions of a topic, ascending.
    ///
    /// # Errors
    /// [`EngineError::UnknownTopic`].
    pub fn views_of(&self, topic: TopicId) -> Result<Vec<Arc<ReadView>>, EngineError> {
        let views: Vec<_> =
            (0..).map_while(|partition| self.inner.views.get(PartitionKey { topic, partition })).collect();
        if views.is_empty() {
            return Err(EngineError::UnknownTopic(topic.to_string()));
        }
        Ok(views)
    }

    /// A topic by name.
    ///
    /// # Errors
    /// [`EngineError::UnknownTopic`].
    pub async fn topic(&self, name: &str) -> Result<TopicInfo, BrokerError> {
        match self.call(Command::Metadata { names: vec![name.to_owned()] }).await? {
            Reply::Metadata { mut topics, .. } => {
                topics.pop().ok_or_else(|| EngineError::UnknownTopic(name.to_owned()).into())
            }
            _ => Err(BrokerError::Unexpected("Metadata")),
        }
    }

    /// A group, and for each of its partitions the time of its oldest unsettled record (Unix ms; `None` when there is no
    /// such record, or it cannot be read).
    ///
    /// # Errors
    /// The engine's refusal.
    pub async fn describe_group(
        &self,
        group: &str,
    ) -> Result<(GroupDescription, Vec<Option<i64>>), BrokerError> {
        let Reply::Group(description) = self.call(Command::DescribeGroup { group: group.to_owned() }).await?
        else {
            return Err(BrokerError::Unexpected("DescribeGroup"));
        };
        let mut oldest = Vec::with_capacity(description.partitions.len());
        for info in &description.partitions {
            oldest.push(match (info.partition, info.oldest_unsettled) {
                (Some(partition), Some(offset)) => self.timestamp_of(partition, offset).await,
                _ => None,
            });
        }
        Ok((description, oldest))
    }

    /// Timestamp of the first record at or after `offset`, if it can be read.
    async fn timestamp_of(&self, partition: PartitionKey, offset: u64) -> Option<i64> {
        let view = self.inner.views.get(partition)?;
        let batches = view.fetch_kept(offset, 1).await.ok()?;
        let scan = batch::scan(batches.first()?).ok()?;
        scan.iter()
            .filter_map(Result::ok)
            .find(|record| record.offset >= offset)
            .map(|record| record.timestamp)
    }

    /// Moves a group on a topic: every partition, or one. A time is resolved to an offset here. `force`: also when records are
    /// dropped that nobody else has.
    ///
    /// # Errors
    /// The engine's refusal, or the log cannot be read.
    pub async fn seek_group(
        &self,
        group: &str,
        topic: &str,
        partition: Option<u32>,
        to: SeekTarget,
        force: bool,
    ) -> Result<(), BrokerError> {
        let info = self.topic(topic).await?;
        let partitions = match partition {
            Some(partition) => partition..partition.saturating_add(1),
            None => 0..info.partitions,
        };
        let mut positions = Vec::new();
        for partition in partitions {
            let to = match to {
                SeekTarget::To(to) => to,
                SeekTarget::Timestamp(timestamp) => {
                    let view = self.view(PartitionKey { topic: info.id, partition })?;
                    view.find_timestamp(timestamp).await?.map_or(SeekTo::End, SeekTo::Offset)
                }
            };
            positions.push((partition, to));
        }
        let (group, topic) = (group.to_owned(), topic.to_owned());
        let command = Command::SeekGroup { group, topic, positions, force };
        self.call(command).await.map(drop)
    }

    /// A redrive was begun or altered: who carries them out should look.
    pub(crate) fn note_redrives_changed(&self) {
        self.inner.redrives.notify_one();
    }

    /// Returns when redrives have changed since the last call.
    pub(crate) async fn redrives_changed(&self) {
        self.inner.redrives.notified().await;
    }

    /// Returns when the broker begins to stop: nothing new is to be begun then.
    pub async fn stopping(&self) {
        self.inner.stopping.cancelled().await;
    }

    pub(crate) fn begin_stop(&self) {
        self.inner.stopping.cancel();
    }
}

/// Where a group is moved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTarget {
    To(SeekTo),
    /// The first record at or after this time (Unix ms), or the end.
    Timestamp(i64),
}
