//! What is under way between clients and the broker.
//!
//! A connection delivers in order, as TCP does. It may be slow, and slower than another one; it may be cut, with everything
//! on it lost; and a client may leave one that is stuck for a new one, while what it sent there is still on its way: then the
//! same request arrives twice, or in another order.

use std::collections::{BTreeMap, VecDeque};

use felucca_broker::engine::command::Command;
use felucca_broker::engine::effect::{Delivery, Reply};

use crate::engine_model::rng::Rng;

/// A client, by its number.
pub(crate) type ClientId = usize;

/// A connection, by its number; numbers are not used again.
pub(crate) type ConnectionId = u64;

/// On its way to the broker.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) correlation: u64,
    pub(crate) command: Command,
}

/// On its way to a client.
#[derive(Clone, Debug)]
pub(crate) enum Push {
    Reply {
        correlation: u64,
        reply: Reply,
    },
    Delivery(Delivery),
    /// A subscription was ended.
    Ended,
}

#[derive(Debug)]
struct Timed<T> {
    at_ms: u64,
    what: T,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) client: ClientId,
    up: VecDeque<Timed<Request>>,
    down: VecDeque<Timed<Push>>,
    /// The client has left it; the broker does not know yet.
    left: bool,
    /// The broker's end is closed.
    closed: bool,
    slow_ms: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Network {
    connections: BTreeMap<ConnectionId, Connection>,
    last: ConnectionId,
    /// How many of a hundred connections are slow.
    pub(crate) slow: u64,
}

impl Network {
    pub(crate) fn connect(&mut self, rng: &mut Rng, client: ClientId) -> ConnectionId {
        self.last += 1;
        let slow_ms = if rng.chance(self.slow) { rng.between(1, 2_000) } else { 0 };
        let (up, down) = (VecDeque::new(), VecDeque::new());
        self.connections
            .insert(self.last, Connection { client, up, down, left: false, closed: false, slow_ms });
        self.last
    }

    /// The connections on which something may arrive at the broker; the empty ones that were left, too: they end.
    pub(crate) fn ready_up(&self, now_ms: u64) -> Vec<ConnectionId> {
        let ready = |connection: &Connection| match connection.up.front() {
            Some(first) => first.at_ms <= now_ms && !connection.closed,
            None => connection.left,
        };
        self.connections.iter().filter(|(_, connection)| ready(connection)).map(|(id, _)| *id).collect()
    }

    pub(crate) fn ready_down(&self, now_ms: u64) -> Vec<ConnectionId> {
        let ready = |connection: &Connection| match connection.down.front() {
            Some(first) => first.at_ms <= now_ms,
            None => connection.closed,
        };
        self.connections.iter().filter(|(_, connection)| ready(connection)).map(|(id, _)| *id).collect()
    }

    pub(crate) fn send_up(&mut self, rng: &mut Rng, now_ms: u64, on: ConnectionId, request: Request) {
        let Some(connection) = self.connections.get_mut(&on) else { return };
        let at_ms = now_ms + rng.below(connection.slow_ms + 1);
        let at_ms = connection.up.back().map_or(at_ms, |last| at_ms.max(last.at_ms));
        connection.up.push_back(Timed { at_ms, what: request });
    }

    pub(crate) fn send_down(&mut self, rng: &mut Rng, now_ms: u64, on: ConnectionId, push: Push) {
        let Some(connection) = self.connections.get_mut(&on).filter(|connection| !connection.left) else {
            return;
        };
        let at_ms = now_ms + rng.below(connection.slow_ms + 1);
        let at_ms = connection.down.back().map_or(at_ms, |last| at_ms.max(last.at_ms));
        connection.down.push_back(Timed { at_ms, what: push });
    }

    /// The next request of a connection; `None`: its end.
    pub(crate) fn take_up(&mut self, on: ConnectionId) -> Option<Request> {
        let connection = self.connections.get_mut(&on)?;
        if let Some(first) = connection.up.pop_front() {
            return Some(first.what);
        }
        self.connections.remove(&on);
        None
    }

    /// What comes next to a client; `None`: the end of its connection.
    pub(crate) fn take_down(&mut self, on: ConnectionId) -> Option<Push> {
        let connection = self.connections.get_mut(&on)?;
        if let Some(first) = connection.down.pop_front() {
            return Some(first.what);
        }
        self.connections.remove(&on);
        None
    }

    pub(crate) fn client_of(&self, on: ConnectionId) -> Option<ClientId> {
        self.connections.get(&on).map(|connection| connection.client)
    }

    /// Connections that their clients use.
    pub(crate) fn in_use(&self) -> Vec<ConnectionId> {
        let used = |connection: &Connection| !connection.left && !connection.closed;
        self.connections.iter().filter(|(_, connection)| used(connection)).map(|(id, _)| *id).collect()
    }

    /// A connection is cut: what is on it is lost. Both ends find out.
    pub(crate) fn cut(&mut self, on: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&on) {
            connection.up.clear();
            connection.down.clear();
            connection.closed = true;
        }
    }

    /// The client leaves a connection that is stuck: what it sent may still arrive, but for what `goes` says.
    pub(crate) fn leave(
        &mut self,
        rng: &mut Rng,
        now_ms: u64,
        on: ConnectionId,
        goes: impl Fn(&Command) -> bool,
    ) {
        if let Some(connection) = self.connections.get_mut(&on) {
            connection.left = true;
            connection.down.clear();
            connection.up.retain(|timed| goes(&timed.what.command));
            let late_ms = now_ms + rng.below(3_000);
            for timed in &mut connection.up {
                timed.at_ms = timed.at_ms.max(late_ms);
            }
        }
    }

    /// The broker died: what it said may still arrive, what it was sent does not.
    pub(crate) fn broker_died(&mut self, rng: &mut Rng) {
        self.connections.retain(|_, connection| !connection.left);
        for connection in self.connections.values_mut() {
            connection.up.clear();
            connection.closed = true;
            if rng.chance(50) {
                connection.down.clear();
            }
        }
    }

    /// From now on everything arrives at once.
    pub(crate) fn heal(&mut self) {
        self.slow = 0;
        for connection in self.connections.values_mut() {
            connection.slow_ms = 0;
            connection.up.iter_mut().for_each(|timed| timed.at_ms = 0);
            connection.down.iter_mut().for_each(|timed| timed.at_ms = 0);
        }
    }
}
