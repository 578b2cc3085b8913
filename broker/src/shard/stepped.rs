//! A shard without threads: whoever owns it says what happens next, and when.
//!
//! It is the same shard as a broker's, on the same journal, log and checkpoints; only that each piece of work that a thread
//! does there is a call here. With a simulated disk and a simulated machine a run is then repeatable to the last byte, and
//! any order that threads might come to can be brought about. For simulation.
//!
//! Dropping it at any moment is the death of the process; [`Stepped::stop`] is its orderly end.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use parking_lot::Mutex;

use super::admission::Gate;
use super::checkpoint::{CheckpointThread, Started, Step, Work};
use super::inbox::{Inbox, Submission};
use super::reads::{Read, Readers, read_here};
use super::recovery::{Recovered, Replayed, StartError, StorageOptions, recover};
use super::release::{Releases, SyncThread};
use super::runner::{After, Runner};
use crate::broker::{Broker, BrokerLimits};
use crate::disk::Disk;
use crate::engine::Engine;
use crate::engine::types::Lsn;
use crate::log::SegmentWriter;
use crate::status::StatusBoard;

/// How long the front door lets a request wait for room.
const ADMISSION_PATIENCE: Duration = Duration::from_secs(1);

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    /// It did something.
    Work,
    /// There was nothing to do.
    Nothing,
}

impl From<bool> for Did {
    fn from(worked: bool) -> Self {
        if worked { Did::Work } else { Did::Nothing }
    }
}

/// See the module's documentation.
pub struct Stepped {
    inbox: Arc<Inbox>,
    log: Arc<SegmentWriter>,
    releases: Arc<Releases>,
    runner: Runner,
    sync: SyncThread,
    /// The sync thread has ended after a failure.
    sync_failed: bool,
    /// Synced, and not yet released.
    synced: Option<Lsn>,
    checkpoint: CheckpointThread,
    work: Receiver<Work>,
    /// The checkpoint that is under way.
    started: Option<Started>,
    checkpoint_failed: bool,
    reads: Arc<Mutex<VecDeque<Read>>>,
    replayed: Replayed,
    status: Arc<StatusBoard>,
}

impl fmt::Debug for Stepped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stepped").field("runner", &self.runner).finish_non_exhaustive()
    }
}

impl Stepped {
    /// Recovers what is stored under `data_dir` and begins a run. Journal and log get no threads, whatever the options say.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(
        disk: &Arc<dyn Disk>,
        data_dir: &Path,
        mut options: StorageOptions,
    ) -> Result<Self, StartError> {
        options.journal.background = false;
        options.log.background = false;
        options.journal.environment = options.environment.clone();
        options.log.environment = options.environment.clone();
        let reads = Arc::new(Mutex::new(VecDeque::new()));
        let recovered = recover(disk, data_dir, options, Readers::Queue(reads.clone()))?;
        let Recovered { inbox, log, releases, runner, sync, checkpoint, work, replayed, status } = recovered;
        Ok(Self {
            inbox,
            log,
            releases,
            runner,
            sync,
            sync_failed: false,
            synced: None,
            checkpoint,
            work,
            started: None,
            checkpoint_failed: false,
            reads,
            replayed,
            status,
        })
    }

    /// The front door to this shard, admitting `in_flight_bytes` of requests at a time.
    pub fn broker(&self, in_flight_bytes: u32, limits: BrokerLimits) -> Broker {
        let gate = Gate::new(in_flight_bytes, ADMISSION_PATIENCE);
        let boot_epoch = self.engine().boot_epoch();
        Broker::new(
            self.inbox.clone(),
            self.log.views().clone(),
            gate,
            limits,
            boot_epoch,
            self.status.clone(),
        )
    }

    /// Takes one turn of the shard: drains the inbox, writes a frame, begins a checkpoint or writes a mark when it is time.
    pub fn turn(&mut self) -> Did {
        let before = self.written();
        let after = self.runner.round(&self.inbox);
        Did::from(after == After::Turn || self.written() != before)
    }

    /// What the sync thread does first: a sync, if one is due. What was synced waits for [`Self::release`].
    pub fn sync(&mut self) -> Did {
        if self.sync_failed || self.synced.is_some() || !self.releases.take_due() {
            return Did::Nothing;
        }
        self.synced = self.sync.sync();
        self.sync_failed = self.synced.is_none();
        Did::Work
    }

    /// What the sync thread does then: shows and answers what was synced.
    pub fn release(&mut self) -> Did {
        let Some(synced) = self.synced.take() else { return Did::Nothing };
        self.sync.release(synced);
        Did::Work
    }

    /// Takes the checkpoint that is under way, or the next, one step on; or removes the files of deleted topics.
    pub fn checkpoint(&mut self) -> Did {
        if self.checkpoint_failed {
            return Did::Nothing;
        }
        let step = match self.started.take() {
            Some(started) => self.checkpoint.step(started),
            None => match self.work.try_recv() {
                Ok(work) => self.checkpoint.begin(work),
                Err(_) => return Did::Nothing,
            },
        };
        match step {
            Step::Goes(started) => self.started = Some(started),
            Step::Done => {}
            Step::Failed => self.checkpoint_failed = true,
        }
        Did::Work
    }

    /// Makes one large write to a segment, if one is due.
    pub fn write_segments(&mut self) -> Did {
        self.log.step().into()
    }

    /// Prepares, recycles and removes journal files.
    pub fn prepare_files(&mut self) {
        self.runner.shard().prepare_files();
    }

    /// Makes the oldest read that the engine waits for.
    pub fn read(&mut self) -> Did {
        let read = self.reads.lock().pop_front();
        let Some(read) = read else { return Did::Nothing };
        let answer = read_here(self.log.views(), read);
        self.inbox.submit([Submission::silent(answer)]);
        Did::Work
    }

    /// The state machine, for looking at.
    pub fn engine(&self) -> &Engine {
        self.runner.shard().engine()
    }

    /// The last frame written.
    pub fn written(&self) -> Lsn {
        self.runner.shard().written()
    }

    /// The last frame known to be on the device.
    pub fn synced(&self) -> Lsn {
        self.runner.shard().journal().synced()
    }

    /// Bytes of frames that are written and not known to be on the device.
    pub fn unsynced_bytes(&self) -> u64 {
        self.runner.shard().journal().unsynced_bytes()
    }

    /// Why nothing is written any more, if so.
    pub fn read_only(&self) -> Option<&str> {
        self.runner.shard().read_only()
    }

    /// The engine's monotonic time.
    pub fn monotonic_ms(&self) -> u64 {
        self.runner.clock().monotonic_ms()
    }

    /// What the start has found in the journal.
    pub fn replayed(&self) -> Replayed {
        self.replayed
    }

    /// The log, for looking at.
    pub fn log(&self) -> &SegmentWriter {
        &self.log
    }

    /// Ends the run in order: syncs, makes a last checkpoint, writes the segments to their end. Returns the last frame written.
    pub fn stop(mut self) -> Lsn {
        while self.turn() == Did::Work {}
        self.runner.finish(&self.inbox);
        let written = self.written();
        while self.checkpoint() == Did::Work {}
        self.releases.stop();
        while !self.sync_failed && self.releases.take_due() {
            match self.sync.sync() {
                Some(synced) => self.sync.release(synced),
                None => self.sync_failed = true,
            }
        }
        drop(self.checkpoint);
        if let Some(Err(failure)) = Arc::into_inner(self.log).map(SegmentWriter::shutdown) {
            tracing::error!(%failure, "the log was not written to its end; it will be replayed");
        }
        written
    }
}
