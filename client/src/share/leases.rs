//! What this member holds, and the credit that follows from it.
//!
//! A record counts against the prefetch from its push until it is settled, wherever it is: queued, in a handler, or in a
//! settlement on its way. Its credit goes to the subscription that is open then; what is let go while one is being opened is
//! owed to it, and given once the broker knows it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use felucca_protocol::message;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::delivery::Lease;

/// By topic id, partition and offset: at most one lease each.
type Key = (Bytes, u32, u64);

#[derive(Debug)]
struct Held {
    lease: Lease,
    bytes: u32,
    /// As granted.
    duration: Duration,
    extend_at: Instant,
    /// To be extended by itself: queued here, or in a worker's handler.
    keep: bool,
    /// A settlement is on its way.
    settling: bool,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<Key, Held>,
    /// 0 while none is open.
    subscription: u64,
    owed_records: u32,
    owed_bytes: u32,
    /// Nothing more is wanted.
    draining: bool,
}

#[derive(Debug, Default)]
pub(super) struct Leases {
    state: Mutex<State>,
    /// Something was let go.
    changed: Notify,
}

fn key(lease: &Lease) -> Key {
    (lease.topic_id.clone(), lease.partition, lease.offset)
}

impl Leases {
    /// Takes a record in. One that came again, after an older lease of it ran out, has taken credit twice and is settled
    /// once: answers the credit that the open subscription gets for the older lease.
    pub(super) fn hold(&self, lease: &Lease, bytes: u32, duration: Duration) -> Option<message::Credit> {
        let extend_at = Instant::now() + duration / 2;
        let held = Held { lease: lease.clone(), bytes, duration, extend_at, keep: true, settling: false };
        let mut state = self.state.lock();
        let older = state.held.insert(key(lease), held)?;
        self.changed.notify_waiters();
        state.owed_records = state.owed_records.saturating_add(1);
        state.owed_bytes = state.owed_bytes.saturating_add(older.bytes);
        state.credit()
    }

    pub(super) fn is_held(&self, lease: &Lease) -> bool {
        self.state.lock().held.get(&key(lease)).is_some_and(|held| held.lease == *lease)
    }

    /// Returns once the lease is held no longer.
    pub(super) async fn gone(&self, lease: &Lease) {
        loop {
            let changed = self.changed.notified();
            if !self.is_held(lease) {
                return;
            }
            changed.await;
        }
    }

    /// From now on its holder extends it.
    pub(super) fn hand_out(&self, lease: &Lease) {
        self.change(lease, |held| held.keep = false);
    }

    pub(super) fn set_settling(&self, lease: &Lease, settling: bool) {
        self.change(lease, |held| held.settling = settling);
    }

    fn change(&self, lease: &Lease, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.state.lock().held.get_mut(&key(lease))
            && held.lease == *lease
        {
            change(held);
        }
    }

    // ---- Credit ----

    /// A subscription is about to be opened: what to ask for, and what is held already.
    pub(super) fn open(&self, records: u32, bytes: u32) -> (u32, u32, Vec<message::LeaseRef>) {
        let mut state = self.state.lock();
        (state.subscription, state.owed_records, state.owed_bytes) = (0, 0, 0);
        let held = state.held.values().map(|held| held.lease.to_message()).collect();
        if state.draining {
            return (0, 0, held);
        }
        let held_records = u32::try_from(state.held.len()).unwrap_or(u32::MAX);
        let held_bytes = state.held.values().map(|held| held.bytes).fold(0_u32, u32::saturating_add);
        (records.saturating_sub(held_records), bytes.saturating_sub(held_bytes), held)
    }

    /// The broker knows the subscription; answers what it is owed.
    pub(super) fn opened(&self, subscription: u64) -> Option<message::Credit> {
        let mut state = self.state.lock();
        state.subscription = subscription;
        state.credit()
    }

    /// The subscription is no more.
    pub(super) fn closed(&self) {
        self.state.lock().subscription = 0;
    }

    /// Nothing more is wanted: no credit is given any more.
    pub(super) fn drain(&self) {
        self.state.lock().draining = true;
    }

