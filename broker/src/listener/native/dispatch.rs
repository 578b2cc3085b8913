//! What each request of a connection does.
//!
//! Most requests become one engine command, which is gathered with others that arrived together and answered by the shard
//! straight to the outbox. Reads of the log, and requests of several steps, run as tasks of the connection, a bounded
//! number at a time. A request that is wrong gets a typed error and disturbs nothing else.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch;
use felucca_protocol::frame::{Frame, Kind};
use felucca_protocol::{Api, ErrorCode, message as wire};
use prost::Message;
use tokio::task::{AbortHandle, JoinSet};
use uuid::Uuid;

use super::convert::{self, invalid};
use super::outbox::{OutFrame, Outbox};
use super::share::Shares;
use super::subscription::{Credit, Fetch, Subscription};
use crate::broker::{Broker, BrokerError, SeekTarget};
use crate::engine::command::{AppendEntry, Command, OffsetCommit, SeekTo, StagedBatch};
use crate::engine::types::{PartitionKey, SubscriptionId, TopicId};
use crate::redrive::{self, RedriveTarget};
use crate::shard::{Origin, Responder, Submission, Token};

/// Requests of one connection that may run beside it at a time.
const MAX_TASKS: usize = 256;
/// Open subscriptions of one connection.
const MAX_SUBSCRIPTIONS: usize = 1_000;
/// Longest that a fetch may ask to wait.
const MAX_FETCH_WAIT: Duration = Duration::from_secs(60);
/// What is kept of a frame for its header and message when its payload is as large as it may be.
const FRAME_ROOM: u32 = 64 << 10;
/// A batch that is smaller than this fraction of the memory that it would pin is copied.
const PIN_FACTOR: usize = 4;

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct Dispatcher {
    broker: Broker,
    outbox: Arc<Outbox>,
    shares: Arc<Shares>,
    ordered: HashMap<u64, Ordered>,
    tasks: JoinSet<()>,
    /// Commands that arrived together.
    batch: Vec<Submission>,
    max_frame_bytes: u32,
}

#[derive(Debug)]
struct Ordered {
    credit: Arc<Credit>,
    task: AbortHandle,
}

/// What a request still needs, once it is understood.
enum Next {
    /// The shard carries it out and answers.
    Command(Command),
    /// Answered with this message.
    Reply(BytesMut),
    /// It has no answer, or one that comes by itself.
    Nothing,
}

impl Dispatcher {
    pub(super) fn new(
        broker: Broker,
        outbox: Arc<Outbox>,
        shares: Arc<Shares>,
        max_frame_bytes: u32,
    ) -> Self {
        Self {
            broker,
            outbox,
            shares,
            ordered: HashMap::new(),
            tasks: JoinSet::new(),
            batch: Vec::new(),
            max_frame_bytes,
        }
    }

    /// Begins one request. `pinned`: size of the memory block that the frame is part of. [`Self::submit`] must follow.
    ///
    /// # Errors
    /// The frame is of a kind that only brokers send: the connection must end.
    pub(super) fn request(
        &mut self,
        frame: Frame,
        pinned: usize,
        origin: &Arc<Origin>,
    ) -> Result<(), wire::Error> {
        if frame.kind != Kind::Request {
            return Err(invalid(format!("a client sends requests only, not {:?}", frame.kind)));
        }
        let (number, correlation) = (frame.api, frame.correlation);
        let bytes = frame.message.len() + frame.payload.len();
        let next = match Api::try_from(number) {
            Ok(api) => self.begin(api, frame, pinned),
            Err(unknown) => Err(wire::Error::new(ErrorCode::UnknownApi, unknown.to_string())),
        };
        match next {
            Ok(Next::Command(command)) => {
                let responder = Responder::new(origin, Token { correlation, tag: number });
                self.batch.push(Submission::new(command, responder, bytes));
            }
            Ok(Next::Reply(head)) => {
                self.outbox.send(OutFrame { head, payload: Vec::new(), origin: Some(origin.clone()) });
            }
            Ok(Next::Nothing) => {}
            Err(error) => {
                tracing::debug!(
                    request = number,
                    code = error.error_code().name(),
                    error = error.message,
                    "refused"
                );
                let head = convert::error_frame(number, correlation, &error);
                self.outbox.send(OutFrame { head, payload: Vec::new(), origin: Some(origin.clone()) });
            }
        }
        Ok(())
    }

