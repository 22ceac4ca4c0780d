//! What lies between hosts: messages that may get lost, and connections that keep order and break.

use std::collections::{BTreeMap, VecDeque};

use rand::rngs::StdRng;

use crate::profile::NetworkProfile;
use crate::random::Draw;
use crate::time::Nanos;

/// Number of a host: first the nodes, then the balancers.
pub type Host = usize;

/// Names a connection. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Who opened it.
    Client,
    /// Whom it was opened to.
    Server,
}

impl Side {
    /// The opposite end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

/// What comes out of a connection.
#[derive(Debug)]
pub enum Parcel<M> {
    /// What was sent, in order.
    Message(M),
    /// Nothing more will come.
    Closed,
}

#[derive(Debug)]
struct Connection<M> {
    hosts: [Host; 2],
    /// For each side what is on its way there.
    to: [VecDeque<Parcel<M>>; 2],
    /// Whether the side still listens.
    open: [bool; 2],
    /// When the last parcel for each side is due; later ones are due later.
    due: [u64; 2],
    /// Until when nothing gets through: packets were lost and are sent again.
    held_until: u64,
}

/// The network. What is on its way has an event of its own in the schedule, which asks here what
/// has arrived.
#[derive(Debug)]
pub struct Network<M> {
    rng: StdRng,
    profile: NetworkProfile,
    hosts: usize,
    /// For each pair, `from * hosts + to`: how many partitions keep them apart.
    blocked: Vec<u32>,
    /// Likewise, how many of these partitions answer for whom they keep away: no connection works.
    refused: Vec<u32>,
    connections: BTreeMap<ConnectionId, Connection<M>>,
    next: u64,
}

impl<M> Network<M> {
    /// A network without connections.
    #[must_use]
    pub fn new(hosts: usize, profile: NetworkProfile, rng: StdRng) -> Self {
        let blocked = vec![0; hosts * hosts];
        let refused = vec![0; hosts * hosts];
        Self { rng, profile, hosts, blocked, refused, connections: BTreeMap::new(), next: 1 }
    }

    /// Messages neither get lost nor late from now on.
    pub fn calm(&mut self) {
        let profile = &mut self.profile;
        (profile.loss_ppm, profile.duplicate_ppm, profile.spike_ppm) = (0, 0, 0);
        self.blocked.fill(0);
        self.refused.fill(0);
    }

    /// Begins or ends a partition of one direction.
    pub fn block(&mut self, from: Host, to: Host, begins: bool) {
        let count = &mut self.blocked[from * self.hosts + to];
        *count = if begins { *count + 1 } else { count.saturating_sub(1) };
    }

    /// Begins or ends that connections in one direction, which is blocked, are refused.
    pub fn refuse(&mut self, from: Host, to: Host, begins: bool) {
        let count = &mut self.refused[from * self.hosts + to];
        *count = if begins { *count + 1 } else { count.saturating_sub(1) };
    }

    /// Whether whoever sends something to `side` is told that nobody is there.
    #[must_use]
    pub fn is_refused(&self, id: ConnectionId, side: Side) -> bool {
        self.connections.get(&id).is_some_and(|connection| {
            let hosts = connection.hosts;
            let pair = hosts[side.other().index()] * self.hosts + hosts[side.index()];
            connection.open[side.index()] && self.refused[pair] > 0
        })
    }

    /// Whether nothing gets through.
    #[must_use]
    pub fn is_blocked(&self, from: Host, to: Host) -> bool {
        from != to && self.blocked[from * self.hosts + to] > 0
    }

    fn delay(&mut self, from: Host, to: Host) -> Nanos {
        if from == to {
            return 1_000;
        }
        let mut delay = self.rng.span(self.profile.delay_min, self.profile.delay_max);
        if self.rng.chance(self.profile.spike_ppm) {
            delay += self.rng.span(0, self.profile.spike_max);
        }
        delay
    }

    /// How long each copy of a message takes: none if it is lost, two if it comes twice.
    pub fn send(&mut self, from: Host, to: Host) -> [Option<Nanos>; 2] {
        if self.is_blocked(from, to) || self.rng.chance(self.profile.loss_ppm) {
            return [None, None];
        }
        let first = self.delay(from, to);
        let again = self.rng.chance(self.profile.duplicate_ppm);
        [Some(first), again.then(|| self.delay(from, to))]
    }

    /// A way there, or `None` if there is none.
    pub fn way(&mut self, from: Host, to: Host) -> Option<Nanos> {
        (!self.is_blocked(from, to)).then(|| self.delay(from, to))
    }

