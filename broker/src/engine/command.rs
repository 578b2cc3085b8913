//! What can be asked of the engine.

use bytes::BytesMut;
use felucca_protocol::batch::BatchHeader;

use super::cleaning::Replacement;
use super::error::EngineError;
use super::event::RedriveSpec;
use super::types::{LeaseId, Level, PartitionKey, SubscriptionId, TopicId};

/// A validated record batch (CRC and structure were checked by the listener) whose base offset is still to be assigned.
#[derive(Clone, Debug)]
pub struct StagedBatch {
    pub header: BatchHeader,
    /// The whole batch; the engine writes base offset and epoch into its first bytes.
    pub bytes: BytesMut,
}

/// One partition's part of a produce request, or one output of `complete`.
#[derive(Clone, Debug)]
pub struct AppendEntry {
    pub partition: PartitionKey,
    pub batch: StagedBatch,
}

/// Most held records that one command decides on.
pub const MAX_HELD_ENDED: usize = 1000;

/// What becomes of a held record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldFate {
    /// Tried again, as if it had never failed.
    Release,
    /// Settled as discarded.
    Discard,
}

/// Letters of a redrive that were found in a partition of its dead-letter topic from its position there up to `next`.
#[derive(Clone, Debug)]
pub struct FoundLetters {
    pub partition: u32,
    pub from: u64,
    pub next: u64,
    /// Letters looked at, and those left because they were redriven too often.
    pub examined: u64,
    pub refused: u64,
    /// Each with its offset, ascending; letters that somebody else has or has had are left out.
    pub letters: Vec<(u64, AppendEntry)>,
}

/// What is done with a redrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedriveAction {
    Pause,
    /// Goes on where it was paused, or failed.
    Resume,
    Cancel,
}

/// Where a consumer or share group is moved to. `Timestamp` is resolved to an offset by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    Beginning,
    End,
    Offset(u64),
}

/// One committed position of a consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffsetCommit {
    pub partition: PartitionKey,
    /// Next offset to read.
    pub offset: u64,
    pub metadata: String,
}

/// Names one lease on one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseRef {
    pub partition: PartitionKey,
    pub offset: u64,
    pub lease: LeaseId,
}

/// Why a record failed, in the words of its handler. Lengths are bounded by the engine (excess is cut).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailureDetail {
    pub class: String,
    pub reason: String,
    pub detail: String,
}

/// What a member says became of a leased record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ack,
    /// Try again later. `delay_ms` overrides the backoff; `counted = false` adds no failure.
    Nack {
        delay_ms: Option<u64>,
        counted: bool,
        detail: FailureDetail,
    },
    /// Never try again.
    Reject {
        detail: FailureDetail,
    },
    /// Not started: available again at once, no failure.
    Release,
    /// New remaining time; `None` = the group's lease.
    Extend {
        remaining_ms: Option<u64>,
    },
}

/// One settlement of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settlement {
    pub record: LeaseRef,
    pub outcome: Outcome,
}

/// One record found by a scan of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScannedRecord {
    pub offset: u64,
    /// Key slot ([`super::share::key_slot`]); `None` for a record without a key.
    pub slot: Option<u16>,
    /// Bytes that the record takes in its batch.
    pub size: u32,
}

/// Everything that reaches the engine. Commands that carry no request id are told by the shard itself.
#[derive(Clone, Debug)]
pub enum Command {
    // Topics and producers.
    CreateTopic {
        id: TopicId,
        name: String,
        partitions: u32,
        config: Vec<(String, String)>,
    },
    AlterTopic {
        name: String,
        config: Vec<(String, String)>,
    },
    DeleteTopic {
        name: String,
    },
    /// Deletes the records of a partition below an offset, at most the high watermark.
    DeleteRecords {
        topic: String,
        partition: u32,
        before: u64,
    },
    /// Asks for work for the cleaner, which is then its own until it asks again.
    NextCleaning,
    /// The cleaner has put what is still needed of neighbouring segments into others, which are on the device. Refused when
    /// that does not hold any more; nothing is changed then.
    ReplaceSegments(Replacement),
    /// The cleaner has looked at everything below `cleaned_until`.
    EndCleaning {
        partition: PartitionKey,
        cleaned_until: u64,
        /// When the next tombstone below may go, Unix ms.
        tombstones_due_ms: Option<i64>,
        /// There were more keys than it could remember: the next cleaning may go on at once.
        more: bool,
    },
    /// No names = every topic.
    Metadata {
        names: Vec<String>,
    },
    InitProducer,
    Append {
        level: Level,
        entries: Vec<AppendEntry>,
    },

