//! The few file operations that everything durable is built on, as two small traits.
//!
//! Above this module nothing calls `std::fs` on a path: the journal and the segments run on [`RealDisk`] in a broker
//! and on [`MemDisk`] in tests and simulation, where power can be cut between any two operations.
//!
//! What the traits promise, and no more:
//! - a write is visible to every later read, and on the device only once [`DiskFile::sync_data`] has returned;
//! - a created, renamed or removed name is on the device only once [`Disk::sync_dir`] has returned for its directory;
//! - a failed sync says nothing about what is on the device, and a later successful one does not make up for it.

mod mem;

use std::fmt;
use std::fs::{File, FileType, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use mem::{MemDisk, WriteFault};

/// Bytes that a device writes all or nothing of; formats that care align to it.
pub const SECTOR: u64 = 512;

/// Most slices that one `pwritev` takes (`IOV_MAX` on Linux); longer lists go out in several calls.
pub const MAX_SLICES: usize = 1024;

/// A place that holds directories of files. Every call blocks.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Creates a file for reading and writing, emptying one that is there.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens an existing file for reading; writes to it fail.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;

    /// Names of the files (not of the directories) in a directory, sorted. Names that are not UTF-8 are left out.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Names of the directories in a directory, sorted. Names that are not UTF-8 are left out.
    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Gives a file another name, replacing what had that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name; open handles keep working.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory with its parents and makes them durable; an existing one is fine.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory with its parents; each is on the device only once [`Disk::sync_dir`] has returned for the one
    /// it is in. For many directories at a time, where [`Disk::create_dir`] would sync for each.
    fn make_dir(&self, path: &Path) -> io::Result<()>;

    /// The file system that holds a directory.
    fn file_system(&self, dir: &Path) -> io::Result<Arc<dyn FileSystem>>;

    /// Removes an empty directory. A crash may bring it back.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes every name created, renamed or removed in the directory so far durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
}

/// A whole file system, for syncing many files at a time. Open it before they are written: a write-back that fails
/// earlier may go unnoticed. Every call blocks.
pub trait FileSystem: Send + Sync + fmt::Debug {
    /// Returns once everything written so far, and every name changed, is on the device. It may be another file that
    /// the error is about, even another program's.
    fn sync(&self) -> io::Result<()>;

    /// Bytes that this process could still write.
    fn available(&self) -> io::Result<u64>;
}

