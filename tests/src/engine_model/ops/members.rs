//! Members of share groups: subscriptions, credit, settlements, complete.

use std::collections::BTreeSet;

use felucca_broker::engine::command::{AppendEntry, Command, FailureDetail, LeaseRef, Outcome, Settlement};
use felucca_broker::engine::dead_letter;
use felucca_broker::engine::effect::{Reply, SettleStatus};
use felucca_broker::engine::error::EngineError;
use felucca_broker::engine::types::{LeaseId, Level, PartitionKey, SubscriptionId};

use crate::engine_model::answers::staged;
use crate::engine_model::model::Name;
use crate::engine_model::model::live::Subscription;
use crate::engine_model::model::log::Log;
use crate::engine_model::model::settle::{Attempt, said};
use crate::engine_model::model::share::Said;
use crate::engine_model::model::topics::{Kind, redrive_name};
use crate::engine_model::promises::Fact;
use crate::engine_model::world::{Fate, Held, World};

const MEMBERS: [&str; 3] = ["ann", "ben", "cat"];
/// Leases that may be longer are not held to their end: members must be heard of all the time.
const LONGEST_HOLD_MS: u64 = 60_000;
/// Old leases kept to try again.
const ARCHIVE: usize = 200;

impl World {
    pub(crate) fn subscribe(&mut self) {
        let Some(group) = self.any_share_group() else { return };
        let member = self.any_name(&MEMBERS);
        let records = [1, 3, 10, 1_000_000][self.rng.below(4) as usize];
        let bytes = [100, 1_000, 1 << 30][self.rng.below(3) as usize];
        let forgets = self.rng.chance(30);
        self.subscribe_as(&group, &member, records, bytes, forgets);
    }

    pub(crate) fn subscribe_as(
        &mut self,
        group: &str,
        member: &str,
        records: u32,
        bytes: u32,
        forgets: bool,
    ) {
        self.next_subscription += 1;
        let id = SubscriptionId(self.next_subscription);
        let mine = |held: &Held| held.group == group && held.member == member;
        if forgets {
            self.archive.extend(self.held.iter().filter(|held| mine(held)).cloned());
            self.held.retain(|held| !mine(held));
        }
        let held: Vec<LeaseRef> =
            self.held.iter().filter(|held| mine(held)).map(|held| held.record).collect();
        self.note(|| format!("subscribe {id:?} {group} {member} {records}/{bytes} holding {held:?}"));
        let command = Command::ShareSubscribe {
            subscription: id,
            group: group.to_owned(),
            member: member.to_owned(),
            credit_records: records,
            credit_bytes: bytes,
            held: held.clone(),
        };
        let members = self.live.group_members(group);
        let is_full = members.len() as u64 >= self.settings.max_members_per_group;
        if is_full && !members.iter().any(|known| known == member) {
            self.refused(command, |error| matches!(error, EngineError::LimitReached { .. }));
            return;
        }
        let already = self.ended();
        assert_eq!(self.ask(command, Level::Synced), Reply::Done);
        self.live.members.insert((group.to_owned(), member.to_owned()), self.now.monotonic_ms);
        // A member has one subscription: the new one takes the place of the old, which is told.
        let is_older =
            |older: &Subscription| (older.group.as_str(), older.member.as_str()) == (group, member);
        let older = self.live.subscriptions.extract_if(.., |_, subscription| is_older(subscription));
        let older: BTreeSet<SubscriptionId> = older.map(|(id, _)| id).collect();
        assert_eq!(self.ended_since(already), older, "older subscriptions of {member}");
        self.model.give_back(self.moment(), group, member, &held);
        let subscription = Subscription {
            group: group.to_owned(),
            member: member.to_owned(),
            records: i64::from(records),
            bytes: i64::from(bytes),
        };
        self.live.subscriptions.insert(id, subscription);
    }

    fn any_subscription(&mut self) -> Option<SubscriptionId> {
        let ids: Vec<SubscriptionId> = self.live.subscriptions.keys().copied().collect();
        self.rng.pick(&ids).copied()
    }

