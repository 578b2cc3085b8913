//! One connection: handshake, then frames in and frames out, until either side ends it.
//!
//! This task reads and dispatches; a second one writes (see `outbox`). Bytes are admitted before a request is taken in: a
//! frame that is larger than one read is admitted from its length alone, before room is made for it. While nothing is
//! admitted the socket is not read, and the client feels it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use felucca_protocol::frame::{self, Frame, FrameError, HEADER_LEN, Kind};
use felucca_protocol::{Api, ErrorCode, PROTOCOL_VERSION, message as wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::NativeSettings;
use super::convert;
use super::dispatch::Dispatcher;
use super::outbox::{OutFrame, Outbox, write_all};
use super::share::Shares;
use crate::broker::Broker;
use crate::shard::{Admission, ConnectionGate, Origin, Overloaded, REQUEST_OVERHEAD};

/// Room made for a read when nothing larger is expected.
const READ_BYTES: usize = 64 << 10;
/// Room made at most for a read ahead of what has come.
const MAX_READ_BYTES: usize = 1 << 20;
/// Largest first frame: nobody has introduced themselves yet.
const MAX_HELLO_BYTES: u32 = 16 << 10;
/// How often members are said to be alive while frames arrive.
const SEEN_INTERVAL: Duration = Duration::from_secs(1);
/// What is read and thrown away after a last error, so that the client can read that error before the reset.
const LINGER: Duration = Duration::from_millis(500);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client ended it between two frames.
    #[error("closed by the client")]
    Closed,
    #[error("the broker is stopping")]
    Stopping,
    #[error("the client vanished within a frame")]
    Truncated,
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What was asked under `api` and `correlation` ends the connection; both are 0 where nothing was.
    #[error("{}", .error.message)]
    Refused { api: u8, correlation: u64, error: wire::Error },
    #[error(transparent)]
    Overloaded(#[from] Overloaded),
    #[error("nothing was heard for {0:?}")]
    Idle(Duration),
    #[error("no hello within {0:?}")]
    NoHello(Duration),
    #[error("the client takes nothing")]
    Slow,
    #[error(transparent)]
    Io(io::Error),
}

impl End {
    /// What to tell the client, if it can still hear.
    fn farewell(&self) -> Option<OutFrame> {
        let code = match self {
            Self::Refused { api, correlation, error } => {
                let head = convert::error_frame(*api, *correlation, error);
                return Some(OutFrame { head, payload: Vec::new(), origin: None });
            }
            Self::Frame(FrameError::TooLarge { .. }) => ErrorCode::FrameTooLarge,
            Self::Frame(_) => ErrorCode::InvalidRequest,
            Self::Overloaded(_) => ErrorCode::Overloaded,
            Self::Stopping => ErrorCode::Stopping,
            Self::Idle(_) | Self::NoHello(_) => ErrorCode::Timeout,
            Self::Closed | Self::Truncated | Self::Slow | Self::Io(_) => return None,
        };
        let head = convert::error_frame(0, 0, &wire::Error::new(code, self.to_string()));
        Some(OutFrame { head, payload: Vec::new(), origin: None })
    }

    /// True when somebody should know: the client, or the network, is not as it should be.
    pub(super) fn is_fault(&self) -> bool {
        !matches!(self, Self::Closed | Self::Stopping)
    }
}

/// Serves a connection to its end.
pub(super) async fn serve(
    socket: TcpStream,
    peer: SocketAddr,
    broker: Broker,
    settings: &NativeSettings,
) -> End {
    if let Err(error) = socket.set_nodelay(true) {
        return End::Io(error);
    }
    let (read, mut write) = socket.into_split();
    let outbox = Outbox::new(settings.outbox_bytes);
    let shares = Arc::new(Shares::new(broker.clone()));
    let gate = broker.gate().connection(settings.connection_in_flight_bytes);
    let mut reader = Reader::new(read, gate.clone(), settings);
    let mut dispatcher =
        Dispatcher::new(broker.clone(), outbox.clone(), shares.clone(), settings.max_frame_bytes);
    let writer = {
        let (outbox, patience) = (outbox.clone(), settings.write_timeout);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let result = write_all(&outbox, &shares, &mut write, patience).await;
            // Nothing can leave any more; whoever waits for room must not.
            outbox.close();
            let _ = write.shutdown().await;
            result
        }))
    };
    tokio::pin!(writer);
    let mut written = None;
    let requests = requests(&mut reader, &mut dispatcher, &broker, &outbox, settings, peer);
    let end = tokio::select! {
        end = requests => end,
        result = &mut writer => {
            let result = result.unwrap_or_else(|error| Err(io::Error::other(error)));
            let end = match &result {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => End::Slow,
                Err(error) => End::Io(io::Error::new(error.kind(), error.to_string())),
                Ok(()) => End::Closed,
            };
            written = Some(result);
            end
        }
    };
    if matches!(end, End::Stopping) {
        // What was asked before the stop is still answered, within the time that the server gives all of us.
        dispatcher.drain().await;
        reader.forget();
        let _ = gate.admit(usize::MAX).await;
    }
    let farewell = end.farewell();
    let said = farewell.is_some();
    if let Some(frame) = farewell {
        outbox.send(frame);
    }
    drop(dispatcher);
    if written.is_none() {
        // The writer ends by itself: each of its writes is bounded.
        let _ = writer.await;
        if said {
            reader.linger().await;
        }
    }
    end
}

