//! A whole broker in one value: locked data directory, recovered shard, open listener; and its orderly end.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::batch::BatchLimits;
use rustix::fs::{FlockOperation, flock};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::broker::{Broker, BrokerLimits};
use crate::cleaner::{Cleaner, CleanerOptions};
use crate::disk::{Disk, RealDisk};
use crate::engine::config::EngineSettings;
use crate::environment::Environment;
use crate::journal::JournalOptions;
use crate::listener::native::{NativeListener, NativeSettings};
use crate::log::{LogOptions, ScrubOptions};
use crate::redrive;
use crate::settings::ServerSettings;
use crate::shard::{
    self, CheckpointOptions, Gate, ReferenceOptions, RoomOptions, Running, ShardOptions, StartError,
    StorageOptions,
};

/// Locked by the process that uses the directory; holds its process id, for messages only.
const LOCK_FILE: &str = "LOCK";
/// Holds the version of the directory's layout.
const FORMAT_FILE: &str = "FORMAT";
/// What this build writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// Room in a journal frame beside the largest request: events may take several times the bytes of the small requests that
/// they stand for.
const FRAME_SLACK: u64 = 40 << 20;
/// As good as for ever: a hundred years.
const ENDLESS: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{} is in use by {}", dir.display(), owner(*pid))]
    Locked { dir: PathBuf, pid: Option<u32> },
    #[error(
        "{} was written by a newer version (format {found}, this build reads up to {FORMAT})",
        dir.display()
    )]
    NewerFormat { dir: PathBuf, found: u32 },
    #[error("{} holds {found:?}, which is not a format version", file.display())]
    NotAFormat { file: PathBuf, found: String },
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the recovery ended unexpectedly")]
    Panicked,
}

fn owner(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// What a server runs on.
#[derive(Clone, Debug)]
pub struct Machine {
    pub disk: Arc<dyn Disk>,
    pub environment: Environment,
}

impl Default for Machine {
    /// This machine.
    fn default() -> Self {
        Self { disk: Arc::new(RealDisk), environment: Environment::default() }
    }
}

/// A running broker. To be ended by [`Self::shutdown`]; one that is dropped ends in the background, without waiting for its
/// connections.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    broker: Broker,
    environment: Environment,
    running: Option<Running>,
    cleaner: Option<Cleaner>,
    ended: CancellationToken,
    listener: JoinHandle<()>,
    _redrives: AbortOnDropHandle<()>,
    patience: Duration,
    lock: Option<DirLock>,
}

impl Server {
    /// Locks the data directory, recovers what it holds, and serves.
    ///
    /// # Errors
    /// See [`ServerError`]. Nothing is served then.
    pub async fn start(settings: ServerSettings) -> Result<Self, ServerError> {
        Self::open(settings, Machine::default(), DirLock::take).await
    }

    /// As [`Self::start`], on a machine of the caller's making. Nothing is locked: the caller sees to it that no other server
    /// uses the data directory.
    ///
    /// # Errors
    /// See [`ServerError`]. Nothing is served then.
    pub async fn start_on(settings: ServerSettings, machine: Machine) -> Result<Self, ServerError> {
        Self::open(settings, machine, |_| Ok(DirLock { _file: None })).await
    }

    async fn open(
        settings: ServerSettings,
        machine: Machine,
        lock: fn(&Path) -> Result<DirLock, ServerError>,
    ) -> Result<Self, ServerError> {
        let Machine { disk, environment } = machine;
        let dir = settings.data_dir.clone();
        let options = storage_options(&settings, &environment);
        let runtime = Handle::current();
        let opening = spawn_blocking(move || {
            disk.create_dir(&dir).map_err(|source| ServerError::Io { path: dir.clone(), source })?;
            let lock = lock(&dir)?;
            check_format(&*disk, &dir)?;
            let running = shard::start(&disk, &dir, options, runtime)?;
            Ok::<_, ServerError>((lock, running))
        });
        let (lock, running) = opening.await.map_err(|_| ServerError::Panicked)??;

        let gate = Gate::new(settings.in_flight_bytes.as_u32(), settings.admission_timeout);
        let limits = BrokerLimits {
            batch: BatchLimits {
                max_batch_bytes: settings.max_batch_bytes.as_u32(),
                max_record_bytes: settings.max_record_bytes.as_u32(),
                max_headers: settings.max_headers,
            },
            session_timeout: settings.session_timeout,
        };
        let broker = Broker::new(
            running.inbox.clone(),
            running.views.clone(),
            gate,
            limits,
            running.boot_epoch,
            running.status.clone(),
        );
        let bound = async {
            let listener = NativeListener::bind(settings.listen, native_settings(&settings)).await?;
            let address = listener.local_addr()?;
            let cleaner = Cleaner::start(broker.clone(), cleaner_options(&settings))?;
            Ok((listener, address, cleaner))
        };
        let (listener, address, cleaner) = match bound.await {
            Ok(bound) => bound,
            Err(source) => {
                stop(running).await;
                return Err(ServerError::Listen { address: settings.listen, source });
            }
        };
        tracing::info!(%address, boot_epoch = running.boot_epoch, "listening");
        Ok(Self {
            address,
            listener: tokio::spawn(listener.run(broker.clone())),
            _redrives: AbortOnDropHandle::new(tokio::spawn(redrive::run(broker.clone()))),
            broker,
            environment,
            ended: running.ended.clone(),
            running: Some(running),
            cleaner: Some(cleaner),
            patience: settings.shutdown_timeout,
            lock: Some(lock),
        })
    }

