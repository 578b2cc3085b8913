//! Share groups: the states of records, grants, failures and what is to be retried.

use std::collections::{BTreeMap, BTreeSet};

use felucca_broker::engine::types::{LeaseId, PartitionKey, TopicId};

use super::guard::{Guard, Law};
use super::log::Log;
use super::{Model, Moment, Name};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnExhausted {
    DeadLetter,
    Hold,
    Discard,
}

/// The class that may have settings of its own.
pub(crate) const OWN_CLASS: &str = "flaky";

/// Settings of one class; what is absent is the group's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Own {
    pub(crate) max_failures: Option<u32>,
    pub(crate) backoff_initial_ms: Option<u64>,
    pub(crate) backoff_max_ms: Option<u64>,
}

/// What holds for failures of a class.
#[derive(Clone, Copy, Debug)]
struct Retry {
    max_failures: u32,
    initial_ms: u64,
    max_ms: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) lease_ms: u64,
    pub(crate) max_lease_ms: u64,
    pub(crate) backoff_initial_ms: u64,
    pub(crate) backoff_max_ms: u64,
    pub(crate) multiplier: f64,
    pub(crate) jitter: f64,
    pub(crate) max_failures: u32,
    pub(crate) max_deliveries: u32,
    pub(crate) ordered: bool,
    pub(crate) on_exhausted: OnExhausted,
    /// The class that ends a record at once.
    pub(crate) fatal_class: Option<&'static str>,
    /// What [`OWN_CLASS`] has of its own.
    pub(crate) own: Own,
    pub(crate) guard: bool,
    pub(crate) window: usize,
    pub(crate) percent: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lease_ms: 30_000,
            max_lease_ms: 43_200_000,
            backoff_initial_ms: 1_000,
            backoff_max_ms: 300_000,
            multiplier: 2.0,
            jitter: 0.2,
            max_failures: 10,
            max_deliveries: 100,
            ordered: false,
            on_exhausted: OnExhausted::DeadLetter,
            fatal_class: None,
            own: Own::default(),
            guard: true,
            window: 100,
            percent: 80,
        }
    }
}

impl Config {
    pub(crate) fn guard_law(&self) -> Law {
        Law {
            on: self.guard,
            window: self.window,
            percent: self.percent,
            initial_ms: self.backoff_initial_ms,
            max_ms: self.backoff_max_ms,
        }
    }

    /// Whether a group may have these settings.
    pub(crate) fn is_valid(&self) -> bool {
        let fits = |retry: Retry| retry.initial_ms <= retry.max_ms;
        self.lease_ms <= self.max_lease_ms && fits(self.retry("")) && fits(self.retry(OWN_CLASS))
    }

    fn retry(&self, class: &str) -> Retry {
        let own = if class == OWN_CLASS { self.own } else { Own::default() };
        Retry {
            max_failures: own.max_failures.unwrap_or(self.max_failures),
            initial_ms: own.backoff_initial_ms.unwrap_or(self.backoff_initial_ms),
            max_ms: own.backoff_max_ms.unwrap_or(self.backoff_max_ms),
        }
    }

    /// Shortest and longest wait after the n-th failure.
    fn backoff(&self, retry: Retry, failures: u32) -> (u64, u64) {
        let mut wait = retry.initial_ms as f64;
        for _ in 1..failures {
            wait = (wait * self.multiplier).min(retry.max_ms as f64);
        }
        wait = wait.min(retry.max_ms as f64);
        ((wait * (1.0 - self.jitter)).floor() as u64, (wait * (1.0 + self.jitter)).ceil() as u64)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Acked,
    DeadLettered,
    Discarded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Leased {
        granted_ms: u64,
        deadline_ms: u64,
        /// Frame of the grant.
        lsn: u64,
    },
    /// To be tried again, at the earliest and at the latest then.
    Waiting {
        from_ms: u64,
        by_ms: u64,
    },
    Exhausted,
    Held,
    Settled {
        how: How,
        lsn: u64,
        at_ms: u64,
    },
}

/// Why the last lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Nacked,
    Rejected,
    Released,
    /// The lease expired or the member was lost.
    Lapsed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Ack,
    Nack,
    Reject,
    Release,
    /// Nothing, in its time.
    Lapsed,
}

