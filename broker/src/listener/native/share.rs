//! The share subscriptions of one connection: which are open, and how leased records become `LeasedRecords` pushes.
//!
//! The shard says which offsets are leased; their bytes are read here, from memory at once, from disk in a task of their
//! own. A record that cannot be read is nacked in the member's name, so that backoff and the group's limits decide what
//! becomes of it; the records leased beside it are released.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use felucca_protocol::Api;
use felucca_protocol::batch::BatchHeader;
use felucca_protocol::message as wire;
use parking_lot::Mutex;

use super::convert;
use super::outbox::{OutFrame, Outbox};
use crate::broker::Broker;
use crate::engine::command::{Command, FailureDetail, LeaseRef, Outcome, Settlement};
use crate::engine::effect::{Delivery, Reply};
use crate::engine::types::{LeaseId, Level, SubscriptionId};
use crate::log::{ExactReadError, ReadView};
use crate::shard::{Submission, Token};

/// Payload of one push, unless a single batch is larger.
const PUSH_BYTES: usize = 1 << 20;

#[derive(Debug)]
struct Entry {
    /// The client's name for it.
    id: u64,
    member: Arc<Member>,
    /// The subscribing request, until it is answered: nothing is pushed before.
    opening: Option<u64>,
    waiting: Vec<Delivery>,
}

#[derive(Debug)]
struct Member {
    group: String,
    member: String,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Shares {
    broker: Broker,
    entries: Mutex<HashMap<SubscriptionId, Entry>>,
}

impl Shares {
    pub(super) fn new(broker: Broker) -> Self {
        Self { broker, entries: Mutex::default() }
    }

    /// Notes a subscription that is being opened by request `correlation`.
    pub(super) fn open(&self, id: u64, group: &str, member: &str, correlation: u64) -> SubscriptionId {
        let subscription = self.broker.new_subscription();
        let member = Arc::new(Member { group: group.to_owned(), member: member.to_owned() });
        let entry = Entry { id, member, opening: Some(correlation), waiting: Vec::new() };
        self.entries.lock().insert(subscription, entry);
        subscription
    }

    pub(super) fn find(&self, id: u64) -> Option<SubscriptionId> {
        self.entries.lock().iter().find(|(_, entry)| entry.id == id).map(|(subscription, _)| *subscription)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.lock().len()
    }

    /// Forgets a subscription; its leases stay with the member.
    pub(super) fn close(&self, subscription: SubscriptionId) {
        self.entries.lock().remove(&subscription);
    }

    /// Forgets all subscriptions and names them.
    pub(super) fn close_all(&self) -> Vec<SubscriptionId> {
        self.entries.lock().drain().map(|(subscription, _)| subscription).collect()
    }

    /// Group and member of each open subscription.
    pub(super) fn members(&self) -> Vec<(String, String)> {
        let entries = self.entries.lock();
        entries.values().map(|entry| (entry.member.group.clone(), entry.member.member.clone())).collect()
    }

    /// Takes note of an answer before it is sent: when it opens a subscription, returns what was leased to it already.
    pub(super) fn answered(&self, token: Token, reply: &Reply) -> Vec<Delivery> {
        if token.tag != u8::from(Api::ShareSubscribe) {
            return Vec::new();
        }
        let mut entries = self.entries.lock();
        let opened = entries.iter().find(|(_, entry)| entry.opening == Some(token.correlation));
        let Some(subscription) = opened.map(|(subscription, _)| *subscription) else { return Vec::new() };
        if matches!(reply, Reply::Error(_)) {
            entries.remove(&subscription);
            return Vec::new();
        }
        let Some(entry) = entries.get_mut(&subscription) else { return Vec::new() };
        entry.opening = None;
        std::mem::take(&mut entry.waiting)
    }

    /// The broker ended a subscription: forgets it and returns the client's name for it.
    pub(super) fn ended(&self, subscription: SubscriptionId) -> Option<u64> {
        self.entries.lock().remove(&subscription).map(|entry| entry.id)
    }

