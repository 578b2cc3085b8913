//! Looking at segment files from outside, without a broker: what is in them, and whether it is whole.
//!
//! Changes nothing. How many bytes of a segment count is said by the checkpoint and the journal, which are not asked here;
//! so bytes at the end of a partition's newest segment that are no whole batch are told apart from damage: they may be
//! left over from before a crash, and the next write cuts them off.
//!
//! Segments are mapped, not read: a walk then needs no buffers and touches only what it looks at. The broker itself does
//! not map files, for a failing disk must be an error there and not the end of the process; here it may be.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use felucca_protocol::batch::{self, BatchHeader, HEADER_LEN, MAX_BATCH_BYTES};
use memmap2::Mmap;
use uuid::Uuid;

use super::files::parse_name;
use super::index::Index;
use crate::engine::effect::SegmentName;
use crate::engine::types::{PartitionKey, TopicId};

/// A segment file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentFile {
    /// The `.log` file.
    pub path: PathBuf,
    /// Its partition.
    pub partition: PartitionKey,
    /// Offset at which it begins.
    pub base_offset: u64,
    /// Number of segments of the partition before it.
    pub generation: u32,
    /// Whether the partition has no later one.
    pub newest: bool,
}

/// What a walk through a segment found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Whole batches, each following the one before.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// Offset after the last record.
    pub end_offset: u64,
    /// Why the walk ended before the file did.
    pub flaw: Option<Flaw>,
    /// What is wrong with the index beside it; a missing one is made again when it is needed.
    pub index: Option<String>,
}

/// Where and why a walk ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Where the batch begins that is not one.
    pub position: u64,
    /// What is wrong with it.
    pub reason: String,
    /// Whether a whole batch follows further on: then it cannot be the rest of a write that a crash cut off.
    pub followed: bool,
}

impl SegmentFile {
    /// All segments below a data directory, by partition and base offset.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn list(data_dir: &Path) -> io::Result<Vec<Self>> {
        // In the order of the key: partition, base offset, generation.
        let mut found = BTreeMap::new();
        for topic in entries(&data_dir.join("log"))? {
            let Some(id) = topic.file_name().and_then(|name| Uuid::try_parse(name.to_str()?).ok()) else {
                continue;
            };
            for directory in entries(&topic)? {
                let number = directory.file_name().and_then(|name| name.to_str()?.parse().ok());
                let Some(partition) = number else { continue };
                let key = PartitionKey { topic: TopicId(id.into_bytes()), partition };
                for path in entries(&directory)? {
                    if let Some(name) = log_name(key, &path) {
                        found.insert((key, name.base_offset, name.generation), path);
                    }
                }
            }
        }
        let mut files = Vec::with_capacity(found.len());
        let mut names = found.into_iter().peekable();
        while let Some(((partition, base_offset, generation), path)) = names.next() {
            let newest = names.peek().is_none_or(|((next, ..), _)| *next != partition);
            files.push(Self { path, partition, base_offset, generation, newest });
        }
        Ok(files)
    }

    /// One segment by its path, which must lie in a data directory.
    pub fn at(path: &Path) -> Option<Self> {
        let path = path.canonicalize().ok()?;
        let data_dir = path.ancestors().nth(4)?;
        Self::list(data_dir)
            .ok()?
            .into_iter()
            .find(|segment| segment.path.canonicalize().is_ok_and(|at| at == path))
    }

    /// Where a segment of a data directory is.
    pub fn path_of(data_dir: &Path, name: SegmentName) -> PathBuf {
        let SegmentName { partition, base_offset, generation } = name;
        let directory = data_dir.join("log").join(partition.topic.to_string());
        directory.join(partition.partition.to_string()).join(format!("{base_offset:020}-{generation}.log"))
    }

    /// Walks through the file and hands each whole batch, with its position, to `visit`.
    ///
    /// # Errors
    /// The file cannot be read, or `visit` failed.
    pub fn inspect<E: From<io::Error>>(
        &self,
        mut visit: impl FnMut(u64, &BatchHeader, &[u8]) -> Result<(), E>,
    ) -> Result<Inspected, E> {
        let file = File::open(&self.path)?;
        let mut found = Inspected {
            batches: 0,
            records: 0,
            bytes: file.metadata()?.len(),
            end_offset: self.base_offset,
            flaw: None,
            index: self.index_fault(),
        };
        if found.bytes == 0 {
            return Ok(found);
        }
        // SAFETY: nothing here relies on the bytes staying as they are: each is parsed once, with its bounds checked. A
        // broker that shortens the file meanwhile ends this process with SIGBUS, which harms nobody else.
        let map = unsafe { Mmap::map(&file)? };
        let mut epoch = 0;
        let mut position = 0;
        while position < map.len() {
            match next_batch(&map[position..], found.end_offset, epoch) {
                Ok((header, bytes)) => {
                    visit(position as u64, &header, bytes)?;
                    found.batches += 1;
                    found.records += u64::from(header.record_count);
                    found.end_offset = header.last_offset() + 1;
                    epoch = header.partition_epoch;
                    position += bytes.len();
                }
                Err(reason) => {
                    let followed = has_batch(&map[position..], found.end_offset);
                    found.flaw = Some(Flaw { position: position as u64, reason, followed });
                    break;
                }
            }
        }
        Ok(found)
    }

    fn index_fault(&self) -> Option<String> {
        let bytes = fs::read(self.path.with_extension("index")).ok()?;
        Index::decode(&bytes, self.base_offset).err().map(|error| error.to_string())
    }
}

