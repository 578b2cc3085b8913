//! RabbitMQ's quorum queues over AMQP with `lapin`, one queue for each partition, with publisher confirms.

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{SelectAll, StreamExt, select_all};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

use super::{Driver, Gathering, MOST_TOGETHER, Members, Progress, RECORDS_IN_A_ROW, Topic};
use crate::workload::Ack;

/// What makes a message survive a restart.
const PERSISTENT: u8 = 2;

#[derive(Debug)]
pub(crate) struct RabbitmqQuorum {
    address: String,
}

impl RabbitmqQuorum {
    async fn connect(&self) -> anyhow::Result<(Connection, Channel)> {
        let uri = format!("amqp://guest:guest@{}/%2f", self.address);
        let connection = Connection::connect(&uri, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// What arrives from some of the queues.
    async fn deliveries(
        &self,
        topic: &Topic,
        partitions: &[u32],
        prefetch: Option<u32>,
    ) -> anyhow::Result<(Connection, SelectAll<lapin::Consumer>)> {
        let (connection, channel) = self.connect().await?;
        if let Some(prefetch) = prefetch {
            let each = (prefetch as usize / partitions.len()).clamp(1, usize::from(u16::MAX));
            channel.basic_qos(each as u16, BasicQosOptions::default()).await?;
        }
        let mut consumers = Vec::new();
        for partition in partitions {
            let options =
                BasicConsumeOptions { no_ack: prefetch.is_none(), ..BasicConsumeOptions::default() };
            let queue = ShortString::from(topic.part(*partition));
            let tag = ShortString::default();
            consumers.push(channel.basic_consume(queue, tag, options, FieldTable::default()).await?);
        }
        Ok((connection, select_all(consumers)))
    }
}

impl Driver for RabbitmqQuorum {
    type Producer = QuorumProducer;
    type Consumer = QuorumConsumer;
    const READING_REMOVES: bool = true;

    async fn open(address: &str, _level: Ack) -> anyhow::Result<Self> {
        Ok(Self { address: address.to_owned() })
    }

    async fn create_topic(&self, topic: &Topic) -> anyhow::Result<()> {
        let (_connection, channel) = self.connect().await?;
        for name in topic.parts() {
            let mut arguments = FieldTable::default();
            let kind = AMQPValue::LongString(LongString::from("quorum"));
            arguments.insert(ShortString::from("x-queue-type"), kind);
            let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(ShortString::from(name), options, arguments).await?;
        }
        Ok(())
    }

    async fn producer(
        &self,
        topic: &Topic,
        index: u32,
        _gathering: Gathering,
    ) -> anyhow::Result<QuorumProducer> {
        let (connection, channel) = self.connect().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(QuorumProducer {
            _connection: connection,
            channel,
            queues: topic.parts().into_iter().map(ShortString::from).collect(),
            sent: u64::from(index) * RECORDS_IN_A_ROW,
        })
    }

    /// Takes the records away: a queue has no readers. Without acknowledgements, the nearest to reading.
    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<QuorumConsumer> {
        let (connection, deliveries) = self.deliveries(topic, &partitions, None).await?;
        Ok(QuorumConsumer { _connection: connection, deliveries })
    }

    async fn create_group(&self, _topic: &Topic, _group: &str, _member: Members) -> anyhow::Result<()> {
        // All consumers of a queue are one group.
        Ok(())
    }

    async fn work(
        &self,
        topic: &Topic,
        _group: &str,
        member: Members,
        mut progress: Progress,
    ) -> anyhow::Result<()> {
        let partitions = topic.share_of(member.index, member.count);
        let (_connection, mut deliveries) =
            self.deliveries(topic, &partitions, Some(member.prefetch)).await?;
        let counts = progress.clone();
        let stopped = progress.stopped();
        tokio::pin!(stopped);
        while !counts.is_stopped() {
            let delivery = tokio::select! {
                biased;
                delivery = deliveries.next() => delivery.context("the queue ended")??,
                () = &mut stopped => break,
            };
            ensure!(delivery.acker.ack(BasicAckOptions::default()).await?, "an acknowledgement was refused");
            counts.add(1);
        }
        Ok(())
    }
}

pub(crate) struct QuorumProducer {
    _connection: Connection,
    channel: Channel,
    queues: Vec<ShortString>,
    sent: u64,
}

impl std::fmt::Debug for QuorumProducer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("QuorumProducer").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl super::Producer for QuorumProducer {
    type Pending = BoxFuture<'static, anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let part = (self.sent / RECORDS_IN_A_ROW) as usize % self.queues.len();
        self.sent += 1;
        let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let (exchange, queue) = (ShortString::default(), self.queues[part].clone());
        let options = BasicPublishOptions::default();
        let confirm = self.channel.basic_publish(exchange, queue, options, &value, properties).await?;
        let outcome = async move {
            ensure!(confirm.await?.is_ack(), "a record was refused");
            Ok(())
        };
        Ok(outcome.boxed())
    }
}

pub(crate) struct QuorumConsumer {
    _connection: Connection,
    deliveries: SelectAll<lapin::Consumer>,
}

impl std::fmt::Debug for QuorumConsumer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("QuorumConsumer")
            .field("queues", &self.deliveries.len())
            .finish_non_exhaustive()
    }
}

impl super::Consumer for QuorumConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        let mut delivery = Some(self.deliveries.next().await);
        while let Some(next) = delivery {
            values.push(next.context("the queue ended")??.data.into());
            delivery =
                if values.len() < MOST_TOGETHER { self.deliveries.next().now_or_never() } else { None };
        }
        Ok(())
    }
}
