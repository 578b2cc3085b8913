//! A stand-in for a payment provider, so that the sample runs without one.
//!
//! It behaves as providers do: it is slow, it times out (leaving the caller to guess whether the charge was made), it
//! declines, and it honours idempotency keys. It keeps a ledger in a file of its own, to which the payment service has
//! no other access than [`Gateway::charge`]; the reconciliation reads it as one would read the provider's statement.
//!
//! Invariants: the ledger is only ever appended to, and nothing in it prevents two charges for one order. Only the
//! idempotency keys do, so a service that used them wrongly would show.
//!
//! What a call meets is drawn from the seed, the key and the number of calls made under the key, all of which survive
//! the process: a run can be repeated.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _};
use thiserror::Error;

use crate::database::{Database, DatabaseError};
use crate::seeded::Seeded;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS ledger (
    sequence  INTEGER PRIMARY KEY AUTOINCREMENT,
    reference TEXT NOT NULL,
    customer  TEXT NOT NULL,
    cents     INTEGER NOT NULL,
    declined  TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS idempotency (
    key      TEXT PRIMARY KEY,
    sequence INTEGER NOT NULL REFERENCES ledger (sequence)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    key   TEXT PRIMARY KEY,
    count INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

/// Time that a charge takes.
const LATENCY: Duration = Duration::from_millis(3);
/// What the caller waits before it gives up on a call that times out.
const TIMEOUT: Duration = Duration::from_millis(25);

/// A request to charge a customer.
#[derive(Clone, Debug)]
pub(crate) struct ChargeRequest {
    /// What the charge is for, in the merchant's words.
    pub(crate) reference: String,
    pub(crate) customer: String,
    pub(crate) cents: u64,
}

/// The gateway's decision; final, and the same whenever it is asked for under the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Charged { charge_id: String },
    Declined { reason: String },
}

#[derive(Debug, Error)]
pub(crate) enum GatewayError {
    /// The charge may or may not have been made: ask again under the same key.
    #[error("the gateway did not answer in time")]
    Timeout,
    /// Nothing was done.
    #[error("the gateway cannot be reached")]
    Unreachable,
    #[error("the gateway failed: {0}")]
    Failed(#[from] DatabaseError),
}

/// What a seeded draw has in store for an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Prompt,
    /// So many calls time out with nothing done.
    LostRequests(u64),
    /// The first call makes the charge, but its answer is lost.
    LostAnswer,
}

/// Handle to the gateway.
#[derive(Clone, Debug)]
pub(crate) struct Gateway {
    ledger: Database,
    seed: u64,
    /// Every call is answered, and promptly.
    steady: bool,
    /// While this file exists the gateway cannot be reached.
    down: PathBuf,
}

/// The file that makes the gateway with this ledger unreachable, for whoever plays an outage.
pub(crate) fn outage_file(ledger: &Path) -> PathBuf {
    ledger.with_extension("down")
}

impl Gateway {
    pub(crate) fn open(path: &Path, seed: u64) -> Result<Self, DatabaseError> {
        Ok(Self { ledger: Database::open(path, SCHEMA)?, seed, steady: false, down: outage_file(path) })
    }

    /// No call times out.
    pub(crate) fn steady(mut self, steady: bool) -> Self {
        self.steady = steady;
        self
    }

    /// Charges the customer once for the key, however often it is called.
    pub(crate) async fn charge(&self, key: &str, request: ChargeRequest) -> Result<Decision, GatewayError> {
        tokio::time::sleep(LATENCY).await;
        if tokio::fs::try_exists(&self.down).await.unwrap_or(false) {
            return Err(GatewayError::Unreachable);
        }
        let mut chance = Seeded::for_name(self.seed, key);
        let drawn = behaviour(&mut chance);
        let behaviour = if self.steady { Behaviour::Prompt } else { drawn };
        let declined = chance.below(100) < 5;
        let key = key.to_owned();
        let answer = self
            .ledger
            .call(move |connection| {
                let call = count_call(connection, &key)?;
                if matches!(behaviour, Behaviour::LostRequests(lost) if call <= lost) {
                    return Ok(None);
                }
                let decision = decide(connection, &key, &request, declined)?;
                let answer_lost = behaviour == Behaviour::LostAnswer && call == 1;
                Ok((!answer_lost).then_some(decision))
            })
            .await?;
        match answer {
            Some(decision) => Ok(decision),
            None => {
                tokio::time::sleep(TIMEOUT).await;
                Err(GatewayError::Timeout)
            }
        }
    }
}

fn behaviour(chance: &mut Seeded) -> Behaviour {
    match chance.below(100) {
        0..5 => Behaviour::LostRequests(1),
        5..7 => Behaviour::LostRequests(2),
        7..11 => Behaviour::LostAnswer,
        _ => Behaviour::Prompt,
    }
}

/// Counts this call and says the how-manieth under its key it is.
fn count_call(connection: &Connection, key: &str) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(
            "INSERT INTO calls (key, count) VALUES (?1, 1)
             ON CONFLICT (key) DO UPDATE SET count = count + 1 RETURNING count",
        )?
        .query_row([key], |row| row.get(0))
}

