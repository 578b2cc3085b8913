//! The handle on the connection: requests are matched to their answers by correlation id, pushes to their subscriptions.
//! The task behind it is in [`crate::connection`].
//!
//! A request in flight when the connection ends fails with [`Error::Disconnected`]: whether to ask again is known to the
//! caller only. Each connection has a number, the *session*; what must be set up anew (subscriptions) watches it.
//!
//! **Bounds.** Nothing here queues on its own account: requests are bounded by their callers (the producer's buffer, the
//! leases of a share member, one wait per admin call), pushes by the credit that their subscription granted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use felucca_protocol::frame::{self, Frame, Kind};
use felucca_protocol::message;
use felucca_protocol::{Api, ErrorCode};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::backoff::Backoff;
use crate::connection;
use crate::error::{Error, Result};

/// What was agreed when the connection began.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// Counts the connections of this client, from 1.
    pub(crate) number: u64,
    pub(crate) welcome: Arc<message::Welcome>,
}

/// The state of the connection, as everybody may watch it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    /// Set while connected.
    pub(crate) session: Option<Session>,
    /// The broker does not want this client; set until it does.
    pub(crate) refused: Option<Error>,
}

impl Status {
    /// The number of the open connection.
    pub(crate) fn number(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.number)
    }
}

/// A frame to be written.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) head: BytesMut,
    pub(crate) payload: Vec<Bytes>,
}

impl Outgoing {
    pub(crate) fn request(api: Api, correlation: u64, request: &impl Message, payload: Vec<Bytes>) -> Self {
        let mut head = BytesMut::new();
        let payload_len = payload.iter().map(Bytes::len).sum();
        frame::encode(&mut head, Kind::Request, api, correlation, request, payload_len);
        Self { head, payload }
    }
}

#[derive(Debug, Default)]
struct Pending {
    /// Set while connected.
    outgoing: Option<mpsc::UnboundedSender<Outgoing>>,
    max_frame_bytes: usize,
    answers: HashMap<u64, oneshot::Sender<Result<Frame>>>,
}

/// What the handles and the connection task share.
#[derive(Debug)]
pub(crate) struct Shared {
    pending: Mutex<Pending>,
    pushes: Mutex<HashMap<u64, mpsc::UnboundedSender<Frame>>>,
    next_id: AtomicU64,
    status: watch::Sender<Status>,
    /// Why the last try to connect failed.
    last_error: Mutex<Option<Error>>,
    request_timeout: Duration,
}

/// Cheap to clone. The connection ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    /// Ends the connection task when the last link is gone.
    _alive: Arc<mpsc::Sender<()>>,
}

/// An answer that is on its way.
pub(crate) type InFlight = oneshot::Receiver<Result<Frame>>;

impl Link {
    /// Starts connecting; needs a tokio runtime.
    pub(crate) fn start(address: String, client_name: String, request_timeout: Duration) -> Self {
        let (alive, gone) = mpsc::channel(1);
        let shared = Arc::new(Shared {
            pending: Mutex::default(),
            pushes: Mutex::default(),
            next_id: AtomicU64::new(1),
            status: watch::Sender::default(),
            last_error: Mutex::new(None),
            request_timeout,
        });
        tokio::spawn(connection::run(shared.clone(), address, client_name, gone));
        Self { shared, _alive: Arc::new(alive) }
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.shared.request_timeout
    }

    /// Changes with every connection.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// The open connection, if there is one.
    pub(crate) fn session(&self) -> Option<Session> {
        self.shared.status.borrow().session.clone()
    }

    /// Waits for a connection, at most for `patience`. Cancellation safe.
    pub(crate) async fn connected(&self, patience: Duration) -> Result<Session> {
        let mut status = self.status();
        let settled = |status: &Status| status.session.is_some() || status.refused.is_some();
        let waited = timeout(patience, status.wait_for(settled)).await;
        match waited {
            Ok(Ok(status)) => match (&status.session, &status.refused) {
                (Some(session), _) => Ok(session.clone()),
                (None, Some(refused)) => Err(refused.clone()),
                (None, None) => Err(Error::Disconnected),
            },
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(self.shared.last_error.lock().clone().unwrap_or(Error::Timeout("connecting"))),
        }
    }

    /// Sends a request without waiting; requests sent one after the other arrive in this order.
    ///
    /// # Errors
    /// There is no connection, or the request is over the broker's frame limit.
    pub(crate) fn send(&self, api: Api, request: &impl Message, payload: Vec<Bytes>) -> Result<InFlight> {
        let correlation = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = request.encoded_len() + payload.iter().map(Bytes::len).sum::<usize>();
        let mut pending = self.shared.pending.lock();
        let Some(connection) = &pending.outgoing else { return Err(Error::Disconnected) };
        // A larger frame would cost everybody the connection.
        if bytes + frame::HEADER_LEN > pending.max_frame_bytes {
            let limit = pending.max_frame_bytes;
            let why = format!("a request of {bytes} bytes is over the broker's limit of {limit} bytes");
            return Err(Error::Record(why));
        }
        let outgoing = Outgoing::request(api, correlation, request, payload);
        connection.send(outgoing).map_err(|_| Error::Disconnected)?;
        let (sender, answer) = oneshot::channel();
        pending.answers.insert(correlation, sender);
        Ok(answer)
    }

