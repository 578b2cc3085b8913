//! What has left the broker about share groups, and what follows from it.
//!
//! Rules: a lease names one delivery for ever (R4); a record has one live lease at a time, in a key-ordered group one of its
//! key; deliveries and failures never fall (R2); what was acknowledged or given up is not handed out again; a record of a key
//! is not handed out before those in front of it are done, and none is handed out again after a later one was (R5); an ack
//! is confirmed once, and only to the lease that was granted last.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::command::{LeaseRef, Outcome, Settlement};
use felucca_broker::engine::effect::{DeliveredRecord, RecordState, SettleResult, SettleStatus};
use felucca_broker::engine::types::{LeaseId, Level, Lsn, PartitionKey};

use super::content::LetterSource;
use super::history::History;

/// A record in a group: group, partition, offset.
pub(crate) type Spot = (String, PartitionKey, u64);

#[derive(Clone, Debug)]
struct Live {
    lease: LeaseId,
    member: String,
    deadline_ms: u64,
    /// It is sure to be as it is here once this frame is synced.
    needs: Lsn,
}

#[derive(Clone, Debug, Default)]
struct Known {
    /// (frame, deliveries, failures) as they were told.
    counts: Vec<(Lsn, u32, u32)>,
    live: Option<Live>,
    last: Option<(LeaseId, Lsn)>,
    /// Confirmed as done: not to be handed out again; and the frame that it needs.
    done: Option<(Lsn, &'static str)>,
    /// It was said to be dead-lettered.
    dead: bool,
    slot: Option<Vec<u8>>,
    /// What was asked with each lease.
    asked: BTreeMap<LeaseId, BTreeSet<&'static str>>,
}

/// What an answer to a settlement was about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told<'a> {
    /// When it was handed in.
    pub(crate) asked_ms: u64,
    /// The last frame written when the answer left.
    pub(crate) lsn: Lsn,
    pub(crate) level: Level,
    pub(crate) group: &'a str,
    pub(crate) member: &'a str,
    /// The lease was not the record's last when it was handed in.
    pub(crate) stale: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Leases {
    known: BTreeMap<Spot, Known>,
    /// Where each lease was granted, and to whom.
    names: BTreeMap<LeaseId, (Spot, String)>,
    /// When each member, (group, member), was last heard of.
    heard: BTreeMap<(String, String), u64>,
    /// Groups that hand records out by key.
    pub(crate) ordered: BTreeSet<String>,
    /// The newest record of each key that was handed out, (group, partition, key).
    newest: BTreeMap<(String, PartitionKey, Vec<u8>), u64>,
    /// Groups whose order or position was changed: keys and ends say nothing about what comes.
    pub(crate) moved: BTreeSet<String>,
    pub(crate) session_ms: u64,
}

/// What a delivery was about.
#[derive(Debug)]
pub(crate) struct Granted<'a> {
    pub(crate) group: &'a str,
    pub(crate) member: &'a str,
    pub(crate) key: PartitionKey,
    pub(crate) lease: LeaseId,
    pub(crate) lease_ms: u64,
    pub(crate) record: DeliveredRecord,
    pub(crate) slot: Option<Vec<u8>>,
}

impl Leases {
    /// A record is handed out. `lsn`: the frame in which it was granted, or a later one.
    pub(crate) fn grant(&mut self, now_ms: u64, lsn: Lsn, granted: Granted<'_>) {
        let Granted { group, member, key, lease, lease_ms, record, slot } = granted;
        let spot = (group.to_owned(), key, record.offset);
        let before = self.names.insert(lease, (spot.clone(), member.to_owned()));
        assert!(before.is_none(), "lease {lease:?} names two deliveries: {before:?} and {spot:?}");
        let known = self.known.entry(spot.clone()).or_default();
        if !self.moved.contains(group) {
            assert!(known.done.is_none(), "{spot:?} is handed out again, though it was {:?}", known.done);
        }
        if let Some((_, deliveries, failures)) = known.counts.last()
            && !self.moved.contains(group)
        {
            assert!(
                record.deliveries > *deliveries && record.failures >= *failures,
                "counts of {spot:?} fell from {deliveries}, {failures} to {record:?}"
            );
        }
        if let Some(live) = &known.live {
            let owner = (group.to_owned(), live.member.clone());
            let session_end = self.heard.get(&owner).copied().unwrap_or(0) + self.session_ms;
            let ends = live.deadline_ms.min(session_end);
            assert!(
                now_ms >= ends || known.may_have_ended(live.lease) || self.moved.contains(group),
                "{spot:?} is leased twice: {live:?} lives until {ends}, it is {now_ms}"
            );
        }
        known.counts.push((lsn, record.deliveries, record.failures));
        known.last = Some((lease, lsn));
        known.slot = slot.clone();
        let deadline_ms = now_ms + lease_ms;
        known.live = Some(Live { lease, member: member.to_owned(), deadline_ms, needs: lsn });
        if self.ordered.contains(group)
            && !self.moved.contains(group)
            && let Some(slot) = slot
        {
            self.check_key(now_ms, group, key, record.offset, &slot);
        }
    }

