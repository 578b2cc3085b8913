//! RabbitMQ's streams over their own protocol, one stream for each partition; the client publishes together what gathers.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{SelectAll, StreamExt, select_all};
use rabbitmq_stream_client::error::ProducerPublishError;
use rabbitmq_stream_client::types::{ByteCapacity, Message, OffsetSpecification};
use rabbitmq_stream_client::{Consumer, Environment, NoDedup, Producer};
use tokio::sync::{mpsc, oneshot};

use super::{Driver, Gathering, MOST_TOGETHER, Members, PendingBlock, Progress, RECORDS_IN_A_ROW, Topic};
use crate::workload::Ack;

/// Messages that the client sends together.
const BATCH: usize = 1000;
/// How long it waits for more of them: the least that its timer can do.
const DELAY: Duration = Duration::from_millis(1);
/// Nothing that is measured comes near it.
const LARGEST_STREAM_GB: u64 = 64;

pub(crate) struct RabbitmqStream {
    address: SocketAddr,
    environment: Environment,
}

impl std::fmt::Debug for RabbitmqStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RabbitmqStream").field("address", &self.address).finish_non_exhaustive()
    }
}

async fn environment(address: SocketAddr) -> anyhow::Result<Environment> {
    let host = address.ip().to_string();
    Ok(Environment::builder().host(&host).port(address.port()).build().await?)
}

impl Driver for RabbitmqStream {
    type Producer = StreamProducer;
    type Consumer = StreamConsumer;

    async fn open(address: &str, _level: Ack) -> anyhow::Result<Self> {
        let address = address.parse()?;
        Ok(Self { address, environment: environment(address).await? })
    }

    async fn create_topic(&self, topic: &Topic) -> anyhow::Result<()> {
        for name in topic.parts() {
            let creator = self.environment.stream_creator();
            creator.max_length(ByteCapacity::GB(LARGEST_STREAM_GB)).create(&name).await?;
        }
        Ok(())
    }

    /// The client makes a connection for each stream.
    async fn producer(
        &self,
        topic: &Topic,
        index: u32,
        _gathering: Gathering,
    ) -> anyhow::Result<StreamProducer> {
        let environment = environment(self.address).await?;
        let mut producers = Vec::new();
        for name in topic.parts() {
            producers.push(environment.producer().batch_size(BATCH).batch_delay(DELAY).build(&name).await?);
        }
        Ok(StreamProducer { producers, sent: u64::from(index) * RECORDS_IN_A_ROW })
    }

    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<StreamConsumer> {
        let environment = environment(self.address).await?;
        let mut consumers = Vec::new();
        for partition in partitions {
            let consumer = environment.consumer().offset(OffsetSpecification::First);
            consumers.push(consumer.build(&topic.part(partition)).await?);
        }
        Ok(StreamConsumer(select_all(consumers)))
    }

    async fn create_group(&self, _topic: &Topic, _group: &str, _member: Members) -> anyhow::Result<()> {
        anyhow::bail!("streams have no acknowledgements")
    }

    async fn work(
        &self,
        _topic: &Topic,
        _group: &str,
        _member: Members,
        _progress: Progress,
    ) -> anyhow::Result<()> {
        anyhow::bail!("streams have no acknowledgements")
    }
}

/// Whether a record is there, or why that is not known.
fn check(confirmed: Result<bool, ProducerPublishError>) -> anyhow::Result<()> {
    ensure!(confirmed?, "a record was refused");
    Ok(())
}

pub(crate) struct StreamProducer {
    producers: Vec<Producer<NoDedup>>,
    sent: u64,
}

impl std::fmt::Debug for StreamProducer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("StreamProducer").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl StreamProducer {
    fn next(&mut self, records: u64) -> &Producer<NoDedup> {
        let part = (self.sent / RECORDS_IN_A_ROW) as usize % self.producers.len();
        self.sent += records;
        &self.producers[part]
    }
}

fn message(value: &Bytes) -> Message {
    Message::builder().body(&value[..]).build()
}

impl super::Producer for StreamProducer {
    type Pending = BoxFuture<'static, anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let (waiting, pending) = oneshot::channel();
        // The client could call more than once, as far as its types say.
        let waiting = Mutex::new(Some(waiting));
        let sent = self.next(1).send(message(&value), move |confirmed| {
            let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
            // A caller that has gone does not want to know.
            let outcome = check(confirmed.map(|status| status.confirmed()));
            let _gone = waiting.map(|waiting| waiting.send(outcome));
            std::future::ready(())
        });
        sent.await?;
        Ok(async move { pending.await.context("the connection is gone")? }.boxed())
    }

    async fn enqueue_block(&mut self, values: &[Bytes]) -> anyhow::Result<PendingBlock> {
        let records = values.len();
        let (waiting, mut pending) = mpsc::unbounded_channel();
        let messages = values.iter().map(message).collect();
        let producer = self.next((records as u64).max(RECORDS_IN_A_ROW));
        let sent = producer.batch_send(messages, move |confirmed| {
            let _gone = waiting.send(check(confirmed.map(|status| status.confirmed())));
            std::future::ready(())
        });
        sent.await?;
        let outcome = async move {
            for _ in 0..records {
                pending.recv().await.context("the connection is gone")??;
            }
            Ok(())
        };
        Ok(outcome.boxed())
    }
}

pub(crate) struct StreamConsumer(SelectAll<Consumer>);

impl std::fmt::Debug for StreamConsumer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("StreamConsumer").field("streams", &self.0.len()).finish()
    }
}

impl super::Consumer for StreamConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        let mut delivery = Some(self.0.next().await);
        while let Some(next) = delivery {
            let delivery_of = next.context("the stream ended")??;
            values.push(Bytes::copy_from_slice(
                delivery_of.message().data().context("a record without a value")?,
            ));
            delivery = if values.len() < MOST_TOGETHER { self.0.next().now_or_never() } else { None };
        }
        Ok(())
    }
}
