//! How a shard begins: checkpoint, then journal, then a new run; and how it ends.
//!
//! 1. The newest whole checkpoint gives the engine its rows and the log its partitions.
//! 2. Every frame after it is replayed into the engine and, through the same calls as when it happened, into the log.
//! 3. The engine begins a run. Its first frame is synced before anything is served.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::batch::HEADER_LEN;
use prost::Message;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::checkpoint::{CheckpointThread, Work};
use super::clock::Clock;
use super::core::{Shard, ShardOptions, ShardStorage};
use super::inbox::{Inbox, News};
use super::reads::{Readers, Reads};
use super::release::{Releases, SyncThread};
use super::room::{Room, RoomOptions};
use super::runner::{CheckpointOptions, Runner};
use super::scrub::ScrubThread;
use crate::checkpoint::{CheckpointError, CheckpointStore};
use crate::disk::Disk;
use crate::engine::config::EngineSettings;
use crate::engine::effect::{Effects, SegmentName};
use crate::engine::event::{self, event::Kind};
use crate::engine::types::{Lsn, PartitionKey, TopicId};
use crate::engine::{CorruptState, Engine};
use crate::environment::Environment;
use crate::journal::{Completed, Journal, JournalError, JournalOptions, RecoverError, Replay};
use crate::log::{LogFailure, LogOptions, ScrubOptions, SegmentWriter, Stored, Views};
use crate::status::StatusBoard;

/// Longest that replay waits for the segment writer to make progress.
const REPLAY_PATIENCE: Duration = Duration::from_secs(60);

/// Everything that can be set about a shard and its storage.
#[derive(Clone, Debug)]
pub struct StorageOptions {
    pub engine: EngineSettings,
    pub journal: JournalOptions,
    pub log: LogOptions,
    pub shard: ShardOptions,
    pub checkpoint: CheckpointOptions,
    pub room: RoomOptions,
    pub scrub: ScrubOptions,
    /// While anything is unsynced, a sync begins at least this often.
    pub sync_interval: Duration,
    /// The machine that the shard runs on; journal and log are given the same.
    pub environment: Environment,
}

/// Why a shard cannot begin. Nothing was served, and nothing that had been promised was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Journal(#[from] RecoverError<ReplayError>),
    #[error("cannot write the first frame: {0}")]
    FirstFrame(#[from] JournalError),
    #[error("cannot write the first frame: {0}")]
    ReadOnly(String),
    #[error("cannot look at the room on the disk: {0}")]
    Room(io::Error),
    #[error("cannot open the log: {0}")]
    Log(io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// Why a frame of the journal cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Corrupt(#[from] CorruptState),
    #[error(transparent)]
    Log(#[from] LogFailure),
    #[error("the segment writer makes no progress")]
    Stuck,
}

/// A shard that serves.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) views: Arc<Views>,
    pub(crate) boot_epoch: u64,
    pub(crate) status: Arc<StatusBoard>,
    /// Cancelled when the shard's thread has ended, in whatever way.
    pub(crate) ended: CancellationToken,
    releases: Arc<Releases>,
    log: Arc<SegmentWriter>,
    shard: JoinHandle<()>,
    sync: JoinHandle<()>,
    checkpoint: JoinHandle<()>,
    scrub: ScrubThread,
}

/// Recovers what is stored under `data_dir` and begins to serve it. Blocks, for as long as the replay takes.
///
/// # Errors
/// See [`StartError`].
pub(crate) fn start(
    disk: &Arc<dyn Disk>,
    data_dir: &Path,
    options: StorageOptions,
    runtime: Handle,
) -> Result<Running, StartError> {
    let scrub = options.scrub.clone();
    let Recovered { inbox, log, releases, runner, sync, checkpoint, work, status, .. } =
        recover(disk, data_dir, options, Readers::Runtime(runtime))?;
    let boot_epoch = runner.shard().engine().boot_epoch();
    let views = log.views().clone();
    let scrub = ScrubThread::start(views.clone(), scrub, status.clone()).map_err(StartError::Thread)?;
    let ended = CancellationToken::new();
    let guard = Guard { inbox: inbox.clone(), ended: ended.clone() };
    let turns = inbox.clone();
    Ok(Running {
        inbox,
        views,
        boot_epoch,
        status,
        ended,
        releases,
        log,
        scrub,
        sync: spawn("sync", move || sync.run())?,
        checkpoint: spawn("checkpoint", move || checkpoint.run(&work))?,
        shard: spawn("shard", move || {
            let _guard = guard;
            runner.run(&turns);
        })?,
    })
}

/// A shard that has begun its run, before anything drives it.
pub(super) struct Recovered {
    pub(super) inbox: Arc<Inbox>,
    pub(super) log: Arc<SegmentWriter>,
    pub(super) releases: Arc<Releases>,
    pub(super) runner: Runner,
    pub(super) sync: SyncThread,
    pub(super) checkpoint: CheckpointThread,
    /// What the runner gives the checkpoint thread to do.
    pub(super) work: Receiver<Work>,
    pub(super) replayed: Replayed,
    pub(super) status: Arc<StatusBoard>,
}

/// What a start has found in the journal after the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    pub frames: u64,
    /// Batches that their frames only refer to.
    pub referring: u64,
    /// Frames that were not synced and whose batches were found whole in their segments.
    pub completed: u64,
    /// Frames that were cut because their batches were not.
    pub incomplete: u64,
}

