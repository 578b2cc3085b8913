//! The requests and pushes of the native protocol, by number.
//!
//! A number is never reused. A reply or an error carries the number of its request; a push carries its own.

/// What a frame asks for, answers or pushes. The message of each is named in its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Api {
    /// `Hello` → `Welcome`; the first frame of every connection.
    Hello = 1,
    /// `Ping` → `Empty`
    Ping = 2,
    /// `Metadata` → `MetadataReply`
    Metadata = 3,
    /// `ListOffsets` → `ListOffsetsReply`
    ListOffsets = 4,
    /// `DescribeBroker` → `DescribeBrokerReply`
    DescribeBroker = 5,
    /// `CreateTopic` → `TopicReply`
    CreateTopic = 10,
    /// `AlterTopic` → `TopicReply`
    AlterTopic = 11,
    /// `DeleteTopic` → `TopicReply`
    DeleteTopic = 12,
    /// `DeleteRecords` → `DeleteRecordsReply`
    DeleteRecords = 13,
    /// `InitProducer` → `InitProducerReply`
    InitProducer = 20,
    /// `Produce` with batches → `ProduceReply`
    Produce = 21,
    /// `Fetch` → `FetchReply` with batches
    Fetch = 22,
    /// `Subscribe` → `Empty`, then `Records` pushes
    Subscribe = 23,
    /// `Credit`; has no reply
    Credit = 24,
    /// `Unsubscribe` → `Empty`
    Unsubscribe = 25,
    /// Push of `Records` with batches
    Records = 26,
    /// Push of `SubscriptionEnded`
    SubscriptionEnded = 27,
    /// `GroupHeartbeat` → `GroupHeartbeatReply`
    GroupHeartbeat = 30,
    /// `CommitOffsets` → `CommitOffsetsReply`
    CommitOffsets = 31,
    /// `FetchOffsets` → `FetchOffsetsReply`
    FetchOffsets = 32,
    /// `CreateShareGroup` → `Empty`
    CreateShareGroup = 40,
    /// `AlterShareGroup` → `Empty`
    AlterShareGroup = 41,
    /// `DeleteGroup` → `Empty`
    DeleteGroup = 42,
    /// `PauseGroup` → `Empty`
    PauseGroup = 43,
    /// `SeekGroup` → `Empty`
    SeekGroup = 44,
    /// `ListGroups` → `ListGroupsReply`
    ListGroups = 45,
    /// `DescribeGroup` → `DescribeGroupReply`
    DescribeGroup = 46,
    /// `KickGroup` → `KickGroupReply`
    KickGroup = 47,
    /// `EndHeld` → `EndHeldReply`
    EndHeld = 48,
    /// `ShareSubscribe` → `Empty`, then `LeasedRecords` pushes
    ShareSubscribe = 50,
    /// Push of `LeasedRecords` with batches
    LeasedRecords = 51,
    /// `Settle` → `SettleReply`
    Settle = 52,
    /// `Complete` with batches → `CompleteReply`
    Complete = 53,
    /// `ListDeadLetters` → `ListDeadLettersReply`
    ListDeadLetters = 60,
    /// `Redrive` → `RedriveReply`
    Redrive = 61,
    /// `PurgeDeadLetters` → `PurgeDeadLettersReply`
    PurgeDeadLetters = 62,
    /// `ListRedrives` → `ListRedrivesReply`
    ListRedrives = 63,
    /// `AlterRedrive` → `RedriveReply`
    AlterRedrive = 64,
}

/// The number names no request or push of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown request number {0}")]
pub struct UnknownApi(pub u8);

impl Api {
    /// Every request and push, ascending by number.
    pub const ALL: [Self; 38] = [
        Self::Hello,
        Self::Ping,
        Self::Metadata,
        Self::ListOffsets,
        Self::DescribeBroker,
        Self::CreateTopic,
        Self::AlterTopic,
        Self::DeleteTopic,
        Self::DeleteRecords,
        Self::InitProducer,
        Self::Produce,
        Self::Fetch,
        Self::Subscribe,
        Self::Credit,
        Self::Unsubscribe,
        Self::Records,
        Self::SubscriptionEnded,
        Self::GroupHeartbeat,
        Self::CommitOffsets,
        Self::FetchOffsets,
        Self::CreateShareGroup,
        Self::AlterShareGroup,
        Self::DeleteGroup,
        Self::PauseGroup,
        Self::SeekGroup,
        Self::ListGroups,
        Self::DescribeGroup,
        Self::KickGroup,
        Self::EndHeld,
        Self::ShareSubscribe,
        Self::LeasedRecords,
        Self::Settle,
        Self::Complete,
        Self::ListDeadLetters,
        Self::Redrive,
        Self::PurgeDeadLetters,
        Self::ListRedrives,
        Self::AlterRedrive,
    ];
}

impl TryFrom<u8> for Api {
    type Error = UnknownApi;

    fn try_from(number: u8) -> Result<Self, UnknownApi> {
        Self::ALL.into_iter().find(|api| u8::from(*api) == number).ok_or(UnknownApi(number))
    }
}

impl From<Api> for u8 {
    fn from(api: Api) -> Self {
        api as Self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_the_way_there_and_back() {
        for number in 0..=u8::MAX {
            match Api::try_from(number) {
                Ok(api) => assert_eq!(u8::from(api), number),
                Err(UnknownApi(unknown)) => assert_eq!(unknown, number),
            }
        }
        assert!(Api::ALL.is_sorted_by_key(|api| u8::from(*api)));
    }
}
