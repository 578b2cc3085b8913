//! Share groups: consuming a topic as a queue, record by record, with leases, retries and dead letters.
//!
//! [`state`] is the fold of events and knows what became of each record; [`queue`] derives from it what may be handed out,
//! with [`chains`] for the order of keys and [`deadlines`] for what is due; [`budget`] bounds the memory of all of it;
//! [`settle`] decides what a settlement does (the reply table), for repetitions with the help of [`recent`]; [`holders`]
//! knows who holds what and [`outage`] tells when all fail; [`group`] ties them to members, credit and timers.

pub(crate) mod acks;
pub(crate) mod budget;
pub(crate) mod chains;
pub(crate) mod deadlines;
pub(crate) mod group;
pub(crate) mod holders;
pub(crate) mod outage;
pub(crate) mod queue;
pub(crate) mod recent;
pub(crate) mod settle;
pub(crate) mod state;
#[cfg(test)]
mod tests;

pub use group::ShareGroup;

/// The key slot of a record: records whose keys share a slot are kept in order as if they shared the key. Sixteen bits of
/// CRC-32 (not of the partitioner's hash, whose low bits are alike within a partition). Changing it is safe at a restart
/// only: slots of live leases and returned records are stored.
pub fn key_slot(key: &[u8]) -> u16 {
    // The truncation is the point: the low sixteen bits.
    (crc32fast::hash(key) & 0xffff) as u16
}