    pub(crate) fn unsubscribe(&mut self) {
        let Some(subscription) = self.any_subscription() else { return };
        self.note(|| format!("unsubscribe {subscription:?}"));
        self.tell(Command::ShareUnsubscribe { subscription });
        let Some(closed) = self.live.subscriptions.remove(&subscription) else { return };
        // A member with nothing in hand leaves with its last subscription.
        let (group, member) = (&closed.group, &closed.member);
        let subscribed =
            self.live.subscriptions.values().any(|other| (&other.group, &other.member) == (group, member));
        let holds = self.model.leases(group).iter().any(|(_, _, holder, _)| **holder == **member);
        if !subscribed && !holds {
            self.live.members.remove(&(closed.group, closed.member));
        }
    }

    pub(crate) fn give_credit(&mut self) {
        let Some(id) = self.any_subscription() else { return };
        let (records, bytes) = (self.rng.below(6) as u32, self.rng.below(2_000) as u32);
        self.note(|| format!("credit {id:?} {records}/{bytes}"));
        self.tell(Command::ShareCredit { subscription: id, records, bytes });
        let subscription = self.live.subscriptions.get_mut(&id).expect("an open subscription");
        subscription.records += i64::from(records);
        subscription.bytes += i64::from(bytes);
    }

    /// Members are heard of, each with this probability.
    pub(crate) fn members_seen(&mut self, percent: u64) {
        let now = self.now.monotonic_ms;
        let mut members: Vec<(String, String)> = Vec::new();
        for sessions in [&mut self.live.members, &mut self.live.consumers] {
            for (name, seen) in sessions {
                if self.rng.chance(percent) {
                    members.push(name.clone());
                    *seen = now;
                }
            }
        }
        members.push(("pay".to_owned(), "a stranger".to_owned()));
        self.note(|| format!("seen {members:?}"));
        self.tell(Command::MembersSeen { members });
    }

    /// A member's session begins anew; nobody becomes a member by a settlement.
    fn heard_of(&mut self, group: &str, member: &str) {
        if let Some(seen) = self.live.members.get_mut(&(group.to_owned(), member.to_owned())) {
            *seen = self.now.monotonic_ms;
        }
    }

    // ---- Settling ----

    fn draw_outcome(&mut self) -> Outcome {
        let classes = ["", "flaky", "fatal"];
        let class = self.any_name(&classes);
        let (reason, detail) = match self.rng.below(10) {
            0 => ("r".repeat(2_000), "d".repeat(10_000)),
            _ => ("no luck".to_owned(), String::new()),
        };
        let detail = FailureDetail { class, reason, detail };
        match self.rng.below(20) {
            0..10 => Outcome::Ack,
            10..14 => {
                let delay_ms = match self.rng.below(4) {
                    0 => Some(0),
                    1 => Some(self.rng.below(1_000)),
                    _ => None,
                };
                Outcome::Nack { delay_ms, counted: self.rng.chance(80), detail }
            }
            14 => Outcome::Reject { detail },
            15..17 => Outcome::Release,
            _ => {
                let most = [15_000, 100_000][usize::from(self.rng.chance(20))];
                let remaining_ms = self.rng.chance(60).then(|| self.rng.below(most));
                Outcome::Extend { remaining_ms }
            }
        }
    }

    /// Some lease: mostly one that is held, sometimes an old one, seldom one that never was.
    fn draw_lease(&mut self) -> Option<Held> {
        let old = self.rng.chance(20);
        let mut held = if old {
            let recent = self.archive.len().saturating_sub(30);
            self.rng.pick(&self.archive[recent..]).cloned()?
        } else {
            self.rng.pick(&self.held).cloned()?
        };
        if self.rng.chance(3) {
            held.record.lease =
                LeaseId { boot_epoch: self.engine.boot_epoch() + self.rng.below(2), sequence: 1 << 40 };
        }
        Some(held)
    }

    pub(crate) fn settle_some(&mut self) {
        let Some(first) = self.draw_lease() else { return };
        let (group, mut member) = (first.group.clone(), first.member.clone());
        let mut settlements = Vec::new();
        let fixed = self.rng.chance(50).then(|| self.draw_outcome());
        for _ in 0..self.rng.between(1, 6) {
            let Some(next) = self.draw_lease() else { continue };
            if next.group == group && next.member == member {
                let outcome = fixed.clone().unwrap_or_else(|| self.draw_outcome());
                settlements.push(Settlement { record: next.record, outcome });
            }
        }
        let outcome = self.draw_outcome();
        settlements.push(Settlement { record: first.record, outcome });
        if self.rng.chance(4) {
            member = self.any_name(&MEMBERS);
        }
        let level = if self.rng.chance(30) { Level::Written } else { Level::Synced };
        self.settle_as(&group, &member, level, settlements);
    }

