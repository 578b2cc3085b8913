//! What waits for a sync: the queue between the shard thread and the sync thread, and what the sync thread does.
//!
//! While one sync is in flight the shard goes on writing; everything written meanwhile is covered by the next sync. That is
//! the group commit. After each sync the high watermarks are published, then the replies leave, then the shard is told.
//!
//! Invariants: what is released was synced before, in the order of frames; after the first failed sync nothing is released
//! any more, and everything that waits is answered with that failure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::inbox::{Inbox, News};
use super::sink::{Responder, Wakes};
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;
use crate::engine::types::{Lsn, PartitionKey};
use crate::environment::Environment;
use crate::journal::Syncer;
use crate::log::Views;
use crate::plants::planted;

/// How long a sync that nobody waits for, but readers, is put off, so that it covers more.
const READERS_LINGER: Duration = Duration::from_millis(1);

/// What leaves when frame `lsn` is on the device.
#[derive(Debug, Default)]
pub(crate) struct Release {
    pub(crate) lsn: Lsn,
    pub(crate) high_watermarks: Vec<(PartitionKey, u64)>,
    pub(crate) replies: Vec<(Responder, Reply)>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Release>,
    /// A sync must begin at this time.
    due: Option<Instant>,
    stop: bool,
    failed: Option<String>,
}

/// The queue, and the state of the sync thread.
#[derive(Debug)]
pub(crate) struct Releases {
    state: Mutex<State>,
    work: Condvar,
    /// While anything is unsynced, a sync begins at least this often.
    interval: Duration,
    environment: Environment,
}

/// What there is to do for whoever syncs.
enum Due {
    Now,
    At(Instant),
    Nothing,
    /// And nothing will be.
    Ended,
}

impl Releases {
    pub(crate) fn new(interval: Duration, environment: Environment) -> Self {
        Self { state: Mutex::default(), work: Condvar::new(), interval, environment }
    }

    /// Something was written; `release` waits for it. `soon`: sync without delay, for there is little room left.
    pub(crate) fn wrote(&self, release: Release, soon: bool) {
        let delay = if soon || !release.replies.is_empty() {
            Duration::ZERO
        } else if !release.high_watermarks.is_empty() {
            READERS_LINGER
        } else {
            self.interval
        };
        let due = self.environment.now() + delay;
        let mut state = self.state.lock();
        if let Some(reason) = &state.failed {
            let reason = reason.clone();
            drop(state);
            refuse([release], &reason);
            return;
        }
        if !release.replies.is_empty() || !release.high_watermarks.is_empty() {
            state.queue.push_back(release);
        }
        // An earlier time that is set already has the thread waiting for it.
        if state.due.is_none_or(|set| due < set) {
            state.due = Some(due);
            drop(state);
            self.work.notify_one();
        }
    }

    /// Ends the sync thread once everything queued has been released.
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.work.notify_one();
    }

    /// Waits until a sync is due; false to end.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            match self.look(&mut state) {
                Due::Now => return true,
                Due::Ended => return false,
                Due::At(due) => {
                    self.work.wait_until(&mut state, due);
                }
                Due::Nothing => self.work.wait(&mut state),
            }
        }
    }

    /// Whether a sync is due now, which is then the caller's to make. Never waits.
    pub(crate) fn take_due(&self) -> bool {
        matches!(self.look(&mut self.state.lock()), Due::Now)
    }

    /// A sync that is due counts as begun.
    fn look(&self, state: &mut State) -> Due {
        match state.due {
            Some(due) if state.stop || due <= self.environment.now() => {
                state.due = None;
                Due::Now
            }
            Some(due) => Due::At(due),
            None if state.stop && state.queue.is_empty() => Due::Ended,
            None => Due::Nothing,
        }
    }

    fn take_until(&self, synced: Lsn, taken: &mut Vec<Release>) {
        let mut state = self.state.lock();
        let count = state.queue.partition_point(|release| release.lsn <= synced);
        taken.extend(state.queue.drain(..count));
        // Something was written between the sync and now whose time has been taken as this sync's.
        if !state.queue.is_empty() && state.due.is_none() {
            state.due = Some(self.environment.now());
        }
    }

    fn fail(&self, reason: &str) {
        let mut state = self.state.lock();
        state.failed = Some(reason.to_owned());
        state.due = None;
        let queue = std::mem::take(&mut state.queue);
        drop(state);
        refuse(queue, reason);
    }
}

fn refuse(releases: impl IntoIterator<Item = Release>, reason: &str) {
    let mut wakes = Wakes::default();
    for (responder, _) in releases.into_iter().flat_map(|release| release.replies) {
        responder.answer(Reply::Error(EngineError::ReadOnly(reason.to_owned())), &mut wakes);
    }
    wakes.wake_all();
}

/// The sync thread.
#[derive(Debug)]
pub(crate) struct SyncThread {
    syncer: Syncer,
    releases: Arc<Releases>,
    views: Arc<Views>,
    inbox: Arc<Inbox>,
    /// Kept for their room.
    taken: Vec<Release>,
    high_watermarks: BTreeMap<PartitionKey, u64>,
}

impl SyncThread {
    pub(crate) fn new(syncer: Syncer, releases: Arc<Releases>, views: Arc<Views>, inbox: Arc<Inbox>) -> Self {
        Self { syncer, releases, views, inbox, taken: Vec::new(), high_watermarks: BTreeMap::new() }
    }

    /// Syncs and releases until [`Releases::stop`] or a failure.
    pub(crate) fn run(mut self) {
        while self.releases.wait() {
            let Some(synced) = self.sync() else { return };
            self.release(synced);
        }
    }

    /// Syncs what has been written; `None` after a failure, when nothing is released any more.
    pub(crate) fn sync(&self) -> Option<Lsn> {
        match self.syncer.sync() {
            Ok(synced) => Some(synced),
            Err(_) if planted("ignore-failed-sync") => Some(Lsn::MAX),
            Err(error) => {
                let reason = error.to_string();
                self.releases.fail(&reason);
                self.inbox.tell(News::Failed(reason));
                None
            }
        }
    }

    /// Shows what was synced, then answers for it, then tells the shard.
    pub(crate) fn release(&mut self, synced: Lsn) {
        self.releases.take_until(synced, &mut self.taken);
        // Each view once: publishing wakes its readers.
        let shown = self.taken.iter().flat_map(|release| release.high_watermarks.iter().copied());
        self.high_watermarks.extend(shown);
        while let Some((partition, high_watermark)) = self.high_watermarks.pop_first() {
            if let Some(view) = self.views.get(partition) {
                view.publish(high_watermark);
            }
        }
        let mut wakes = Wakes::default();
        for (responder, reply) in self.taken.drain(..).flat_map(|release| release.replies) {
            responder.answer(reply, &mut wakes);
        }
        wakes.wake_all();
        self.inbox.tell(News::Synced(synced));
    }
}
