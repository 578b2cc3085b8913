//! Tests of the journal as a whole: what it promises over any history of writes, syncs, crashes and damage.

mod basics;
mod damage;
mod outside;
mod power;
mod repair;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::{Journal, JournalError, JournalOptions, Lsn, RecoverError};
use crate::disk::{Disk, MemDisk};
use crate::environment::Environment;

/// Events and batches of one frame.
type Content = (Vec<u8>, Vec<Bytes>);

/// Files so small that every history crosses several of them.
fn small() -> JournalOptions {
    JournalOptions {
        first_file_bytes: 2048,
        file_bytes: 8192,
        max_frame_bytes: 6000,
        spare_files: 2,
        background: false,
        environment: Environment::default(),
    }
}

fn dir() -> PathBuf {
    PathBuf::from("/data/journal")
}

/// Content that no other `tag` has, with an end that is not zero.
fn content(tag: u64, events: usize, batches: &[usize]) -> Content {
    let mut state = tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = |length: usize| -> Vec<u8> {
        let words = (0..length.div_ceil(8)).map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state ^ (state >> 32)).to_be_bytes()
        });
        let mut bytes = words.collect::<Vec<_>>().concat();
        bytes.truncate(length);
        bytes.iter_mut().zip(tag.to_be_bytes()).for_each(|(byte, tag)| *byte = tag);
        bytes.iter_mut().last().into_iter().for_each(|last| *last |= 1);
        bytes
    };
    (bytes(events), batches.iter().map(|length| Bytes::from(bytes(*length))).collect())
}

fn append(journal: &mut Journal, content: &Content) -> Result<Lsn, JournalError> {
    journal.append(&content.0, &content.1)
}

type Recovery = Result<(Journal, Vec<(Lsn, Content)>), RecoverError<Infallible>>;

fn recover_with(disk: Arc<dyn Disk>, dir: &Path, options: JournalOptions, from: Lsn) -> Recovery {
    let mut frames = Vec::new();
    let journal =
        Journal::recover(disk, dir, options, from, &mut |lsn: Lsn, events: &[u8], batches: Vec<Bytes>| {
            frames.push((lsn, (events.to_vec(), batches)));
            Ok::<_, Infallible>(())
        })?;
    Ok((journal, frames))
}

fn recover(disk: &MemDisk, from: Lsn) -> Recovery {
    recover_with(Arc::new(disk.clone()), &dir(), small(), from)
}

fn open(disk: &MemDisk) -> Journal {
    recover(disk, 0).unwrap().0
}

/// Asserts that frames are dense from `from + 1` and have the content they were appended with.
fn assert_dense(frames: &[(Lsn, Content)], from: Lsn, appended: &[Content]) {
    for (index, (lsn, content)) in frames.iter().enumerate() {
        assert_eq!(*lsn, from + 1 + index as u64);
        assert!(appended.get(*lsn as usize - 1) == Some(content), "frame {lsn} is not what was appended");
    }
}
