//! Topics, groups and dead letters.

use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};

pub use felucca_protocol::message::{
    BrokerCondition, DamagedRange, DeadLetterTopic, DescribeBrokerReply as BrokerDescription,
    DescribeGroupReply as GroupDescription, GroupKind, GroupListing, GroupMember, GroupOutage,
    GroupPartition, PartitionOffsets, RedriveAction, RedriveReply as Redrive, RedriveSpec, RedriveState,
    RedriveTarget, ShareAlarm, TopicKind,
};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::link::missing;

/// Pauses between two looks at a redrive that is waited for.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_secs(1);

/// A topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub name: String,
    /// 16 bytes; another one when the name is used again.
    pub id: Bytes,
    pub partitions: u32,
    pub kind: TopicKind,
    /// Every setting with its value in force.
    pub config: Vec<(String, String)>,
}

impl Topic {
    pub(crate) fn from_message(topic: message::Topic) -> Self {
        let kind = topic.kind();
        let config = topic.config.into_iter().map(|entry| (entry.key, entry.value)).collect();
        Self { name: topic.name, id: topic.id, partitions: topic.partitions, kind, config }
    }
}

/// Where a group is moved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    Beginning,
    End,
    Offset(u64),
    /// The first record at or after this time, Unix milliseconds.
    Timestamp(i64),
}

/// The position of a consumer group on a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedOffset {
    pub topic: String,
    pub partition: u32,
    /// Next offset to read.
    pub offset: u64,
    pub metadata: String,
}

/// What a redrive did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redriven {
    pub redriven: u64,
    /// Left where they are: redriven too often before.
    pub refused: u64,
}

/// Administration. Every call waits for its answer, at most for the client's request timeout. What changes something is
/// asked once: after [`crate::Error::Disconnected`] it may have been done. Dropping a call's future does not undo it.
///
/// ```no_run
/// use felucca_client::{Client, RedriveTarget, Result};
///
/// # async fn example(client: Client) -> Result<()> {
/// let admin = client.admin();
/// admin.create_topic("orders", 8, &[]).await?;
/// admin.create_share_group("payment", &["orders"], &[("ordering", "key")]).await?;
/// for partition in admin.describe_group("payment").await?.partitions {
///     println!("{}/{}: {} to do", partition.topic, partition.partition, partition.lag);
/// }
/// let redriven = admin.redrive("payment", "orders", RedriveTarget::Group).await?;
/// println!("{} to be tried again", redriven.redriven);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Admin {
    pub(crate) client: Client,
}

fn entries(config: &[(&str, &str)]) -> Vec<message::ConfigEntry> {
    let entry = |(key, value): &(&str, &str)| message::ConfigEntry {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    };
    config.iter().map(entry).collect()
}

impl Admin {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// For what may not be done twice.
    async fn change<R: prost::Message + Default>(
        &self,
        api: Api,
        request: &impl prost::Message,
    ) -> Result<R> {
        Ok(self.client.link.ask(api, request, Vec::new()).await?.0)
    }