    pub(crate) fn settle_as(
        &mut self,
        group: &str,
        member: &str,
        level: Level,
        settlements: Vec<Settlement>,
    ) {
        let command = Command::Settle {
            group: group.to_owned(),
            member: member.to_owned(),
            level,
            settlements: settlements.clone(),
        };
        self.note(|| format!("settle {group} {member} {level:?}"));
        if !self.model.shares.contains_key(group) {
            self.refused(command, |error| {
                matches!(error, EngineError::UnknownGroup(_) | EngineError::WrongGroupKind { .. })
            });
            self.held.retain(|held| held.group != group);
            return;
        }
        let Reply::Settled(results) = self.ask(command, level) else { panic!("settled") };
        assert_eq!(results.len(), settlements.len());
        self.heard_of(group, member);
        let member: Name = member.into();
        for (settlement, result) in settlements.iter().zip(results) {
            let LeaseRef { partition, offset, lease } = settlement.record;
            self.trace.note(|| {
                format!("    {partition} {offset} {lease:?} {:?} -> {result:?}", settlement.outcome)
            });
            let attempt = self.attempt(group, &member, settlement.record, &settlement.outcome);
            let right = self.model.right_answers(self.moment(), &attempt);
            assert!(right.contains(&result.status), "{attempt:?}: {result:?} is none of {right:?}");
            if matches!(result.status, SettleStatus::Ok | SettleStatus::Late) {
                let at = self.moment();
                self.model.settled(at, &attempt, result);
            }
            let is_ack = said(&settlement.outcome) == Some(Said::Ack);
            self.after_settlement(group, settlement.record, result.status, is_ack);
        }
    }