    /// Where clients connect.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The front door, for use within the process.
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Moves a clock that stands still ([`Environment::by_hand`]) to the next thing that is due, by `most` at the most, and
    /// answers by how much once clients have nothing more to say to what happened; zero for a broker that has ended. On other
    /// machines time passes by itself. When the future is dropped, the clock stands where it is.
    pub async fn step_clock(&self, most: Duration) -> Duration {
        match &self.running {
            Some(running) => shard::step(&running.inbox, &self.environment, most).await,
            None => Duration::ZERO,
        }
    }

    /// Returns when clients have been quiet for a few milliseconds, or after a second.
    pub async fn settle(&self) {
        if let Some(running) = &self.running {
            shard::settle(&running.inbox).await;
        }
    }

    /// Returns when the broker has ended by itself, which is a fault: it should be restarted.
    pub async fn failed(&self) {
        self.ended.cancelled().await;
    }

    /// Takes no more connections and requests, answers those that are running (within the shutdown timeout), syncs, makes
    /// a last checkpoint, and lets go of the data directory.
    pub async fn shutdown(mut self) {
        tracing::info!("stopping");
        self.broker.begin_stop();
        if timeout(self.patience, &mut self.listener).await.is_err() {
            tracing::warn!(patience = ?self.patience, "some connections did not end in time and are cut off");
            self.listener.abort();
        }
        if let Some(running) = self.running.take() {
            let cleaner = self.cleaner.take();
            let stopped = spawn_blocking(move || cleaner.map(Cleaner::stop)).await;
            if stopped.is_err() {
                tracing::error!("the cleaner did not stop in order");
            }
            stop(running).await;
        }
        tracing::info!("stopped");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.broker.begin_stop();
        self.listener.abort();
        if let Some(running) = self.running.take() {
            // The directory is free for others when everything has been stored, not before.
            let lock = self.lock.take();
            let cleaner = self.cleaner.take();
            std::thread::spawn(move || {
                if let Some(cleaner) = cleaner {
                    cleaner.stop();
                }
                running.stop();
                drop(lock);
            });
        }
    }
}

async fn stop(running: Running) {
    if spawn_blocking(move || running.stop()).await.is_err() {
        tracing::error!("the shard did not stop in order");
    }
}