/// One open file; positions are absolute, so handles can be shared between threads. Every call blocks.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads at most `buffer.len()` bytes from `position`; 0 at or past the end of the file.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;

    /// Writes a prefix of the slices, taken as one run of bytes, at `position`; returns the prefix's length.
    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize>;

    /// Returns once everything written to the file so far, and the length needed to read it, is on the device.
    fn sync_data(&self) -> io::Result<()>;

    /// Cuts the file at `length` or extends it with zeros.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Makes the file `length` bytes long and takes the device's room for all of them; fails where there is none.
    fn allocate(&self, length: u64) -> io::Result<()>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file holds no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads from `position` until the buffer is full or the file ends; returns the bytes read.
    fn read_full_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_at(&mut buffer[filled..], position + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    /// Writes all slices, in one call where the disk takes them in one; consumes the slices.
    ///
    /// After an error any part of the bytes may have been written.
    fn write_all_vectored_at(&self, slices: &mut [IoSlice<'_>], position: u64) -> io::Result<()> {
        let mut rest = slices;
        let mut position = position;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(MAX_SLICES);
            match self.write_vectored_at(&rest[..count], position) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    position += written as u64;
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes all bytes; as [`write_all_vectored_at`](Self::write_all_vectored_at).
    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.write_all_vectored_at(&mut [IoSlice::new(bytes)], position)
    }
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile(OpenOptions::new().read(true).write(true).open(path)?)))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile(File::open(path)?)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        list_names(dir, FileType::is_file)
    }

    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<String>> {
        list_names(dir, FileType::is_dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut missing: Vec<PathBuf> = Vec::new();
        let mut deepest = path;
        while !deepest.as_os_str().is_empty() && !deepest.is_dir() {
            missing.push(deepest.to_path_buf());
            deepest = deepest.parent().unwrap_or(Path::new(""));
        }
        let sync_parent = |dir: &Path| match dir.parent() {
            Some(parent) if parent.as_os_str().is_empty() => self.sync_dir(Path::new(".")),
            Some(parent) => self.sync_dir(parent),
            None => Ok(()),
        };
        // The deepest one that is there may be from a process that died before it had synced its name. Where its parent
        // may not be read, somebody else has made it.
        match sync_parent(deepest) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
            _ => {}
        }
        for dir in missing.iter().rev() {
            match std::fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !dir.is_dir() => {
                    return Err(error);
                }
                _ => sync_parent(dir)?,
            }
        }
        Ok(())
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn file_system(&self, dir: &Path) -> io::Result<Arc<dyn FileSystem>> {
        Ok(Arc::new(RealFileSystem(File::open(dir)?)))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

fn list_names(dir: &Path, wanted: fn(&FileType) -> bool) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if wanted(&entry.file_type()?)
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[derive(Debug)]
struct RealFileSystem(File);

impl FileSystem for RealFileSystem {
    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.0)?)
    }

    fn available(&self) -> io::Result<u64> {
        let found = rustix::fs::fstatvfs(&self.0)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        FileExt::read_at(&self.0, buffer, position)
    }

    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        Ok(rustix::io::pwritev(&self.0, slices, position)?)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, length)?)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What every implementation of the traits must do alike.
    fn conformance(disk: &dyn Disk, root: &Path) {
        let dir = root.join("a/b");
        disk.create_dir(&dir).unwrap();
        disk.create_dir(&dir).unwrap();
        assert_eq!(disk.list(&dir).unwrap(), Vec::<String>::new());
        assert_eq!(disk.open(&dir.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.list(&root.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.remove(&dir.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.create(&root.join("none/file")).unwrap_err().kind(), io::ErrorKind::NotFound);

        let file = disk.create(&dir.join("one")).unwrap();
        assert!(file.is_empty().unwrap());
        file.write_all_vectored_at(
            &mut [IoSlice::new(b""), IoSlice::new(b"fel"), IoSlice::new(b""), IoSlice::new(b"ucca")],
            600,
        )
        .unwrap();
        assert_eq!(file.len().unwrap(), 607);
        let mut bytes = [1u8; 10];
        assert_eq!(file.read_full_at(&mut bytes, 598).unwrap(), 9);
        assert_eq!(&bytes[..9], b"\0\0felucca");
        assert_eq!(file.read_at(&mut bytes, 607).unwrap(), 0);
        file.write_all_at(b"F", 600).unwrap();
        file.set_len(603).unwrap();
        file.set_len(605).unwrap();
        assert_eq!(file.read_full_at(&mut bytes, 600).unwrap(), 5);
        assert_eq!(&bytes[..5], b"Fel\0\0");

        let many: Vec<Vec<u8>> = (0..2500u32).map(|i| i.to_be_bytes()[(i % 5) as usize..].to_vec()).collect();
        let mut slices: Vec<IoSlice<'_>> = many.iter().map(|bytes| IoSlice::new(bytes)).collect();
        file.write_all_vectored_at(&mut slices, 3).unwrap();
        let expected = many.concat();
        let mut read = vec![0; expected.len()];
        assert_eq!(file.read_full_at(&mut read, 3).unwrap(), expected.len());
        assert_eq!(read, expected);
        file.sync_data().unwrap();

        let reserved = disk.create(&dir.join("two")).unwrap();
        reserved.allocate(5000).unwrap();
        assert_eq!(reserved.len().unwrap(), 5000);
        disk.rename(&dir.join("one"), &dir.join("two")).unwrap();
        disk.sync_dir(&dir).unwrap();
        assert_eq!(disk.list(&dir).unwrap(), ["two"]);
        assert_eq!(disk.list(root).unwrap(), Vec::<String>::new(), "directories are not listed");
        assert_eq!(disk.list_dirs(root).unwrap(), ["a"]);
        assert_eq!(disk.list_dirs(&dir).unwrap(), Vec::<String>::new(), "files are not listed");
        assert_eq!(disk.list_dirs(&root.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.remove_dir(&dir).unwrap_err().kind(), io::ErrorKind::DirectoryNotEmpty);
        assert_eq!(disk.remove_dir(&root.join("a")).unwrap_err().kind(), io::ErrorKind::DirectoryNotEmpty);
        disk.make_dir(&root.join("c/d")).unwrap();
        disk.make_dir(&root.join("c")).unwrap();
        let file_system = disk.file_system(&root.join("c")).unwrap();
        file_system.sync().unwrap();
        assert!(file_system.available().unwrap() > 0);
        disk.remove_dir(&root.join("c/d")).unwrap();
        disk.remove_dir(&root.join("c")).unwrap();
        assert_eq!(disk.remove_dir(&root.join("c")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.list_dirs(root).unwrap(), ["a"]);
        let reader = disk.open_read(&dir.join("two")).unwrap();
        assert_eq!(reader.len().unwrap(), file.len().unwrap());
        assert!(reader.write_all_at(b"x", 0).is_err());
        disk.remove(&dir.join("two")).unwrap();
        assert_eq!(
            reader.read_full_at(&mut read, 3).unwrap(),
            expected.len(),
            "an open file outlives its name"
        );
    }

    #[test]
    fn the_real_disk_conforms() {
        let root = tempfile::tempdir().unwrap();
        conformance(&RealDisk, root.path());
    }

    #[test]
    fn the_memory_disk_conforms() {
        let disk = MemDisk::new();
        disk.create_dir(Path::new("/root")).unwrap();
        conformance(&disk, Path::new("/root"));
    }

    #[test]
    fn short_writes_are_continued() {
        let disk = MemDisk::new();
        disk.create_dir(Path::new("/d")).unwrap();
        let file = disk.create(Path::new("/d/f")).unwrap();
        disk.fail_write(0, WriteFault::Short(4));
        file.write_all_vectored_at(&mut [IoSlice::new(b"abc"), IoSlice::new(b"defgh")], 0).unwrap();
        let mut bytes = [0; 8];
        file.read_full_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"abcdefgh");
        disk.fail_write(0, WriteFault::Short(0));
        assert_eq!(file.write_all_at(b"x", 0).unwrap_err().kind(), io::ErrorKind::WriteZero);
    }
}
