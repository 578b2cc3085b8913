//! Records as they are sent and as they come back.

use std::sync::Arc;

use bytes::Bytes;
pub use felucca_protocol::batch::Header;

/// A producer's name for a message.
const MESSAGE_ID: &str = "message-id";
/// On a redriven record: `topic/partition/offset` of the record that it was at first.
const ORIGIN: &str = "__dlq.errors.origin";

/// A record to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: Option<u32>,
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Option<Bytes>,
    pub(crate) headers: Vec<(String, Bytes)>,
    pub(crate) timestamp: Option<i64>,
}

impl Record {
    /// A record with a value. Without a key it may go to any partition.
    pub fn new(topic: impl Into<Arc<str>>, value: impl Into<Bytes>) -> Self {
        let (topic, value) = (topic.into(), Some(value.into()));
        Self { topic, partition: None, key: None, value, headers: Vec::new(), timestamp: None }
    }

    /// A record that says that its key is gone.
    pub fn tombstone(topic: impl Into<Arc<str>>, key: impl Into<Bytes>) -> Self {
        let (topic, key) = (topic.into(), Some(key.into()));
        Self { topic, partition: None, key, value: None, headers: Vec::new(), timestamp: None }
    }

    /// Records of one key go to one partition and stay in order.
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header; names may repeat.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Chooses the partition, whatever the key.
    #[must_use]
    pub fn partition(mut self, partition: u32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// Unix milliseconds; the time of sending when it is not set.
    #[must_use]
    pub fn timestamp(mut self, milliseconds: i64) -> Self {
        self.timestamp = Some(milliseconds);
        self
    }

    /// The topic that it goes to.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    pub(crate) fn header_slices(&self) -> Vec<(&str, Option<&[u8]>)> {
        self.headers.iter().map(|(name, value)| (name.as_str(), Some(&value[..]))).collect()
    }

    /// Bytes of key, value and headers: what the broker's record limit counts.
    pub(crate) fn content_bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.key.as_ref().map_or(0, Bytes::len) + self.value.as_ref().map_or(0, Bytes::len) + headers
    }
}

/// A record that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumedRecord {
    pub topic: Arc<str>,
    pub partition: u32,
    pub offset: u64,
    /// Unix milliseconds.
    pub timestamp: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Vec<Header>,
}

impl ConsumedRecord {
    /// The value of the first header of this name.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|header| header.name == name).and_then(|header| header.value.as_deref())
    }

    /// What names this message in an *inbox*: a table in the handler's own database that says which messages took effect. A
    /// record may be handed out again although its effect is there (the process died before the acknowledgement); who writes
    /// the name in the transaction of the effect, and nothing when the name is there already, has every effect exactly once.
    ///
    /// It is the header `message-id`, when the producer gave one; otherwise `topic/partition/offset` of the record, and for one
    /// that was redriven those of the record that it was at first. Names are compared as text and never reused, unless a topic
    /// is deleted and another one made under its name.
    ///
    /// ```
    /// # use felucca_client::ConsumedRecord;
    /// # fn main() -> Result<(), rusqlite::Error> {
    /// /// Whether the message took effect now, and not before.
    /// fn credit(database: &mut rusqlite::Connection, record: &ConsumedRecord) -> rusqlite::Result<bool> {
    ///     let transaction = database.transaction()?;
    ///     let first = transaction
    ///         .execute("INSERT INTO inbox (message_id) VALUES (?1) ON CONFLICT DO NOTHING", [record.message_id()])?;
    ///     if first == 1 {
    ///         transaction.execute("UPDATE account SET cents = cents + 100", [])?;
    ///     }
    ///     transaction.commit()?;
    ///     Ok(first == 1)
    /// }
    ///
    /// let mut database = rusqlite::Connection::open_in_memory()?;
    /// database.execute_batch(
    ///     "CREATE TABLE inbox (message_id TEXT PRIMARY KEY) WITHOUT ROWID;
    ///      CREATE TABLE account (cents INTEGER); INSERT INTO account VALUES (0);",
    /// )?;
    /// # let record = ConsumedRecord { topic: "payments".into(), partition: 3, offset: 41, timestamp: 0, key: None,
    /// #     value: None, headers: Vec::new() };
    /// assert!(credit(&mut database, &record)?);
    /// assert!(!credit(&mut database, &record)?, "handed out again");
    /// assert_eq!(database.query_row("SELECT cents FROM account", [], |row| row.get::<_, i64>(0))?, 100);
    /// # Ok(())
    /// # }
    /// ```
    pub fn message_id(&self) -> String {
        let given = self.header(MESSAGE_ID).or_else(|| self.header(ORIGIN));
        match given.map(std::str::from_utf8) {
            Some(Ok(id)) if !id.is_empty() => id.to_owned(),
            _ => format!("{}/{}/{}", self.topic, self.partition, self.offset),
        }
    }
}

/// The present in Unix milliseconds.
pub(crate) fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_keeps_its_name_through_redrives() {
        let with = |headers: &[(&str, &'static str)]| ConsumedRecord {
            topic: "redrive.g.t".into(),
            partition: 1,
            offset: 2,
            timestamp: 0,
            key: None,
            value: None,
            headers: headers
                .iter()
                .map(|(name, value)| Header {
                    name: (*name).to_owned(),
                    value: Some(Bytes::from_static(value.as_bytes())),
                })
                .collect(),
        };
        assert_eq!(with(&[]).message_id(), "redrive.g.t/1/2");
        assert_eq!(with(&[(MESSAGE_ID, "")]).message_id(), "redrive.g.t/1/2");
        assert_eq!(with(&[(ORIGIN, "t/0/7")]).message_id(), "t/0/7");
        assert_eq!(with(&[(ORIGIN, "t/0/7"), (MESSAGE_ID, "order-9")]).message_id(), "order-9");
    }
}
