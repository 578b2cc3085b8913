//! Copying and checking memory, one thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Moved;

/// Larger than any cache.
const COLD_BYTES: usize = 256 << 20;

pub(super) fn copy(block: usize, time: Duration) -> Moved {
    let source = vec![7; block];
    let mut target = vec![0; block];
    repeat(block, time, |_| black_box(&mut target[..]).copy_from_slice(black_box(&source)))
}

/// Walks through memory that is not in a cache, as data does that comes from a socket and was pushed out since.
pub(super) fn copy_cold(block: usize, time: Duration) -> Moved {
    let blocks = COLD_BYTES / block;
    let source = vec![7; blocks * block];
    let mut target = vec![1; blocks * block];
    repeat(block, time, |round| {
        let at = (round as usize % blocks) * block;
        black_box(&mut target[at..at + block]).copy_from_slice(black_box(&source[at..at + block]));
    })
}

pub(super) fn checksum(block: usize, time: Duration) -> Moved {
    let bytes = vec![7; block];
    repeat(block, time, |_| {
        black_box(crc32c::crc32c(black_box(&bytes)));
    })
}

fn repeat(block_bytes: usize, time: Duration, mut work: impl FnMut(u64)) -> Moved {
    let began = Instant::now();
    let mut blocks = 0;
    while began.elapsed() < time || blocks == 0 {
        work(blocks);
        blocks += 1;
    }
    Moved { blocks, block_bytes, elapsed: began.elapsed() }
}
