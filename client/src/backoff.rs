//! Pauses between tries.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// Exponential backoff with jitter: 50 ms doubling to 2 s, each ±25 %.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The pause before the next try.
    pub(crate) fn next(&mut self) -> Duration {
        // 1,024 steps between 0.75 and 1.25.
        let jitter = 0.75 + f64::from((entropy() % 1024) as u32) / 2048.0;
        let pause = self.next.mul_f64(jitter);
        self.next = (self.next * 2).min(LONGEST);
        pause
    }

    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

/// A random number, good enough to spread clients.
pub(crate) fn entropy() -> u64 {
    // Each `RandomState` is keyed differently.
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_stay_near_it() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..12).map(|_| backoff.next()).collect();
        assert!(pauses[0] >= FIRST.mul_f64(0.75) && pauses[0] <= FIRST.mul_f64(1.25));
        assert!(pauses.iter().all(|pause| *pause <= LONGEST.mul_f64(1.25)));
        assert!(pauses[11] >= LONGEST.mul_f64(0.75));
    }
}
