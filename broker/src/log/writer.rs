//! The front of the thread that writes segments behind the journal ([`super::thread`]).
//!
//! Nothing waits for it but the checkpoint: what it has not written yet is in the journal and in the tails. So it may
//! gather many batches into large writes ([`super::queue`]), and need not sync them one by one.
//!
//! Invariants: a batch is written at the position that the engine decided, right behind the one before, so that a
//! replay repeats it byte for byte; what a [`SegmentWriter::sync`] covers is on the device when it returns; after a
//! failed write or sync nothing is written any more, and the first failure is the one that is told.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Semaphore;
use tracing::{error, warn};

use super::error::LogFailure;
use super::files::SegmentFiles;
use super::reread::RereadCache;
use super::tail::TailBudget;
use super::thread::{Shared, Stop};
use super::view::{LogContext, ReadView};
use super::views::Views;
use crate::disk::Disk;
use crate::engine::PartitionInfo;
use crate::engine::effect::{SegmentName, SegmentWrite, ViewChange};
use crate::environment::Environment;

/// Limits of the log. All apply to all partitions together.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Bytes that may wait to be written before [`SegmentWriter::has_room`] says no.
    pub unwritten_bytes: u64,
    /// Bytes of batches kept in memory for readers. Unwritten batches are kept in any case and count.
    pub tail_bytes: usize,
    /// Bytes kept of what was read from disk for share groups.
    pub reread_bytes: usize,
    /// Bytes of indexes of sealed segments kept in memory.
    pub index_bytes: usize,
    /// Segment files held open.
    pub open_files: usize,
    /// Reads of the disk at one time.
    pub disk_reads: usize,
    /// How long a batch may wait for others to be written with it.
    pub linger: Duration,
    /// Whether a thread of its own writes. Without it [`SegmentWriter::step`] does, and whoever has to wait for something
    /// to be written writes it, which simulation wants for its order of operations.
    pub background: bool,
    /// Whose time the linger is measured in.
    pub environment: Environment,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            unwritten_bytes: 64 * 1024 * 1024,
            tail_bytes: 64 * 1024 * 1024,
            reread_bytes: 128 * 1024 * 1024,
            index_bytes: 16 * 1024 * 1024,
            open_files: 1024,
            disk_reads: 16,
            linger: Duration::from_millis(100),
            background: true,
            environment: Environment::default(),
        }
    }
}

/// Segments that are gone, to be removed once a checkpoint no longer knows them.
#[derive(Debug, Default)]
pub struct Condemned(Vec<SegmentName>);

impl Condemned {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Called when there is room again or the writer has failed.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// Owner of the log's files. Methods are for the shard and its checkpoint; readers use [`Views`].
#[derive(Debug)]
pub struct SegmentWriter {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl SegmentWriter {
    /// Starts the log in directory `root`. `wake` is called, from another thread, whenever there is room again after
    /// [`Self::has_room`] said no, and once when the writer fails.
    ///
    /// # Errors
    /// The directory or the thread cannot be created.
    pub fn start(disk: Arc<dyn Disk>, root: &Path, options: &LogOptions, wake: Wake) -> io::Result<Self> {
        disk.create_dir(root)?;
        let file_system = disk.file_system(root)?;
        let files = SegmentFiles::new(disk, root.to_path_buf(), options.open_files, options.index_bytes);
        let context = Arc::new(LogContext {
            files,
            budget: TailBudget::new(options.tail_bytes),
            rereads: RereadCache::new(options.reread_bytes),
            disk_reads: Arc::new(Semaphore::new(options.disk_reads)),
        });
        let shared = Arc::new(Shared::new(context, file_system, options, wake));
        let thread = if options.background {
            let shared = Arc::clone(&shared);
            Some(std::thread::Builder::new().name("segments".into()).spawn(move || shared.run())?)
        } else {
            None
        };
        Ok(Self { shared, thread })
    }

    /// Writes on this thread what is due, at most one large write; false when nothing was. Not for a log with a thread of
    /// its own. Blocks on the disk; a failure shows in [`Self::failure`].
    pub fn step(&self) -> bool {
        self.shared.step()
    }

    /// The partitions, for readers.
    pub fn views(&self) -> &Arc<Views> {
        self.shared.views()
    }

    /// Opens a partition as the checkpoint knows it. What came later is replayed through [`Self::apply`] and
    /// [`Self::append`], as when it happened.
    ///
    /// Touches no file: what a file holds beyond the given bytes is cut off by the first write to it, and is not looked
    /// at before.
    pub fn restore(&self, partition: &PartitionInfo) {
        let context = Arc::clone(&self.shared.context);
        self.views().insert(Arc::new(ReadView::new(context, partition)));
    }