    // Consumer groups. Of the connections of a member the newest counts: what comes late on an older one, which the member
    // has left, is refused.
    GroupHeartbeat {
        group: String,
        member: String,
        connection: u64,
        topics: Vec<String>,
        owned: Vec<PartitionKey>,
        generation: u64,
        leave: bool,
    },
    /// An empty member commits from outside, allowed while the group has no members.
    CommitOffsets {
        group: String,
        member: String,
        connection: u64,
        generation: u64,
        offsets: Vec<OffsetCommit>,
    },
    /// No partitions = all that were committed.
    FetchOffsets {
        group: String,
        partitions: Vec<PartitionKey>,
    },

    // Groups of both kinds.
    CreateShareGroup {
        group: String,
        topics: Vec<String>,
        config: Vec<(String, String)>,
        from_end: bool,
    },
    AlterShareGroup {
        group: String,
        config: Vec<(String, String)>,
    },
    DeleteGroup {
        group: String,
        /// Also when records go with it that nobody else has.
        force: bool,
    },
    PauseGroup {
        group: String,
        paused: bool,
    },
    /// Makes the scheduled records of a share group due now, on one topic or on all.
    KickGroup {
        group: String,
        topic: Option<String>,
    },
    /// Decides on held records of a share group, on one topic or on all; see [`MAX_HELD_ENDED`].
    EndHeld {
        group: String,
        topic: Option<String>,
        fate: HeldFate,
    },
    SeekGroup {
        group: String,
        topic: String,
        positions: Vec<(u32, SeekTo)>,
        /// Also when records are dropped that nobody else has.
        force: bool,
    },
    ListGroups,
    DescribeGroup {
        group: String,
    },
    ListDeadLetters {
        group: Option<String>,
    },
    /// Begins a redrive; the same again is the same redrive.
    StartRedrive {
        id: String,
        spec: Box<RedriveSpec>,
    },
    /// What a redrive would be; begins none.
    PlanRedrive {
        spec: Box<RedriveSpec>,
    },
    AlterRedrive {
        id: String,
        action: RedriveAction,
    },
    ListRedrives {
        group: Option<String>,
    },
    /// Moves the letters of a running redrive that were found. Nothing is done when the redrive does not stand there.
    MoveLetters {
        id: String,
        found: Box<FoundLetters>,
    },
    /// A redrive cannot go on.
    FailRedrive {
        id: String,
        failure: String,
    },
    /// Which of these letters are neither redriven nor purged nor leased; by their offsets in a partition.
    PendingLetters {
        group: String,
        source_topic: String,
        partition: u32,
        offsets: Vec<u64>,
    },

    // Share members.
    ShareSubscribe {
        subscription: SubscriptionId,
        group: String,
        member: String,
        credit_records: u32,
        credit_bytes: u32,
        held: Vec<LeaseRef>,
    },
    /// No reply.
    ShareCredit {
        subscription: SubscriptionId,
        records: u32,
        bytes: u32,
    },
    /// The subscription's connection ended or it unsubscribed; its leases stay with the member. No reply.
    ShareUnsubscribe {
        subscription: SubscriptionId,
    },
    /// Something was heard of these members (group, member). No reply.
    MembersSeen {
        members: Vec<(String, String)>,
    },
    Settle {
        group: String,
        member: String,
        level: Level,
        settlements: Vec<Settlement>,
    },
    Complete {
        group: String,
        member: String,
        record: LeaseRef,
        outputs: Vec<AppendEntry>,
    },

    // Answers to the engine's own effects. No reply.
    /// `records` are all that exist in `from..next`; what is missing in between does not exist.
    Scanned {
        group: String,
        partition: PartitionKey,
        /// As asked.
        from: u64,
        /// `from`, or where the log begins when that is above: what was below is lost.
        next: u64,
        records: Vec<ScannedRecord>,
    },
    /// The log could not be read there; the engine asks again after a pause.
    ScanFailed {
        group: String,
        partition: PartitionKey,
        from: u64,
        reason: String,
    },
    /// The dead letter for an exhausted record, ready to append; or why it could not be built.
    DeadLetterBuilt {
        group: String,
        partition: PartitionKey,
        offset: u64,
        letter: Result<StagedBatch, LetterError>,
    },
}

impl Command {
    /// Bytes of the batches that it brings along.
    pub fn batch_bytes(&self) -> usize {
        match self {
            Self::Append { entries, .. } | Self::Complete { outputs: entries, .. } => {
                entries.iter().map(|entry| entry.batch.bytes.len()).sum()
            }
            Self::DeadLetterBuilt { letter: Ok(letter), .. } => letter.bytes.len(),
            Self::MoveLetters { found, .. } => {
                found.letters.iter().map(|(_, entry)| entry.batch.bytes.len()).sum()
            }
            _ => 0,
        }
    }
}

/// Why a dead letter could not be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LetterError {
    /// The disk failed: it is tried again.
    Disk,
    /// The record cannot be read any more, or no letter can be made of it. Trying again does not help.
    Record(String),
}

/// Why a command failed. See [`EngineError`].
pub type CommandResult<T> = Result<T, EngineError>;
