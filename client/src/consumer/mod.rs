//! The ordered consumer: a stream of records, each partition in the order of its offsets.
//!
//! [`task`] keeps the subscription (and, with [`group`], the assignment) over reconnects and puts whole batches into a queue
//! that the consumer's credit bounds; the consumer decodes them record by record. [`positions`] are shared by both: what is
//! returned to the caller counts as processed at the next call.

mod group;
mod positions;
mod task;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::{self, Records};
use felucca_protocol::{Api, ErrorCode, message};
use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::record::ConsumedRecord;
use positions::{Partition, Positions};
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

/// What to do at a position that the log does not have: its records were deleted, by retention or by command, before they were
/// read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutOfRange {
    /// The consumer ends with [`ErrorCode::OffsetOutOfRange`], so that no record is passed over unnoticed; its committed position
    /// stays.
    #[default]
    Fail,
    /// Reads on with the oldest record that is left.
    Beginning,
    /// Reads on with the next record that is produced.
    End,
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
    out_of_range: OutOfRange,
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
            out_of_range: OutOfRange::Fail,
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

    /// What to do when the next records were deleted before they were read; default [`OutOfRange::Fail`].
    #[must_use]
    pub fn out_of_range(mut self, policy: OutOfRange) -> Self {
        self.settings.out_of_range = policy;
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

    /// Starts reading. Dropping the future starts nothing.
    ///
    /// # Errors
    /// A topic or partition is unknown, or the broker cannot be reached within the request timeout.
    pub async fn build(self) -> Result<Consumer> {
        if self.settings.topics.is_empty() && self.settings.assigned.is_empty() {
            return Err(Error::Record("a consumer needs topics or partitions to read".to_owned()));
        }
        let (fetched, batches) = mpsc::unbounded_channel();
        let (orders, queue) = mpsc::channel(16);
        let positions = Arc::new(Positions::default());
        let patience = self.client.link.request_timeout() * 3;
        let credit = Credit::new(&self.client, &self.settings);
        let mut task = Task::new(self.client, self.settings, positions.clone(), fetched, queue);
        task.begin().await?;
        tokio::spawn(task.run());
        Ok(Consumer { positions, batches, orders, patience, credit, current: None, last: None })
    }
}

/// A batch on its way to the caller.
#[derive(Debug)]
struct Fetched {
    subscription: u64,
    partition: Arc<Partition>,
    batch: Bytes,
}

#[derive(Debug)]
struct Current {
    subscription: u64,
    partition: Arc<Partition>,
    records: Records,
    /// Credit that it took.
    count: u32,
    bytes: u32,
}

/// Gives credit back, in pieces that are worth a frame.
#[derive(Debug)]
struct Credit {
    client: Client,
    subscription: u64,
    records: u32,
    bytes: u32,
    least_records: u32,
    least_bytes: u32,
}

impl Credit {
    fn new(client: &Client, settings: &Settings) -> Self {
        let (least_records, least_bytes) = (settings.credit_records / 4, settings.credit_bytes / 4);
        Self { client: client.clone(), subscription: 0, records: 0, bytes: 0, least_records, least_bytes }
    }

    fn give_back(&mut self, done: &Current) {
        if self.subscription != done.subscription {
            // What was taken from an earlier subscription is over with it.
            (self.subscription, self.records, self.bytes) = (done.subscription, 0, 0);
        }
        self.records = self.records.saturating_add(done.count);
        self.bytes = self.bytes.saturating_add(done.bytes);
        if self.records > self.least_records || self.bytes > self.least_bytes {
            let (subscription, records, bytes) = (self.subscription, self.records, self.bytes);
            self.client.link.tell(Api::Credit, &message::Credit { subscription, records, bytes });
            (self.records, self.bytes) = (0, 0);
        }
    }
}

/// A stream of records, each partition in the order of its offsets. Ends after an error: only those are returned that trying
/// again does not mend. Lost connections and restarts of the broker are resumed without a gap.
///
/// In a group, records are handed out at least once: what was returned and not committed when a member ends or a partition
/// moves is read again by its next owner.
///
/// ```no_run
/// use felucca_client::{Client, Result};
///
/// # async fn example(client: Client) -> Result<()> {
/// let mut consumer = client.consumer().group("billing").topics(["orders"]).build().await?;
/// while let Some(record) = consumer.next().await {
///     let record = record?;
///     println!("{}/{} at {}", record.topic, record.partition, record.offset);
///     // Committed from the next call of `next` on, every five seconds.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Consumer {
    positions: Arc<Positions>,
    batches: mpsc::UnboundedReceiver<Result<Fetched>>,
    orders: mpsc::Sender<Order>,
    patience: Duration,
    credit: Credit,
    current: Option<Current>,
    /// The offset returned last, of the current batch: processed when the caller asks for more.
    last: Option<u64>,
}