fn storage_options(settings: &ServerSettings, environment: &Environment) -> StorageOptions {
    let limits = &settings.limits;
    // Who is alive is heard in the time of connections, not of a clock that jumps.
    let session_timeout = if environment.is_by_hand() { ENDLESS } else { settings.session_timeout };
    StorageOptions {
        engine: EngineSettings {
            segment_bytes: settings.segment.bytes.0,
            retention_interval: settings.retention.check_interval,
            max_pinned_bytes: settings.retention.pinned_bytes.0,
            session_timeout,
            max_topics: limits.topics,
            max_partitions: limits.partitions,
            max_groups: limits.groups,
            max_members_per_group: limits.members_per_group,
            max_producers_per_partition: limits.producers_per_partition,
            max_leases: limits.leases,
            max_exceptions: limits.exceptions,
            max_span: limits.span,
            share_state_bytes: settings.share_state_bytes.0,
            max_parked_per_slot: usize::try_from(limits.parked_per_key).unwrap_or(usize::MAX),
        },
        journal: JournalOptions {
            first_file_bytes: settings.journal.first_file_bytes.0,
            file_bytes: settings.journal.file_bytes.0,
            max_frame_bytes: settings.max_frame_bytes.0 + FRAME_SLACK,
            environment: environment.clone(),
            ..JournalOptions::default()
        },
        log: LogOptions {
            unwritten_bytes: settings.unwritten_bytes.0,
            tail_bytes: settings.tail_cache_bytes.as_usize(),
            reread_bytes: settings.reread_cache_bytes.as_usize(),
            open_files: settings.open_files as usize,
            environment: environment.clone(),
            ..LogOptions::default()
        },
        shard: ShardOptions {
            max_unsynced_bytes: settings.journal.max_unsynced_bytes.0,
            reference: ReferenceOptions {
                batch_bytes: settings.journal.reference_bytes.0,
                ..ReferenceOptions::default()
            },
        },
        checkpoint: CheckpointOptions {
            interval: settings.checkpoint.interval,
            journal_bytes: settings.checkpoint.journal_bytes.0,
        },
        room: RoomOptions {
            low_water_bytes: settings.disk.low_water_bytes.0,
            reserve_bytes: settings.disk.reserve_bytes.0,
        },
        scrub: ScrubOptions {
            bytes_per_second: settings.scrub.bytes_per_second.0,
            interval: settings.scrub.interval,
        },
        sync_interval: settings.journal.sync_interval,
        environment: environment.clone(),
    }
}

fn cleaner_options(settings: &ServerSettings) -> CleanerOptions {
    CleanerOptions {
        interval: settings.cleaner.interval,
        key_bytes: settings.cleaner.dedupe_buffer_bytes.0,
        bytes_per_second: settings.cleaner.max_bytes_per_second.0,
    }
}

fn native_settings(settings: &ServerSettings) -> NativeSettings {
    NativeSettings {
        max_frame_bytes: settings.max_frame_bytes.as_u32(),
        max_connections: settings.max_connections as usize,
        connection_in_flight_bytes: settings.connection_in_flight_bytes.as_u32(),
        outbox_bytes: settings.outbox_bytes.as_usize(),
        handshake_timeout: settings.handshake_timeout,
        idle_timeout: settings.idle_timeout.max(settings.session_timeout * 3),
        write_timeout: settings.write_timeout,
    }
}

/// Keeps a second process out of a data directory. The lock is the kernel's, on the open file: it ends with the process.
#[derive(Debug)]
pub struct DirLock {
    /// None where the caller keeps others out.
    _file: Option<File>,
}

impl DirLock {
    /// # Errors
    /// [`ServerError::Locked`]: a broker runs on it; or the file cannot be made.
    pub fn take(dir: &Path) -> Result<Self, ServerError> {
        let path = dir.join(LOCK_FILE);
        let io = |source| ServerError::Io { path: path.clone(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(ServerError::Locked { dir: dir.to_path_buf(), pid });
            }
            Err(error) => return Err(io(error.into())),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        // Only for messages: on a full disk there may be no room for it.
        if let Err(error) = write(&mut file) {
            tracing::warn!(file = %path.display(), %error, "cannot write the process id");
        }
        Ok(Self { _file: Some(file) })
    }
}

/// Refuses a directory of a newer version; names the version in a new one.
fn check_format(disk: &dyn Disk, dir: &Path) -> Result<(), ServerError> {
    let file = dir.join(FORMAT_FILE);
    let io = |source| ServerError::Io { path: file.clone(), source };
    match disk.open_read(&file) {
        Ok(opened) => {
            let mut text = [0; 32];
            let length = opened.read_full_at(&mut text, 0).map_err(io)?;
            let text = String::from_utf8_lossy(&text[..length]);
            match text.trim().parse() {
                Ok(found) if found > FORMAT => {
                    Err(ServerError::NewerFormat { dir: dir.to_path_buf(), found })
                }
                Ok(_) => Ok(()),
                Err(_) => Err(ServerError::NotAFormat { file, found: text.trim().to_owned() }),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let temporary = dir.join("FORMAT.new");
            let create = || {
                let created = disk.create(&temporary)?;
                created.write_all_at(format!("{FORMAT}\n").as_bytes(), 0)?;
                created.sync_data()?;
                disk.rename(&temporary, &file)?;
                disk.sync_dir(dir)
            };
            create().map_err(io)
        }
        Err(error) => Err(io(error)),
    }
}
