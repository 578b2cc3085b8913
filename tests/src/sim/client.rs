//! What clients have in common: what they know, what they ask, and how they are told.

use felucca_broker::engine::command::{Command, LeaseRef, OffsetCommit, Settlement};
use felucca_broker::engine::types::{Level, PartitionKey};

use super::consumer::Consumer;
use super::content::Identity;
use super::network::ConnectionId;
use super::producer::Producer;
use super::redriver::Redriver;
use super::worker::Worker;

/// A partition that records are sent to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) key: PartitionKey,
    pub(crate) allow_written: bool,
}

/// What every client knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    pub(crate) now_ms: u64,
    pub(crate) wall_ms: i64,
    pub(crate) targets: &'a [Target],
    /// Where outputs of `complete` go.
    pub(crate) done: PartitionKey,
}

/// Part of an append: records of one maker in one partition.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) target: usize,
    pub(crate) partition: PartitionKey,
    pub(crate) maker: u32,
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Sent {
    pub(crate) fn identities(&self) -> impl Iterator<Item = Identity> {
        let maker = self.maker;
        (self.first..self.first + self.count).map(move |number| Identity { maker, number, redrives: 0 })
    }
}

/// What a request was about.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    ProducerId,
    Append {
        sent: Vec<Sent>,
        level: Level,
    },
    Subscribe {
        group: String,
        member: String,
        held: Vec<LeaseRef>,
    },
    Credit,
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
        partition: PartitionKey,
        output: Identity,
    },
    /// A member is there.
    Seen {
        group: String,
        member: String,
    },
    Heartbeat,
    Commit {
        group: String,
        offsets: Vec<OffsetCommit>,
    },
    Fetch {
        group: String,
        partitions: Vec<PartitionKey>,
    },
    DeleteRecords {
        key: PartitionKey,
        before: u64,
    },
    CreateTopic {
        topic: String,
    },
    DeleteTopic {
        topic: String,
    },
    /// A group is moved.
    Seek {
        group: String,
    },
    Admin {
        what: &'static str,
    },
}

impl Asked {
    /// For the trace.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Append { sent, level } => {
                let parts = sent.iter().map(|sent| format!("{}×{}@{}", sent.first, sent.count, sent.target));
                format!("append of {} at {level:?}: {}", sent[0].maker, parts.collect::<Vec<_>>().join(" "))
            }
            Self::Settle { group, member, level, settlements } => {
                let parts = settlements.iter().map(|settlement| {
                    let LeaseRef { partition, offset, lease } = settlement.record;
                    let lease = (lease.boot_epoch, lease.sequence);
                    format!("{} {offset} {lease:?} {:?}", partition.partition, settlement.outcome)
                });
                format!("{group} {member} settles at {level:?}: {}", parts.collect::<Vec<_>>().join(", "))
            }
            other => format!("{other:?}"),
        }
    }
}

/// Requests to be sent, in order.
pub(crate) type Outgoing = Vec<(Asked, Command)>;

/// What a client does.
#[derive(Debug)]
pub(crate) enum Role {
    Producer(Producer),
    Consumer(Consumer),
    Worker(Worker),
    Redriver(Redriver),
    /// Changes and looks at topics and groups.
    Admin,
}

/// A client with its connection, if it has one.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) role: Role,
    pub(crate) connection: Option<ConnectionId>,
    /// It does nothing until then.
    pub(crate) sleeps_until_ms: u64,
}
