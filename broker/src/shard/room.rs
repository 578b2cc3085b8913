//! Room on the device: when new records are refused, so that everything else can go on.
//!
//! ```text
//!   0 ────── low water / 4 ──────── low water ──────── low water + reserve ────▶ bytes free
//!   │ the reserve is given up │  no new records  │  as before  │  records again, reserve made again
//! ```
//!
//! Below the low-water mark the engine refuses new records; acks, commits, deletes, retention, dead letters and checkpoints
//! go on in what is left. The reserve is a file that holds room against other programs on the same device: it is removed
//! when they have taken nearly all the rest, also before a start reads its journal, and made again when there is room.
//!
//! Owns the file `RESERVE`. Invariants: the device is asked often enough that no more than one turn's records are taken
//! between the low-water mark and the refusal; nothing here is needed by recovery.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Disk, FileSystem};
use crate::engine::error::NoRoom;

/// The file that holds the reserve; its content means nothing.
const RESERVE_FILE: &str = "RESERVE";
/// How often the device is asked while nothing is written.
const INTERVAL_MS: u64 = 250;
/// A record is written to the journal and to a segment.
const COPIES: u64 = 2;

/// How much of the device is kept free.
#[derive(Clone, Debug, Default)]
pub struct RoomOptions {
    /// New records are refused while fewer bytes are free; 0 to never ask.
    pub low_water_bytes: u64,
    /// Size of the reserve file; 0 for none.
    pub reserve_bytes: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Room {
    disk: Arc<dyn Disk>,
    file_system: Arc<dyn FileSystem>,
    dir: PathBuf,
    options: RoomOptions,
    has_reserve: bool,
    /// The device does not take a reserve; it is not tried again.
    no_reserve: bool,
    full: Option<NoRoom>,
    /// Bytes that may be journaled before the device is asked again.
    budget: u64,
    /// Monotonic time at which it is asked in any case.
    ask_at_ms: u64,
}

impl Room {
    /// Looks at the device before anything is written to it, and makes room for a start if there is none.
    ///
    /// # Errors
    /// The directory, which is created when missing, cannot be opened, or the reserve cannot be removed.
    pub(crate) fn open(disk: &Arc<dyn Disk>, dir: &Path, options: RoomOptions) -> io::Result<Self> {
        let file_system = match disk.file_system(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                disk.create_dir(dir)?;
                disk.file_system(dir)?
            }
            found => found?,
        };
        let mut room = Self {
            disk: disk.clone(),
            file_system,
            dir: dir.to_path_buf(),
            has_reserve: disk.list(dir)?.iter().any(|name| name == RESERVE_FILE),
            no_reserve: options.reserve_bytes == 0,
            options,
            full: None,
            budget: 0,
            ask_at_ms: 0,
        };
        if room.has_reserve && (room.no_reserve || room.is_critical(room.file_system.available()?)) {
            room.give_up_reserve()?;
        }
        Ok(room)
    }

    /// What a status board is told of the disk: where it asks for itself, and the low-water mark.
    pub(crate) fn watch(&self) -> (Arc<dyn FileSystem>, u64) {
        (self.file_system.clone(), self.options.low_water_bytes)
    }

    /// Why no new records are taken, if so.
    pub(crate) fn full(&self) -> Option<&NoRoom> {
        self.full.as_ref()
    }

