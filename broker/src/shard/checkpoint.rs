//! The checkpoint thread: brings a checkpoint to the device once everything that it stands on is there, then removes the
//! files that it no longer knows.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::core::Checkpoint;
use super::inbox::{Inbox, News};
use crate::checkpoint::{CheckpointStore, Row};
use crate::engine::types::Lsn;
use crate::journal::Syncer;
use crate::log::{Condemned, SegmentWriter};

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
}

impl CheckpointThread {
    /// Runs until the sender is dropped.
    pub(crate) fn run(mut self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            let Checkpoint { lsn, monotonic_ms, rows, condemned } = match work {
                Work::Checkpoint(checkpoint) => checkpoint,
                Work::Free { lsn, files } => {
                    match self.sync_journal(lsn) {
                        Ok(()) => self.log.unlink(files),
                        // The shard hears of it by its own syncs; what is left is found by the next start.
                        Err(reason) => tracing::warn!(reason, "deleted records keep their space for now"),
                    }
                    continue;
                }
            };
            match self.commit(lsn, monotonic_ms, &rows) {
                Ok(previous) => {
                    tracing::debug!(lsn, rows = rows.len(), previous, "checkpoint");
                    self.log.unlink(condemned);
                    self.inbox.tell(News::Checkpointed { previous });
                }
                Err(reason) => {
                    // Its rows are lost to the next one, so there must not be a next one.
                    self.inbox.tell(News::Failed(format!("checkpoint: {reason}")));
                    return;
                }
            }
        }
    }

    /// Returns the LSN up to which the journal is not needed any more.
    fn commit(&mut self, lsn: Lsn, monotonic_ms: u64, rows: &[Row]) -> Result<Lsn, String> {
        self.sync_journal(lsn)?;
        self.log.sync().map_err(|error| error.to_string())?;
        self.store.commit(lsn, monotonic_ms, rows).map_err(|error| error.to_string())
    }

    fn sync_journal(&self, lsn: Lsn) -> Result<(), String> {
        let synced = self.syncer.sync().map_err(|error| error.to_string())?;
        if synced < lsn { Err(format!("frame {lsn} is not synced, {synced} is")) } else { Ok(()) }
    }
}