/// A lease that ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Past {
    pub(crate) lease: LeaseId,
    pub(crate) member: Name,
    pub(crate) said: Said,
    pub(crate) at_ms: u64,
    pub(crate) lsn: u64,
}

/// A record that was handed out at least once.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) state: State,
    pub(crate) deliveries: u32,
    /// Of them, those that do not count toward the cap.
    pub(crate) spared: u32,
    pub(crate) failures: u32,
    /// The last lease and its holder.
    pub(crate) lease: LeaseId,
    pub(crate) member: Name,
    pub(crate) cause: Option<Cause>,
    /// The last failure was of the kind that is not tried again.
    pub(crate) fatal: bool,
    pub(crate) past: Vec<Past>,
    /// It came back at least once.
    pub(crate) returned: bool,
    /// It failed so often that it is granted alone.
    pub(crate) alone: bool,
    /// Bytes of what is said of its last failure, at the most.
    pub(crate) text: u64,
}

impl Record {
    pub(crate) fn lease_deadline(&self) -> Option<u64> {
        match self.state {
            State::Leased { deadline_ms, .. } => Some(deadline_ms),
            _ => None,
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        matches!(self.state, State::Settled { .. })
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) acked: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) discarded: u64,
    pub(crate) deliveries: u64,
    pub(crate) failures: u64,
    pub(crate) expired: u64,
}

/// A group on a partition.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    /// Differs after every seek.
    pub(crate) instance: u64,
    /// Frame of the seek, or of the group's beginning.
    pub(crate) since: u64,
    pub(crate) start: u64,
    pub(crate) records: BTreeMap<u64, Record>,
    pub(crate) counts: Counts,
}

impl Part {
    pub(crate) fn new(instance: u64, since: u64, start: u64) -> Self {
        Self { instance, since, start, records: BTreeMap::new(), counts: Counts::default() }
    }

    /// Of a record that the log has, or that was handed out.
    pub(crate) fn is_unsettled(&self, offset: u64) -> bool {
        offset >= self.start && self.records.get(&offset).is_none_or(|record| !record.is_settled())
    }

    /// The unsettled records of the log below `end`.
    pub(crate) fn unsettled<'a>(&'a self, log: &'a Log, end: u64) -> impl Iterator<Item = u64> + 'a {
        let known = log.entries.range(self.start.min(end)..end).map(|(offset, _)| *offset);
        let is_there = |offset: &u64| *offset >= log.log_start || self.records.contains_key(offset);
        known.filter(move |offset| is_there(offset) && self.is_unsettled(*offset))
    }

