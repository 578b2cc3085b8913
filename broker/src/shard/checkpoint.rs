//! The checkpoint thread: brings a checkpoint to the device once everything that it stands on is there, then removes the
//! files that it no longer knows.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::core::Checkpoint;
use super::inbox::{Inbox, News};
use crate::checkpoint::{CheckpointStore, Row};
use crate::engine::types::Lsn;
use crate::journal::Syncer;
use crate::log::SegmentWriter;

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
    pub(crate) fn run(mut self, checkpoints: &Receiver<Checkpoint>) {
        while let Ok(checkpoint) = checkpoints.recv() {
            let Checkpoint { lsn, monotonic_ms, rows, condemned } = checkpoint;
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
        let synced = self.syncer.sync().map_err(|error| error.to_string())?;
        if synced < lsn {
            return Err(format!("frame {lsn} is not synced, {synced} is"));
        }
        self.log.sync().map_err(|error| error.to_string())?;
        self.store.commit(lsn, monotonic_ms, rows).map_err(|error| error.to_string())
    }
}
