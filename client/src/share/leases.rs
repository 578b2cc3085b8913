//! What this member holds, and the credit that follows from it.
//!
//! A record counts against the prefetch from its push until it is settled, wherever it is: queued, in a handler, or in a
//! settlement on its way. The credit to give is what is wanted, less what is held and what the open subscription has left; what
//! is let go while one is being opened is given once the broker knows it.
//!
//! A lease whose time is over is held no longer, whether or not the broker could say so: work for it has to stop.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use felucca_protocol::message;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use uuid::Uuid;

use super::delivery::Lease;

/// By topic id, partition and offset: at most one lease each. All three come from a broker that the user has chosen, so that
/// the hash need not withstand an attack.
type Key = (Uuid, u32, u64);

#[derive(Debug)]
struct Held {
    lease: Lease,
    bytes: u32,
    /// As granted.
    duration: Duration,
    /// The lease is over then, as far as this member knows.
    deadline: Instant,
    extend_at: Instant,
    /// To be extended by itself: queued here, or in a worker's handler.
    keep: bool,
    /// A settlement is on its way.
    settling: bool,
    /// Cancelled when the lease is held no longer; made for the first who asks.
    lost: Option<CancellationToken>,
}

/// Records and bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Amount {
    records: i64,
    bytes: i64,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<Key, Held, foldhash::fast::RandomState>,
    held_bytes: i64,
    /// 0 while none is open.
    subscription: u64,
    /// What the member wants to hold, in work and queued.
    wanted: Amount,
    /// What is left of the subscription's credit; below zero when a large record took more than there was.
    left: Amount,
    /// Nothing more is wanted, ever.
    draining: bool,
}

/// What follows from another number of wanted records.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The open subscription gets this.
    Credit(Option<message::Credit>),
    /// The open subscription has more credit than it should: only another one can have less.
    Resubscribe,
}

/// What a moment brings.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) extend: Vec<Lease>,
    /// For the leases that ended.
    pub(super) credit: Option<message::Credit>,
    /// When the next lease ends.
    pub(super) next_end: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Leases {
    state: Mutex<State>,
}

fn key(lease: &Lease) -> Key {
    (lease.topic_id, lease.partition, lease.offset)
}

impl Leases {
    /// Of a member that wants to hold so much.
    pub(super) fn new(records: u32, bytes: u32) -> Self {
        let wanted = Amount { records: records.into(), bytes: bytes.into() };
        Self { state: Mutex::new(State { wanted, ..State::default() }) }
    }

    /// Takes a record in. One that came again, after an older lease of it ran out, has taken credit twice and is settled
    /// once: answers the credit that the open subscription gets for the older lease.
    pub(super) fn hold(
        &self,
        lease: &Lease,
        bytes: u32,
        now: Instant,
        duration: Duration,
    ) -> Option<message::Credit> {
        let held = Held {
            lease: *lease,
            bytes,
            duration,
            deadline: now + duration,
            extend_at: now + duration / 2,
            keep: true,
            settling: false,
            lost: None,
        };
        let mut state = self.state.lock();
        state.left.records -= 1;
        state.left.bytes -= i64::from(bytes);
        state.held_bytes += i64::from(bytes);
        let older = state.held.insert(key(lease), held)?;
        state.lose(older);
        state.credit()
    }

    pub(super) fn is_held(&self, lease: &Lease) -> bool {
        self.state.lock().held.get(&key(lease)).is_some_and(|held| held.lease == *lease)
    }

    /// Is cancelled once the lease is held no longer.
    pub(super) fn lost(&self, lease: &Lease) -> CancellationToken {
        let mut state = self.state.lock();
        match state.held.get_mut(&key(lease)) {
            Some(held) if held.lease == *lease => {
                held.lost.get_or_insert_with(CancellationToken::new).clone()
            }
            _ => {
                let lost = CancellationToken::new();
                lost.cancel();
                lost
            }
        }
    }

    /// From now on its holder extends it. False when it is held no longer.
    pub(super) fn hand_out(&self, lease: &Lease) -> bool {
        self.change(lease, |held| held.keep = false)
    }

    /// Nothing to do for one that is held no longer.
    pub(super) fn set_settling(&self, lease: &Lease, settling: bool) {
        self.change(lease, |held| held.settling = settling);
    }

    /// False when it is held no longer.
    fn change(&self, lease: &Lease, change: impl FnOnce(&mut Held)) -> bool {
        match self.state.lock().held.get_mut(&key(lease)) {
            Some(held) if held.lease == *lease => {
                change(held);
                true
            }
            _ => false,
        }
    }

