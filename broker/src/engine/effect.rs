//! What the engine asks to be done, and what it answers.
//!
//! The shard gathers the effects of one drained batch of commands into one journal frame. Order of release: frame written
//! → views changed, `written` replies and deliveries leave; frame synced → high watermarks published, then `synced` replies
//! leave. Scans and dead-letter reads read only what is already visible and may start at once.

use bytes::Bytes;

use super::command::OffsetCommit;
use super::error::EngineError;
use super::event::Event;
use super::types::{LeaseId, Level, PartitionKey, RequestId, SubscriptionId, TopicId};

/// What a topic is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TopicKind {
    Standard,
    /// Dead letters of one share group on one source topic.
    DeadLetter {
        group: String,
        source: String,
    },
    /// Records redriven to one share group only.
    Redrive {
        group: String,
        source: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    pub id: TopicId,
    pub name: String,
    pub partitions: u32,
    pub kind: TopicKind,
    /// Every setting with its value in force.
    pub config: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub base_offset: u64,
    /// The batch had been appended before; `base_offset` is that of the first time.
    pub duplicate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettleStatus {
    Ok,
    Duplicate,
    Late,
    Conflict,
    Stale,
    Gone,
    AlreadySettled,
    NotOwner,
    Fenced,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    Available,
    Leased,
    Acked,
    Scheduled,
    DeadLettered,
    Held,
    Skipped,
    Expired,
    Discarded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettleResult {
    pub status: SettleStatus,
    pub state: Option<RecordState>,
    /// Scheduled: until due. Leased: until the deadline.
    pub remaining_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    Consumer,
    Share,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupListing {
    pub group: String,
    pub kind: GroupKind,
    pub members: u32,
    pub topics: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupDescription {
    pub group: String,
    pub kind: GroupKind,
    pub paused: bool,
    pub config: Vec<(String, String)>,
    pub members: Vec<GroupMemberInfo>,
    pub partitions: Vec<GroupPartitionInfo>,
    /// Of a share group whose outage guard is on.
    pub outage: Option<OutageInfo>,
    /// Why it is not served, if it is not.
    pub corrupt: Option<String>,
}

/// What the outage guard of a share group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutageInfo {
    /// Leases that may be live at a time.
    pub limit: u32,
    /// Milliseconds until the next probe may be handed out.
    pub next_probe_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMemberInfo {
    pub member: String,
    pub assigned: Vec<PartitionKey>,
    pub leased: u64,
}

/// A limit that a share group has reached on a partition: nothing new is handed out there until there is room again, what
/// came back is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareAlarm {
    /// Live leases.
    Leases,
    /// Scheduled, held and returned records.
    Exceptions,
    /// Offsets between the first undecided one and the last that was looked at.
    Span,
    /// Memory of all share groups together.
    Memory,
}

/// Counts of one group on one partition; the listener adds log start, and the oldest record's age from the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupPartitionInfo {
    pub topic: String,
    pub partition: Option<PartitionKey>,
    pub high_watermark: u64,
    /// Consumer group: committed offset. Share group: first undecided offset.
    pub position: Option<u64>,
    pub lag: u64,
    /// Offset of the oldest unsettled record (share) or of the next to read (consumer), when there is one.
    pub oldest_unsettled: Option<u64>,
    /// May be handed out, also those that wait for an older one of their key.
    pub available: u64,
    pub leased: u64,
    pub scheduled: u64,
    pub held: u64,
    /// Exhausted, with their dead letters still being made.
    pub exhausted: u64,
    pub parked: u64,
    pub acked: u64,
    pub dead_lettered: u64,
    pub discarded: u64,
    pub skipped: u64,
    pub expired: u64,
    pub deliveries: u64,
    pub failures: u64,
    /// Limits that are reached.
    pub alarms: Vec<ShareAlarm>,
    /// Memory that the group takes here, roughly, in bytes.
    pub memory_bytes: u64,
    /// Bytes below the log start that are kept for what the group has in hand.
    pub pinned_bytes: u64,
    /// What could not be read last, from which offset on and why; `None` when all is well.
    pub unreadable: Option<Unreadable>,
}

/// Records that a share group was to be handed and that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub offset: u64,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetterInfo {
    pub group: String,
    pub source: String,
    pub topic: TopicInfo,
    /// The hidden share group that redrives and purges of this topic go through.
    pub redrive_group: String,
    pub pending: u64,
    pub redriven: u64,
    pub purged: u64,
}

/// The answer to one command.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Done,
    Topic(TopicInfo),
    /// Known topics, and the names that are unknown.
    Metadata {
        topics: Vec<TopicInfo>,
        unknown: Vec<String>,
    },
    Producer {
        producer_id: u64,
        epoch: u16,
    },
    /// One per entry, in order.
    Appended(Vec<Result<Appended, EngineError>>),
    Heartbeat {
        generation: u64,
        assigned: Vec<PartitionKey>,
        interval_ms: u32,
    },
    /// One per item, in order.
    OffsetsCommitted(Vec<Result<(), EngineError>>),
    Offsets(Vec<OffsetCommit>),
    Groups(Vec<GroupListing>),
    Group(GroupDescription),
    DeadLetters(Vec<DeadLetterInfo>),
    Redrive(Box<super::event::RedriveRow>),
    Redrives(Vec<super::event::RedriveRow>),
    /// Offsets of letters, ascending.
    PendingLetters(Vec<u64>),
    /// Where the log starts now.
    RecordsDeleted {
        log_start: u64,
    },
    /// What is most in need of cleaning.
    Cleaning(Option<super::cleaning::Cleaning>),
    /// So many records were made due.
    Kicked {
        records: u64,
    },
    /// So many held records were decided on; whether there are more.
    HeldEnded {
        records: u64,
        more: bool,
    },
    /// One per settlement, in order.
    Settled(Vec<SettleResult>),
    Completed {
        result: SettleResult,
        base_offsets: Vec<u64>,
    },
    Error(EngineError),
}

