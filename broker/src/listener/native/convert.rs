//! Engine values to wire messages and back, and the one place where refusals become error codes.

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::BatchError;
use felucca_protocol::frame::{self, Kind};
use felucca_protocol::{Api, ErrorCode, message as wire};
use prost::Message;

use crate::broker::{Broker, BrokerError};
use crate::engine::command::{FailureDetail, HeldFate, LeaseRef, Outcome, RedriveAction, Settlement};
use crate::engine::effect::{
    Appended, DeadLetterInfo, GroupDescription, GroupKind, GroupListing, RecordState, Reply, SettleResult,
    SettleStatus, ShareAlarm, TopicInfo, TopicKind, Unreadable,
};
use crate::engine::error::EngineError;
use crate::engine::event::{RedriveRow, RedriveSpec};
use crate::engine::redrive::{state, target};
use crate::engine::types::{LeaseId, Level, PartitionKey, TopicId};
use crate::log::{Damage, ReadError};
use crate::redrive::PurgeError;
use crate::status::Condition;

/// A request that cannot be carried out as it was sent.
pub(super) fn invalid(message: impl Into<String>) -> wire::Error {
    wire::Error::new(ErrorCode::InvalidRequest, message)
}

/// When a producer may try again that was refused because the disk is full: room does not come back within moments.
const DISK_FULL_RETRY_MS: u32 = 1000;

pub(super) fn engine_error(error: &EngineError) -> wire::Error {
    let code = match error {
        EngineError::UnknownTopic(_) => ErrorCode::UnknownTopic,
        EngineError::UnknownPartition(_) => ErrorCode::UnknownPartition,
        EngineError::TopicExists(_) => ErrorCode::TopicExists,
        EngineError::InvalidName(_) => ErrorCode::InvalidName,
        EngineError::InvalidConfig(_) => ErrorCode::InvalidConfig,
        EngineError::InvalidRequest(_) | EngineError::RequestTooLarge { .. } => ErrorCode::InvalidRequest,
        EngineError::ForeignProducer(_) => ErrorCode::ForeignProducer,
        EngineError::WrittenNotAllowed(_) => ErrorCode::WrittenNotAllowed,
        EngineError::OutOfOrderSequence { .. } => ErrorCode::OutOfOrderSequence,
        EngineError::ProducerFenced { .. } => ErrorCode::ProducerFenced,
        EngineError::UnknownProducer(_) => ErrorCode::UnknownProducer,
        EngineError::UnknownGroup(_) => ErrorCode::UnknownGroup,
        EngineError::GroupExists(_) => ErrorCode::GroupExists,
        EngineError::WrongGroupKind { .. } => ErrorCode::WrongGroupKind,
        EngineError::UnknownMember(_) => ErrorCode::UnknownMember,
        EngineError::MemberFenced(_) => ErrorCode::MemberFenced,
        EngineError::StaleGeneration { .. } => ErrorCode::StaleGeneration,
        EngineError::NotAssigned(_) => ErrorCode::NotAssigned,
        EngineError::OffsetOutOfRange { .. } => ErrorCode::OffsetOutOfRange,
        EngineError::StaleCleaning(_) => ErrorCode::Internal,
        EngineError::GroupNotEmpty(_) => ErrorCode::GroupNotEmpty,
        EngineError::GroupUnsettled { .. } => ErrorCode::GroupUnsettled,
        EngineError::LimitReached { .. } => ErrorCode::LimitReached,
        EngineError::DiskFull(_) => ErrorCode::DiskFull,
        EngineError::ReadOnly(_) => ErrorCode::ReadOnly,
        EngineError::Stopping => ErrorCode::Stopping,
        EngineError::GroupCorrupt { .. } => ErrorCode::GroupCorrupt,
    };
    let mut answer = wire::Error::new(code, error.to_string());
    if code == ErrorCode::DiskFull {
        answer.retry_after_ms = DISK_FULL_RETRY_MS;
    }
    answer
}

pub(super) fn read_error(error: &ReadError) -> wire::Error {
    let code = match error {
        ReadError::BelowStart { .. } | ReadError::AboveEnd { .. } => ErrorCode::OffsetOutOfRange,
        ReadError::Removed => ErrorCode::UnknownTopic,
        ReadError::Corrupt { .. } => ErrorCode::CorruptLog,
        ReadError::Io { .. } => ErrorCode::Internal,
    };
    wire::Error::new(code, error.to_string())
}