    /// The oldest unsettled record of the same key slot before `offset`, in a key-ordered group.
    pub(crate) fn predecessor(&self, log: &Log, offset: u64) -> Option<u64> {
        let slot = log.entries.get(&offset)?.slot?;
        self.unsettled(log, offset).find(|before| log.entries[before].slot == Some(slot))
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share {
    pub(crate) config: Config,
    pub(crate) paused: bool,
    pub(crate) hidden: bool,
    /// Frame of its creation.
    pub(crate) since: u64,
    pub(crate) topics: BTreeSet<TopicId>,
    pub(crate) parts: BTreeMap<PartitionKey, Part>,
    /// What was granted up to this frame was not bound to the order of keys.
    pub(crate) ordered_since: u64,
    pub(crate) guard: Guard,
}

impl Share {
    /// What this member holds: whether each is to be alone.
    pub(crate) fn held_by(&self, member: &str) -> Vec<bool> {
        let records = self.parts.values().flat_map(|part| part.records.values());
        let held = records.filter(|record| record.lease_deadline().is_some() && *record.member == *member);
        held.map(|record| record.alone).collect()
    }

    /// Live leases that were granted after this time.
    pub(crate) fn leases_since(&self, since_ms: u64) -> usize {
        let records = self.parts.values().flat_map(|part| part.records.values());
        let since = |state| matches!(state, State::Leased { granted_ms, .. } if granted_ms > since_ms);
        records.filter(|record| since(record.state)).count()
    }
}

/// One lease handed out.
#[derive(Clone, Debug)]
pub(crate) struct Grant {
    pub(crate) offset: u64,
    pub(crate) lease: LeaseId,
    pub(crate) member: Name,
    pub(crate) deliveries: u32,
    pub(crate) failures: u32,
}

/// What the holder, or its silence, made of a lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure<'a> {
    pub(crate) cause: Cause,
    pub(crate) counted: bool,
    /// The delivery does not count toward the cap, whatever becomes of it.
    pub(crate) spared: bool,
    pub(crate) delay_ms: Option<u64>,
    pub(crate) class: &'a str,
    /// Bytes of class, reason and detail, as much as is kept of them.
    pub(crate) text: u64,
}

impl Failure<'_> {
    /// Nobody settled the lease in time.
    fn lapse() -> Self {
        let text = "lease expired".len() as u64;
        Self { cause: Cause::Lapsed, counted: true, spared: false, delay_ms: None, class: "", text }
    }

    /// Given back before it was worked on; `spared` when its member says so itself.
    pub(crate) fn release(spared: bool) -> Self {
        Self { cause: Cause::Released, counted: false, spared, delay_ms: None, class: "", text: 0 }
    }
}

impl Model {
    /// Where the exhausted records of a group on a topic go.
    pub(crate) fn on_exhausted(&self, group: &str, topic: TopicId) -> OnExhausted {
        let chosen = self.shares[group].config.on_exhausted;
        if chosen == OnExhausted::DeadLetter && self.letters_of(group, topic).is_none() {
            return OnExhausted::Hold;
        }
        chosen
    }

    pub(crate) fn letters_of(&self, group: &str, topic: TopicId) -> Option<TopicId> {
        let source = match &self.topics.get(&topic)?.kind {
            super::topics::Kind::Standard => self.topics[&topic].name.clone(),
            super::topics::Kind::Redrive { source, .. } => source.clone(),
            super::topics::Kind::Letters { .. } => return None,
        };
        self.topic_named(&super::topics::letters_name(group, &source)).map(|(id, _)| id)
    }

