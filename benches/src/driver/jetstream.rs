//! NATS JetStream through `async-nats`, one stream with one subject for each partition.
//!
//! Each record is published by itself, as everybody does; the client writes together what gathers while it is writing.

use anyhow::Context;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, StorageType};
use async_nats::jetstream::{Context as Connection, Message};
use async_nats::{ConnectOptions, Subject};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{BoxStream, SelectAll, StreamExt, select_all};

use super::{Driver, Gathering, MOST_TOGETHER, Members, Progress, RECORDS_IN_A_ROW, Topic};
use crate::measure::PATIENCE;
use crate::workload::Ack;

/// Messages that a consumer has asked for; its client asks for more when half of them have come.
const ASKED_FOR: usize = 2000;

#[derive(Debug)]
pub(crate) struct Jetstream {
    address: String,
}

impl Jetstream {
    /// With so many publications unacknowledged at the most.
    async fn connect(&self, in_flight: usize) -> anyhow::Result<Connection> {
        // Room for what is in flight, so that the bound is that of acknowledgements.
        let options = ConnectOptions::new().client_capacity(in_flight.max(2048));
        let client = options.connect(&self.address).await?;
        Ok(ContextBuilder::new().timeout(PATIENCE).max_ack_inflight(in_flight.max(1)).build(client))
    }
}

impl Driver for Jetstream {
    type Producer = JetstreamProducer;
    type Consumer = JetstreamConsumer;

    async fn open(address: &str, _level: Ack) -> anyhow::Result<Self> {
        Ok(Self { address: address.to_owned() })
    }

    async fn create_topic(&self, topic: &Topic) -> anyhow::Result<()> {
        let connection = self.connect(1).await?;
        for name in topic.parts() {
            let config = Config {
                subjects: vec![name.clone()],
                name,
                storage: StorageType::File,
                ..Config::default()
            };
            connection.create_stream(config).await?;
        }
        Ok(())
    }

    async fn producer(
        &self,
        topic: &Topic,
        index: u32,
        gathering: Gathering,
    ) -> anyhow::Result<JetstreamProducer> {
        Ok(JetstreamProducer {
            connection: self.connect(gathering.in_flight + 1).await?,
            subjects: topic.parts().into_iter().map(Subject::from).collect(),
            sent: u64::from(index) * RECORDS_IN_A_ROW,
        })
    }

    /// Without acknowledgements, as readers of a log have no use for them.
    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<JetstreamConsumer> {
        let connection = self.connect(1).await?;
        let mut streams = Vec::new();
        for partition in partitions {
            let config = pull::Config {
                deliver_policy: DeliverPolicy::All,
                ack_policy: AckPolicy::None,
                ..pull::Config::default()
            };
            let consumer = connection.create_consumer_on_stream(config, topic.part(partition)).await?;
            streams.push(consumer.stream().max_messages_per_batch(ASKED_FOR).messages().await?.boxed());
        }
        Ok(JetstreamConsumer(select_all(streams)))
    }

    async fn create_group(&self, topic: &Topic, group: &str, member: Members) -> anyhow::Result<()> {
        let connection = self.connect(1).await?;
        for name in topic.parts() {
            let config = pull::Config {
                durable_name: Some(group.to_owned()),
                ack_policy: AckPolicy::Explicit,
                max_ack_pending: i64::from(member.prefetch) * i64::from(member.count),
                ..pull::Config::default()
            };
            connection.create_consumer_on_stream(config, name).await?;
        }
        Ok(())
    }

    /// Acknowledges each message without asking whether that has arrived, as everybody does.
    async fn work(
        &self,
        topic: &Topic,
        group: &str,
        member: Members,
        mut progress: Progress,
    ) -> anyhow::Result<()> {
        let connection = self.connect(1).await?;
        let parts = topic.share_of(member.index, member.count);
        let prefetch = (member.prefetch as usize / parts.len()).max(1);
        let mut streams = Vec::new();
        for partition in parts {
            let consumer: PullConsumer =
                connection.get_consumer_from_stream(group, topic.part(partition)).await?;
            streams.push(consumer.stream().max_messages_per_batch(prefetch).messages().await?.boxed());
        }
        let mut messages = select_all(streams);
        let counts = progress.clone();
        let stopped = progress.stopped();
        tokio::pin!(stopped);
        loop {
            let message = tokio::select! {
                biased;
                message = messages.next() => message.context("the stream ended")??,
                () = &mut stopped => return Ok(()),
            };
            message
                .ack()
                .await
                .map_err(|error| anyhow::anyhow!("an acknowledgement was refused: {error}"))?;
            counts.add(1);
            if counts.is_stopped() {
                return Ok(());
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct JetstreamProducer {
    connection: Connection,
    subjects: Vec<Subject>,
    sent: u64,
}

impl super::Producer for JetstreamProducer {
    type Pending = BoxFuture<'static, anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let part = (self.sent / RECORDS_IN_A_ROW) as usize % self.subjects.len();
        self.sent += 1;
        let message = PublishMessage::build().payload(value);
        let pending = self.connection.send_publish(self.subjects[part].clone(), message).await?;
        let outcome = async move {
            pending.await?;
            Ok(())
        };
        Ok(outcome.boxed())
    }
}

type Messages = BoxStream<'static, Result<Message, pull::MessagesError>>;

pub(crate) struct JetstreamConsumer(SelectAll<Messages>);

impl std::fmt::Debug for JetstreamConsumer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("JetstreamConsumer").field("streams", &self.0.len()).finish()
    }
}

impl super::Consumer for JetstreamConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        let mut message = Some(self.0.next().await);
        while let Some(next) = message {
            values.push(next.context("the stream ended")??.payload.clone());
            message = if values.len() < MOST_TOGETHER { self.0.next().now_or_never() } else { None };
        }
        Ok(())
    }
}
