//! Acknowledging a record and appending outputs, both or neither.

use std::collections::BTreeMap;

use bytes::Bytes;
use felucca_protocol::batch::{BatchBuilder, HEADER_LEN};
use felucca_protocol::partitioner::partition_for_key;
use felucca_protocol::{Api, ErrorCode, message};
use tokio::time::Instant;

use super::delivery::{Lease, SettleResult};
use super::settler::{Core, PATIENCE, understood};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::record::{Record, now_ms};

/// Outputs as they go over the wire.
struct Outputs {
    entries: Vec<message::ProduceEntry>,
    payload: Vec<Bytes>,
}

/// Completes a record, repeated over reconnects. The record is given up when this returns without an error; otherwise the
/// caller still has to settle it.
pub(super) async fn complete(core: &Core, lease: &Lease, records: &[Record]) -> Result<SettleResult> {
    core.leases.set_settling(lease, true);
    let result = try_complete(core, lease, records).await;
    match &result {
        Ok(_) => core.let_go([lease]),
        Err(_) => core.leases.set_settling(lease, false),
    }
    result
}

async fn try_complete(core: &Core, lease: &Lease, records: &[Record]) -> Result<SettleResult> {
    let mut encoded = None;
    let deadline = Instant::now() + PATIENCE;
    let mut backoff = Backoff::default();
    let (mut repeated, mut renewed) = (false, false);
    loop {
        match ask(core, lease, records, &mut encoded).await {
            Ok(reply) => {
                let result =
                    reply.result.ok_or_else(|| Error::Protocol("an answer without result".to_owned()))?;
                return Ok(understood(SettleResult::from_message(&result), repeated));
            }
            // A topic of that name may have been made anew.
            Err(error) if error.code() == Some(ErrorCode::UnknownTopic) && !renewed => {
                renewed = true;
                for entry in encoded.take().into_iter().flat_map(|outputs: Outputs| outputs.entries) {
                    core.client.forget_id(&entry.topic_id);
                }
            }
            Err(error) if error.retryable() && Instant::now() < deadline => {
                repeated = true;
                backoff.wait_after(&error).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Asks once. The outputs are encoded when they are not yet: that too may need the broker.
async fn ask(
    core: &Core,
    lease: &Lease,
    records: &[Record],
    encoded: &mut Option<Outputs>,
) -> Result<message::CompleteReply> {
    let outputs = match encoded {
        Some(outputs) => outputs,
        None => encoded.insert(encode(&core.client, lease, records).await?),
    };
    let request = message::Complete {
        group: core.group.clone(),
        member_id: core.member_id.clone(),
        lease: Some(lease.to_message()),
        outputs: outputs.entries.clone(),
    };
    let (reply, _) = core.client.link.ask(Api::Complete, &request, outputs.payload.clone()).await?;
    Ok(reply)
}

async fn encode(client: &Client, lease: &Lease, records: &[Record]) -> Result<Outputs> {
    let limit = client.link.session().map_or(usize::MAX, |session| session.welcome.max_record_bytes as usize);
    let mut builders: BTreeMap<(Bytes, u32), BatchBuilder> = BTreeMap::new();
    for record in records {
        let bytes = record.content_bytes();
        if bytes > limit {
            return Err(Error::Record(format!("{bytes} bytes are over the broker's limit of {limit} bytes")));
        }
        let topic = client.topic(&record.topic).await?;
        let partition = match (record.partition, &record.key) {
            (Some(partition), _) if partition >= topic.partitions => {
                return Err(Error::Record(format!("topic {:?} has no partition {partition}", &*topic.name)));
            }
            (Some(partition), _) => partition,
            (None, Some(key)) => partition_for_key(key, topic.partitions),
            // Any will do; this one spreads them.
            (None, None) => (lease.offset % u64::from(topic.partitions.max(1))) as u32,
        };
        let builder = builders.entry((topic.id, partition)).or_default();
        let timestamp = record.timestamp.unwrap_or_else(now_ms);
        builder
            .push(timestamp, record.key.as_deref(), record.value.as_deref(), &record.header_slices())
            .map_err(|error| Error::Record(error.to_string()))?;
    }
    let limit = client.link.session().map_or(usize::MAX, |session| session.welcome.max_batch_bytes as usize);
    let mut outputs = Outputs { entries: Vec::new(), payload: Vec::new() };
    for ((topic_id, partition), builder) in builders {
        let batch = builder.finish().freeze();
        if batch.len() > limit {
            let bytes = batch.len() - HEADER_LEN;
            let why = format!(
                "{bytes} bytes of outputs for one partition are over the broker's limit of {limit} bytes"
            );
            return Err(Error::Record(why));
        }
        let length = u32::try_from(batch.len()).map_err(|_| Error::Record("too many outputs".to_owned()))?;
        outputs.entries.push(message::ProduceEntry { topic_id, partition, length });
        outputs.payload.push(batch);
    }
    Ok(outputs)
}
