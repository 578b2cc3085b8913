//! What share groups may keep. One budget of memory for everything that share groups keep: what each partition of a group takes is charged to it, and
//! given back when the partition is dropped. An estimate from counts, kept up at every change; no walk over what is kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Records that a partition may have leased or returned while the budget is spent: it goes on slowly, so that what others
/// hold does not stop it for ever.
pub(crate) const TRICKLE: u64 = 16;

#[derive(Clone, Debug)]
pub(crate) struct Budget {
    used: Arc<AtomicU64>,
    limit: u64,
    slot_parked: usize,
}

impl Budget {
    /// A budget of so many bytes; and so many records that may be parked behind one key slot.
    pub(crate) fn new(limit: u64, slot_parked: usize) -> Self {
        Self { used: Arc::new(AtomicU64::new(0)), limit, slot_parked: slot_parked.max(1) }
    }

    pub(crate) fn slot_parked(&self) -> usize {
        self.slot_parked
    }

    /// Bytes charged.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Nothing new is to be taken in.
    pub(crate) fn is_spent(&self) -> bool {
        self.used() >= self.limit
    }

    pub(crate) fn charge(&self) -> Charge {
        Charge { budget: self.clone(), bytes: 0 }
    }
}

/// What one partition of a group takes of a [`Budget`]; given back when dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    budget: Budget,
    bytes: u64,
}

impl Charge {
    /// Whether all that is charged with this one is as much as may be.
    pub(crate) fn is_spent(&self) -> bool {
        self.budget.is_spent()
    }

    /// It takes so many bytes now.
    pub(crate) fn set(&mut self, bytes: u64) {
        // Only the engine's thread writes, and the order of the two does not matter.
        if bytes > self.bytes {
            self.budget.used.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            self.budget.used.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let budget = Budget::new(100, 1);
        let (mut a, mut b) = (budget.charge(), budget.charge());
        a.set(70);
        b.set(30);
        assert!(budget.is_spent());
        a.set(20);
        assert!(!budget.is_spent());
        drop(b);
        assert_eq!(budget.used(), 20);
    }
}
