//! One leased record and what can be done with it.

use std::fmt::Display;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::message::{self, Outcome, RecordState, SettleStatus, SettlementDetail};
use uuid::Uuid;

use super::complete::complete;
use super::settler::{Settler, Waiting};
use crate::error::Result;
use crate::record::{ConsumedRecord, Record};

/// What the broker keeps of each; the rest need not be sent.
const MAX_CLASS_BYTES: usize = 128;
const MAX_REASON_BYTES: usize = 1024;
const MAX_DETAIL_BYTES: usize = 8192;

/// The name of a lease. A settlement under it can never touch a later delivery of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub(crate) topic_id: Uuid,
    pub(crate) partition: u32,
    pub(crate) offset: u64,
    pub boot_epoch: u64,
    pub sequence: u64,
}

impl Lease {
    pub(super) fn topic_id_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self.topic_id.as_bytes())
    }

    pub(super) fn to_message(self) -> message::LeaseRef {
        message::LeaseRef {
            topic_id: self.topic_id_bytes(),
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
    /// Instead of the group's backoff. At most 7 days; the broker cuts what is beyond.
    pub delay: Option<Duration>,
    /// A name for this kind of error; the group's settings can make classes final. At most 128 bytes are kept.
    pub class: String,
    /// One line, of which 1 KiB is kept.
    pub reason: String,
    /// More, of which 8 KiB are kept.
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

impl Nack {
    /// A failure of this class, retried after the group's backoff.
    pub fn new(class: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { class: class.into(), reason: reason.into(), ..Self::default() }
    }

    /// Instead of the group's backoff; at most 7 days.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    pub(super) fn into_detail(self) -> SettlementDetail {
        SettlementDetail {
            delay_ms: self.delay.map(milliseconds),
            not_counted: !self.counted,
            ..described(self.class, self.reason, self.detail)
        }
    }
}

/// Never try again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reject {
    /// A name for this kind of error. At most 128 bytes are kept.
    pub class: String,
    /// One line, of which 1 KiB is kept.
    pub reason: String,
    /// More, of which 8 KiB are kept.
    pub detail: String,
}

impl Reject {
    /// A failure of this class that no retry can help.
    pub fn new(class: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { class: class.into(), reason: reason.into(), detail: String::new() }
    }

    /// The record's content cannot be understood: class `undecodable`.
    pub fn undecodable(why: impl Display) -> Self {
        Self::new("undecodable", why.to_string())
    }

    pub(super) fn into_detail(self) -> SettlementDetail {
        described(self.class, self.reason, self.detail)
    }
}

fn described(mut class: String, mut reason: String, mut detail: String) -> SettlementDetail {
    class.truncate(class.floor_char_boundary(MAX_CLASS_BYTES));
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
    detail.truncate(detail.floor_char_boundary(MAX_DETAIL_BYTES));
    SettlementDetail { class, reason, detail, ..SettlementDetail::default() }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
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
    pub(super) fn from_message(result: &message::SettleResult) -> Self {
        let state = Some(result.state()).filter(|state| *state != RecordState::Unspecified);
        Self { status: result.status(), state, remaining: Duration::from_millis(result.remaining_ms) }
    }

    /// Whether the settlement holds: carried out now, before, or late but in time. Otherwise the lease had ended (`Stale`,
    /// `Gone`, `Fenced`), or the record was settled otherwise.
    pub fn is_done(&self) -> bool {
        matches!(self.status, SettleStatus::Ok | SettleStatus::Duplicate | SettleStatus::Late)
    }
}

/// A leased record. Each settling call waits for the broker's answer, over reconnects too, at most for two minutes; when its
/// future is dropped the settlement may still be carried out. A delivery dropped unsettled is released.
///
/// ```no_run
/// use felucca_client::{Client, Nack, Result};
///
/// # fn charge(_: Option<&[u8]>) -> std::result::Result<(), String> { Ok(()) }
/// # async fn example(client: Client) -> Result<()> {
/// let mut member = client.share_consumer("payment").build().await?;
/// let delivery = member.next().await?;
/// let settled = match charge(delivery.value.as_deref()) {
///     Ok(()) => delivery.ack().await?,
///     Err(reason) => delivery.nack(Nack { reason, ..Nack::default() }).await?,
/// };
/// assert!(settled.is_done());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Delivery {
    pub(super) record: ConsumedRecord,
    pub lease: Lease,
    /// How often the record was handed out, this time included.
    pub delivery_count: u32,
    /// How often it failed before.
    pub failure_count: u32,
    /// The lease's whole time as granted.
    pub lease_duration: Duration,
    pub(super) settler: Arc<Settler>,
    /// Nothing is to be done when it is dropped: it was settled, or a worker settles it.
    pub(super) settled: bool,
}

impl Deref for Delivery {
    type Target = ConsumedRecord;

    fn deref(&self) -> &ConsumedRecord {
        &self.record
    }
}

impl Delivery {
    /// The record.
    pub fn record(&self) -> &ConsumedRecord {
        &self.record
    }

    /// Whether the lease is known to have ended (the broker said so, or its time is over), or to be settled: what is still
    /// done for this record may be done by another member as well.
    pub fn lease_is_lost(&self) -> bool {
        !self.settler.core.leases.is_held(&self.lease)
    }

    /// Returns when [`Delivery::lease_is_lost`]: what work that cannot be cancelled from outside watches to stop in time. A
    /// worker drops a handler then anyway. Cancellation safe.
    pub async fn lease_lost(&self) {
        self.settler.core.leases.lost(&self.lease).cancelled().await;
    }

    fn settle(&mut self, outcome: Outcome, detail: Option<SettlementDetail>) -> Waiting {
        self.settled = true;
        self.settler.settle(&self.lease, outcome, detail)
    }

    /// Done: the record is not handed out to this group again.
    ///
    /// # Errors
    /// The outcome is unknown: the client was closed, or no answer came in time. That the lease had ended is no error but a
    /// status.
    pub async fn ack(mut self) -> Result<SettleResult> {
        self.settle(Outcome::Ack, None).result().await
    }

    /// Failed: to be tried again after the group's backoff or the given delay.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn nack(mut self, nack: Nack) -> Result<SettleResult> {
        self.settle(Outcome::Nack, Some(nack.into_detail())).result().await
    }

    /// Failed for good: to the dead-letter topic, or what the group's settings say.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn reject(mut self, reject: Reject) -> Result<SettleResult> {
        self.settle(Outcome::Reject, Some(reject.into_detail())).result().await
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
        let detail =
            SettlementDetail { remaining_ms: Some(milliseconds(remaining)), ..SettlementDetail::default() };
        self.settler.settle(&self.lease, Outcome::Extend, Some(detail)).result().await
    }

    /// Acknowledges the record and appends the outputs, both or neither. Outputs with a key go to the key's partition.
    ///
    /// # Errors
    /// As [`Delivery::ack`], or an output cannot be sent as it is; the record is then released.
    pub async fn complete(mut self, outputs: Vec<Record>) -> Result<SettleResult> {
        let result = complete(&self.settler.core, &self.lease, &outputs).await?;
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
