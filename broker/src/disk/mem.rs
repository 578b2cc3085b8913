//! A disk in memory that can lose power.
//!
//! Each file holds its bytes as programs see them (`live`) and as the device holds them (`durable`). Between two syncs
//! every 512-byte sector keeps all the versions that were written to it; [`MemDisk::power_cut`] picks one of them, or
//! the durable one, for each sector on its own, which covers lost, kept and reordered writes. Lengths and the names of
//! a directory are treated alike: any of the unsynced changes may have reached the device, in any combination.
//! Directories themselves are durable at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::{Disk, DiskFile, FileSystem, SECTOR};

/// How an injected write goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteFault {
    /// Nothing is written; `EIO`.
    Io,
    /// Nothing is written; `ENOSPC`.
    NoSpace,
    /// Only so many bytes are written, and the call says so.
    Short(usize),
    /// So many bytes are written, and the call fails with `EIO` all the same.
    Torn(usize),
}

/// Files in memory, shared by its clones. See the module documentation.
#[derive(Clone, Debug)]
pub struct MemDisk {
    state: Arc<Mutex<State>>,
    /// Of the process that this is mounted for.
    generation: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct State {
    dirs: BTreeSet<PathBuf>,
    live: BTreeMap<PathBuf, u64>,
    durable: BTreeMap<PathBuf, u64>,
    /// Changes of names since the last sync of their directory, in order.
    unsynced: Vec<(PathBuf, NameChange)>,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// Raised by a power cut and by the death of the process: handles opened before it fail.
    generation: u64,
    /// Calls left until the named fault strikes.
    write_fault: Option<(u64, WriteFault)>,
    sync_fault: Option<u64>,
    read_fault: Option<u64>,
    /// Bytes that all files together may hold.
    capacity: Option<u64>,
    /// Operations that change something, left until the power fails; 0 = it has failed.
    power: Option<u64>,
    operations: u64,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create { path: PathBuf, inode: u64 },
    Rename { from: PathBuf, to: PathBuf, inode: u64 },
    Remove { path: PathBuf, inode: u64 },
}

#[derive(Clone, Debug, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Versions of each sector written since the last sync, oldest first.
    dirty: BTreeMap<u64, Vec<Vec<u8>>>,
    /// Lengths the file had since the last sync.
    lengths: Vec<usize>,
}

