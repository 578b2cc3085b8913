//! Making journal files ahead of their need, and recycling those that are not needed any more.
//!
//! Writing zeros once makes every later sync of the file cheaper than growing it would, and a recycled file needs not
//! even that. Both take tens of milliseconds, so a thread of its own does them. When frames come faster than zeros can be
//! written, a file is handed over with as many as there are: more would only take the disk's time from the frames.
//!
//! Invariants: at most one file is wanted or ready at a time; no more spares are kept than the last release brought, and
//! at most `spare_files`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::file::{self, FileHeader, JournalFile, Listing};
use super::{JournalOptions, Lsn};
use crate::disk::Disk;
use crate::environment::Environment;

/// Spares that even a small release leaves.
const LEAST_SPARES: usize = 2;

/// The file that a journal will go on in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) sequence: u64,
    /// Sequence of the file that it continues.
    pub(super) previous: u64,
    pub(super) synced: Lsn,
}

#[derive(Debug)]
pub(super) struct Preparer {
    shared: Arc<Shared>,
    /// `None` without a background thread: then the taker does the work.
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
    stop: AtomicBool,
    /// The file in the making is wanted as it is.
    enough: AtomicBool,
    workshop: Mutex<Workshop>,
}

#[derive(Debug, Default)]
struct Desk {
    wanted: Option<Wanted>,
    /// Names of files to recycle or remove; at most one entry for each file of the journal.
    retired: Vec<String>,
    outcome: Option<io::Result<JournalFile>>,
}

impl Preparer {
    pub(super) fn start(disk: Arc<dyn Disk>, dir: &Path, options: &JournalOptions) -> io::Result<Self> {
        let workshop = Workshop {
            disk,
            dir: dir.to_path_buf(),
            file_bytes: options.file_bytes,
            most_spares: options.spare_files,
            environment: options.environment.clone(),
            spares: Vec::new(),
        };
        let shared = Arc::new(Shared {
            desk: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            enough: AtomicBool::new(false),
            workshop: Mutex::new(workshop),
        });
        let thread = if options.background {
            let shared = shared.clone();
            let name = "journal-files".to_owned();
            Some(std::thread::Builder::new().name(name).spawn(move || shared.run())?)
        } else {
            None
        };
        Ok(Self { shared, thread })
    }

    /// Asks for a file; returns at once.
    pub(super) fn request(&self, wanted: Wanted) {
        let mut desk = self.shared.desk.lock();
        desk.wanted = Some(wanted);
        desk.outcome = None;
        self.shared.enough.store(false, Ordering::Relaxed);
        self.shared.changed.notify_all();
    }

    /// The file asked for is wanted soon, with however few zeros. Without a background thread nothing is in the making.
    pub(super) fn hurry(&self) {
        self.shared.enough.store(self.thread.is_some(), Ordering::Relaxed);
    }

    /// The file asked for, if it is ready.
    pub(super) fn try_take(&self) -> Option<JournalFile> {
        match self.shared.desk.lock().outcome.take_if(|outcome| outcome.is_ok()) {
            Some(Ok(file)) => Some(file),
            _ => None,
        }
    }

