//! The email service's database: which mails went out, for the support desk and against repeats over SMTP.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _};
use uuid::Uuid;

use crate::database::{Database, DatabaseError};
use crate::events::Envelope;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS sent (
    event_id TEXT PRIMARY KEY,
    order_id TEXT NOT NULL,
    customer TEXT NOT NULL,
    type     TEXT NOT NULL,
    sent_at  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sent_by_order ON sent (order_id);
";

/// Handle to the database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, DatabaseError> {
        Ok(Self { database: Database::open(path, SCHEMA)? })
    }

    pub(crate) async fn was_sent(&self, event_id: Uuid) -> Result<bool, DatabaseError> {
        self.database
            .call(move |connection| {
                let mut select = connection.prepare_cached("SELECT 1 FROM sent WHERE event_id = ?1")?;
                Ok(select.query_row([event_id.to_string()], |_| Ok(())).optional()?.is_some())
            })
            .await
    }

    /// Notes that the mail about an event went out; noting it again changes nothing.
    pub(crate) async fn note_sent(&self, envelope: &Envelope, sent_at: String) -> Result<(), DatabaseError> {
        let (event_id, order_id) = (envelope.id.to_string(), envelope.event.order_id().to_string());
        let (customer, type_name) = (envelope.event.customer().to_owned(), envelope.event.type_name());
        self.database
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT INTO sent (event_id, order_id, customer, type, sent_at) VALUES (?1, ?2, ?3, ?4, ?5)
                         ON CONFLICT DO NOTHING",
                    )?
                    .execute((event_id, order_id, customer, type_name, sent_at))?;
                Ok(())
            })
            .await
    }
}

/// Ids of the events about which mails went out; for a look from outside.
pub(crate) fn all_sent(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection.prepare("SELECT event_id FROM sent")?.query_map([], |row| row.get(0))?.collect()
}