impl Default for MemDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl MemDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self { state: Arc::default(), generation: None }
    }

    /// An independent copy of the disk as it is now, unsynced writes included; handles stay with the original.
    pub fn fork(&self) -> Self {
        Self { state: Arc::new(Mutex::new(self.state.lock().clone())), generation: None }
    }

    /// The same disk, as a process sees it that dies with the next [`power_cut`](Self::power_cut) or [`kill`](Self::kill):
    /// from then on everything fails. What several threads do needs this, lest some of them outlive the process.
    pub fn mount(&self) -> Self {
        let generation = Some(self.state.lock().generation);
        Self { state: Arc::clone(&self.state), generation }
    }

    /// Ends every handle, keeps what was synced and a random choice of the rest, and clears planned faults.
    pub fn power_cut(&self, seed: u64) {
        let mut random = Random(seed);
        let mut state = self.state.lock();
        state.end_handles();
        let ordered = random.below(2) == 0;
        let kept = random.below(state.unsynced.len() as u64 + 1);
        for (index, (_, change)) in std::mem::take(&mut state.unsynced).into_iter().enumerate() {
            // Half the cuts respect the order of changes, as journaling file systems do, half do not.
            let keep = if ordered { (index as u64) < kept } else { random.below(2) == 0 };
            if keep {
                change.apply(&mut state.durable);
            }
        }
        state.live = state.durable.clone();
        // A directory cannot have gone without what is in it.
        let above = state.live.keys().flat_map(|path| path.ancestors().skip(1)).map(Path::to_path_buf);
        let above: BTreeSet<PathBuf> = above.collect();
        state.dirs.extend(above);
        let named: BTreeSet<u64> = state.live.values().copied().collect();
        state.inodes.retain(|inode, _| named.contains(inode));
        // In the order of their numbers, so that a seed always means the same.
        for inode in named {
            if let Some(inode) = state.inodes.get_mut(&inode) {
                inode.power_cut(&mut random);
            }
        }
    }

    /// As [`power_cut`](Self::power_cut), and nothing that was not synced is kept.
    pub fn power_cut_losing_all(&self) {
        let mut state = self.state.lock();
        state.unsynced.clear();
        for inode in state.inodes.values_mut() {
            inode.forget();
            inode.live = inode.durable.clone();
        }
        drop(state);
        self.power_cut(0);
    }

    /// Ends every handle as the death of the process does; the page cache stays, unsynced as it was.
    pub fn kill(&self) {
        self.state.lock().end_handles();
    }

    /// Makes the write after `after` more writes fail, once.
    pub fn fail_write(&self, after: u64, fault: WriteFault) {
        self.state.lock().write_fault = Some((after, fault));
    }

    /// Makes the file sync after `after` more syncs fail, once. As on Linux the unsynced writes are then considered
    /// clean: they stay readable, and no later sync brings them to the device.
    pub fn fail_sync(&self, after: u64) {
        self.state.lock().sync_fault = Some(after);
    }

    /// Makes the read after `after` more reads fail with `EIO`, once.
    pub fn fail_read(&self, after: u64) {
        self.state.lock().read_fault = Some(after);
    }

    /// Lets all files together hold so many bytes: a write that needs more fails with `ENOSPC`. `None`: no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().capacity = bytes;
    }

    /// Bytes that all files hold together.
    pub fn used(&self) -> u64 {
        self.state.lock().used()
    }

    /// Every file with its length in bytes, in the order of their names.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.state.lock();
        let length = |inode| state.inodes.get(inode).map_or(0, |inode: &Inode| inode.live.len() as u64);
        state.live.iter().map(|(path, inode)| (path.clone(), length(inode))).collect()
    }

    /// Flips one bit of a file, on the device and in the page cache; false if there is no such byte.
    pub fn flip_bit(&self, path: &Path, position: u64, bit: u8) -> bool {
        let mut state = self.state.lock();
        let Ok(inode) = state.find(path).and_then(|inode| state.inode(inode)) else { return false };
        let mut flipped = false;
        for bytes in [&mut inode.live, &mut inode.durable] {
            if let Some(byte) = usize::try_from(position).ok().and_then(|at| bytes.get_mut(at)) {
                *byte ^= 1 << (bit % 8);
                flipped = true;
            }
        }
        flipped
    }

    /// A checksum over every name and every byte, on the device and in the page cache.
    pub fn digest(&self) -> u32 {
        let state = self.state.lock();
        let mut hasher = crc32fast::Hasher::new();
        for (path, inode) in state.live.iter().chain(&state.durable) {
            hasher.update(path.as_os_str().as_encoded_bytes());
            if let Some(inode) = state.inodes.get(inode) {
                hasher.update(&inode.live);
                hasher.update(&inode.durable);
            }
        }
        hasher.finalize()
    }

    /// Lets `operations` more changing operations pass and fails all later ones, until
    /// [`power_cut`](Self::power_cut) or [`kill`](Self::kill). Where the last to pass is a write, its bytes are on
    /// their way to the device, but its caller gets an error.
    pub fn power_fails_after(&self, operations: u64) {
        self.state.lock().power = Some(operations);
    }

    /// Changing operations (writes, syncs, changes of names and lengths) since the disk was made.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// The state, unless the process is dead.
    fn enter(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state.lock();
        state.check(self.generation.unwrap_or(state.generation))?;
        Ok(state)
    }

    fn handle(&self, state: &State, inode: u64, writable: bool) -> Arc<dyn DiskFile> {
        Arc::new(MemFile { disk: self.clone(), inode, generation: state.generation, writable })
    }

    fn change_name(&self, path: &Path, change: impl FnOnce(u64) -> NameChange) -> io::Result<()> {
        let mut state = self.enter()?;
        let inode = state.find(path)?;
        state.begin()?;
        let change = change(inode);
        change.apply(&mut state.live);
        state.unsynced.push((parent(path), change));
        Ok(())
    }
}

