//! The sender: takes batches, sends them in order, and acts on the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};

use super::Shared;
use super::accumulator::Sent;
use super::lane::Identity;
use crate::backoff::Backoff;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::link::{Session, receive};

/// Batches of several partitions ride together up to this size.
const REQUEST_BYTES: usize = 1 << 20;
/// How long the sender sleeps when there is nothing to do.
const IDLE: Duration = Duration::from_secs(3600);

type Answer = Result<(message::ProduceReply, Bytes)>;

pub(super) struct Sender {
    client: Client,
    shared: Arc<Shared>,
    in_flight: FuturesUnordered<BoxFuture<'static, (Vec<Sent>, Answer)>>,
    /// A producer id is being asked for.
    initializing: Option<BoxFuture<'static, Result<Identity>>>,
    init_backoff: Backoff,
    last_expiry: Instant,
}

impl Sender {
    pub(super) fn new(client: Client, shared: Arc<Shared>) -> Self {
        Self {
            client,
            shared,
            in_flight: FuturesUnordered::new(),
            initializing: None,
            init_backoff: Backoff::default(),
            last_expiry: Instant::now(),
        }
    }

    pub(super) async fn run(mut self) {
        let mut status = self.client.link.status();
        let shared = self.shared.clone();
        loop {
            let session = status.borrow_and_update().session.clone();
            if let Some(session) = &session {
                self.send(session);
            }
            let pause = self.pause();
            let Self { in_flight, initializing, .. } = &mut self;
            tokio::select! {
                Some((sent, answer)) = in_flight.next(), if !in_flight.is_empty() => {
                    let late = matches!(answer, Err(Error::Timeout(_)));
                    self.act(sent, answer);
                    if late {
                        // Before it would be sent again.
                        self.expire();
                    }
                }
                identity = wait(initializing) => {
                    self.initializing = None;
                    self.initialized(identity);
                }
                () = shared.work.notified() => {}
                changed = status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
            if self.last_expiry.elapsed() >= self.expiry_interval() {
                self.expire();
            }
        }
    }

    /// Sends all that may be sent.
    fn send(&mut self, session: &Session) {
        self.shared.learn_limits(&session.welcome);
        let (max_in_flight, now) = (self.shared.settings.max_in_flight, Instant::now());
        if self.initializing.is_none() && self.shared.accumulator.lock().needs_identity() {
            self.initializing = Some(Box::pin(init_producer(self.client.clone())));
        }
        let max_bytes = REQUEST_BYTES.min(session.welcome.max_frame_bytes as usize / 2);
        while self.in_flight.len() < max_in_flight {
            let taken = {
                let mut accumulator = self.shared.accumulator.lock();
                accumulator.wake_delayed(now);
                accumulator.take(now, max_bytes, max_in_flight)
            };
            let Some(oldest) = taken.iter().map(|sent| sent.outbound.created).min() else { return };
            // A broker that is alive but does not answer must not hold records for ever.
            let late = oldest + self.shared.settings.delivery_timeout;
            let patience = late.saturating_duration_since(now).max(Duration::from_millis(1));
            match self.request(&taken) {
                Ok(answer) => self.in_flight.push(Box::pin(async move {
                    let answer = tokio::time::timeout(patience, receive(answer)).await;
                    (taken, answer.unwrap_or(Err(Error::Timeout("delivering a record"))))
                })),
                Err(error) => {
                    let lost = error == Error::Disconnected;
                    self.act(taken, Err(error));
                    if lost {
                        // The change of the connection's status wakes the sender.
                        return;
                    }
                }
            }
        }
    }

    fn request(&self, batches: &[Sent]) -> Result<crate::link::InFlight> {
        let level = message::Level::from(self.shared.settings.level);
        let entries = {
            let accumulator = self.shared.accumulator.lock();
            let entry = |sent: &Sent| {
                let (topic_id, partition) = accumulator.target(sent.lane)?;
                let length = u32::try_from(sent.outbound.bytes.len()).ok()?;
                Some(message::ProduceEntry { topic_id, partition, length })
            };
            batches.iter().map(entry).collect::<Option<Vec<_>>>().ok_or(Error::Closed)?
        };
        let request = message::Produce { level: level.into(), entries };
        let payload = batches.iter().map(|sent| sent.outbound.bytes.clone()).collect();
        self.client.link.send(Api::Produce, &request, payload)
    }

    // ---- Answers ----

    fn act(&self, sent: Vec<Sent>, answer: Answer) {
        let alone = sent.len() == 1;
        let outcomes: Vec<Outcome> = match answer {
            Ok((reply, _)) if reply.results.len() == sent.len() => {
                let outcome = |result: message::ProduceResult| match result.error {
                    None => Outcome::Appended(result.base_offset),
                    Some(error) => Outcome::of_batch(error.into()),
                };
                reply.results.into_iter().map(outcome).collect()
            }
            Ok(_) => {
                let error = Error::Protocol("a produce answer of another length".to_owned());
                sent.iter().map(|_| Outcome::Refused(error.clone())).collect()
            }
            Err(error) => sent.iter().map(|_| Outcome::of_request(error.clone(), alone)).collect(),
        };
        let mut permits = 0;
        {
            let now = Instant::now();
            let mut accumulator = self.shared.accumulator.lock();
            for (sent, outcome) in sent.into_iter().zip(outcomes) {
                // The lane may want to change the bytes: they are its own again.
                let Sent { lane, outbound } = sent;
                let serial = outbound.serial;
                drop(outbound);
                if let Outcome::Refused(error) = &outcome
                    && matches!(error.code(), Some(ErrorCode::UnknownTopic | ErrorCode::UnknownPartition))
                {
                    if let Some((topic_id, _)) = accumulator.target(lane) {
                        self.client.forget_id(&topic_id);
                    }
                    accumulator.gone(lane);
                }
                permits += accumulator.answered(lane, |lane| match outcome {
                    Outcome::Appended(base_offset) => lane.acknowledged(serial, base_offset),
                    Outcome::Unknown => lane.returned(serial, true, false),
                    Outcome::Isolate => lane.returned(serial, false, true),
                    Outcome::Postponed(error) => lane.postponed(serial, &error, now),
                    Outcome::OutOfSequence(error) => lane.out_of_sequence(serial, error, now),
                    Outcome::Refused(error) => lane.refused(serial, error),
                });
            }
        }
        self.shared.buffer.add_permits(permits);
    }

    fn initialized(&mut self, identity: Result<Identity>) {
        match identity {
            Ok(identity) => {
                self.init_backoff = Backoff::default();
                self.shared.accumulator.lock().set_identity(identity);
            }
            Err(error) if error.retryable() => {
                tracing::debug!(%error, "no producer id yet");
                let (pause, client) = (self.init_backoff.next_after(&error), self.client.clone());
                self.initializing = Some(Box::pin(async move {
                    tokio::time::sleep(pause).await;
                    init_producer(client).await
                }));
            }
            Err(error) => {
                let permits = self.shared.accumulator.lock().fail_without_identity(&error);
                self.shared.buffer.add_permits(permits);
            }
        }
    }

    // ---- Time ----

    /// How often records are looked at for their age.
    fn expiry_interval(&self) -> Duration {
        (self.shared.settings.delivery_timeout / 10).clamp(Duration::from_millis(5), Duration::from_secs(1))
    }

    fn pause(&self) -> Duration {
        let accumulator = self.shared.accumulator.lock();
        if accumulator.is_empty() {
            return IDLE;
        }
        let next_attempt = accumulator.next_attempt().map(|at| at.saturating_duration_since(Instant::now()));
        next_attempt.unwrap_or(IDLE).clamp(Duration::from_millis(1), self.expiry_interval())
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.last_expiry = now;
        let permits = self.shared.accumulator.lock().expire(now, self.shared.settings.delivery_timeout);
        self.shared.buffer.add_permits(permits);
    }
}

/// What an answer means for one batch.
enum Outcome {
    Appended(u64),
    /// The broker may have it.
    Unknown,
    /// The request was refused for one of its batches.
    Isolate,
    Postponed(Error),
    OutOfSequence(Error),
    Refused(Error),
}

impl Outcome {
    fn of_batch(error: Error) -> Self {
        match error.code() {
            Some(ErrorCode::Timeout | ErrorCode::Stopping) => Self::Unknown,
            Some(ErrorCode::OutOfOrderSequence | ErrorCode::UnknownProducer | ErrorCode::ProducerFenced) => {
                Self::OutOfSequence(error)
            }
            Some(code) if code.retryable() => Self::Postponed(error),
            _ => Self::Refused(error),
        }
    }

    fn of_request(error: Error, alone: bool) -> Self {
        match &error {
            Error::Disconnected | Error::Timeout(_) | Error::Connect(_) => Self::Unknown,
            // Checked before anything is appended.
            Error::Broker { code, .. }
                if !alone
                    && !code.retryable()
                    && !matches!(code, ErrorCode::Internal | ErrorCode::ReadOnly | ErrorCode::Unknown) =>
            {
                Self::Isolate
            }
            Error::Record(_) if !alone => Self::Isolate,
            _ => Self::of_batch(error),
        }
    }
}

async fn init_producer(client: Client) -> Result<Identity> {
    let request = message::InitProducer {};
    let (reply, _): (message::InitProducerReply, _) =
        client.link.ask(Api::InitProducer, &request, Vec::new()).await?;
    let unfit = |_| Error::Protocol("a producer id out of range".to_owned());
    let producer_id = i64::try_from(reply.producer_id).map_err(unfit)?;
    let epoch = i16::try_from(reply.producer_epoch).map_err(unfit)?;
    Ok(Identity { producer_id, epoch })
}

async fn wait<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
