//! The connection to the broker: one task that connects, reconnects and reads; requests are matched to their answers by
//! correlation id, pushes to their subscriptions.
//!
//! A request in flight when the connection ends fails with [`Error::Disconnected`]: whether to ask again is known to the
//! caller only. Each connection has a number, the *session*; what must be set up anew (subscriptions) watches it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use felucca_protocol::frame::{self, Frame, Kind};
use felucca_protocol::message;
use felucca_protocol::{Api, ErrorCode, PROTOCOL_VERSION};
use parking_lot::Mutex;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::error::{Error, Result};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What a broker may send in one frame, whatever it asks us to keep to.
const MAX_INCOMING_FRAME: u32 = 128 << 20;
const READ_BUFFER: usize = 256 << 10;
/// Payloads of this size and more are written from where they are.
const COPY_LIMIT: usize = 8 << 10;

/// What was agreed when the connection began.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// Counts the connections of this client.
    pub(crate) number: u64,
    pub(crate) welcome: Arc<message::Welcome>,
}

#[derive(Debug)]
struct Outgoing {
    head: BytesMut,
    payload: Vec<Bytes>,
}

type Answer = oneshot::Sender<Result<Frame>>;

#[derive(Debug, Default)]
struct Pending {
    /// Set while connected.
    outgoing: Option<mpsc::UnboundedSender<Outgoing>>,
    answers: HashMap<u64, Answer>,
}

#[derive(Debug)]
struct Inner {
    pending: Mutex<Pending>,
    pushes: Mutex<HashMap<u64, mpsc::UnboundedSender<Frame>>>,
    next_id: AtomicU64,
    session: watch::Sender<Option<Session>>,
    last_error: Mutex<Option<Error>>,
    request_timeout: Duration,
}

/// Cheap to clone. The connection ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    inner: Arc<Inner>,
    /// Ends the connection task when the last link is gone.
    _alive: Arc<mpsc::Sender<()>>,
}

/// An answer that is on its way.
pub(crate) type InFlight = oneshot::Receiver<Result<Frame>>;

impl Link {
    pub(crate) fn start(address: String, client_name: String, request_timeout: Duration) -> Self {
        let (alive, gone) = mpsc::channel(1);
        let inner = Arc::new(Inner {
            pending: Mutex::default(),
            pushes: Mutex::default(),
            next_id: AtomicU64::new(1),
            session: watch::Sender::new(None),
            last_error: Mutex::new(None),
            request_timeout,
        });
        tokio::spawn(run(inner.clone(), address, client_name, gone));
        Self { inner, _alive: Arc::new(alive) }
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.inner.request_timeout
    }

    /// Changes with every connection; `None` while there is none.
    pub(crate) fn sessions(&self) -> watch::Receiver<Option<Session>> {
        self.inner.session.subscribe()
    }

    /// Waits for a connection, at most for `patience`. Cancellation safe.
    pub(crate) async fn connected(&self, patience: Duration) -> Result<Session> {
        let mut sessions = self.sessions();
        let session = timeout(patience, sessions.wait_for(Option::is_some)).await;
        match session {
            Ok(Ok(session)) => session.clone().ok_or(Error::Disconnected),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(self.inner.last_error.lock().clone().unwrap_or(Error::Timeout("connecting"))),
        }
    }

    /// Sends a request without waiting; fails when there is no connection.
    pub(crate) fn send(&self, api: Api, request: &impl Message, payload: Vec<Bytes>) -> Result<InFlight> {
        let correlation = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let outgoing = encode(api, correlation, request, payload);
        let (sender, answer) = oneshot::channel();
        let mut pending = self.inner.pending.lock();
        let Some(connection) = &pending.outgoing else { return Err(Error::Disconnected) };
        connection.send(outgoing).map_err(|_| Error::Disconnected)?;
        pending.answers.insert(correlation, sender);
        Ok(answer)
    }

    /// Sends something that is not answered; lost without a connection.
    pub(crate) fn tell(&self, api: Api, request: &impl Message) {
        let outgoing = encode(api, 0, request, Vec::new());
        if let Some(connection) = &self.inner.pending.lock().outgoing {
            // A connection that is ending takes it along; its successor is set up anew.
            let _lost = connection.send(outgoing);
        }
    }