    // ---- Credit ----

    /// A subscription is about to be opened: what to ask for, and what is held already.
    pub(super) fn open(&self) -> (u32, u32, Vec<message::LeaseRef>) {
        let mut state = self.state.lock();
        state.subscription = 0;
        let held = state.held.values().map(|held| held.lease.to_message()).collect();
        let missing = state.missing();
        state.left = Amount { records: missing.records.max(0), bytes: missing.bytes.max(0) };
        (unsigned(state.left.records), unsigned(state.left.bytes), held)
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
        let mut state = self.state.lock();
        state.draining = true;
        state.wanted = Amount::default();
    }

    /// Wants to hold so many records from now on.
    pub(super) fn want(&self, records: u32) -> Change {
        let mut state = self.state.lock();
        if state.draining {
            return Change::Credit(None);
        }
        state.wanted.records = records.into();
        if state.subscription != 0 && state.left.records > state.missing().records.max(0) {
            return Change::Resubscribe;
        }
        Change::Credit(state.credit())
    }

    /// Gives up records; answers the credit that the open subscription gets for them.
    pub(super) fn let_go<'a>(&self, leases: impl IntoIterator<Item = &'a Lease>) -> Option<message::Credit> {
        let mut state = self.state.lock();
        for lease in leases {
            if let Entry::Occupied(entry) = state.held.entry(key(lease))
                && entry.get().lease == *lease
            {
                let held = entry.remove();
                state.lose(held);
            }
        }
        state.credit()
    }

    // ---- Time ----

    /// Ends the leases whose time is over, and names those to extend: the ones to be kept that have half of their time left or
    /// less, each again after an eighth.
    pub(super) fn due(&self, now: Instant) -> Due {
        let mut state = self.state.lock();
        let over = |held: &Held| !held.settling && held.deadline <= now;
        let over: Vec<Held> = state.held.extract_if(|_, held| over(held)).map(|(_, held)| held).collect();
        for held in over {
            state.lose(held);
        }
        let mut due = Due { extend: Vec::new(), credit: state.credit(), next_end: None };
        for held in state.held.values_mut().filter(|held| !held.settling) {
            due.next_end = Some(due.next_end.map_or(held.deadline, |next| next.min(held.deadline)));
            if held.keep && held.extend_at <= now {
                held.extend_at = now + held.duration / 8;
                due.extend.push(held.lease);
            }
        }
        due
    }

    pub(super) fn extended(&self, lease: &Lease, remaining: Duration) {
        let now = Instant::now();
        self.change(lease, |held| {
            held.deadline = now + remaining;
            held.extend_at = now + remaining / 2;
        });
    }
}

impl State {
    /// It was held, and is no longer.
    fn lose(&mut self, held: Held) {
        self.held_bytes -= i64::from(held.bytes);
        if let Some(lost) = held.lost {
            lost.cancel();
        }
    }

    /// What is wanted and not held; below zero when more is held.
    fn missing(&self) -> Amount {
        let held = i64::try_from(self.held.len()).unwrap_or(i64::MAX);
        Amount { records: self.wanted.records - held, bytes: self.wanted.bytes - self.held_bytes }
    }

    /// What the open subscription gets on top of what it has left.
    fn credit(&mut self) -> Option<message::Credit> {
        if self.subscription == 0 {
            return None;
        }
        let missing = self.missing();
        let records = (missing.records - self.left.records).max(0);
        let bytes = (missing.bytes - self.left.bytes).max(0);
        if records == 0 && bytes == 0 {
            return None;
        }
        self.left.records += records;
        self.left.bytes += bytes;
        Some(message::Credit {
            subscription: self.subscription,
            records: unsigned(records),
            bytes: unsigned(bytes),
        })
    }
}

