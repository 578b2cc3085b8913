//! What has left the broker: it cannot be taken back, whatever happens to the machine.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::types::{LeaseId, Level, PartitionKey};

/// A fact that a reply told.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    /// These records are at these offsets.
    Stored { key: PartitionKey, base: u64, identities: Vec<u64> },
    /// The log starts there, or above.
    Deleted { key: PartitionKey, log_start: u64 },
    /// The record is done with in this group: never to be handed out again (before a seek).
    Done { group: String, key: PartitionKey, instance: u64, offset: u64 },
}

#[derive(Clone, Debug)]
struct Told {
    fact: Fact,
    lsn: u64,
    level: Level,
}

/// A group's life on a partition from one seek to the next: (group, partition, instance).
type Place = (String, PartitionKey, u64);

#[derive(Debug, Default)]
pub(crate) struct Promises {
    told: Vec<Told>,
    /// What was ever shown at an offset.
    shown: BTreeMap<(PartitionKey, u64), u64>,
    /// Where each lease was granted: its place and offset.
    leases: BTreeMap<LeaseId, (Place, u64)>,
    /// The newest record of each key slot that a member has seen.
    newest: BTreeMap<(Place, u16), u64>,
    /// (deliveries, failures) that a member was told, and in which frame.
    counts: BTreeMap<(Place, u64), (u32, u32, u64)>,
    done: BTreeSet<(Place, u64)>,
}

impl Promises {
    pub(crate) fn tell(&mut self, fact: Fact, lsn: u64, level: Level) {
        match &fact {
            Fact::Stored { key, base, identities } => {
                for (offset, identity) in (*base..).zip(identities) {
                    self.show(*key, offset, *identity);
                }
            }
            Fact::Deleted { .. } => {}
            Fact::Done { group, key, instance, offset } => {
                self.done.insert(((group.clone(), *key, *instance), *offset));
            }
        }
        self.told.push(Told { fact, lsn, level });
    }

    pub(crate) fn show(&mut self, key: PartitionKey, offset: u64, identity: u64) {
        let before = self.shown.insert((key, offset), identity);
        assert!(
            before.is_none_or(|before| before == identity),
            "offset {offset} of {key} was shown with another record"
        );
    }

    /// A record gets this offset now: nobody may have seen the offset before.
    pub(crate) fn mint(&self, key: PartitionKey, offset: u64) {
        assert!(!self.shown.contains_key(&(key, offset)), "offset {offset} of {key} is minted twice");
    }

    /// A lease is made: its name must be new.
    pub(crate) fn name_lease(&mut self, lease: LeaseId, place: Place, offset: u64) {
        let before = self.leases.insert(lease, (place, offset));
        assert!(
            before.is_none(),
            "lease {lease:?} named twice: {before:?} and now {:?}",
            self.leases[&lease]
        );
    }

    /// The group and the instance under which a lease was granted.
    pub(crate) fn place_of(&self, lease: LeaseId) -> Option<(String, u64)> {
        let ((group, _, instance), _) = self.leases.get(&lease)?;
        Some((group.clone(), *instance))
    }

    /// The instance under which the lease was granted, if it was granted on this record.
    pub(crate) fn instance_of(
        &self,
        lease: LeaseId,
        group: &str,
        key: PartitionKey,
        offset: u64,
    ) -> Option<u64> {
        let ((named, partition, instance), at) = self.leases.get(&lease)?;
        ((named.as_str(), *partition, *at) == (group, key, offset)).then_some(*instance)
    }

    /// A leased record leaves for its member.
    pub(crate) fn deliver(
        &mut self,
        place: Place,
        offset: u64,
        counts: (u32, u32),
        lsn: u64,
        slot: Option<u16>,
    ) {
        let record = (place.clone(), offset);
        assert!(!self.done.contains(&record), "handed out again after its ack was confirmed: {record:?}");
        if let Some((deliveries, failures, _)) = self.counts.get(&record) {
            assert!(
                *deliveries < counts.0 && *failures <= counts.1,
                "counts of {record:?} fell from {deliveries}, {failures} to {counts:?}"
            );
        }
        self.counts.insert(record, (counts.0, counts.1, lsn));
        if let Some(slot) = slot {
            let newest = self.newest.entry((place.clone(), slot)).or_insert(offset);
            assert!(*newest <= offset, "{place:?}: {offset} is shown after {newest} of its key");
            *newest = offset;
        }
    }

    /// The record begins anew, as if it had never failed.
    pub(crate) fn forget_failures(&mut self, record: &(Place, u64)) {
        if let Some((_, failures, _)) = self.counts.get_mut(record) {
            *failures = 0;
        }
    }

    /// The order of keys begins anew there.
    pub(crate) fn forget_order(&mut self, group: &str) {
        self.newest.retain(|((name, _, _), _), _| name != group);
    }

    /// Frames up to `survived` are there, the others are not. Answers the facts that must hold.
    pub(crate) fn crash(&mut self, survived: u64) -> Vec<Fact> {
        self.told.retain(|told| {
            let lost = told.lsn > survived;
            assert!(!lost || told.level == Level::Written, "told too early: {told:?}");
            !lost
        });
        self.done.clear();
        for told in &self.told {
            if let Fact::Done { group, key, instance, offset } = &told.fact {
                self.done.insert(((group.clone(), *key, *instance), *offset));
            }
        }
        self.counts.retain(|_, (_, _, lsn)| *lsn <= survived);
        self.told.iter().map(|told| told.fact.clone()).collect()
    }
}
