//! Holding the engine against the model: what it says of itself, and that it leaves nothing undone.

use std::collections::BTreeSet;

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::{
    DeadLetterRead, GroupDescription, GroupKind, GroupPartitionInfo, Reply,
};
use felucca_broker::engine::types::{Level, PartitionKey};

use super::model::share::{Cause, Part, Record, State};
use super::model::topics::Kind;
use super::promises::Fact;
use super::world::{Fate, World};

/// Records that a partition may have leased or returned while the budget of memory is spent.
const TRICKLE: u64 = 16;
/// Beyond the limit of leases, one part in so many is kept for records that came back.
const RETURNED_RESERVE: u64 = 8;
/// Bytes that a partition of a group takes, as docs/share-groups.md has it.
const MEMORY_FIXED: u64 = 24 << 10;
const MEMORY_PER_RECORD: u64 = 800;
const MEMORY_PER_PARKED: u64 = 64;
const MEMORY_PER_KEY: u64 = 300;
const MEMORY_PER_READY: u64 = 32;
/// Records that are looked at ahead.
const READY: u64 = 4096;
/// No record in hand can be kept in less.
const LEAST_PER_RECORD: u64 = 200;

impl World {
    /// An exhausted record's dead letter is asked for: once at a time, with the right counts and reason.
    pub(crate) fn check_letter_read(&mut self, read: &DeadLetterRead) {
        let key = read.partition;
        let group = &self.model.shares[&read.group];
        let record = &group.parts[&key].records[&read.offset];
        self.trace.note(|| format!("    dead letter wanted: {} {key} {}", read.group, read.offset));
        assert_eq!(record.state, State::Exhausted, "{read:?}");
        let asked = self.live.letters.insert((read.group.clone(), key, read.offset));
        assert!(asked || self.live.letters_may_repeat, "asked for twice: {read:?}");
        let context = &read.context;
        assert_eq!(
            (context.topic, context.partition, context.offset),
            (key.topic, key.partition, read.offset)
        );
        assert_eq!((context.deliveries, context.failures), (record.deliveries, record.failures), "{read:?}");
        assert_eq!(context.consumer, *record.member, "{read:?}");
        // Decided by the settings of that time.
        let right: &[&str] = match record.cause.expect("an exhausted record failed") {
            _ if record.fatal => &["rejected"],
            Cause::Rejected => &[],
            Cause::Released => &["max_deliveries"],
            Cause::Nacked => &["max_failures", "max_deliveries"],
            Cause::Lapsed => &["lease_expired", "member_lost", "max_deliveries"],
        };
        assert!(right.contains(&context.reason), "{} is none of {right:?}", context.reason);
    }

    /// What was told before a crash must hold after it.
    pub(crate) fn check_fact(&self, fact: &Fact) {
        match fact {
            Fact::Stored { key, base, identities } => {
                let Some(log) = self.model.logs.get(key) else { return };
                for (offset, identity) in (*base..).zip(identities) {
                    let found = log.entries.get(&offset).map(|entry| entry.identity);
                    assert_eq!(found, Some(*identity), "acknowledged record {offset} of {key}");
                }
            }
            Fact::Deleted { key, log_start } => {
                let Some(log) = self.model.logs.get(key) else { return };
                assert!(log.log_start >= *log_start, "deleted records of {key} are back");
            }
            Fact::Done { group, key, instance, offset } => {
                let part = self.model.shares.get(group).and_then(|share| share.parts.get(key));
                let Some(part) = part.filter(|part| part.instance == *instance) else { return };
                let expired = *offset < self.model.logs[key].log_start && !part.records.contains_key(offset);
                assert!(
                    expired || !part.is_unsettled(*offset),
                    "confirmed ack of {offset} of {key} in {group}"
                );
            }
        }
    }