/// Amounts that are wanted or held fit; what does not is as good as without limit.
fn unsigned(amount: i64) -> u32 {
    u32::try_from(amount).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(offset: u64, sequence: u64) -> Lease {
        Lease { topic_id: Uuid::from_bytes([1; 16]), partition: 0, offset, boot_epoch: 1, sequence }
    }

    const TIME: Duration = Duration::from_secs(30);

    #[test]
    fn what_is_let_go_while_a_subscription_is_opened_is_owed_to_it() {
        let leases = Leases::new(10, 1000);
        for offset in 0..3 {
            leases.hold(&lease(offset, offset), 100, Instant::now(), TIME);
        }
        let (records, bytes, held) = leases.open();
        assert_eq!((records, bytes, held.len()), (7, 700, 3));
        assert_eq!(leases.let_go([&lease(0, 0)]), None);
        let owed = message::Credit { subscription: 9, records: 1, bytes: 100 };
        assert_eq!(leases.opened(9), Some(owed));
        assert_eq!(leases.let_go([&lease(1, 1), &lease(2, 2)]).map(|credit| credit.records), Some(2));
    }

    #[test]
    fn an_old_lease_does_not_end_a_later_one_on_the_same_record() {
        let leases = Leases::new(10, 1000);
        leases.hold(&lease(5, 1), 10, Instant::now(), TIME);
        leases.hold(&lease(5, 2), 10, Instant::now(), TIME);
        leases.let_go([&lease(5, 1)]);
        assert!(leases.is_held(&lease(5, 2)));
        assert!(!leases.is_held(&lease(5, 1)));
    }

    #[test]
    fn a_record_that_comes_again_costs_no_credit_for_its_older_lease() {
        let leases = Leases::new(10, 1000);
        leases.open();
        leases.opened(9);
        assert_eq!(leases.hold(&lease(5, 1), 10, Instant::now(), TIME), None);
        let owed = message::Credit { subscription: 9, records: 1, bytes: 10 };
        assert_eq!(leases.hold(&lease(5, 2), 10, Instant::now(), TIME), Some(owed));
        assert_eq!(leases.let_go([&lease(5, 1)]), None);
        assert_eq!(leases.let_go([&lease(5, 2)]), Some(owed));
    }

    #[test]
    fn leases_are_extended_at_half_time_unless_handed_out_or_being_settled() {
        let leases = Leases::new(10, 1000);
        for offset in 0..3 {
            leases.hold(&lease(offset, offset), 1, Instant::now(), TIME);
        }
        leases.hand_out(&lease(0, 0));
        leases.set_settling(&lease(1, 1), true);
        assert!(leases.due(Instant::now()).extend.is_empty());
        let later = Instant::now() + TIME / 2;
        assert_eq!(leases.due(later).extend, [lease(2, 2)]);
        assert!(leases.due(later).extend.is_empty());
        assert_eq!(leases.due(later + TIME / 4).extend, [lease(2, 2)]);
    }

    #[test]
    fn a_lease_ends_in_time_unless_it_is_extended_or_being_settled() {
        let leases = Leases::new(10, 1000);
        leases.open();
        leases.opened(9);
        for offset in 0..3 {
            leases.hold(&lease(offset, offset), 1, Instant::now(), TIME);
        }
        let lost = [0, 1, 2].map(|offset| leases.lost(&lease(offset, offset)));
        leases.set_settling(&lease(1, 1), true);
        leases.extended(&lease(2, 2), TIME * 2);
        let due = leases.due(Instant::now() + TIME);
        assert_eq!(due.credit.map(|credit| credit.records), Some(1));
        assert!(due.next_end.is_some_and(|next| next > Instant::now() + TIME));
        assert_eq!(lost.each_ref().map(CancellationToken::is_cancelled), [true, false, false]);
        assert!(leases.lost(&lease(0, 0)).is_cancelled());
        assert_eq!(leases.let_go([&lease(0, 0)]), None, "given already");
        assert_eq!(leases.let_go([&lease(1, 1)]).map(|credit| credit.records), Some(1));
        assert!(lost[1].is_cancelled());
    }

    #[test]
    fn a_member_that_wants_less_asks_anew_and_one_that_wants_more_gives_credit() {
        let leases = Leases::new(10, 1000);
        leases.open();
        leases.opened(9);
        leases.hold(&lease(0, 0), 10, Instant::now(), TIME);
        assert_eq!(leases.want(0), Change::Resubscribe);
        leases.closed();
        assert_eq!((leases.open().0, leases.opened(10)), (0, None));
        assert_eq!(leases.want(1), Change::Credit(None), "it holds that one");
        let one = message::Credit { subscription: 10, records: 1, bytes: 10 };
        assert_eq!(leases.let_go([&lease(0, 0)]), Some(one));
        let more = message::Credit { subscription: 10, records: 9, bytes: 0 };
        assert_eq!(leases.want(10), Change::Credit(Some(more)));
    }

    #[test]
    fn a_member_that_drains_asks_for_nothing() {
        let leases = Leases::new(10, 1000);
        leases.hold(&lease(0, 0), 10, Instant::now(), TIME);
        leases.drain();
        let (records, bytes, held) = leases.open();
        assert_eq!((records, bytes, held.len()), (0, 0, 1));
        assert_eq!(leases.opened(4), None);
        assert_eq!(leases.let_go([&lease(0, 0)]), None);
    }
}