impl Inspected {
    /// Whether something is lost: not so for a tail that a crash may have cut off.
    pub fn is_damaged(&self, newest: bool) -> bool {
        self.flaw.as_ref().is_some_and(|flaw| flaw.followed || !newest)
    }
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

fn log_name(partition: PartitionKey, path: &Path) -> Option<SegmentName> {
    let name = path.file_name()?.to_str()?;
    name.ends_with(".log").then(|| parse_name(partition, name)).flatten()
}

/// The batch at the start of `bytes`, if it is whole and may come next.
fn next_batch(bytes: &[u8], next_offset: u64, epoch: i32) -> Result<(BatchHeader, &[u8]), String> {
    let header = BatchHeader::parse(bytes).map_err(|error| error.to_string())?;
    if header.length > MAX_BATCH_BYTES {
        return Err(format!("a batch of {} bytes is not possible", header.length));
    }
    let Some(batch) = bytes.get(..header.length as usize) else {
        return Err("the file ends within a batch".to_owned());
    };
    batch::check(batch).map_err(|error| error.to_string())?;
    let resumed = header.base_offset > next_offset && header.partition_epoch > epoch;
    if header.base_offset != next_offset && !resumed {
        return Err(format!("offset {next_offset} was expected, {} found", header.base_offset));
    }
    Ok((header, batch))
}

/// Whether a whole batch that belongs at or after `offset` begins anywhere in `bytes`.
fn has_batch(bytes: &[u8], offset: u64) -> bool {
    (0..bytes.len().saturating_sub(HEADER_LEN - 1)).any(|at| {
        let rest = &bytes[at..];
        BatchHeader::parse(rest).is_ok_and(|header| {
            header.base_offset >= offset
                && header.length <= MAX_BATCH_BYTES
                && rest.get(..header.length as usize).is_some_and(|batch| batch::check(batch).is_ok())
        })
    })
}

#[cfg(test)]
mod tests {
    use felucca_protocol::batch::{BatchBuilder, assign};

    use super::*;

    fn batch(offset: u64, epoch: i32, records: u32) -> Vec<u8> {
        let mut builder = BatchBuilder::new();
        for _ in 0..records {
            builder.push(0, None, Some(b"value"), &[]).unwrap();
        }
        let mut bytes = builder.finish();
        assign(&mut bytes, offset, epoch);
        bytes.to_vec()
    }

    fn segment(dir: &Path, base: u64, bytes: &[u8]) -> PathBuf {
        let partition = dir.join("log").join(Uuid::from_u128(7).to_string()).join("3");
        fs::create_dir_all(&partition).unwrap();
        let path = partition.join(format!("{base:020}-0.log"));
        fs::write(&path, bytes).unwrap();
        path
    }

    fn inspect(bytes: &[u8]) -> Inspected {
        let dir = tempfile::tempdir().unwrap();
        let path = segment(dir.path(), 10, bytes);
        SegmentFile::at(&path).unwrap().inspect(|_, _, _| Ok::<_, io::Error>(())).unwrap()
    }

    #[test]
    fn whole_segments_are_counted() {
        let bytes = [batch(10, 0, 2), batch(12, 0, 3), batch(100, 1, 1)].concat();
        let found = inspect(&bytes);
        assert_eq!((found.batches, found.records, found.end_offset, &found.flaw), (3, 6, 101, &None));
        assert_eq!(inspect(&[]).end_offset, 10);
    }

    #[test]
    fn a_torn_tail_is_told_from_damage() {
        let whole = [batch(10, 0, 2), batch(12, 0, 3), batch(15, 0, 1)].concat();
        let first = batch(10, 0, 2).len();
        let torn = inspect(&whole[..whole.len() - 1]);
        assert_eq!(torn.batches, 2);
        assert!(!torn.is_damaged(true), "{torn:?}");
        assert!(torn.is_damaged(false), "an older segment is never written to again");

        for at in first..first + batch(12, 0, 3).len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            let found = inspect(&damaged);
            // The epoch of a batch is vouched for by nothing.
            if let Some(flaw) = &found.flaw {
                assert!(found.is_damaged(true), "byte {at}: {found:?}");
                assert_eq!(flaw.position, first as u64);
            } else {
                assert!((first + 12..first + 16).contains(&at), "byte {at}");
            }
        }
    }

    #[test]
    fn offsets_follow_each_other_unless_the_epoch_rises() {
        let found = inspect(&[batch(10, 0, 1), batch(20, 0, 1)].concat());
        assert!(found.is_damaged(true), "{found:?}");
        assert!(found.flaw.unwrap().reason.contains("11 was expected"));
    }

    #[test]
    fn segments_are_listed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for base in [100, 10, 55] {
            segment(dir.path(), base, b"");
        }
        fs::write(dir.path().join("log").join("stray"), b"").unwrap();
        let listed = SegmentFile::list(dir.path()).unwrap();
        let bases: Vec<(u64, bool)> = listed.iter().map(|one| (one.base_offset, one.newest)).collect();
        assert_eq!(bases, [(10, false), (55, false), (100, true)]);
    }
}