    /// Runs turns until nothing is left to do at this time, then checks that nothing was left undone.
    pub(crate) fn settle_down(&mut self) {
        if self.live.scans_paused_until > self.now.monotonic_ms {
            self.advance(self.live.scans_paused_until - self.now.monotonic_ms);
        }
        self.calm = true;
        for round in 0.. {
            assert!(round < 5_000, "does not come to rest");
            self.begin_turn();
            self.tick();
            self.answer_scans(100);
            self.answer_letters(100);
            self.end_turn(Fate::Released);
            let behind = self.synced < self.written();
            self.sync(self.written());
            if !self.was_busy && !behind && self.scans.is_empty() && self.letters.is_empty() {
                break;
            }
        }
        self.calm = false;
        self.check_nothing_undone();
        self.check_timers();
        self.compare_groups();
    }

    /// Every record that may be handed out was handed out, as long as there is somebody to take it.
    fn check_nothing_undone(&self) {
        for (group, share) in &self.model.shares {
            let takers: Vec<Vec<bool>> = self
                .live
                .subscriptions
                .values()
                .filter(|sub| sub.group == *group && sub.has_credit())
                .map(|sub| share.held_by(&sub.member))
                .collect();
            let free = takers.iter().any(Vec::is_empty);
            let open = takers.iter().filter(|held| !held.contains(&true)).count();
            let probing = share.guard.probing.as_ref();
            let quiet = probing.is_some_and(|probing| {
                probing.not_before_ms > self.now.monotonic_ms
                    || share.leases_since(probing.since_ms) >= probing.limit as usize
            });
            // For what is to be alone, one of them may be kept waiting.
            let waiting = share.parts.values().flat_map(|part| part.records.values());
            let reserved = waiting.into_iter().any(|record| record.alone && !record.is_settled());
            for (key, part) in &share.parts {
                let leases = part.records.values().filter(|r| r.lease_deadline().is_some()).count() as u64;
                let returned = part.records.values().filter(|r| r.returned && !r.is_settled()).count() as u64;
                let room = leases < self.most_leases();
                let room_for_new = self.has_room_for_new(leases, returned);
                let log = &self.model.logs[key];
                for offset in part.unsettled(log, self.live.must_show(key)) {
                    let state = part.records.get(&offset).map(|record| record.state);
                    assert_ne!(
                        state,
                        Some(State::Exhausted),
                        "{group} {key} {offset} waits for its dead letter"
                    );
                    let due = match state {
                        None => room_for_new,
                        Some(State::Waiting { by_ms, .. }) => by_ms <= self.now.monotonic_ms,
                        Some(_) => false,
                    };
                    let first = !share.config.ordered || part.predecessor(log, offset).is_none();
                    let alone = part.records.get(&offset).is_some_and(|record| record.alone);
                    let taker = !quiet && if alone { free } else { open > usize::from(reserved) };
                    assert!(
                        !(taker && room && !share.paused && due && first),
                        "{group} {key} offset {offset} ({state:?}) is not handed out"
                    );
                }
            }
        }
    }

    /// Whether a group with so many leased and so many returned records on a partition is given new ones there.
    pub(crate) fn has_room_for_new(&self, leased: u64, returned: u64) -> bool {
        let is_spent = self.settings.share_state_bytes <= 1;
        let is_full = leased >= self.settings.max_leases || returned >= self.settings.max_exceptions;
        !is_full && (!is_spent || leased + returned < TRICKLE)
    }

    /// Leases on a partition with those of records that came back.
    pub(crate) fn most_leases(&self) -> u64 {
        self.settings.max_leases + self.settings.max_leases.div_ceil(RETURNED_RESERVE)
    }

    /// The engine's next timer is no later than the first thing that must happen.
    fn check_timers(&self) {
        let deadline = self.engine.next_deadline();
        let mut first = self.live.next_session_end(self.session_ms);
        for (group, share) in &self.model.shares {
            let probe = share.guard.probing.as_ref().map(|probing| probing.not_before_ms);
            first = first.into_iter().chain(probe.filter(|at| *at > self.now.monotonic_ms)).min();
            let leases = self.model.leases(group).into_iter().map(|(_, _, _, deadline)| deadline);
            first = first.into_iter().chain(leases).min();
        }
        let waiting = self.model.shares.values().flat_map(|share| share.parts.values());
        for record in waiting.flat_map(|part| part.records.values()) {
            if let State::Waiting { from_ms, by_ms } = record.state
                && from_ms > self.now.monotonic_ms
            {
                first = first.into_iter().chain([by_ms]).min();
            }
        }
        let late = first.is_some_and(|first| deadline.is_none_or(|deadline| deadline > first));
        assert!(!late, "the next timer is at {deadline:?}, something is due at {first:?}");
    }