    fn check_key(&mut self, now_ms: u64, group: &str, key: PartitionKey, offset: u64, slot: &[u8]) {
        let newest = self.newest.entry((group.to_owned(), key, slot.to_vec())).or_insert(offset);
        assert!(*newest <= offset, "{group} {key}: {offset} is handed out after {newest} of its key");
        *newest = offset;
        let from = (group.to_owned(), key, 0);
        let to = (group.to_owned(), key, offset);
        for ((_, _, earlier), known) in self.known.range(from..to) {
            let in_flight = known.live.as_ref().is_some_and(|live| {
                let owner = (group.to_owned(), live.member.clone());
                let session_end = self.heard.get(&owner).copied().unwrap_or(0) + self.session_ms;
                now_ms < live.deadline_ms.min(session_end)
            });
            assert!(
                known.slot.as_deref() != Some(slot) || !in_flight || known.ended(),
                "{group} {key}: {offset} is handed out while {earlier} of its key is in flight"
            );
        }
    }

    /// The broker is given settlements. Returns which of them are about a lease that is not the record's last.
    pub(crate) fn asked(
        &mut self,
        now_ms: u64,
        group: &str,
        member: &str,
        settlements: &[Settlement],
    ) -> Vec<bool> {
        self.hear(now_ms, group, member);
        let mut stale = Vec::new();
        for settlement in settlements {
            let record = settlement.record;
            let spot = (group.to_owned(), record.partition, record.offset);
            let known = self.known.entry(spot).or_default();
            known.asked.entry(record.lease).or_default().insert(name_of(&settlement.outcome));
            stale.push(known.last.is_some_and(|(last, _)| last != record.lease));
        }
        stale
    }

    /// Something of the member arrived.
    pub(crate) fn hear(&mut self, now_ms: u64, group: &str, member: &str) {
        let before = self.heard.insert((group.to_owned(), member.to_owned()), now_ms);
        if before.is_some_and(|before| now_ms >= before + self.session_ms) {
            // It was lost meanwhile, or may have been, with all that it had.
            for ((name, _, _), known) in &mut self.known {
                known.live.take_if(|live| name == group && live.member == member);
            }
        }
    }

    /// A member says what it still holds; the rest is given back.
    pub(crate) fn subscribed(&mut self, now_ms: u64, group: &str, member: &str, held: &[LeaseRef]) {
        self.hear(now_ms, group, member);
        for ((name, _, _), known) in &mut self.known {
            if name == group {
                known.live.take_if(|live| {
                    live.member == member && held.iter().all(|record| record.lease != live.lease)
                });
            }
        }
    }

    /// A settlement was answered.
    pub(crate) fn answered(
        &mut self,
        Told { asked_ms, lsn, level, group, member, stale }: Told<'_>,
        settlement: &Settlement,
        result: &SettleResult,
    ) {
        let record = settlement.record;
        let spot = (group.to_owned(), record.partition, record.offset);
        let owner = self.names.get(&record.lease).map(|(at, owner)| (at.clone(), owner.clone()));
        let moved = self.moved.contains(group);
        let known = self.known.entry(spot.clone()).or_default();
        let needs = if level == Level::Synced { 0 } else { lsn };
        let what = format!("{} of {spot:?} by {member}: {result:?}", name_of(&settlement.outcome));
        match result.status {
            SettleStatus::Ok | SettleStatus::Late => {
                let owner = owner.unwrap_or_else(|| panic!("{what}, and nobody was given that lease"));
                assert_eq!(owner, (spot.clone(), member.to_owned()), "{what}, and the lease is another's");
                assert!(moved || !stale, "{what}, and the lease is old: {:?}", known.last);
                known.settle(asked_ms, needs, settlement, result, moved, &what);
            }
            SettleStatus::Duplicate => {
                let asked = known.asked.get(&record.lease).cloned().unwrap_or_default();
                assert!(
                    asked.contains(name_of(&settlement.outcome)),
                    "{what}, and it was never asked before"
                );
            }
            SettleStatus::NotOwner => {
                assert!(
                    owner.is_none_or(|(_, owner)| owner != member),
                    "{what}, and the lease was given to that member"
                );
            }
            SettleStatus::Conflict
            | SettleStatus::Stale
            | SettleStatus::Gone
            | SettleStatus::AlreadySettled
            | SettleStatus::Fenced => {}
        }
    }

