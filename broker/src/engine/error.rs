//! Why the engine refuses a command. Mapped to wire codes in each listener, in one place.

use super::types::PartitionKey;

/// A refusal. Nothing was changed by the refused command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("topic {0:?} does not exist")]
    UnknownTopic(String),
    #[error("partition {0} does not exist")]
    UnknownPartition(PartitionKey),
    #[error("topic {0:?} exists already")]
    TopicExists(String),
    #[error("{0}")]
    InvalidName(String),
    #[error("{0}")]
    InvalidConfig(String),
    #[error("{0}")]
    InvalidRequest(String),
    #[error("the request has {bytes} bytes; at most {limit} can be carried out at once (max-frame-bytes)")]
    RequestTooLarge { bytes: u64, limit: u64 },
    #[error("topic {0:?} takes no records from producers: it belongs to a share group")]
    ForeignProducer(String),
    #[error("topic {0:?} does not allow the level `written`; create it with allow-written=true")]
    WrittenNotAllowed(String),
    #[error("sequence {got} of producer {producer_id}, expected {expected}")]
    OutOfOrderSequence { producer_id: u64, got: u32, expected: u32 },
    #[error("producer {producer_id} epoch {got} is older than {current}")]
    ProducerFenced { producer_id: u64, got: u16, current: u16 },
    #[error("producer id {0} was never given out by this broker")]
    UnknownProducer(u64),
    #[error("group {0:?} does not exist")]
    UnknownGroup(String),
    #[error("group {0:?} exists already")]
    GroupExists(String),
    #[error("group {group:?} is a {actual} group")]
    WrongGroupKind { group: String, actual: &'static str },
    #[error("member {0:?} is not in the group; join again")]
    UnknownMember(String),
    #[error("another process took the place of member {0:?}; one of the two needs another member id")]
    MemberFenced(String),
    #[error("generation {got} is older than {current}; heartbeat to learn the assignment")]
    StaleGeneration { got: u64, current: u64 },
    #[error("the member does not own partition {0}")]
    NotAssigned(PartitionKey),
    #[error("offset {offset} is beyond the end {end} of partition {partition}")]
    OffsetOutOfRange { partition: PartitionKey, offset: u64, end: u64 },
    /// The log has changed since the cleaner looked at it.
    #[error("cleaning does not fit the log: {0}")]
    StaleCleaning(&'static str),
    #[error("group {0:?} has active members")]
    GroupNotEmpty(String),
    #[error(
        "group {group:?} has {redriven} redriven records that it has not worked through and {exhausted} whose dead letters are \
         being made: they would be dropped; wait for them, or force it"
    )]
    GroupUnsettled { group: String, redriven: u64, exhausted: u64 },
    #[error("{what} at its limit of {limit}")]
    LimitReached { what: &'static str, limit: u64 },
    #[error("{0}")]
    DiskFull(NoRoom),
    #[error("the broker stopped accepting writes: {0}")]
    ReadOnly(String),
    #[error("the broker is stopping")]
    Stopping,
    #[error("group {group:?} refuses to serve: {reason}")]
    GroupCorrupt { group: String, reason: String },
}

/// Why new records are not taken for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk is nearly full ({available} bytes are free): new records are taken again from {needed} on")]
pub struct NoRoom {
    pub available: u64,
    /// Free bytes at which records are taken again.
    pub needed: u64,
}