pub(super) fn recover(
    disk: &Arc<dyn Disk>,
    data_dir: &Path,
    options: StorageOptions,
    readers: Readers,
) -> Result<Recovered, StartError> {
    let environment = options.environment;
    let began = environment.now();
    // Before anything is written: on a full disk the start needs what was reserved for it.
    let disk_room = Room::open(disk, data_dir, options.room).map_err(StartError::Room)?;
    let mut engine = Engine::new(options.engine);
    let mut store = CheckpointStore::new(disk.clone(), &data_dir.join("checkpoint"));
    let loaded = store.load(|key, value| engine.restore_row(key, value))?;
    let (from, checkpoint_ms) = loaded.map_or((0, 0), |loaded| (loaded.lsn, loaded.monotonic_ms));

    let inbox = Arc::new(Inbox::default());
    let room = inbox.clone();
    let wake = Box::new(move || room.tell(News::Room));
    let log = SegmentWriter::start(disk.clone(), &data_dir.join("log"), &options.log, wake);
    let log = Arc::new(log.map_err(StartError::Log)?);
    for partition in engine.partitions() {
        log.restore(&partition);
    }
    let mut replay = ShardReplay { engine: &mut engine, log: &log, replayed: Replayed::default() };
    let journal =
        Journal::recover(disk.clone(), &data_dir.join("journal"), options.journal, from, &mut replay)?;
    let replayed = replay.replayed;
    let recovered = journal.recovered();
    if recovered.given_up {
        tracing::warn!("the journal was repaired: partitions resume above the offsets of what was lost");
        engine.note_lost_records();
    }
    if let Some((file, position)) = &recovered.torn {
        tracing::warn!(file = %file.display(), position, "the journal's end was torn by a crash and has been cut");
    }
    tracing::info!(
        checkpoint = from,
        frames = replayed.frames,
        referring = replayed.referring,
        completed = replayed.completed,
        millis = environment.now().saturating_duration_since(began).as_millis() as u64,
        "recovered"
    );

    if let Err(error) = log.condemn_unknown() {
        tracing::warn!(%error, "cannot look for segments of deleted topics; they stay on disk");
    }

    let syncer = journal.syncer();
    let releases = Arc::new(Releases::new(options.sync_interval, environment.clone()));
    let mut clock = Clock::starting_at(environment.clone(), checkpoint_ms.max(engine.monotonic_ms()));
    let (file_system, low_water) = disk_room.watch();
    let status = Arc::new(StatusBoard::new(environment.clone(), file_system, low_water, from));
    let storage = ShardStorage { journal, log: log.clone(), room: disk_room };
    let mut shard = Shard::new(engine, storage, releases.clone(), options.shard, status.clone());
    shard.look_at_room(clock.monotonic_ms());
    shard.boot(clock.now(), &environment.machine_boot())?;
    if let Some(reason) = shard.read_only() {
        return Err(StartError::ReadOnly(reason.to_owned()));
    }

    let views = log.views().clone();
    let sync = SyncThread::new(syncer.clone(), releases.clone(), views.clone(), inbox.clone());
    let checkpoint =
        CheckpointThread { store, syncer, log: log.clone(), inbox: inbox.clone(), status: status.clone() };
    let (storage, work) = mpsc::channel();
    let reads = Reads { readers, views, inbox: inbox.clone() };
    let runner = Runner::new(shard, clock, reads, storage, options.checkpoint);
    Ok(Recovered { inbox, log, releases, runner, sync, checkpoint, work, replayed, status })
}

impl Running {
    /// Carries out what is queued, syncs it, makes a last checkpoint and ends. Blocks.
    pub(crate) fn stop(self) {
        drop(self.scrub);
        self.inbox.tell(News::Stop);
        join("shard", self.shard);
        // The shard has dropped its sender: what it sent is still stored. That needs no sync thread.
        join("checkpoint", self.checkpoint);
        self.releases.stop();
        join("sync", self.sync);
        drop(self.views);
        // What is not written to segments is in the journal; nothing is lost if others still hold the log.
        if let Some(Err(failure)) = Arc::into_inner(self.log).map(SegmentWriter::shutdown) {
            tracing::error!(%failure, "the log was not written to its end; it will be replayed");
        }
    }
}

/// Answers whoever waits when the shard's thread ends, be it by a panic.
#[derive(Debug)]
struct Guard {
    inbox: Arc<Inbox>,
    ended: CancellationToken,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("the shard's thread panicked; restart the broker");
        }
        self.inbox.close();
        self.inbox.clear();
        self.ended.cancel();
    }
}

/// Replays frames into an engine and a log.
struct ShardReplay<'a> {
    engine: &'a mut Engine,
    log: &'a SegmentWriter,
    replayed: Replayed,
}

