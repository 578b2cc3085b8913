//! Gaps in a partition: offsets are given once and ascend, but not every offset has a record.

use felucca_protocol::{Api, batch, message};

use crate::admin::Admin;
use crate::error::Result;

impl Admin {
    /// Offset of the first record of a partition at or after `offset`; `None` when no such record is visible. Offsets have gaps
    /// where records were left out, also before the high watermark.
    ///
    /// # Errors
    /// Topic or partition is unknown, `offset` is below the log start or above the high watermark.
    pub async fn next_offset(&self, topic: &str, partition: u32, offset: u64) -> Result<Option<u64>> {
        let topic_id = self.client.topic(topic).await?.id;
        let mut position = offset;
        loop {
            let request = message::Fetch {
                topic_id: topic_id.clone(),
                partition,
                offset: position,
                max_bytes: 1,
                max_wait_ms: 0,
            };
            let (_, payload): (message::FetchReply, _) =
                self.client.link.ask_until(Api::Fetch, &request, Vec::new()).await?;
            let from = position;
            for batch in batch::split(&payload) {
                let batch = batch?;
                let header = batch::check(&batch)?;
                for record in batch::records(&batch)? {
                    let found = record?.offset;
                    if found >= offset {
                        return Ok(Some(found));
                    }
                }
                position = position.max(header.last_offset() + 1);
            }
            if position == from {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use felucca_protocol::frame::Kind;

    use super::*;
    use crate::testing::{FakeBroker, numbered, soon};

    #[tokio::test]
    async fn a_gap_before_the_high_watermark_is_told_from_records_to_come() {
        let broker = FakeBroker::start().await;
        let (client, mut connection) = broker.client().await;
        // Offsets 10 to 14, of which 13 and 14 have no record any more; nothing up to the high watermark, 20.
        let batch = batch::filter(&numbered(10..15), &[10, 11, 12]).unwrap();
        let mut known = false;
        for (offset, found, fetches) in [(4, Some(10), 1), (11, Some(11), 1), (13, None, 2), (15, None, 1)] {
            let admin = client.admin();
            let asking = tokio::spawn(async move { admin.next_offset("t", 0, offset).await });
            if !std::mem::replace(&mut known, true) {
                connection.metadata("t", 1).await;
            }
            for _ in 0..fetches {
                let asked = connection.expect::<message::Fetch>(Api::Fetch).await;
                let payload = if asked.message.offset <= 14 { &batch[..] } else { &[] };
                let reply = message::FetchReply { log_start: 0, high_watermark: 20 };
                connection.send(Kind::Reply, Api::Fetch, asked.correlation, &reply, payload).await;
            }
            assert_eq!(soon(asking).await.unwrap().unwrap(), found, "from {offset}");
        }
    }
}