    /// Asks once: waits for a connection, sends, waits for the answer; all within the request timeout. When the future is
    /// dropped the request may still be carried out.
    pub(crate) async fn ask<R: Message + Default>(
        &self,
        api: Api,
        request: &impl Message,
        payload: Vec<Bytes>,
    ) -> Result<(R, Bytes)> {
        let patience = self.inner.request_timeout;
        let asking = async {
            self.connected(patience).await?;
            receive(self.send(api, request, payload)?).await
        };
        timeout(patience, asking).await.unwrap_or(Err(Error::Timeout("waiting for an answer")))
    }

    /// Asks again over reconnects and retryable refusals, within the request timeout. For requests that may be repeated.
    pub(crate) async fn ask_until<R: Message + Default>(
        &self,
        api: Api,
        request: &impl Message,
        payload: Vec<Bytes>,
    ) -> Result<(R, Bytes)> {
        let deadline = Instant::now() + self.inner.request_timeout;
        let mut backoff = Backoff::default();
        loop {
            let result = self.ask(api, request, payload.clone()).await;
            match result {
                Err(error) if error.retryable() && Instant::now() < deadline => backoff.wait().await,
                other => return other,
            }
        }
    }

    /// Opens a channel for the pushes of a new subscription. Bounded by the credit that the caller grants.
    pub(crate) fn open_subscription(&self) -> (u64, mpsc::UnboundedReceiver<Frame>) {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, pushes) = mpsc::unbounded_channel();
        self.inner.pushes.lock().insert(id, sender);
        (id, pushes)
    }

    pub(crate) fn close_subscription(&self, id: u64) {
        self.inner.pushes.lock().remove(&id);
    }
}

/// Waits for an answer and decodes it.
pub(crate) async fn receive<R: Message + Default>(answer: InFlight) -> Result<(R, Bytes)> {
    let frame = answer.await.map_err(|_| Error::Disconnected)??;
    let reply = frame.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Ok((reply, frame.payload.freeze()))
}

fn encode(api: Api, correlation: u64, request: &impl Message, payload: Vec<Bytes>) -> Outgoing {
    let mut head = BytesMut::new();
    frame::encode(&mut head, Kind::Request, api, correlation, request, payload.iter().map(Bytes::len).sum());
    Outgoing { head, payload }
}

/// Exponential backoff with jitter, 50 ms to 2 s.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST_BACKOFF }
    }
}

impl Backoff {
    pub(crate) async fn wait(&mut self) {
        // Jitter needs no quality: the low bits of the clock do.
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .subsec_nanos();
        tokio::time::sleep(self.next.mul_f64(0.75 + f64::from(nanos % 1024) / 2048.0)).await;
        self.next = (self.next * 2).min(MAX_BACKOFF);
    }
}

async fn run(inner: Arc<Inner>, address: String, client_name: String, mut gone: mpsc::Receiver<()>) {
    let mut backoff = Backoff::default();
    let mut number = 0;
    loop {
        let connection = tokio::select! {
            biased;
            _ = gone.recv() => break,
            connection = timeout(CONNECT_TIMEOUT, connect(&address, &client_name)) => connection,
        };
        match connection.unwrap_or(Err(Error::Timeout("connecting"))) {
            Ok((reader, writer, buffer, welcome)) => {
                number += 1;
                backoff = Backoff::default();
                tracing::debug!(address, server = welcome.server_name, "connected");
                let stop = serve(&inner, reader, writer, buffer, number, welcome, &mut gone).await;
                inner.session.send_replace(None);
                let answers = {
                    let mut pending = inner.pending.lock();
                    pending.outgoing = None;
                    std::mem::take(&mut pending.answers)
                };
                for answer in answers.into_values() {
                    // A caller that is gone needs no answer.
                    let _gone = answer.send(Err(Error::Disconnected));
                }
                match stop {
                    Stop::Closed => break,
                    Stop::Lost(error) => tracing::debug!(address, %error, "connection lost"),
                }
            }
            Err(error) => {
                tracing::debug!(address, %error, "cannot connect");
                *inner.last_error.lock() = Some(error);
            }
        }
        tokio::select! {
            biased;
            _ = gone.recv() => break,
            () = backoff.wait() => {}
        }
    }
    inner.pushes.lock().clear();
}

type Connected = (OwnedReadHalf, OwnedWriteHalf, BytesMut, message::Welcome);

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
    writer.write_all(&encode(Api::Hello, 0, &hello, Vec::new()).head).await.map_err(failed)?;
    let mut buffer = BytesMut::with_capacity(READ_BUFFER);
    let frame = loop {
        if let Some(frame) = decode(&mut buffer)? {
            break frame;
        }
        if reader.read_buf(&mut buffer).await.map_err(failed)? == 0 {
            return Err(Error::Disconnected);
        }
    };
    let frame = answered(frame)?;
    let welcome = frame.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Ok((reader, writer, buffer, welcome))
}

fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>> {
    frame::decode(buffer, MAX_INCOMING_FRAME).map_err(|error| Error::Protocol(error.to_string()))
}

/// An error frame as an error.
fn answered(frame: Frame) -> Result<Frame> {
    if frame.kind != Kind::Error {
        return Ok(frame);
    }
    let error: message::Error = frame.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Err(error.into())
}

enum Stop {
    /// Nobody uses the client any more.
    Closed,
    Lost(Error),
}

async fn serve(
    inner: &Inner,
    mut reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    mut buffer: BytesMut,
    number: u64,
    welcome: message::Welcome,
    gone: &mut mpsc::Receiver<()>,
) -> Stop {
    let (outgoing, queue) = mpsc::unbounded_channel();
    inner.pending.lock().outgoing = Some(outgoing.clone());
    let session_timeout = Duration::from_millis(u64::from(welcome.session_timeout_ms.max(300)));
    inner.session.send_replace(Some(Session { number, welcome: Arc::new(welcome) }));
    let writing = write(queue, writer);
    tokio::pin!(writing);
    let mut keepalive = tokio::time::interval(session_timeout / 3);
    let mut heard = Instant::now();
    loop {
        loop {
            match decode(&mut buffer) {
                Ok(Some(frame)) => route(inner, frame),
                Ok(None) => break,
                Err(error) => return Stop::Lost(error),
            }
        }
        if buffer.capacity() - buffer.len() < READ_BUFFER / 4 {
            buffer.reserve(READ_BUFFER);
        }
        tokio::select! {
            biased;
            _ = gone.recv() => {
                // What was queued still goes out: releases and the last settlements of a client that ends in order.
                inner.pending.lock().outgoing = None;
                drop(outgoing);
                let _late = timeout(Duration::from_secs(1), writing).await;
                return Stop::Closed;
            }
            read = reader.read_buf(&mut buffer) => match read {
                Ok(0) => return Stop::Lost(Error::Disconnected),
                Ok(_) => heard = Instant::now(),
                Err(error) => return Stop::Lost(Error::Connect(error.to_string())),
            },
            error = &mut writing => return Stop::Lost(Error::Connect(error.to_string())),
            _ = keepalive.tick() => {
                if heard.elapsed() > session_timeout {
                    return Stop::Lost(Error::Timeout("waiting for a sign of life"));
                }
                let _ending = outgoing.send(encode(Api::Ping, 0, &message::Ping {}, Vec::new()));
            }
        }
    }
}

fn route(inner: &Inner, frame: Frame) {
    match frame.kind {
        Kind::Push => {
            if let Some(subscription) = inner.pushes.lock().get(&frame.correlation) {
                // A consumer that is gone needs no records.
                let _gone = subscription.send(frame);
            }
        }
        Kind::Reply | Kind::Error => {
            let answer = inner.pending.lock().answers.remove(&frame.correlation);
            match answer {
                Some(answer) => {
                    let _gone = answer.send(answered(frame));
                }
                None => tracing::trace!(correlation = frame.correlation, "answer that nobody waits for"),
            }
        }
        Kind::Request => tracing::debug!(api = frame.api, "request from the broker"),
    }
}

/// Writes what is queued, gathering small frames; ends with the error that ended it, or when the queue is closed.
async fn write(mut queue: mpsc::UnboundedReceiver<Outgoing>, mut writer: OwnedWriteHalf) -> Error {
    let mut frames = Vec::new();
    let mut gathered = BytesMut::new();
    while queue.recv_many(&mut frames, 256).await > 0 {
        let written = async {
            for frame in frames.drain(..) {
                gathered.extend_from_slice(&frame.head);
                for part in frame.payload {
                    if part.len() < COPY_LIMIT {
                        gathered.extend_from_slice(&part);
                    } else {
                        write_both(&mut writer, &gathered, &part).await?;
                        gathered.clear();
                    }
                }
            }
            writer.write_all(&gathered).await?;
            gathered.clear();
            Ok::<(), std::io::Error>(())
        };
        if let Err(error) = written.await {
            return Error::Connect(error.to_string());
        }
    }
    Error::Closed
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

/// The error of a reply that must not be empty.
pub(crate) fn missing(what: &str) -> Error {
    Error::Broker { code: ErrorCode::Internal, message: format!("the answer lacks {what}") }
}
