//! The payment service's database: what was decided for each order.
//!
//! Invariant: a row is written once and never changed, so a result that has to be published again is published with the
//! same content and the same time.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _, Row};

use super::gateway::Decision;
use crate::database::{Database, DatabaseError};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS payments (
    order_id   TEXT PRIMARY KEY,
    charge_id  TEXT,
    declined   TEXT,
    decided_at TEXT NOT NULL,
    CHECK ((charge_id IS NULL) <> (declined IS NULL))
) STRICT, WITHOUT ROWID;
";

/// What was decided for an order, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Payment {
    pub(crate) decision: Decision,
    /// RFC 3339
    pub(crate) decided_at: String,
}

/// Handle to the database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, DatabaseError> {
        Ok(Self { database: Database::open(path, SCHEMA)? })
    }

    pub(crate) async fn payment(&self, order_id: String) -> Result<Option<Payment>, DatabaseError> {
        self.database.call(move |connection| payment(connection, &order_id)).await
    }

    /// Keeps the payment unless the order has one already; returns the one that is kept.
    pub(crate) async fn record(&self, order_id: String, new: Payment) -> Result<Payment, DatabaseError> {
        self.database
            .call(move |connection| {
                let (charge_id, declined) = match &new.decision {
                    Decision::Charged { charge_id } => (Some(charge_id), None),
                    Decision::Declined { reason } => (None, Some(reason)),
                };
                connection
                    .prepare_cached(
                        "INSERT INTO payments (order_id, charge_id, declined, decided_at) VALUES (?1, ?2, ?3, ?4)
                         ON CONFLICT DO NOTHING",
                    )?
                    .execute((&order_id, charge_id, declined, &new.decided_at))?;
                Ok(payment(connection, &order_id)?.unwrap_or(new))
            })
            .await
    }
}

fn payment(connection: &Connection, order_id: &str) -> rusqlite::Result<Option<Payment>> {
    connection
        .prepare_cached("SELECT charge_id, declined, decided_at FROM payments WHERE order_id = ?1")?
        .query_row([order_id], |row| {
            Ok(Payment { decision: decision(row)?, decided_at: row.get("decided_at")? })
        })
        .optional()
}

fn decision(row: &Row<'_>) -> rusqlite::Result<Decision> {
    Ok(match row.get("charge_id")? {
        Some(charge_id) => Decision::Charged { charge_id },
        None => Decision::Declined { reason: row.get("declined")? },
    })
}

/// `(order id, paid)` of every payment; for a look from outside.
pub(crate) fn all_payments(connection: &Connection) -> rusqlite::Result<Vec<(String, bool)>> {
    connection
        .prepare("SELECT order_id, charge_id IS NOT NULL FROM payments")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}
