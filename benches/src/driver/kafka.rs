//! Apache Kafka through `rdkafka`, one topic with its partitions; the client gathers records into batches of its own.

use std::sync::Arc;

use ::rdkafka::ClientConfig;
use ::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use ::rdkafka::client::DefaultClientContext;
use ::rdkafka::consumer::{Consumer as _, StreamConsumer};
use ::rdkafka::message::Message as _;
use ::rdkafka::producer::future_producer::OwnedDeliveryResult;
use ::rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _};
use ::rdkafka::{Offset, TopicPartitionList};
use anyhow::Context;
use bytes::Bytes;
use futures::channel::oneshot::Canceled;
use futures::future::{FutureExt, Map};

use super::{Driver, Gathering, MOST_TOGETHER, Members, Progress, Topic};
use crate::measure::PATIENCE;
use crate::workload::Ack;

/// How long the producer waits for more records, in milliseconds: what gathers while requests are under way is sent together
/// all the same.
const LINGER_MS: &str = "0.1";
/// Memory of the producer for unsent records, in KiB; the number of records is the bound that matters.
const PRODUCER_KIB: &str = "1048576";
/// How soon a consumer whose queue was full asks for more; the client's default of a second leaves it idle.
const ASK_AGAIN_MS: &str = "1";

#[derive(Debug)]
pub(crate) struct Kafka {
    config: ClientConfig,
}

impl Driver for Kafka {
    type Producer = KafkaProducer;
    type Consumer = KafkaConsumer;

    async fn open(address: &str, _level: Ack) -> anyhow::Result<Self> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", address);
        Ok(Self { config })
    }

    /// A new server accepts connections before it has a leader.
    async fn create_topic(&self, topic: &Topic) -> anyhow::Result<()> {
        let admin: AdminClient<DefaultClientContext> = self.config.create()?;
        let partitions = i32::try_from(topic.partitions)?;
        let new = NewTopic::new(&topic.name, partitions, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE)).request_timeout(Some(PATIENCE));
        for result in admin.create_topics([&new], &options).await? {
            result.map_err(|(name, code)| anyhow::anyhow!("{name} was not created: {code}"))?;
        }
        Ok(())
    }

    async fn producer(
        &self,
        topic: &Topic,
        _index: u32,
        gathering: Gathering,
    ) -> anyhow::Result<KafkaProducer> {
        let mut config = self.config.clone();
        config
            .set("acks", "all")
            .set("linger.ms", LINGER_MS)
            .set("queue.buffering.max.kbytes", PRODUCER_KIB)
            // Room for what is in flight: a full queue is an error, not a wait.
            .set("queue.buffering.max.messages", (gathering.in_flight * 2 + 1000).to_string());
        let producer: FutureProducer = config.create()?;
        // Once for all, off the runtime: the first record would wait for it.
        let (asking, name) = (producer.clone(), topic.name.clone());
        let known = move || asking.client().fetch_metadata(Some(&name), PATIENCE).map(|_| ());
        tokio::task::spawn_blocking(known).await??;
        Ok(KafkaProducer { producer, topic: topic.name.clone() })
    }

    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<KafkaConsumer> {
        let mut config = self.config.clone();
        config
            // The client wants one, though partitions are assigned by hand and nothing is committed.
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("fetch.queue.backoff.ms", ASK_AGAIN_MS);
        let consumer: StreamConsumer = config.create()?;
        let mut assigned = TopicPartitionList::new();
        for partition in partitions {
            assigned.add_partition_offset(&topic.name, i32::try_from(partition)?, Offset::Beginning)?;
        }
        consumer.assign(&assigned)?;
        Ok(KafkaConsumer(consumer))
    }

    async fn create_group(&self, _topic: &Topic, _group: &str, _member: Members) -> anyhow::Result<()> {
        anyhow::bail!("the client does not speak to share groups")
    }

    async fn work(
        &self,
        _topic: &Topic,
        _group: &str,
        _member: Members,
        _progress: Progress,
    ) -> anyhow::Result<()> {
        anyhow::bail!("the client does not speak to share groups")
    }
}

pub(crate) struct KafkaProducer {
    producer: FutureProducer,
    topic: Arc<str>,
}

impl std::fmt::Debug for KafkaProducer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("KafkaProducer").field("topic", &self.topic).finish_non_exhaustive()
    }
}

type Outcome = Result<OwnedDeliveryResult, Canceled>;

fn delivered(outcome: Outcome) -> anyhow::Result<()> {
    outcome.context("the producer is gone")?.map(|_| ()).map_err(|(error, _)| error.into())
}

impl super::Producer for KafkaProducer {
    type Pending = Map<DeliveryFuture, fn(Outcome) -> anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(&self.topic).payload(&value);
        let sent = self.producer.send_result(record).map_err(|(error, _)| error)?;
        Ok(sent.map(delivered))
    }

    async fn close(self) -> anyhow::Result<()> {
        let flushed = move || self.producer.flush(PATIENCE);
        Ok(tokio::task::spawn_blocking(flushed).await??)
    }
}

pub(crate) struct KafkaConsumer(StreamConsumer);

impl std::fmt::Debug for KafkaConsumer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("KafkaConsumer").finish_non_exhaustive()
    }
}

impl super::Consumer for KafkaConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        let mut message = Some(self.0.recv().await);
        while let Some(next) = message {
            values.push(Bytes::copy_from_slice(next?.payload().context("a record without a value")?));
            message = if values.len() < MOST_TOGETHER { self.0.recv().now_or_never() } else { None };
        }
        Ok(())
    }

    /// Ending it waits for the server.
    async fn close(self) -> anyhow::Result<()> {
        Ok(tokio::task::spawn_blocking(move || drop(self.0)).await?)
    }
}
