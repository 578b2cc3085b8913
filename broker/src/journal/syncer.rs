//! How far a journal has been written and synced, shared by the thread that writes and the thread that syncs.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::file::JournalFile;
use super::{FailedAction, Failure, JournalError, Lsn, Outside, OutsideFile};
use crate::plants::planted;

/// Progress of one journal. Invariant: `synced ≤ written`, and neither falls.
#[derive(Debug)]
pub(super) struct Progress {
    state: Mutex<State>,
    /// Held for the length of a sync, so that no caller returns on the strength of another's unfinished one.
    syncing: Mutex<()>,
}

#[derive(Debug)]
struct State {
    failure: Option<Arc<Failure>>,
    written: Lsn,
    synced: Lsn,
    unsynced_bytes: u64,
    /// Files written since their last sync, oldest first.
    unsynced_files: Vec<Arc<JournalFile>>,
    /// What frames written since the last sync refer to.
    unsynced_outside: Vec<Arc<dyn OutsideFile>>,
}

/// How far syncs have come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reached {
    /// The highest synced LSN.
    pub(super) synced: Lsn,
    /// A sync has begun, or ended, of everything that is written.
    pub(super) all_taken: bool,
}

impl Progress {
    pub(super) fn new(lsn: Lsn) -> Self {
        let state = State {
            failure: None,
            written: lsn,
            synced: lsn,
            unsynced_bytes: 0,
            unsynced_files: Vec::new(),
            unsynced_outside: Vec::new(),
        };
        Self { state: Mutex::new(state), syncing: Mutex::new(()) }
    }

    /// How far syncs have come, or the failure that stopped the journal.
    pub(super) fn check(&self) -> Result<Reached, JournalError> {
        let state = self.state.lock();
        match &state.failure {
            Some(failure) => Err(JournalError::Stopped(failure.clone())),
            None => Ok(Reached { synced: state.synced, all_taken: state.unsynced_files.is_empty() }),
        }
    }

    /// Notes a finished write of frames up to `lsn`, which refer to what is outside.
    pub(super) fn wrote(&self, file: &Arc<JournalFile>, lsn: Lsn, bytes: u64, outside: Outside) {
        let mut state = self.state.lock();
        state.written = lsn;
        state.unsynced_bytes += bytes + outside.bytes;
        for file in outside.files {
            if state.unsynced_outside.iter().all(|known| known.path() != file.path()) {
                state.unsynced_outside.push(file);
            }
        }
        if !state.unsynced_files.last().is_some_and(|last| Arc::ptr_eq(last, file)) {
            state.unsynced_files.push(file.clone());
        }
    }

    /// Stops the journal for good; the first failure is the one that is told.
    pub(super) fn stop(&self, action: FailedAction, file: &Path, source: io::Error) -> JournalError {
        let mut state = self.state.lock();
        let failure = state
            .failure
            .get_or_insert_with(|| Arc::new(Failure { action, file: file.to_path_buf(), source }));
        JournalError::Stopped(failure.clone())
    }

    pub(super) fn failure(&self) -> Option<Arc<Failure>> {
        self.state.lock().failure.clone()
    }

    pub(super) fn written(&self) -> Lsn {
        self.state.lock().written
    }

    pub(super) fn synced(&self) -> Lsn {
        self.state.lock().synced
    }

    pub(super) fn unsynced_bytes(&self) -> u64 {
        self.state.lock().unsynced_bytes
    }

    fn sync(&self) -> Result<Lsn, JournalError> {
        let _one_at_a_time = self.syncing.lock();
        let (outside, files, written, bytes) = {
            let mut state = self.state.lock();
            if let Some(failure) = &state.failure {
                return Err(JournalError::Stopped(failure.clone()));
            }
            if state.unsynced_files.is_empty() {
                return Ok(state.synced);
            }
            let outside = std::mem::take(&mut state.unsynced_outside);
            (outside, std::mem::take(&mut state.unsynced_files), state.written, state.unsynced_bytes)
        };
        // A frame counts as synced when what it refers to is, too; which of them comes first makes no difference.
        for file in outside.iter().filter(|_| !planted("reply-before-segment-sync")) {
            if let Err(source) = file.sync() {
                return Err(self.stop(FailedAction::Sync, file.path(), source));
            }
        }
        // Oldest first: a claim in a newer file must never be on the device before what it is about.
        for file in &files {
            if let Err(source) = file.disk_file.sync_data() {
                return Err(self.stop(FailedAction::Sync, &file.path, source));
            }
        }
        let mut state = self.state.lock();
        state.synced = written;
        state.unsynced_bytes -= bytes;
        Ok(written)
    }
}

/// Brings what a journal has written to the device; meant for a thread of its own. Clones share one journal.
#[derive(Clone, Debug)]
pub struct Syncer {
    progress: Arc<Progress>,
}

impl Syncer {
    pub(super) fn new(progress: Arc<Progress>) -> Self {
        Self { progress }
    }

    /// Syncs every frame whose write had finished before the call; blocks meanwhile.
    ///
    /// Returns the highest LSN for which all data frames up to it are on the device. Writes go on at the same time and
    /// wait for the next call. After a failure, of any call on the journal, every call returns that first failure.
    pub fn sync(&self) -> Result<Lsn, JournalError> {
        self.progress.sync()
    }

    /// The highest LSN known to be on the device; does not block.
    pub fn synced(&self) -> Lsn {
        self.progress.synced()
    }

    /// Bytes written but not known to be on the device; does not block.
    pub fn unsynced_bytes(&self) -> u64 {
        self.progress.unsynced_bytes()
    }
}