    /// The pushes for leased records; `None` when they will be queued later, or there is nobody to push to.
    pub(super) fn deliver(&self, outbox: &Arc<Outbox>, delivery: Delivery) -> Option<Vec<OutFrame>> {
        let (id, member) = {
            let mut entries = self.entries.lock();
            let entry = entries.get_mut(&delivery.subscription)?;
            if entry.opening.is_some() {
                entry.waiting.push(delivery);
                return None;
            }
            (entry.id, entry.member.clone())
        };
        let view = match self.broker.view(delivery.partition) {
            Ok(view) => view,
            Err(error) => {
                // The topic was deleted meanwhile, and the leases with it.
                tracing::debug!(partition = %delivery.partition, %error, "leased records are gone");
                return None;
            }
        };
        let reading = Reading { broker: self.broker.clone(), id, member, view, delivery };
        let offsets: Vec<u64> = reading.delivery.records.iter().map(|record| record.offset).collect();
        if let Some(read) = reading.view.read_exactly_from_memory(&offsets).transpose() {
            return Some(reading.frames(read));
        }
        let outbox = outbox.clone();
        // Ends by itself: the disk answers, and the outbox has room or is closed. In this order: whoever has a turn at the
        // disk never waits for the outbox.
        tokio::spawn(async move {
            let _turn = outbox.room().await;
            let read = reading.view.read_exactly(offsets).await;
            for frame in reading.frames(read) {
                outbox.send(frame);
            }
        });
        None
    }

    /// As [`Self::deliver`], queueing the pushes.
    pub(super) fn send(&self, outbox: &Arc<Outbox>, delivery: Delivery) {
        for frame in self.deliver(outbox, delivery).into_iter().flatten() {
            outbox.send(frame);
        }
    }
}

/// Leased records that are being read.
#[derive(Debug)]
struct Reading {
    broker: Broker,
    id: u64,
    member: Arc<Member>,
    view: Arc<ReadView>,
    delivery: Delivery,
}

impl Reading {
    /// The pushes for what was read. None when it cannot be read.
    fn frames(&self, read: Result<Vec<Bytes>, ExactReadError>) -> Vec<OutFrame> {
        let error = match read {
            Ok(batches) => return frames(self.id, &self.delivery, batches),
            Err(error) => error,
        };
        let (topic, partition, group) = (self.view.topic(), self.delivery.partition, &self.member.group);
        tracing::error!(%topic, %partition, %error, group, "cannot read leased records");
        let detail = FailureDetail {
            class: "unreadable".to_owned(),
            reason: "the broker cannot read the record".to_owned(),
            detail: error.to_string(),
        };
        self.broker.submit([give_back(&self.member, &self.delivery, error.offset(), &detail)]);
        Vec::new()
    }
}

/// Nacks the record at `broken` and releases the others.
fn give_back(member: &Member, delivery: &Delivery, broken: u64, detail: &FailureDetail) -> Submission {
    let settlements =
        delivery.records.iter().zip(delivery.first_lease.sequence..).map(|(record, sequence)| {
            let lease = LeaseId { boot_epoch: delivery.first_lease.boot_epoch, sequence };
            let outcome = if record.offset == broken {
                Outcome::Nack { delay_ms: None, counted: true, detail: detail.clone() }
            } else {
                Outcome::Release
            };
            Settlement {
                record: LeaseRef { partition: delivery.partition, offset: record.offset, lease },
                outcome,
            }
        });
    Submission::silent(Command::Settle {
        group: member.group.clone(),
        member: member.member.clone(),
        level: Level::Written,
        settlements: settlements.collect(),
    })
}

/// One push for as many batches as fit it.
fn frames(id: u64, delivery: &Delivery, batches: Vec<Bytes>) -> Vec<OutFrame> {
    let mut frames = Vec::new();
    let mut first = 0;
    let mut count = 0;
    let mut payload: Vec<Bytes> = Vec::new();
    let mut bytes = 0;
    for batch in batches {
        let records = BatchHeader::parse(&batch).map_or(0, |header| header.record_count as usize);
        if !payload.is_empty() && bytes + batch.len() > PUSH_BYTES {
            frames.push(frame(id, delivery, first, count, std::mem::take(&mut payload)));
            first += count;
            (count, bytes) = (0, 0);
        }
        count += records;
        bytes += batch.len();
        payload.push(batch);
    }
    if !payload.is_empty() {
        frames.push(frame(id, delivery, first, count, payload));
    }
    frames
}

fn frame(id: u64, delivery: &Delivery, first: usize, count: usize, payload: Vec<Bytes>) -> OutFrame {
    let records = delivery.records.iter().skip(first).take(count);
    let mut push = wire::LeasedRecords {
        subscription: id,
        topic_id: Bytes::copy_from_slice(&delivery.partition.topic.0),
        partition: delivery.partition.partition,
        boot_epoch: delivery.first_lease.boot_epoch,
        first_sequence: delivery.first_lease.sequence + first as u64,
        lease_ms: u32::try_from(delivery.lease_ms).unwrap_or(u32::MAX),
        delivery_counts: records.clone().map(|record| record.deliveries).collect(),
        failure_counts: records.map(|record| record.failures).collect(),
    };
    if push.delivery_counts.iter().all(|count| *count == 1) {
        push.delivery_counts.clear();
    }
    if push.failure_counts.iter().all(|count| *count == 0) {
        push.failure_counts.clear();
    }
    let bytes = payload.iter().map(Bytes::len).sum();
    OutFrame { head: convert::push_frame(Api::LeasedRecords, id, &push, bytes), payload, origin: None }
}

#[cfg(test)]
mod tests {
    use felucca_protocol::batch::{self, BatchBuilder};
    use felucca_protocol::frame as envelope;

