//! Producing without the client library: the same encoded batch again and again, straight onto the connection.
//!
//! What this is ahead of `produce` by is the client's cost; what it is behind the loopback and the disk by is the broker's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::BatchBuilder;
use felucca_protocol::frame::{self, Frame, Kind};
use felucca_protocol::{Api, PROTOCOL_VERSION, message};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::window::{Span, Window};
use super::{PATIENCE, Producers, Session, create_topic, join, value};
use crate::driver::{Driver, Felucca};
use crate::row::{Row, latencies, record};
use crate::workload::{Ack, Produce};

/// Answers are small.
const MAX_FRAME: u32 = 1 << 20;
/// Where the correlation is in a frame.
const CORRELATION: std::ops::Range<usize> = 8..16;
/// Requests up to this size are copied behind their header, so that one write of one buffer sends them.
const COPY_BELOW: usize = 16 << 10;

/// A batch, and how many records are in it.
struct Encoded {
    bytes: Bytes,
    records: u64,
}

/// As many records as the size allows, one at least.
fn encode(record_bytes: usize, batch_bytes: usize) -> anyhow::Result<Encoded> {
    let value = value(record_bytes);
    let mut builder = BatchBuilder::new();
    loop {
        let before = builder.len_bytes();
        builder.push(0, None, Some(&value), &[])?;
        let size = builder.len_bytes() - before;
        if builder.len_bytes() + size > batch_bytes {
            let records = u64::from(builder.count());
            return Ok(Encoded { bytes: builder.finish().freeze(), records });
        }
    }
}

/// A connection after its handshake, and nothing more.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    read: BytesMut,
}

impl Connection {
    async fn open(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut connection = Self { stream, read: BytesMut::with_capacity(64 << 10) };
        let hello = message::Hello {
            min_version: PROTOCOL_VERSION,
            max_version: PROTOCOL_VERSION,
            client_name: "felucca-bench".to_owned(),
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            authentication: None,
        };
        let mut request = BytesMut::new();
        frame::encode(&mut request, Kind::Request, Api::Hello, 0, &hello, 0);
        connection.stream.write_all(&request).await?;
        let welcome = connection.receive().await?;
        ensure!(welcome.kind == Kind::Reply, "the broker refused the handshake");
        Ok(connection)
    }

    /// A frame that has come already.
    fn received(&mut self) -> anyhow::Result<Option<Frame>> {
        Ok(frame::decode(&mut self.read, MAX_FRAME)?)
    }

    async fn receive(&mut self) -> anyhow::Result<Frame> {
        loop {
            if let Some(frame) = self.received()? {
                return Ok(frame);
            }
            let read =
                timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.context("no answer")??;
            ensure!(read > 0, "the broker closed the connection");
        }
    }
}

/// Keeps so many requests in flight until the window is over.
async fn saturate(
    mut connection: Connection,
    requests: Requests,
    in_flight: usize,
    window: Arc<Window>,
    task: usize,
) -> anyhow::Result<Histogram<u64>> {
    let mut histogram = latencies();
    let mut sent = VecDeque::with_capacity(in_flight);
    let mut next = 1;
    loop {
        while sent.len() < in_flight && !window.is_over() {
            sent.push_back((next, Instant::now()));
            requests.send(&mut connection.stream, next).await?;
            next += 1;
        }
        if sent.is_empty() {
            return Ok(histogram);
        }
        let mut answer = Some(connection.receive().await?);
        while let Some(frame) = answer {
            let place = sent.iter().position(|(correlation, _)| *correlation == frame.correlation);
            let (_, began) = place.and_then(|place| sent.remove(place)).context("an unasked answer")?;
            check(&frame)?;
            window.count(task).add(1);
            if window.is_counting() {
                record(&mut histogram, began.elapsed());
            }
            answer = connection.received()?;
        }
    }
}

/// A request to be sent under changing correlations.
#[derive(Clone, Debug)]
struct Requests {
    head: BytesMut,
    payload: Bytes,
}