    /// Checks a grant against everything that the rules ask, and notes it.
    pub(crate) fn granted(
        &mut self,
        at: Moment,
        group: &str,
        key: PartitionKey,
        grant: &Grant,
        may_show: u64,
        synced: u64,
    ) {
        let Grant { offset, .. } = *grant;
        let context = || format!("{group} {key} offset {offset} as {:?}", grant.lease);
        let log = &self.logs[&key];
        let share = self.shares.get_mut(group).expect("a grant by a group that the model does not have");
        assert!(!share.paused, "granted while paused: {}", context());
        let part = share.parts.get(&key).expect("a grant on a partition that the group is not on");
        assert!(offset >= part.start && log.entries.contains_key(&offset), "no such record: {}", context());
        assert!(offset < may_show, "granted before it may be seen: {}", context());
        let before = part.records.get(&offset);
        assert!(before.is_some() || offset >= log.log_start, "it was deleted: {}", context());
        let held = share.held_by(&grant.member);
        assert!(!held.contains(&true), "granted beside a record that is to be alone: {}", context());
        let alone = before.is_some_and(|record| record.alone);
        assert!(
            !alone || held.is_empty(),
            "to be alone, granted beside {} others: {}",
            held.len(),
            context()
        );
        if let Some(probing) = &share.guard.probing {
            assert!(probing.not_before_ms <= at.now_ms, "a probe before its time: {}", context());
            let live = share.leases_since(probing.since_ms);
            assert!(live < probing.limit as usize, "{live} leases and one more probe: {}", context());
        }
        match before.map(|record| record.state) {
            None => {}
            Some(State::Waiting { from_ms, .. }) => {
                assert!(from_ms <= at.now_ms, "granted {} ms early: {}", from_ms - at.now_ms, context());
            }
            Some(state) => panic!("granted although {state:?}: {}", context()),
        }
        let (deliveries, failures) = before.map_or((0, 0), |record| (record.deliveries, record.failures));
        assert_eq!(
            (grant.deliveries, grant.failures),
            (deliveries + 1, failures),
            "deliveries and failures: {}",
            context()
        );
        if share.config.ordered
            && let Some(slot) = log.entries[&offset].slot
        {
            let moved = part.since > share.since;
            assert!(!moved || part.since <= synced, "granted before the seek was synced: {}", context());
            if let Some(first) = part.predecessor(log, offset) {
                panic!("granted although {first} of its key is not settled: {}", context());
            }
            for (other, record) in &part.records {
                if log.entries.get(other).and_then(|entry| entry.slot) != Some(slot) {
                    continue;
                }
                match record.state {
                    State::Leased { lsn, .. } if lsn > share.ordered_since => {
                        panic!("granted while {other} of its key is leased: {}", context());
                    }
                    State::Settled { lsn, .. } if *other < offset => {
                        assert!(lsn <= synced, "granted before {other} of its key was synced: {}", context());
                    }
                    _ => {}
                }
            }
        }
        let state = State::Leased {
            granted_ms: at.now_ms,
            deadline_ms: at.now_ms + share.config.lease_ms,
            lsn: at.lsn,
        };
        let part = share.parts.get_mut(&key).expect("looked up above");
        part.counts.deliveries += 1;
        let record = part.records.entry(offset).or_insert_with(|| Record {
            state,
            deliveries: 0,
            spared: 0,
            failures: 0,
            lease: grant.lease,
            member: grant.member.clone(),
            cause: None,
            fatal: false,
            past: Vec::new(),
            returned: false,
            alone: false,
            text: 0,
        });
        record.state = state;
        record.deliveries += 1;
        record.lease = grant.lease;
        record.member = grant.member.clone();
    }

    /// Ends an attempt: the record waits for its next one, or that was the last.
    pub(crate) fn fail(
        &mut self,
        at: Moment,
        group: &str,
        key: PartitionKey,
        offset: u64,
        failure: Failure<'_>,
    ) {
        let on_exhausted = self.on_exhausted(group, key.topic);
        let share = self.shares.get_mut(group).expect("the group of a lease");
        let part = share.parts.get_mut(&key).expect("the partition of a lease");
        let record = part.records.get_mut(&offset).expect("the record of a lease");
        let config = &share.config;
        record.cause = Some(failure.cause);
        record.returned = true;
        record.text = failure.text;
        let retry = config.retry(failure.class);
        let fatal = failure.cause == Cause::Rejected
            || config.fatal_class.is_some_and(|class| class == failure.class);
        record.fatal = fatal;
        let counted = failure.counted && (fatal || share.guard.probing.is_none());
        if counted {
            record.failures += 1;
            part.counts.failures += 1;
        }
        let spared = failure.spared || (failure.counted && !counted);
        record.spared += u32::from(spared);
        let over = fatal
            || (counted && record.failures >= retry.max_failures)
            || (!spared && record.deliveries - record.spared >= config.max_deliveries);
        if failure.cause != Cause::Released {
            let half = record.failures > 0 && 2 * u64::from(record.failures) >= retry.max_failures.into();
            record.alone = !over && half;
            if !fatal {
                share.guard.outcome(true, config.guard_law(), at.now_ms);
            }
        }
        let attempts = record.failures;
        record.state = if over {
            match on_exhausted {
                OnExhausted::DeadLetter => State::Exhausted,
                OnExhausted::Hold => State::Held,
                OnExhausted::Discard => {
                    part.counts.discarded += 1;
                    State::Settled { how: How::Discarded, lsn: at.lsn, at_ms: at.now_ms }
                }
            }
        } else if failure.cause == Cause::Released {
            State::Waiting { from_ms: at.now_ms, by_ms: at.now_ms }
        } else {
            let (low, high) = match failure.delay_ms {
                Some(delay) => (delay, delay),
                None => config.backoff(retry, attempts),
            };
            State::Waiting { from_ms: at.now_ms.saturating_add(low), by_ms: at.now_ms.saturating_add(high) }
        };
    }

