//! How fast the cleaner may read and write, and when it must end.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::pass::CleanError;

/// Bytes that are passed without looking at the clock.
const PIECE: u64 = 256 * 1024;

/// Tells the cleaner to end.
#[derive(Debug, Default)]
pub(super) struct Stop {
    stopping: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(super) fn set(&self) {
        *self.stopping.lock() = true;
        self.changed.notify_all();
    }

    /// Waits so long, unless it is told to end; answers whether it is.
    pub(super) fn wait(&self, duration: Duration) -> bool {
        let mut stopping = self.stopping.lock();
        if !*stopping && !duration.is_zero() {
            self.changed.wait_for(&mut stopping, duration);
        }
        *stopping
    }
}

/// Holds reading and writing together to a rate.
#[derive(Debug)]
pub(super) struct Pace<'s> {
    bytes_per_second: u64,
    stop: &'s Stop,
    began: Instant,
    spent: u64,
    looked_at: u64,
}

impl<'s> Pace<'s> {
    pub(super) fn new(bytes_per_second: u64, stop: &'s Stop) -> Self {
        Self { bytes_per_second, stop, began: Instant::now(), spent: 0, looked_at: 0 }
    }

    /// Waits until so many bytes more keep to the rate.
    pub(super) fn spend(&mut self, bytes: u64) -> Result<(), CleanError> {
        self.spent += bytes;
        if self.spent - self.looked_at < PIECE {
            return Ok(());
        }
        self.looked_at = self.spent;
        let due = Duration::from_secs_f64(self.spent as f64 / self.bytes_per_second.max(1) as f64);
        let early = due.saturating_sub(self.began.elapsed());
        if self.stop.wait(early) { Err(CleanError::Stopping) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_stop_is_heard() {
        let stop = Stop::default();
        let mut pace = Pace::new(10 << 20, &stop);
        let began = Instant::now();
        for _ in 0..4 {
            pace.spend(512 << 10).unwrap();
        }
        assert!(began.elapsed() >= Duration::from_millis(190));
        stop.set();
        assert!(matches!(pace.spend(1 << 20), Err(CleanError::Stopping)));
    }
}
