//! What waits for a sync: the queue between the shard thread and the sync thread, and what the sync thread does.
//!
//! While one sync is in flight the shard goes on writing; everything written meanwhile is covered by the next sync. That is
//! the group commit. After each sync the high watermarks are published, then the replies leave, then the shard is told.
//!
//! Invariants: what is released was synced before, in the order of frames; after the first failed sync nothing is released
//! any more, and everything that waits is answered with that failure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::inbox::{Inbox, News};
use super::sink::{Responder, Wakes};
use crate::engine::effect::Reply;
use crate::engine::error::EngineError;
use crate::engine::types::{Lsn, PartitionKey};
use crate::journal::Syncer;
use crate::log::Views;

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
}

impl Releases {
    pub(crate) fn new(interval: Duration) -> Self {
        Self { state: Mutex::default(), work: Condvar::new(), interval }
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
        let due = Instant::now() + delay;
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
            if state.stop && state.queue.is_empty() && state.due.is_none() {
                return false;
            }
            match state.due {
                Some(due) if state.stop || due <= Instant::now() => {
                    state.due = None;
                    return true;
                }
                Some(due) => {
                    self.work.wait_until(&mut state, due);
                }
                None => self.work.wait(&mut state),
            }
        }
    }

    fn take_until(&self, synced: Lsn, taken: &mut Vec<Release>) {
        let mut state = self.state.lock();
        let count = state.queue.partition_point(|release| release.lsn <= synced);
        taken.extend(state.queue.drain(..count));
        // Something was written between the sync and now whose time has been taken as this sync's.
        if !state.queue.is_empty() && state.due.is_none() {
            state.due = Some(Instant::now());
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
    pub(crate) syncer: Syncer,
    pub(crate) releases: Arc<Releases>,
    pub(crate) views: Arc<Views>,
    pub(crate) inbox: Arc<Inbox>,
}

impl SyncThread {
    /// Syncs and releases until [`Releases::stop`] or a failure.
    pub(crate) fn run(&self) {
        let mut taken = Vec::new();
        let mut high_watermarks = HashMap::new();
        while self.releases.wait() {
            let synced = match self.syncer.sync() {
                Ok(synced) => synced,
                Err(error) => {
                    let reason = error.to_string();
                    self.releases.fail(&reason);
                    self.inbox.tell(News::Failed(reason));
                    return;
                }
            };
            self.releases.take_until(synced, &mut taken);
            release(&self.views, &mut taken, &mut high_watermarks);
            self.inbox.tell(News::Synced(synced));
        }
    }
}

/// Shows what was synced, then answers for it.
fn release(views: &Views, taken: &mut Vec<Release>, high_watermarks: &mut HashMap<PartitionKey, u64>) {
    // Each view once: publishing wakes its readers.
    high_watermarks.extend(taken.iter().flat_map(|release| release.high_watermarks.iter().copied()));
    for (partition, high_watermark) in high_watermarks.drain() {
        if let Some(view) = views.get(partition) {
            view.publish(high_watermark);
        }
    }
    let mut wakes = Wakes::default();
    for (responder, reply) in taken.drain(..).flat_map(|release| release.replies) {
        responder.answer(reply, &mut wakes);
    }
    wakes.wake_all();
}