    use super::*;
    use crate::engine::effect::DeliveredRecord;
    use crate::engine::types::{PartitionKey, TopicId};

    #[test]
    fn leases_follow_the_records_over_several_pushes() {
        let batch_of = |base: u64, count: u64, size: usize| {
            let mut builder = BatchBuilder::new();
            for _ in 0..count {
                builder.push(0, None, Some(&vec![7; size]), &[]).unwrap();
            }
            let mut bytes = builder.finish();
            batch::assign(&mut bytes, base, 0);
            bytes.freeze()
        };
        let batches = vec![batch_of(0, 3, 300_000), batch_of(3, 2, 100_000), batch_of(5, 1, 10)];
        let delivery = Delivery {
            subscription: SubscriptionId(9),
            partition: PartitionKey { topic: TopicId([1; 16]), partition: 2 },
            first_lease: LeaseId { boot_epoch: 4, sequence: 100 },
            lease_ms: 30_000,
            records: (0..6)
                .map(|offset| DeliveredRecord { offset, deliveries: 1 + u32::from(offset == 5), failures: 0 })
                .collect(),
        };
        let pushes: Vec<wire::LeasedRecords> = frames(77, &delivery, batches)
            .into_iter()
            .map(|frame| {
                let mut bytes = frame.head;
                frame.payload.iter().for_each(|batch| bytes.extend_from_slice(batch));
                let frame = envelope::decode(&mut bytes, u32::MAX).unwrap().unwrap();
                assert_eq!(frame.correlation, 77);
                frame.decode_message().unwrap()
            })
            .collect();
        assert_eq!(pushes.len(), 2);
        assert_eq!(pushes[0].first_sequence, 100);
        assert!(pushes[0].delivery_counts.is_empty());
        assert_eq!(pushes[1].first_sequence, 103);
        assert_eq!(pushes[1].delivery_counts, [1, 1, 2]);
        assert!(pushes[1].failure_counts.is_empty());
    }
}