    /// Hands what [`Self::request`] has gathered to the shard.
    pub(super) fn submit(&mut self) {
        if !self.batch.is_empty() {
            self.broker.submit(self.batch.drain(..));
        }
    }

    /// Says that the members of this connection are alive.
    pub(super) fn members_seen(&mut self) {
        let members = self.shares.members();
        if !members.is_empty() {
            self.batch.push(Submission::silent(Command::MembersSeen { members }));
        }
    }

    /// Waits for the requests that run beside the connection; ordered subscriptions are ended.
    pub(super) async fn drain(&mut self) {
        for (_, ordered) in self.ordered.drain() {
            ordered.task.abort();
        }
        while self.tasks.join_next().await.is_some() {}
    }

    fn begin(&mut self, api: Api, frame: Frame, pinned: usize) -> Result<Next, wire::Error> {
        let correlation = frame.correlation;
        let command = match api {
            Api::Hello => return Err(invalid("hello was said already")),
            Api::Records | Api::SubscriptionEnded | Api::LeasedRecords => {
                return Err(invalid(format!("{api:?} is sent by brokers only")));
            }
            Api::Ping => return Ok(Next::Reply(convert::reply_frame(api, correlation, &wire::Empty {}, 0))),
            Api::Produce => return self.produce(frame, pinned).map(Next::Command),
            Api::Complete => return self.complete(frame, pinned).map(Next::Command),
            Api::Settle => {
                let request: wire::Settle = decode(&frame)?;
                Command::Settle {
                    group: request.group,
                    member: request.member_id,
                    level: convert::level(request.level)?,
                    settlements: convert::settlements(request.batches)?,
                }
            }
            Api::Fetch => return self.fetch(correlation, &decode(&frame)?),
            Api::Subscribe => return self.subscribe(correlation, &decode(&frame)?),
            Api::ShareSubscribe => self.share_subscribe(correlation, decode(&frame)?)?,
            Api::Credit => return Ok(self.credit(&decode(&frame)?)),
            Api::Unsubscribe => return Ok(self.unsubscribe(correlation, &decode(&frame)?)),
            Api::ListOffsets => return self.list_offsets(correlation, decode(&frame)?),
            Api::DescribeGroup => return self.describe_group(correlation, decode(&frame)?),
            Api::SeekGroup => return self.seek_group(correlation, decode(&frame)?),
            Api::Redrive => return self.redrive(correlation, decode(&frame)?),
            Api::PurgeDeadLetters => return self.purge(correlation, decode(&frame)?),
            Api::Metadata => Command::Metadata { names: decode::<wire::Metadata>(&frame)?.topics },
            Api::CreateTopic => {
                let request: wire::CreateTopic = decode(&frame)?;
                Command::CreateTopic {
                    id: TopicId(Uuid::new_v4().into_bytes()),
                    name: request.name,
                    partitions: request.partitions,
                    config: convert::config(request.config),
                }
            }
            Api::AlterTopic => {
                let request: wire::AlterTopic = decode(&frame)?;
                Command::AlterTopic { name: request.name, config: convert::config(request.config) }
            }
            Api::DeleteTopic => Command::DeleteTopic { name: decode::<wire::DeleteTopic>(&frame)?.name },
            Api::InitProducer => Command::InitProducer,
            Api::GroupHeartbeat => {
                let request: wire::GroupHeartbeat = decode(&frame)?;
                Command::GroupHeartbeat {
                    group: request.group,
                    member: request.member_id,
                    topics: request.topics,
                    owned: convert::partition_keys(&request.owned)?,
                    generation: request.generation,
                    leave: request.leave,
                }
            }
            Api::CommitOffsets => {
                let request: wire::CommitOffsets = decode(&frame)?;
                let offsets = request.offsets.into_iter().map(|item| {
                    let partition = convert::partition_key(&item.topic_id, item.partition)?;
                    Ok(OffsetCommit { partition, offset: item.offset, metadata: item.metadata })
                });
                Command::CommitOffsets {
                    group: request.group,
                    member: request.member_id,
                    generation: request.generation,
                    offsets: offsets.collect::<Result<_, wire::Error>>()?,
                }
            }
            Api::FetchOffsets => {
                let request: wire::FetchOffsets = decode(&frame)?;
                let partitions = convert::partition_keys(&request.partitions)?;
                Command::FetchOffsets { group: request.group, partitions }
            }
            Api::CreateShareGroup => {
                let request: wire::CreateShareGroup = decode(&frame)?;
                Command::CreateShareGroup {
                    group: request.group,
                    topics: request.topics,
                    config: convert::config(request.config),
                    from_end: request.from_end,
                }
            }
            Api::AlterShareGroup => {
                let request: wire::AlterShareGroup = decode(&frame)?;
                Command::AlterShareGroup { group: request.group, config: convert::config(request.config) }
            }
            Api::DeleteGroup => Command::DeleteGroup { group: decode::<wire::DeleteGroup>(&frame)?.group },
            Api::PauseGroup => {
                let request: wire::PauseGroup = decode(&frame)?;
                Command::PauseGroup { group: request.group, paused: request.paused }
            }
            Api::ListGroups => Command::ListGroups,
            Api::ListDeadLetters => {
                let group = decode::<wire::ListDeadLetters>(&frame)?.group;
                Command::ListDeadLetters { group: Some(group).filter(|group| !group.is_empty()) }
            }
        };
        Ok(Next::Command(command))
    }

