//! The plain values that the engine, the shard and the listeners exchange.

use std::fmt;

use uuid::Uuid;

/// Identifies a topic for ever; names can be reused, ids cannot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicId(pub [u8; 16]);

impl TopicId {
    /// Reads an id as the wire carries it; `None` unless it is 16 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One partition of one topic: the unit that offsets, segments and share-group state belong to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartitionKey {
    pub topic: TopicId,
    pub partition: u32,
}

impl fmt::Display for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.partition)
    }
}

impl fmt::Debug for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Every offset at which a partition resumes with a higher epoch is a multiple of it: nothing else vouches for that offset in the
/// log, and few other numbers look like one.
pub(crate) const RESUME_STEP: u64 = 8 << 20;

/// Number of a journal frame: the first is 1, each next is one more. 0 = before every frame.
pub type Lsn = u64;

/// How durable a frame must be before what depends on it may be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// In the page cache: survives a killed process.
    Written,
    /// On the device: survives power loss.
    Synced,
}

/// Time and randomness, given to the engine from outside so that a run can be repeated.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Milliseconds of broker uptime, continued over restarts from the last journaled value; never falls.
    pub monotonic_ms: u64,
    /// Unix milliseconds; may jump.
    pub wall_ms: i64,
    /// Fresh random bits; several values are derived from it where one step needs them.
    pub entropy: u64,
}

/// Names one waiting caller; the shard maps it to the connection that asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Names one open share subscription on this shard; the shard maps it to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriptionId(pub u64);

/// A lease's name: the boot epoch that granted it and its number within that boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId {
    pub boot_epoch: u64,
    pub sequence: u64,
}
