//! The state of a share group on a partition as rows of a checkpoint, and the numbers in events. Both are persisted:
//! a number that was used is never used for anything else.

use roaring::RoaringTreemap;

use super::{Cause, Ended, Exception, ExceptionState, Lease, ShareState, change};
use crate::engine::event::{self, ShareRow};
use crate::engine::types::{LeaseId, TopicId};

impl Cause {
    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Nacked,
            2 => Self::Rejected,
            3 => Self::LeaseExpired,
            4 => Self::MemberLost,
            5 => Self::Released,
            _ => Self::None,
        }
    }
}

impl Ended {
    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            1 => Self::MaxFailures,
            2 => Self::MaxDeliveries,
            3 => Self::Rejected,
            4 => Self::LeaseExpired,
            5 => Self::MemberLost,
            _ => Self::Not,
        }
    }
}

/// A slot as it is stored: plus one, 0 = no key.
pub(crate) fn stored_slot(slot: Option<u16>) -> u32 {
    slot.map_or(0, |slot| u32::from(slot) + 1)
}

pub(crate) fn slot_from_stored(stored: u32) -> Option<u16> {
    stored.checked_sub(1).and_then(|slot| u16::try_from(slot).ok())
}

impl ShareState {
    pub(crate) fn to_row(&self, group: &str, topic: TopicId, partition: u32) -> ShareRow {
        let mut settled = Vec::with_capacity(self.settled.serialized_size());
        // Writing to memory cannot fail.
        let written = self.settled.serialize_into(&mut settled);
        debug_assert!(written.is_ok());
        ShareRow {
            group: group.to_owned(),
            topic_id: topic.0.to_vec(),
            partition,
            low: self.low,
            settled,
            exceptions: self.exceptions.iter().map(|(offset, exception)| exception.to_row(*offset)).collect(),
            leases: self.leases.iter().map(|(offset, lease)| lease.to_row(*offset)).collect(),
            counts: Some(self.counts),
            fence_boot_epoch: self.fence.boot_epoch,
            fence_sequence: self.fence.sequence,
        }
    }

    pub(crate) fn from_row(row: &ShareRow) -> Result<Self, String> {
        let fence = LeaseId { boot_epoch: row.fence_boot_epoch, sequence: row.fence_sequence };
        let mut state = Self::new(row.low, fence);
        state.settled = RoaringTreemap::deserialize_from(row.settled.as_slice())
            .map_err(|error| format!("settled offsets of group {:?}: {error}", row.group))?;
        state.settled_len = state.settled.len();
        state.counts = row.counts.unwrap_or_default();
        for exception in &row.exceptions {
            let value = Exception::from_row(exception);
            match value.state {
                ExceptionState::Scheduled { .. } => state.scheduled += 1,
                ExceptionState::Held => state.held += 1,
                ExceptionState::Exhausted => state.exhausted += 1,
                ExceptionState::Available | ExceptionState::Leased => {}
            }
            state.text_bytes += value.text_bytes();
            state.exceptions.insert(exception.offset, value);
        }
        for lease in &row.leases {
            state.leases.insert(lease.offset, Lease::from_row(lease));
        }
        Ok(state)
    }
}

impl Exception {
    fn to_row(&self, offset: u64) -> event::ExceptionRow {
        let (state, due_ms) = match self.state {
            ExceptionState::Available => (change::AVAILABLE, 0),
            ExceptionState::Scheduled { due_ms } => (change::SCHEDULED, due_ms),
            ExceptionState::Exhausted => (change::EXHAUSTED, 0),
            ExceptionState::Held => (change::HELD, 0),
            ExceptionState::Leased => (change::LEASED, 0),
        };
        event::ExceptionRow {
            offset,
            state,
            due_ms,
            deliveries: self.deliveries,
            spared: self.spared,
            failures: self.failures,
            slot: stored_slot(self.slot),
            size: self.size,
            lease_boot_epoch: self.last_lease.boot_epoch,
            lease_sequence: self.last_lease.sequence,
            member: self.member.to_string(),
            first_delivery_wall_ms: self.first_delivery_wall_ms,
            last_delivery_wall_ms: self.last_delivery_wall_ms,
            cause: self.cause as u32,
            ended: self.ended as u32,
            alone: self.alone,
            class: self.class.clone(),
            reason: self.reason.clone(),
            detail: self.detail.clone(),
        }
    }

    fn from_row(row: &event::ExceptionRow) -> Self {
        Self {
            state: match row.state {
                change::SCHEDULED => ExceptionState::Scheduled { due_ms: row.due_ms },
                change::EXHAUSTED => ExceptionState::Exhausted,
                change::HELD => ExceptionState::Held,
                change::LEASED => ExceptionState::Leased,
                _ => ExceptionState::Available,
            },
            deliveries: row.deliveries,
            spared: row.spared,
            failures: row.failures,
            slot: slot_from_stored(row.slot),
            size: row.size,
            last_lease: LeaseId { boot_epoch: row.lease_boot_epoch, sequence: row.lease_sequence },
            member: row.member.as_str().into(),
            first_delivery_wall_ms: row.first_delivery_wall_ms,
            last_delivery_wall_ms: row.last_delivery_wall_ms,
            cause: Cause::from_code(row.cause),
            ended: Ended::from_code(row.ended),
            alone: row.alone,
            class: row.class.clone(),
            reason: row.reason.clone(),
            detail: row.detail.clone(),
        }
    }
}

impl Lease {
    fn to_row(&self, offset: u64) -> event::LeaseRow {
        event::LeaseRow {
            offset,
            boot_epoch: self.id.boot_epoch,
            sequence: self.id.sequence,
            member: self.member.to_string(),
            granted_ms: self.granted_ms,
            deadline_ms: self.deadline_ms,
            wall_ms: self.wall_ms,
            slot: stored_slot(self.slot),
            size: self.size,
        }
    }

    fn from_row(row: &event::LeaseRow) -> Self {
        Self {
            id: LeaseId { boot_epoch: row.boot_epoch, sequence: row.sequence },
            member: row.member.as_str().into(),
            granted_ms: row.granted_ms,
            deadline_ms: row.deadline_ms,
            wall_ms: row.wall_ms,
            slot: slot_from_stored(row.slot),
            size: row.size,
        }
    }
}