    /// For what may be asked twice.
    async fn look<R: prost::Message + Default>(&self, api: Api, request: &impl prost::Message) -> Result<R> {
        Ok(self.client.link.ask_until(api, request, Vec::new()).await?.0)
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// The name is taken or not allowed, a setting is unknown or out of its range.
    pub async fn create_topic(&self, name: &str, partitions: u32, config: &[(&str, &str)]) -> Result<Topic> {
        let request = message::CreateTopic { name: name.to_owned(), partitions, config: entries(config) };
        self.topic_reply(self.change(Api::CreateTopic, &request).await?)
    }

    /// Changes settings of a topic.
    ///
    /// # Errors
    /// The topic is unknown, a setting is unknown or out of its range.
    pub async fn alter_topic(&self, name: &str, config: &[(&str, &str)]) -> Result<Topic> {
        let request = message::AlterTopic { name: name.to_owned(), config: entries(config) };
        self.topic_reply(self.change(Api::AlterTopic, &request).await?)
    }

    /// Deletes a topic with its records.
    ///
    /// # Errors
    /// The topic is unknown, or belongs to a share group.
    pub async fn delete_topic(&self, name: &str) -> Result<Topic> {
        let request = message::DeleteTopic { name: name.to_owned() };
        let topic = self.topic_reply(self.change(Api::DeleteTopic, &request).await?)?;
        self.client.forget_id(&topic.id);
        Ok(topic)
    }

    /// Deletes the records of a partition below the offset `before` (at most the high watermark), for every reader; answers where the
    /// log starts now. What a share group has in hand it keeps; what it was never given expires. Offsets are never used again.
    ///
    /// # Errors
    /// Topic or partition is unknown; [`ErrorCode::OffsetOutOfRange`] above the high watermark.
    pub async fn delete_records(&self, topic: &str, partition: u32, before: u64) -> Result<u64> {
        let request = message::DeleteRecords { topic: topic.to_owned(), partition, before };
        // The same again changes nothing.
        let reply: message::DeleteRecordsReply = self.look(Api::DeleteRecords, &request).await?;
        Ok(reply.log_start)
    }

    fn topic_reply(&self, reply: message::TopicReply) -> Result<Topic> {
        reply.topic.map(Topic::from_message).ok_or_else(|| missing("the topic"))
    }

    /// Every topic, also those that belong to share groups.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn topics(&self) -> Result<Vec<Topic>> {
        let reply: message::MetadataReply =
            self.look(Api::Metadata, &message::Metadata { topics: Vec::new() }).await?;
        Ok(reply.topics.into_iter().map(Topic::from_message).collect())
    }

    /// One topic.
    ///
    /// # Errors
    /// The topic is unknown.
    pub async fn topic(&self, name: &str) -> Result<Topic> {
        let reply: message::MetadataReply =
            self.look(Api::Metadata, &message::Metadata { topics: vec![name.to_owned()] }).await?;
        if let Some(error) = reply.errors.into_iter().next().and_then(|unknown| unknown.error) {
            return Err(error.into());
        }
        reply.topics.into_iter().next().map(Topic::from_message).ok_or_else(|| missing("the topic"))
    }

    /// Log start and high watermark of each partition.
    ///
    /// # Errors
    /// The topic is unknown.
    pub async fn offsets(&self, topic: &str) -> Result<Vec<PartitionOffsets>> {
        self.list_offsets(topic, None).await
    }

    /// As [`Admin::offsets`], with the first offset at or after a time (Unix milliseconds).
    ///
    /// # Errors
    /// The topic is unknown.
    pub async fn offsets_for_timestamp(&self, topic: &str, timestamp: i64) -> Result<Vec<PartitionOffsets>> {
        self.list_offsets(topic, Some(timestamp)).await
    }

    async fn list_offsets(&self, topic: &str, timestamp: Option<i64>) -> Result<Vec<PartitionOffsets>> {
        let topic_id = self.topic(topic).await?.id;
        let request = message::ListOffsets { topic_id, partitions: Vec::new(), timestamp };
        let reply: message::ListOffsetsReply = self.look(Api::ListOffsets, &request).await?;
        Ok(reply.partitions)
    }

    /// Creates a share group that begins at the start of each topic's log.
    ///
    /// # Errors
    /// A group of that name exists, whatever its settings, a topic is unknown, a setting is unknown or out of its range.
    pub async fn create_share_group(
        &self,
        group: &str,
        topics: &[&str],
        config: &[(&str, &str)],
    ) -> Result<()> {
        self.create_group(group, topics, config, false).await
    }

    /// As [`Admin::create_share_group`], beginning at the end of each log.
    ///
    /// # Errors
    /// As [`Admin::create_share_group`].
    pub async fn create_share_group_at_end(
        &self,
        group: &str,
        topics: &[&str],
        config: &[(&str, &str)],
    ) -> Result<()> {
        self.create_group(group, topics, config, true).await
    }

