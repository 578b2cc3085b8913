//! The order service's database: orders, and the outbox of events about them.
//!
//! Invariants: an order and its `OrderCreated` are inserted by one transaction; an idempotency key names one order for
//! ever; a settled order changes only from dead-lettered to a payment's result (after a redrive), never back.

use std::path::Path;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension as _, Row, ToSql};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::SOURCE;
use crate::database::{Database, DatabaseError};
use crate::events::{Envelope, Event, OrderCreated, TraceParent};

/// Ids of orders are derived from their idempotency keys under this name.
const ORDER_NAMESPACE: Uuid = Uuid::from_u128(0x6f3c_2f0e_5f63_4b0b_9d6a_2d1f_5a1c_7e11);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS orders (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE,
    idempotency_key TEXT NOT NULL UNIQUE,
    customer        TEXT NOT NULL,
    ordered_on      TEXT NOT NULL,
    cds             INTEGER NOT NULL,
    cents           INTEGER NOT NULL,
    status          TEXT NOT NULL,
    reason          TEXT,
    created_at      TEXT NOT NULL,
    settled_at      TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS orders_by_status ON orders (status, sequence);
CREATE TABLE IF NOT EXISTS outbox (
    sequence     INTEGER PRIMARY KEY AUTOINCREMENT,
    order_id     TEXT NOT NULL,
    customer     TEXT NOT NULL,
    trace_parent TEXT NOT NULL,
    partition    INTEGER,
    offset       INTEGER
) STRICT;
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (customer, sequence) WHERE offset IS NULL;
";

/// Where an order stands. Every status but `Pending` is the end of the saga.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Pending,
    Confirmed,
    Cancelled,
    DeadLettered,
}

impl Status {
    pub(crate) const ALL: [Self; 4] = [Self::Pending, Self::Confirmed, Self::Cancelled, Self::DeadLettered];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
            Self::DeadLettered => "dead_lettered",
        }
    }
}

impl ToSql for Status {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.name().to_sql()
    }
}

impl FromSql for Status {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let name = value.as_str()?;
        Self::ALL.into_iter().find(|status| status.name() == name).ok_or(FromSqlError::InvalidType)
    }
}

/// What a customer asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewOrder {
    pub(crate) customer: String,
    pub(crate) ordered_on: jiff::civil::Date,
    pub(crate) cds: u32,
    /// US cents.
    pub(crate) cents: u64,
}

/// An order as stored and as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Position in the order of acceptance.
    pub(crate) sequence: i64,
    pub(crate) id: Uuid,
    #[serde(skip)]
    pub(crate) idempotency_key: String,
    #[serde(flatten)]
    pub(crate) new: NewOrder,
    pub(crate) status: Status,
    pub(crate) reason: Option<String>,
    pub(crate) created_at: String,
    pub(crate) settled_at: Option<String>,
}

impl Order {
    /// The event that says this order was created; the same however the order stands now.
    pub(crate) fn created_event(&self, trace: TraceParent) -> Envelope {
        let event = Event::OrderCreated(OrderCreated {
            order_id: self.id,
            customer: self.new.customer.clone(),
            ordered_on: self.new.ordered_on.to_string(),
            cds: self.new.cds,
            cents: self.new.cents,
        });
        Envelope::new(SOURCE, self.created_at.clone(), trace, event)
    }
}

/// What became of a request to place an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    Created(Order),
    /// The key was used before for the same order: this is it, as it stands now.
    Repeated(Order),
    /// The key was used before for another order.
    KeyReused,
}

/// What a payment result or a dead letter says about an order.
#[derive(Clone, Debug)]
pub(crate) struct Settlement {
    pub(crate) order_id: Uuid,
    pub(crate) status: Status,
    pub(crate) reason: Option<String>,
}

/// What settling did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Applied,
    /// The order already stands so: the event came a second time.
    Repeated,
    /// No such order, or it stands otherwise.
    Refused,
}

