//! The checkpoint thread: brings a checkpoint to the device once everything that it stands on is there, then removes the
//! files that it no longer knows.

use std::mem::take;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::core::Checkpoint;
use super::inbox::{Inbox, News};
use crate::checkpoint::CheckpointStore;
use crate::engine::types::Lsn;
use crate::journal::Syncer;
use crate::log::{Condemned, SegmentWriter};
use crate::plants::planted;
use crate::status::StatusBoard;

/// What the checkpoint thread has to do.
#[derive(Debug)]
pub(crate) enum Work {
    Checkpoint(Checkpoint),
    /// Files that nothing needs once the frame is on the device.
    Free {
        lsn: Lsn,
        files: Condemned,
    },
}

/// Commits one checkpoint at a time; the shard sends the next when it has heard of the last.
#[derive(Debug)]
pub(crate) struct CheckpointThread {
    pub(crate) store: CheckpointStore,
    pub(crate) syncer: Syncer,
    pub(crate) log: Arc<SegmentWriter>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) status: Arc<StatusBoard>,
}

/// A checkpoint on its way to the device.
#[derive(Debug)]
pub(crate) struct Started {
    checkpoint: Checkpoint,
    next: Stage,
}

/// In the order in which they come.
#[derive(Clone, Copy, Debug)]
enum Stage {
    SyncJournal,
    SyncLog,
    Commit,
    /// The journal up to this LSN is not needed any more.
    Unlink {
        previous: Lsn,
    },
}

/// What a step came to.
#[derive(Debug)]
pub(crate) enum Step {
    Goes(Started),
    Done,
    /// The shard has been told; there must be no further checkpoint.
    Failed,
}

impl CheckpointThread {
    /// Runs until the sender is dropped.
    pub(crate) fn run(mut self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            let mut step = self.begin(work);
            while let Step::Goes(started) = step {
                step = self.step(started);
            }
            if matches!(step, Step::Failed) {
                return;
            }
        }
    }

    /// Takes up a piece of work; a checkpoint goes on with [`Self::step`].
    pub(crate) fn begin(&self, work: Work) -> Step {
        match work {
            Work::Checkpoint(checkpoint) => Step::Goes(Started { checkpoint, next: Stage::SyncJournal }),
            Work::Free { lsn, files } => {
                match self.sync_journal(lsn) {
                    Ok(()) => self.log.unlink(files),
                    // The shard hears of it by its own syncs; what is left is found by the next start.
                    Err(reason) => tracing::warn!(reason, "deleted records keep their space for now"),
                }
                Step::Done
            }
        }
    }

    /// Takes a checkpoint one step on; blocks meanwhile.
    pub(crate) fn step(&mut self, mut started: Started) -> Step {
        match self.advance(&mut started) {
            Ok(true) => Step::Goes(started),
            Ok(false) => Step::Done,
            Err(reason) => {
                // Its rows are lost to the next one, so there must not be a next one.
                self.inbox.tell(News::Failed(format!("checkpoint: {reason}")));
                Step::Failed
            }
        }
    }

    /// False at the end.
    fn advance(&mut self, started: &mut Started) -> Result<bool, String> {
        let Checkpoint { lsn, monotonic_ms, rows, condemned } = &mut started.checkpoint;
        started.next = match started.next {
            Stage::SyncJournal if planted("checkpoint-before-journal-sync") => Stage::SyncLog,
            Stage::SyncLog if planted("checkpoint-before-segment-sync") => Stage::Commit,
            Stage::SyncJournal => {
                self.sync_journal(*lsn)?;
                Stage::SyncLog
            }
            Stage::SyncLog => {
                self.log.sync().map_err(|error| error.to_string())?;
                Stage::Commit
            }
            Stage::Commit => {
                let committed = self.store.commit(*lsn, *monotonic_ms, rows);
                let previous = committed.map_err(|error| error.to_string())?;
                tracing::debug!(lsn, rows = rows.len(), previous, "checkpoint");
                self.status.checkpointed(*lsn);
                Stage::Unlink { previous }
            }
            Stage::Unlink { previous } => {
                self.log.unlink(take(condemned));
                self.inbox.tell(News::Checkpointed { previous });
                return Ok(false);
            }
        };
        Ok(true)
    }

    fn sync_journal(&self, lsn: Lsn) -> Result<(), String> {
        let synced = self.syncer.sync().map_err(|error| error.to_string())?;
        if synced < lsn { Err(format!("frame {lsn} is not synced, {synced} is")) } else { Ok(()) }
    }
}
