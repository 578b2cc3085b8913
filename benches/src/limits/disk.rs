//! Writing and syncing a file on the disk that the broker's data is on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};

use super::{Moved, rate};
use crate::row::{Row, latencies, record};

/// Written between two syncs where sequential writing is synced.
const SYNC_EVERY: u64 = 1 << 20;
/// What is written before each sync whose latency is measured.
const PAGE: usize = 4 << 10;

/// The file has no name: it is gone with this process, however that ends.
pub(super) fn measure(
    directory: &Path,
    block: usize,
    time: Duration,
    file_bytes: u64,
) -> anyhow::Result<Vec<Row>> {
    let file = tempfile::tempfile_in(directory)?;
    // The first pass touches memory and blocks that were never used before, which is several times slower than the next.
    sequential(&file, block, time * 4, file_bytes, None)?;
    let written = sequential(&file, block, time, file_bytes, None)?;
    // Or the first sync would have to write all of that.
    file.sync_data()?;
    let synced = sequential(&file, block, time, file_bytes, Some(SYNC_EVERY))?;
    file.sync_all()?;
    drop(file);
    Ok(vec![
        rate("sequential write, 100 KiB, page cache", written),
        rate("sequential write, 100 KiB, fdatasync each MiB", synced),
        sync_latency(directory, time, file_bytes.min(64 << 20))?,
    ])
}

fn sequential(
    file: &File,
    block: usize,
    time: Duration,
    file_bytes: u64,
    sync_every: Option<u64>,
) -> anyhow::Result<Moved> {
    let bytes = vec![7; block];
    let began = Instant::now();
    let (mut position, mut unsynced, mut blocks) = (0, 0, 0);
    while (began.elapsed() < time && position + block as u64 <= file_bytes) || blocks == 0 {
        file.write_all_at(&bytes, position)?;
        position += block as u64;
        unsynced += block as u64;
        blocks += 1;
        if sync_every.is_some_and(|every| unsynced >= every) {
            file.sync_data()?;
            unsynced = 0;
        }
    }
    Ok(Moved { blocks, block_bytes: block, elapsed: began.elapsed() })
}

/// fdatasync of one page in a file whose blocks exist: what a journal that is made in advance pays.
fn sync_latency(directory: &Path, time: Duration, file_bytes: u64) -> anyhow::Result<Row> {
    let file = tempfile::tempfile_in(directory)?;
    fallocate(&file, FallocateFlags::empty(), 0, file_bytes)?;
    let zeroes = vec![0; 1 << 20];
    for start in (0..file_bytes).step_by(zeroes.len()) {
        let length = zeroes.len().min((file_bytes - start) as usize);
        file.write_all_at(&zeroes[..length], start)?;
    }
    file.sync_all()?;
    let page = [7; PAGE];
    let pages = (file_bytes / PAGE as u64).max(1);
    let mut histogram = latencies();
    let began = Instant::now();
    while began.elapsed() < time || histogram.is_empty() {
        file.write_all_at(&page, histogram.len() % pages * PAGE as u64)?;
        let asked = Instant::now();
        file.sync_data()?;
        record(&mut histogram, asked.elapsed());
    }
    let mut row = Row { case: "fdatasync, 4 KiB, preallocated".to_owned(), ..Row::default() };
    row.set_rate(histogram.len(), 0, began.elapsed());
    row.set_latencies(&histogram);
    Ok(row)
}
