//! The broker on a simulated machine: its disk loses power and fails, its clock jumps, its network is slow, cut and left,
//! its processes die; and after every step the question whether what left it still holds.
//!
//! What runs is the real thing from the shard's inbox inwards: engine, journal, log, checkpoints, recovery, the release of
//! replies, all driven step by step ([`felucca_broker::shard::Stepped`]) on [`felucca_broker::disk::MemDisk`]. What stands
//! in for the rest: [`network`] for sockets and listeners, [`producer`], [`consumer`] and [`worker`] for the client library;
//! they speak the engine's commands, not the wire's frames.
//!
//! [`world`] holds all of it together and takes the steps; [`faults`] does harm; [`recovery`] ends and starts runs, also on
//! copies of the disk; [`history`] and [`leases`] remember what has left the broker and must therefore be so, [`compacted`] what may be
//! missing of it; [`finish`]
//! heals everything and sees that it comes to rest. A run is determined by its seed and its plan: what a step does is drawn
//! from the seed and the step's number, so that a failing run can be cut down step by step ([`shrink()`]).

mod admin;
mod answers;
mod client;
mod compacted;
mod consumer;
mod content;
mod copies;
mod coverage;
mod faults;
mod finish;
mod history;
mod leases;
mod network;
mod producer;
mod reader;
mod recovery;
mod redriver;
mod setup;
mod shrink;
mod trace;
mod worker;
mod world;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

pub use coverage::Coverage;
pub use shrink::{Shrunk, shrink};
use trace::Trace;
use world::World;

/// Steps of a run, unless told otherwise.
pub const STEPS: u64 = 1_000;
/// Fewest faults of a run with as many steps.
pub const FAULTS: u64 = 5;

/// Which run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub steps: u64,
    /// Steps that are left out.
    pub skipped: BTreeSet<u64>,
}

impl Plan {
    /// A whole run.
    pub fn new(seed: u64, steps: u64) -> Self {
        Self { seed, steps, skipped: BTreeSet::new() }
    }
}

/// How a run went that found nothing wrong. Two runs of one plan are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub coverage: Coverage,
    /// Over all that happened, in its order.
    pub trace: u64,
    /// Over every byte of the disk at the end.
    pub disk: u32,
    /// What the groups say of themselves at the end.
    pub metrics: String,
    pub faults: u64,
}

/// What went wrong.
#[derive(Clone, Debug)]
pub struct Violation {
    pub what: String,
    /// The last things that happened.
    pub trace: Vec<String>,
    /// Steps taken until then, those left out included.
    pub steps: u64,
}

/// Makes one run.
///
/// # Errors
/// A rule was broken.
pub fn run(plan: &Plan) -> Result<Outcome, Violation> {
    let trace = Rc::new(RefCell::new(Trace::default()));
    let inner = trace.clone();
    catch_unwind(AssertUnwindSafe(move || play(plan, inner))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let trace = trace.borrow();
        Violation { what: text.unwrap_or_default(), trace: trace.lines(), steps: trace.steps }
    })
}

fn play(plan: &Plan, trace: Rc<RefCell<Trace>>) -> Outcome {
    let mut world = World::new(plan, trace.clone());
    world.set_up();
    for step in 0..plan.steps {
        trace.borrow_mut().steps = step + 1;
        if !plan.skipped.contains(&step) {
            world.step(step);
        }
    }
    let metrics = world.finish();
    let trace = trace.borrow().digest();
    Outcome {
        disk: world.disk.digest(),
        faults: world.faults_met(),
        coverage: world.coverage,
        trace,
        metrics,
    }
}
