//! Pauses between tries.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::error::Error;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);
/// No broker may send its clients away for longer.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

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
        let jitter = 0.75 + spread() / 2.0;
        let pause = self.next.mul_f64(jitter);
        self.next = (self.next * 2).min(LONGEST);
        pause
    }

    /// The pause before the next try after this error: at least as long as the broker asked for, up to a minute, and spread
    /// over a quarter more.
    pub(crate) fn next_after(&mut self, error: &Error) -> Duration {
        let asked = error.retry_after().unwrap_or_default().min(LONGEST_ASKED);
        self.next().max(asked.mul_f64(1.0 + spread() / 4.0))
    }

    pub(crate) async fn wait_after(&mut self, error: &Error) {
        tokio::time::sleep(self.next_after(error)).await;
    }

    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

/// One of 1,024 steps from 0 to 1.
fn spread() -> f64 {
    f64::from((entropy() % 1024) as u32) / 1024.0
}

/// A random number, good enough to spread clients.
pub(crate) fn entropy() -> u64 {
    // Each `RandomState` is keyed differently.
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use felucca_protocol::ErrorCode;

    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_stay_near_it() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..12).map(|_| backoff.next()).collect();
        assert!(pauses[0] >= FIRST.mul_f64(0.75) && pauses[0] <= FIRST.mul_f64(1.25));
        assert!(pauses.iter().all(|pause| *pause <= LONGEST.mul_f64(1.25)));
        assert!(pauses[11] >= LONGEST.mul_f64(0.75));
    }

    #[test]
    fn nobody_asks_again_before_the_time_that_the_broker_named() {
        let busy = |retry_after| Error::Broker {
            code: ErrorCode::Overloaded,
            message: String::new(),
            retry_after: Some(retry_after),
        };
        for _ in 0..100 {
            let asked = Duration::from_secs(5);
            let pause = Backoff::default().next_after(&busy(asked));
            assert!(pause >= asked && pause <= asked.mul_f64(1.25), "{pause:?}");
        }
        let pause = Backoff::default().next_after(&busy(Duration::from_secs(86_400)));
        assert!(pause <= LONGEST_ASKED.mul_f64(1.25));
        assert!(Backoff::default().next_after(&Error::Disconnected) < FIRST * 2);
    }
}
