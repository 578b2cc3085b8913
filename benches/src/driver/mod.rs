//! One small interface to all brokers, each through the client that its users would take, in the way in which they would use
//! it.
//!
//! A topic has partitions; a peer without them has as many streams or queues. Records carry no keys where peers are compared,
//! so that each driver spreads them as suits its peer. Every outcome is looked at: a record that was refused or lost is an error.

mod felucca;
#[cfg(feature = "jetstream")]
mod jetstream;
#[cfg(feature = "kafka")]
mod kafka;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_quorum;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_stream;
#[cfg(feature = "redis")]
mod redis;

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;

pub(crate) use self::felucca::Felucca;
#[cfg(feature = "jetstream")]
pub(crate) use self::jetstream::Jetstream;
#[cfg(feature = "kafka")]
pub(crate) use self::kafka::Kafka;
#[cfg(feature = "rabbitmq")]
pub(crate) use self::rabbitmq_quorum::RabbitmqQuorum;
#[cfg(feature = "rabbitmq")]
pub(crate) use self::rabbitmq_stream::RabbitmqStream;
#[cfg(feature = "redis")]
pub(crate) use self::redis::Redis;
use crate::measure::window::Window;
use crate::workload::{Ack, Way};

/// Records that a consumer takes together where they are there already.
const MOST_TOGETHER: usize = 1000;
/// Records that a driver sends to one stream before it takes the next, where the peer's client leaves that to its user.
#[cfg(any(feature = "jetstream", feature = "rabbitmq"))]
const RECORDS_IN_A_ROW: u64 = 100;

/// What is produced to and read from.
#[derive(Clone, Debug)]
pub(crate) struct Topic {
    pub(crate) name: Arc<str>,
    pub(crate) partitions: u32,
}

impl Topic {
    /// The name of the stream or queue that stands for a partition.
    #[cfg(any(feature = "jetstream", feature = "rabbitmq", feature = "redis"))]
    fn part(&self, partition: u32) -> String {
        format!("{}-{partition}", self.name)
    }

    #[cfg(any(feature = "jetstream", feature = "rabbitmq", feature = "redis"))]
    fn parts(&self) -> Vec<String> {
        (0..self.partitions).map(|partition| self.part(partition)).collect()
    }

    /// The partitions of one of so many consumers; some have the same one when there are more of them than partitions.
    pub(crate) fn share_of(&self, index: u32, consumers: u32) -> Vec<u32> {
        if consumers >= self.partitions {
            return vec![index % self.partitions];
        }
        (0..self.partitions).filter(|partition| partition % consumers == index).collect()
    }
}

/// How a producer is to gather records.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(feature = "jetstream", feature = "rabbitmq", feature = "redis")),
    expect(dead_code, reason = "some of it only other brokers' drivers ask for")
)]
pub(crate) struct Gathering {
    /// Size of a batch, where the client makes batches.
    pub(crate) batch_bytes: usize,
    /// Records that will be unacknowledged at the most.
    pub(crate) in_flight: usize,
    /// Distinct keys, given to records in turn; 0 = no keys. Only for what no other broker does.
    pub(crate) keys: u32,
}

/// A broker that answers, through its client.
pub(crate) trait Driver: Sized + Send + Sync + 'static {
    type Producer: Producer;
    type Consumer: Consumer;
    /// Written before something is measured, so that a broker that reuses its files has some to reuse.
    const WARM_UP_BYTES: u64 = 0;
    /// What a consumer has taken is gone.
    const READING_REMOVES: bool = false;

    /// Acknowledgements mean `level`, for which the server was set up.
    fn open(address: &str, level: Ack) -> impl Future<Output = anyhow::Result<Self>> + Send;

    fn create_topic(&self, topic: &Topic) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Removes topic and groups; only from servers that go on.
    fn discard(&self, _topic: &Topic, _groups: &[String]) -> impl Future<Output = anyhow::Result<()>> + Send {
        async { Ok(()) }
    }

    /// A producer on a connection of its own. Those with different indexes start with different partitions.
    fn producer(
        &self,
        topic: &Topic,
        index: u32,
        gathering: Gathering,
    ) -> impl Future<Output = anyhow::Result<Self::Producer>> + Send;

    /// A consumer on a connection of its own, from the first record of these partitions on.
    fn consumer(
        &self,
        topic: &Topic,
        partitions: Vec<u32>,
    ) -> impl Future<Output = anyhow::Result<Self::Consumer>> + Send;

    /// A group whose members share records, each of which is leased and acknowledged by itself.
    fn create_group(
        &self,
        topic: &Topic,
        group: &str,
        member: Members,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Works as one member, on a connection of its own, until told to stop.
    fn work(
        &self,
        topic: &Topic,
        group: &str,
        member: Members,
        progress: Progress,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// The members of a group, and which of them is meant.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(feature = "jetstream", feature = "rabbitmq", feature = "redis")),
    expect(dead_code, reason = "some of it only other brokers' drivers ask for")
)]
pub(crate) struct Members {
    pub(crate) index: u32,
    pub(crate) count: u32,
    /// Records that each holds leased.
    pub(crate) prefetch: u32,
    pub(crate) way: Way,
}

/// What has been sent and is not acknowledged. Resolves for all its records; an error is one record's at least.
pub(crate) type PendingBlock = BoxFuture<'static, anyhow::Result<()>>;

/// Sends records.
pub(crate) trait Producer: Send + 'static {
    /// A record that is not acknowledged. It is sent whether or not this is polled.
    type Pending: Future<Output = anyhow::Result<()>> + Send + Unpin + 'static;

    /// Waits for room only.
    fn enqueue(&mut self, value: Bytes) -> impl Future<Output = anyhow::Result<Self::Pending>> + Send;

    /// Records that the caller has together.
    fn enqueue_block(
        &mut self,
        values: &[Bytes],
    ) -> impl Future<Output = anyhow::Result<PendingBlock>> + Send {
        async move {
            let mut pending = Vec::with_capacity(values.len());
            for value in values {
                pending.push(self.enqueue(value.clone()).await?);
            }
            let all = async move {
                for record in pending {
                    record.await?;
                }
                anyhow::Ok(())
            };
            Ok(all.boxed())
        }
    }

    /// Waits until everything is on its way. What is not acknowledged may be lost with the producer.
    fn close(self) -> impl Future<Output = anyhow::Result<()>> + Send
    where
        Self: Sized,
    {
        async { Ok(()) }
    }
}

/// Reads records.
pub(crate) trait Consumer: Send + 'static {
    /// Waits until there is one, then adds what is there already, within reason.
    fn next(&mut self, values: &mut Vec<Bytes>) -> impl Future<Output = anyhow::Result<()>> + Send;

    fn close(self) -> impl Future<Output = anyhow::Result<()>> + Send
    where
        Self: Sized,
    {
        async { Ok(()) }
    }
}

/// Where a member tells what it has done, and is told to stop.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub(crate) window: Arc<Window>,
    pub(crate) task: usize,
    pub(crate) stopped: watch::Receiver<bool>,
}

impl Progress {
    /// So many records were acknowledged.
    pub(crate) fn add(&self, records: u64) {
        self.window.count(self.task).add(records);
    }

    /// Resolves when it is time to stop.
    pub(crate) async fn stopped(&mut self) {
        // Also when nobody is there any more to say so.
        let _dropped = self.stopped.wait_for(|stopped| *stopped).await;
    }

    #[cfg(any(feature = "jetstream", feature = "rabbitmq", feature = "redis"))]
    fn is_stopped(&self) -> bool {
        *self.stopped.borrow()
    }
}
