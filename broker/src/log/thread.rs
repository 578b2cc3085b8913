//! What the segment writer's thread does, and what it shares with those who call [`super::SegmentWriter`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tracing::{error, warn};

use super::error::LogFailure;
use super::queue::{Next, Queue, Run};
use super::segment::{PlacedBatch, Segment};
use super::view::{LogContext, ReadView};
use super::views::Views;
use super::writer::{LogOptions, Wake};
use crate::disk::{DiskFile, FileSystem};
use crate::engine::effect::{SegmentName, SegmentWrite};
use crate::engine::types::PartitionKey;
use crate::environment::Environment;
use crate::plants::planted;

/// From how many files and directories on a sync of the whole file system is cheaper than one of each.
const MANY_FILES: usize = 64;

/// Everything but the thread itself.
pub(super) struct Shared {
    pub(super) context: Arc<LogContext>,
    file_system: Arc<dyn FileSystem>,
    views: Arc<Views>,
    limit: u64,
    /// A thread runs [`Shared::run`]; otherwise whoever waits does the work.
    background: bool,
    environment: Environment,
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
    /// Of partitions that are gone.
    freed: Mutex<Vec<SegmentName>>,
    /// While the journal is replayed: what may turn out to be missing.
    replaying: Mutex<Option<Replaying>>,
    /// One sync at a time.
    syncing: Mutex<()>,
}

/// A segment whose file is shorter than what was written to it. It may be one that was removed soon after.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    segment: SegmentName,
    length: u64,
    written: u64,
}

