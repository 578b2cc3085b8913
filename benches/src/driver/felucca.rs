//! Felucca through its own client.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use felucca_client::{
    Ack as Acked, Client, Consumer, Delivery, ErrorCode, Level, Outcome, PendingAck, Producer, Record,
    Result, SettleResult, ShareConsumer, Start,
};
use futures::future::{FutureExt, Map};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::timeout;

use super::{Driver, Gathering, MOST_TOGETHER, Members, Progress, Topic};
use crate::measure::PATIENCE;
use crate::workload::{Ack, Receive};

/// A connection for what is done once; producers, consumers and members have their own.
#[derive(Debug)]
pub(crate) struct Felucca {
    client: Client,
    address: String,
    level: Ack,
}

impl Felucca {
    /// What requests of the protocol itself name a topic by.
    pub(crate) async fn topic_id(&self, topic: &Topic) -> anyhow::Result<Bytes> {
        Ok(self.client.admin().topic(&topic.name).await?.id)
    }
}

impl Driver for Felucca {
    type Producer = FeluccaProducer;
    type Consumer = FeluccaConsumer;
    /// A checkpoint after 1 GiB of journal frees the first files for reuse.
    const WARM_UP_BYTES: u64 = 5 << 28;

    async fn open(address: &str, level: Ack) -> anyhow::Result<Self> {
        let client = Client::connect(address.to_owned()).await?;
        Ok(Self { client, address: address.to_owned(), level })
    }

    async fn create_topic(&self, topic: &Topic) -> anyhow::Result<()> {
        let config: &[(&str, &str)] = match self.level {
            Ack::Synced => &[],
            Ack::Written | Ack::Memory => &[("allow-written", "true"), ("visibility", "written")],
        };
        self.client.admin().create_topic(&topic.name, topic.partitions, config).await?;
        Ok(())
    }

    async fn discard(&self, topic: &Topic, groups: &[String]) -> anyhow::Result<()> {
        let began = Instant::now();
        for group in groups {
            // Members that went are members until their session times out.
            while let Err(error) = self.client.admin().delete_group(group, true).await {
                let waits = error.code() == Some(ErrorCode::GroupNotEmpty) && began.elapsed() < PATIENCE;
                ensure!(waits, error);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        self.client.admin().delete_topic(&topic.name).await?;
        Ok(())
    }

    async fn producer(
        &self,
        topic: &Topic,
        _index: u32,
        gathering: Gathering,
    ) -> anyhow::Result<FeluccaProducer> {
        let client = Client::connect(self.address.clone()).await?;
        let level = level(self.level);
        let producer = client.producer().level(level).max_batch_bytes(gathering.batch_bytes).build().await?;
        let keys = Keys { count: gathering.keys, next: 0 };
        Ok(FeluccaProducer { producer, topic: topic.name.clone(), keys })
    }

    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<FeluccaConsumer> {
        let client = Client::connect(self.address.clone()).await?;
        let consumer =
            client.consumer().assign(&*topic.name, partitions).start(Start::Beginning).build().await?;
        Ok(FeluccaConsumer(consumer))
    }

    async fn create_group(&self, topic: &Topic, group: &str, member: Members) -> anyhow::Result<()> {
        let config: &[(&str, &str)] = if member.way.keys == 0 { &[] } else { &[("ordering", "key")] };
        self.client.admin().create_share_group(group, &[&topic.name], config).await?;
        Ok(())
    }

    async fn work(
        &self,
        _topic: &Topic,
        group: &str,
        member: Members,
        progress: Progress,
    ) -> anyhow::Result<()> {
        let client = Client::connect(self.address.clone()).await?;
        let prefetch = member.prefetch as usize;
        let consumer = client.share_consumer(group).prefetch(member.prefetch).concurrency(prefetch);
        let consumer = consumer.level(level(member.way.ack)).build().await?;
        match member.way.receive {
            Receive::Next => take(consumer, prefetch, progress).await,
            Receive::Worker => handle(consumer, progress).await,
        }
    }
}

/// A producer and where it sends to.
#[derive(Debug)]
pub(crate) struct FeluccaProducer {
    producer: Producer,
    topic: Arc<str>,
    keys: Keys,
}

/// Gives out keys in turn.
#[derive(Debug)]
struct Keys {
    /// 0 = no keys.
    count: u32,
    next: u32,
}

impl Keys {
    fn next(&mut self) -> Option<Bytes> {
        self.next = self.next.checked_add(1)? % self.count.max(1);
        (self.count > 0).then(|| Bytes::copy_from_slice(&self.next.to_be_bytes()))
    }
}

fn level(ack: Ack) -> Level {
    match ack {
        Ack::Synced => Level::Synced,
        Ack::Written | Ack::Memory => Level::Written,
    }
}

fn acknowledged(outcome: Result<Acked>) -> anyhow::Result<()> {
    outcome?;
    Ok(())
}

impl super::Producer for FeluccaProducer {
    type Pending = Map<PendingAck, fn(Result<Acked>) -> anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let mut record = Record::new(self.topic.clone(), value);
        if let Some(key) = self.keys.next() {
            record = record.key(key);
        }
        let pending = self.producer.enqueue(record).await?;
        Ok(pending.map(acknowledged))
    }

    async fn close(self) -> anyhow::Result<()> {
        timeout(PATIENCE, self.producer.flush()).await.context("no acknowledgement")??;
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct FeluccaConsumer(Consumer);

impl super::Consumer for FeluccaConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        let mut record = Some(self.0.next().await);
        while let Some(next) = record {
            values.push(next.context("the stream ended")??.value.unwrap_or_default());
            record = if values.len() < MOST_TOGETHER { self.0.next().now_or_never() } else { None };
        }
        Ok(())
    }

    async fn close(self) -> anyhow::Result<()> {
        timeout(PATIENCE, self.0.close()).await.context("the consumer does not close")??;
        Ok(())
    }
}

/// A caller with so many acknowledgements under way.
async fn take(mut member: ShareConsumer, under_way: usize, mut progress: Progress) -> anyhow::Result<()> {
    let mut acks = FuturesUnordered::new();
    let counts = progress.clone();
    let stopped = progress.stopped();
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            biased;
            Some(result) = acks.next(), if !acks.is_empty() => {
                done(result)?;
                counts.add(1);
            }
            delivery = member.next(), if acks.len() < under_way => acks.push(delivery?.ack()),
            () = &mut stopped => break,
        }
    }
    // What is under way has been sent; its answers are awaited, so that none is refused unseen.
    while let Some(result) = acks.next().await {
        done(result)?;
    }
    Ok(())
}

fn done(result: Result<SettleResult>) -> anyhow::Result<()> {
    let result = result?;
    ensure!(result.is_done(), "an acknowledgement was refused: {result:?}");
    Ok(())
}

/// The client's worker with a handler that has nothing to do. Counts handlers: their acknowledgements follow at once, and
/// the prefetch bounds how far they may be behind.
async fn handle(member: ShareConsumer, mut progress: Progress) -> anyhow::Result<()> {
    let counts = progress.clone();
    let handler = move |_: Delivery| {
        let counts = counts.clone();
        async move {
            counts.add(1);
            Outcome::Ack
        }
    };
    let report =
        member.run(handler, async move { progress.stopped().await }).await.context("the worker ended")?;
    ensure!(report.lost == 0 && report.nacked == 0, "not everything was acknowledged: {report:?}");
    Ok(())
}
