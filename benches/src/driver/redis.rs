//! Redis Streams, one stream for each partition, all commands pipelined over one connection per producer or consumer.
//!
//! The event loop writes its append-only file once for everything that it has read, so that a pipeline is its group commit:
//! a task gathers what callers have enqueued meanwhile into the next pipeline, as batching clients do.

use std::collections::VecDeque;

use ::redis::aio::MultiplexedConnection;
use ::redis::streams::StreamReadReply;
use ::redis::{Client, Cmd, Pipeline, Value, cmd};
use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::future::{FutureExt, Map};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot};

use super::{Driver, Gathering, Members, PendingBlock, Progress, Topic};
use crate::workload::Ack;

/// Commands in one pipeline.
const PIPELINE: usize = 512;
/// Pipelines that are unanswered at the most, so that the server always has one to work on.
const PIPELINES: usize = 4;
/// Entries in one read.
const READ: usize = 1000;
/// How long a read waits for entries, in milliseconds.
const WAIT_MS: usize = 100;

#[derive(Debug)]
pub(crate) struct Redis {
    client: Client,
}

impl Redis {
    async fn connect(&self) -> anyhow::Result<MultiplexedConnection> {
        let mut connection = self.client.get_multiplexed_async_connection().await?;
        connection.set_response_timeout(crate::measure::PATIENCE);
        Ok(connection)
    }
}

/// Adds one entry.
fn add(stream: &str, value: &Bytes) -> Cmd {
    let mut command = cmd("XADD");
    command.arg(stream).arg("*").arg("v").arg(&value[..]);
    command
}

/// Fails with the first command that failed.
async fn send(connection: &mut MultiplexedConnection, pipeline: &Pipeline) -> anyhow::Result<Vec<Value>> {
    let answers = connection.send_packed_commands(pipeline, 0, pipeline.len()).await?;
    ensure!(answers.len() == pipeline.len(), "{} answers for {} commands", answers.len(), pipeline.len());
    Ok(answers.into_iter().map(Value::extract_error).collect::<Result<_, _>>()?)
}

impl Driver for Redis {
    type Producer = RedisProducer;
    type Consumer = RedisConsumer;

    async fn open(address: &str, _level: Ack) -> anyhow::Result<Self> {
        Ok(Self { client: Client::open(format!("redis://{address}/"))? })
    }

    async fn create_topic(&self, _topic: &Topic) -> anyhow::Result<()> {
        // A stream is made by its first entry.
        Ok(())
    }

    async fn producer(
        &self,
        topic: &Topic,
        index: u32,
        gathering: Gathering,
    ) -> anyhow::Result<RedisProducer> {
        let connection = self.connect().await?;
        let (records, queue) = mpsc::channel(gathering.in_flight.clamp(1, 1 << 16));
        let parts = topic.parts();
        tokio::spawn(gather(connection.clone(), queue, parts.clone(), index as usize));
        Ok(RedisProducer { connection, records, parts, next: index as usize })
    }

    async fn consumer(&self, topic: &Topic, partitions: Vec<u32>) -> anyhow::Result<RedisConsumer> {
        let streams = partitions.iter().map(|partition| (topic.part(*partition), "0-0".to_owned())).collect();
        Ok(RedisConsumer { connection: self.connect().await?, streams })
    }

    async fn create_group(&self, topic: &Topic, group: &str, _member: Members) -> anyhow::Result<()> {
        let mut connection = self.connect().await?;
        for stream in topic.parts() {
            let mut create = cmd("XGROUP");
            create.arg("CREATE").arg(stream).arg(group).arg("0").arg("MKSTREAM");
            create.exec_async(&mut connection).await?;
        }
        Ok(())
    }

    /// Two halves of the prefetch take turns: while one is acknowledged, the other is on its way.
    async fn work(
        &self,
        topic: &Topic,
        group: &str,
        member: Members,
        progress: Progress,
    ) -> anyhow::Result<()> {
        let connection = self.connect().await?;
        let name = format!("member-{}", member.index);
        let mut halves = FuturesUnordered::new();
        for half in 0..2 {
            let streams = topic.share_of(member.index, member.count);
            let streams: Vec<_> = streams.into_iter().map(|partition| topic.part(partition)).collect();
            let half = Half {
                connection: connection.clone(),
                group: group.to_owned(),
                name: format!("{name}-{half}"),
                streams,
                count: (member.prefetch as usize / 2).max(1),
            };
            halves.push(half.work(progress.clone()));
        }
        while let Some(done) = halves.next().await {
            done?;
        }
        Ok(())
    }
}

/// A record and who waits for its outcome.
type Enqueued = (Bytes, oneshot::Sender<anyhow::Result<()>>);

#[derive(Debug)]
pub(crate) struct RedisProducer {
    connection: MultiplexedConnection,
    records: mpsc::Sender<Enqueued>,
    parts: Vec<String>,
    next: usize,
}

/// Sends what was enqueued, in pipelines to one stream after the other.
async fn gather(
    connection: MultiplexedConnection,
    mut queue: mpsc::Receiver<Enqueued>,
    parts: Vec<String>,
    mut next: usize,
) {
    let mut sent = FuturesUnordered::new();
    let mut gathered = Vec::with_capacity(PIPELINE);
    loop {
        tokio::select! {
            biased;
            Some(()) = sent.next(), if !sent.is_empty() => {}
            count = queue.recv_many(&mut gathered, PIPELINE), if sent.len() < PIPELINES => {
                if count == 0 {
                    break;
                }
                let records = std::mem::replace(&mut gathered, Vec::with_capacity(PIPELINE));
                sent.push(settle(connection.clone(), parts[next % parts.len()].clone(), records));
                next += 1;
            }
        }
    }
    while let Some(()) = sent.next().await {}
}

