//! The thread that writes segments behind the journal.
//!
//! Nothing waits for it but the checkpoint: what it has not written yet is in the journal and in the tails. So it may
//! gather many batches into large writes ([`super::queue`]), and need not sync them one by one.
//!
//! Invariants: a batch is written at the position that the engine decided, right behind the one before, so that a
//! replay repeats it byte for byte; what a [`SegmentWriter::sync`] covers is on the device when it returns; after a
//! failed write or sync nothing is written any more, and the first failure is the one that is told.

use std::collections::{HashSet, VecDeque};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Semaphore;
use tracing::{error, warn};

use super::error::LogFailure;
use super::files::SegmentFiles;
use super::queue::{Next, Queue, Run};
use super::segment::{PlacedBatch, Segment};
use super::tail::TailBudget;
use super::view::{LogContext, ReadView};
use super::views::Views;
use crate::disk::{Disk, DiskFile, FileSystem};
use crate::engine::PartitionInfo;
use crate::engine::effect::{SegmentName, SegmentWrite, ViewChange};
use crate::engine::types::PartitionKey;

/// From how many files and directories on a sync of the whole file system is cheaper than one of each.
const MANY_FILES: usize = 64;

/// Limits of the log. All apply to all partitions together.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Bytes that may wait to be written before [`SegmentWriter::has_room`] says no.
    pub unwritten_bytes: u64,
    /// Bytes of batches kept in memory for readers. Unwritten batches are kept in any case and count.
    pub tail_bytes: usize,
    /// Bytes of indexes of sealed segments kept in memory.
    pub index_bytes: usize,
    /// Segment files held open.
    pub open_files: usize,
    /// Reads of the disk at one time.
    pub disk_reads: usize,
    /// How long a batch may wait for others to be written with it.
    pub linger: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            unwritten_bytes: 64 * 1024 * 1024,
            tail_bytes: 64 * 1024 * 1024,
            index_bytes: 16 * 1024 * 1024,
            open_files: 1024,
            disk_reads: 16,
            linger: Duration::from_millis(100),
        }
    }
}

/// Segments of partitions that are gone, to be removed once a checkpoint no longer knows them.
#[derive(Debug, Default)]
pub struct Condemned(Vec<SegmentName>);

