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
    /// One per future that waits, at the place that it remembers.
    wakers: Vec<Waker>,
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
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The outcome, or `None` after noting whom to wake. `place` is the caller's own, `None` at first.
    fn poll(&self, place: &mut Option<usize>, context: &Context<'_>) -> Poll<Result<u64>> {
        let mut state = self.state.lock();
        if let Some(outcome) = &state.outcome {
            return Poll::Ready(outcome.clone());
        }
        match *place {
            Some(place) => state.wakers[place].clone_from(context.waker()),
            None => {
                *place = Some(state.wakers.len());
                state.wakers.push(context.waker().clone());
            }
        }
        Poll::Pending
    }

    /// Waits until the batch is acknowledged or has failed.
    pub(super) async fn ended(&self) {
        let mut place = None;
        // The outcome is for those who wait for their records.
        let _outcome = std::future::poll_fn(|context| self.poll(&mut place, context)).await;
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
        PendingAck { completion: self.completion, index: self.index, level, timestamp, place: None }
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
    /// Of its waker, once it waits.
    place: Option<usize>,
}

impl Future for PendingAck {
    type Output = Result<Ack>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        this.completion.poll(&mut this.place, context).map_ok(|base_offset| Ack {
            topic: this.completion.topic.clone(),
            partition: this.completion.partition,
            offset: base_offset + u64::from(this.index),
            timestamp: this.timestamp,
            level: this.level,
        })
    }
}