    /// So many bytes were journaled.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.budget = self.budget.saturating_sub(bytes.saturating_mul(COPIES));
    }

    /// Asks the device when it is time. True when [`Self::full`] has changed.
    pub(crate) fn look(&mut self, monotonic_ms: u64) -> bool {
        if self.options.low_water_bytes == 0 || (self.budget > 0 && monotonic_ms < self.ask_at_ms) {
            return false;
        }
        // While records are refused there is no budget; then only the time counts.
        if self.full.is_some() && monotonic_ms < self.ask_at_ms {
            return false;
        }
        self.ask_at_ms = monotonic_ms + INTERVAL_MS;
        match self.file_system.available() {
            Ok(available) => self.judge(available),
            Err(error) => {
                tracing::warn!(%error, "cannot ask how much room the disk has");
                // The next time is soon enough; a write that finds no room stops the shard.
                self.budget = u64::MAX;
                false
            }
        }
    }

    fn judge(&mut self, available: u64) -> bool {
        let RoomOptions { low_water_bytes: low_water, reserve_bytes } = self.options;
        if self.has_reserve && self.is_critical(available) {
            match self.give_up_reserve() {
                Ok(()) => tracing::warn!(available, "the disk is full: the reserve is given up"),
                Err(error) => tracing::error!(%error, "the disk is full, and the reserve cannot be given up"),
            }
        }
        // It is lifted a little above the mark, so that it does not come and go with every small file.
        let missing = if self.has_reserve || self.no_reserve { 0 } else { reserve_bytes };
        let needed = if self.full.is_some() { low_water + low_water / 16 } else { low_water } + missing;
        if available >= needed {
            if missing > 0 {
                self.make_reserve();
            }
            self.budget = (available - missing).saturating_sub(low_water).max(1);
            let lifted = self.full.take().is_some();
            if lifted {
                tracing::info!(available, "the disk has room again: new records are taken");
            }
            return lifted;
        }
        self.budget = 0;
        let falls = self.full.is_none();
        if falls {
            tracing::error!(
                available,
                low_water,
                "the disk is nearly full: new records are refused until there is room; everything else goes on"
            );
        }
        self.full = Some(NoRoom { available, needed: low_water + low_water / 16 + missing });
        true
    }

    /// Whether others have taken nearly everything that the low-water mark was to keep free.
    fn is_critical(&self, available: u64) -> bool {
        available < self.options.low_water_bytes / 4
    }

    fn make_reserve(&mut self) {
        let path = self.dir.join(RESERVE_FILE);
        let made = self.disk.create(&path).and_then(|file| file.allocate(self.options.reserve_bytes));
        match made {
            Ok(()) => self.has_reserve = true,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "cannot make the reserve: going on without one");
                self.no_reserve = true;
                // Whatever was made of it takes room; what cannot be removed now is removed by the next start.
                let _ = self.disk.remove(&path);
            }
        }
    }

    fn give_up_reserve(&mut self) -> io::Result<()> {
        self.disk.remove(&self.dir.join(RESERVE_FILE))?;
        self.has_reserve = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemDisk;

    const KIB: u64 = 1024;

    fn room(capacity: u64, held: u64) -> (MemDisk, Room) {
        let mem = MemDisk::new();
        mem.create_dir(Path::new("/data")).unwrap();
        mem.create(Path::new("/data/other")).unwrap().set_len(held).unwrap();
        mem.set_capacity(Some(capacity));
        let disk: Arc<dyn Disk> = Arc::new(mem.clone());
        let options = RoomOptions { low_water_bytes: 64 * KIB, reserve_bytes: 32 * KIB };
        let room = Room::open(&disk, Path::new("/data"), options).unwrap();
        (mem, room)
    }

    fn hold(disk: &MemDisk, bytes: u64) {
        disk.open(Path::new("/data/other")).unwrap().set_len(bytes).unwrap();
    }

    fn reserve(disk: &MemDisk) -> bool {
        disk.list(Path::new("/data")).unwrap().contains(&RESERVE_FILE.to_owned())
    }

    #[test]
    fn records_are_refused_below_the_mark_and_taken_again_by_themselves() {
        let (disk, mut room) = room(512 * KIB, 0);
        assert!(!room.look(0));
        assert!(reserve(&disk));

        hold(&disk, 450 * KIB);
        assert!(
            !room.look(1),
            "the device is not asked again while the budget lasts and time has not passed"
        );
        assert!(room.look(INTERVAL_MS));
        assert_eq!(room.full().unwrap().available, 30 * KIB);
        assert!(reserve(&disk), "the reserve is for worse");

        hold(&disk, 470 * KIB);
        room.look(2 * INTERVAL_MS);
        assert!(!reserve(&disk), "others have taken nearly everything");

        hold(&disk, 420 * KIB);
        room.look(3 * INTERVAL_MS);
        assert!(room.full().is_some(), "there is no room for the reserve besides");

        hold(&disk, 100 * KIB);
        assert!(room.look(4 * INTERVAL_MS));
        assert!(room.full().is_none() && reserve(&disk));
    }

    #[test]
    fn much_that_is_written_has_the_device_asked_at_once() {
        let (disk, mut room) = room(512 * KIB, 0);
        room.look(0);
        hold(&disk, 460 * KIB);
        room.spend(512 * KIB);
        assert!(room.look(1));
        assert!(room.full().is_some());
    }

    #[test]
    fn a_start_on_a_full_disk_has_the_reserve() {
        let (disk, mut first) = room(512 * KIB, 0);
        first.look(0);
        assert!(reserve(&disk));
        hold(&disk, 480 * KIB);
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let options = RoomOptions { low_water_bytes: 64 * KIB, reserve_bytes: 32 * KIB };
        let mut second = Room::open(&shared, Path::new("/data"), options).unwrap();
        assert!(!reserve(&disk));
        assert!(second.look(0) && second.full().is_some());
    }

    #[test]
    fn without_a_mark_nothing_is_asked_and_nothing_reserved() {
        let mem = MemDisk::new();
        mem.create_dir(Path::new("/data")).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(mem.clone());
        let mut room = Room::open(&disk, Path::new("/data"), RoomOptions::default()).unwrap();
        assert!(!room.look(0) && room.full().is_none() && !reserve(&mem));
    }
}
