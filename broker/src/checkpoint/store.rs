//! The two files taking turns.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use super::slot::{FORMAT, Meta, Slot, SlotError};
use crate::disk::Disk;
use crate::engine::types::Lsn;

/// A row: its key, and its value or `None` when it is gone.
pub type Row = (Vec<u8>, Option<Vec<u8>>);

pub(super) const NAMES: [&str; 2] = ["checkpoint-a.redb", "checkpoint-b.redb"];

/// Extension of a file that could not be used and was set aside, for people to look at; the next one replaces it.
const DAMAGED: &str = "damaged";

/// Memory that each file may use as a cache: rows are read once at a start and rarely afterwards.
pub(super) const CACHE_BYTES: usize = 4 * 1024 * 1024;

/// Why a checkpoint cannot be loaded or committed. None of these goes away by trying again in the same process.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{} has checkpoint format {found}; this build reads up to {supported}: use the version that wrote it, or a later one", file.display())]
    NewerFormat { file: PathBuf, found: u32, supported: u32 },
    /// Nothing was loaded: starting without a checkpoint would lose state that the journal no longer has.
    #[error("no checkpoint is usable: {}: {reason}{}", file.display(), and(other))]
    Unusable { file: PathBuf, reason: String, other: Option<(PathBuf, String)> },
    /// The rows are whole, but make no sense to their reader.
    #[error("{}: {source}", file.display())]
    Refused { file: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot commit to {}: {reason}", file.display())]
    Commit { file: PathBuf, reason: String },
    #[error("cannot use {}: {source}", file.display())]
    Io { file: PathBuf, source: io::Error },
}

fn and(other: &Option<(PathBuf, String)>) -> String {
    other.as_ref().map_or_else(String::new, |(file, reason)| format!("; {}: {reason}", file.display()))
}

/// What was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Replay goes on after this frame.
    pub lsn: Lsn,
    /// The engine's monotonic time at that frame, in milliseconds.
    pub monotonic_ms: u64,
    /// Why the newer checkpoint was not used, if it was not.
    pub fallback: Option<String>,
}

#[derive(Debug)]
struct Committed {
    slot: Slot,
    meta: Meta,
}

/// The checkpoints of one shard. Every call blocks. Not for use by two processes at a time: the caller has locked the
/// data directory.
#[derive(Debug)]
pub struct CheckpointStore {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    /// What is usable of each file.
    slots: [Option<Committed>; 2],
    /// The one that was committed last.
    newest: Option<usize>,
}

impl CheckpointStore {
    /// Takes the store in `directory`; call [`Self::load`] before anything else. Without files nothing is written.
    pub fn new(disk: Arc<dyn Disk>, directory: &Path) -> Self {
        Self { disk, directory: directory.to_path_buf(), slots: [None, None], newest: None }
    }

    /// Passes every row of the newest whole checkpoint to `restore`, in the order of keys; `None` if there was never a
    /// checkpoint. All rows are verified before the first is passed, so `restore` sees one checkpoint only.
    ///
    /// # Errors
    /// Nothing usable, a newer format, a file that cannot be used nor be set aside, or what `restore` says.
    pub fn load<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        &mut self,
        mut restore: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<Option<Loaded>, CheckpointError> {
        let mut failures = Vec::new();
        for at in 0..NAMES.len() {
            match self.open(at)? {
                Some(Ok(committed)) => self.slots[at] = Some(committed),
                Some(Err(reason)) => failures.push((self.path(at), reason)),
                None => {}
            }
        }
        while let Some(at) = self.find_newest() {
            let file = self.path(at);
            let Some(committed) = &self.slots[at] else { break };
            if let Err(error) = committed.slot.verify() {
                failures.push((file, error.to_string()));
                self.slots[at] = None;
                continue;
            }
            let refused = |source| CheckpointError::Refused { file: file.clone(), source };
            committed
                .slot
                .each_row(|key, value| restore(key, value).map_err(|error| SlotError::Refused(error.into())))
                .map_err(|error| match error {
                    SlotError::Refused(source) => refused(source),
                    other => refused(other.into()),
                })?;
            self.newest = Some(at);
            self.set_aside(failures.iter().map(|(file, _)| file))?;
            let fallback = failures.pop().map(|(file, reason)| format!("{}: {reason}", file.display()));
            if let Some(reason) = &fallback {
                warn!(reason, used = %file.display(), "a checkpoint is not usable; the other one is used");
            }
            let meta = &committed.meta;
            return Ok(Some(Loaded { lsn: meta.lsn, monotonic_ms: meta.monotonic_ms, fallback }));
        }
        match failures.pop() {
            None => Ok(None),
            Some((file, reason)) => Err(CheckpointError::Unusable { file, reason, other: failures.pop() }),
        }
    }