impl Requests {
    fn new(topic_id: Bytes, partition: u32, ack: Ack, payload: Bytes) -> anyhow::Result<Self> {
        let level = match ack {
            Ack::Synced => message::Level::Synced,
            Ack::Written | Ack::Memory => message::Level::Written,
        };
        let entry = message::ProduceEntry { topic_id, partition, length: u32::try_from(payload.len())? };
        let request = message::Produce { level: level.into(), entries: vec![entry] };
        let mut head = BytesMut::new();
        frame::encode(&mut head, Kind::Request, Api::Produce, 0, &request, payload.len());
        Ok(Self { head, payload })
    }

    async fn send(&self, stream: &mut TcpStream, correlation: u64) -> anyhow::Result<()> {
        let mut head = self.head.clone();
        head[CORRELATION].copy_from_slice(&correlation.to_be_bytes());
        let sent = async {
            if self.payload.len() < COPY_BELOW {
                head.extend_from_slice(&self.payload);
                return stream.write_all(&head).await;
            }
            let mut both = bytes::Buf::chain(&head[..], &self.payload[..]);
            stream.write_all_buf(&mut both).await
        };
        timeout(PATIENCE, sent).await.context("the broker does not read")??;
        Ok(())
    }
}

fn check(frame: &Frame) -> anyhow::Result<()> {
    if frame.kind != Kind::Reply {
        bail!("refused: {}", frame.decode_message::<message::Error>()?.message);
    }
    let reply: message::ProduceReply = frame.decode_message()?;
    for result in reply.results {
        if let Some(error) = result.error {
            bail!("refused: {}", error.message);
        }
    }
    Ok(())
}

pub(super) async fn measure(session: &Session, work: &Produce, producers: Producers) -> anyhow::Result<Row> {
    let driver = Felucca::open(&session.address, session.level).await?;
    let topic = create_topic(&driver, producers.partitions.unwrap_or(work.partitions)).await?;
    let id = driver.topic_id(&topic).await?;
    let encoded = encode(work.record_bytes, work.batch_bytes)?;
    let window = Arc::new(Window::new(producers.connections as usize));
    let mut tasks = JoinSet::new();
    for task in 0..producers.connections {
        let requests =
            Requests::new(id.clone(), task % topic.partitions, session.level, encoded.bytes.clone())?;
        let connection = Connection::open(&session.address).await?;
        tasks.spawn(saturate(connection, requests, producers.in_flight, window.clone(), task as usize));
    }
    let batch_bytes = encoded.bytes.len() as u64;
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        warm_up_units: session.effort.bytes(Felucca::WARM_UP_BYTES) / batch_bytes,
        measured: session.effort.measured(work.seconds),
        most: session.effort.bytes(work.max_bytes) / batch_bytes,
    };
    let (mut row, opening) = window.observe(session, &span, batch_bytes).await;
    let mut all = latencies();
    for histogram in join(tasks).await? {
        all.add(histogram)?;
    }
    ensure!(row.records.is_some_and(|requests| requests > 0), "nothing was acknowledged");
    opening.check()?;
    row.records = row.records.map(|requests| requests * encoded.records);
    row.records_per_s = row.records_per_s.map(|requests| requests * encoded.records as f64);
    row.set_latencies(&all);
    opening.sustained(session, &window, batch_bytes, &mut row).await;
    row.sustained_records_per_s =
        row.sustained_records_per_s.map(|requests| requests * encoded.records as f64);
    session.discard(&driver, &topic, &[]).await?;
    Ok(row)
}

#[cfg(test)]
mod tests {
    use felucca_protocol::batch::{BatchLimits, validate};

    use super::*;

    #[test]
    fn batches_fill_the_size_and_are_valid() {
        let limits = BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 8 };
        let block = encode(1024, 100 << 10).unwrap();
        assert!(block.bytes.len() <= 100 << 10 && block.bytes.len() > 98 << 10);
        let header = validate(&block.bytes, &limits).unwrap();
        assert_eq!(u64::from(header.record_count), block.records);
        let single = encode(1024, 0).unwrap();
        assert_eq!(single.records, 1);
        assert!(validate(&single.bytes, &limits).is_ok());
    }
}