/// What a replay has come across.
#[derive(Debug, Default)]
pub(super) struct Replaying {
    /// Segments of which something is missing.
    suspects: Vec<Suspect>,
    /// Segments that frames refer to, and how long they must be for that.
    pub(super) referred: BTreeMap<SegmentName, u64>,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    /// Files with bytes, and directories with names, that were not synced yet.
    dirty_files: BTreeSet<SegmentName>,
    dirty_directories: BTreeSet<PathBuf>,
    /// The thread waits until there is something to do at all.
    idle: bool,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
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

impl Shared {
    pub(super) fn new(
        context: Arc<LogContext>,
        file_system: Arc<dyn FileSystem>,
        options: &LogOptions,
        wake: Wake,
    ) -> Self {
        Self {
            context,
            file_system,
            views: Arc::default(),
            limit: options.unwritten_bytes,
            background: options.background,
            environment: options.environment.clone(),
            wake,
            state: Mutex::new(State {
                queue: Queue::new(options.linger),
                dirty_files: BTreeSet::new(),
                dirty_directories: BTreeSet::new(),
                idle: false,
                stop: None,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
            unwritten: AtomicU64::new(0),
            short: AtomicBool::new(false),
            failure: OnceLock::new(),
            condemned: Mutex::default(),
            freed: Mutex::default(),
            replaying: Mutex::new(Some(Replaying::default())),
            syncing: Mutex::default(),
        }
    }

    pub(super) fn views(&self) -> &Arc<Views> {
        &self.views
    }

    pub(super) fn failure(&self) -> Option<&LogFailure> {
        self.failure.get()
    }

    pub(super) fn unwritten(&self) -> u64 {
        self.unwritten.load(Ordering::Relaxed)
    }

    pub(super) fn append(&self, writes: Vec<SegmentWrite>) {
        let now = self.environment.now();
        let mut bytes = 0;
        let mut state = self.state.lock();
        for write in writes {
            let Some((view, segment)) = self.place(write.segment) else {
                // Its topic was deleted within the same frame.
                continue;
            };
            if (write.bytes.len() as u64) < write.length {
                self.unwritten.fetch_add(std::mem::take(&mut bytes), Ordering::Relaxed);
                MutexGuard::unlocked(&mut state, || self.take_stored(&view, &segment, &write));
                continue;
            }
            bytes += write.bytes.len() as u64;
            let batch = PlacedBatch {
                segment,
                position: write.position,
                base_offset: write.base_offset,
                last_offset: write.last_offset,
                max_timestamp: write.max_timestamp,
                bytes: write.bytes,
                stored: write.stored,
            };
            view.stage(batch.clone());
            state.queue.push(now, &view, batch);
        }
        let unwritten = self.unwritten.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // A thread that lingers wakes up by itself; waking it for every frame would cost more than its work.
        let wake = state.idle || state.queue.has_full() || self.is_pressing(unwritten);
        drop(state);
        if wake {
            self.work.notify_one();
        }
        self.context.budget.enforce();
    }

    /// Half full is the time to write what there is, while there is room for more to come.
    fn is_pressing(&self, unwritten: u64) -> bool {
        unwritten > self.limit / 2
    }

    pub(super) fn has_room(&self) -> bool {
        if self.unwritten() < self.limit {
            return true;
        }
        self.short.store(true, Ordering::SeqCst);
        // It may have become enough between the two.
        self.unwritten.load(Ordering::SeqCst) < self.limit
    }

    pub(super) fn wait_for_room(&self, timeout: Duration) -> Result<bool, LogFailure> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure.clone());
            }
            if self.unwritten() < self.limit {
                return Ok(true);
            }
            if !self.background {
                if !MutexGuard::unlocked(&mut state, || self.step()) && self.failure().is_none() {
                    return Ok(self.unwritten() < self.limit);
                }
            } else if self.progress.wait_until(&mut state, deadline).timed_out() {
                return Ok(false);
            }
        }
    }

    pub(super) fn condemn(&self, names: Vec<SegmentName>) {
        self.condemned.lock().extend(names);
    }

    pub(super) fn take_condemned(&self) -> Vec<SegmentName> {
        std::mem::take(&mut *self.condemned.lock())
    }

    pub(super) fn take_freed(&self) -> Vec<SegmentName> {
        std::mem::take(&mut *self.freed.lock())
    }

    fn suspect(&self, suspect: Suspect) {
        match &mut *self.replaying.lock() {
            Some(replaying) => replaying.suspects.push(suspect),
            None => self.report(suspect),
        }
    }

    /// A replayed frame refers to the segment up to `end`.
    pub(super) fn refer(&self, segment: SegmentName, end: u64) {
        if let Some(replaying) = &mut *self.replaying.lock() {
            replaying.referred.insert(segment, end);
        }
    }

    fn report(&self, Suspect { segment, length, written }: Suspect) {
        if self.place(segment).is_some() {
            let file = self.context.files.log_path(segment);
            error!(file = %file.display(), length, written, "a segment has lost its end, or all of it");
        }
    }

    /// The replay is over: what is missing now is missed.
    pub(super) fn replayed(&self) {
        let Replaying { suspects, referred } = self.replaying.lock().take().unwrap_or_default();
        for suspect in suspects {
            self.report(suspect);
        }
        for (segment, written) in referred {
            let file = self.context.files.open(segment);
            match file.and_then(|file| file.len()) {
                Ok(length) if length >= written => {}
                found => self.report(Suspect { segment, length: found.unwrap_or(0), written }),
            }
        }
    }

    pub(super) fn stop(&self, stop: Stop) {
        self.state.lock().stop.get_or_insert(stop);
        self.work.notify_one();
    }

    pub(super) fn place(&self, name: SegmentName) -> Option<(Arc<ReadView>, Arc<Segment>)> {
        let view = self.views.get(name.partition)?;
        let segment = view.segment(name)?;
        Some((view, segment))
    }

    pub(super) fn remove(&self, partition: PartitionKey) {
        let Some(view) = self.views.remove(partition) else { return };
        let mut state = self.state.lock();
        let discarded = state.queue.discard(partition);
        self.release(state, discarded as u64);
        view.close();
        self.freed.lock().extend(view.segments().iter().map(|segment| segment.name()));
    }

    /// Segments of one partition are not needed any more. What waits to be written to them still is: a sync waits for it.
    pub(super) fn remove_segments(&self, names: &[SegmentName]) {
        if let Some(view) = names.first().and_then(|name| self.views.get(name.partition)) {
            view.remove_segments(names);
            self.condemn(names.to_vec());
        }
    }

    /// Others are in the place of segments of one partition; see [`Self::remove_segments`].
    pub(super) fn replace_segments(
        &self,
        partition: PartitionKey,
        removed: &[SegmentName],
        added: &[(SegmentName, u64)],
    ) {
        let (Some(view), Some(first)) = (self.views.get(partition), removed.first()) else { return };
        // The tail lets go of what is replaced, and so of all that is in front of it. The cleaner has read it from its files; in
        // a replay, what is in front may still wait to be written. A failure is found by whoever appends.
        let has_unwritten = view.tail().lock().has_unwritten(first.base_offset);
        if has_unwritten && self.write_out().is_err() {
            return;
        }
        view.replace_segments(removed, added);
        self.condemn(removed.to_vec());
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

    pub(super) fn fail(&self, action: &'static str, file: PathBuf, source: io::Error) -> LogFailure {
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

    pub(super) fn run(&self) {
        while let Some(run) = self.next() {
            if self.write(&run).is_err() {
                return;
            }
        }
    }

    /// Writes what is due, at most one run; false when nothing was.
    pub(super) fn step(&self) -> bool {
        let next = {
            let mut state = self.state.lock();
            if self.failure.get().is_some() {
                return false;
            }
            let eager = state.stop.is_some() || self.is_pressing(self.unwritten());
            state.queue.next(self.environment.now(), eager)
        };
        match next {
            Next::Write(run) => self.write(&run).is_ok(),
            Next::Wait(_) | Next::Empty => false,
        }
    }

    /// Waits for something to do; `None` to end.
    fn next(&self) -> Option<Run> {
        let mut state = self.state.lock();
        loop {
            if state.stop == Some(Stop::Now) || self.failure.get().is_some() {
                return None;
            }
            let stopping = state.stop.is_some();
            let eager = stopping || self.is_pressing(self.unwritten());
            match state.queue.next(self.environment.now(), eager) {
                Next::Write(run) => return Some(run),
                Next::Wait(duration) => {
                    self.work.wait_for(&mut state, duration);
                }
                Next::Empty if stopping => return None,
                Next::Empty => {
                    state.idle = true;
                    self.work.wait(&mut state);
                    state.idle = false;
                }
            }
        }
    }

    /// Writes a run, then tells readers, the budget and whoever waits.
    fn write(&self, run: &Run) -> Result<(), LogFailure> {
        let (Some(first), Some(last)) = (run.batches.first(), run.batches.last()) else { return Ok(()) };
        let segment = &first.segment;
        let name = segment.name();
        let path = || self.context.files.log_path(name);
        self.seal_before(&run.view, segment)?;
        let written = segment.written();
        if first.position != written {
            let reason = format!("position {} was decided, {written} bytes are written", first.position);
            return Err(self.fail("continue", path(), io::Error::other(reason)));
        }
        let mut wrote = false;
        for piece in run.batches.chunk_by(|one, next| one.stored == next.stored) {
            let Some(first) = piece.first().filter(|first| !first.stored) else { continue };
            let file = self.open(segment).map_err(|error| self.fail("open", path(), error))?;
            let mut slices: Vec<_> = piece.iter().map(|batch| IoSlice::new(&batch.bytes)).collect();
            file.write_all_vectored_at(&mut slices, first.position)
                .map_err(|error| self.fail("write", path(), error))?;
            wrote = true;
        }

        segment.wrote(&run.batches);
        let end = last.last_offset + 1;
        run.view.tail().lock().mark_written(end);
        self.context.budget.allow(&run.view, end);
        self.context.budget.enforce();
        let mut state = self.state.lock();
        // After the write and before it counts as done: so a sync that it belongs to finds it here, and a sync that
        // takes the list earlier leaves it to the next.
        if wrote {
            state.dirty_files.insert(name);
        }
        state.queue.done(run);
        self.release(state, run.batches.iter().map(|batch| batch.bytes.len() as u64).sum());
        Ok(())
    }

    /// Seals the segments before the one that is written now.
    pub(super) fn seal_before(&self, view: &ReadView, current: &Arc<Segment>) -> Result<(), LogFailure> {
        let segments = view.segments();
        let before = segments.iter().rev().skip_while(|segment| !Arc::ptr_eq(segment, current)).skip(1);
        for segment in before.take_while(|segment| segment.is_growing()) {
            self.cut(segment)
                .map_err(|error| self.fail("cut", self.context.files.log_path(segment.name()), error))?;
            segment.seal(&self.context.files).map_err(|error| {
                self.fail("write the index", self.context.files.index_path(segment.name()), error)
            })?;
        }
        Ok(())
    }

    /// Cuts off what is left over behind the end of a segment to which nothing is written any more.
    fn cut(&self, segment: &Segment) -> io::Result<()> {
        let files = &self.context.files;
        let _one_at_a_time = segment.preparing.lock();
        if segment.is_prepared() {
            return Ok(());
        }
        match files.open(segment.name()) {
            Ok(file) if file.len()? > segment.written() => file.set_len(segment.written()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The file of a segment to write to, created if this is its first write.
    pub(super) fn open(&self, segment: &Segment) -> io::Result<Arc<dyn DiskFile>> {
        let files = &self.context.files;
        let name = segment.name();
        if segment.is_prepared() {
            return files.open(name);
        }
        let _one_at_a_time = segment.preparing.lock();
        if segment.is_prepared() {
            return files.open(name);
        }
        // What a frame refers to that the replay has not come to yet lies behind the end, too.
        let replaying = self.replaying.lock().is_some();
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
                if length > written && !replaying {
                    // Left over from before a crash: it was never promised, or is about to be written again.
                    file.set_len(written)?;
                } else if length < written {
                    self.suspect(Suspect { segment: name, length, written });
                }
                file
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if written > 0 {
                    self.suspect(Suspect { segment: name, length: 0, written });
                }
                files.disk().make_dir(&directory)?;
                files.disk().create(&files.log_path(name))?
            }
            Err(error) => return Err(error),
        };
        if !replaying {
            segment.set_prepared();
        }
        files.keep(name, &file);
        Ok(file)
    }

    /// Waits until everything that was appended is written; the caller has `syncing`.
    fn write_all(&self) -> Result<MutexGuard<'_, State>, LogFailure> {
        let mut state = self.state.lock();
        state.queue.set_barrier();
        self.work.notify_one();
        loop {
            if let Some(failure) = self.failure.get() {
                return Err(failure.clone());
            }
            if state.queue.reached_barrier() {
                return Ok(state);
            }
            if self.background {
                self.progress.wait(&mut state);
            } else {
                // What has to be written before the barrier is due.
                MutexGuard::unlocked(&mut state, || self.step());
            }
        }
    }

    /// Waits until everything that was appended is written.
    pub(super) fn write_out(&self) -> Result<(), LogFailure> {
        let _one_at_a_time = self.syncing.lock();
        self.write_all().map(drop)
    }

    pub(super) fn sync(&self) -> Result<(), LogFailure> {
        let _one_at_a_time = self.syncing.lock();
        let (files, directories) = {
            let mut state = self.write_all()?;
            (std::mem::take(&mut state.dirty_files), std::mem::take(&mut state.dirty_directories))
        };
        let directories = if planted("forget-directory-sync") { BTreeSet::new() } else { directories };
        if files.len() + directories.len() > MANY_FILES {
            return self.file_system.sync().map_err(|error| {
                self.fail("sync the file system of", self.context.files.root().into(), error)
            });
        }
        for name in files {
            let segment = self.place(name).map(|(_, segment)| segment);
            let _one_at_a_time = segment.as_ref().map(|segment| segment.syncing.lock());
            if let Some(failure) = self.failure() {
                return Err(failure.clone());
            }
            match self.context.files.open(name).and_then(|file| file.sync_data()) {
                Ok(()) => {}
                // Removed, and a checkpoint says so. One that only the memory says so of is still synced: the removal
                // may be lost in a crash that this checkpoint survives.
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.place(name).is_none() => {}
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

    /// Removes a segment's files; blocks for as long as the file system takes to free the space.
    pub(super) fn unlink(&self, name: SegmentName) {
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
