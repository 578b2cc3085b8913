//! Why a request failed, as a stable number.
//!
//! The number goes over the wire and is never reused. A retryable code says that the same request may succeed later
//! (some after a step named at the code); every other code needs a different request or a person.

use std::fmt;

/// Why a request, or one item of it, failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// A number that this version does not know; not retryable, for nothing is known of its cause.
    Unknown = 0,
    /// The request cannot be decoded or contradicts itself.
    InvalidRequest = 1,
    /// No protocol version in common.
    UnsupportedVersion = 2,
    /// The request number is not known to the receiver.
    UnknownApi = 3,
    /// The frame is over the receiver's limit; the connection ends.
    FrameTooLarge = 4,
    /// The authentication was refused, or its mechanism is not offered.
    Unauthenticated = 5,
    /// No topic of that name or id.
    UnknownTopic = 10,
    /// The topic has no such partition.
    UnknownPartition = 11,
    /// A topic of that name exists.
    TopicExists = 12,
    /// The name breaks the rules for names.
    InvalidName = 13,
    /// An unknown key or an impossible value.
    InvalidConfig = 14,
    /// The record batch is malformed or its CRC is wrong.
    CorruptBatch = 20,
    /// A record is over the limit that the message names.
    RecordTooLarge = 21,
    /// A batch is over the limit that the message names.
    BatchTooLarge = 22,
    /// The topic takes no records from producers.
    ForeignProducer = 23,
    /// The topic does not allow the level `written`.
    WrittenNotAllowed = 24,
    /// A batch before this one is missing.
    OutOfOrderSequence = 25,
    /// A newer epoch of this producer exists.
    ProducerFenced = 26,
    /// The producer id was never given out, or was forgotten.
    UnknownProducer = 27,
    /// The offset is below the log start or beyond the end.
    OffsetOutOfRange = 28,
    /// Stored bytes are damaged.
    CorruptLog = 29,
    /// No group of that name.
    UnknownGroup = 30,
    /// A group of that name exists.
    GroupExists = 31,
    /// The group is of the other kind.
    WrongGroupKind = 32,
    /// The member's session ended; retry by joining again.
    UnknownMember = 33,
    /// The group moved on; retry after the next heartbeat.
    StaleGeneration = 34,
    /// The member does not own the partition.
    NotAssigned = 35,
    /// The group has members.
    GroupNotEmpty = 36,
    /// The group's state is damaged and it refuses to serve.
    GroupCorrupt = 37,
    /// Another process joined under the member's id; this one is out.
    MemberFenced = 38,
    /// The group has records that nobody else has; forcing the request drops them.
    GroupUnsettled = 39,
    /// A limit is reached; retry later.
    LimitReached = 50,
    /// Too much is waiting; retry later.
    Overloaded = 51,
    /// The broker is stopping; retry after reconnecting.
    Stopping = 52,
    /// The broker stopped accepting writes after a failed write or sync.
    ReadOnly = 53,
    /// No answer in time; the outcome is unknown.
    Timeout = 54,
    /// A fault of the broker.
    Internal = 55,
    /// The disk is nearly full: new records are refused for now, everything else goes on; retry later.
    DiskFull = 56,
}

impl ErrorCode {
    /// Every code, ascending by number.
    pub const ALL: [Self; 38] = [
        Self::Unknown,
        Self::InvalidRequest,
        Self::UnsupportedVersion,
        Self::UnknownApi,
        Self::FrameTooLarge,
        Self::Unauthenticated,
        Self::UnknownTopic,
        Self::UnknownPartition,
        Self::TopicExists,
        Self::InvalidName,
        Self::InvalidConfig,
        Self::CorruptBatch,
        Self::RecordTooLarge,
        Self::BatchTooLarge,
        Self::ForeignProducer,
        Self::WrittenNotAllowed,
        Self::OutOfOrderSequence,
        Self::ProducerFenced,
        Self::UnknownProducer,
        Self::OffsetOutOfRange,
        Self::CorruptLog,
        Self::UnknownGroup,
        Self::GroupExists,
        Self::WrongGroupKind,
        Self::UnknownMember,
        Self::StaleGeneration,
        Self::NotAssigned,
        Self::GroupNotEmpty,
        Self::GroupCorrupt,
        Self::MemberFenced,
        Self::GroupUnsettled,
        Self::LimitReached,
        Self::Overloaded,
        Self::Stopping,
        Self::ReadOnly,
        Self::Timeout,
        Self::Internal,
        Self::DiskFull,
    ];

    /// The code of a number from the wire.
    pub fn from_code(number: u32) -> Self {
        Self::ALL.into_iter().find(|code| u32::from(*code) == number).unwrap_or(Self::Unknown)
    }

    /// True when the same request may succeed later.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Self::UnknownMember
                | Self::StaleGeneration
                | Self::LimitReached
                | Self::Overloaded
                | Self::Stopping
                | Self::Timeout
                | Self::DiskFull
        )
    }

    /// The name in messages, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::InvalidRequest => "invalid-request",
            Self::UnsupportedVersion => "unsupported-version",
            Self::UnknownApi => "unknown-api",
            Self::FrameTooLarge => "frame-too-large",
            Self::Unauthenticated => "unauthenticated",
            Self::UnknownTopic => "unknown-topic",
            Self::UnknownPartition => "unknown-partition",
            Self::TopicExists => "topic-exists",
            Self::InvalidName => "invalid-name",
            Self::InvalidConfig => "invalid-config",
            Self::CorruptBatch => "corrupt-batch",
            Self::RecordTooLarge => "record-too-large",
            Self::BatchTooLarge => "batch-too-large",
            Self::ForeignProducer => "foreign-producer",
            Self::WrittenNotAllowed => "written-not-allowed",
            Self::OutOfOrderSequence => "out-of-order-sequence",
            Self::ProducerFenced => "producer-fenced",
            Self::UnknownProducer => "unknown-producer",
            Self::OffsetOutOfRange => "offset-out-of-range",
            Self::CorruptLog => "corrupt-log",
            Self::UnknownGroup => "unknown-group",
            Self::GroupExists => "group-exists",
            Self::WrongGroupKind => "wrong-group-kind",
            Self::UnknownMember => "unknown-member",
            Self::StaleGeneration => "stale-generation",
            Self::NotAssigned => "not-assigned",
            Self::GroupNotEmpty => "group-not-empty",
            Self::GroupCorrupt => "group-corrupt",
            Self::MemberFenced => "member-fenced",
            Self::GroupUnsettled => "group-unsettled",
            Self::LimitReached => "limit-reached",
            Self::Overloaded => "overloaded",
            Self::Stopping => "stopping",
            Self::ReadOnly => "read-only",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
            Self::DiskFull => "disk-full",
        }
    }
}

impl From<ErrorCode> for u32 {
    fn from(code: ErrorCode) -> Self {
        code as Self
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_way_there_and_back_and_names_are_distinct() {
        let mut names = std::collections::HashSet::new();
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_code(u32::from(code)), code);
            assert!(names.insert(code.name()));
        }
        assert!(ErrorCode::ALL.is_sorted_by_key(|code| u32::from(*code)));
    }

    #[test]
    fn a_number_from_the_future_is_unknown_and_not_retried() {
        assert_eq!(ErrorCode::from_code(4_000_000_000), ErrorCode::Unknown);
        assert!(!ErrorCode::Unknown.retryable());
    }
}
