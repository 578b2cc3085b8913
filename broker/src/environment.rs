//! What storage and shard take from the machine besides its disk: time, randomness, and the name of the machine's run.
//!
//! A broker takes them from the operating system. A simulation gives them itself: then nothing in a run depends on
//! anything but its seed, and time passes only when the simulation says so. Between the two is a machine whose *clock* is
//! moved by hand: what records, leases and delays go by stands still until told otherwise, while threads wait for each other
//! in the time of the real machine.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use uuid::Uuid;

/// Names the run of the operating system.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The machine, or what stands in for it. Cheap to clone; clones of a simulated one share its time.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    simulated: Option<Arc<Simulated>>,
}

#[derive(Debug)]
struct Simulated {
    /// Only differences to it mean anything.
    began: Instant,
    /// Only the clock is: threads wait in real time, and randomness is the machine's.
    by_hand: bool,
    state: Mutex<State>,
}

#[derive(Clone, Debug)]
struct State {
    passed: Duration,
    wall_ms: i64,
    entropy: u64,
    machine: u64,
}

impl Environment {
    /// A machine whose time stands still, and whose randomness follows from the seed.
    pub fn simulated(seed: u64, wall_ms: i64) -> Self {
        Self::standing_still(seed, wall_ms, false)
    }

    /// The real machine, but for its clock, which stands still until [`Self::pass`] moves it.
    pub fn by_hand(wall_ms: i64) -> Self {
        Self::standing_still(0, wall_ms, true)
    }

    fn standing_still(entropy: u64, wall_ms: i64, by_hand: bool) -> Self {
        let state = State { passed: Duration::ZERO, wall_ms, entropy, machine: 0 };
        let simulated = Simulated { began: Instant::now(), by_hand, state: Mutex::new(state) };
        Self { simulated: Some(Arc::new(simulated)) }
    }

    /// An independent copy of a simulated machine as it is now.
    #[must_use]
    pub fn fork(&self) -> Self {
        let simulated = self.simulated.as_ref().map(|simulated| {
            let state = Mutex::new(simulated.state.lock().clone());
            Arc::new(Simulated { began: simulated.began, by_hand: simulated.by_hand, state })
        });
        Self { simulated }
    }

    /// Lets time pass; nothing on a real machine, where it passes by itself.
    pub fn pass(&self, time: Duration) {
        self.change(|state| {
            state.passed += time;
            state.wall_ms = state.wall_ms.saturating_add(i64::try_from(time.as_millis()).unwrap_or(i64::MAX));
        });
    }

    /// Sets the wall clock of a simulated machine, in either direction.
    pub fn set_wall_ms(&self, wall_ms: i64) {
        self.change(|state| state.wall_ms = wall_ms);
    }

    /// A simulated machine starts again: its run has another name from now on.
    pub fn restart_machine(&self) {
        self.change(|state| state.machine += 1);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some(simulated) = &self.simulated {
            change(&mut simulated.state.lock());
        }
    }

    /// Whether time stands still for records, leases and delays only.
    pub(crate) fn is_by_hand(&self) -> bool {
        self.simulated.as_ref().is_some_and(|simulated| simulated.by_hand)
    }

    /// The time that threads wait by.
    pub(crate) fn now(&self) -> Instant {
        if self.is_by_hand() { Instant::now() } else { self.clock() }
    }

    /// The time that leases and delays go by.
    pub(crate) fn clock(&self) -> Instant {
        match &self.simulated {
            Some(simulated) => simulated.began + simulated.state.lock().passed,
            None => Instant::now(),
        }
    }

    /// Unix milliseconds; 0 for a clock set before 1970.
    pub fn wall_ms(&self) -> i64 {
        if let Some(simulated) = &self.simulated {
            return simulated.state.lock().wall_ms;
        }
        let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(passed.as_millis()).unwrap_or(i64::MAX)
    }

    /// Fresh random bits.
    pub(crate) fn random(&self) -> u64 {
        if let Some(simulated) = self.simulated.as_ref().filter(|simulated| !simulated.by_hand) {
            return split_mix(&mut simulated.state.lock().entropy);
        }
        let (high, low) = Uuid::new_v4().as_u64_pair();
        // The fixed bits of such an id stand in different places of its halves.
        high ^ low.rotate_left(32)
    }

    /// Differs from one run of the machine to the next.
    pub(crate) fn machine_boot(&self) -> String {
        if let Some(simulated) = &self.simulated {
            return format!("simulated {}", simulated.state.lock().machine);
        }
        match std::fs::read_to_string(BOOT_ID) {
            Ok(id) => id.trim().to_owned(),
            Err(error) => {
                // As if the machine had restarted: that only costs a gap in the offsets.
                tracing::warn!(file = BOOT_ID, %error, "cannot tell this run of the machine from others");
                Uuid::new_v4().to_string()
            }
        }
    }
}

/// SplitMix64: the next number of a small generator.
pub(crate) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulated_time_passes_when_told_to_and_forks_go_their_own_way() {
        let environment = Environment::simulated(1, 1_000);
        let (began, other) = (environment.now(), environment.fork());
        environment.pass(Duration::from_millis(50));
        assert_eq!(environment.now() - began, Duration::from_millis(50));
        assert_eq!((environment.wall_ms(), other.wall_ms(), other.now()), (1_050, 1_000, began));
        environment.set_wall_ms(7);
        assert_eq!((environment.wall_ms(), environment.now() - began), (7, Duration::from_millis(50)));
        assert_eq!(environment.random(), other.random());
        assert_ne!(environment.random(), environment.random());
    }

    #[test]
    fn a_clock_moved_by_hand_stands_still_while_threads_go_on() {
        let environment = Environment::by_hand(1_000);
        let (clock, now) = (environment.clock(), environment.now());
        while environment.now() == now {
            std::hint::spin_loop();
        }
        assert_eq!((environment.clock(), environment.wall_ms()), (clock, 1_000));
        environment.pass(Duration::from_secs(60));
        assert_eq!((environment.clock() - clock, environment.wall_ms()), (Duration::from_secs(60), 61_000));
        assert!(environment.now() < now + Duration::from_secs(60));
    }

    #[test]
    fn a_restarted_machine_has_another_name() {
        let environment = Environment::simulated(1, 0);
        let before = environment.machine_boot();
        assert_eq!(environment.machine_boot(), before);
        environment.restart_machine();
        assert_ne!(environment.machine_boot(), before);
    }
}