    /// The file asked for; blocks until it is ready. A file that could not be made is tried once more.
    pub(super) fn take(&self, wanted: Wanted) -> io::Result<JournalFile> {
        let mut tries_left = 1;
        loop {
            if self.thread.is_none() {
                self.work_now();
            }
            let mut desk = self.shared.desk.lock();
            while desk.outcome.is_none() {
                if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                    return Err(io::Error::other("the thread that prepares journal files has died"));
                }
                // The timeout only serves to notice that.
                self.shared.changed.wait_for(&mut desk, Duration::from_millis(100));
            }
            match desk.outcome.take() {
                Some(Err(_)) if tries_left > 0 => tries_left -= 1,
                Some(outcome) => return outcome,
                None => {}
            }
            desk.wanted = Some(wanted);
            self.shared.changed.notify_all();
        }
    }

    /// Hands over files of the directory that are not needed any more; returns at once.
    pub(super) fn retire(&self, names: impl IntoIterator<Item = String>) {
        self.shared.desk.lock().retired.extend(names);
        self.shared.changed.notify_all();
    }

    /// Does what is waiting on the caller's thread; for journals without a background thread.
    pub(super) fn work_now(&self) {
        while self.shared.work() {}
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.enough.store(true, Ordering::Relaxed);
        // Under the lock, so that the thread cannot miss it between its check and its wait.
        drop(self.shared.desk.lock());
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that prepares journal files has panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            if self.work() {
                continue;
            }
            let mut desk = self.desk.lock();
            let idle = desk.wanted.is_none() && desk.retired.is_empty();
            if idle && !self.stop.load(Ordering::Relaxed) {
                self.changed.wait(&mut desk);
            }
        }
    }

    /// Does one piece of waiting work; `false` when there is none.
    fn work(&self) -> bool {
        let mut workshop = self.workshop.lock();
        let (retired, wanted) = {
            let mut desk = self.desk.lock();
            (std::mem::take(&mut desk.retired), desk.wanted.take())
        };
        let busy = !retired.is_empty() || wanted.is_some();
        if !retired.is_empty() {
            workshop.retire(&retired);
        }
        if let Some(wanted) = wanted {
            let outcome = workshop.make(wanted, &self.enough);
            self.desk.lock().outcome = Some(outcome);
            self.changed.notify_all();
        }
        busy
    }
}

/// Does the work on the files.
#[derive(Debug)]
struct Workshop {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    file_bytes: u64,
    most_spares: usize,
    environment: Environment,
    spares: Vec<PathBuf>,
}

impl Workshop {
    fn make(&mut self, wanted: Wanted, enough: &AtomicBool) -> io::Result<JournalFile> {
        let Wanted { sequence, previous, synced } = wanted;
        let header = FileHeader::new(self.environment.random(), sequence, previous, 0, synced);
        let disk = &*self.disk;
        let mut file = if let Some(spare) = self.spares.pop() {
            // The new header must not reach the device while the file may still bear its old name there.
            disk.sync_dir(&self.dir)?;
            JournalFile::recycle(disk, &spare, header)?
        } else {
            let mut file = JournalFile::create(disk, &self.dir, header)?;
            let until = file::zeros_until(disk, &self.dir, self.file_bytes);
            if let Err(error) = file.fill_zeros(file::FIRST_FRAME, until, enough) {
                // Where there is no room, half a file would keep what is left from others.
                let _ = disk.remove(&file.path);
                return Err(error);
            }
            file
        };
        file.publish(disk, &self.dir)?;
        Ok(file)
    }

    /// Recycles or removes files of one release. What one interval between two checkpoints took, the next is likely to
    /// take as well.
    fn retire(&mut self, names: &[String]) {
        let limit = names.len().max(LEAST_SPARES).min(self.most_spares);
        for name in names {
            // Space that is not given back is a nuisance, not a danger; the next start tries again.
            if let Err(error) = self.retire_one(name, limit) {
                tracing::warn!(file = name, %error, "cannot recycle or remove an old journal file");
            }
        }
        while self.spares.len() > limit
            && let Some(spare) = self.spares.pop()
        {
            if let Err(error) = self.disk.remove(&spare) {
                tracing::warn!(file = %spare.display(), %error, "cannot remove a spare journal file");
            }
        }
    }

    fn retire_one(&mut self, name: &str, limit: usize) -> io::Result<()> {
        let path = self.dir.join(name);
        if self.spares.len() >= limit || !self.recyclable(&path)? {
            return self.disk.remove(&path);
        }
        let spare = match Listing::sequence_of_journal(name) {
            Some(sequence) => self.dir.join(file::spare_name(sequence)),
            None => path.clone(),
        };
        if spare != path {
            self.disk.rename(&path, &spare)?;
        }
        self.spares.push(spare);
        Ok(())
    }

    /// Only files that are worth it, none larger than usual, and none whose making was cut short.
    fn recyclable(&self, path: &Path) -> io::Result<bool> {
        let temporary = path.extension().is_some_and(|extension| extension == "tmp");
        let bytes = self.disk.open_read(path)?.len()?;
        Ok(!temporary && (self.file_bytes / 2..=self.file_bytes).contains(&bytes))
    }
}
