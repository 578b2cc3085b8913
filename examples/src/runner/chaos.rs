//! Kills: which process dies when, drawn from the seed before the run begins.
//!
//! Moments are fractions of the progress rather than times, so that a fast and a slow machine meet the same run. Orders
//! are let in only so far ahead of those that are settled, and not at all while a kill is due: so kills fall into the
//! middle of the work, however short the run.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::progress::Snapshot;
use super::supervise::{Fleet, Role};
use crate::seeded::Seeded;

/// What a run with kills has to reach.
const LEAST_KILLS: u64 = 12;
const LEAST_KILLS_OF_EACH: u64 = 2;

/// One kill of the plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Kill {
    /// Fraction of the progress.
    at: f64,
    /// And so long after it was reached.
    after: Duration,
    role: Role,
}

/// Three kills for every process and up to three more, one in each slice of the run, in a drawn order.
pub(crate) fn plan(seed: u64) -> Vec<Kill> {
    let mut chance = Seeded::for_name(seed, "kills");
    let mut roles: Vec<Role> = [Role::ALL; 3].concat();
    for _ in 0..chance.below(4) {
        roles.push(Role::ALL[chance.below(4) as usize]);
    }
    chance.shuffle(&mut roles);
    let slice = 0.94 / roles.len() as f64;
    roles
        .into_iter()
        .enumerate()
        .map(|(index, role)| Kill {
            at: 0.02 + slice * (index as f64 + chance.below(1_000) as f64 / 1_000.0),
            after: Duration::from_millis(chance.below(60)),
            role,
        })
        .collect()
}

/// Carries out the plan, starting every process again at once, and holds back orders in `admitted` meanwhile.
/// Returns when the last process that was killed is ready again.
pub(crate) async fn run(
    plan: Vec<Kill>,
    fleet: Arc<Fleet>,
    mut progress: watch::Receiver<Snapshot>,
    admitted: watch::Sender<usize>,
) -> anyhow::Result<()> {
    let mut restarts = JoinSet::new();
    for kill in plan {
        loop {
            let now = progress.borrow_and_update().clone();
            if now.fraction() >= kill.at {
                break;
            }
            let ahead = (now.purchases / 16).max(4);
            admitted.send_replace(now.settled() + ahead);
            progress.changed().await?;
        }
        tokio::time::sleep(kill.after).await;
        // The next kill does not wait for this one's process, unless it is the same: several may be down at once.
        let killed = fleet.kill(kill.role).await?;
        restarts.spawn(killed.restart());
        while let Some(restarted) = restarts.try_join_next() {
            restarted??;
        }
    }
    admitted.send_replace(usize::MAX);
    while let Some(restarted) = restarts.join_next().await {
        restarted??;
    }
    Ok(())
}

/// Fails when there were fewer kills than a run with kills promises.
pub(crate) fn check(fleet: &Fleet) -> anyhow::Result<()> {
    for role in Role::ALL {
        let (name, kills) = (role.name(), fleet.kills(role));
        ensure!(kills >= LEAST_KILLS_OF_EACH, "the {name} process was killed {kills} times only");
    }
    let kills = fleet.all_kills();
    ensure!(kills >= LEAST_KILLS, "only {kills} processes were killed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_kills_often_enough_and_all_along_the_run() {
        for seed in 0..200 {
            let plan = plan(seed);
            assert!(plan.len() as u64 >= LEAST_KILLS, "seed {seed}");
            for role in Role::ALL {
                let kills = plan.iter().filter(|kill| kill.role == role).count() as u64;
                assert!(kills >= LEAST_KILLS_OF_EACH, "seed {seed}: {role:?} {kills} times");
            }
            assert!(plan.is_sorted_by(|a, b| a.at <= b.at), "seed {seed}");
            assert!(plan[0].at < 0.12 && plan[plan.len() - 1].at > 0.85, "seed {seed}");
            assert!(plan[plan.len() - 1].at < 0.97, "seed {seed}");
        }
    }

    #[test]
    fn a_plan_follows_from_its_seed() {
        assert_eq!(plan(3), plan(3));
        assert_ne!(plan(3), plan(4));
    }
}
