//! Copying through loopback connections, and the time there and back.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::Moved;
use crate::row::{Row, latencies, record};

/// Blocks from as many writing threads to as many reading ones, each of which writes what it reads into a file of its own
/// in a directory, if there is one: from its start again when so much is in it.
pub(super) fn copy(
    streams: u32,
    block: usize,
    time: Duration,
    into: Option<(&Path, u64)>,
) -> io::Result<Moved> {
    let file = |_| into.map(|(directory, _)| tempfile::tempfile_in(directory)).transpose();
    let files = (0..streams).map(file).collect::<io::Result<Vec<_>>>()?;
    let most = into.map_or(u64::MAX, |(_, most)| most / u64::from(streams));
    let pairs = (0..streams).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
    let began = Instant::now();
    let read = thread::scope(|scope| {
        let mut readers = Vec::new();
        for ((mut from, mut to), file) in pairs.into_iter().zip(&files) {
            scope.spawn(move || {
                let bytes = vec![7; block];
                // A reader that failed reports it itself.
                while began.elapsed() < time && from.write_all(&bytes).is_ok() {}
            });
            readers.push(scope.spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                let (mut total, mut position) = (0, 0);
                loop {
                    let count = to.read(&mut buffer)?;
                    if count == 0 {
                        return Ok(total);
                    }
                    if let Some(file) = file {
                        position = if position + count as u64 > most { 0 } else { position };
                        file.write_all_at(&buffer[..count], position)?;
                    }
                    total += count as u64;
                    position += count as u64;
                }
            }));
        }
        let joined = readers
            .into_iter()
            .map(|reader| reader.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))));
        joined.sum::<io::Result<u64>>()
    })?;
    Ok(Moved { blocks: read / block as u64, block_bytes: block, elapsed: began.elapsed() })
}

/// One message after the other, each answered by a single byte: the least that a request costs.
pub(super) fn round_trips(bytes: usize, time: Duration) -> io::Result<Row> {
    let (mut here, mut there) = pair()?;
    let answering = thread::spawn(move || {
        let mut message = vec![0; bytes];
        while there.read_exact(&mut message).is_ok() && there.write_all(&[1]).is_ok() {}
    });
    let mut histogram = latencies();
    let message = vec![7; bytes];
    let mut answer = [0];
    let began = Instant::now();
    while began.elapsed() < time || histogram.is_empty() {
        let sent = Instant::now();
        here.write_all(&message)?;
        here.read_exact(&mut answer)?;
        record(&mut histogram, sent.elapsed());
    }
    let elapsed = began.elapsed();
    drop(here);
    answering.join().map_err(|_| io::Error::other("the answering thread panicked"))?;
    let mut row = Row { case: "loopback round trip, 1 KiB".to_owned(), ..Row::default() };
    row.set_rate(histogram.len(), 0, elapsed);
    row.set_latencies(&histogram);
    Ok(row)
}

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let here = TcpStream::connect(listener.local_addr()?)?;
    let (there, _) = listener.accept()?;
    here.set_nodelay(true)?;
    there.set_nodelay(true)?;
    Ok((here, there))
}
