//! The outage guard of a share group, told in the plainest way.

/// The last outcomes and, while the guard is on, how the probing goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Guard {
    /// The newest last; true = failed.
    outcomes: Vec<bool>,
    pub(crate) probing: Option<Probing>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Probing {
    pub(crate) limit: u32,
    round: Vec<bool>,
    pause_ms: u64,
    pub(crate) not_before_ms: u64,
    /// When it came on.
    pub(crate) since_ms: u64,
}

/// The settings that it goes by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Law {
    pub(crate) on: bool,
    pub(crate) window: usize,
    pub(crate) percent: u32,
    pub(crate) initial_ms: u64,
    pub(crate) max_ms: u64,
}

fn most_failed(outcomes: &[bool], of: usize, percent: u32) -> bool {
    let failed = outcomes.iter().filter(|failed| **failed).count();
    failed as f64 / of as f64 > f64::from(percent) / 100.0 + 1e-9
}

impl Guard {
    pub(crate) fn outcome(&mut self, failed: bool, law: Law, now_ms: u64) {
        if !law.on {
            return;
        }
        let Some(probing) = &mut self.probing else {
            self.outcomes.push(failed);
            let first = self.outcomes.len().saturating_sub(128);
            self.outcomes.drain(..first);
            let last = self.outcomes.len().saturating_sub(law.window);
            if failed && most_failed(&self.outcomes[last..], law.window, law.percent) {
                let pause_ms = law.initial_ms.clamp(10, 10_000);
                let not_before_ms = now_ms + pause_ms;
                self.probing =
                    Some(Probing { limit: 1, round: Vec::new(), pause_ms, not_before_ms, since_ms: now_ms });
            }
            return;
        };
        probing.round.push(failed);
        if probing.round.len() < probing.limit as usize {
            return;
        }
        let round = std::mem::take(&mut probing.round);
        if most_failed(&round, round.len(), law.percent) {
            probing.limit = 1;
            if probing.not_before_ms <= now_ms {
                probing.pause_ms = (probing.pause_ms * 2).min(law.max_ms.clamp(10, 10_000));
                probing.not_before_ms = now_ms + probing.pause_ms;
            }
        } else if probing.limit == 64 {
            *self = Self::default();
        } else {
            probing.limit *= 2;
            probing.pause_ms = law.initial_ms.clamp(10, 10_000);
            probing.not_before_ms = now_ms.max(probing.since_ms + 1);
        }
    }
}