/// Shakes hands, then takes requests until the connection ends.
async fn requests(
    reader: &mut Reader<'_>,
    dispatcher: &mut Dispatcher,
    broker: &Broker,
    outbox: &Arc<Outbox>,
    settings: &NativeSettings,
    peer: SocketAddr,
) -> End {
    let hello = async {
        let patience = settings.handshake_timeout;
        let first = timeout(patience, reader.first_frame()).await.map_err(|_| End::NoHello(patience))??;
        greet(&first, broker, outbox, settings, peer)
    };
    if let Err(end) = hello.await {
        return end;
    }
    let mut seen = Instant::now();
    // Registered once, not for every frame.
    let stopping = broker.stopping();
    tokio::pin!(stopping);
    loop {
        let arrived = tokio::select! {
            arrived = reader.arrived() => arrived,
            () = &mut stopping => return End::Stopping,
        };
        let admission = match arrived {
            Ok(admission) => admission,
            Err(end) => return end,
        };
        let sink: Arc<Outbox> = outbox.clone();
        let origin = Origin::new(sink, Some(admission));
        let pinned = reader.block;
        for frame in reader.frames.drain(..) {
            if let Err(error) = dispatcher.request(frame, pinned, &origin) {
                dispatcher.submit();
                return End::Refused { api: 0, correlation: 0, error };
            }
        }
        if seen.elapsed() >= SEEN_INTERVAL {
            seen = Instant::now();
            dispatcher.members_seen();
        }
        dispatcher.submit();
        if let Some(error) = reader.broken.take() {
            return error.into();
        }
    }
}

/// Answers the first frame when it is a hello that holds; a refusal is said as the connection's end.
fn greet(
    frame: &Frame,
    broker: &Broker,
    outbox: &Outbox,
    settings: &NativeSettings,
    peer: SocketAddr,
) -> Result<(), End> {
    let refuse = |code, message: String| {
        let error = wire::Error::new(code, message);
        Err(End::Refused { api: frame.api, correlation: frame.correlation, error })
    };
    if frame.kind != Kind::Request || frame.api != u8::from(Api::Hello) {
        return refuse(ErrorCode::InvalidRequest, "the first frame must be the request Hello".to_owned());
    }
    let hello: wire::Hello = match frame.decode_message() {
        Ok(hello) => hello,
        Err(error) => return refuse(ErrorCode::InvalidRequest, format!("Hello cannot be decoded: {error}")),
    };
    let (oldest, newest) = (hello.min_version, hello.max_version);
    if oldest > PROTOCOL_VERSION || newest < 1 || oldest > newest {
        let message =
            format!("the broker speaks version 1 to {PROTOCOL_VERSION}, the client {oldest} to {newest}");
        return refuse(ErrorCode::UnsupportedVersion, message);
    }
    if let Some(authentication) = hello.authentication.filter(|offered| !offered.mechanism.is_empty()) {
        let message = format!("authentication by {:?} is not offered", authentication.mechanism);
        return refuse(ErrorCode::Unauthenticated, message);
    }
    tracing::debug!(%peer, client = hello.client_name, version = hello.client_version, "hello");
    let limits = broker.limits();
    let welcome = wire::Welcome {
        version: newest.min(PROTOCOL_VERSION),
        server_name: "felucca".to_owned(),
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_epoch: broker.boot_epoch(),
        max_frame_bytes: settings.max_frame_bytes,
        max_batch_bytes: limits.batch.max_batch_bytes,
        max_record_bytes: limits.batch.max_record_bytes,
        session_timeout_ms: u32::try_from(limits.session_timeout.as_millis()).unwrap_or(u32::MAX),
    };
    let head = convert::reply_frame(Api::Hello, frame.correlation, &welcome, 0);
    outbox.send(OutFrame { head, payload: Vec::new(), origin: None });
    Ok(())
}

/// The reading half: bytes into admitted frames.
#[derive(Debug)]
struct Reader<'a> {
    socket: OwnedReadHalf,
    gate: ConnectionGate,
    settings: &'a NativeSettings,
    buffer: BytesMut,
    /// Size of the memory block that `buffer` is part of.
    block: usize,
    /// What the next block should hold: follows the frames that come.
    expected: usize,
    frames: Vec<Frame>,
    /// Found behind `frames`; the connection ends once they are dispatched.
    broken: Option<FrameError>,
    /// Admission of a frame that is larger than a read, of which not everything has come.
    ahead: Option<Admission>,
    /// When something last came, and when to look at that.
    heard: Instant,
    idle: Pin<Box<Sleep>>,
}

