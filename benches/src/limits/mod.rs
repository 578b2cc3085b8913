//! What the machine can do at all: the yardsticks beside which every other figure is read.
//!
//! Plain system calls on plain threads; no runtime, no framing, nothing that a broker would have to add.

mod disk;
mod loopback;
mod memory;

use std::path::Path;
use std::time::Duration;

use crate::row::Row;

/// Bytes moved at a time: the size of a batch.
const BLOCK: usize = 100 << 10;

/// Measures everything, each for about `time`, writing at most `file_bytes` into a file in `directory`.
pub(crate) fn measure(directory: &Path, time: Duration, file_bytes: u64) -> anyhow::Result<Vec<Row>> {
    // The first pass touches blocks and memory that were not used before. It has a figure of its own: a machine whose
    // host takes back free memory cannot append to files any faster while it gets it again.
    let into_file = |case: &str, streams| {
        let pass = |case: &str| {
            let moved = loopback::copy(streams, BLOCK, time, Some((directory, file_bytes)))?;
            anyhow::Ok(rate(case, moved))
        };
        anyhow::Ok([pass(&format!("{case}, first pass"))?, pass(case)?])
    };
    let mut rows = vec![
        rate("memory copy, 100 KiB, in cache", memory::copy(BLOCK, time / 4)),
        rate("memory copy, 100 KiB, cold", memory::copy_cold(BLOCK, time / 2)),
        rate("CRC-32C, 100 KiB", memory::checksum(BLOCK, time / 4)),
        rate("loopback copy, 100 KiB, 1 stream", loopback::copy(1, BLOCK, time, None)?),
        rate("loopback copy, 100 KiB, 4 streams", loopback::copy(4, BLOCK, time, None)?),
        loopback::round_trips(1024, time / 2)?,
    ];
    rows.extend(into_file("loopback copy into a file, 100 KiB, 1 stream", 1)?);
    rows.extend(into_file("loopback copy into a file, 100 KiB, 4 streams", 4)?);
    rows.extend(disk::measure(directory, BLOCK, time, file_bytes)?);
    for row in &mut rows {
        row.workload = "limits".to_owned();
        row.peer = "machine".to_owned();
    }
    Ok(rows)
}

/// Blocks of some size within a time.
struct Moved {
    blocks: u64,
    block_bytes: usize,
    elapsed: Duration,
}

fn rate(case: &str, moved: Moved) -> Row {
    let mut row = Row { case: case.to_owned(), ..Row::default() };
    row.set_rate(moved.blocks, moved.block_bytes as u64, moved.elapsed);
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_figure() {
        let directory = tempfile::tempdir().unwrap();
        let rows = measure(directory.path(), Duration::from_millis(20), 4 << 20).unwrap();
        assert!(rows.len() >= 9);
        for row in rows {
            let figure = row.bytes_per_s.or(row.p50_us).unwrap();
            assert!(figure > 0.0, "{row:?}");
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