    /// What the engine says of every group is what the model has.
    pub(crate) fn compare_groups(&mut self) {
        self.begin_turn();
        let shares: Vec<String> = self.model.shares.keys().cloned().collect();
        for group in shares {
            let description = self.describe(&group);
            self.compare_share(&description);
        }
        let consumers: Vec<String> = self.model.consumers.keys().cloned().collect();
        for group in consumers {
            let description = self.describe(&group);
            let consumer = &self.model.consumers[&group];
            assert_eq!(description.kind, GroupKind::Consumer);
            let members = description.members.iter();
            let found: Vec<(&str, BTreeSet<_>)> =
                members.map(|info| (info.member.as_str(), info.assigned.iter().copied().collect())).collect();
            let right = consumer.members.iter().map(|(name, member)| (name.as_str(), member.holding.clone()));
            assert_eq!(found, right.collect::<Vec<_>>(), "members of {group}");
            let command = Command::FetchOffsets { group: group.clone(), partitions: Vec::new() };
            let Reply::Offsets(offsets) = self.ask(command, Level::Synced) else { panic!("offsets") };
            let found =
                offsets.into_iter().map(|commit| (commit.partition, (commit.offset, commit.metadata)));
            let right = self.model.consumers[&group].offsets.clone().into_iter();
            assert!(found.eq(right), "committed offsets of {group}");
        }
        self.compare_lists();
        self.end_turn(Fate::Released);
    }

    fn compare_lists(&mut self) {
        let Reply::Groups(groups) = self.ask(Command::ListGroups, Level::Synced) else { panic!("groups") };
        let found: BTreeSet<String> = groups.into_iter().map(|listing| listing.group).collect();
        let shares = self.model.shares.iter().filter(|(_, share)| !share.hidden).map(|(name, _)| name);
        assert_eq!(found, shares.chain(self.model.consumers.keys()).cloned().collect(), "groups");
        let Reply::DeadLetters(letters) = self.ask(Command::ListDeadLetters { group: None }, Level::Synced)
        else {
            panic!("dead letters")
        };
        let topics = self.model.topics.values();
        assert_eq!(letters.len(), topics.filter(|topic| matches!(topic.kind, Kind::Letters { .. })).count());
        for info in letters {
            let parts = &self.model.shares[&info.redrive_group].parts;
            let redriven: u64 = parts.values().map(|part| part.counts.acked).sum();
            assert_eq!(info.redriven, redriven, "{}", info.redrive_group);
            let pending = |end: &dyn Fn(&PartitionKey) -> u64| -> u64 {
                parts
                    .iter()
                    .map(|(key, part)| part.unsettled(&self.model.logs[key], end(key)).count())
                    .sum::<usize>() as u64
            };
            let least = pending(&|key| self.live.must_show(key));
            let most = pending(&|key| self.live.may_show(key));
            let has_gap = parts.keys().any(|key| {
                let log = &self.model.logs[key];
                log.entries.len() as u64 != log.end
            });
            assert!(has_gap || (least..=most).contains(&info.pending), "{info:?}, {least} to {most}");
        }
    }

    fn describe(&mut self, group: &str) -> GroupDescription {
        match self.ask(Command::DescribeGroup { group: group.to_owned() }, Level::Synced) {
            Reply::Group(description) => description,
            other => panic!("{other:?}"),
        }
    }

    fn compare_share(&self, description: &GroupDescription) {
        let group = &description.group;
        let share = &self.model.shares[group];
        assert_eq!((description.kind, description.paused), (GroupKind::Share, share.paused));
        let members: Vec<&str> = description.members.iter().map(|info| info.member.as_str()).collect();
        assert_eq!(members, self.live.group_members(group), "members of {group}");
        for info in &description.members {
            let leased = self.model.leases(group).iter().filter(|(_, _, m, _)| **m == *info.member).count();
            assert_eq!(info.leased, leased as u64, "leases of {}", info.member);
        }
        assert_eq!(description.partitions.len(), share.parts.len(), "partitions of {group}");
        let outage = share
            .guard
            .probing
            .as_ref()
            .map(|probing| (probing.limit, probing.not_before_ms.saturating_sub(self.now.monotonic_ms)));
        assert_eq!(description.outage.map(|o| (o.limit, o.next_probe_ms)), outage, "outage of {group}");
        for info in &description.partitions {
            let key = info.partition.expect("a partition has a name");
            self.compare_part(group, &share.parts[&key], info);
        }
    }

