//! Copying through loopback connections, and the time there and back.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::Moved;
use crate::row::{Row, latencies, record};

/// Blocks from as many writing threads to as many reading ones.
pub(super) fn copy(streams: u32, block: usize, time: Duration) -> io::Result<Moved> {
    let pairs = (0..streams).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
    let began = Instant::now();
    let read = thread::scope(|scope| {
        let mut readers = Vec::new();
        for (mut from, mut to) in pairs {
            scope.spawn(move || {
                let bytes = vec![7; block];
                // A reader that failed reports it itself.
                while began.elapsed() < time && from.write_all(&bytes).is_ok() {}
            });
            readers.push(scope.spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                let mut total = 0;
                loop {
                    match to.read(&mut buffer)? {
                        0 => return Ok(total),
                        count => total += count as u64,
                    }
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