pub(super) fn batch_error(error: &BatchError) -> wire::Error {
    let code = match error {
        BatchError::TooLarge { .. } => ErrorCode::BatchTooLarge,
        BatchError::RecordTooLarge { .. } | BatchError::TooManyHeaders { .. } => ErrorCode::RecordTooLarge,
        _ => ErrorCode::CorruptBatch,
    };
    wire::Error::new(code, error.to_string())
}

pub(super) fn broker_error(error: &BrokerError) -> wire::Error {
    match error {
        BrokerError::Engine(error) => engine_error(error),
        BrokerError::Read(error) => read_error(error),
        BrokerError::Timeout(_) => wire::Error::new(ErrorCode::Timeout, error.to_string()),
        BrokerError::Unexpected(_) => wire::Error::new(ErrorCode::Internal, error.to_string()),
    }
}

pub(super) fn purge_error(error: &PurgeError) -> wire::Error {
    match error {
        PurgeError::Broker(error) => broker_error(error),
        PurgeError::NoDeadLetters { .. } => wire::Error::new(ErrorCode::UnknownTopic, error.to_string()),
        PurgeError::Stalled { .. } => wire::Error::new(ErrorCode::Timeout, error.to_string()),
    }
}

// ---- Requests ------------------------------------------------------------------------------------------------------

pub(super) fn topic_id(bytes: &Bytes) -> Result<TopicId, wire::Error> {
    TopicId::from_slice(bytes).ok_or_else(|| invalid(format!("a topic id has 16 bytes, not {}", bytes.len())))
}

pub(super) fn partition_key(topic: &Bytes, partition: u32) -> Result<PartitionKey, wire::Error> {
    Ok(PartitionKey { topic: topic_id(topic)?, partition })
}

pub(super) fn partition_keys(list: &[wire::TopicPartition]) -> Result<Vec<PartitionKey>, wire::Error> {
    list.iter().map(|item| partition_key(&item.topic_id, item.partition)).collect()
}

pub(super) fn config(entries: Vec<wire::ConfigEntry>) -> Vec<(String, String)> {
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}

pub(super) fn level(number: i32) -> Result<Level, wire::Error> {
    match wire::Level::try_from(number) {
        Ok(wire::Level::Synced) => Ok(Level::Synced),
        Ok(wire::Level::Written) => Ok(Level::Written),
        Err(_) => Err(invalid(format!("unknown level {number}"))),
    }
}

pub(super) fn held_fate(fate: wire::HeldFate) -> Result<HeldFate, wire::Error> {
    match fate {
        wire::HeldFate::Release => Ok(HeldFate::Release),
        wire::HeldFate::Discard => Ok(HeldFate::Discard),
        wire::HeldFate::Unspecified => Err(invalid("the request does not say what becomes of held records")),
    }
}

pub(super) fn redrive_spec(spec: Option<wire::RedriveSpec>) -> Result<RedriveSpec, wire::Error> {
    let spec = spec.ok_or_else(|| invalid("the request does not say what is to be redriven"))?;
    let target = match wire::RedriveTarget::try_from(spec.target) {
        Ok(wire::RedriveTarget::Group) => target::GROUP,
        Ok(wire::RedriveTarget::Source) => target::SOURCE,
        Ok(wire::RedriveTarget::Topic) => target::TOPIC,
        Err(_) => return Err(invalid(format!("unknown redrive target {}", spec.target))),
    };
    Ok(RedriveSpec {
        group: spec.group,
        source_topic: spec.source_topic,
        target,
        topic: spec.topic,
        class: spec.class,
        reason: spec.reason,
        key: spec.key.map(|key| key.to_vec()),
        from_ms: spec.from_ms,
        until_ms: spec.until_ms,
        partition: spec.partition,
        from_offset: spec.from_offset,
        until_offset: spec.until_offset,
        limit: spec.limit,
        rate: spec.rate,
        force: spec.force,
    })
}

pub(super) fn redrive_action(action: wire::RedriveAction) -> Result<RedriveAction, wire::Error> {
    match action {
        wire::RedriveAction::Pause => Ok(RedriveAction::Pause),
        wire::RedriveAction::Resume => Ok(RedriveAction::Resume),
        wire::RedriveAction::Cancel => Ok(RedriveAction::Cancel),
        wire::RedriveAction::Unspecified => {
            Err(invalid("the request does not say what is to be done with the redrive"))
        }
    }
}