impl Disk for MemDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.enter()?;
        if !state.dirs.contains(&parent(path)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.begin()?;
        let inode = if let Ok(inode) = state.find(path) {
            state.inode(inode)?.set_len(0);
            inode
        } else {
            state.next_inode += 1;
            let inode = state.next_inode;
            state.inodes.insert(inode, Inode::default());
            let change = NameChange::Create { path: path.to_path_buf(), inode };
            change.apply(&mut state.live);
            state.unsynced.push((parent(path), change));
            inode
        };
        Ok(self.handle(&state, inode, true))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.enter()?;
        Ok(self.handle(&state, state.find(path)?, true))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.enter()?;
        Ok(self.handle(&state, state.find(path)?, false))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.enter()?;
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let names = state.live.keys().filter(|path| path.parent() == Some(dir));
        Ok(names.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.enter()?;
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let names = state.dirs.iter().filter(|path| path.parent() == Some(dir));
        Ok(names.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (source, target) = (from.to_path_buf(), to.to_path_buf());
        self.change_name(from, |inode| NameChange::Rename { from: source, to: target, inode })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change_name(path, |inode| NameChange::Remove { path: path.to_path_buf(), inode })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        state.begin()?;
        state.dirs.extend(path.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        // Directories are never lost here.
        self.create_dir(path)
    }

    fn file_system(&self, dir: &Path) -> io::Result<Arc<dyn FileSystem>> {
        let state = self.enter()?;
        if !state.dirs.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(MemFileSystem { disk: self.clone(), generation: state.generation }))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        if !state.dirs.contains(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let below = |other: &Path| other != path && other.starts_with(path);
        if state.live.keys().any(|file| below(file)) || state.dirs.iter().any(|dir| below(dir)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.begin()?;
        state.dirs.remove(path);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        state.begin()?;
        let (synced, rest) =
            std::mem::take(&mut state.unsynced).into_iter().partition(|(dir, _)| dir == path);
        state.unsynced = rest;
        for (_, change) in synced {
            change.apply(&mut state.durable);
        }
        Ok(())
    }
}

impl State {
    /// Is the process that came at this generation still alive?
    fn check(&self, generation: u64) -> io::Result<()> {
        if self.generation == generation { Ok(()) } else { Err(io::Error::other("the process has died")) }
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        self.live.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn inode(&mut self, inode: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&inode).ok_or_else(|| io::Error::other("the power was cut"))
    }

    /// Counts a changing operation; an error once the power has failed.
    fn begin(&mut self) -> io::Result<()> {
        match &mut self.power {
            Some(0) => return Err(io::Error::other("the power has failed")),
            Some(left) => *left -= 1,
            None => {}
        }
        self.operations += 1;
        Ok(())
    }

    /// Whether the planned fault strikes this sync.
    fn sync_fails(&mut self) -> bool {
        strikes(&mut self.sync_fault)
    }

    fn used(&self) -> u64 {
        self.inodes.values().map(|inode| inode.live.len() as u64).sum()
    }

    /// Whether a file may end at this position.
    fn has_room(&mut self, inode: u64, end: u64) -> bool {
        let Some(capacity) = self.capacity else { return true };
        let length = self.inodes.get(&inode).map_or(0, |inode| inode.live.len() as u64);
        end <= length || self.used() + (end - length) <= capacity
    }

    fn end_handles(&mut self) {
        self.generation += 1;
        self.write_fault = None;
        self.sync_fault = None;
        self.read_fault = None;
        self.power = None;
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            NameChange::Create { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
            NameChange::Remove { path, inode } => {
                if names.get(path) == Some(inode) {
                    names.remove(path);
                }
            }
        }
    }
}

impl Inode {
    fn write(&mut self, bytes: &[u8], position: usize) {
        if bytes.is_empty() {
            return;
        }
        let end = position + bytes.len();
        if end > self.live.len() {
            resize(&mut self.live, end);
            self.lengths.push(end);
        }
        self.live[position..end].copy_from_slice(bytes);
        self.remember(position, end);
    }

    /// Records the sectors that cover `start..end` as they are now.
    fn remember(&mut self, start: usize, end: usize) {
        let sector = SECTOR as usize;
        for index in start / sector..end.div_ceil(sector) {
            let from = index * sector;
            let to = (from + sector).min(self.live.len());
            self.dirty.entry(index as u64).or_default().push(self.live[from..to].to_vec());
        }
    }

    fn set_len(&mut self, length: usize) {
        let old = self.live.len();
        resize(&mut self.live, length);
        self.lengths.push(length);
        if length < old {
            self.dirty.retain(|sector, _| sector * SECTOR < length as u64);
            self.remember(length.saturating_sub(1), length);
        } else {
            self.remember(old, length);
        }
    }

    fn sync(&mut self) {
        let length = self.live.len();
        resize(&mut self.durable, length);
        for sector in self.dirty.keys() {
            let from = ((sector * SECTOR) as usize).min(length);
            let to = (from + SECTOR as usize).min(length);
            self.durable[from..to].copy_from_slice(&self.live[from..to]);
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.dirty.clear();
        self.lengths.clear();
    }

    fn power_cut(&mut self, random: &mut Random) {
        let pick = random.below(self.lengths.len() as u64 + 1) as usize;
        let length = if pick == 0 { self.durable.len() } else { self.lengths[pick - 1] };
        resize(&mut self.durable, length);
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            let pick = random.below(versions.len() as u64 + 1) as usize;
            let from = (sector * SECTOR) as usize;
            if pick == 0 || from >= length {
                continue;
            }
            let version = &versions[pick - 1];
            let to = (from + version.len()).min(length);
            self.durable[from..to].copy_from_slice(&version[..to - from]);
        }
        self.forget();
        self.live = self.durable.clone();
    }
}

#[derive(Debug)]
struct MemFileSystem {
    disk: MemDisk,
    generation: u64,
}

impl FileSystem for MemFileSystem {
    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.check(self.generation)?;
        state.begin()?;
        let fails = state.sync_fails();
        for inode in state.inodes.values_mut() {
            if fails {
                inode.forget();
            } else {
                inode.sync();
            }
        }
        if fails {
            return Err(io::Error::other("injected sync error"));
        }
        state.durable = state.live.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn available(&self) -> io::Result<u64> {
        let state = self.disk.state.lock();
        Ok(state.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(state.used())))
    }
}

#[derive(Debug)]
struct MemFile {
    disk: MemDisk,
    inode: u64,
    generation: u64,
    writable: bool,
}

impl MemFile {
    fn with<T>(&self, work: impl FnOnce(&mut State, u64) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.state.lock();
        state.check(self.generation)?;
        work(&mut state, self.inode)
    }
}

impl DiskFile for MemFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.with(|state, inode| {
            if strikes(&mut state.read_fault) {
                return Err(io::Error::other("injected read error"));
            }
            let live = &state.inode(inode)?.live;
            let from = (position as usize).min(live.len());
            let count = buffer.len().min(live.len() - from);
            buffer[..count].copy_from_slice(&live[from..from + count]);
            Ok(count)
        })
    }

    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let bytes = slices.iter().map(|slice| &**slice).collect::<Vec<&[u8]>>().concat();
        self.with(|state, inode| {
            if state.power == Some(1) {
                // The last write before the dark: on its way to the device, but the caller never hears of it.
                state.power = Some(0);
                state.inode(inode)?.write(&bytes, position as usize);
                return Err(io::Error::other("the power has failed"));
            }
            state.begin()?;
            let fault = match &mut state.write_fault {
                Some((0, fault)) => {
                    let fault = *fault;
                    state.write_fault = None;
                    Some(fault)
                }
                Some((after, _)) => {
                    *after -= 1;
                    None
                }
                None => None,
            };
            let full = !state.has_room(inode, position + bytes.len() as u64);
            let fault = fault.or(full.then_some(WriteFault::NoSpace));
            let inode = state.inode(inode)?;
            let (count, outcome) = match fault {
                None => (bytes.len(), Ok(bytes.len())),
                Some(WriteFault::Io) => (0, Err(io::Error::other("injected write error"))),
                Some(WriteFault::NoSpace) => (0, Err(io::ErrorKind::StorageFull.into())),
                Some(WriteFault::Short(count)) => (count.min(bytes.len()), Ok(count.min(bytes.len()))),
                Some(WriteFault::Torn(count)) => {
                    (count.min(bytes.len()), Err(io::Error::other("injected write error")))
                }
            };
            inode.write(&bytes[..count], position as usize);
            outcome
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|state, inode| {
            state.begin()?;
            if state.sync_fails() {
                state.inode(inode)?.forget();
                return Err(io::Error::other("injected sync error"));
            }
            state.inode(inode)?.sync();
            Ok(())
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.with(|state, inode| {
            state.begin()?;
            if !state.has_room(inode, length) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.inode(inode)?.set_len(length as usize);
            Ok(())
        })
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|state, inode| Ok(state.inode(inode)?.live.len() as u64))
    }
}

/// Counts a planned fault down; true when it strikes.
fn strikes(fault: &mut Option<u64>) -> bool {
    match fault {
        Some(0) => {
            *fault = None;
            return true;
        }
        Some(after) => *after -= 1,
        None => {}
    }
    false
}

/// Cuts or zero-fills; in blocks, as the standard library does only with optimization.
fn resize(bytes: &mut Vec<u8>, length: usize) {
    bytes.truncate(length);
    bytes.extend_from_slice(&vec![0; length - bytes.len()]);
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_path_buf()
}

/// SplitMix64: small, seeded, and good enough to choose sectors.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> (MemDisk, PathBuf) {
        let disk = MemDisk::new();
        disk.create_dir(Path::new("/d")).unwrap();
        (disk, PathBuf::from("/d/f"))
    }

    fn content(disk: &MemDisk, path: &Path) -> Vec<u8> {
        let file = disk.open(path).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_full_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_dead_process_changes_nothing() {
        let (disk, path) = disk();
        let mounted = disk.mount();
        mounted.create(&path).unwrap();
        disk.kill();
        assert!(mounted.create(Path::new("/d/g")).is_err());
        assert!(mounted.rename(&path, Path::new("/d/g")).is_err());
        assert!(mounted.sync_dir(Path::new("/d")).is_err());
        assert!(mounted.open(&path).is_err());
        assert!(disk.mount().open(&path).is_ok());
    }

    #[test]
    fn a_cut_keeps_what_was_synced_and_any_mix_of_the_rest() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        file.write_all_at(&[1; 2048], 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        file.write_all_at(&[2; 1024], 512).unwrap();
        file.write_all_at(&[3; 512], 512).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let disk = disk.fork();
            disk.power_cut(seed);
            let bytes = content(&disk, &path);
            assert_eq!((bytes.len(), bytes[0], bytes[1536]), (2048, 1, 1));
            assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            seen.insert((bytes[512], bytes[1024]));
        }
        let all: BTreeSet<_> = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)].into();
        assert_eq!(seen, all);
    }

    #[test]
    fn a_file_that_is_back_after_a_cut_has_its_directory() {
        let (disk, path) = disk();
        disk.create(&path).unwrap().sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        disk.remove(&path).unwrap();
        disk.remove_dir(Path::new("/d")).unwrap();
        disk.power_cut_losing_all();
        assert_eq!(disk.list(Path::new("/d")).unwrap(), ["f"]);
    }

    #[test]
    fn names_are_durable_only_after_their_directory_was_synced() {
        let (disk, path) = disk();
        disk.create(&path).unwrap().sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        disk.rename(&path, Path::new("/d/g")).unwrap();
        disk.create(Path::new("/d/h")).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let disk = disk.fork();
            disk.power_cut(seed);
            seen.insert(disk.list(Path::new("/d")).unwrap().join(""));
        }
        assert_eq!(seen, ["f", "fh", "g", "gh"].map(String::from).into());
    }

    #[test]
    fn lengths_and_cuts_of_files_are_unsynced_too() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        file.write_all_at(&[1; 1000], 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        file.set_len(100).unwrap();
        file.set_len(700).unwrap();
        assert_eq!(content(&disk, &path), [vec![1; 100], vec![0; 600]].concat());
        let lengths: BTreeSet<usize> = (0..100)
            .map(|seed| {
                let disk = disk.fork();
                disk.power_cut(seed);
                content(&disk, &path).len()
            })
            .collect();
        assert_eq!(lengths, [100, 700, 1000].into());
        file.sync_data().unwrap();
        disk.power_cut(1);
        assert_eq!(content(&disk, &path), [vec![1; 100], vec![0; 600]].concat());
        assert!(file.len().is_err(), "handles end with the power");
    }

    #[test]
    fn a_failed_sync_is_not_made_up_for_by_the_next() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        file.write_all_at(&[1; 512], 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        file.write_all_at(&[2; 512], 0).unwrap();
        disk.fail_sync(0);
        assert!(file.sync_data().is_err());
        file.sync_data().unwrap();
        assert_eq!(content(&disk, &path), vec![2; 512], "the page cache still shows it");
        disk.power_cut(3);
        assert_eq!(content(&disk, &path), vec![1; 512]);
    }

    #[test]
    fn a_full_disk_takes_no_more_and_again_when_there_is_room() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        disk.set_capacity(Some(1024));
        file.write_all_at(&[1; 1024], 0).unwrap();
        let error = file.write_all_at(&[2; 10], 1020).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.set_len(2000).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.write_all_at(&[2; 10], 500).unwrap();
        disk.set_capacity(None);
        file.write_all_at(&[2; 10], 1020).unwrap();
        assert_eq!(disk.used(), 1030);
    }

    #[test]
    fn bits_flip_where_they_are_told_to_and_reads_fail_once() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        file.write_all_at(&[0; 600], 0).unwrap();
        let before = disk.digest();
        assert!(disk.flip_bit(&path, 513, 3) && !disk.flip_bit(&path, 600, 0));
        assert_eq!(content(&disk, &path)[513], 8);
        assert_ne!(disk.digest(), before);
        disk.fail_read(0);
        assert!(file.read_at(&mut [0; 1], 0).is_err());
        assert_eq!(file.read_at(&mut [0; 1], 0).unwrap(), 1);
        disk.power_cut_losing_all();
        assert_eq!(disk.files(), []);
    }

    #[test]
    fn the_power_fails_in_the_middle_of_things() {
        let (disk, path) = disk();
        let file = disk.create(&path).unwrap();
        disk.power_fails_after(2);
        file.write_all_at(&[1; 10], 0).unwrap();
        assert!(file.write_all_at(&[2; 10], 0).is_err());
        assert!(file.sync_data().is_err() && disk.remove(&path).is_err());
        disk.kill();
        assert_eq!(content(&disk, &path), [2; 10]);
    }
}
