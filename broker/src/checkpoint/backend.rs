//! Lets redb work on a [`DiskFile`], so that simulated power cuts hit the checkpoint as they hit everything else.

use std::io;
use std::sync::Arc;

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