pub(super) fn lease_ref(lease: &wire::LeaseRef) -> Result<LeaseRef, wire::Error> {
    Ok(LeaseRef {
        partition: partition_key(&lease.topic_id, lease.partition)?,
        offset: lease.offset,
        lease: LeaseId { boot_epoch: lease.boot_epoch, sequence: lease.sequence },
    })
}

pub(super) fn settlements(batches: Vec<wire::SettleBatch>) -> Result<Vec<Settlement>, wire::Error> {
    let mut settlements = Vec::with_capacity(batches.iter().map(|batch| batch.settlements.len()).sum());
    for batch in batches {
        let partition = partition_key(&batch.topic_id, batch.partition)?;
        for settlement in batch.settlements {
            let lease = LeaseId { boot_epoch: batch.boot_epoch, sequence: settlement.sequence };
            let record = LeaseRef { partition, offset: settlement.offset, lease };
            settlements.push(Settlement { record, outcome: outcome(settlement.outcome, settlement.detail)? });
        }
    }
    Ok(settlements)
}

fn outcome(number: i32, detail: Option<wire::SettlementDetail>) -> Result<Outcome, wire::Error> {
    let Ok(kind) = wire::Outcome::try_from(number) else {
        return Err(invalid(format!("unknown outcome {number}")));
    };
    let detail = detail.unwrap_or_default();
    let (delay_ms, counted, remaining_ms) = (detail.delay_ms, !detail.not_counted, detail.remaining_ms);
    let failure = FailureDetail { class: detail.class, reason: detail.reason, detail: detail.detail };
    Ok(match kind {
        wire::Outcome::Ack => Outcome::Ack,
        wire::Outcome::Nack => Outcome::Nack { delay_ms, counted, detail: failure },
        wire::Outcome::Reject => Outcome::Reject { detail: failure },
        wire::Outcome::Release => Outcome::Release,
        wire::Outcome::Extend => Outcome::Extend { remaining_ms },
    })
}

// ---- Replies -------------------------------------------------------------------------------------------------------

/// Appends the frame that answers a request.
pub(super) fn encode_reply(buffer: &mut BytesMut, api: u8, correlation: u64, reply: Reply) {
    let mut put = Put { buffer, api, correlation };
    match reply {
        Reply::Done => put.message(&wire::Empty {}),
        Reply::RecordsDeleted { log_start } => put.message(&wire::DeleteRecordsReply { log_start }),
        Reply::Topic(info) => put.message(&wire::TopicReply { topic: Some(topic(info)) }),
        Reply::Metadata { topics, unknown } => put.message(&wire::MetadataReply {
            topics: topics.into_iter().map(topic).collect(),
            errors: unknown.into_iter().map(unknown_topic).collect(),
        }),
        Reply::Producer { producer_id, epoch } => {
            put.message(&wire::InitProducerReply { producer_id, producer_epoch: u32::from(epoch) });
        }
        Reply::Appended(results) => {
            put.message(&wire::ProduceReply { results: results.into_iter().map(appended).collect() });
        }
        Reply::Heartbeat { generation, assigned, interval_ms } => put.message(&wire::GroupHeartbeatReply {
            generation,
            assigned: assigned.into_iter().map(topic_partition).collect(),
            interval_ms,
        }),
        Reply::OffsetsCommitted(results) => put.message(&wire::CommitOffsetsReply {
            results: results
                .into_iter()
                .map(|result| wire::CommitResult { error: result.err().as_ref().map(engine_error) })
                .collect(),
        }),
        Reply::Offsets(offsets) => put.message(&wire::FetchOffsetsReply {
            offsets: offsets
                .into_iter()
                .map(|commit| wire::CommittedOffset {
                    topic_id: id_bytes(commit.partition.topic),
                    partition: commit.partition.partition,
                    offset: commit.offset,
                    metadata: commit.metadata,
                })
                .collect(),
        }),
        Reply::Groups(groups) => {
            put.message(&wire::ListGroupsReply { groups: groups.into_iter().map(group_listing).collect() });
        }
        // The oldest ages and log starts are added where the log can be read: see `dispatch`.
        Reply::Group(description) => {
            put.message(&group_description(description, |_| wire::GroupPartition::default()));
        }
        Reply::DeadLetters(infos) => {
            put.message(&wire::ListDeadLettersReply {
                topics: infos.into_iter().map(dead_letter_topic).collect(),
            });
        }
        Reply::Redrive(row) => put.message(&redrive(*row)),
        Reply::Redrives(rows) => {
            put.message(&wire::ListRedrivesReply { redrives: rows.into_iter().map(redrive).collect() });
        }
        Reply::Kicked { records } => put.message(&wire::KickGroupReply { records }),
        Reply::HeldEnded { records, more } => put.message(&wire::EndHeldReply { records, more }),
        Reply::Settled(results) => {
            put.message(&wire::SettleReply { results: results.into_iter().map(settle_result).collect() });
        }
        Reply::Completed { result, base_offsets } => {
            put.message(&wire::CompleteReply { result: Some(settle_result(result)), base_offsets });
        }
        // For the cleaner and for redrives only: no request asks for it.
        Reply::Cleaning(_) | Reply::PendingLetters(_) => {
            put.error(&wire::Error::new(ErrorCode::Internal, "not an answer to a request"));
        }
        Reply::Error(error) => put.error(&engine_error(&error)),
    }
}

