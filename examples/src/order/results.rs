//! Takes in how payments ended and settles the orders: confirmed, cancelled (the saga's compensation), or dead-lettered.
//!
//! The service reads `payments` and `dlq.payment.orders` as consumer group `order`: in order, many records at a time,
//! one database transaction for each gulp, then a commit of the positions.
//!
//! Crash windows:
//! - *before the transaction's commit*: the records are read again and settle the orders then;
//! - *between the transaction and the commit of the positions*: the records are read again and change nothing, because
//!   an order that is settled stays so;
//! - *after the commit of the positions*: nothing is left to do.

use felucca_client::{Client, ConsumedRecord, Consumer, Start};
use futures::FutureExt as _;
use tokio_util::sync::CancellationToken;

use super::store::{Settled, Settlement, Status, Store};
use crate::events::{self, Envelope, Event};
use crate::topology;

/// Records that share a transaction at most.
const GULP: usize = 512;

/// Runs until `stop`.
pub(crate) async fn run(
    client: &Client,
    store: &Store,
    member: &str,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut consumer = client
        .consumer()
        .group(topology::ORDER_GROUP)
        .topics([topology::PAYMENTS, topology::DEAD_LETTERS])
        .start(Start::Beginning)
        .auto_commit(None)
        .member_id(member)
        .build()
        .await?;
    loop {
        let records = tokio::select! {
            records = gulp(&mut consumer) => records?,
            () = stop.cancelled() => break,
        };
        settle(store, &records).await?;
        if let Err(error) = consumer.commit().await {
            // The next commit covers these positions too; until then they would be read again.
            tracing::warn!(%error, "could not commit positions");
        }
    }
    consumer.close().await?;
    Ok(())
}

/// The next record, and all that are there already.
async fn gulp(consumer: &mut Consumer) -> anyhow::Result<Vec<ConsumedRecord>> {
    let mut records = Vec::new();
    while records.len() < GULP {
        let next = match records.is_empty() {
            true => consumer.next().await,
            false => match consumer.next().now_or_never() {
                Some(next) => next,
                None => break,
            },
        };
        match next {
            Some(Ok(record)) => records.push(record),
            Some(Err(error)) if error.retryable() => tracing::warn!(%error, "reading payment results"),
            Some(Err(error)) => return Err(error.into()),
            None => anyhow::bail!("the consumer of payment results has ended"),
        }
    }
    Ok(records)
}

async fn settle(store: &Store, records: &[ConsumedRecord]) -> anyhow::Result<()> {
    let settlements: Vec<Settlement> = records.iter().filter_map(settlement).collect();
    let outcomes = store.settle(settlements.clone(), events::now()).await?;
    for (settlement, outcome) in settlements.iter().zip(outcomes) {
        match outcome {
            Settled::Applied => {}
            Settled::Repeated => tracing::info!(order = %settlement.order_id, "a result came again"),
            Settled::Refused => tracing::error!(?settlement, "a result does not fit its order"),
        }
    }
    Ok(())
}

/// What a record says about an order; nothing, with a log line, when it is none of ours.
fn settlement(record: &ConsumedRecord) -> Option<Settlement> {
    let envelope = match Envelope::from_record(record) {
        Ok(envelope) => envelope,
        Err(error) => {
            let (topic, partition, offset) = (&record.topic, record.partition, record.offset);
            tracing::error!(%error, %topic, partition, offset, "a record that is not an event is passed over");
            return None;
        }
    };
    let order_id = envelope.event.order_id();
    let (status, reason) = match envelope.event {
        Event::PaymentProcessed(_) => (Status::Confirmed, None),
        Event::PaymentFailed(failed) => (Status::Cancelled, Some(failed.reason)),
        // In the dead-letter topic: the order that payment could not deal with.
        Event::OrderCreated(_) => (Status::DeadLettered, Some(dead_letter_reason(record))),
    };
    Some(Settlement { order_id, status, reason })
}

fn dead_letter_reason(record: &ConsumedRecord) -> String {
    let text = |name| record.header(name).map(String::from_utf8_lossy);
    match (text("__dlq.errors.class"), text("__dlq.errors.message")) {
        (Some(class), Some(message)) => format!("{class}: {message}"),
        (Some(one), None) | (None, Some(one)) => one.into_owned(),
        (None, None) => "dead-lettered".to_owned(),
    }
}
