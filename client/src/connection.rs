//! The connection task: connects, shakes hands, reads; connects again for as long as a [`Link`](crate::link::Link) lives.
//!
//! One task reads and routes, a second one writes, so that neither direction waits for the other. The broker is pinged three
//! times per session timeout, and a broker of which nothing is heard for a whole one is given up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use felucca_protocol::frame::{self, Frame};
use felucca_protocol::{Api, PROTOCOL_VERSION, message};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::error::{Error, Result};
use crate::link::{Outgoing, Session, Shared, answered};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that lived so long is followed by a first try without much delay.
const SETTLED: Duration = Duration::from_secs(1);
/// What is queued when the last handle goes still has so long to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What a broker may send in one frame.
const MAX_INCOMING_FRAME: u32 = 128 << 20;
/// Room made for a read. Records stay where they were read to, so what was made for much and got little would be kept for it.
const LEAST_READ: usize = 16 << 10;
const MOST_READ: usize = 256 << 10;
/// What is gathered before it is written.
const WRITE_BUFFER: usize = 256 << 10;
/// Payloads of this size and more are written from where they are.
const COPY_LIMIT: usize = 8 << 10;
/// Frames taken from the queue at a time.
const GATHER: usize = 256;

/// Keeps a connection until nobody holds the other end of `gone`.
pub(crate) async fn run(
    shared: Arc<Shared>,
    address: String,
    client_name: String,
    mut gone: mpsc::Receiver<()>,
) {
    let mut backoff = Backoff::default();
    let mut number = 0;
    loop {
        let connecting = tokio::select! {
            biased;
            _ = gone.recv() => break,
            connection = timeout(CONNECT_TIMEOUT, connect(&address, &client_name)) => connection,
        };
        match connecting.unwrap_or(Err(Error::Timeout("connecting"))) {
            Ok(connected) => {
                number += 1;
                let since = Instant::now();
                tracing::debug!(address, server = connected.welcome.server_name, "connected");
                let stop = serve(&shared, connected, number, &mut gone).await;
                shared.closed();
                match stop {
                    Stop::Closed => break,
                    Stop::Lost(error) => tracing::debug!(address, %error, "connection lost"),
                }
                if since.elapsed() >= SETTLED {
                    backoff = Backoff::default();
                }
            }
            Err(error) => {
                tracing::debug!(address, %error, "cannot connect");
                shared.failed(error);
            }
        }
        tokio::select! {
            biased;
            _ = gone.recv() => break,
            () = backoff.wait() => {}
        }
    }
    shared.end();
}

struct Connected {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    /// Read already.
    buffer: BytesMut,
    welcome: message::Welcome,
}

async fn connect(address: &str, client_name: &str) -> Result<Connected> {
    let failed = |error: std::io::Error| Error::Connect(format!("{address}: {error}"));
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let (mut reader, mut writer) = stream.into_split();
    let hello = message::Hello {
        min_version: PROTOCOL_VERSION,
        max_version: PROTOCOL_VERSION,
        client_name: client_name.to_owned(),
        client_version: env!("CARGO_PKG_VERSION").to_owned(),
        authentication: None,
    };
    writer.write_all(&Outgoing::request(Api::Hello, 0, &hello, Vec::new()).head).await.map_err(failed)?;
    let mut buffer = BytesMut::with_capacity(LEAST_READ);
    let frame = loop {
        if let Some(frame) = decode(&mut buffer)? {
            break frame;
        }
        if reader.read_buf(&mut buffer).await.map_err(failed)? == 0 {
            return Err(Error::Disconnected);
        }
    };
    let welcome = answered(frame)?.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Ok(Connected { reader, writer, buffer, welcome })
}

fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>> {
    frame::decode(buffer, MAX_INCOMING_FRAME).map_err(|error| Error::Protocol(error.to_string()))
}

enum Stop {
    /// Nobody uses the client any more.
    Closed,
    Lost(Error),
}

