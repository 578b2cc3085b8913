//! One leased record and what can be done with it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::message::{self, Outcome, RecordState, SettleStatus, Settlement, SettlementDetail};

use super::settler::{Settler, Waiting};
use crate::error::Result;
use crate::record::{ConsumedRecord, Record};

/// The name of a lease. A settlement under it can never touch a later delivery of the record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub(crate) topic_id: Bytes,
    pub(crate) partition: u32,
    pub(crate) offset: u64,
    pub boot_epoch: u64,
    pub sequence: u64,
}

impl Lease {
    pub(crate) fn to_message(&self) -> message::LeaseRef {
        message::LeaseRef {
            topic_id: self.topic_id.clone(),
            partition: self.partition,
            offset: self.offset,
            boot_epoch: self.boot_epoch,
            sequence: self.sequence,
        }
    }
}

/// Try again later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nack {
    /// Instead of the group's backoff.
    pub delay: Option<Duration>,
    /// A name for this kind of error; the group's settings can make classes final.
    pub class: String,
    pub reason: String,
    pub detail: String,
    /// Whether it counts as a failure.
    pub counted: bool,
}

impl Default for Nack {
    fn default() -> Self {
        Self {
            delay: None,
            class: String::new(),
            reason: String::new(),
            detail: String::new(),
            counted: true,
        }
    }
}

/// Never try again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reject {
    pub class: String,
    pub reason: String,
    pub detail: String,
}

/// What the broker answered to a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettleResult {
    pub status: SettleStatus,
    /// What became of the record, where the broker says so.
    pub state: Option<RecordState>,
    /// Until the record is tried again, or until the extended lease ends.
    pub remaining: Duration,
}

impl SettleResult {
    pub(crate) fn from_message(result: &message::SettleResult) -> Self {
        let state = Some(result.state()).filter(|state| *state != RecordState::Unspecified);
        Self { status: result.status(), state, remaining: Duration::from_millis(result.remaining_ms) }
    }

    /// Whether the settlement holds: carried out now, before, or late but in time.
    pub fn is_done(&self) -> bool {
        matches!(self.status, SettleStatus::Ok | SettleStatus::Duplicate | SettleStatus::Late)
    }
}

/// A leased record. Each settling call waits for the broker's answer, over reconnects too; when its future is dropped the
/// settlement may still be carried out. A delivery dropped unsettled is released.
#[derive(Debug)]
pub struct Delivery {
    pub(crate) record: ConsumedRecord,
    pub lease: Lease,
    /// How often the record was handed out, this time included.
    pub delivery_count: u32,
    /// How often it failed before.
    pub failure_count: u32,
    /// The lease's whole time as granted.
    pub lease_duration: Duration,
    pub(crate) settler: Arc<Settler>,
    pub(crate) settled: bool,
}

impl Deref for Delivery {
    type Target = ConsumedRecord;

    fn deref(&self) -> &ConsumedRecord {
        &self.record
    }
}

pub(crate) fn settlement(lease: &Lease, outcome: Outcome, detail: Option<SettlementDetail>) -> Settlement {
    Settlement { offset: lease.offset, sequence: lease.sequence, outcome: outcome.into(), detail }
}

impl Delivery {
    /// The record without its lease: it is released.
    pub fn record(&self) -> &ConsumedRecord {
        &self.record
    }

    /// Another handle on the same lease. Neither releases it when dropped: a worker settles it, or its lease runs out.
    pub(crate) fn hand_over(&mut self) -> Self {
        self.settled = true;
        Self {
            record: self.record.clone(),
            lease: self.lease.clone(),
            delivery_count: self.delivery_count,
            failure_count: self.failure_count,
            lease_duration: self.lease_duration,
            settler: self.settler.clone(),
            settled: true,
        }
    }

    fn settle(&mut self, outcome: Outcome, detail: Option<SettlementDetail>) -> Waiting {
        self.settled = true;
        self.settler.settle(self.lease.clone(), settlement(&self.lease, outcome, detail))
    }

    /// Done: the record is not handed out to this group again.
    ///
    /// # Errors
    /// The outcome is unknown: the client was closed, or no answer came in time.
    pub async fn ack(mut self) -> Result<SettleResult> {
        self.settle(Outcome::Ack, None).result().await
    }

    /// Failed: to be tried again after the group's backoff or the given delay.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn nack(mut self, nack: Nack) -> Result<SettleResult> {
        let detail = SettlementDetail {
            delay_ms: nack.delay.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)),
            class: nack.class,
            reason: nack.reason,
            detail: nack.detail,
            not_counted: !nack.counted,
        };
        self.settle(Outcome::Nack, Some(detail)).result().await
    }

    /// Failed for good: to the dead-letter topic, or what the group's settings say.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn reject(mut self, reject: Reject) -> Result<SettleResult> {
        let Reject { class, reason, detail } = reject;
        let detail = SettlementDetail { class, reason, detail, ..SettlementDetail::default() };
        self.settle(Outcome::Reject, Some(detail)).result().await
    }

    /// Not started: available again at once, without a failure.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn release(mut self) -> Result<SettleResult> {
        self.settle(Outcome::Release, None).result().await
    }

    /// Gives the lease a new remaining time; never shortens it.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn extend(&self, remaining: Duration) -> Result<SettleResult> {
        let delay_ms = Some(u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX));
        let detail = SettlementDetail { delay_ms, ..SettlementDetail::default() };
        self.settler
            .settle(self.lease.clone(), settlement(&self.lease, Outcome::Extend, Some(detail)))
            .result()
            .await
    }

    /// Acknowledges the record and appends the outputs, both or neither.
    ///
    /// # Errors
    /// As [`Delivery::ack`], or an output cannot be sent as it is.
    pub async fn complete(mut self, outputs: Vec<Record>) -> Result<SettleResult> {
        let settler = self.settler.clone();
        let result = settler.complete(&self.lease, &outputs).await?;
        self.settled = true;
        Ok(result)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.settled {
            self.settle(Outcome::Release, None).forget();
        }
    }
}
