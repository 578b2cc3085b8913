//! What leaves the broker, and when: what needs a written frame, then what needs a synced one.

use felucca_broker::engine::command::LeaseRef;
use felucca_broker::engine::effect::{Advance, Delivery, PendingReply};
use felucca_broker::engine::types::{LeaseId, Level, Lsn};

use super::world::{Held, World};

/// A turn's effects that have not left yet.
#[derive(Debug)]
pub(crate) struct Pending {
    /// They depend on frames up to this one.
    pub(crate) lsn: Lsn,
    pub(crate) advances: Vec<Advance>,
    pub(crate) replies: Vec<PendingReply>,
    pub(crate) deliveries: Vec<Delivery>,
}

impl World {
    /// Lets go what the written and synced frames allow.
    pub(crate) fn release(&mut self) {
        let (written, synced) = (self.written(), self.synced);
        for mut pending in std::mem::take(&mut self.pending) {
            let reached =
                |level: Level| pending.lsn <= if level == Level::Written { written } else { synced };
            let (leaving, staying): (Vec<_>, Vec<_>) =
                std::mem::take(&mut pending.deliveries).into_iter().partition(|_| reached(Level::Written));
            let (shown, hidden): (Vec<_>, Vec<_>) =
                std::mem::take(&mut pending.advances).into_iter().partition(|a| reached(a.level));
            let (told, untold): (Vec<_>, Vec<_>) =
                std::mem::take(&mut pending.replies).into_iter().partition(|r| reached(r.level));
            for delivery in leaving {
                self.deliver(&delivery, pending.lsn);
            }
            for advance in shown {
                self.show(&advance);
            }
            for reply in told {
                for fact in self.facts.remove(&reply.request).unwrap_or_default() {
                    self.promises.tell(fact, pending.lsn, reply.level);
                }
            }
            if !(staying.is_empty() && hidden.is_empty() && untold.is_empty()) {
                (pending.deliveries, pending.advances, pending.replies) = (staying, hidden, untold);
                self.pending.push_back(pending);
            }
        }
    }

    fn show(&mut self, advance: &Advance) {
        let Some(records) = self.logs.records.get(&advance.partition) else { return };
        for (offset, (entry, _)) in records.range(..advance.high_watermark) {
            self.promises.show(advance.partition, *offset, entry.identity);
        }
    }

    fn deliver(&mut self, delivery: &Delivery, lsn: Lsn) {
        let subscription = self.live.subscriptions.get(&delivery.subscription).cloned();
        for (i, record) in delivery.records.iter().enumerate() {
            let lease = nth(delivery.first_lease, i);
            let Some((group, instance)) = self.promises.place_of(lease) else { continue };
            let (key, offset) = (delivery.partition, record.offset);
            let ordered = self.model.shares.get(&group).is_some_and(|share| share.config.ordered);
            let Some((entry, _)) = self.logs.records.get(&key).and_then(|records| records.get(&offset))
            else {
                continue;
            };
            self.promises.show(key, offset, entry.identity);
            let counts = (record.deliveries, record.failures);
            let slot = entry.slot.filter(|_| ordered);
            self.promises.deliver((group.clone(), key, instance), offset, counts, lsn, slot);
            let record = LeaseRef { partition: key, offset, lease };
            match &subscription {
                Some(subscription) => {
                    let member = subscription.member.clone();
                    self.held.push(Held { group, member, record });
                }
                None => self.archive.push(Held { group, member: "nobody".to_owned(), record }),
            }
        }
    }
}

/// The i-th of leases that were named together.
pub(crate) fn nth(first: LeaseId, i: usize) -> LeaseId {
    LeaseId { boot_epoch: first.boot_epoch, sequence: first.sequence + i as u64 }
}
