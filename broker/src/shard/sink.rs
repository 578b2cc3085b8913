//! Where answers go: from the shard back to whoever asked.
//!
//! A listener gives each request a [`Responder`]: its connection's [`Sink`], the request's [`Token`] and the bytes that
//! were admitted for it. The shard thread and the sync thread only queue answers at sinks and wake each sink at most
//! once per batch of answers ([`Wakes`]); encoding and writing are the connection's own work.
//!
//! Invariants: every responder is answered exactly once; one that is dropped answers that the broker is stopping.

use std::fmt;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::engine::effect::{Delivery, Reply};
use crate::engine::error::EngineError;
use crate::engine::types::SubscriptionId;

use super::admission::Admission;

/// Names a request at its listener: given back with the answer, and of no meaning in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    pub correlation: u64,
    /// What the listener needs to know in order to encode the answer, say the kind of request.
    pub tag: u8,
}

/// A reply on its way to a connection. Dropping it, once it is written, gives its admitted bytes back.
#[derive(Debug)]
pub struct Answer {
    pub token: Token,
    pub reply: Reply,
    pub origin: Option<Arc<Origin>>,
}

/// A connection, or whatever else waits for answers. Calls only queue; they never block and never fail: what comes for a
/// connection that is gone is dropped.
///
/// The queueing calls return true when the owner may be asleep and nothing has woken it for what it has queued: then
/// [`Sink::wake`] must follow.
pub trait Sink: Send + Sync + fmt::Debug {
    /// Queues the answer to a request.
    fn answer(&self, answer: Answer) -> bool;

    /// Queues leased records of a share subscription.
    fn deliver(&self, delivery: Delivery) -> bool;

    /// Queues word that the broker ended a share subscription.
    fn ended(&self, subscription: SubscriptionId, error: EngineError) -> bool;

    /// Wakes the owner.
    fn wake(&self);
}

/// What requests that arrived together have in common: their connection, and the bytes admitted for all of them.
pub struct Origin {
    sink: Arc<dyn Sink>,
    /// Given back when the last of the requests has been answered and its answer written.
    _admission: Option<Admission>,
}

impl Origin {
    /// Requests of `sink`, holding `admission` until the last of their answers has been written.
    pub fn new(sink: Arc<dyn Sink>, admission: Option<Admission>) -> Arc<Self> {
        Arc::new(Self { sink, _admission: admission })
    }

    pub(crate) fn sink(&self) -> &Arc<dyn Sink> {
        &self.sink
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin").finish_non_exhaustive()
    }
}

/// The duty to answer one request.
#[derive(Debug)]
pub struct Responder {
    origin: Option<Arc<Origin>>,
    token: Token,
}

impl Responder {
    pub fn new(origin: &Arc<Origin>, token: Token) -> Self {
        Self { origin: Some(origin.clone()), token }
    }

    /// Where the answer will go.
    pub(crate) fn sink(&self) -> Option<&Arc<dyn Sink>> {
        self.origin.as_ref().map(|origin| origin.sink())
    }

    /// Queues the answer and notes whom to wake.
    pub(crate) fn answer(mut self, reply: Reply, wakes: &mut Wakes) {
        if let Some(origin) = self.origin.take() {
            let sink = origin.sink.clone();
            if sink.answer(Answer { token: self.token, reply, origin: Some(origin) }) {
                wakes.add(sink);
            }
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(origin) = self.origin.take() {
            let sink = origin.sink.clone();
            let reply = Reply::Error(EngineError::Stopping);
            if sink.answer(Answer { token: self.token, reply, origin: Some(origin) }) {
                sink.wake();
            }
        }
    }
}

/// The sinks to wake at the end of a batch of answers, each once.
#[derive(Debug, Default)]
pub(crate) struct Wakes(Vec<Arc<dyn Sink>>);

impl Wakes {
    pub(crate) fn add(&mut self, sink: Arc<dyn Sink>) {
        self.0.push(sink);
    }

    pub(crate) fn wake_all(&mut self) {
        for sink in self.0.drain(..) {
            sink.wake();
        }
    }
}

/// Sink of one request: its answer ends a future.
#[derive(Debug)]
pub(crate) struct Once(parking_lot::Mutex<Option<oneshot::Sender<Reply>>>);

impl Once {
    /// A responder, and the future of its answer.
    pub(crate) fn channel() -> (Responder, oneshot::Receiver<Reply>) {
        let (sender, receiver) = oneshot::channel();
        let origin = Origin::new(Arc::new(Self(parking_lot::Mutex::new(Some(sender)))), None);
        (Responder::new(&origin, Token { correlation: 0, tag: 0 }), receiver)
    }
}

impl Sink for Once {
    fn answer(&self, answer: Answer) -> bool {
        if let Some(sender) = self.0.lock().take() {
            // Nobody waits any more: the answer is of no use.
            let _ = sender.send(answer.reply);
        }
        false
    }

    fn deliver(&self, _: Delivery) -> bool {
        false
    }

    fn ended(&self, _: SubscriptionId, _: EngineError) -> bool {
        false
    }

    fn wake(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dropped_responder_answers_that_the_broker_is_stopping() {
        let (responder, answer) = Once::channel();
        drop(responder);
        assert_eq!(answer.await.unwrap(), Reply::Error(EngineError::Stopping));
    }

    #[tokio::test]
    async fn an_answer_is_given_once() {
        let (responder, answer) = Once::channel();
        let mut wakes = Wakes::default();
        responder.answer(Reply::Done, &mut wakes);
        wakes.wake_all();
        assert_eq!(answer.await.unwrap(), Reply::Done);
    }
}