    // ---- Records in ----

    fn produce(&self, mut frame: Frame, pinned: usize) -> Result<Command, wire::Error> {
        let request: wire::Produce = decode(&frame)?;
        let level = convert::level(request.level)?;
        let entries = self.entries(&request.entries, std::mem::take(&mut frame.payload), pinned)?;
        Ok(Command::Append { level, entries })
    }

    fn complete(&self, mut frame: Frame, pinned: usize) -> Result<Command, wire::Error> {
        let request: wire::Complete = decode(&frame)?;
        let outputs = self.entries(&request.outputs, std::mem::take(&mut frame.payload), pinned)?;
        let lease = request.lease.as_ref().ok_or_else(|| invalid("no lease is named"))?;
        let record = convert::lease_ref(lease)?;
        Ok(Command::Complete { group: request.group, member: request.member_id, record, outputs })
    }

    /// Takes the payload apart and checks each batch. One that is wrong refuses the whole request.
    fn entries(
        &self,
        entries: &[wire::ProduceEntry],
        mut payload: BytesMut,
        pinned: usize,
    ) -> Result<Vec<AppendEntry>, wire::Error> {
        let total = payload.len();
        let mut staged = Vec::with_capacity(entries.len());
        for entry in entries {
            let length = entry.length as usize;
            if length > payload.len() {
                return Err(invalid(format!("the batches take more than the {total} bytes of payload")));
            }
            let bytes = payload.split_to(length);
            let header = batch::validate(&bytes, &self.broker.limits().batch)
                .map_err(|error| convert::batch_error(&error))?;
            // Not much is copied, and a block that many small batches shared is not kept for one of them.
            let bytes = if length < pinned / PIN_FACTOR { BytesMut::from(&bytes[..]) } else { bytes };
            let partition = convert::partition_key(&entry.topic_id, entry.partition)?;
            staged.push(AppendEntry { partition, batch: StagedBatch { header, bytes } });
        }
        if !payload.is_empty() {
            return Err(invalid(format!("{} bytes of payload belong to no batch", payload.len())));
        }
        Ok(staged)
    }

    // ---- Subscriptions ----

    fn subscribe(&mut self, correlation: u64, request: &wire::Subscribe) -> Result<Next, wire::Error> {
        self.check_new_subscription(request.subscription)?;
        let credit = Credit::new(request.credit_records, request.credit_bytes);
        let (broker, outbox) = (self.broker.clone(), self.outbox.clone());
        let subscription =
            Subscription::open(broker, outbox, request.subscription, &request.positions, credit.clone())?;
        // Queued before the first push.
        let head = convert::reply_frame(Api::Subscribe, correlation, &wire::Empty {}, 0);
        self.outbox.send(OutFrame { head, payload: Vec::new(), origin: None });
        let task = self.tasks.spawn(subscription.run());
        self.ordered.insert(request.subscription, Ordered { credit, task });
        Ok(Next::Nothing)
    }

    fn share_subscribe(
        &mut self,
        correlation: u64,
        request: wire::ShareSubscribe,
    ) -> Result<Command, wire::Error> {
        self.check_new_subscription(request.subscription)?;
        let held = request.held.iter().map(convert::lease_ref).collect::<Result<_, _>>()?;
        let subscription =
            self.shares.open(request.subscription, &request.group, &request.member_id, correlation);
        Ok(Command::ShareSubscribe {
            subscription,
            group: request.group,
            member: request.member_id,
            credit_records: request.credit_records,
            credit_bytes: request.credit_bytes,
            held,
        })
    }

