//! The ordered consumer: a stream of records, each partition in the order of its offsets.
//!
//! [`task`] keeps the subscription (and in a group the assignment) over reconnects and puts whole batches into a queue that
//! the consumer's credit bounds; the consumer decodes them record by record. Positions are in [`Positions`], shared by both:
//! what is returned to the caller counts as processed at the next call.

mod task;

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::{self, Records};
use felucca_protocol::{Api, message};
use futures::Stream;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::record::ConsumedRecord;
use task::{Order, Task};

/// Where to begin on a partition for which nothing is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    #[default]
    Beginning,
    End,
    Offset(u64),
    /// The first record at or after this time, Unix milliseconds.
    Timestamp(i64),
}

/// Settings of a consumer.
#[derive(Clone, Debug)]
pub struct ConsumerBuilder {
    client: Client,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    group: Option<String>,
    member_id: String,
    topics: Vec<String>,
    assigned: Vec<(String, Vec<u32>)>,
    start: Start,
    credit_records: u32,
    credit_bytes: u32,
    auto_commit: Option<Duration>,
}

impl ConsumerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        let settings = Settings {
            group: None,
            member_id: uuid::Uuid::new_v4().to_string(),
            topics: Vec::new(),
            assigned: Vec::new(),
            start: Start::Beginning,
            credit_records: 100_000,
            credit_bytes: 8 << 20,
            auto_commit: Some(Duration::from_secs(5)),
        };
        Self { client, settings }
    }

    /// Joins a consumer group: partitions are spread over its members, positions are committed.
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.settings.group = Some(group.into());
        self
    }

    /// Topics to read, all partitions (in a group: its share of them).
    #[must_use]
    pub fn topics<T: Into<String>>(mut self, topics: impl IntoIterator<Item = T>) -> Self {
        self.settings.topics = topics.into_iter().map(Into::into).collect();
        self
    }

    /// Reads given partitions of a topic, outside any assignment. With a group, only its committed offsets are used.
    #[must_use]
    pub fn assign(mut self, topic: impl Into<String>, partitions: impl IntoIterator<Item = u32>) -> Self {
        self.settings.assigned.push((topic.into(), partitions.into_iter().collect()));
        self
    }

    /// Where to begin when nothing is committed; default [`Start::Beginning`].
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// What the broker may send ahead; default 100,000 records and 8 MiB.
    #[must_use]
    pub fn credit(mut self, records: u32, bytes: u32) -> Self {
        self.settings.credit_records = records.max(1);
        self.settings.credit_bytes = bytes.max(1);
        self
    }

    /// In a group, how often processed positions are committed; default 5 s, `None` = only by [`Consumer::commit`].
    #[must_use]
    pub fn auto_commit(mut self, interval: Option<Duration>) -> Self {
        self.settings.auto_commit = interval;
        self
    }

    /// A name for this member that outlives the process; default random.
    #[must_use]
    pub fn member_id(mut self, member_id: impl Into<String>) -> Self {
        self.settings.member_id = member_id.into();
        self
    }

    /// Starts reading.
    ///
    /// # Errors
    /// A topic or partition is unknown, or the broker cannot be reached within the request timeout.
    pub async fn build(self) -> Result<Consumer> {
        let (fetched, batches) = mpsc::unbounded_channel();
        let (orders, queue) = mpsc::channel(16);
        let positions = Arc::new(Mutex::new(Positions::default()));
        let patience = self.client.link.request_timeout() * 3;
        let mut task = Task::new(self.client.clone(), self.settings, positions.clone(), fetched, queue);
        task.begin().await?;
        tokio::spawn(task.run());
        Ok(Consumer { client: self.client, positions, batches, orders, patience, current: None, last: None })
    }
}

/// A partition: topic id and number.
type Key = (Bytes, u32);

#[derive(Debug, Default)]
struct Positions {
    /// Batches of other subscriptions are of no use any more.
    subscription: u64,
    partitions: HashMap<Key, Position>,
}

#[derive(Clone, Copy, Debug)]
struct Position {
    /// Next offset to return to the caller.
    next: u64,
    /// Everything below was processed.
    processed: u64,
    committed: Option<u64>,
}

/// A batch on its way to the caller.
#[derive(Debug)]
struct Fetched {
    subscription: u64,
    topic: Arc<str>,
    key: Key,
    batch: Bytes,
}

#[derive(Debug)]
struct Current {
    fetched: Fetched,
    records: Records,
    count: u32,
}

/// A stream of records, see the [module](crate::consumer). Ends only by an error that is not retryable, or `close`.
#[derive(Debug)]
pub struct Consumer {
    client: Client,
    positions: Arc<Mutex<Positions>>,
    batches: mpsc::UnboundedReceiver<Result<Fetched>>,
    orders: mpsc::Sender<Order>,
    patience: Duration,
    current: Option<Current>,
    last: Option<(Key, u64)>,
}