    /// The record has a dead letter.
    pub(crate) fn buried(&mut self, spot: Spot) {
        if self.moved.contains(&spot.0) {
            return;
        }
        let known = self.known.entry(spot.clone()).or_default();
        let acked = known.done.filter(|(_, how)| *how != "given up");
        assert!(acked.is_none(), "{spot:?} has a dead letter, though it was {acked:?}");
        known.done = Some((0, "given up"));
        known.live = None;
    }

    /// The process ended. With `Some(synced)` later frames may be lost.
    pub(crate) fn crash(&mut self, synced: Option<Lsn>) {
        let Some(synced) = synced else { return };
        for known in self.known.values_mut() {
            known.counts.retain(|(lsn, _, _)| *lsn <= synced);
            known.live.take_if(|live| live.needs > synced);
            known.last.take_if(|(_, lsn)| *lsn > synced);
            known.done.take_if(|(lsn, _)| *lsn > synced);
            known.dead &= known.done.is_some();
            if let Some((lsn, _)) = &mut known.done {
                *lsn = 0;
            }
            if let Some((lsn, _, _)) = known.counts.last_mut() {
                *lsn = 0;
            }
        }
    }

    /// What is leased, for all that anybody could know.
    pub(crate) fn in_hand(&self, now_ms: u64) -> impl Iterator<Item = &Spot> {
        let is_leased = move |(group, _, _): &Spot, known: &Known| {
            known.live.as_ref().is_some_and(|live| {
                let owner = (group.clone(), live.member.clone());
                let session_end = self.heard.get(&owner).copied().unwrap_or(0) + self.session_ms;
                now_ms < live.deadline_ms.min(session_end) && !known.may_have_ended(live.lease)
            })
        };
        let leased = self.known.iter().filter(move |(spot, known)| is_leased(spot, known));
        leased.map(|(spot, _)| spot).filter(|(group, _, _)| !self.moved.contains(group))
    }

    /// Records that groups said to have dead-lettered, with their partitions.
    pub(crate) fn dead(
        &self,
        groups: &BTreeSet<String>,
        history: &History,
    ) -> Vec<(LetterSource, PartitionKey)> {
        let dead = self.known.iter().filter(|((group, _, _), known)| {
            known.dead && known.done.is_some() && groups.contains(group) && !self.moved.contains(group)
        });
        let source = |((group, key, offset), _): (&Spot, &Known)| {
            let topic = history.logs.get(key)?.topic.clone();
            let source =
                LetterSource { group: group.clone(), topic, partition: key.partition, offset: *offset };
            Some((source, *key))
        };
        dead.filter_map(source).collect()
    }

    /// After a start every member has a new session.
    pub(crate) fn booted(&mut self, now_ms: u64) {
        let members: Vec<(String, String)> = self.heard.keys().cloned().collect();
        for (group, member) in members {
            self.hear(now_ms, &group, &member);
        }
    }
}

impl Known {
    /// Its lease may have been given up without an answer.
    fn may_have_ended(&self, lease: LeaseId) -> bool {
        self.asked.get(&lease).is_some_and(|asked| asked.iter().any(|how| *how != "extend"))
    }

    /// Its end may have been asked for without an answer, so that it may be done.
    fn ended(&self) -> bool {
        self.asked.values().flatten().any(|how| *how != "extend" && *how != "release")
    }

    fn settle(
        &mut self,
        asked_ms: u64,
        needs: Lsn,
        settlement: &Settlement,
        result: &SettleResult,
        moved: bool,
        what: &str,
    ) {
        let lease = settlement.record.lease;
        match (&settlement.outcome, result.state) {
            (Outcome::Extend { .. }, _) => {
                if let Some(live) = self.live.as_mut().filter(|live| live.lease == lease) {
                    live.deadline_ms = live.deadline_ms.max(asked_ms + result.remaining_ms);
                    live.needs = live.needs.max(needs);
                }
                return;
            }
            (Outcome::Ack, _) => {
                assert!(moved || self.done.is_none(), "{what}, and it was {:?} before", self.done);
                self.done = Some((needs, "acknowledged"));
            }
            (_, Some(RecordState::DeadLettered | RecordState::Discarded)) => {
                self.done.get_or_insert((needs, "given up"));
                self.dead |= result.state == Some(RecordState::DeadLettered);
            }
            _ => {}
        }
        self.live.take_if(|live| live.lease == lease);
    }
}

pub(crate) fn name_of(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Ack => "ack",
        Outcome::Nack { .. } => "nack",
        Outcome::Reject { .. } => "reject",
        Outcome::Release => "release",
        Outcome::Extend { .. } => "extend",
    }
}