    async fn create_group(
        &self,
        group: &str,
        topics: &[&str],
        config: &[(&str, &str)],
        from_end: bool,
    ) -> Result<()> {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        let request =
            message::CreateShareGroup { group: group.to_owned(), topics, config: entries(config), from_end };
        let _: message::Empty = self.change(Api::CreateShareGroup, &request).await?;
        Ok(())
    }

    /// Changes settings of a share group; they hold from the next failure or lease on.
    ///
    /// # Errors
    /// The group is unknown, a setting is unknown or out of its range.
    pub async fn alter_share_group(&self, group: &str, config: &[(&str, &str)]) -> Result<()> {
        let request = message::AlterShareGroup { group: group.to_owned(), config: entries(config) };
        let _: message::Empty = self.change(Api::AlterShareGroup, &request).await?;
        Ok(())
    }

    /// How the broker is: whether it takes records, room on its disk, journal and checkpoint, stored records that were found
    /// damaged. Answered also when the broker refuses everything else.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn describe_broker(&self) -> Result<BrokerDescription> {
        self.look(Api::DescribeBroker, &message::DescribeBroker {}).await
    }

    /// Groups of both kinds.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn groups(&self) -> Result<Vec<GroupListing>> {
        let reply: message::ListGroupsReply = self.look(Api::ListGroups, &message::ListGroups {}).await?;
        Ok(reply.groups)
    }

    /// Members, lag and counts of a group.
    ///
    /// # Errors
    /// The group is unknown.
    pub async fn describe_group(&self, group: &str) -> Result<GroupDescription> {
        self.look(Api::DescribeGroup, &message::DescribeGroup { group: group.to_owned() }).await
    }

    /// Deletes a group without members. Its dead letters stay; what was redriven to it goes with it, which must be forced.
    ///
    /// # Errors
    /// The group is unknown or has members; without `force`, it also has records that nobody else has: redriven ones that it
    /// has not worked through, or such whose dead letters are being made
    /// ([`GroupUnsettled`](felucca_protocol::ErrorCode::GroupUnsettled)).
    pub async fn delete_group(&self, group: &str, force: bool) -> Result<()> {
        let request = message::DeleteGroup { group: group.to_owned(), force };
        let _: message::Empty = self.change(Api::DeleteGroup, &request).await?;
        Ok(())
    }

    /// Gives the held records of a share group another chance, on one of its topics or on all: they are tried again as if
    /// they had never failed. Answers how many there were. Not atomic: after an error some may be released already.
    ///
    /// # Errors
    /// The group is unknown or no share group, or does not consume the topic.
    pub async fn release_held(&self, group: &str, topic: Option<&str>) -> Result<u64> {
        self.end_held(group, topic, message::HeldFate::Release).await
    }

    /// Settles the held records of a share group as discarded, on one of its topics or on all. Answers how many there were. Not
    /// atomic: after an error some may be discarded already.
    ///
    /// # Errors
    /// The group is unknown or no share group, or does not consume the topic.
    pub async fn discard_held(&self, group: &str, topic: Option<&str>) -> Result<u64> {
        self.end_held(group, topic, message::HeldFate::Discard).await
    }

    async fn end_held(&self, group: &str, topic: Option<&str>, fate: message::HeldFate) -> Result<u64> {
        let partitions = self.describe_group(group).await?.partitions;
        let chosen = partitions.iter().filter(|one| topic.is_none_or(|topic| one.topic == topic));
        // What is released may fail and be held again before this is done: it does not count twice.
        let held: u64 = chosen.map(|one| one.held).sum();
        let topic = topic.unwrap_or_default().to_owned();
        let request = message::EndHeld { group: group.to_owned(), topic, fate: fate.into() };
        let mut records = 0;
        loop {
            let reply: message::EndHeldReply = self.look(Api::EndHeld, &request).await?;
            records += reply.records;
            if !reply.more || records >= held {
                return Ok(records);
            }
        }
    }

    /// Makes the scheduled records of a share group due now, on one of its topics or on all. Answers how many there were.
    ///
    /// # Errors
    /// The group is unknown or no share group, or does not consume the topic.
    pub async fn kick_group(&self, group: &str, topic: Option<&str>) -> Result<u64> {
        let topic = topic.unwrap_or_default().to_owned();
        let request = message::KickGroup { group: group.to_owned(), topic };
        let reply: message::KickGroupReply = self.look(Api::KickGroup, &request).await?;
        Ok(reply.records)
    }

    /// Stops or resumes handing out records of a share group.
    ///
    /// # Errors
    /// The group is unknown or no share group.
    pub async fn pause_group(&self, group: &str, paused: bool) -> Result<()> {
        let request = message::PauseGroup { group: group.to_owned(), paused };
        let _: message::Empty = self.look(Api::PauseGroup, &request).await?;
        Ok(())
    }

    /// Moves a group on one partition of a topic, or on all. A consumer group must have no members; a share group drops its
    /// leases, retries and settlements there.
    ///
    /// # Errors
    /// Group, topic or partition is unknown, the offset beyond the end, the consumer group has members. Without `force`, the
    /// share group would drop records that nobody else has ([`GroupUnsettled`](felucca_protocol::ErrorCode::GroupUnsettled)).
    pub async fn seek_group(
        &self,
        group: &str,
        topic: &str,
        partition: Option<u32>,
        to: SeekTo,
        force: bool,
    ) -> Result<()> {
        let to = match to {
            SeekTo::Beginning => message::seek_group::To::Beginning(true),
            SeekTo::End => message::seek_group::To::End(true),
            SeekTo::Offset(offset) => message::seek_group::To::Offset(offset),
            SeekTo::Timestamp(timestamp) => message::seek_group::To::Timestamp(timestamp),
        };
        let request = message::SeekGroup {
            group: group.to_owned(),
            topic: topic.to_owned(),
            partition,
            to: Some(to),
            force,
        };
        let _: message::Empty = self.change(Api::SeekGroup, &request).await?;
        Ok(())
    }

    /// What a consumer group has committed.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>> {
        let request = message::FetchOffsets { group: group.to_owned(), partitions: Vec::new() };
        let reply: message::FetchOffsetsReply = self.look(Api::FetchOffsets, &request).await?;
        let mut committed = Vec::with_capacity(reply.offsets.len());
        for offset in reply.offsets {
            let topic = self.client.topic_by_id(&offset.topic_id).await?.name.to_string();
            let (partition, metadata) = (offset.partition, offset.metadata);
            committed.push(CommittedOffset { topic, partition, offset: offset.offset, metadata });
        }
        Ok(committed)
    }

    /// Sets what a consumer group has committed; it must have no members.
    ///
    /// # Errors
    /// A topic or partition is unknown, an offset is beyond the end, the group has members. The first error is returned; the
    /// other offsets are committed all the same.
    pub async fn commit(&self, group: &str, offsets: &[CommittedOffset]) -> Result<()> {
        let mut items = Vec::with_capacity(offsets.len());
        for committed in offsets {
            items.push(message::CommittedOffset {
                topic_id: self.client.look_up(&committed.topic).await?.id,
                partition: committed.partition,
                offset: committed.offset,
                metadata: committed.metadata.clone(),
            });
        }
        let request = message::CommitOffsets {
            group: group.to_owned(),
            member_id: String::new(),
            generation: 0,
            offsets: items,
        };
        let reply: message::CommitOffsetsReply = self.look(Api::CommitOffsets, &request).await?;
        let error = reply.results.into_iter().find_map(|result| result.error);
        error.map_or(Ok(()), |error| Err(error.into()))
    }

    /// The dead-letter topics of one group or of all.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn dead_letter_topics(&self, group: Option<&str>) -> Result<Vec<DeadLetterTopic>> {
        let request = message::ListDeadLetters { group: group.unwrap_or_default().to_owned() };
        let reply: message::ListDeadLettersReply = self.look(Api::ListDeadLetters, &request).await?;
        Ok(reply.topics)
    }

    /// Hands the dead letters of a group and source topic out again, to the group only or to all readers of the topic, and waits
    /// until that is done, for as long as there are dead letters. When the future is dropped the redrive goes on.
    ///
    /// # Errors
    /// There is no such dead-letter topic; or the redrive failed or was cancelled.
    pub async fn redrive(&self, group: &str, topic: &str, target: RedriveTarget) -> Result<Redriven> {
        let id = uuid::Uuid::new_v4().to_string();
        let spec = RedriveSpec {
            group: group.to_owned(),
            source_topic: topic.to_owned(),
            target: target.into(),
            ..RedriveSpec::default()
        };
        self.start_redrive(&id, spec).await?;
        self.finished_redrive(&id).await
    }

    /// Begins a redrive, which the broker carries out by itself, also over restarts. The same call with the same id is the same
    /// redrive: it may be repeated. Ids are names like those of topics.
    ///
    /// # Errors
    /// There is no such dead-letter topic or target, the id is that of another redrive, or too many are open.
    pub async fn start_redrive(&self, id: &str, spec: RedriveSpec) -> Result<Redrive> {
        let request = message::Redrive { id: id.to_owned(), spec: Some(spec), dry_run: false };
        self.look(Api::Redrive, &request).await
    }

    /// Says what a redrive would move, and moves nothing.
    ///
    /// # Errors
    /// There is no such dead-letter topic or target, or the letters cannot be read.
    pub async fn preview_redrive(&self, spec: RedriveSpec) -> Result<Redrive> {
        let request = message::Redrive { id: String::new(), spec: Some(spec), dry_run: true };
        self.look(Api::Redrive, &request).await
    }

    /// Redrives of one group or of all: those that are open, and the last thousand that have ended.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn redrives(&self, group: Option<&str>) -> Result<Vec<Redrive>> {
        let request = message::ListRedrives { group: group.unwrap_or_default().to_owned() };
        let reply: message::ListRedrivesReply = self.look(Api::ListRedrives, &request).await?;
        Ok(reply.redrives)
    }

    /// Pauses, resumes or cancels a redrive. What it has moved stays moved.
    ///
    /// # Errors
    /// There is no such redrive, or it has ended.
    pub async fn alter_redrive(&self, id: &str, action: RedriveAction) -> Result<Redrive> {
        let request = message::AlterRedrive { id: id.to_owned(), action: action.into() };
        self.look(Api::AlterRedrive, &request).await
    }

    /// Waits until a redrive has ended, however long that takes. Cancellation safe.
    ///
    /// # Errors
    /// There is no such redrive, or it failed or was cancelled.
    pub async fn finished_redrive(&self, id: &str) -> Result<Redriven> {
        let mut pause = FIRST_LOOK;
        loop {
            let found = self.redrives(None).await?.into_iter().find(|redrive| redrive.id == id);
            let Some(redrive) = found else {
                return Err(Error::broker(ErrorCode::InvalidRequest, format!("there is no redrive {id:?}")));
            };
            let ended = |why: &str| {
                let text = format!("redrive {id:?} {why} after {} letters", redrive.moved);
                Err(Error::broker(ErrorCode::InvalidRequest, text))
            };
            match redrive.state() {
                RedriveState::Done => {
                    return Ok(Redriven { redriven: redrive.moved, refused: redrive.refused });
                }
                RedriveState::Cancelled => return ended("was cancelled"),
                RedriveState::Failed => return ended(&format!("failed ({})", redrive.failure)),
                RedriveState::Running | RedriveState::Paused | RedriveState::Unspecified => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    /// Drops the dead letters of a group and source topic; answers how many.
    ///
    /// # Errors
    /// There is no such dead-letter topic.
    pub async fn purge_dead_letters(&self, group: &str, topic: &str) -> Result<u64> {
        let request = message::PurgeDeadLetters { group: group.to_owned(), source_topic: topic.to_owned() };
        let reply: message::PurgeDeadLettersReply = self.change(Api::PurgeDeadLetters, &request).await?;
        Ok(reply.purged)
    }
}