/// What a read means, given everything that is in the buffer after it.
fn arrival(read: io::Result<usize>, buffer: &BytesMut) -> Result<(), End> {
    match read {
        Ok(0) if buffer.is_empty() => Err(End::Closed),
        Ok(0) => Err(End::Truncated),
        Ok(_) => Ok(()),
        Err(error) => Err(End::Io(error)),
    }
}

impl<'a> Reader<'a> {
    fn new(socket: OwnedReadHalf, gate: ConnectionGate, settings: &'a NativeSettings) -> Self {
        Self {
            socket,
            gate,
            settings,
            buffer: BytesMut::new(),
            block: 0,
            expected: READ_BYTES,
            frames: Vec::new(),
            broken: None,
            ahead: None,
            heard: Instant::now(),
            idle: Box::pin(sleep(settings.idle_timeout)),
        }
    }

    async fn first_frame(&mut self) -> Result<Frame, End> {
        let limit = self.settings.max_frame_bytes.min(MAX_HELLO_BYTES);
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, limit)? {
                return Ok(frame);
            }
            self.read().await?;
        }
    }

    /// Waits until at least one whole frame has come (they are in `frames` then) and their bytes are admitted.
    async fn arrived(&mut self) -> Result<Admission, End> {
        loop {
            let bytes = self.take_frames();
            if !self.frames.is_empty() {
                return match self.ahead.take() {
                    // The one frame that was waited for; what came with it is less than a read.
                    Some(admission) => Ok(admission),
                    None => Ok(self.gate.admit(bytes).await?),
                };
            }
            if let Some(error) = self.broken.take() {
                return Err(error.into());
            }
            self.make_room().await?;
            self.read_or_idle().await?;
        }
    }

    /// Reads once. The timer is set anew when it fires, not for every read.
    async fn read_or_idle(&mut self) -> Result<(), End> {
        let patience = self.settings.idle_timeout;
        let Self { socket, buffer, idle, .. } = self;
        loop {
            tokio::select! {
                read = socket.read_buf(buffer) => {
                    self.heard = Instant::now();
                    return arrival(read, buffer);
                }
                () = idle.as_mut() => {
                    if self.heard.elapsed() >= patience {
                        return Err(End::Idle(patience));
                    }
                    idle.as_mut().reset((self.heard + patience).into());
                }
            }
        }
    }

    /// Takes all whole frames; returns what they hold in memory.
    fn take_frames(&mut self) -> usize {
        let mut bytes = 0;
        loop {
            // The room that `decode` makes for an incomplete frame is made here instead, after its admission.
            match frame::required(&self.buffer, self.settings.max_frame_bytes) {
                Ok(Some(total)) if self.buffer.len() >= total => {}
                Ok(_) => break,
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            }
            match frame::decode(&mut self.buffer, self.settings.max_frame_bytes) {
                Ok(Some(frame)) => {
                    bytes += HEADER_LEN + frame.message.len() + frame.payload.len() + REQUEST_OVERHEAD;
                    self.frames.push(frame);
                }
                Ok(None) => break,
                Err(error) => {
                    self.broken = Some(error);
                    break;
                }
            }
        }
        bytes
    }

    /// Makes room for the next read; admits the bytes of a frame that is larger than a read.
    async fn make_room(&mut self) -> Result<(), End> {
        let total = frame::required(&self.buffer, self.settings.max_frame_bytes)?.unwrap_or(0);
        if total > READ_BYTES {
            if self.ahead.is_none() {
                self.ahead = Some(self.gate.admit(total + REQUEST_OVERHEAD).await?);
            }
            self.expected = (total.next_power_of_two()).min(MAX_READ_BYTES);
        }
        if self.buffer.len() < self.buffer.capacity() {
            return Ok(());
        }
        // Never much more than what has come, whatever the frame claims.
        let missing = total.saturating_sub(self.buffer.len());
        let room =
            if missing > 0 { missing.min(self.expected.max(self.buffer.len())) } else { self.expected };
        self.buffer.reserve(room);
        self.block = self.buffer.capacity();
        Ok(())
    }

    async fn read(&mut self) -> Result<(), End> {
        if self.buffer.capacity() == self.buffer.len() {
            self.buffer.reserve(READ_BYTES);
            self.block = self.buffer.capacity();
        }
        let read = self.socket.read_buf(&mut self.buffer).await;
        arrival(read, &self.buffer)
    }

    /// Gives up what has come and was not dispatched.
    fn forget(&mut self) {
        self.frames.clear();
        self.ahead = None;
    }

    /// Throws away what still comes, for a moment.
    async fn linger(&mut self) {
        self.forget();
        let drained = async {
            loop {
                self.buffer.clear();
                if self.read().await.is_err() {
                    return;
                }
            }
        };
        let _ = timeout(LINGER, drained).await;
    }
}
