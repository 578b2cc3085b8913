//! Time and randomness for the engine.

use std::time::{Duration, Instant};

use crate::engine::types::Now;
use crate::environment::{Environment, split_mix};

/// Monotonic time goes on from where the journal's ended; wall time is the machine's; entropy is a small generator's.
#[derive(Debug)]
pub(crate) struct Clock {
    environment: Environment,
    /// Monotonic time at `started`, which is of the environment's clock.
    base_ms: u64,
    started: Instant,
    entropy: u64,
}

impl Clock {
    /// A clock whose monotonic time goes on from `base_ms`.
    pub(crate) fn starting_at(environment: Environment, base_ms: u64) -> Self {
        let (started, entropy) = (environment.clock(), environment.random());
        Self { environment, base_ms, started, entropy }
    }

    pub(crate) fn now(&mut self) -> Now {
        let (monotonic_ms, wall_ms) = (self.monotonic_ms(), self.environment.wall_ms());
        Now { monotonic_ms, wall_ms, entropy: split_mix(&mut self.entropy) }
    }

    /// The time that threads wait by.
    pub(crate) fn instant(&self) -> Instant {
        self.environment.now()
    }

    pub(crate) fn monotonic_ms(&self) -> u64 {
        let passed = self.environment.clock().saturating_duration_since(self.started).as_millis();
        self.base_ms.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    /// How long it is until a monotonic time.
    pub(crate) fn until(&self, monotonic_ms: u64) -> Duration {
        Duration::from_millis(monotonic_ms.saturating_sub(self.monotonic_ms()))
    }
}
