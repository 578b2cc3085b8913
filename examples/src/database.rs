//! A SQLite database owned by one thread, shared by all tasks of a service.
//!
//! SQLite allows one writer at a time, so there is no pool: calls queue for the owner thread, which takes what has
//! gathered, runs it in one transaction and commits once. While one commit waits for the disk the next calls gather, so
//! a busy service pays one sync for many calls.
//!
//! Invariants: a call's reply is sent only after the commit that holds its changes (`synchronous = FULL`: on the disk);
//! a call that fails changes nothing (it runs in a savepoint of its own) and disturbs no other call.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

/// Calls that may wait before callers do.
const QUEUE: usize = 1024;
/// Calls that share one commit at most.
const CALLS_PER_COMMIT: usize = 256;

/// Why a call had no effect, or (only for [`DatabaseError::Closed`]) may have had none.
#[derive(Debug, Error)]
pub(crate) enum DatabaseError {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("the commit failed: {0}")]
    Commit(String),
    #[error("the database thread has ended")]
    Closed,
}

/// Handle to the owner thread; the thread ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    calls: mpsc::Sender<Box<dyn QueuedCall>>,
}

impl Database {
    /// Opens or creates the file and applies `schema`, which must be repeatable (`CREATE … IF NOT EXISTS`).
    pub(crate) fn open(path: &Path, schema: &str) -> Result<Self, DatabaseError> {
        let mut connection = connect(path)?;
        connection.execute_batch(schema)?;
        let (calls, mut queue) = mpsc::channel::<Box<dyn QueuedCall>>(QUEUE);
        std::thread::Builder::new()
            .name("database".to_owned())
            .spawn(move || {
                while let Some(first) = queue.blocking_recv() {
                    let more = std::iter::from_fn(|| queue.try_recv().ok()).take(CALLS_PER_COMMIT - 1);
                    commit_together(&mut connection, std::iter::once(first).chain(more));
                }
            })
            .map_err(|error| DatabaseError::Commit(format!("no thread for the database: {error}")))?;
        Ok(Self { calls })
    }

    /// Runs `work` inside a transaction and returns its result once that is committed.
    ///
    /// Cancellation: a call whose future is dropped may or may not take place.
    pub(crate) async fn call<T, F>(&self, work: F) -> Result<T, DatabaseError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, outcome) = oneshot::channel();
        let call = Call { work: Some(work), result: None, reply };
        self.calls.send(Box::new(call)).await.map_err(|_| DatabaseError::Closed)?;
        outcome.await.map_err(|_| DatabaseError::Closed)?
    }
}

/// A connection as every part of the sample uses it, also the reconciliation when it looks at the files from outside.
pub(crate) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    Ok(connection)
}

fn commit_together(connection: &mut Connection, calls: impl Iterator<Item = Box<dyn QueuedCall>>) {
    let mut ran = Vec::new();
    let committed = connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .and_then(|transaction| {
            for mut call in calls {
                call.run(&transaction);
                ran.push(call);
            }
            transaction.commit()
        })
        .map_err(|error| error.to_string());
    // Calls that never ran (no transaction could begin) are dropped here, which their callers see as `Closed`.
    for call in ran {
        call.answer(committed.clone());
    }
}

/// A call with its types erased, so that different calls share a queue.
trait QueuedCall: Send {
    fn run(&mut self, connection: &Connection);
    fn answer(self: Box<Self>, committed: Result<(), String>);
}

struct Call<T, F> {
    work: Option<F>,
    result: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<Result<T, DatabaseError>>,
}

impl<T, F> QueuedCall for Call<T, F>
where
    T: Send,
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
{
    fn run(&mut self, connection: &Connection) {
        let Some(work) = self.work.take() else { return };
        self.result = Some(in_savepoint(connection, work));
    }

    fn answer(self: Box<Self>, committed: Result<(), String>) {
        let answer = match (self.result, committed) {
            (Some(Err(error)), _) => Err(error.into()),
            (_, Err(error)) => Err(DatabaseError::Commit(error)),
            (Some(Ok(value)), Ok(())) => Ok(value),
            (None, Ok(())) => Err(DatabaseError::Closed),
        };
        // A caller that stopped waiting is no reason to undo anything.
        let _ = self.reply.send(answer);
    }
}

fn in_savepoint<T>(
    connection: &Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    connection.prepare_cached("SAVEPOINT call")?.execute([])?;
    let result = work(connection);
    if result.is_err() {
        connection.prepare_cached("ROLLBACK TO call")?.execute([])?;
    }
    connection.prepare_cached("RELEASE call")?.execute([])?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failing_call_leaves_its_neighbours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let database =
            Database::open(&dir.path().join("a.db"), "CREATE TABLE t (n INTEGER PRIMARY KEY)").unwrap();
        let insert = |n: i64, fail: bool| {
            database.call(move |connection| {
                connection.execute("INSERT INTO t VALUES (?1)", [n])?;
                if fail { Err(rusqlite::Error::QueryReturnedNoRows) } else { Ok(()) }
            })
        };
        let outcomes = futures::future::join_all((0..20).map(|n| insert(n, n % 3 == 0))).await;
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_err()).count(), 7);
        let kept =
            database.call(|c| c.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))).await;
        assert_eq!(kept.unwrap(), 13);
    }
}