impl Consumer {
    /// The next record; `None` after an error that ended the stream. Cancellation safe: no record is lost.
    pub async fn next(&mut self) -> Option<Result<ConsumedRecord>> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// Commits everything returned so far.
    ///
    /// # Errors
    /// No group, or the commit failed; a partition that went to another member meanwhile is no error.
    pub async fn commit(&mut self) -> Result<()> {
        self.mark_processed();
        self.order(Order::Commit).await
    }

    /// Moves the position on a partition that this consumer reads.
    ///
    /// # Errors
    /// The partition is not read by this consumer.
    pub async fn seek(&mut self, topic: &str, partition: u32, offset: u64) -> Result<()> {
        let id = self.client.topic(topic).await?.id;
        let key = (id, partition);
        {
            let mut positions = self.positions.lock();
            let Some(position) = positions.partitions.get_mut(&key) else {
                return Err(Error::Record(format!("this consumer does not read {topic}/{partition}")));
            };
            *position = Position { next: offset, processed: offset, committed: position.committed };
            // Whatever is queued belongs to the old position.
            positions.subscription = 0;
        }
        self.current = None;
        self.last = None;
        self.order(Order::Resubscribe).await
    }

    /// Partitions that this consumer reads now, by topic name.
    pub async fn assignment(&self) -> Result<BTreeMap<String, Vec<u32>>> {
        let keys: Vec<Key> = self.positions.lock().partitions.keys().cloned().collect();
        let mut assignment: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (id, partition) in keys {
            let topic = self.client.topic_by_id(&id).await?;
            assignment.entry(topic.name.to_string()).or_default().push(partition);
        }
        assignment.values_mut().for_each(|partitions| partitions.sort_unstable());
        Ok(assignment)
    }

    /// Commits what was processed (in a group that commits by itself), leaves the group and ends. A consumer that is dropped
    /// instead leaves its partitions when its session times out.
    ///
    /// # Errors
    /// The last commit failed.
    pub async fn close(mut self) -> Result<()> {
        self.mark_processed();
        self.order(Order::Close).await
    }

    async fn order(&self, order: impl FnOnce(oneshot::Sender<Result<()>>) -> Order) -> Result<()> {
        let (sender, done) = oneshot::channel();
        self.orders.send(order(sender)).await.map_err(|_| Error::Closed)?;
        match timeout(self.patience, done).await {
            Ok(result) => result.map_err(|_| Error::Closed)?,
            Err(_) => Err(Error::Timeout("waiting for the consumer")),
        }
    }

    fn mark_processed(&mut self) {
        if let Some((key, offset)) = self.last.take()
            && let Some(position) = self.positions.lock().partitions.get_mut(&key)
        {
            position.processed = position.processed.max(offset + 1);
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<ConsumedRecord>>> {
        self.mark_processed();
        loop {
            if let Some(current) = &mut self.current {
                match next_record(current, &self.positions) {
                    Some(Ok(record)) => {
                        self.last = Some((current.fetched.key.clone(), record.offset));
                        return Poll::Ready(Some(Ok(record)));
                    }
                    Some(Err(error)) => {
                        self.current = None;
                        return Poll::Ready(Some(Err(error)));
                    }
                    None => {
                        let credit = message::Credit {
                            subscription: current.fetched.subscription,
                            records: current.count,
                            bytes: u32::try_from(current.fetched.batch.len()).unwrap_or(u32::MAX),
                        };
                        self.client.link.tell(Api::Credit, &credit);
                        self.current = None;
                    }
                }
            }
            match std::task::ready!(self.batches.poll_recv(context)) {
                Some(Ok(fetched)) => match batch::records(&fetched.batch) {
                    Ok(records) => {
                        let count = records.header().record_count;
                        self.current = Some(Current { fetched, records, count });
                    }
                    Err(error) => return Poll::Ready(Some(Err(error.into()))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}

/// The batch's next record that the caller has not seen and that this consumer still reads.
fn next_record(current: &mut Current, positions: &Mutex<Positions>) -> Option<Result<ConsumedRecord>> {
    let fetched = &current.fetched;
    loop {
        let record = match current.records.next()? {
            Ok(record) => record,
            Err(error) => return Some(Err(error.into())),
        };
        let mut positions = positions.lock();
        if positions.subscription != fetched.subscription {
            return None;
        }
        let position = positions.partitions.get_mut(&fetched.key)?;
        if record.offset < position.next {
            continue;
        }
        position.next = record.offset + 1;
        return Some(Ok(ConsumedRecord {
            topic: fetched.topic.clone(),
            partition: fetched.key.1,
            offset: record.offset,
            timestamp: record.timestamp,
            key: record.key,
            value: record.value,
            headers: record.headers,
        }));
    }
}

impl Stream for Consumer {
    type Item = Result<ConsumedRecord>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(context)
    }
}
