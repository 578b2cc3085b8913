//! What each request of a connection does.
//!
//! Most requests become one engine command, which is gathered with others that arrived together and answered by the shard
//! straight to the outbox. Reads of the log, and requests of several steps, run as [`tasks`] of the connection. A request
//! that is wrong gets a typed error and disturbs nothing else.

mod tasks;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::BytesMut;
use felucca_protocol::batch;
use felucca_protocol::frame::{Frame, Kind};
use felucca_protocol::{Api, ErrorCode, message as wire};
use prost::Message;
use tokio::task::{AbortHandle, JoinSet};
use uuid::Uuid;

use super::convert::{self, invalid};
use super::outbox::{OutFrame, Outbox};
use super::share::Shares;
use super::subscription::{Credit, Subscription};
use crate::broker::Broker;
use crate::engine::command::{AppendEntry, Command, OffsetCommit, StagedBatch};
use crate::engine::types::{SubscriptionId, TopicId};
use crate::shard::{Origin, Responder, Submission, Token};

/// Open subscriptions of one connection.
const MAX_SUBSCRIPTIONS: usize = 1_000;
/// A batch that is smaller than this fraction of the memory that it would pin is copied.
const PIN_FACTOR: usize = 4;

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct Dispatcher {
    broker: Broker,
    connection: u64,
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
            connection: broker.new_connection(),
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
            Api::DescribeBroker => {
                let reply = convert::broker_description(&self.broker);
                return Ok(Next::Reply(convert::reply_frame(api, correlation, &reply, 0)));
            }
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
            Api::DeleteRecords => {
                let wire::DeleteRecords { topic, partition, before } = decode(&frame)?;
                Command::DeleteRecords { topic, partition, before }
            }
            Api::InitProducer => Command::InitProducer,
            Api::GroupHeartbeat => {
                let request: wire::GroupHeartbeat = decode(&frame)?;
                Command::GroupHeartbeat {
                    group: request.group,
                    member: request.member_id,
                    connection: self.connection,
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
                    connection: self.connection,
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
            Api::DeleteGroup => {
                let request: wire::DeleteGroup = decode(&frame)?;
                Command::DeleteGroup { group: request.group, force: request.force }
            }
            Api::PauseGroup => {
                let request: wire::PauseGroup = decode(&frame)?;
                Command::PauseGroup { group: request.group, paused: request.paused }
            }
            Api::KickGroup => {
                let request: wire::KickGroup = decode(&frame)?;
                let topic = Some(request.topic).filter(|topic| !topic.is_empty());
                Command::KickGroup { group: request.group, topic }
            }
            Api::EndHeld => {
                let request: wire::EndHeld = decode(&frame)?;
                let fate = convert::held_fate(request.fate())?;
                let topic = Some(request.topic).filter(|topic| !topic.is_empty());
                Command::EndHeld { group: request.group, topic, fate }
            }
            Api::ListRedrives => {
                let group = decode::<wire::ListRedrives>(&frame)?.group;
                Command::ListRedrives { group: Some(group).filter(|group| !group.is_empty()) }
            }
            Api::AlterRedrive => return self.alter_redrive(correlation, decode(&frame)?),
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