    /// Sends something that needs no answer; lost without a connection.
    pub(crate) fn tell(&self, api: Api, request: &impl Message) {
        if let Some(connection) = &self.shared.pending.lock().outgoing {
            // A connection that is ending takes it along; its successor is set up anew.
            let _lost = connection.send(Outgoing::request(api, 0, request, Vec::new()));
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
        self.ask_by(Instant::now() + self.shared.request_timeout, api, request, payload).await
    }

    async fn ask_by<R: Message + Default>(
        &self,
        deadline: Instant,
        api: Api,
        request: &impl Message,
        payload: Vec<Bytes>,
    ) -> Result<(R, Bytes)> {
        self.connected(deadline.saturating_duration_since(Instant::now())).await?;
        let answer = self.send(api, request, payload)?;
        timeout_at(deadline, receive(answer)).await.unwrap_or(Err(Error::Timeout("waiting for an answer")))
    }

    /// Asks again over reconnects and retryable refusals, within the request timeout. For requests that may be repeated.
    pub(crate) async fn ask_until<R: Message + Default>(
        &self,
        api: Api,
        request: &impl Message,
        payload: Vec<Bytes>,
    ) -> Result<(R, Bytes)> {
        let deadline = Instant::now() + self.shared.request_timeout;
        let mut backoff = Backoff::default();
        loop {
            let result = self.ask_by(deadline, api, request, payload.clone()).await;
            let error = match result {
                Err(error) if error.retryable() => error,
                other => return other,
            };
            let pause = backoff.next_after(&error);
            if Instant::now() + pause >= deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Opens a channel for the pushes of a new subscription. Bounded by the credit that the caller grants.
    pub(crate) fn open_subscription(&self) -> (u64, mpsc::UnboundedReceiver<Frame>) {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, pushes) = mpsc::unbounded_channel();
        self.shared.pushes.lock().insert(id, sender);
        (id, pushes)
    }

    /// Forgets the channel; pushes that still come are dropped.
    pub(crate) fn close_subscription(&self, id: u64) {
        self.shared.pushes.lock().remove(&id);
    }
}

impl Shared {
    /// A connection is open: what is sent goes to `outgoing`.
    pub(crate) fn open(&self, session: Session, outgoing: mpsc::UnboundedSender<Outgoing>) {
        {
            let mut pending = self.pending.lock();
            pending.max_frame_bytes = session.welcome.max_frame_bytes as usize;
            pending.outgoing = Some(outgoing);
        }
        self.status.send_replace(Status { session: Some(session), refused: None });
    }

    /// The last handle is gone: what was queued is still written, nothing is taken any more.
    pub(crate) fn no_more_requests(&self) {
        self.pending.lock().outgoing = None;
    }

    /// The connection ended, and with it everything that was in flight.
    pub(crate) fn closed(&self) {
        self.status.send_replace(Status::default());
        let answers = {
            let mut pending = self.pending.lock();
            pending.outgoing = None;
            std::mem::take(&mut pending.answers)
        };
        for answer in answers.into_values() {
            // A caller that is gone needs no answer.
            let _gone = answer.send(Err(Error::Disconnected));
        }
    }

    /// A try to connect failed.
    pub(crate) fn failed(&self, error: Error) {
        if !error.retryable() {
            self.status.send_replace(Status { session: None, refused: Some(error.clone()) });
        }
        *self.last_error.lock() = Some(error);
    }

    /// No connection will be made any more.
    pub(crate) fn end(&self) {
        self.pushes.lock().clear();
    }

    /// Brings a frame to who waits for it.
    pub(crate) fn route(&self, frame: Frame) {
        match frame.kind {
            Kind::Push => {
                if let Some(subscription) = self.pushes.lock().get(&frame.correlation) {
                    // A consumer that is gone needs no records.
                    let _gone = subscription.send(frame);
                }
            }
            Kind::Reply | Kind::Error => {
                let answer = self.pending.lock().answers.remove(&frame.correlation);
                match answer {
                    Some(answer) => {
                        let _gone = answer.send(answered(frame));
                    }
                    None => {
                        // A farewell, which says why the connection is about to end, or the answer to a `tell`.
                        if let Err(error) = answered(frame) {
                            tracing::debug!(%error, "the broker says");
                        }
                    }
                }
            }
            Kind::Request => tracing::debug!(api = frame.api, "request from the broker"),
        }
    }
}

/// Waits for an answer and decodes it.
pub(crate) async fn receive<R: Message + Default>(answer: InFlight) -> Result<(R, Bytes)> {
    let frame = answer.await.map_err(|_| Error::Disconnected)??;
    let reply = frame.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Ok((reply, frame.payload.freeze()))
}

/// An error frame as an error.
pub(crate) fn answered(frame: Frame) -> Result<Frame> {
    if frame.kind != Kind::Error {
        return Ok(frame);
    }
    let error: message::Error = frame.decode_message().map_err(|error| Error::Protocol(error.to_string()))?;
    Err(error.into())
}

/// The error of a reply that must not be empty.
pub(crate) fn missing(what: &str) -> Error {
    Error::broker(ErrorCode::Internal, format!("the answer lacks {what}"))
}