/// An outbox row with what its event needs.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) sequence: i64,
    pub(crate) trace_parent: String,
    pub(crate) order: Order,
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

    /// Inserts the order and its outbox row, both or neither.
    pub(crate) async fn place(
        &self,
        key: String,
        new: NewOrder,
        created_at: String,
        trace_parent: String,
    ) -> Result<Placed, DatabaseError> {
        self.database.call(move |connection| place(connection, &key, &new, &created_at, &trace_parent)).await
    }

    pub(crate) async fn order(&self, id: Uuid) -> Result<Option<Order>, DatabaseError> {
        self.database
            .call(move |connection| {
                connection
                    .prepare_cached("SELECT * FROM orders WHERE id = ?1")?
                    .query_row([id.to_string()], order_from_row)
                    .optional()
            })
            .await
    }

    /// Orders after `after` in the order of acceptance, those of one status or all.
    pub(crate) async fn orders(
        &self,
        status: Option<Status>,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Order>, DatabaseError> {
        self.database
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT * FROM orders WHERE sequence > ?1 AND (?2 IS NULL OR status = ?2)
                         ORDER BY sequence LIMIT ?3",
                    )?
                    .query_map((after, status, limit), order_from_row)?
                    .collect()
            })
            .await
    }

    /// How many orders have each status.
    pub(crate) async fn totals(&self) -> Result<Vec<(Status, u64)>, DatabaseError> {
        self.database
            .call(|connection| {
                connection
                    .prepare_cached("SELECT status, count(*) FROM orders GROUP BY status")?
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect()
            })
            .await
    }

    /// The oldest unpublished row of every customer that has one, oldest first.
    pub(crate) async fn waiting(&self, limit: u32) -> Result<Vec<Waiting>, DatabaseError> {
        self.database
            .call(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT o.*, w.sequence AS outbox_sequence, w.trace_parent
                         FROM (SELECT min(sequence) AS sequence, order_id, trace_parent
                               FROM outbox WHERE offset IS NULL GROUP BY customer ORDER BY 1 LIMIT ?1) w
                         JOIN orders o ON o.id = w.order_id ORDER BY w.sequence",
                    )?
                    .query_map([limit], |row| {
                        Ok(Waiting {
                            sequence: row.get("outbox_sequence")?,
                            trace_parent: row.get("trace_parent")?,
                            order: order_from_row(row)?,
                        })
                    })?
                    .collect()
            })
            .await
    }

    /// Marks outbox rows `(sequence, partition, offset)` as published.
    pub(crate) async fn mark_published(&self, rows: Vec<(i64, u32, u64)>) -> Result<(), DatabaseError> {
        self.database
            .call(move |connection| {
                let mut update = connection
                    .prepare_cached("UPDATE outbox SET partition = ?2, offset = ?3 WHERE sequence = ?1")?;
                for (sequence, partition, offset) in rows {
                    update.execute((sequence, partition, offset))?;
                }
                Ok(())
            })
            .await
    }

    /// Applies settlements in order, in one transaction; one outcome for each.
    pub(crate) async fn settle(
        &self,
        batch: Vec<Settlement>,
        at: String,
    ) -> Result<Vec<Settled>, DatabaseError> {
        self.database
            .call(move |connection| {
                batch.iter().map(|settlement| settle(connection, settlement, &at)).collect()
            })
            .await
    }
}

fn place(
    connection: &Connection,
    key: &str,
    new: &NewOrder,
    created_at: &str,
    trace_parent: &str,
) -> rusqlite::Result<Placed> {
    let known = connection
        .prepare_cached("SELECT * FROM orders WHERE idempotency_key = ?1")?
        .query_row([key], order_from_row)
        .optional()?;
    if let Some(order) = known {
        return Ok(if order.new == *new { Placed::Repeated(order) } else { Placed::KeyReused });
    }
    let id = Uuid::new_v5(&ORDER_NAMESPACE, key.as_bytes());
    let order = connection
        .prepare_cached(
            "INSERT INTO orders (id, idempotency_key, customer, ordered_on, cds, cents, status, created_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) RETURNING *",
        )?
        .query_row(
            (
                id.to_string(),
                key,
                &new.customer,
                new.ordered_on.to_string(),
                new.cds,
                new.cents,
                Status::Pending,
                created_at,
            ),
            order_from_row,
        )?;
    connection
        .prepare_cached("INSERT INTO outbox (order_id, customer, trace_parent) VALUES (?1, ?2, ?3)")?
        .execute((id.to_string(), &new.customer, trace_parent))?;
    Ok(Placed::Created(order))
}

fn settle(connection: &Connection, settlement: &Settlement, at: &str) -> rusqlite::Result<Settled> {
    let id = settlement.order_id.to_string();
    let changed = connection
        .prepare_cached(
            "UPDATE orders SET status = ?2, reason = ?3, settled_at = ?4
             WHERE id = ?1 AND (status = 'pending' OR (status = 'dead_lettered' AND ?2 <> 'dead_lettered'))",
        )?
        .execute((&id, settlement.status, &settlement.reason, at))?;
    if changed == 1 {
        return Ok(Settled::Applied);
    }
    let stands = connection
        .prepare_cached("SELECT status FROM orders WHERE id = ?1")?
        .query_row([&id], |row| row.get::<_, Status>(0))
        .optional()?;
    Ok(if stands == Some(settlement.status) { Settled::Repeated } else { Settled::Refused })
}