async fn serve(shared: &Shared, connected: Connected, number: u64, gone: &mut mpsc::Receiver<()>) -> Stop {
    let Connected { mut reader, writer, mut buffer, welcome } = connected;
    let session_timeout = Duration::from_millis(u64::from(welcome.session_timeout_ms.max(300)));
    let (outgoing, queue) = mpsc::unbounded_channel();
    let mut writing = Writing(tokio::spawn(write(queue, writer)));
    shared.open(Session { number, welcome: Arc::new(welcome) }, outgoing.clone());
    let mut keepalive = tokio::time::interval(session_timeout / 3);
    let mut heard = Instant::now();
    let mut read_size = LEAST_READ;
    loop {
        loop {
            match decode(&mut buffer) {
                Ok(Some(frame)) => shared.route(frame),
                Ok(None) => break,
                Err(error) => return Stop::Lost(error),
            }
        }
        let mut room = buffer.capacity() - buffer.len();
        if room < read_size / 4 {
            buffer.reserve(read_size);
            room = buffer.capacity() - buffer.len();
        }
        tokio::select! {
            _ = gone.recv() => {
                // Releases and the last settlements of a client that ends in order.
                shared.no_more_requests();
                drop(outgoing);
                let _late = timeout(LAST_WORDS, &mut writing.0).await;
                return Stop::Closed;
            }
            read = reader.read_buf(&mut buffer) => match read {
                Ok(0) => return Stop::Lost(Error::Disconnected),
                Ok(read) => {
                    heard = Instant::now();
                    read_size = next_read_size(read_size, room, read);
                }
                Err(error) => return Stop::Lost(Error::Connect(error.to_string())),
            },
            written = &mut writing.0 => {
                return Stop::Lost(written.unwrap_or_else(|error| Error::Connect(error.to_string())));
            }
            _ = keepalive.tick() => {
                if heard.elapsed() > session_timeout {
                    return Stop::Lost(Error::Timeout("waiting for a sign of life"));
                }
                // A connection that is ending needs no ping.
                let _ending = outgoing.send(Outgoing::request(Api::Ping, 0, &message::Ping {}, Vec::new()));
            }
        }
    }
}

/// Room to make for reads after one that had `room` and brought `read` bytes: more when it was full, less when it was nearly
/// empty.
fn next_read_size(size: usize, room: usize, read: usize) -> usize {
    let next = if read >= room {
        size * 2
    } else if read < size / 8 {
        size / 2
    } else {
        size
    };
    next.clamp(LEAST_READ, MOST_READ)
}

/// The writing task; ends with the connection.
struct Writing(tokio::task::JoinHandle<Error>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes what is queued, gathering small frames; ends with the error that ended it, or when the queue is closed.
async fn write(mut queue: mpsc::UnboundedReceiver<Outgoing>, mut writer: OwnedWriteHalf) -> Error {
    let mut frames = Vec::new();
    let mut gathered = BytesMut::new();
    while queue.recv_many(&mut frames, GATHER).await > 0 {
        if let Err(error) = write_frames(&mut writer, &mut frames, &mut gathered).await {
            return Error::Connect(error.to_string());
        }
    }
    Error::Closed
}

async fn write_frames(
    writer: &mut OwnedWriteHalf,
    frames: &mut Vec<Outgoing>,
    gathered: &mut BytesMut,
) -> std::io::Result<()> {
    for frame in frames.drain(..) {
        gathered.extend_from_slice(&frame.head);
        for part in frame.payload {
            if part.len() < COPY_LIMIT {
                gathered.extend_from_slice(&part);
            } else {
                write_both(writer, gathered, &part).await?;
                gathered.clear();
            }
        }
        if gathered.len() >= WRITE_BUFFER {
            writer.write_all(gathered).await?;
            gathered.clear();
        }
    }
    writer.write_all(gathered).await?;
    gathered.clear();
    Ok(())
}

/// Two buffers in one system call where the socket takes them.
async fn write_both(writer: &mut OwnedWriteHalf, first: &[u8], second: &[u8]) -> std::io::Result<()> {
    let slices = [std::io::IoSlice::new(first), std::io::IoSlice::new(second)];
    let written = writer.write_vectored(&slices).await?;
    if written < first.len() {
        writer.write_all(&first[written..]).await?;
        writer.write_all(second).await
    } else {
        writer.write_all(&second[written - first.len()..]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_reads_follows_what_they_bring() {
        let mut size = LEAST_READ;
        for _ in 0..10 {
            size = next_read_size(size, size, size);
        }
        assert_eq!(size, MOST_READ);
        assert_eq!(next_read_size(size, size, size / 4), size, "less, and enough");
        for _ in 0..10 {
            size = next_read_size(size, size, 100);
        }
        assert_eq!(size, LEAST_READ);
        assert_eq!(next_read_size(size, 5_000, 5_000), size * 2, "what was left was full");
    }
}
