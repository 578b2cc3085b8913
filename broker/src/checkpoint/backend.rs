//! Lets redb work on a [`DiskFile`], so that simulated power cuts hit the checkpoint as they hit everything else.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::StorageBackend;

use crate::disk::DiskFile;

/// One redb file. Needs no lock of its own: the data directory is locked as a whole.
#[derive(Debug)]
pub(super) struct DiskBackend(pub(super) Arc<dyn DiskFile>);

impl StorageBackend for DiskBackend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let read = self.0.read_full_at(out, offset)?;
        if read == out.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

/// A file that is only looked at: what is written to it is remembered here, and shown on top of it.
#[derive(Debug)]
pub(super) struct Untouched {
    file: Arc<dyn DiskFile>,
    changes: Mutex<Changes>,
}

#[derive(Debug)]
struct Changes {
    length: u64,
    /// Position and bytes, in their order: few.
    writes: Vec<(u64, Vec<u8>)>,
}

impl Untouched {
    pub(super) fn new(file: Arc<dyn DiskFile>) -> io::Result<Self> {
        let length = file.len()?;
        Ok(Self { file, changes: Mutex::new(Changes { length, writes: Vec::new() }) })
    }
}

impl StorageBackend for Untouched {
    fn len(&self) -> io::Result<u64> {
        Ok(self.changes.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changes = self.changes.lock();
        if offset + out.len() as u64 > changes.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // What the file was made longer by is zero.
        let read = self.file.read_full_at(out, offset)?;
        out[read..].fill(0);
        for (position, bytes) in &changes.writes {
            let from = offset.max(*position);
            let to = (offset + out.len() as u64).min(position + bytes.len() as u64);
            if from < to {
                let (at, source) = ((from - offset) as usize, (from - position) as usize);
                let length = (to - from) as usize;
                out[at..at + length].copy_from_slice(&bytes[source..source + length]);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.changes.lock().length = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changes = self.changes.lock();
        changes.length = changes.length.max(offset + data.len() as u64);
        changes.writes.push((offset, data.to_vec()));
        Ok(())
    }
}
