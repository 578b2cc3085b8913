//! Looking at the checkpoint files without using them: for tools, beside a broker that does not run. Changes nothing.

use std::io;
use std::path::{Path, PathBuf};

use super::slot::{Slot, SlotError};
use super::store::{CACHE_BYTES, NAMES};
use crate::disk::Disk;
use crate::engine::types::Lsn;

/// What is known of one checkpoint file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    pub file: PathBuf,
    pub state: Result<Whole, String>,
}

/// A checkpoint of which every row was read and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// It is the state after this frame of the journal.
    pub lsn: Lsn,
    pub rows: u64,
}

/// Passes every row of a file that was found whole to `each`.
///
/// # Errors
/// The file cannot be read, or what `each` says.
pub fn read_rows<E: std::error::Error + Send + Sync + 'static>(
    disk: &dyn Disk,
    file: &Path,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> io::Result<()> {
    let mut read = |opened| {
        Slot::look(opened, CACHE_BYTES)?
            .each_row(|key, value| each(key, value).map_err(|error| SlotError::Refused(Box::new(error))))
    };
    read(disk.open_read(file)?).map_err(io::Error::other)
}

/// Reads the checkpoint files of a directory that are there. A start takes the whole one of the highest LSN.
///
/// # Errors
/// A file cannot be read at all.
pub fn inspect(disk: &dyn Disk, directory: &Path) -> io::Result<Vec<Inspected>> {
    let mut found = Vec::new();
    for name in NAMES {
        let file = directory.join(name);
        let opened = match disk.open_read(&file) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // An empty store would be made in an empty file.
        let state = if opened.is_empty()? {
            Err("the file is empty".to_owned())
        } else {
            let read = || -> Result<Whole, SlotError> {
                let slot = Slot::look(opened, CACHE_BYTES)?;
                let meta = slot.meta()?;
                slot.verify()?;
                Ok(Whole { lsn: meta.lsn, rows: meta.row_count() })
            };
            read().map_err(|error| error.to_string())
        };
        found.push(Inspected { file, state });
    }
    Ok(found)
}
