//! What one step has at hand while it decides: time, the frame being staged, and the engine's shared bookkeeping.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::effect::Effects;
use super::event::{Event, event::Kind};
use super::share::acks::OpenAcks;
use super::types::{LeaseId, Lsn, Now, PartitionKey, TopicId};
use crate::plants::planted;

/// A row of the checkpoint. Its bytes, as a key, are in `checkpoint.rs`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RowKey {
    Meta,
    Topic(TopicId),
    Partition(PartitionKey),
    /// A share group.
    Group(Arc<str>),
    /// A consumer group.
    Consumer(Arc<str>),
    /// A share group on a partition.
    Share(Arc<str>, PartitionKey),
    Redrive(Arc<str>),
}

/// What a timer is for; a timer that no longer matters is passed over when it fires.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TimerKey {
    /// Leases and due times of a share group on a partition.
    Share(Arc<str>, PartitionKey),
    /// The next probe of a share group whose outage guard is on.
    Outage(Arc<str>),
    /// How leases of a share group ended is forgotten some time.
    Forget(Arc<str>),
    /// A share member's session.
    Session(Arc<str>, Arc<str>),
    /// A consumer-group member's session.
    ConsumerSession(Arc<str>, Arc<str>),
    /// A look at what retention wants deleted.
    Retention,
}

pub(crate) type Timers = BTreeSet<(u64, TimerKey)>;

#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) now: Now,
    /// Number of the frame being staged.
    pub(crate) lsn: Lsn,
    pub(crate) out: &'a mut Effects,
    pub(crate) dirty: &'a mut BTreeSet<RowKey>,
    pub(crate) timers: &'a mut Timers,
    /// Share groups that may have something to hand out.
    pub(crate) pump: &'a mut BTreeSet<Arc<str>>,
    pub(crate) high_watermarks: &'a BTreeMap<PartitionKey, u64>,
    pub(crate) boot_epoch: u64,
    pub(crate) next_sequence: &'a mut u64,
    pub(crate) session_timeout_ms: u64,
    pub(crate) max_leases: u64,
    pub(crate) max_exceptions: u64,
    pub(crate) max_span: u64,
    /// Share groups that could go on if the budget of memory were not spent.
    pub(crate) starved: &'a mut BTreeSet<Arc<str>>,
    /// Share partitions in which a key waits for a settlement to be synced.
    pub(crate) uncommitted: &'a mut BTreeSet<(Arc<str>, PartitionKey)>,
    pub(crate) acks: &'a mut OpenAcks,
}

impl Stage<'_> {
    /// Stages an event that was applied already.
    pub(crate) fn event(&mut self, kind: Kind) {
        self.out.events.push(Event { kind: Some(kind) });
    }

    /// Names `count` new leases; answers the first.
    pub(crate) fn next_leases(&mut self, count: usize) -> LeaseId {
        let first = LeaseId { boot_epoch: self.boot_epoch, sequence: *self.next_sequence };
        if !planted("reuse-lease-id") {
            *self.next_sequence += count as u64;
        }
        first
    }
}