    fn check_new_subscription(&mut self, id: u64) -> Result<(), wire::Error> {
        self.ordered.retain(|_, ordered| !ordered.task.is_finished());
        if self.ordered.contains_key(&id) || self.shares.find(id).is_some() {
            return Err(invalid(format!("subscription {id} is open already")));
        }
        if self.ordered.len() + self.shares.len() >= MAX_SUBSCRIPTIONS {
            let message = format!("{MAX_SUBSCRIPTIONS} subscriptions of one connection");
            return Err(wire::Error::new(ErrorCode::LimitReached, message));
        }
        Ok(())
    }

    /// Credit for a subscription that has ended meanwhile is of no use and no fault.
    fn credit(&mut self, request: &wire::Credit) -> Next {
        if let Some(ordered) = self.ordered.get(&request.subscription) {
            ordered.credit.add(request.records, request.bytes);
        } else if let Some(subscription) = self.shares.find(request.subscription) {
            let (records, bytes) = (request.records, request.bytes);
            self.batch.push(Submission::silent(Command::ShareCredit { subscription, records, bytes }));
        }
        Next::Nothing
    }

    fn unsubscribe(&mut self, correlation: u64, request: &wire::Unsubscribe) -> Next {
        if let Some(ordered) = self.ordered.remove(&request.subscription) {
            ordered.task.abort();
        } else if let Some(subscription) = self.shares.find(request.subscription) {
            return self.share_unsubscribe(subscription);
        }
        Next::Reply(convert::reply_frame(Api::Unsubscribe, correlation, &wire::Empty {}, 0))
    }

    fn share_unsubscribe(&mut self, subscription: SubscriptionId) -> Next {
        self.shares.close(subscription);
        Next::Command(Command::ShareUnsubscribe { subscription })
    }

    // ---- Reads, and requests of several steps ----

    fn fetch(&mut self, correlation: u64, request: &wire::Fetch) -> Result<Next, wire::Error> {
        let key = convert::partition_key(&request.topic_id, request.partition)?;
        let view = self.broker.view(key).map_err(|error| convert::engine_error(&error))?;
        let max_bytes = request.max_bytes.clamp(1, self.max_frame_bytes - FRAME_ROOM) as usize;
        let max_wait = Duration::from_millis(request.max_wait_ms.into()).min(MAX_FETCH_WAIT);
        let fetch = Fetch { correlation, view, offset: request.offset, max_bytes, max_wait };
        let task = fetch.run(self.broker.clone(), self.outbox.clone());
        self.spawn(task)
    }

    fn list_offsets(&mut self, correlation: u64, request: wire::ListOffsets) -> Result<Next, wire::Error> {
        let topic = convert::topic_id(&request.topic_id)?;
        let broker = self.broker.clone();
        self.answer_later(Api::ListOffsets, correlation, async move {
            let known = |error| convert::engine_error(&error);
            let views = if request.partitions.is_empty() {
                broker.views_of(topic).map_err(known)?
            } else {
                let keys = request.partitions.iter().map(|&partition| PartitionKey { topic, partition });
                keys.map(|key| broker.view(key)).collect::<Result<_, _>>().map_err(known)?
            };
            let mut partitions = Vec::with_capacity(views.len());
            for view in views {
                let offset_for_timestamp = match request.timestamp {
                    Some(timestamp) => {
                        view.find_timestamp(timestamp).await.map_err(|error| convert::read_error(&error))?
                    }
                    None => None,
                };
                partitions.push(wire::PartitionOffsets {
                    partition: view.partition().partition,
                    log_start: view.log_start(),
                    high_watermark: view.high_watermark(),
                    offset_for_timestamp,
                    bytes: view.bytes(),
                });
            }
            Ok(wire::ListOffsetsReply { partitions })
        })
    }

