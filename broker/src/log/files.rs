//! Names and descriptors of segment files.
//!
//! Invariant: at most the given number of descriptors is held here, however many partitions there are; a reader or
//! writer in the middle of a call keeps its own for that call. A descriptor that was closed with unsynced bytes loses
//! nothing: a later sync through a new one covers the whole file, and Linux reports a write-back error that nobody
//! has seen yet to descriptors opened after it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::error::ReadError;
use super::index::Index;
use super::lru::Lru;
use crate::disk::{Disk, DiskFile};
use crate::engine::effect::SegmentName;
use crate::engine::types::{PartitionKey, TopicId};

#[derive(Debug)]
pub(super) struct SegmentFiles {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    open: Mutex<Lru<SegmentName, Arc<dyn DiskFile>>>,
    /// Indexes of sealed segments. They are read whole, not mapped: a lookup then costs no page fault, a failing disk
    /// is an error and not a SIGBUS, the checksum is verified once, and the code needs no `unsafe`. What is held is
    /// bounded here, where the kernel would bound a mapping.
    indexes: Mutex<Lru<SegmentName, Arc<Index>>>,
}

impl SegmentFiles {
    pub(super) fn new(disk: Arc<dyn Disk>, root: PathBuf, max_open: usize, index_bytes: usize) -> Self {
        Self { disk, root, open: Mutex::new(Lru::new(max_open)), indexes: Mutex::new(Lru::new(index_bytes)) }
    }

    pub(super) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn directory(&self, partition: PartitionKey) -> PathBuf {
        self.root.join(partition.topic.to_string()).join(partition.partition.to_string())
    }

    pub(super) fn log_path(&self, name: SegmentName) -> PathBuf {
        self.path(name, "log")
    }

    pub(super) fn index_path(&self, name: SegmentName) -> PathBuf {
        self.path(name, "index")
    }

    fn path(&self, name: SegmentName, extension: &str) -> PathBuf {
        self.directory(name.partition)
            .join(format!("{:020}-{}.{extension}", name.base_offset, name.generation))
    }

    /// Names of the segments on disk that are not `known`. Empty directories are removed.
    pub(super) fn find_unknown(&self, known: impl Fn(SegmentName) -> bool) -> io::Result<Vec<SegmentName>> {
        let mut found = BTreeSet::new();
        for topic in self.disk.list_dirs(&self.root)? {
            let Ok(id) = Uuid::try_parse(&topic) else { continue };
            let directory = self.root.join(&topic);
            for number in self.disk.list_dirs(&directory)? {
                let Ok(number) = number.parse() else { continue };
                let partition = PartitionKey { topic: TopicId(id.into_bytes()), partition: number };
                let names = self.disk.list(&self.directory(partition))?;
                let segments = names.iter().filter_map(|name| parse_name(partition, name));
                found.extend(segments.filter(|segment| !known(*segment)));
                if names.is_empty() {
                    self.remove_empty(partition);
                }
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Removes the directories of a partition and of its topic, if they are empty.
    pub(super) fn remove_empty(&self, partition: PartitionKey) {
        let directory = self.directory(partition);
        // That a directory is not empty, or gone already, is the common case.
        if self.disk.remove_dir(&directory).is_ok()
            && let Some(topic) = directory.parent()
        {
            let _ = self.disk.remove_dir(topic);
        }
    }

    /// The descriptor of an existing segment.
    pub(super) fn open(&self, name: SegmentName) -> io::Result<Arc<dyn DiskFile>> {
        if let Some(file) = self.open.lock().get(&name) {
            return Ok(file);
        }
        let file = self.disk.open(&self.log_path(name))?;
        self.keep(name, &file);
        Ok(file)
    }

    /// Whether there is no such file.
    pub(super) fn is_gone(&self, name: SegmentName) -> bool {
        matches!(self.open(name), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Remembers a descriptor.
    pub(super) fn keep(&self, name: SegmentName, file: &Arc<dyn DiskFile>) {
        let evicted = self.open.lock().insert(name, Arc::clone(file), 1);
        // Closing a file may take a while; the lock is free by now.
        drop(evicted);
    }

    pub(super) fn cached_index(&self, name: SegmentName) -> Option<Arc<Index>> {
        self.indexes.lock().get(&name)
    }

    pub(super) fn keep_index(&self, name: SegmentName, index: &Arc<Index>) {
        let evicted = self.indexes.lock().insert(name, Arc::clone(index), index.weight());
        drop(evicted);
    }

    #[cfg(test)]
    pub(super) fn open_count(&self) -> usize {
        self.open.lock().len()
    }

    /// Reads a whole (index) file.
    pub(super) fn read_whole(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.disk.open_read(path)?;
        let length = usize::try_from(file.len()?).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = vec![0; length];
        let read = file.read_full_at(&mut bytes, 0)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Replaces an index file. Not synced: a torn one is noticed by its checksum and rebuilt.
    pub(super) fn write_index(&self, name: SegmentName, encoded: &[u8]) -> io::Result<()> {
        let path = self.index_path(name);
        let temporary = self.new_index_path(name);
        self.disk.create(&temporary)?.write_all_at(encoded, 0)?;
        self.disk.rename(&temporary, &path)
    }

    /// Where an index is written before it gets its name.
    fn new_index_path(&self, name: SegmentName) -> PathBuf {
        self.path(name, "index.new")
    }

    /// Removes the files of a segment.
    pub(super) fn remove(&self, name: SegmentName) -> io::Result<()> {
        let file = self.open.lock().remove(&name);
        let index = self.indexes.lock().remove(&name);
        drop((file, index));
        for path in [self.log_path(name), self.index_path(name), self.new_index_path(name)] {
            match self.disk.remove(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn corrupt(
        &self,
        name: SegmentName,
        position: u64,
        offset: u64,
        reason: impl Into<String>,
    ) -> ReadError {
        ReadError::Corrupt { file: self.log_path(name), position, offset, reason: reason.into() }
    }

    pub(super) fn io(&self, name: SegmentName, source: io::Error) -> ReadError {
        ReadError::Io { file: self.log_path(name), source }
    }
}

/// Reads `<base offset>-<generation>.<extension>`.
pub(super) fn parse_name(partition: PartitionKey, file: &str) -> Option<SegmentName> {
    let (stem, _) = file.split_once('.')?;
    let (base_offset, generation) = stem.split_once('-')?;
    Some(SegmentName {
        partition,
        base_offset: base_offset.parse().ok()?,
        generation: generation.parse().ok()?,
    })
}