impl Consumer {
    /// The next record; `None` after an error. Waits as long as there is none. Cancellation safe: no record is lost.
    pub async fn next(&mut self) -> Option<Result<ConsumedRecord>> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// Commits everything returned so far. When the future is dropped the commit may still be made.
    ///
    /// # Errors
    /// No group, or the commit failed; a partition that went to another member meanwhile is no error.
    pub async fn commit(&mut self) -> Result<()> {
        self.mark_processed();
        self.order(Order::Commit).await
    }

    /// Commits one partition up to and with this record, whatever was returned since. For callers who process records side by
    /// side; to be used with [`ConsumerBuilder::auto_commit`] off. When the future is dropped the commit may still be made.
    ///
    /// # Errors
    /// As [`Consumer::commit`], or the partition is not read by this consumer any more.
    pub async fn commit_record(&self, record: &ConsumedRecord) -> Result<()> {
        let partition = self.partition(&record.topic, record.partition)?;
        let next = record.offset + 1;
        self.order(|done| Order::CommitAt(partition, next, done)).await
    }

    /// Moves the position on a partition that this consumer reads: the next record of it is the one at `offset`, or the first
    /// one after it. Not committed by itself. When the future is dropped the position may have been moved.
    ///
    /// # Errors
    /// The partition is not read by this consumer.
    pub async fn seek(&mut self, topic: &str, partition: u32, offset: u64) -> Result<()> {
        self.mark_processed();
        let partition = self.partition(topic, partition)?;
        // Whatever is queued belongs to the old position.
        self.current = None;
        self.order(|done| Order::Seek(partition, offset, done)).await
    }

    /// Partitions that this consumer reads now, by topic name.
    pub fn assignment(&self) -> BTreeMap<String, Vec<u32>> {
        let mut assignment: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for partition in self.positions.all() {
            assignment.entry(partition.topic.to_string()).or_default().push(partition.key.1);
        }
        assignment.values_mut().for_each(|partitions| partitions.sort_unstable());
        assignment
    }

    /// Commits what was processed, the record returned last included (in a group that commits by itself), leaves the group and
    /// ends. A consumer that is dropped instead does the same behind the caller's back, without the record returned last.
    ///
    /// # Errors
    /// The last commit failed, or the group could not be left: its session will time out.
    pub async fn close(mut self) -> Result<()> {
        self.mark_processed();
        self.order(Order::Close).await
    }

    fn partition(&self, topic: &str, partition: u32) -> Result<Arc<Partition>> {
        self.positions.find(topic, partition).ok_or_else(|| {
            let message = format!("this consumer does not read {topic}/{partition}");
            Error::broker(ErrorCode::NotAssigned, message)
        })
    }

    async fn order(&self, order: impl FnOnce(oneshot::Sender<Result<()>>) -> Order) -> Result<()> {
        let (sender, done) = oneshot::channel();
        let ordered = async {
            self.orders.send(order(sender)).await.map_err(|_| Error::Closed)?;
            done.await.map_err(|_| Error::Closed)?
        };
        timeout(self.patience, ordered).await.unwrap_or(Err(Error::Timeout("waiting for the consumer")))
    }

    fn mark_processed(&mut self) {
        if let (Some(offset), Some(current)) = (self.last.take(), &self.current) {
            current.partition.processed(offset + 1);
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<ConsumedRecord>>> {
        self.mark_processed();
        loop {
            if let Some(current) = &mut self.current {
                match next_record(current, &self.positions) {
                    Some(Ok(record)) => {
                        self.last = Some(record.offset);
                        return Poll::Ready(Some(Ok(record)));
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(self.broken(error)))),
                    None => {
                        if let Some(done) = self.current.take() {
                            self.credit.give_back(&done);
                        }
                    }
                }
            }
            match ready!(self.batches.poll_recv(context)) {
                Some(Ok(Fetched { subscription, partition, batch })) => {
                    if subscription != self.positions.subscription() {
                        continue;
                    }
                    match batch::check(&batch).and_then(|_| batch::records(&batch)) {
                        Ok(records) => {
                            let count = records.header().record_count;
                            let bytes = u32::try_from(batch.len()).unwrap_or(u32::MAX);
                            self.current = Some(Current { subscription, partition, records, count, bytes });
                        }
                        Err(error) => return Poll::Ready(Some(Err(self.broken(error.into())))),
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// What cannot be decoded is never passed over: nothing is read any more.
    fn broken(&mut self, error: Error) -> Error {
        self.current = None;
        self.batches.close();
        while self.batches.try_recv().is_ok() {}
        error
    }
}

/// The batch's next record that the caller has not seen, if this consumer still reads the partition.
fn next_record(current: &mut Current, positions: &Positions) -> Option<Result<ConsumedRecord>> {
    let partition = &current.partition;
    loop {
        let record = match current.records.next()? {
            Ok(record) => record,
            Err(error) => return Some(Err(error.into())),
        };
        if record.offset < partition.next() {
            continue;
        }
        if positions.subscription() != current.subscription || partition.is_revoked() {
            return None;
        }
        partition.returned(record.offset + 1);
        return Some(Ok(ConsumedRecord {
            topic: partition.topic.clone(),
            partition: partition.key.1,
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
