//! The relay: publishes the outbox's `OrderCreated` events and marks them as published.
//!
//! It works in rounds. A round takes the oldest unpublished event of every customer, publishes them all at once, waits
//! for every acknowledgement, and marks what was acknowledged. So an event is never on its way before its customer's
//! previous one is acknowledged, and even a failed send cannot let a later purchase overtake an earlier one.
//!
//! Crash windows:
//! - *before the publish*: the row waits and is published after the restart;
//! - *between publish and mark*: the row is published again. The second copy has the same event id, follows the first
//!   in the same partition, and changes nothing: payment recognises the order, email the event;
//! - *after the mark*: nothing is left to do.

use std::sync::Arc;
use std::time::Duration;

use felucca_client::{Client, Producer};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::store::{Store, Waiting};
use crate::events::TraceParent;
use crate::topology;

/// Events of one round at most.
const ROUND: u32 = 512;
/// The bell only makes the relay quick; this makes it sure.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs until `stop`; a round that has begun is finished.
pub(crate) async fn run(
    client: &Client,
    store: &Store,
    outbox: Arc<Notify>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let producer = client.producer().build().await?;
    while !stop.is_cancelled() {
        let round = store.waiting(ROUND).await?;
        if round.is_empty() {
            tokio::select! {
                () = outbox.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => {}
            }
            continue;
        }
        let published = publish(&producer, round).await?;
        if published.is_empty() {
            // Nothing came through: the rows are still there, and trying at once again would only add to the trouble.
            tokio::time::sleep(LOOK_EVERY).await;
        } else {
            store.mark_published(published).await?;
        }
    }
    Ok(())
}

/// Publishes a round and returns the rows that were acknowledged, with where they are.
async fn publish(producer: &Producer, round: Vec<Waiting>) -> anyhow::Result<Vec<(i64, u32, u64)>> {
    let mut on_their_way = Vec::with_capacity(round.len());
    for row in round {
        let trace = TraceParent::parse(&row.trace_parent).unwrap_or_else(TraceParent::generate);
        let record = row.order.created_event(trace).to_record(topology::ORDERS)?;
        match producer.enqueue(record).await {
            Ok(pending) => on_their_way.push((row.sequence, pending)),
            Err(error) => tracing::warn!(%error, order = %row.order.id, "could not enqueue, will try again"),
        }
    }
    let mut published = Vec::with_capacity(on_their_way.len());
    for (sequence, pending) in on_their_way {
        match pending.await {
            Ok(ack) => published.push((sequence, ack.partition, ack.offset)),
            Err(error) => tracing::warn!(%error, sequence, "could not publish, will try again"),
        }
    }
    Ok(published)
}