fn decide(
    connection: &Connection,
    key: &str,
    request: &ChargeRequest,
    declined: bool,
) -> rusqlite::Result<Decision> {
    let decided = connection
        .prepare_cached(
            "SELECT l.sequence, l.declined FROM idempotency i JOIN ledger l USING (sequence) WHERE i.key = ?1",
        )?
        .query_row([key], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Option<String>>(1)?)))
        .optional()?;
    let (sequence, declined) = match decided {
        Some(decided) => decided,
        None => {
            let declined = declined.then(|| "insufficient funds".to_owned());
            connection
                .prepare_cached(
                    "INSERT INTO ledger (reference, customer, cents, declined) VALUES (?1, ?2, ?3, ?4)",
                )?
                .execute((&request.reference, &request.customer, request.cents, &declined))?;
            let sequence = connection.last_insert_rowid();
            connection
                .prepare_cached("INSERT INTO idempotency (key, sequence) VALUES (?1, ?2)")?
                .execute((key, sequence))?;
            (sequence, declined)
        }
    };
    Ok(match declined {
        None => Decision::Charged { charge_id: format!("ch_{sequence:08}") },
        Some(reason) => Decision::Declined { reason },
    })
}

/// One line of the provider's statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LedgerEntry {
    pub(crate) sequence: i64,
    pub(crate) reference: String,
    pub(crate) customer: String,
    pub(crate) cents: u64,
    pub(crate) declined: bool,
}

/// The whole statement in the order in which it was written; for a look from outside.
pub(crate) fn statement(connection: &Connection) -> rusqlite::Result<Vec<LedgerEntry>> {
    connection
        .prepare(
            "SELECT sequence, reference, customer, cents, declined IS NOT NULL FROM ledger ORDER BY sequence",
        )?
        .query_map([], |row| {
            Ok(LedgerEntry {
                sequence: row.get(0)?,
                reference: row.get(1)?,
                customer: row.get(2)?,
                cents: row.get(3)?,
                declined: row.get(4)?,
            })
        })?
        .collect()
}

/// Calls beyond the first of each key; for a look from outside.
pub(crate) fn repeated_calls(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row("SELECT coalesce(sum(count - 1), 0) FROM calls", [], |row| row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(reference: &str) -> ChargeRequest {
        ChargeRequest { reference: reference.to_owned(), customer: "1".to_owned(), cents: 5 }
    }

    #[tokio::test]
    async fn every_key_is_decided_once_and_for_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.db");
        let gateway = Gateway::open(&path, 1).unwrap();
        let pay = |n: u32| {
            let gateway = gateway.clone();
            async move {
                let key = format!("order-{n}");
                let mut timeouts = 0;
                let first = loop {
                    match gateway.charge(&key, request(&key)).await {
                        Ok(decision) => break decision,
                        Err(GatewayError::Timeout) => timeouts += 1,
                        Err(error) => panic!("{error}"),
                    }
                };
                assert_eq!(gateway.charge(&key, request(&key)).await.unwrap(), first);
                (first, timeouts)
            }
        };
        let outcomes = futures::future::join_all((0..300).map(pay)).await;
        let declined =
            outcomes.iter().filter(|(decision, _)| matches!(decision, Decision::Declined { .. })).count();
        let timeouts: u64 = outcomes.iter().map(|(_, timeouts)| timeouts).sum();
        assert!((5..30).contains(&declined), "{declined} declined");
        assert!(timeouts > 10, "{timeouts} timeouts");

        let connection = crate::database::connect(&path).unwrap();
        let statement = statement(&connection).unwrap();
        assert_eq!(statement.len(), 300);
        assert_eq!(statement.iter().filter(|entry| entry.declined).count(), declined);
        assert_eq!(repeated_calls(&connection).unwrap(), 300 + timeouts);
    }

    #[tokio::test]
    async fn an_outage_does_nothing_and_a_steady_gateway_never_times_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gateway.db");
        let gateway = Gateway::open(&path, 1).unwrap().steady(true);
        std::fs::write(outage_file(&path), []).unwrap();
        let charge =
            async |n: u32| gateway.charge(&format!("order-{n}"), request(&format!("order-{n}"))).await;
        assert!(matches!(charge(0).await, Err(GatewayError::Unreachable)));
        assert!(statement(&crate::database::connect(&path).unwrap()).unwrap().is_empty());
        std::fs::remove_file(outage_file(&path)).unwrap();
        for n in 0..60 {
            charge(n).await.unwrap();
        }
    }

    #[test]
    fn all_behaviours_occur() {
        let drawn: Vec<_> = (0..200).map(|n| behaviour(&mut Seeded::for_name(7, &n.to_string()))).collect();
        for expected in
            [Behaviour::Prompt, Behaviour::LostRequests(1), Behaviour::LostRequests(2), Behaviour::LostAnswer]
        {
            assert!(drawn.contains(&expected), "{expected:?} never drawn");
        }
    }
}