    /// Everything leased by a group: (partition, offset, holder, deadline).
    pub(crate) fn leases(&self, group: &str) -> Vec<(PartitionKey, u64, Name, u64)> {
        let mut leases = Vec::new();
        for (key, part) in &self.shares[group].parts {
            for (offset, record) in &part.records {
                if let Some(deadline) = record.lease_deadline() {
                    leases.push((*key, *offset, record.member.clone(), deadline));
                }
            }
        }
        leases
    }

    /// The leases whose time is over and those of lost members.
    pub(crate) fn lapsing(&self, now_ms: u64, lost: &[(String, String)]) -> BTreeSet<Lapse> {
        let mut lapsing = BTreeSet::new();
        for group in self.shares.keys() {
            for (key, offset, member, deadline) in self.leases(group) {
                let is_lost = lost.iter().any(|(g, m)| g == group && **m == *member);
                if deadline <= now_ms || is_lost {
                    lapsing.insert((group.clone(), key, offset));
                }
            }
        }
        lapsing
    }

    /// Ends leases that were not settled in time, in this order.
    pub(crate) fn lapse(&mut self, at: Moment, lapses: &[Lapse]) {
        for (group, key, offset) in lapses {
            let part = self.shares.get_mut(group).and_then(|share| share.parts.get_mut(key));
            let record = part.and_then(|part| part.records.get_mut(offset)).expect("a lease");
            record.past.push(Past {
                lease: record.lease,
                member: record.member.clone(),
                said: Said::Lapsed,
                at_ms: at.now_ms,
                lsn: at.lsn,
            });
            self.fail(at, group, *key, *offset, Failure::lapse());
        }
    }

    /// An operator wants everything that waits now.
    pub(crate) fn kicked(&mut self, now_ms: u64, group: &str, topic: Option<TopicId>) {
        let share = self.shares.get_mut(group).expect("a known group");
        let parts = share.parts.iter_mut().filter(|(key, _)| topic.is_none_or(|id| key.topic == id));
        for record in parts.flat_map(|(_, part)| part.records.values_mut()) {
            if let State::Waiting { from_ms, by_ms } = &mut record.state {
                (*from_ms, *by_ms) = ((*from_ms).min(now_ms), (*by_ms).min(now_ms));
            }
        }
    }

    /// An operator decides on everything that is held: it is tried again, or discarded. Answers what it was:
    /// (partition, instance, offset).
    pub(crate) fn end_held(
        &mut self,
        at: Moment,
        group: &str,
        topic: Option<TopicId>,
        release: bool,
    ) -> Vec<(PartitionKey, u64, u64)> {
        let mut ended = Vec::new();
        let share = self.shares.get_mut(group).expect("a known group");
        for (key, part) in share.parts.iter_mut().filter(|(key, _)| topic.is_none_or(|id| key.topic == id)) {
            for (offset, record) in part.records.iter_mut().filter(|(_, record)| record.state == State::Held)
            {
                ended.push((*key, part.instance, *offset));
                if release {
                    record.state = State::Waiting { from_ms: at.now_ms, by_ms: at.now_ms };
                    record.failures = 0;
                    record.spared = record.deliveries;
                    (record.alone, record.fatal) = (false, false);
                } else {
                    part.counts.discarded += 1;
                    record.state = State::Settled { how: How::Discarded, lsn: at.lsn, at_ms: at.now_ms };
                }
            }
        }
        ended
    }
}

/// A lease that was not settled in time: (group, partition, offset).
pub(crate) type Lapse = (String, PartitionKey, u64);
