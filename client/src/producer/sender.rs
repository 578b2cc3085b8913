//! The sender: takes batches, sends them, and acts on the answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};
use futures::stream::{FuturesUnordered, StreamExt};

use super::accumulator::{Batch, Key};
use super::{Level, Shared};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::link::receive;

/// Batches of several partitions ride together up to this size.
const REQUEST_BYTES: usize = 1 << 20;
/// Produce requests in flight.
const MAX_REQUESTS: usize = 8;
const RETRY_AFTER: Duration = Duration::from_millis(50);

struct Sent {
    batches: Vec<(Key, Batch)>,
    answer: Result<(message::ProduceReply, Bytes)>,
}

pub(super) async fn run(client: Client, shared: Arc<Shared>) {
    let mut in_flight = FuturesUnordered::new();
    loop {
        if shared.accumulator.lock().needs_identity() {
            match init_producer(&client).await {
                Ok((producer_id, epoch)) => shared.accumulator.lock().give_identity(producer_id, epoch),
                Err(error) => {
                    tracing::debug!(%error, "no producer id yet");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
        while in_flight.len() < MAX_REQUESTS {
            let max_in_flight = shared.settings.max_in_flight;
            let taken = shared.accumulator.lock().take(Instant::now(), REQUEST_BYTES, max_in_flight);
            let batches = expire(&shared, taken);
            if batches.is_empty() {
                break;
            }
            in_flight.push(send(&client, shared.settings.level, batches));
        }
        let next_attempt = shared.accumulator.lock().next_attempt();
        let pause =
            next_attempt.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        tokio::select! {
            biased;
            Some(sent) = in_flight.next(), if !in_flight.is_empty() => act(&client, &shared, sent),
            () = shared.work.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn init_producer(client: &Client) -> Result<(i64, i16)> {
    let request = message::InitProducer {};
    let (reply, _): (message::InitProducerReply, _) =
        client.link.ask_until(Api::InitProducer, &request, Vec::new()).await?;
    let producer_id =
        i64::try_from(reply.producer_id).map_err(|_| Error::Protocol("producer id".to_owned()))?;
    let epoch =
        i16::try_from(reply.producer_epoch).map_err(|_| Error::Protocol("producer epoch".to_owned()))?;
    Ok((producer_id, epoch))
}

/// Fails what has been tried for too long; answers the rest.
fn expire(shared: &Shared, taken: Vec<(Key, Batch)>) -> Vec<(Key, Batch)> {
    let (late, batches): (Vec<_>, Vec<_>) =
        taken.into_iter().partition(|(_, batch)| batch.created.elapsed() > shared.settings.delivery_timeout);
    for (key, batch) in late {
        fail(shared, &key, &batch, &Error::Timeout("delivering a record"));
    }
    batches
}

async fn send(client: &Client, level: Level, batches: Vec<(Key, Batch)>) -> Sent {
    let level = match level {
        Level::Synced => message::Level::Synced,
        Level::Written => message::Level::Written,
    };
    let entries = batches.iter().map(|((topic_id, partition), batch)| message::ProduceEntry {
        topic_id: topic_id.clone(),
        partition: *partition,
        length: u32::try_from(batch.bytes.len()).unwrap_or(u32::MAX),
    });
    let request = message::Produce { level: level.into(), entries: entries.collect() };
    let payload = batches.iter().map(|(_, batch)| batch.bytes.clone()).collect();
    // Waits for a connection, then for the answer; a broker that is silent for a session ends the connection and so this.
    let answer = match client.link.connected(client.link.request_timeout()).await {
        Ok(_) => match client.link.send(Api::Produce, &request, payload) {
            Ok(answer) => receive(answer).await,
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    Sent { batches, answer }
}

fn act(client: &Client, shared: &Shared, sent: Sent) {
    let results = match sent.answer {
        Ok((reply, _)) if reply.results.len() == sent.batches.len() => reply.results,
        Ok(_) => {
            let error = Error::Protocol("a produce answer of another length".to_owned());
            return sent
                .batches
                .into_iter()
                .for_each(|(key, batch)| settle(client, shared, key, batch, Err(error.clone())));
        }
        Err(error) => {
            return sent
                .batches
                .into_iter()
                .for_each(|(key, batch)| settle(client, shared, key, batch, Err(error.clone())));
        }
    };
    for ((key, batch), result) in sent.batches.into_iter().zip(results) {
        let outcome = match result.error {
            None => Ok(result.base_offset),
            Some(error) => Err(Error::from(error)),
        };
        settle(client, shared, key, batch, outcome);
    }
}

fn settle(client: &Client, shared: &Shared, key: Key, batch: Batch, outcome: Result<u64>) {
    match outcome {
        Ok(base_offset) => {
            let mut accumulator = shared.accumulator.lock();
            let permits = accumulator.acknowledged(&key, &batch, base_offset);
            let empty = accumulator.is_empty();
            drop(accumulator);
            shared.buffer.add_permits(permits);
            if empty {
                shared.idle.notify_waiters();
            }
        }
        Err(error) => {
            let gap = error.code() == Some(ErrorCode::OutOfOrderSequence)
                && shared.accumulator.lock().follows_returned(&key, &batch);
            if error.retryable() || gap {
                shared.accumulator.lock().returned(&key, batch, Instant::now() + RETRY_AFTER);
            } else {
                if error.code() == Some(ErrorCode::UnknownTopic) {
                    client.forget_id(&key.0);
                }
                fail(shared, &key, &batch, &error);
            }
        }
    }
}

fn fail(shared: &Shared, key: &Key, batch: &Batch, error: &Error) {
    let mut accumulator = shared.accumulator.lock();
    let permits = accumulator.failed(key, batch, error);
    let empty = accumulator.is_empty();
    drop(accumulator);
    shared.buffer.add_permits(permits);
    if empty {
        shared.idle.notify_waiters();
    }
}