/// A reply that may leave once the frame being staged has reached `level`.
#[derive(Debug)]
pub struct PendingReply {
    pub request: RequestId,
    pub level: Level,
    pub reply: Reply,
}

/// Leased records to be pushed to a member once the frame is `written` (rule R2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub subscription: SubscriptionId,
    pub partition: PartitionKey,
    /// Lease of the first record; record i has `sequence + i`.
    pub first_lease: LeaseId,
    pub lease_ms: u64,
    pub records: Vec<DeliveredRecord>,
}

/// One record of a [`Delivery`]; offsets ascend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveredRecord {
    pub offset: u64,
    pub deliveries: u32,
    pub failures: u32,
}

/// Asks for the offsets, key slots and sizes of records in `from..high_watermark`, answered by `Command::Scanned`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    pub group: String,
    pub partition: PartitionKey,
    pub from: u64,
    /// Exclusive; at or below the high watermark.
    pub until: u64,
    pub max_records: usize,
    /// What is found will soon be handed out, as far as anybody knows.
    pub soon: bool,
}

/// Asks for the dead letter of an exhausted record, answered by `Command::DeadLetterBuilt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetterRead {
    pub group: String,
    pub partition: PartitionKey,
    pub offset: u64,
    pub context: super::dead_letter::DeadLetterContext,
}

/// A segment file of one partition: never reused, so its name is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentName {
    pub partition: PartitionKey,
    pub base_offset: u64,
    pub generation: u32,
}

/// A batch whose place in its segment has been decided; written behind the journal.
#[derive(Clone, Debug)]
pub struct SegmentWrite {
    pub segment: SegmentName,
    /// Byte position in the segment file.
    pub position: u64,
    pub base_offset: u64,
    pub last_offset: u64,
    pub max_timestamp: i64,
    /// Bytes of the whole batch.
    pub length: u64,
    /// The whole batch with its offset assigned; its beginning only, in the replay of a frame that refers to the rest.
    pub bytes: Bytes,
    /// It stands there already.
    pub stored: bool,
}

/// A change of what readers see, applied when the frame is written, before anything of it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewChange {
    Created {
        partition: PartitionKey,
        topic: String,
        first_segment: SegmentName,
    },
    SegmentAdded {
        segment: SegmentName,
    },
    LogStartRaised {
        partition: PartitionKey,
        log_start: u64,
    },
    /// Segments of one partition.
    SegmentsRemoved {
        segments: Vec<SegmentName>,
    },
    /// Neighbouring segments of one partition, and those that are in their place now, with their bytes: they are complete and
    /// on the device.
    SegmentsReplaced {
        partition: PartitionKey,
        removed: Vec<SegmentName>,
        added: Vec<(SegmentName, u64)>,
    },
    Removed {
        partition: PartitionKey,
    },
}

/// The high watermark that holds once the frame has reached `level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    pub partition: PartitionKey,
    pub high_watermark: u64,
    pub level: Level,
}

/// Everything staged since the last frame, in order.
#[derive(Debug, Default)]
pub struct Effects {
    pub events: Vec<Event>,
    /// Raw batches of the append events, in their order.
    pub batches: Vec<Bytes>,
    pub segment_writes: Vec<SegmentWrite>,
    pub view_changes: Vec<ViewChange>,
    pub advances: Vec<Advance>,
    pub replies: Vec<PendingReply>,
    pub deliveries: Vec<Delivery>,
    /// Share subscriptions that the engine ended, and why.
    pub ended: Vec<(SubscriptionId, EngineError)>,
    pub scans: Vec<Scan>,
    pub dead_letter_reads: Vec<DeadLetterRead>,
}