impl Replay<ReplayError> for ShardReplay<'_> {
    fn apply(&mut self, _: Lsn, events: &[u8], batches: Vec<Bytes>) -> Result<(), ReplayError> {
        self.replayed.frames += 1;
        let mut effects = Effects::default();
        self.engine.replay(events, batches, &mut effects)?;
        for change in &effects.view_changes {
            self.log.apply(change);
        }
        self.replayed.referring += effects.segment_writes.iter().filter(|write| write.stored).count() as u64;
        if !self.log.wait_for_room(REPLAY_PATIENCE)? {
            return Err(ReplayError::Stuck);
        }
        self.log.append(effects.segment_writes)?;
        Ok(())
    }

    fn complete(&mut self, events: &[u8], batches: &mut [Bytes]) -> Result<Completed, (PathBuf, io::Error)> {
        // An event that cannot be decoded is found when the frame is applied.
        let Ok(frame) = event::Frame::decode(events) else { return Ok(Completed::Gone) };
        let appended = frame.events.iter().filter_map(|event| match &event.kind {
            Some(Kind::Appended(appended)) => Some(appended),
            _ => None,
        });
        let (mut gone, mut torn) = (false, false);
        for (event, batch) in appended.zip(batches) {
            let (Some(place), Some(topic)) = (event.place, TopicId::from_slice(&event.topic_id)) else {
                continue;
            };
            if batch.len() > HEADER_LEN {
                continue;
            }
            let segment = SegmentName {
                partition: PartitionKey { topic, partition: event.partition },
                base_offset: place.base_offset,
                generation: place.generation,
            };
            let found = self.log.find_stored(segment, place.position, batch);
            match found.map_err(|error| (self.log.segment_path(segment), error))? {
                Stored::Whole(bytes) => *batch = bytes,
                Stored::Gone => gone = true,
                Stored::Torn => torn = true,
            }
        }
        // Where a file is gone the frame was synced: what is not whole in another is damage then, for its readers to find.
        if torn && !gone {
            self.replayed.incomplete += 1;
            return Ok(Completed::Torn);
        }
        self.replayed.completed += 1;
        Ok(if gone { Completed::Gone } else { Completed::Whole })
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    thread::Builder::new().name(name.to_owned()).spawn(run).map_err(StartError::Thread)
}

fn join(name: &str, thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!(thread = name, "ended by a panic");
    }
}

#[cfg(test)]
mod tests {
    use felucca_protocol::batch::BatchBuilder;

    use super::*;
    use crate::disk::MemDisk;
    use crate::engine::event::BatchPlace;

    /// A frame that refers to the first batch of each partition.
    fn referring(partitions: std::ops::Range<u32>) -> Vec<u8> {
        let appended = |partition| {
            let place = Some(BatchPlace { base_offset: 0, generation: 0, position: 0 });
            let appended = event::Appended { topic_id: vec![7; 16], partition, place };
            event::Event { kind: Some(Kind::Appended(appended)) }
        };
        event::Frame { events: partitions.map(appended).collect(), ..event::Frame::default() }.encode_to_vec()
    }

    #[test]
    fn a_frame_is_torn_when_a_batch_is_not_whole_and_no_file_is_gone() {
        let disk: Arc<dyn Disk> = Arc::new(MemDisk::new());
        let log =
            SegmentWriter::start(disk.clone(), Path::new("/log"), &LogOptions::default(), Box::new(|| {}));
        let log = log.unwrap();
        let mut engine = Engine::new(EngineSettings::default());
        let mut builder = BatchBuilder::new();
        builder.push(0, None, Some(b"value"), &[]).unwrap();
        let whole = builder.finish().freeze();
        // Of three partitions the first has all of it, the second a part, and the third no file.
        for (partition, length) in [(0, whole.len()), (1, whole.len() - 1)] {
            let partition = PartitionKey { topic: TopicId([7; 16]), partition };
            let path = log.segment_path(SegmentName { partition, base_offset: 0, generation: 0 });
            disk.make_dir(path.parent().unwrap()).unwrap();
            disk.create(&path).unwrap().write_all_at(&whole[..length], 0).unwrap();
        }
        let mut replay = ShardReplay { engine: &mut engine, log: &log, replayed: Replayed::default() };
        let mut complete = |partitions: std::ops::Range<u32>| {
            let mut batches = vec![whole.slice(..HEADER_LEN); partitions.len()];
            let completed = replay.complete(&referring(partitions), &mut batches).unwrap();
            (completed, batches.iter().map(|batch| batch.len() == whole.len()).collect::<Vec<_>>())
        };
        assert_eq!(complete(0..1), (Completed::Whole, vec![true]));
        assert_eq!(complete(0..2), (Completed::Torn, vec![true, false]));
        assert_eq!(complete(1..3), (Completed::Gone, vec![false, false]));
        assert_eq!(complete(0..3), (Completed::Gone, vec![true, false, false]));
        let Replayed { completed, incomplete, .. } = replay.replayed;
        assert_eq!((completed, incomplete), (3, 1));
    }
}
