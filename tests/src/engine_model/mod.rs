//! The engine against a model: random commands, crashes and power losses, and after every step the question whether the
//! engine did what the rules of topics, consumer groups and share groups say.
//!
//! [`world`] stands in for the shard: it drives the engine in turns, keeps the journal and releases effects in their order.
//! [`model`] is a small reference that shares no code with the engine; [`promises`] remembers what has left the broker and
//! cannot be taken back. A run is determined by its seed.

mod answers;
mod check;
pub(crate) mod crash;
mod drain;
mod model;
mod ops;
mod promises;
mod release;
pub(crate) mod rng;
pub(crate) mod store;
mod world;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use felucca_broker::engine::config::EngineSettings;

use ops::Weights;
use rng::Rng;
use world::World;

/// Lines kept to tell how a run came to fail.
const TRACE_LINES: usize = 300;

/// The last things that happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(Rc<RefCell<VecDeque<String>>>);

impl Trace {
    pub(crate) fn note(&self, line: impl FnOnce() -> String) {
        let mut lines = self.0.borrow_mut();
        if lines.len() == TRACE_LINES {
            lines.pop_front();
        }
        lines.push_back(line());
    }
}

/// Runs one seed for so many turns, then lets obedient members drain everything.
///
/// # Errors
/// What the engine did wrong, with the seed and the last things that happened.
pub fn run(seed: u64, turns: u64) -> Result<(), String> {
    let trace = Trace::default();
    let inner = trace.clone();
    catch_unwind(AssertUnwindSafe(move || play(seed, turns, inner))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let lines: Vec<String> = trace.0.borrow().iter().cloned().collect();
        format!("{}\nseed {seed}: {}", lines.join("\n"), text.unwrap_or_default())
    })
}

fn play(seed: u64, turns: u64, trace: Trace) {
    let mut rng = Rng::new(seed);
    let settings = EngineSettings {
        segment_bytes: 64 << 10,
        session_timeout: Duration::from_secs(4),
        max_leases: [2, 10_000][usize::from(rng.chance(85))],
        max_exceptions: [3, 10_000][usize::from(rng.chance(85))],
        max_topics: [6, 10_000][usize::from(rng.chance(85))],
        max_groups: [4, 10_000][usize::from(rng.chance(85))],
        max_members_per_group: [2, 10_000][usize::from(rng.chance(85))],
        max_producers_per_partition: [2, 10_000][usize::from(rng.chance(85))],
        max_parked_per_slot: [1, 2, 1_000][rng.below(3) as usize],
        share_state_bytes: [1, 1 << 30][usize::from(rng.chance(85))],
        ..EngineSettings::default()
    };
    let weights = Weights::draw(&mut rng);
    let crashes = [0, 2, 6, 15][rng.below(4) as usize];
    let synced = rng.between(10, 100);
    let mut world = World::new(rng, trace, settings);
    world.unreadable = [0, 0, 10, 60][world.rng.below(4) as usize];
    world.keyed = [0, 70, 100][world.rng.below(3) as usize];
    world.set_up();
    for _ in 0..turns {
        if world.rng.chance(3) {
            world.settle_down();
        }
        if world.rng.chance(5) {
            world.checkpoint();
        }
        if world.rng.chance(1) {
            world.hold_to_the_end();
        }
        world.pass_time();
        world.random_turn(&weights);
        world.end_random_turn(crashes);
        if world.rng.chance(synced) {
            world.sync_some();
        }
    }
    world.drain();
}
