//! The outcome of a batch, shared by the acknowledgements of its records: one allocation a batch, not a record.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use super::{Ack, Level};
use crate::error::{Error, Result};

/// Set once: the batch's base offset, or why it failed.
#[derive(Debug)]
pub(super) struct Completion {
    topic: Arc<str>,
    partition: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Result<u64>>,
    /// One per record that is being awaited.
    wakers: Vec<(u32, Waker)>,
}

impl Completion {
    pub(super) fn new(topic: Arc<str>, partition: u32) -> Arc<Self> {
        Arc::new(Self { topic, partition, state: Mutex::default() })
    }

    pub(super) fn complete(&self, outcome: Result<u64>) {
        let wakers = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome);
            std::mem::take(&mut state.wakers)
        };
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.complete(Err(Error::Closed));
    }
}

/// A place in a batch.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) completion: Arc<Completion>,
    pub(super) index: u32,
}

impl Slot {
    pub(super) fn into_pending(self, level: Level, timestamp: i64) -> PendingAck {
        PendingAck { completion: self.completion, index: self.index, level, timestamp }
    }
}

/// The acknowledgement of one record, to come. Dropping it does not take the record back.
#[derive(Debug)]
#[must_use = "a record can fail; await its acknowledgement or flush the producer"]
pub struct PendingAck {
    completion: Arc<Completion>,
    index: u32,
    level: Level,
    timestamp: i64,
}

impl Future for PendingAck {
    type Output = Result<Ack>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.completion.state.lock();
        match &state.outcome {
            Some(Ok(base_offset)) => Poll::Ready(Ok(Ack {
                topic: self.completion.topic.clone(),
                partition: self.completion.partition,
                offset: base_offset + u64::from(self.index),
                timestamp: self.timestamp,
                level: self.level,
            })),
            Some(Err(error)) => Poll::Ready(Err(error.clone())),
            None => {
                match state.wakers.iter_mut().find(|(index, _)| *index == self.index) {
                    Some((_, waker)) => waker.clone_from(context.waker()),
                    None => state.wakers.push((self.index, context.waker().clone())),
                }
                Poll::Pending
            }
        }
    }
}
