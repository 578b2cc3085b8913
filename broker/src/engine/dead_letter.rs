//! Dead letters: the record as it was, byte for byte, with headers that say why it is here.
//!
//! Header names: the first six are those of Kafka's share groups (KIP-1191), the rest follow their prefix. All values are
//! UTF-8 text.

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{BatchBuilder, BatchError, Record};

use super::types::TopicId;

/// What every dead-letter header begins with.
pub const PREFIX: &str = "__dlq.errors.";
/// How often the record was redriven; kept on the redriven record, so that a loop is seen.
pub const REDRIVE_COUNT: &str = "redrive.count";

/// `topic/partition/offset` of the record that it was at first; kept on the redriven record, so that the message keeps its name.
pub const ORIGIN: &str = "origin";

/// What became of the record in the group that gave it up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetterContext {
    pub group: String,
    pub topic: TopicId,
    pub partition: u32,
    pub offset: u64,
    pub deliveries: u32,
    pub failures: u32,
    /// `max_failures`, `max_deliveries`, `rejected`, `lease_expired` or `member_lost`.
    pub reason: &'static str,
    pub class: String,
    pub message: String,
    pub detail: String,
    /// Unix milliseconds, as the following.
    pub first_delivery_ms: i64,
    pub last_delivery_ms: i64,
    /// Member that held it last.
    pub consumer: String,
    pub wall_ms: i64,
}

/// The dead letter of `record`, as a batch of one. `topic_name` is the name of the context's topic.
pub fn build(record: &Record, context: &DeadLetterContext, topic_name: &str) -> Result<BytesMut, BatchError> {
    let text = |name: &str, value: String| (format!("{PREFIX}{name}"), value);
    let place = format!("{topic_name}/{}/{}", context.partition, context.offset);
    let id = format!("{}/{place}", context.group);
    let mut added = vec![
        text("topic", topic_name.to_owned()),
        text("partition", context.partition.to_string()),
        text("offset", context.offset.to_string()),
        text("group", context.group.clone()),
        text("delivery.count", context.deliveries.to_string()),
        text("message", context.message.clone()),
        text("id", id),
        text("timestamp", record.timestamp.to_string()),
        text("reason", context.reason.to_owned()),
        text("class", context.class.clone()),
        text("failure.count", context.failures.to_string()),
        text("first.delivery.ms", context.first_delivery_ms.to_string()),
        text("last.delivery.ms", context.last_delivery_ms.to_string()),
        text("consumer", context.consumer.clone()),
        text(REDRIVE_COUNT, redrive_count(record).to_string()),
        text(ORIGIN, origin(record).unwrap_or(place)),
    ];
    if !context.detail.is_empty() {
        added.push(text("detail", context.detail.clone()));
    }
    let mut headers = original_headers(record);
    headers.extend(added.iter().map(|(name, value)| (name.as_str(), Some(value.as_bytes()))));
    rebuilt(record, context.wall_ms, &headers)
}

/// The record that a redrive appends: the original, with nothing but the redrive count and its first place added.
pub fn redriven(letter: &Record, wall_ms: i64) -> Result<BytesMut, BatchError> {
    let count = (redrive_count(letter) + 1).to_string();
    let mut added = vec![(format!("{PREFIX}{REDRIVE_COUNT}"), count)];
    added.extend(origin(letter).map(|origin| (format!("{PREFIX}{ORIGIN}"), origin)));
    let mut headers = original_headers(letter);
    headers.extend(added.iter().map(|(name, value)| (name.as_str(), Some(value.as_bytes()))));
    rebuilt(letter, wall_ms, &headers)
}

/// How often the record behind a dead letter was redriven before.
pub fn redrive_count(record: &Record) -> u32 {
    header(record, REDRIVE_COUNT).and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// The text of a header that a dead letter has beside the original's, by its name without the prefix.
pub fn header<'a>(letter: &'a Record, name: &str) -> Option<&'a str> {
    let header = letter.headers.iter().find(|header| header.name.strip_prefix(PREFIX) == Some(name));
    header.and_then(|header| header.value.as_deref()).and_then(|value| std::str::from_utf8(value).ok())
}

fn origin(record: &Record) -> Option<String> {
    header(record, ORIGIN).map(str::to_owned)
}

fn original_headers(record: &Record) -> Vec<(&str, Option<&[u8]>)> {
    let all = record.headers.iter().map(|header| (header.name.as_str(), header.value.as_deref()));
    all.filter(|(name, _)| !name.starts_with(PREFIX)).collect()
}

fn rebuilt(
    record: &Record,
    timestamp: i64,
    headers: &[(&str, Option<&[u8]>)],
) -> Result<BytesMut, BatchError> {
    let mut builder = BatchBuilder::new();
    builder.push(timestamp, bytes_of(record.key.as_ref()), bytes_of(record.value.as_ref()), headers)?;
    Ok(builder.finish())
}

fn bytes_of(bytes: Option<&Bytes>) -> Option<&[u8]> {
    bytes.map(|bytes| &bytes[..])
}