/// Every order in the file, in the order of acceptance; for a look from outside.
pub(crate) fn all_orders(connection: &Connection) -> rusqlite::Result<Vec<Order>> {
    connection.prepare("SELECT * FROM orders ORDER BY sequence")?.query_map([], order_from_row)?.collect()
}

/// Outbox rows that were never marked as published; for a look from outside.
pub(crate) fn unpublished(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row("SELECT count(*) FROM outbox WHERE offset IS NULL", [], |row| row.get(0))
}

fn order_from_row(row: &Row<'_>) -> rusqlite::Result<Order> {
    Ok(Order {
        sequence: row.get("sequence")?,
        id: parsed(row, "id")?,
        idempotency_key: row.get("idempotency_key")?,
        new: NewOrder {
            customer: row.get("customer")?,
            ordered_on: parsed(row, "ordered_on")?,
            cds: row.get("cds")?,
            cents: row.get("cents")?,
        },
        status: row.get("status")?,
        reason: row.get("reason")?,
        created_at: row.get("created_at")?,
        settled_at: row.get("settled_at")?,
    })
}

/// A text column that holds something with a syntax of its own.
fn parsed<T>(row: &Row<'_>, column: &str) -> rusqlite::Result<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let index = row.as_ref().column_index(column)?;
    let text: String = row.get(index)?;
    text.parse().map_err(|error: T::Err| {
        rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, Box::new(error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("orders.db")).unwrap();
        (dir, store)
    }

    fn new_order(customer: &str, cents: u64) -> NewOrder {
        NewOrder { customer: customer.to_owned(), ordered_on: jiff::civil::date(1997, 1, 1), cds: 1, cents }
    }

    async fn place(store: &Store, key: &str, new: NewOrder) -> Placed {
        store.place(key.to_owned(), new, "t".to_owned(), "p".to_owned()).await.unwrap()
    }

    #[tokio::test]
    async fn a_key_names_one_order() {
        let (_dir, store) = store();
        let Placed::Created(order) = place(&store, "a", new_order("1", 5)).await else { panic!() };
        assert_eq!(place(&store, "a", new_order("1", 5)).await, Placed::Repeated(order.clone()));
        assert_eq!(place(&store, "a", new_order("1", 6)).await, Placed::KeyReused);
        assert_eq!(store.order(order.id).await.unwrap(), Some(order));
        assert_eq!(store.waiting(10).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn only_a_customers_oldest_event_waits_to_be_published() {
        let (_dir, store) = store();
        for (key, customer) in [("a", "1"), ("b", "2"), ("c", "1")] {
            place(&store, key, new_order(customer, 5)).await;
        }
        let keys =
            |rows: Vec<Waiting>| rows.into_iter().map(|row| row.order.idempotency_key).collect::<Vec<_>>();
        let waiting = store.waiting(10).await.unwrap();
        let first = waiting[0].sequence;
        assert_eq!(keys(waiting), ["a", "b"]);
        store.mark_published(vec![(first, 0, 0)]).await.unwrap();
        assert_eq!(keys(store.waiting(10).await.unwrap()), ["b", "c"]);
    }

    #[tokio::test]
    async fn settling_is_idempotent_and_final() {
        let (_dir, store) = store();
        let Placed::Created(order) = place(&store, "a", new_order("1", 5)).await else { panic!() };
        let settle = async |status| {
            let settlement = Settlement { order_id: order.id, status, reason: None };
            store.settle(vec![settlement], "t".to_owned()).await.unwrap()[0]
        };
        assert_eq!(settle(Status::DeadLettered).await, Settled::Applied);
        assert_eq!(settle(Status::DeadLettered).await, Settled::Repeated);
        assert_eq!(settle(Status::Confirmed).await, Settled::Applied);
        assert_eq!(settle(Status::Confirmed).await, Settled::Repeated);
        assert_eq!(settle(Status::Cancelled).await, Settled::Refused);
        assert_eq!(settle(Status::DeadLettered).await, Settled::Refused);
        assert_eq!(store.totals().await.unwrap(), [(Status::Confirmed, 1)]);
        assert_eq!(store.orders(Some(Status::Confirmed), 0, 10).await.unwrap().len(), 1);
        assert_eq!(store.orders(Some(Status::Pending), 0, 10).await.unwrap().len(), 0);
    }
}