struct Put<'a> {
    buffer: &'a mut BytesMut,
    api: u8,
    correlation: u64,
}

impl Put<'_> {
    fn message(&mut self, message: &impl Message) {
        frame::encode(self.buffer, Kind::Reply, self.api, self.correlation, message, 0);
    }

    fn error(&mut self, error: &wire::Error) {
        frame::encode(self.buffer, Kind::Error, self.api, self.correlation, error, 0);
    }
}

fn id_bytes(id: TopicId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

fn topic_partition(key: PartitionKey) -> wire::TopicPartition {
    wire::TopicPartition { topic_id: id_bytes(key.topic), partition: key.partition }
}

fn config_entries(config: Vec<(String, String)>) -> Vec<wire::ConfigEntry> {
    config.into_iter().map(|(key, value)| wire::ConfigEntry { key, value }).collect()
}

fn topic(info: TopicInfo) -> wire::Topic {
    let kind = match info.kind {
        TopicKind::Standard => wire::TopicKind::Standard,
        TopicKind::DeadLetter { .. } => wire::TopicKind::DeadLetter,
        TopicKind::Redrive { .. } => wire::TopicKind::Redrive,
    };
    wire::Topic {
        name: info.name,
        id: id_bytes(info.id),
        partitions: info.partitions,
        kind: kind.into(),
        config: config_entries(info.config),
    }
}

fn unknown_topic(name: String) -> wire::NamedError {
    let error = engine_error(&EngineError::UnknownTopic(name.clone()));
    wire::NamedError { name, error: Some(error) }
}

fn appended(result: Result<Appended, EngineError>) -> wire::ProduceResult {
    match result {
        Ok(Appended { base_offset, duplicate }) => {
            wire::ProduceResult { base_offset, error: None, duplicate }
        }
        Err(error) => {
            wire::ProduceResult { base_offset: 0, error: Some(engine_error(&error)), duplicate: false }
        }
    }
}

fn group_kind(kind: GroupKind) -> i32 {
    match kind {
        GroupKind::Consumer => wire::GroupKind::Consumer,
        GroupKind::Share => wire::GroupKind::Share,
    }
    .into()
}

fn group_listing(listing: GroupListing) -> wire::GroupListing {
    wire::GroupListing {
        group: listing.group,
        kind: group_kind(listing.kind),
        members: listing.members,
        topics: listing.topics,
    }
}

fn share_alarm(alarm: ShareAlarm) -> wire::ShareAlarm {
    match alarm {
        ShareAlarm::Leases => wire::ShareAlarm::Leases,
        ShareAlarm::Exceptions => wire::ShareAlarm::Exceptions,
        ShareAlarm::Span => wire::ShareAlarm::Span,
        ShareAlarm::Memory => wire::ShareAlarm::Memory,
    }
}

/// `read` gives the fields of each partition (by its index) that come from the log.
pub(super) fn group_description(
    description: GroupDescription,
    read: impl Fn(usize) -> wire::GroupPartition,
) -> wire::DescribeGroupReply {
    let members = description.members.into_iter().map(|member| wire::GroupMember {
        member_id: member.member,
        assigned: member.assigned.into_iter().map(topic_partition).collect(),
        leased: member.leased,
    });
    let partitions =
        description.partitions.into_iter().enumerate().map(|(index, info)| wire::GroupPartition {
            topic: info.topic,
            topic_id: info.partition.map_or_else(Bytes::new, |key| id_bytes(key.topic)),
            partition: info.partition.map_or(0, |key| key.partition),
            high_watermark: info.high_watermark,
            position: info.position,
            lag: info.lag,
            leased: info.leased,
            scheduled: info.scheduled,
            held: info.held,
            parked: info.parked,
            acked: info.acked,
            dead_lettered: info.dead_lettered,
            discarded: info.discarded,
            skipped: info.skipped,
            deliveries: info.deliveries,
            failures: info.failures,
            available: info.available,
            exhausted: info.exhausted,
            expired: info.expired,
            alarms: info.alarms.into_iter().map(|alarm| share_alarm(alarm).into()).collect(),
            memory_bytes: info.memory_bytes,
            pinned_bytes: info.pinned_bytes,
            unreadable: info
                .unreadable
                .map(|Unreadable { offset, reason }| wire::Unreadable { offset, reason }),
            ..read(index)
        });
    wire::DescribeGroupReply {
        group: description.group,
        kind: group_kind(description.kind),
        paused: description.paused,
        config: config_entries(description.config),
        members: members.collect(),
        partitions: partitions.collect(),
        outage: description
            .outage
            .map(|outage| wire::GroupOutage { limit: outage.limit, next_probe_ms: outage.next_probe_ms }),
        corrupt: description.corrupt.unwrap_or_default(),
    }
}

/// How a redrive stands.
pub(super) fn redrive(row: RedriveRow) -> wire::RedriveReply {
    let left = row.left();
    let spec = row.spec.unwrap_or_default();
    let target = match spec.target {
        target::SOURCE => wire::RedriveTarget::Source,
        target::TOPIC => wire::RedriveTarget::Topic,
        _ => wire::RedriveTarget::Group,
    };
    let state = match row.state {
        state::RUNNING => wire::RedriveState::Running,
        state::PAUSED => wire::RedriveState::Paused,
        state::DONE => wire::RedriveState::Done,
        state::CANCELLED => wire::RedriveState::Cancelled,
        state::FAILED => wire::RedriveState::Failed,
        _ => wire::RedriveState::Unspecified,
    };
    wire::RedriveReply {
        id: row.id,
        spec: Some(wire::RedriveSpec {
            group: spec.group,
            source_topic: spec.source_topic,
            target: target.into(),
            topic: spec.topic,
            class: spec.class,
            reason: spec.reason,
            key: spec.key.map(Bytes::from),
            from_ms: spec.from_ms,
            until_ms: spec.until_ms,
            partition: spec.partition,
            from_offset: spec.from_offset,
            until_offset: spec.until_offset,
            limit: spec.limit,
            rate: spec.rate,
            force: spec.force,
        }),
        state: state.into(),
        failure: row.failure,
        examined: row.examined,
        moved: row.moved,
        refused: row.refused,
        left,
        created_ms: row.created_ms,
        changed_ms: row.changed_ms,
    }
}

fn dead_letter_topic(info: DeadLetterInfo) -> wire::DeadLetterTopic {
    wire::DeadLetterTopic {
        group: info.group,
        source_topic: info.source,
        topic: info.topic.name,
        topic_id: id_bytes(info.topic.id),
        partitions: info.topic.partitions,
        pending: info.pending,
        redriven: info.redriven,
        purged: info.purged,
    }
}

fn settle_result(result: SettleResult) -> wire::SettleResult {
    let status = match result.status {
        SettleStatus::Ok => wire::SettleStatus::Ok,
        SettleStatus::Duplicate => wire::SettleStatus::Duplicate,
        SettleStatus::Late => wire::SettleStatus::Late,
        SettleStatus::Conflict => wire::SettleStatus::Conflict,
        SettleStatus::Stale => wire::SettleStatus::Stale,
        SettleStatus::Gone => wire::SettleStatus::Gone,
        SettleStatus::AlreadySettled => wire::SettleStatus::AlreadySettled,
        SettleStatus::NotOwner => wire::SettleStatus::NotOwner,
        SettleStatus::Fenced => wire::SettleStatus::Fenced,
    };
    let state = match result.state {
        None => wire::RecordState::Unspecified,
        Some(RecordState::Available) => wire::RecordState::Available,
        Some(RecordState::Leased) => wire::RecordState::Leased,
        Some(RecordState::Acked) => wire::RecordState::Acked,
        Some(RecordState::Scheduled) => wire::RecordState::Scheduled,
        Some(RecordState::DeadLettered) => wire::RecordState::DeadLettered,
        Some(RecordState::Held) => wire::RecordState::Held,
        Some(RecordState::Skipped) => wire::RecordState::Skipped,
        Some(RecordState::Expired) => wire::RecordState::Expired,
        Some(RecordState::Discarded) => wire::RecordState::Discarded,
    };
    wire::SettleResult { status: status.into(), state: state.into(), remaining_ms: result.remaining_ms }
}

/// How the broker is.
pub(super) fn broker_description(broker: &Broker) -> wire::DescribeBrokerReply {
    let status = broker.status();
    let (condition, reason) = match status.condition {
        Condition::Ok => (wire::BrokerCondition::Ok, String::new()),
        Condition::DiskFull(no_room) => (wire::BrokerCondition::DiskFull, no_room.to_string()),
        Condition::ReadOnly(reason) => (wire::BrokerCondition::ReadOnly, reason),
    };
    wire::DescribeBrokerReply {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_epoch: broker.boot_epoch(),
        uptime_ms: u64::try_from(status.uptime.as_millis()).unwrap_or(u64::MAX),
        condition: condition.into(),
        reason,
        since_ms: status.since_ms,
        disk_available_bytes: status.disk_available,
        disk_low_water_bytes: status.disk_low_water,
        journal_bytes: status.journal_bytes,
        checkpoint_lsn: status.checkpoint,
        checkpoint_ms: status.checkpoint_ms,
        scrubbed_bytes: status.scrubbed_bytes,
        scrubbed_ms: status.scrubbed_ms,
        damaged: status.damaged.into_iter().map(damaged_range).collect(),
        damaged_ranges: status.damaged_ranges,
    }
}

fn damaged_range(damage: Damage) -> wire::DamagedRange {
    wire::DamagedRange {
        topic: damage.topic.to_string(),
        partition: damage.partition.partition,
        first_offset: damage.offsets.start,
        end_offset: damage.offsets.end,
        file: damage.file.display().to_string(),
        position: damage.position,
        reason: damage.reason,
    }
}

/// A frame with an error, ready to be sent.
pub(super) fn error_frame(api: u8, correlation: u64, error: &wire::Error) -> BytesMut {
    let mut buffer = BytesMut::new();
    frame::encode(&mut buffer, Kind::Error, api, correlation, error, 0);
    buffer
}

/// A frame with a reply, ready to be sent; `payload_len` bytes of batches are to follow it.
pub(super) fn reply_frame(api: Api, correlation: u64, reply: &impl Message, payload_len: usize) -> BytesMut {
    let mut buffer = BytesMut::new();
    frame::encode(&mut buffer, Kind::Reply, api, correlation, reply, payload_len);
    buffer
}

/// A frame that was not asked for, ready to be sent; `payload_len` bytes of batches are to follow it.
pub(super) fn push_frame(api: Api, subscription: u64, push: &impl Message, payload_len: usize) -> BytesMut {
    let mut buffer = BytesMut::new();
    frame::encode(&mut buffer, Kind::Push, api, subscription, push, payload_len);
    buffer
}

/// Word that a subscription was ended by the broker.
pub(super) fn ended_frame(
    subscription: u64,
    error: wire::Error,
    partition: Option<PartitionKey>,
) -> BytesMut {
    let push = wire::SubscriptionEnded {
        subscription,
        error: Some(error),
        topic_id: partition.map_or_else(Bytes::new, |key| id_bytes(key.topic)),
        partition: partition.map_or(0, |key| key.partition),
    };
    push_frame(Api::SubscriptionEnded, subscription, &push, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extension_without_a_time_means_the_groups_lease() {
        let detail =
            |remaining| Some(wire::SettlementDetail { remaining_ms: remaining, ..Default::default() });
        let extend = wire::Outcome::Extend.into();
        assert_eq!(outcome(extend, detail(Some(5))), Ok(Outcome::Extend { remaining_ms: Some(5) }));
        assert_eq!(outcome(extend, None), Ok(Outcome::Extend { remaining_ms: None }));
    }

    #[test]
    fn numbers_from_the_future_are_refused() {
        assert!(outcome(99, None).is_err());
        assert!(level(7).is_err());
        assert!(topic_id(&Bytes::from_static(b"short")).is_err());
    }
}
