//! Cutting a failing run down: fewer steps, then steps left out, as long as it still fails.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Plan, Violation, run};

/// A run that fails, and of which nothing more could be left out.
#[derive(Clone, Debug)]
pub struct Shrunk {
    pub plan: Plan,
    pub violation: Violation,
    /// Steps that are left.
    pub left: u64,
}

/// Cuts down a plan that led to a violation, for at most so long.
pub fn shrink(plan: &Plan, violation: Violation, patience: Duration) -> Shrunk {
    let end = Instant::now() + patience;
    let mut best = Shrunk { plan: plan.clone(), violation, left: plan.steps };
    // Nothing behind the last step matters, unless it came out at the end only.
    if patience.is_zero() {
        return best;
    }
    let shorter = without(&best.plan, best.violation.steps..plan.steps);
    attempt(&mut best, shorter);
    let mut chunk = (best.violation.steps / 2).max(1);
    while Instant::now() < end {
        let mut from = 0;
        let mut removed = false;
        while from < best.violation.steps && Instant::now() < end {
            let fewer = without(&best.plan, from..(from + chunk).min(plan.steps));
            if fewer.skipped.len() > best.plan.skipped.len() {
                removed |= attempt(&mut best, fewer);
            }
            from += chunk;
        }
        if chunk == 1 && !removed {
            break;
        }
        chunk = (chunk / 2).max(1);
    }
    best.left = best.plan.steps - best.plan.skipped.len() as u64;
    best
}

/// The number of steps stays: it determines which faults come when.
fn without(plan: &Plan, steps: Range<u64>) -> Plan {
    let mut plan = plan.clone();
    plan.skipped.extend(steps);
    plan
}

/// Keeps a plan that fails as well.
fn attempt(best: &mut Shrunk, plan: Plan) -> bool {
    match run(&plan) {
        Ok(_) => false,
        Err(violation) => {
            let behind = violation.steps..plan.steps;
            best.plan = without(&plan, behind);
            best.violation = violation;
            true
        }
    }
}
