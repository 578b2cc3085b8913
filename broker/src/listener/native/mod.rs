//! The native protocol's listener: `docs/protocol.md` over TCP.
//!
//! [`connection`](self) reads and dispatches, `outbox` gathers and writes, `subscription` pushes records in order, `share`
//! pushes leased ones, `convert` is the only place that knows both the engine's values and the wire's. A connection can
//! only harm itself: every wait of it, and everything that it may hold, has a bound in [`NativeSettings`].

mod connection;
mod convert;
mod dispatch;
mod outbox;
mod share;
mod subscription;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use felucca_protocol::{ErrorCode, message as wire};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::broker::Broker;

/// Limits of the listener and of each of its connections.
#[derive(Clone, Debug)]
pub struct NativeSettings {
    /// Largest frame taken in.
    pub max_frame_bytes: u32,
    pub max_connections: usize,
    /// Bytes of one connection's requests that are not answered yet.
    pub connection_in_flight_bytes: u32,
    /// Records queued for one connection and not yet written.
    pub outbox_bytes: usize,
    pub handshake_timeout: Duration,
    /// A connection of which nothing is heard for so long is closed.
    pub idle_timeout: Duration,
    /// A client that takes nothing of what is written to it for so long is disconnected.
    pub write_timeout: Duration,
}

/// Pause after a failed accept (no descriptors left, say), so that the failure is not met in a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An open listening socket.
#[derive(Debug)]
pub struct NativeListener {
    socket: TcpListener,
    settings: NativeSettings,
}

impl NativeListener {
    /// Binds the address; port 0 lets the system choose one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(address: SocketAddr, settings: NativeSettings) -> io::Result<Self> {
        Ok(Self { socket: TcpListener::bind(address).await?, settings })
    }

    /// The address that clients connect to.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Accepts and serves connections until the broker stops; then waits until the last of them has ended. To be dropped
    /// when that takes too long, which cuts them off.
    pub async fn run(self, broker: Broker) {
        let settings = Arc::new(self.settings);
        let places = Arc::new(Semaphore::new(settings.max_connections));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                () = broker.stopping() => break,
                // Ended connections are let go as they end.
                Some(_) = connections.join_next() => continue,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!(%peer, limit = settings.max_connections, "connection refused: too many are open");
                connections.spawn(refuse(socket, settings.max_connections));
                continue;
            };
            let (broker, settings) = (broker.clone(), settings.clone());
            connections.spawn(async move {
                tracing::debug!(%peer, "connected");
                let end = connection::serve(socket, peer, broker, &settings).await;
                if end.is_fault() {
                    tracing::warn!(%peer, reason = %end, "disconnected");
                } else {
                    tracing::debug!(%peer, reason = %end, "disconnected");
                }
                drop(place);
            });
        }
        drop(self.socket);
        while connections.join_next().await.is_some() {}
    }
}

/// Says why before hanging up.
async fn refuse(mut socket: TcpStream, limit: usize) {
    let message = format!("{limit} connections are open, which is the limit");
    let frame = convert::error_frame(0, 0, &wire::Error::new(ErrorCode::LimitReached, message));
    // The client may be gone; there is nothing more to do for it.
    let _ = timeout(Duration::from_secs(1), socket.write_all(&frame)).await;
}
