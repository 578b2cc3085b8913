//! A clock moved by hand: from one thing that is due to the next, with time for clients to act in between.
//!
//! What falls due together with what clients make of it then happens in the order in which it would have happened: a retry is
//! handed out and fails again before the clock goes on to the next one.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::inbox::Inbox;
use crate::engine::types::Lsn;
use crate::environment::Environment;

/// Nothing was written for so long: clients have nothing to say to what happened last.
const QUIET: Duration = Duration::from_millis(5);
/// Clients that always have something to say get so long.
const PATIENCE: Duration = Duration::from_secs(1);

/// Moves the clock to the next thing that is due, by `most` at the most, and returns by how much once the clients are quiet.
/// When the future is dropped, the clock stands where it is.
pub(crate) async fn step(inbox: &Inbox, environment: &Environment, most: Duration) -> Duration {
    let before = inbox.progress();
    let until_due = before.until_due.map_or(most, |until_due| until_due.max(Duration::from_millis(1)));
    let step = until_due.min(most);
    environment.pass(step);
    // The shard looks at the clock.
    inbox.submit([]);
    let after = inbox.progress();
    if after.written != before.written {
        quiet(inbox, after).await;
    }
    step
}

/// Returns when nothing has been written for a while.
pub(crate) async fn settle(inbox: &Inbox) {
    quiet(inbox, inbox.progress()).await;
}

async fn quiet(inbox: &Inbox, mut last: Progress) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        sleep(QUIET).await;
        let now = inbox.progress();
        if now.written == last.written && now.synced == now.written {
            return;
        }
        last = now;
    }
}

/// How far the shard is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub(super) written: Lsn,
    pub(super) synced: Lsn,
    /// How long it is by the clock until something is due.
    pub(super) until_due: Option<Duration>,
}
