//! Sending at a fixed rate: when is which record due?
//!
//! The runtime's timers count milliseconds, five records too coarse at 5,000 a second, and spinning would take a core from
//! the broker. A kernel timer wakes within microseconds and costs nothing in between.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A schedule of evenly spaced records.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    start: Instant,
    rate: u32,
}

impl Schedule {
    pub(super) fn new(start: Instant, rate: u32) -> Self {
        Self { start, rate }
    }

    /// When a record is due, counted from 0.
    pub(super) fn due(&self, record: u64) -> Instant {
        let rate = u64::from(self.rate);
        let rest = Duration::from_nanos(record % rate * 1_000_000_000 / rate);
        self.start + Duration::from_secs(record / rate) + rest
    }
}

/// Waits precisely.
#[derive(Debug)]
pub(super) struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: an `OwnedFd` names the same open timer until it is dropped, and the `AsyncFd` owns it.
        let registered = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Returns at the moment, or at once when it has passed.
    pub(super) async fn wait_until(&self, moment: Instant) -> io::Result<()> {
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let it_value = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        loop {
            let mut ready = self.0.readable().await?;
            let expired = ready.try_io(|timer| {
                let mut expirations = [0; 8];
                Ok(rustix::io::read(timer.get_ref(), &mut expirations)?)
            });
            if let Ok(result) = expired {
                return result.map(|_| ());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_spaced_evenly_without_drift() {
        let start = Instant::now();
        let schedule = Schedule::new(start, 3);
        assert_eq!(schedule.due(0), start);
        assert_eq!(schedule.due(1) - start, Duration::from_nanos(333_333_333));
        assert_eq!(schedule.due(300_000_000) - start, Duration::from_secs(100_000_000));
    }

    #[tokio::test]
    async fn the_timer_is_never_early() {
        let timer = Timer::new().unwrap();
        for micros in [0, 50, 3000] {
            let moment = Instant::now() + Duration::from_micros(micros);
            timer.wait_until(moment).await.unwrap();
            assert!(Instant::now() >= moment);
        }
        timer.wait_until(Instant::now() - Duration::from_secs(1)).await.unwrap();
    }
}
