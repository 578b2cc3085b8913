//! Bytes are admitted before they are queued: the bound on what requests hold in memory, of all connections together and
//! of each.
//!
//! Over a limit a connection is simply not read for a while; when that lasts too long it gets an error instead. Nothing
//! behind this gate ever blocks a sender.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// What a request costs besides its bytes: its place in queues, its reply.
pub const REQUEST_OVERHEAD: usize = 256;

/// Not admitted in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too much is in flight; {waited:?} were not enough to make room for {bytes} bytes")]
pub struct Overloaded {
    pub bytes: usize,
    pub waited: Duration,
}

/// The gate of all connections together.
#[derive(Clone, Debug)]
pub struct Gate {
    total: Arc<Semaphore>,
    limit: u32,
    patience: Duration,
}

impl Gate {
    /// Admits `limit` bytes at a time; whoever waits longer than `patience` is refused.
    pub(crate) fn new(limit: u32, patience: Duration) -> Self {
        Self { total: Arc::new(Semaphore::new(limit as usize)), limit, patience }
    }

    /// The gate of one connection, admitting at most `limit` bytes of it at a time.
    pub fn connection(&self, limit: u32) -> ConnectionGate {
        let limit = limit.min(self.limit);
        ConnectionGate { gate: self.clone(), own: Arc::new(Semaphore::new(limit as usize)), limit }
    }

    /// Bytes that could be admitted now.
    pub fn available(&self) -> usize {
        self.total.available_permits()
    }
}

/// The gate of one connection.
#[derive(Clone, Debug)]
pub struct ConnectionGate {
    gate: Gate,
    own: Arc<Semaphore>,
    limit: u32,
}

/// Admitted bytes, given back when dropped.
#[derive(Debug)]
pub struct Admission {
    _own: OwnedSemaphorePermit,
    _total: OwnedSemaphorePermit,
}

impl ConnectionGate {
    /// Waits for room for `bytes`; more than the whole limit counts as the limit. Cancellation safe: a dropped wait has
    /// admitted nothing.
    ///
    /// # Errors
    /// [`Overloaded`] after the gate's patience.
    pub async fn admit(&self, bytes: usize) -> Result<Admission, Overloaded> {
        // Both are at most the limit, which is a u32.
        let permits = u32::try_from(bytes).unwrap_or(self.limit).min(self.limit);
        let own = self.own.clone().try_acquire_many_owned(permits);
        let total = self.gate.total.clone().try_acquire_many_owned(permits);
        if let (Ok(own), Ok(total)) = (own, total) {
            return Ok(Admission { _own: own, _total: total });
        }
        let both = async {
            // The connection's own first, so that one greedy connection does not hold room of all while it waits.
            let own = self.own.clone().acquire_many_owned(permits).await;
            let total = self.gate.total.clone().acquire_many_owned(permits).await;
            (own, total)
        };
        match timeout(self.gate.patience, both).await {
            Ok((Ok(own), Ok(total))) => Ok(Admission { _own: own, _total: total }),
            // The semaphores are never closed; a wait that ended all the same is a refusal.
            _ => Err(Overloaded { bytes, waited: self.gate.patience }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_dropped_makes_room() {
        let gate = Gate::new(100, Duration::from_millis(10));
        let one = gate.connection(80);
        let first = one.admit(60).await.unwrap();
        assert_eq!(one.admit(30).await.unwrap_err().bytes, 30);
        let other = gate.connection(80);
        let second = other.admit(40).await.unwrap();
        assert!(other.admit(1).await.is_err());
        drop(first);
        let third = one.admit(60).await.unwrap();
        drop((second, third));
        assert_eq!(gate.available(), 100);
    }

    #[tokio::test]
    async fn more_than_the_limit_is_admitted_alone() {
        let gate = Gate::new(100, Duration::from_millis(10));
        let one = gate.connection(1000);
        let all = one.admit(5000).await.unwrap();
        assert!(one.admit(1).await.is_err());
        drop(all);
        assert!(one.admit(1).await.is_ok());
    }
}