    fn describe_group(
        &mut self,
        correlation: u64,
        request: wire::DescribeGroup,
    ) -> Result<Next, wire::Error> {
        let broker = self.broker.clone();
        self.answer_later(Api::DescribeGroup, correlation, async move {
            let (description, oldest) =
                broker.describe_group(&request.group).await.map_err(|error| convert::broker_error(&error))?;
            let now = jiff::Timestamp::now().as_millisecond();
            let log_start = |key: Option<PartitionKey>| {
                key.and_then(|key| broker.view(key).ok()).map_or(0, |view| view.log_start())
            };
            let starts: Vec<u64> =
                description.partitions.iter().map(|info| log_start(info.partition)).collect();
            Ok(convert::group_description(description, |index| wire::GroupPartition {
                log_start: starts[index],
                // A clock that ran backwards shows as an age of 0.
                oldest_unsettled_ms: oldest[index].map(|then| u64::try_from(now - then).unwrap_or(0)),
                ..Default::default()
            }))
        })
    }

    fn seek_group(&mut self, correlation: u64, request: wire::SeekGroup) -> Result<Next, wire::Error> {
        use wire::seek_group::To;
        let to = match request.to {
            Some(To::Beginning(_)) => SeekTarget::To(SeekTo::Beginning),
            Some(To::End(_)) => SeekTarget::To(SeekTo::End),
            Some(To::Offset(offset)) => SeekTarget::To(SeekTo::Offset(offset)),
            Some(To::Timestamp(timestamp)) => SeekTarget::Timestamp(timestamp),
            None => return Err(invalid("the request does not say where to move the group")),
        };
        let broker = self.broker.clone();
        self.answer_later(Api::SeekGroup, correlation, async move {
            let moved = broker.seek_group(&request.group, &request.topic, request.partition, to).await;
            moved.map(|()| wire::Empty {}).map_err(|error: BrokerError| convert::broker_error(&error))
        })
    }

    fn redrive(&mut self, correlation: u64, request: wire::Redrive) -> Result<Next, wire::Error> {
        let target = match wire::RedriveTarget::try_from(request.target) {
            Ok(wire::RedriveTarget::Group) => RedriveTarget::Group,
            Ok(wire::RedriveTarget::Source) => RedriveTarget::Source,
            Err(_) => return Err(invalid(format!("unknown redrive target {}", request.target))),
        };
        let broker = self.broker.clone();
        self.answer_later(Api::Redrive, correlation, async move {
            let done = redrive::redrive(&broker, &request.group, &request.source_topic, target).await;
            let done = done.map_err(|error| convert::redrive_error(&error))?;
            Ok(wire::RedriveReply { moved: done.moved, refused: done.refused })
        })
    }

    fn purge(&mut self, correlation: u64, request: wire::PurgeDeadLetters) -> Result<Next, wire::Error> {
        let broker = self.broker.clone();
        self.answer_later(Api::PurgeDeadLetters, correlation, async move {
            let purged = redrive::purge(&broker, &request.group, &request.source_topic).await;
            let purged = purged.map_err(|error| convert::redrive_error(&error))?;
            Ok(wire::PurgeDeadLettersReply { purged })
        })
    }

    fn answer_later<M: Message>(
        &mut self,
        api: Api,
        correlation: u64,
        work: impl Future<Output = Result<M, wire::Error>> + Send + 'static,
    ) -> Result<Next, wire::Error> {
        let outbox = self.outbox.clone();
        self.spawn(async move {
            let head = match work.await {
                Ok(reply) => convert::reply_frame(api, correlation, &reply, 0),
                Err(error) => convert::error_frame(api.into(), correlation, &error),
            };
            outbox.send(OutFrame { head, payload: Vec::<Bytes>::new(), origin: None });
        })
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) -> Result<Next, wire::Error> {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= MAX_TASKS + self.ordered.len() {
            let message = format!("{MAX_TASKS} requests of one connection run already");
            return Err(wire::Error::new(ErrorCode::Overloaded, message));
        }
        self.tasks.spawn(task);
        Ok(Next::Nothing)
    }
}

impl Drop for Dispatcher {
    /// However the connection ends: ends what it has open on the shard, and its own tasks.
    fn drop(&mut self) {
        let ended = self.shares.close_all();
        let unsubscribe = |subscription| Submission::silent(Command::ShareUnsubscribe { subscription });
        self.broker.submit(ended.into_iter().map(unsubscribe));
        self.tasks.abort_all();
        self.outbox.close();
    }
}

fn decode<M: Message + Default>(frame: &Frame) -> Result<M, wire::Error> {
    frame.decode_message().map_err(|error| invalid(format!("the message cannot be decoded: {error}")))
}