    /// Takes files that cannot be used out of the way before anything is done that rests on the other one: the replay writes
    /// segments anew which a newer checkpoint says are synced. If its file could be read again after a crash, it would be wrong.
    fn set_aside<'f>(&self, files: impl Iterator<Item = &'f PathBuf>) -> Result<(), CheckpointError> {
        let mut any = false;
        for file in files {
            let failed = |source| CheckpointError::Io { file: file.clone(), source };
            self.disk.rename(file, &file.with_extension(DAMAGED)).map_err(failed)?;
            any = true;
        }
        let failed = |source| CheckpointError::Io { file: self.directory.clone(), source };
        if any { self.disk.sync_dir(&self.directory).map_err(failed) } else { Ok(()) }
    }

    fn find_newest(&self) -> Option<usize> {
        let lsn = |at: &usize| self.slots[*at].as_ref().map(|committed| committed.meta.lsn);
        (0..NAMES.len()).filter(|at| lsn(at).is_some()).max_by_key(lsn)
    }

    /// Opens a file; `None` if there is none, or why it is not usable.
    fn open(&self, at: usize) -> Result<Option<Result<Committed, String>>, CheckpointError> {
        let file = self.path(at);
        let opened = match self.disk.open(&file) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CheckpointError::Io { file, source }),
        };
        // redb would make a new store in an empty file.
        if opened.is_empty().map_err(|source| CheckpointError::Io { file: file.clone(), source })? {
            return Ok(Some(Err("the file is empty".into())));
        }
        let committed = Slot::open(opened, CACHE_BYTES).and_then(|slot| {
            let meta = slot.meta()?;
            Ok(Committed { slot, meta })
        });
        match committed {
            Err(SlotError::NewerFormat(found)) => {
                Err(CheckpointError::NewerFormat { file, found, supported: FORMAT })
            }
            other => Ok(Some(other.map_err(|error| error.to_string()))),
        }
    }

    /// Makes the state after frame `lsn` the newest checkpoint. `rows` are all that changed since the last commit (or
    /// since what was loaded); the last one of a key counts. Call it when everything up to `lsn` is on the device, journal
    /// and segments both.
    ///
    /// Returns the LSN of the other checkpoint, the one before: the journal is needed from the frame after it on.
    ///
    /// # Errors
    /// The checkpoints that were there stay as they were. Nothing more should be committed in this process.
    pub fn commit(&mut self, lsn: Lsn, monotonic_ms: u64, rows: &[Row]) -> Result<Lsn, CheckpointError> {
        let target = self.newest.map_or(0, |newest| 1 - newest);
        let file = self.path(target);
        let failed = |reason: String| CheckpointError::Commit { file: file.clone(), reason };
        let newest = self.newest.and_then(|at| self.slots[at].as_ref());
        if let Some(newest) = newest
            && lsn < newest.meta.lsn
        {
            return Err(failed(format!("LSN {lsn} is below the last checkpoint's, {}", newest.meta.lsn)));
        }
        let newer = newest.map(|newest| (&newest.slot, &newest.meta));
        // It can be continued if it stands exactly one commit behind.
        let behind = self.slots[target]
            .as_ref()
            .filter(|committed| newest.is_some_and(|newest| newest.meta.previous_lsn == committed.meta.lsn));
        let release = newest.map_or(0, |newest| newest.meta.lsn);
        let committed = match behind {
            Some(committed) => {
                let meta = committed
                    .slot
                    .commit(Some(&committed.meta), newer, lsn, monotonic_ms, rows)
                    .map_err(|error| failed(error.to_string()))?;
                (None, meta)
            }
            None => {
                info!(file = %file.display(), "a checkpoint file is made");
                let temporary = file.with_extension("new");
                let io_failed = |source: io::Error| failed(source.to_string());
                self.disk.create_dir(&self.directory).map_err(io_failed)?;
                let slot = Slot::open(self.disk.create(&temporary).map_err(io_failed)?, CACHE_BYTES)
                    .map_err(|error| failed(error.to_string()))?;
                let meta = slot
                    .commit(None, newer, lsn, monotonic_ms, rows)
                    .map_err(|error| failed(error.to_string()))?;
                self.disk.rename(&temporary, &file).map_err(io_failed)?;
                (Some(slot), meta)
            }
        };
        // Also when this commit made no file: an earlier run may have ended between the renaming and this.
        self.disk.sync_dir(&self.directory).map_err(|error| failed(error.to_string()))?;
        let (slot, meta) = committed;
        match (slot, &mut self.slots[target]) {
            (Some(slot), old) => *old = Some(Committed { slot, meta }),
            (None, Some(old)) => old.meta = meta,
            (None, None) => {}
        }
        self.newest = Some(target);
        Ok(release)
    }

    fn path(&self, at: usize) -> PathBuf {
        self.directory.join(NAMES[at])
    }
}