/// Sends one pipeline and tells each caller the outcome of its own record.
async fn settle(mut connection: MultiplexedConnection, stream: String, records: Vec<Enqueued>) {
    let mut pipeline = Pipeline::with_capacity(records.len());
    for (value, _) in &records {
        pipeline.add_command(add(&stream, value));
    }
    // A caller that has gone does not want to know.
    match connection.send_packed_commands(&pipeline, 0, records.len()).await {
        Ok(answers) => {
            for ((_, waiting), answer) in records.into_iter().zip(answers) {
                let _gone = waiting.send(answer.extract_error().map(|_| ()).map_err(anyhow::Error::from));
            }
        }
        Err(error) => {
            for (_, waiting) in records {
                let _gone = waiting.send(Err(anyhow::Error::from(error.clone())));
            }
        }
    }
}

type Outcome = Result<anyhow::Result<()>, oneshot::error::RecvError>;

fn outcome(received: Outcome) -> anyhow::Result<()> {
    received.context("the connection is gone")?
}

impl super::Producer for RedisProducer {
    type Pending = Map<oneshot::Receiver<anyhow::Result<()>>, fn(Outcome) -> anyhow::Result<()>>;

    async fn enqueue(&mut self, value: Bytes) -> anyhow::Result<Self::Pending> {
        let (waiting, pending) = oneshot::channel();
        self.records.send((value, waiting)).await.ok().context("the connection is gone")?;
        Ok(pending.map(outcome))
    }

    /// One pipeline.
    async fn enqueue_block(&mut self, values: &[Bytes]) -> anyhow::Result<PendingBlock> {
        let stream = &self.parts[self.next % self.parts.len()];
        self.next += 1;
        let mut pipeline = Pipeline::with_capacity(values.len());
        for value in values {
            pipeline.add_command(add(stream, value));
        }
        let mut connection = self.connection.clone();
        // In a task, so that it is sent whether or not anybody waits yet.
        let sent = tokio::spawn(async move { send(&mut connection, &pipeline).await.map(|_| ()) });
        Ok(async move { sent.await.context("the task panicked")? }.boxed())
    }
}

#[derive(Debug)]
pub(crate) struct RedisConsumer {
    connection: MultiplexedConnection,
    /// Names, and the last entry that was read of each.
    streams: Vec<(String, String)>,
}

impl super::Consumer for RedisConsumer {
    async fn next(&mut self, values: &mut Vec<Bytes>) -> anyhow::Result<()> {
        while values.is_empty() {
            let mut read = cmd("XREAD");
            read.arg("COUNT").arg(READ).arg("BLOCK").arg(WAIT_MS).arg("STREAMS");
            for (name, _) in &self.streams {
                read.arg(name);
            }
            for (_, last) in &self.streams {
                read.arg(last);
            }
            let reply: Option<StreamReadReply> = read.query_async(&mut self.connection).await?;
            for key in reply.into_iter().flat_map(|reply| reply.keys) {
                if let (Some(last), Some(stream)) =
                    (key.ids.last(), self.streams.iter_mut().find(|(name, _)| *name == key.key))
                {
                    stream.1.clone_from(&last.id);
                }
                for entry in key.ids {
                    values.push(value_of(entry.map)?);
                }
            }
        }
        Ok(())
    }
}

fn value_of(mut fields: std::collections::HashMap<String, Value>) -> anyhow::Result<Bytes> {
    match fields.remove("v") {
        Some(Value::BulkString(bytes)) => Ok(bytes.into()),
        other => anyhow::bail!("an entry with {other:?}"),
    }
}

/// One of the two loops of a member.
struct Half {
    connection: MultiplexedConnection,
    group: String,
    name: String,
    streams: Vec<String>,
    count: usize,
}

impl Half {
    /// Acknowledges what it has and reads more, in one pipeline.
    async fn work(mut self, progress: Progress) -> anyhow::Result<()> {
        let mut held: VecDeque<(String, Vec<String>)> = VecDeque::new();
        loop {
            let stopped = progress.is_stopped();
            let mut pipeline = Pipeline::new();
            let mut expected = Vec::new();
            for (stream, ids) in held.drain(..) {
                expected.push(ids.len() as u64);
                pipeline.add_command(cmd("XACK").arg(stream).arg(&self.group).arg(ids).to_owned());
            }
            if !stopped {
                let mut read = cmd("XREADGROUP");
                read.arg("GROUP").arg(&self.group).arg(&self.name).arg("COUNT").arg(self.count);
                read.arg("STREAMS").arg(&self.streams);
                for _ in &self.streams {
                    read.arg(">");
                }
                pipeline.add_command(read);
            }
            if pipeline.is_empty() {
                return Ok(());
            }
            let mut answers = send(&mut self.connection, &pipeline).await?;
            if !stopped {
                let read = answers.pop().context("no answer")?;
                let reply: Option<StreamReadReply> = ::redis::from_redis_value(read)?;
                for key in reply.into_iter().flat_map(|reply| reply.keys) {
                    held.push_back((key.key, key.ids.into_iter().map(|entry| entry.id).collect()));
                }
            }
            for (answer, expected) in answers.into_iter().zip(expected) {
                let acknowledged: u64 = ::redis::from_redis_value(answer)?;
                ensure!(acknowledged == expected, "{acknowledged} of {expected} were acknowledged");
                progress.add(expected);
            }
            if held.is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
    }
}