    /// Changes what readers see. Call it before [`Self::append`] with the same frame's batches.
    pub fn apply(&self, change: &ViewChange) {
        match change {
            ViewChange::Created { partition, topic, first_segment } => self.restore(&PartitionInfo {
                partition: *partition,
                topic: topic.clone(),
                log_start: first_segment.base_offset,
                end: first_segment.base_offset,
                segments: vec![(*first_segment, 0)],
            }),
            ViewChange::SegmentAdded { segment } => match self.views().get(segment.partition) {
                Some(view) => view.add_segment(*segment),
                None => warn!(partition = %segment.partition, "a segment was added to no partition"),
            },
            ViewChange::LogStartRaised { partition, log_start } => match self.views().get(*partition) {
                Some(view) => view.raise_log_start(*log_start),
                None => warn!(%partition, "the log start was raised of no partition"),
            },
            ViewChange::SegmentsRemoved { segments } => self.shared.remove_segments(segments),
            ViewChange::SegmentsReplaced { partition, removed, added } => {
                self.shared.replace_segments(*partition, removed, added);
            }
            ViewChange::Removed { partition } => self.shared.remove(*partition),
        }
    }

    /// Takes batches into the tails, where they wait to be published, and queues them to be written. Never blocks; ask
    /// [`Self::has_room`] before.
    ///
    /// # Errors
    /// The writer has failed. The batches can be read all the same, but are not written: the shard must stop.
    pub fn append(&self, writes: Vec<SegmentWrite>) -> Result<(), LogFailure> {
        if writes.is_empty() {
            return Ok(());
        }
        self.shared.append(writes);
        self.failure().map_or(Ok(()), Err)
    }

    /// Bytes that were appended and are not yet written.
    pub fn unwritten_bytes(&self) -> u64 {
        self.shared.unwritten()
    }

    /// Bytes of batches in memory.
    pub fn tail_bytes(&self) -> usize {
        self.shared.context.budget.used()
    }

    /// Whether more records should be admitted. After a "no", the wake function is called when that changes.
    pub fn has_room(&self) -> bool {
        self.shared.has_room()
    }

    /// Waits until there is room, at most this long; false if there is still none. For replay, where nobody else waits.
    ///
    /// # Errors
    /// The writer has failed.
    pub fn wait_for_room(&self, timeout: Duration) -> Result<bool, LogFailure> {
        self.shared.wait_for_room(timeout)
    }

    /// The first failure. Nothing has been written since.
    pub fn failure(&self) -> Option<LogFailure> {
        self.shared.failure().cloned()
    }

    /// Writes everything appended before the call, and returns once it is on the device. Blocks; what is appended
    /// meanwhile goes on being written. For the checkpoint's thread.
    ///
    /// # Errors
    /// The writer has failed, now or before.
    pub fn sync(&self) -> Result<(), LogFailure> {
        self.shared.sync()
    }

    /// The segments removed so far, once. They may be removed when a checkpoint has been committed
    /// that was begun after this call.
    pub fn take_condemned(&self) -> Condemned {
        Condemned(self.shared.take_condemned())
    }

    /// The segments of the partitions removed so far, once. They may be removed when the frames that say so are on the device:
    /// a replay that comes to them again, from an older checkpoint, does without.
    pub fn take_freed(&self) -> Condemned {
        Condemned(self.shared.take_freed())
    }

    /// Finds segments on disk that do not exist any more (left over when a crash came before [`Self::unlink`]) and
    /// adds them to those of [`Self::take_condemned`]. For a start, after replay and before anything is created; what of a segment
    /// is missing is reported from now on.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn condemn_unknown(&self) -> io::Result<()> {
        self.shared.replayed();
        let found = self.shared.context.files.find_unknown(|name| self.shared.place(name).is_some())?;
        self.shared.condemn(found);
        Ok(())
    }

    /// Removes files; blocks for as long as the file system takes to free their space. What cannot be removed is reported
    /// in the log.
    pub fn unlink(&self, condemned: Condemned) {
        for name in condemned.0 {
            self.shared.unlink(name);
        }
    }

    /// Writes what waits to be written and ends the thread. Does not sync.
    ///
    /// # Errors
    /// The writer has failed.
    pub fn shutdown(mut self) -> Result<(), LogFailure> {
        self.stop(Stop::WhenWritten);
        self.failure().map_or(Ok(()), Err)
    }

    fn stop(&mut self, stop: Stop) {
        self.shared.stop(stop);
        if self.thread.is_none() && stop == Stop::WhenWritten {
            while self.shared.step() {}
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the segment writer panicked");
        }
    }
}

impl Drop for SegmentWriter {
    /// Ends the thread after the write it is at. What is left unwritten is replayed from the journal.
    fn drop(&mut self) {
        self.stop(Stop::Now);
    }
}