    /// What is charged for a partition of a group is no less than what it must take, and no more than
    /// docs/share-groups.md says.
    fn check_memory(&self, group: &str, part: &Part, info: &GroupPartitionInfo) {
        let key = info.partition.expect("a partition has a name");
        let log = &self.model.logs[&key];
        let in_hand: Vec<&Record> = part.records.values().filter(|record| !record.is_settled()).collect();
        let text: u64 = in_hand.iter().map(|record| record.text).sum();
        let records = log.entries.len() as u64;
        let slots: BTreeSet<u16> = log.entries.values().filter_map(|entry| entry.slot).collect();
        let keys = if self.model.shares[group].config.ordered { slots.len() as u64 } else { 0 };
        let span = log.end.saturating_sub(info.position.expect("a share group has a position"));
        let least = LEAST_PER_RECORD * in_hand.len() as u64;
        let most = MEMORY_FIXED
            + MEMORY_PER_RECORD * in_hand.len() as u64
            + text
            + MEMORY_PER_PARKED * info.parked
            + MEMORY_PER_KEY * keys
            + MEMORY_PER_READY * records.min(READY)
            + span / 8
            + 32 * (span >> 16);
        assert!(
            (least..=most).contains(&info.memory_bytes),
            "{} bytes of {group} {key}, {least} to {most} for {} in hand: {info:?}",
            info.memory_bytes,
            in_hand.len()
        );
        let may_park = self.settings.max_parked_per_slot as u64 * keys;
        assert!(info.parked <= may_park.min(records), "{group} {key}: {} parked", info.parked);
    }

    fn compare_part(&self, group: &str, part: &Part, info: &GroupPartitionInfo) {
        self.check_memory(group, part, info);
        let key = info.partition.expect("a partition has a name");
        let log = &self.model.logs[&key];
        let count = |which: &dyn Fn(&State) -> bool| {
            part.records.values().filter(|record| which(&record.state)).count() as u64
        };
        let now = self.now.monotonic_ms;
        let leased = count(&|state| matches!(state, State::Leased { .. }));
        let held = count(&|state| matches!(state, State::Held));
        let exhausted = count(&|state| matches!(state, State::Exhausted));
        let least = count(&|state| matches!(state, State::Waiting { from_ms, .. } if *from_ms > now));
        let most = count(&|state| matches!(state, State::Waiting { .. }));
        let counts = &part.counts;
        assert_eq!(
            (info.leased, info.held, info.exhausted, info.acked, info.dead_lettered, info.discarded),
            (leased, held, exhausted, counts.acked, counts.dead_lettered, counts.discarded),
            "leased, held, exhausted, acked, dead-lettered, discarded of {group} {key}"
        );
        assert_eq!((info.deliveries, info.failures), (counts.deliveries, counts.failures), "{group} {key}");
        assert!((least..=most).contains(&info.scheduled), "{group} {key}: {info:?}, {least} to {most}");
        let end = info.high_watermark;
        assert!(end >= self.live.must_show(&key) && end <= self.live.may_show(&key), "{info:?}");
        let has_gap = log.entries.len() as u64 != log.end;
        if !has_gap {
            let unsettled: Vec<u64> = part.unsettled(log, end).collect();
            assert_eq!(info.lag, unsettled.len() as u64, "lag of {group} {key}");
            let elsewhere = info.leased + info.scheduled + info.held + info.exhausted;
            assert_eq!(info.available, info.lag.saturating_sub(elsewhere), "available of {group} {key}");
            assert_eq!(info.expired, counts.expired, "expired of {group} {key}");
            assert_eq!(info.oldest_unsettled, unsettled.first().copied(), "{group} {key}");
        }
    }
}