    /// A way there and back, or `None` if there is none.
    pub fn round_trip(&mut self, from: Host, to: Host) -> Option<Nanos> {
        if self.is_blocked(from, to) || self.is_blocked(to, from) {
            return None;
        }
        Some(self.delay(from, to) + self.delay(to, from))
    }

    /// Opens a connection. It works at once; whether anybody is there shows when something is sent.
    pub fn open(&mut self, client: Host, server: Host) -> ConnectionId {
        let id = ConnectionId(self.next);
        self.next += 1;
        let connection = Connection {
            hosts: [client, server],
            to: [VecDeque::new(), VecDeque::new()],
            open: [true; 2],
            due: [0; 2],
            held_until: 0,
        };
        self.connections.insert(id, connection);
        id
    }

    /// Puts a parcel on its way to `side`; says in how long to look whether it has arrived. `None`:
    /// nobody listens there any more.
    pub fn transmit(
        &mut self,
        id: ConnectionId,
        to: Side,
        parcel: Parcel<M>,
        now: u64,
    ) -> Option<Nanos> {
        let hosts = self.connections.get(&id)?.hosts;
        let delay = self.delay(hosts[to.other().index()], hosts[to.index()]);
        let connection = self.connections.get_mut(&id)?;
        if !connection.open[to.index()] {
            return None;
        }
        connection.to[to.index()].push_back(parcel);
        let due = &mut connection.due[to.index()];
        *due = (*due + 1).max(now + delay);
        Some(*due - now)
    }

    /// The host at a side.
    #[must_use]
    pub fn host(&self, id: ConnectionId, side: Side) -> Option<Host> {
        self.connections.get(&id).map(|connection| connection.hosts[side.index()])
    }

    /// Whether parcels to `side` are held up by a partition.
    #[must_use]
    pub fn is_stuck(&self, id: ConnectionId, side: Side, now: u64) -> bool {
        self.connections.get(&id).is_some_and(|connection| {
            let hosts = connection.hosts;
            now < connection.held_until
                || self.is_blocked(hosts[side.other().index()], hosts[side.index()])
        })
    }

    /// Holds up everything on a connection.
    pub fn hold(&mut self, id: ConnectionId, until: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.held_until = until;
        }
    }

    /// Takes the next parcel for `side`, if that side still listens.
    pub fn take(&mut self, id: ConnectionId, side: Side) -> Option<Parcel<M>> {
        let connection = self.connections.get_mut(&id)?;
        let parcel = connection.to[side.index()].pop_front()?;
        connection.open[side.index()].then_some(parcel)
    }

    /// `side` listens no more. What it sent stays on its way.
    pub fn leave(&mut self, id: ConnectionId, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.open[side.index()] = false;
        if connection.open == [false; 2] {
            self.connections.remove(&id);
        }
    }

    /// Connections with an end at `host` that still listens, and which end that is.
    #[must_use]
    pub fn ends_at(&self, host: Host) -> Vec<(ConnectionId, Side)> {
        let mut ends = Vec::new();
        for (id, connection) in &self.connections {
            for side in [Side::Client, Side::Server] {
                if connection.hosts[side.index()] == host && connection.open[side.index()] {
                    ends.push((*id, side));
                }
            }
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use crate::profile::Profile;
    use crate::random::{Purpose, Streams};

    use super::*;

    #[test]
    fn what_is_refused_is_told_once_and_in_one_direction() {
        let streams = Streams::new(1);
        let profile = Profile::calm(&mut streams.of(Purpose::Profile)).network;
        let mut network = Network::<u8>::new(2, profile, streams.of(Purpose::Network));
        let id = network.open(0, 1);
        network.block(0, 1, true);
        assert!(network.is_stuck(id, Side::Server, 0), "nobody answers for it");
        assert!(!network.is_refused(id, Side::Server));
        network.refuse(0, 1, true);
        assert!(network.transmit(id, Side::Server, Parcel::Message(7), 0).is_some());
        assert!(network.is_refused(id, Side::Server));
        assert!(!network.is_refused(id, Side::Client), "the way back is open");
        // Whoever is told takes the connection for broken: there is nothing to tell again.
        network.leave(id, Side::Server);
        assert!(!network.is_refused(id, Side::Server));
        assert!(network.transmit(id, Side::Server, Parcel::Message(8), 0).is_none());
        let another = network.open(0, 1);
        network.refuse(0, 1, false);
        assert!(!network.is_refused(another, Side::Server));
    }
}
