//! The reference model: what the engine must have in mind after the same commands, told in the plainest way.
//!
//! [`Model`] is what must survive: it is copied with every frame, and after a crash the copy of the last frame that
//! survived is the truth. [`live::Live`] is what a restart forgets: sessions, credit, what is visible. Records that were
//! never handed out are in no list; a record that was has a [`share::Record`] for ever.

pub(crate) mod consumers;
pub(crate) mod guard;
pub(crate) mod live;
pub(crate) mod log;
pub(crate) mod settle;
pub(crate) mod share;
pub(crate) mod topics;

use std::collections::BTreeMap;
use std::rc::Rc;

use felucca_broker::engine::types::{PartitionKey, TopicId};

pub(crate) type Name = Rc<str>;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Model {
    pub(crate) topics: BTreeMap<TopicId, topics::Topic>,
    pub(crate) logs: BTreeMap<PartitionKey, log::Log>,
    pub(crate) next_producer: u64,
    pub(crate) shares: BTreeMap<String, share::Share>,
    pub(crate) consumers: BTreeMap<String, consumers::Consumer>,
}

/// What the model needs to know of the moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now_ms: u64,
    /// Number of the frame being staged.
    pub(crate) lsn: u64,
}
