//! The outage guard of a share group: when most of the last outcomes failed, the handlers' dependency is down rather than
//! the records bad. The group then drops to single probes with pauses between them, and doubles back up while a round of
//! as many outcomes as leases were allowed goes well; meanwhile failures that may be retried do not count toward the
//! maximum, so that an outage does not pour the topic into the dead letters.
//!
//! An outcome is an ack, a nack, an expired lease or a lost member. Rejections, and nacks of a class that is not retryable,
//! say nothing of a dependency and are none; nor are releases.
//!
//! The state is journaled whole ([`OutageRow`]) whenever it changed by more than successes while nothing had failed; those
//! are folded from the settlements.

use crate::engine::config::ShareConfig;
use crate::engine::event::OutageRow;

/// The guard goes off when a round at this limit went well.
const LAST_LIMIT: u32 = 64;
/// Longest pause between two probes, milliseconds; `backoff-max` when that is shorter.
const LONGEST_PAUSE_MS: u64 = 10_000;
const SHORTEST_PAUSE_MS: u64 = 10;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outage {
    /// The newest outcome in the lowest bit; a set bit failed.
    window: u128,
    on: Option<Probing>,
    /// Live leases that were granted since it is on. Derived.
    probes: u32,
    /// Something is to be journaled.
    changed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Probing {
    /// Leases at a time.
    limit: u32,
    succeeded: u32,
    failed: u32,
    pause_ms: u64,
    not_before_ms: u64,
    /// When it came on. No probe is granted in that millisecond.
    since_ms: u64,
}

impl Probing {
    fn first(config: &ShareConfig, now_ms: u64) -> Self {
        let pause_ms = config.backoff_initial_ms.clamp(SHORTEST_PAUSE_MS, LONGEST_PAUSE_MS);
        Self {
            limit: 1,
            succeeded: 0,
            failed: 0,
            pause_ms,
            not_before_ms: now_ms + pause_ms,
            since_ms: now_ms,
        }
    }
}

/// Whether so many failed that it is not for the records.
fn is_outage(failed: u32, of: u32, config: &ShareConfig) -> bool {
    failed * 100 > of * config.outage_percent
}

impl Outage {
    pub(crate) fn is_on(&self) -> bool {
        self.on.is_some()
    }

    /// Leases that may be granted now: what was leased before the outage does not stand in the way of a probe.
    pub(crate) fn room(&self, now_ms: u64) -> usize {
        match &self.on {
            None => usize::MAX,
            Some(probing) if probing.not_before_ms > now_ms => 0,
            Some(probing) => probing.limit.saturating_sub(self.probes) as usize,
        }
    }

    /// A lease was granted.
    pub(crate) fn granted(&mut self) {
        self.probes += u32::from(self.is_on());
    }

    /// A lease that was granted at `granted_ms` ended.
    pub(crate) fn ended(&mut self, granted_ms: u64) {
        if self.on.is_some_and(|probing| granted_ms > probing.since_ms) {
            // Not counted during replay, which ends leases too when a group is moved.
            self.probes = self.probes.saturating_sub(1);
        }
    }

    /// Counts the probes anew, among the times at which the live leases were granted.
    pub(crate) fn recount(&mut self, granted_ms: impl Iterator<Item = u64>) {
        let since_ms = self.on.map_or(u64::MAX, |probing| probing.since_ms);
        // Never more than the highest limit.
        self.probes = granted_ms.filter(|granted_ms| *granted_ms > since_ms).count() as u32;
    }

    /// Leases that may be live at a time; none while the guard is off.
    pub(crate) fn limit(&self) -> Option<u32> {
        self.on.map(|probing| probing.limit)
    }

    /// Nothing is handed out before this time, in milliseconds of uptime; none while the guard is off.
    pub(crate) fn not_before(&self) -> Option<u64> {
        self.on.map(|probing| probing.not_before_ms)
    }

    /// Failures among the last outcomes.
    pub(crate) fn failed(&self, config: &ShareConfig) -> u32 {
        (self.window & ((1 << config.outage_window) - 1)).count_ones()
    }

    /// One more outcome.
    pub(crate) fn note(&mut self, failed: bool, config: &ShareConfig, now_ms: u64) {
        if !config.outage_guard {
            return;
        }
        let Some(probing) = &mut self.on else {
            self.window = self.window << 1 | u128::from(failed);
            self.changed |= failed;
            // A success turns nothing on, also when the window became shorter meanwhile; it would not be journaled.
            if failed && is_outage(self.failed(config), config.outage_window, config) {
                self.on = Some(Probing::first(config, now_ms));
                self.probes = 0;
            }
            return;
        };
        self.changed = true;
        *(if failed { &mut probing.failed } else { &mut probing.succeeded }) += 1;
        let outcomes = probing.failed + probing.succeeded;
        if outcomes < probing.limit {
            return;
        }
        if is_outage(probing.failed, outcomes, config) {
            // What was leased before the outage fails in one go: that is one probe.
            if now_ms >= probing.not_before_ms {
                let longest = config.backoff_max_ms.clamp(SHORTEST_PAUSE_MS, LONGEST_PAUSE_MS);
                let pause_ms = (probing.pause_ms * 2).min(longest);
                *probing = Probing { pause_ms, not_before_ms: now_ms + pause_ms, ..*probing };
            }
            *probing = Probing { limit: 1, succeeded: 0, failed: 0, ..*probing };
        } else if probing.limit >= LAST_LIMIT {
            (self.on, self.window) = (None, 0);
        } else {
            let (limit, since_ms) = (probing.limit * 2, probing.since_ms);
            // A success of what was leased before may come in the millisecond in which the guard came on.
            let not_before_ms = now_ms.max(since_ms + 1);
            *probing = Probing { limit, since_ms, not_before_ms, ..Probing::first(config, now_ms) };
        }
    }

    /// The settings changed.
    pub(crate) fn configured(&mut self, config: &ShareConfig) {
        if !config.outage_guard && (self.is_on() || self.window != 0) {
            *self = Self { changed: true, ..Self::default() };
        }
    }

    /// Successes that were folded from a settlement.
    pub(crate) fn fold_successes(&mut self, count: u32) {
        if self.on.is_none() {
            self.window = self.window.checked_shl(count).unwrap_or(0);
        }
    }

    /// What is to be journaled, if anything is since the last call.
    pub(crate) fn take_changed(&mut self, group: &str) -> Option<OutageRow> {
        std::mem::take(&mut self.changed).then(|| self.to_row(group))
    }

    pub(crate) fn to_row(&self, group: &str) -> OutageRow {
        let off = Probing { limit: 0, succeeded: 0, failed: 0, pause_ms: 0, not_before_ms: 0, since_ms: 0 };
        let probing = self.on.unwrap_or(off);
        OutageRow {
            group: group.to_owned(),
            // The halves of the window.
            window_low: self.window as u64,
            window_high: (self.window >> 64) as u64,
            limit: probing.limit,
            succeeded: probing.succeeded,
            failed: probing.failed,
            pause_ms: probing.pause_ms,
            not_before_ms: probing.not_before_ms,
            since_ms: probing.since_ms,
        }
    }

    pub(crate) fn from_row(row: &OutageRow) -> Self {
        let on = Probing {
            limit: row.limit,
            succeeded: row.succeeded,
            failed: row.failed,
            pause_ms: row.pause_ms,
            not_before_ms: row.not_before_ms,
            since_ms: row.since_ms,
        };
        Self {
            window: u128::from(row.window_high) << 64 | u128::from(row.window_low),
            on: (row.limit > 0).then_some(on),
            probes: 0,
            changed: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn down(config: &ShareConfig) -> Outage {
        let mut outage = Outage::default();
        for _ in 0..81 {
            assert!(!outage.is_on());
            outage.note(true, config, 0);
        }
        outage
    }

    #[test]
    fn more_than_eighty_of_a_hundred_outcomes_turn_it_on() {
        let config = ShareConfig::default();
        assert_eq!(down(&config).limit(), Some(1));
        let mut mixed = Outage::default();
        for i in 0..1_000 {
            mixed.note(i % 5 != 0, &config, 0);
        }
        assert!(!mixed.is_on(), "80 of 100 are not more than 80");
    }

    #[test]
    fn the_part_that_must_fail_is_a_setting() {
        let config = ShareConfig { outage_percent: 50, ..ShareConfig::default() };
        let mut outage = Outage::default();
        for outcome in 0..101 {
            assert!(!outage.is_on(), "50 of 100 are not more than 50");
            outage.note(outcome % 2 == 0, &config, 0);
        }
        outage.note(true, &config, 0);
        assert!(outage.is_on(), "51 of 100 are");
    }

    #[test]
    fn it_doubles_up_while_rounds_go_well_and_goes_off() {
        let config = ShareConfig::default();
        let mut outage = down(&config);
        for limit in [1, 2, 4, 8, 16, 32, 64] {
            assert_eq!(outage.limit(), Some(limit));
            for _ in 0..limit {
                outage.note(false, &config, 1_000);
            }
        }
        assert!(!outage.is_on() && outage.failed(&config) == 0);
    }

    #[test]
    fn a_round_that_fails_goes_back_to_single_probes_and_a_mixed_one_does_not() {
        let config = ShareConfig::default();
        let mut outage = down(&config);
        outage.note(false, &config, 1_000);
        outage.note(false, &config, 1_000);
        outage.note(true, &config, 1_000);
        assert_eq!(outage.limit(), Some(4));
        for _ in 0..4 {
            outage.note(true, &config, 1_000);
        }
        assert_eq!(outage.limit(), Some(1));
    }

    #[test]
    fn pauses_between_failed_probes_grow_and_failures_of_one_go_are_one() {
        let config = ShareConfig::default();
        let mut outage = down(&config);
        assert_eq!(outage.not_before(), Some(1_000));
        outage.note(true, &config, 500);
        assert_eq!(outage.not_before(), Some(1_000));
        for (now, next) in
            [(1_000, 3_000), (3_000, 7_000), (7_000, 15_000), (15_000, 25_000), (25_000, 35_000)]
        {
            outage.note(true, &config, now);
            assert_eq!(outage.not_before(), Some(next));
        }
    }

    #[test]
    fn a_success_does_not_turn_it_on_when_the_window_became_shorter() {
        let wide = ShareConfig::default();
        let narrow = ShareConfig { outage_window: 10, ..ShareConfig::default() };
        let mut outage = Outage::default();
        for _ in 0..20 {
            outage.note(true, &wide, 0);
        }
        outage.note(false, &narrow, 0);
        assert!(!outage.is_on());
        outage.note(true, &narrow, 0);
        assert!(outage.is_on());
    }

    #[test]
    fn no_probe_is_granted_in_the_millisecond_in_which_it_came_on() {
        let config = ShareConfig::default();
        let mut outage = down(&config);
        outage.note(false, &config, 0);
        assert_eq!((outage.limit(), outage.room(0), outage.room(1)), (Some(2), 0, 2));
    }

    #[test]
    fn it_survives_as_a_row() {
        let outage = down(&ShareConfig::default());
        let again = Outage::from_row(&outage.to_row("g"));
        assert_eq!(again, Outage { changed: false, ..outage });
    }
}