/// Called when there is room again or the writer has failed.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// Owner of the log's files. Methods are for the shard and its checkpoint; readers use [`Views`].
#[derive(Debug)]
pub struct SegmentWriter {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub(super) struct Shared {
    pub(super) context: Arc<LogContext>,
    file_system: Arc<dyn FileSystem>,
    views: Arc<Views>,
    limit: u64,
    wake: Wake,
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// Something was done, or nothing will be any more.
    progress: Condvar,
    unwritten: AtomicU64,
    /// Somebody found no room and is to be woken.
    short: AtomicBool,
    failure: OnceLock<LogFailure>,
    condemned: Mutex<Vec<SegmentName>>,
    /// One sync at a time.
    syncing: Mutex<()>,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    removals: VecDeque<SegmentName>,
    /// Files with bytes, and directories with names, that were not synced yet.
    dirty_files: HashSet<SegmentName>,
    dirty_directories: HashSet<PathBuf>,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    WhenWritten,
    Now,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentWriter")
            .field("unwritten", &self.unwritten)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
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
            disk_reads: Arc::new(Semaphore::new(options.disk_reads)),
        });
        let shared = Arc::new(Shared {
            context,
            file_system,
            views: Arc::default(),
            limit: options.unwritten_bytes,
            wake,
            state: Mutex::new(State {
                queue: Queue::new(options.linger),
                removals: VecDeque::new(),
                dirty_files: HashSet::new(),
                dirty_directories: HashSet::new(),
                stop: None,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
            unwritten: AtomicU64::new(0),
            short: AtomicBool::new(false),
            failure: OnceLock::new(),
            condemned: Mutex::default(),
            syncing: Mutex::default(),
        });
        let thread = std::thread::Builder::new().name("segments".into()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The partitions, for readers.
    pub fn views(&self) -> &Arc<Views> {
        &self.shared.views
    }

    /// Opens a partition as the checkpoint knows it. What came later is replayed through [`Self::apply`] and
    /// [`Self::append`], as when it happened.
    ///
    /// Touches no file: what a file holds beyond the given bytes is cut off by the first write to it, and is not looked
    /// at before.
    pub fn restore(&self, partition: &PartitionInfo) {
        let context = Arc::clone(&self.shared.context);
        self.shared.views.insert(Arc::new(ReadView::new(context, partition)));
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
            ViewChange::SegmentAdded { segment } => match self.shared.views.get(segment.partition) {
                Some(view) => view.add_segment(*segment),
                None => warn!(partition = %segment.partition, "a segment was added to no partition"),
            },
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
        let now = Instant::now();
        let mut bytes = 0;
        let mut state = self.shared.state.lock();
        for write in writes {
            let Some((view, segment)) = self.shared.place(write.segment) else {
                // Its topic was deleted within the same frame.
                continue;
            };
            bytes += write.bytes.len() as u64;
            let batch = PlacedBatch {
                segment,
                position: write.position,
                base_offset: write.base_offset,
                last_offset: write.last_offset,
                max_timestamp: write.max_timestamp,
                bytes: write.bytes,
            };
            view.stage(batch.clone());
            state.queue.push(now, &view, batch);
        }
        self.shared.unwritten.fetch_add(bytes, Ordering::Relaxed);
        drop(state);
        self.shared.work.notify_one();
        self.shared.context.budget.enforce();
        self.failure().map_or(Ok(()), Err)
    }

    /// Bytes that were appended and are not yet written.
    pub fn unwritten_bytes(&self) -> u64 {
        self.shared.unwritten.load(Ordering::Relaxed)
    }

    /// Bytes of batches in memory.
    pub fn tail_bytes(&self) -> usize {
        self.shared.context.budget.used()
    }

    /// Whether more records should be admitted. After a "no", the wake function is called when that changes.
    pub fn has_room(&self) -> bool {
        if self.unwritten_bytes() < self.shared.limit {
            return true;
        }
        self.shared.short.store(true, Ordering::SeqCst);
        // It may have become enough between the two.
        self.unwritten_bytes() < self.shared.limit
    }

    /// Waits until there is room, at most this long; false if there is still none. For replay, where nobody else waits.
    ///
    /// # Errors
    /// The writer has failed.
    pub fn wait_for_room(&self, timeout: Duration) -> Result<bool, LogFailure> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            if self.unwritten_bytes() < self.shared.limit {
                return Ok(true);
            }
            if self.shared.progress.wait_until(&mut state, deadline).timed_out() {
                return Ok(false);
            }
        }
    }

    /// The first failure. Nothing has been written since.
    pub fn failure(&self) -> Option<LogFailure> {
        self.shared.failure.get().cloned()
    }

    /// Writes everything appended before the call, and returns once it is on the device. Blocks; what is appended
    /// meanwhile goes on being written. For the checkpoint's thread.
    ///
    /// # Errors
    /// The writer has failed, now or before.
    pub fn sync(&self) -> Result<(), LogFailure> {
        self.shared.sync()
    }

    /// The segments of the partitions removed so far, once. They may be removed when a checkpoint has been committed
    /// that was begun after this call.
    pub fn take_condemned(&self) -> Condemned {
        Condemned(std::mem::take(&mut *self.shared.condemned.lock()))
    }

    /// Finds segments on disk whose partition does not exist (left over when a crash came before [`Self::unlink`]) and
    /// adds them to those of [`Self::take_condemned`]. For a start, after replay and before anything is created.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn condemn_unknown(&self) -> io::Result<()> {
        let found = self.shared.context.files.find_unknown(|key| self.shared.views.get(key).is_some())?;
        self.shared.condemned.lock().extend(found);
        Ok(())
    }

    /// Removes files, in the background. What cannot be removed is reported in the log.
    pub fn unlink(&self, condemned: Condemned) {
        self.shared.state.lock().removals.extend(condemned.0);
        self.shared.work.notify_one();
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
        self.shared.state.lock().stop.get_or_insert(stop);
        self.shared.work.notify_one();
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

impl Shared {
    fn place(&self, name: SegmentName) -> Option<(Arc<ReadView>, Arc<Segment>)> {
        let view = self.views.get(name.partition)?;
        let segment = view.segment(name)?;
        Some((view, segment))
    }

    fn remove(&self, partition: PartitionKey) {
        let Some(view) = self.views.remove(partition) else { return };
        let mut state = self.state.lock();
        let discarded = state.queue.discard(partition);
        self.release(state, discarded as u64);
        view.close();
        self.condemned.lock().extend(view.segments().iter().map(|segment| segment.name()));
    }

    /// These bytes do not wait any more. Takes the lock so that nobody checks before and waits after.
    fn release(&self, state: MutexGuard<'_, State>, bytes: u64) {
        let unwritten = self.unwritten.fetch_sub(bytes, Ordering::SeqCst) - bytes;
        drop(state);
        self.progress.notify_all();
        if unwritten < self.limit && self.short.swap(false, Ordering::SeqCst) {
            (self.wake)();
        }
    }

    fn fail(&self, action: &'static str, file: PathBuf, source: io::Error) -> LogFailure {
        let failure = LogFailure { action, file, source: Arc::new(source) };
        if self.failure.set(failure.clone()).is_ok() {
            error!(%failure, "the log accepts no more writes");
            // Under the lock, so that nobody checks before and waits after.
            let _state = self.state.lock();
            self.progress.notify_all();
            self.work.notify_all();
        }
        (self.wake)();
        self.failure.get().cloned().unwrap_or(failure)
    }

    fn run(&self) {
        while let Some(work) = self.next() {
            match work {
                Work::Write(run) => {
                    if self.write(&run).is_err() {
                        return;
                    }
                }
                Work::Remove(name) => self.unlink(name),
            }
        }
    }

    /// Waits for something to do; `None` to end.
    fn next(&self) -> Option<Work> {
        let mut state = self.state.lock();
        loop {
            if state.stop == Some(Stop::Now) || self.failure.get().is_some() {
                return None;
            }
            if let Some(name) = state.removals.pop_front() {
                return Some(Work::Remove(name));
            }
            let stopping = state.stop.is_some();
            // Half full is the time to write what there is, while there is room for more to come.
            let eager = stopping || self.unwritten.load(Ordering::Relaxed) > self.limit / 2;
            match state.queue.next(Instant::now(), eager) {
                Next::Write(run) => return Some(Work::Write(run)),
                Next::Wait(duration) => {
                    self.work.wait_for(&mut state, duration);
                }
                Next::Empty if stopping => return None,
                Next::Empty => self.work.wait(&mut state),
            }
        }
    }

    /// Writes a run, then tells readers, the budget and whoever waits.
    fn write(&self, run: &Run) -> Result<(), LogFailure> {
        let (Some(first), Some(last)) = (run.batches.first(), run.batches.last()) else { return Ok(()) };
        let segment = &first.segment;
        let name = segment.name();
        let path = || self.context.files.log_path(name);
        self.seal_before(run)?;
        let written = segment.written();
        if first.position != written {
            let reason = format!("position {} was decided, {written} bytes are written", first.position);
            return Err(self.fail("continue", path(), io::Error::other(reason)));
        }
        let file = self.open(segment).map_err(|error| self.fail("open", path(), error))?;
        let mut slices: Vec<_> = run.batches.iter().map(|batch| IoSlice::new(&batch.bytes)).collect();
        file.write_all_vectored_at(&mut slices, first.position)
            .map_err(|error| self.fail("write", path(), error))?;

        segment.wrote(&run.batches);
        let end = last.last_offset + 1;
        run.view.tail().lock().mark_written(end);
        self.context.budget.allow(&run.view, end);
        self.context.budget.enforce();
        let mut state = self.state.lock();
        // After the write and before it counts as done: so a sync that it belongs to finds it here, and a sync that
        // takes the list earlier leaves it to the next.
        state.dirty_files.insert(name);
        state.queue.done(run);
        self.release(state, run.batches.iter().map(|batch| batch.bytes.len() as u64).sum());
        Ok(())
    }

    /// Seals the segments before the one that is written now.
    fn seal_before(&self, run: &Run) -> Result<(), LogFailure> {
        let Some(first) = run.batches.first() else { return Ok(()) };
        let segments = run.view.segments();
        let before =
            segments.iter().rev().skip_while(|segment| !Arc::ptr_eq(segment, &first.segment)).skip(1);
        for segment in before.take_while(|segment| segment.is_growing()) {
            segment.seal(&self.context.files).map_err(|error| {
                self.fail("write the index", self.context.files.index_path(segment.name()), error)
            })?;
        }
        Ok(())
    }

    /// The file of a segment to write to, created if this is its first write.
    fn open(&self, segment: &Segment) -> io::Result<Arc<dyn DiskFile>> {
        let files = &self.context.files;
        let name = segment.name();
        if segment.is_prepared() {
            return files.open(name);
        }
        let written = segment.written();
        let directory = files.directory(name.partition);
        if written == 0 {
            // Not known to a checkpoint, so perhaps never synced, even if the file is there: an earlier run may have
            // ended between creating and syncing it. That goes for the directories above as well.
            let above = directory.ancestors().take(3).map(Path::to_path_buf);
            self.state.lock().dirty_directories.extend(above);
        }
        let file = match files.disk().open(&files.log_path(name)) {
            Ok(file) => {
                let length = file.len()?;
                if length > written {
                    // Left over from before a crash; replay is about to bring it again, or it was never promised.
                    file.set_len(written)?;
                } else if length < written {
                    error!(file = %files.log_path(name).display(), length, written, "a segment has lost its end");
                }
                file
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if written > 0 {
                    error!(file = %files.log_path(name).display(), written, "a segment is missing");
                }
                files.disk().make_dir(&directory)?;
                files.disk().create(&files.log_path(name))?
            }
            Err(error) => return Err(error),
        };
        segment.set_prepared();
        files.keep(name, &file);
        Ok(file)
    }

    fn sync(&self) -> Result<(), LogFailure> {
        let _one_at_a_time = self.syncing.lock();
        let (files, directories) = {
            let mut state = self.state.lock();
            state.queue.set_barrier();
            self.work.notify_one();
            loop {
                if let Some(failure) = self.failure.get() {
                    return Err(failure.clone());
                }
                if state.queue.reached_barrier() {
                    break;
                }
                self.progress.wait(&mut state);
            }
            (std::mem::take(&mut state.dirty_files), std::mem::take(&mut state.dirty_directories))
        };
        if files.len() + directories.len() > MANY_FILES {
            return self.file_system.sync().map_err(|error| {
                self.fail("sync the file system of", self.context.files.root().into(), error)
            });
        }
        for name in files {
            match self.context.files.open(name).and_then(|file| file.sync_data()) {
                Ok(()) => {}
                // Removed, and a checkpoint says so. One that only the memory says so of is still synced: the removal
                // may be lost in a crash that this checkpoint survives.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && self.views.get(name.partition).is_none() => {}
                Err(error) => return Err(self.fail("sync", self.context.files.log_path(name), error)),
            }
        }
        for directory in directories {
            match self.context.files.disk().sync_dir(&directory) {
                Ok(()) => {}
                // Removed with its last segment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.fail("sync", directory, error)),
            }
        }
        Ok(())
    }

    fn unlink(&self, name: SegmentName) {
        let view = self.views.get(name.partition);
        if view.as_ref().is_some_and(|view| view.segment(name).is_some()) {
            return;
        }
        let files = &self.context.files;
        if let Err(error) = files.remove(name) {
            warn!(file = %files.log_path(name).display(), %error, "a segment could not be removed");
        }
        if view.is_none() {
            files.remove_empty(name.partition);
        }
    }
}

enum Work {
    Write(Run),
    Remove(SegmentName),
}