    fn attempt<'a>(
        &self,
        group: &'a str,
        member: &'a Name,
        record: LeaseRef,
        outcome: &'a Outcome,
    ) -> Attempt<'a> {
        let instance = self.promises.instance_of(record.lease, group, record.partition, record.offset);
        Attempt { group, member, record, outcome, instance, forgotten: self.live.forgotten }
    }

    /// The member knows where it stands; an ack that was taken is promised once its answer leaves.
    fn after_settlement(&mut self, group: &str, record: LeaseRef, status: SettleStatus, is_ack: bool) {
        let part = self.model.shares[group].parts.get(&record.partition);
        let instance = part.map(|part| part.instance);
        let over = part
            .and_then(|part| part.records.get(&record.offset))
            .is_none_or(|known| known.lease != record.lease || known.lease_deadline().is_none());
        // A record that was lost with the power before it was synced will not come again either.
        let is_there = |log: &Log| log.entries.contains_key(&record.offset);
        if is_ack
            && Self::says_done(status)
            && self.model.logs.get(&record.partition).is_some_and(is_there)
            && let Some(instance) = instance
        {
            let (key, offset) = (record.partition, record.offset);
            self.promise(Fact::Done { group: group.to_owned(), key, instance, offset });
        }
        if over && status != SettleStatus::NotOwner {
            let (gone, kept): (Vec<Held>, Vec<Held>) = std::mem::take(&mut self.held)
                .into_iter()
                .partition(|held| held.group == group && held.record == record);
            self.held = kept;
            self.archive.extend(gone);
            let excess = self.archive.len().saturating_sub(ARCHIVE);
            self.archive.drain(..excess);
        }
    }

    /// Extends one lease for as long as that is possible, while all members are heard of; it ends at the longest time that a
    /// lease may have, and not before.
    pub(crate) fn hold_to_the_end(&mut self) {
        let Some(held) = self.rng.pick(&self.held).cloned() else { return };
        let longest = self.model.shares.get(&held.group).map(|share| share.config.max_lease_ms);
        if longest.is_none_or(|ms| ms > LONGEST_HOLD_MS) {
            // The groups behind dead-letter topics have half a day.
            return;
        }
        self.note(|| format!("hold {held:?} to the end"));
        loop {
            self.begin_turn();
            self.members_seen(100);
            let outcome = Outcome::Extend { remaining_ms: Some(u64::MAX) };
            let extend = Settlement { record: held.record, outcome };
            self.settle_as(&held.group, &held.member, Level::Synced, vec![extend]);
            self.tick();
            self.end_turn(Fate::Released);
            let share = self.model.shares.get(&held.group);
            let part = share.and_then(|share| share.parts.get(&held.record.partition));
            let record = part.and_then(|part| part.records.get(&held.record.offset));
            let record = record.filter(|record| record.lease == held.record.lease);
            let Some(deadline) = record.and_then(|record| record.lease_deadline()) else { return };
            self.advance((deadline - self.now.monotonic_ms).min(self.session_ms / 2));
        }
    }

    // ---- Complete ----

    pub(crate) fn complete_one(&mut self) {
        let Some(held) = self.draw_lease() else { return };
        let mut outputs = Vec::new();
        for _ in 0..self.rng.below(3) {
            let Some(key) = self.any_partition() else { break };
            let count = self.rng.between(1, 3) as u32;
            outputs.push((key, self.new_batch(None, count)));
        }
        if let Some(redriven) = self.redriven(&held) {
            outputs = vec![redriven];
        }
        self.complete_as(&held, outputs);
    }

    /// A dead letter goes back to the group that gave it up.
    pub(crate) fn redriven(&self, held: &Held) -> Option<(PartitionKey, bytes::BytesMut)> {
        let key = held.record.partition;
        let Kind::Letters { group, source } = &self.model.topics.get(&key.topic)?.kind else { return None };
        let (target, _) = self.model.topic_named(&redrive_name(group, source))?;
        if held.group != redrive_name(group, source) {
            return None;
        }
        let (_, letter) = self.logs.records.get(&key)?.get(&held.record.offset)?;
        let batch = dead_letter::redriven(letter, self.now.wall_ms).expect("a record that was built before");
        Some((PartitionKey { topic: target, partition: key.partition }, batch))
    }

    pub(crate) fn complete_as(&mut self, held: &Held, outputs: Vec<(PartitionKey, bytes::BytesMut)>) {
        let group = held.group.clone();
        let targets: Vec<PartitionKey> = outputs.iter().map(|(key, _)| *key).collect();
        let entries = outputs
            .into_iter()
            .map(|(partition, batch)| AppendEntry { partition, batch: staged(batch) })
            .collect();
        self.note(|| format!("complete {held:?} into {targets:?}"));
        let command = Command::Complete {
            group: group.clone(),
            member: held.member.clone(),
            record: held.record,
            outputs: entries,
        };
        let Some(share) = self.model.shares.get(&group) else {
            self.refused(command, |error| {
                matches!(error, EngineError::UnknownGroup(_) | EngineError::WrongGroupKind { .. })
            });
            self.held.retain(|held| held.group != group);
            return;
        };
        let foreign = |key: &PartitionKey| {
            let topic = &self.model.topics[&key.topic];
            topic.kind != Kind::Standard && !(share.hidden && topic.name == group)
        };
        if targets.iter().any(foreign) {
            self.refused(command, |error| matches!(error, EngineError::ForeignProducer(_)));
            self.check_fresh();
            return;
        }
        let Reply::Completed { result, base_offsets } = self.ask(command, Level::Synced) else {
            panic!("completed")
        };
        self.heard_of(&group, &held.member);
        self.trace.note(|| format!("    -> {result:?} {base_offsets:?}"));
        let member: Name = held.member.as_str().into();
        let attempt = self.attempt(&group, &member, held.record, &Outcome::Ack);
        let right = self.model.right_answers(self.moment(), &attempt);
        assert!(right.contains(&result.status), "{attempt:?}: {result:?} is none of {right:?}");
        let fresh = self.take_fresh();
        if matches!(result.status, SettleStatus::Ok | SettleStatus::Late) {
            let at = self.moment();
            self.model.settled(at, &attempt, result);
            assert_eq!(fresh.len(), targets.len(), "every output with the ack");
            for ((batch, target), base) in fresh.iter().zip(&targets).zip(&base_offsets) {
                assert_eq!((batch.key, batch.base), (*target, *base));
                self.append_to_model(batch, None);
            }
        } else {
            assert!(fresh.is_empty() && base_offsets.is_empty(), "outputs without the ack");
        }
        self.after_settlement(&group, held.record, result.status, true);
    }
}