    /// Gives up records; answers the credit that the open subscription gets for them.
    pub(super) fn let_go<'a>(&self, leases: impl IntoIterator<Item = &'a Lease>) -> Option<message::Credit> {
        let credit = {
            let mut state = self.state.lock();
            for lease in leases {
                let key = key(lease);
                if state.held.get(&key).is_some_and(|held| held.lease == *lease)
                    && let Some(held) = state.held.remove(&key)
                {
                    state.owed_records = state.owed_records.saturating_add(1);
                    state.owed_bytes = state.owed_bytes.saturating_add(held.bytes);
                }
            }
            state.credit()
        };
        self.changed.notify_waiters();
        credit
    }

    // ---- Extension ----

    /// The leases that have half of their time left or less and are to be kept. Each is named again after an eighth.
    pub(super) fn due(&self, now: Instant) -> Vec<Lease> {
        let mut state = self.state.lock();
        let due = state.held.values_mut().filter(|held| held.keep && !held.settling && held.extend_at <= now);
        due.map(|held| {
            held.extend_at = now + held.duration / 8;
            held.lease.clone()
        })
        .collect()
    }

    pub(super) fn extended(&self, lease: &Lease, remaining: Duration) {
        self.change(lease, |held| held.extend_at = Instant::now() + remaining / 2);
    }
}

impl State {
    fn credit(&mut self) -> Option<message::Credit> {
        if self.subscription == 0 || self.draining || (self.owed_records == 0 && self.owed_bytes == 0) {
            return None;
        }
        let (subscription, records, bytes) = (self.subscription, self.owed_records, self.owed_bytes);
        (self.owed_records, self.owed_bytes) = (0, 0);
        Some(message::Credit { subscription, records, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(offset: u64, sequence: u64) -> Lease {
        Lease { topic_id: Bytes::from_static(&[1; 16]), partition: 0, offset, boot_epoch: 1, sequence }
    }

    const TIME: Duration = Duration::from_secs(30);

    #[test]
    fn what_is_let_go_while_a_subscription_is_opened_is_owed_to_it() {
        let leases = Leases::default();
        for offset in 0..3 {
            leases.hold(&lease(offset, offset), 100, TIME);
        }
        let (records, bytes, held) = leases.open(10, 1000);
        assert_eq!((records, bytes, held.len()), (7, 700, 3));
        assert_eq!(leases.let_go([&lease(0, 0)]), None);
        let owed = message::Credit { subscription: 9, records: 1, bytes: 100 };
        assert_eq!(leases.opened(9), Some(owed));
        assert_eq!(leases.let_go([&lease(1, 1), &lease(2, 2)]).map(|credit| credit.records), Some(2));
    }

    #[test]
    fn an_old_lease_does_not_end_a_later_one_on_the_same_record() {
        let leases = Leases::default();
        leases.hold(&lease(5, 1), 10, TIME);
        leases.hold(&lease(5, 2), 10, TIME);
        leases.let_go([&lease(5, 1)]);
        assert!(leases.is_held(&lease(5, 2)));
        assert!(!leases.is_held(&lease(5, 1)));
    }

    #[test]
    fn a_record_that_comes_again_costs_no_credit_for_its_older_lease() {
        let leases = Leases::default();
        leases.open(10, 1000);
        leases.opened(9);
        assert_eq!(leases.hold(&lease(5, 1), 10, TIME), None);
        let owed = message::Credit { subscription: 9, records: 1, bytes: 10 };
        assert_eq!(leases.hold(&lease(5, 2), 10, TIME), Some(owed));
        assert_eq!(leases.let_go([&lease(5, 1)]), None);
        assert_eq!(leases.let_go([&lease(5, 2)]), Some(owed));
    }

    #[test]
    fn leases_are_extended_at_half_time_unless_handed_out_or_being_settled() {
        let leases = Leases::default();
        for offset in 0..3 {
            leases.hold(&lease(offset, offset), 1, TIME);
        }
        leases.hand_out(&lease(0, 0));
        leases.set_settling(&lease(1, 1), true);
        assert!(leases.due(Instant::now()).is_empty());
        let later = Instant::now() + TIME / 2;
        assert_eq!(leases.due(later), [lease(2, 2)]);
        assert!(leases.due(later).is_empty());
        assert_eq!(leases.due(later + TIME / 4), [lease(2, 2)]);
    }

    #[test]
    fn a_member_that_drains_asks_for_nothing() {
        let leases = Leases::default();
        leases.hold(&lease(0, 0), 10, TIME);
        leases.drain();
        let (records, bytes, held) = leases.open(10, 1000);
        assert_eq!((records, bytes, held.len()), (0, 0, 1));
        assert_eq!(leases.opened(4), None);
        assert_eq!(leases.let_go([&lease(0, 0)]), None);
    }
}
