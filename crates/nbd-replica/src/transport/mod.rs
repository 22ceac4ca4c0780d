//! Raft messages to and from the other nodes of the cluster.
//!
//! It knows nodes, connections and addresses; it does not know what a message says, nor who leads.
//! Sending never waits and never grows: what a peer does not take in time is dropped, and the group
//! is told, for Raft repeats what matters.
//!
//! ```text
//!  group task ─▶ TransportHandle::send ─▶ outbox (control) ═▶ lane task ─▶ TCP ─▶ peer's service
//!                        │  address book ▲ ─▶ outbox (bulk) ═▶ lane task ─▶ TCP ─▶ peer's service
//!                        ▼               │
//!                  set_peers ────────────┘
//!
//!  peer's lane task ─▶ TCP ─▶ service ─▶ PeerEvents::message ─▶ group task
//!
//!  task                 ends when                           then
//!  lane task            stop, or no group has the peer      what is queued goes out, bounded
//!  receiving task       stop, its stream ends, or a newer   the peer gets the reason as a status
//!                       stream of the same lane came
//! ```
//!
//! - Lanes: messages with entries ([`Lane::Bulk`]) have a TCP connection of their own, so that they
//!   cannot delay the others ([`Lane::Control`]). Within a lane order is kept.
//! - A connection that breaks is a *hint* that the peer's process died:
//!   [`PeerEvents::connection_lost`]. It comes as soon as the system tells, also when nothing is
//!   being sent, from either direction's streams. A peer that is merely silent gives no such hint
//!   before its connection is given up, about two seconds later.
//! - `book`: which replica is where. `outbox`: what waits for one peer on one lane. `peer`: a peer
//!   and its lane tasks. `service`: the receiving side. `metrics`, [`limits`].

mod book;
pub mod limits;
mod metrics;
mod outbox;
mod peer;
mod service;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::task::Waker;

use bytes::Bytes;
use nbd_consensus::OutMessage;
use nbd_rpc::MESSAGE_BYTES_MAX;
use nbd_rpc::v1::raft_transport_server::RaftTransportServer;
use nbd_rpc::v1::{DeliverLane, TraceNote};
use nbd_topology::{ClusterName, NodeName, ReplicaId, ShardId};
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::book::Book;
use self::metrics::{DropMetrics, PeerMetrics};
use self::outbox::{Push, Waiting};
use self::peer::{LaneTask, Peer};
use self::service::Incoming;
pub use self::service::{Acks, TransportService};

/// What the transport tells the groups of this node. Called from the transport's tasks and from
/// [`TransportHandle::send`]; must not wait.
pub trait PeerEvents: Send + Sync {
    /// A message for this node's replica `to` of `shard`, from its peer `from`. To be dropped when
    /// the group cannot take it now.
    fn message(&self, shard: ShardId, to: ReplicaId, from: ReplicaId, bytes: Bytes);

    /// Entries to come are traced. Told just before [`PeerEvents::message`]; there is at least one.
    fn traces(&self, shard: ShardId, traces: Vec<TraceNote>);

    /// A message for this node's replica of `shard` has come from a replica that the address book
    /// does not have, on a node of this cluster: it may have joined while this node was away. Told
    /// just before [`PeerEvents::message`].
    fn newcomer(&self, shard: ShardId, peer: ReplicaId, node: &NodeName, directory: u128);

    /// A connection from or to this node broke. A hint that its process died, never a proof. May
    /// come several times for one death.
    fn connection_lost(&self, node: &NodeName);

    /// Messages to this replica were dropped. Told once, and then not again before messages to its
    /// node have flowed again.
    fn unreachable(&self, shard: ShardId, peer: ReplicaId);
}

/// Where a replica is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The node it is on.
    pub node: NodeName,
    /// The node's gRPC address, `host:port`.
    pub grpc: String,
    /// Identity of the data directory that the replica lives in, once known. Its messages are taken
    /// from no other.
    pub directory: Option<u128>,
}

/// Who this node is to the others.
#[derive(Clone)]
pub struct Transport {
    /// The cluster; other clusters' nodes are refused.
    pub cluster: ClusterName,
    /// This node.
    pub node: NodeName,
    /// Identity of this node's data directory.
    pub directory: u128,
    /// Drawn at random when this process started.
    pub incarnation: u64,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Transport {
    /// A transport that takes every message that arrived whole; whether the payloads in it are as
    /// they should be is for the group to see.
    #[must_use]
    pub fn new(cluster: ClusterName, node: NodeName, directory: u128, incarnation: u64) -> Self {
        Self { cluster, node, directory, incarnation }
    }

    /// Starts it, with no peers yet. All its tasks end soon after `stop`, which is to be cancelled
    /// only when the groups have nothing to say any more.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn spawn(self, events: Arc<dyn PeerEvents>, stop: CancellationToken) -> TransportHandle {
        TransportHandle {
            shared: Arc::new(Shared {
                me: self,
                events,
                book: RwLock::default(),
                incoming: Mutex::default(),
                drops: DropMetrics::new(),
                stop,
                tasks: TaskTracker::new(),
                runtime: Handle::current(),
            }),
        }
    }
}

/// One of the two connections to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Messages without entries.
    Control,
    /// Messages with entries.
    Bulk,
}

impl Lane {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Control, Self::Bulk];

    const fn place(self) -> usize {
        match self {
            Self::Control => 0,
            Self::Bulk => 1,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Bulk => "bulk",
        }
    }

    const fn to_wire(self) -> DeliverLane {
        match self {
            Self::Control => DeliverLane::Control,
            Self::Bulk => DeliverLane::Bulk,
        }
    }

    const fn from_wire(lane: DeliverLane) -> Option<Self> {
        match lane {
            DeliverLane::Unspecified => None,
            DeliverLane::Control => Some(Self::Control),
            DeliverLane::Bulk => Some(Self::Bulk),
        }
    }
}

/// A replica of a shard, as far as telling a group about it goes.
type Member = (ShardId, ReplicaId);

/// What the handles, the lane tasks and the service have in common.
struct Shared {
    me: Transport,
    events: Arc<dyn PeerEvents>,
    /// Read for each message, written when a membership changes.
    book: RwLock<Book>,
    /// The streams that others have open to this node.
    incoming: Mutex<Incoming>,
    drops: DropMetrics,
    stop: CancellationToken,
    tasks: TaskTracker,
    runtime: Handle,
}

/// Handle on the transport; clones are the same one.
#[derive(Clone)]
pub struct TransportHandle {
    shared: Arc<Shared>,
}

impl fmt::Debug for TransportHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportHandle").field("me", &self.shared.me).finish_non_exhaustive()
    }
}

impl TransportHandle {
    /// Sends a group's messages. Never waits; what cannot be queued is dropped and told through
    /// [`PeerEvents::unreachable`]. Messages to the same peer on the same lane keep their order.
    pub fn send(&self, shard: ShardId, from: ReplicaId, messages: Vec<OutMessage>) {
        self.send_traced(shard, from, messages, &mut Vec::new());
    }

    /// The same. Takes out of `notes` those for replicas that are sent entries.
    pub fn send_traced(
        &self,
        shard: ShardId,
        from: ReplicaId,
        messages: Vec<OutMessage>,
        notes: &mut Vec<(ReplicaId, TraceNote)>,
    ) {
        let mut wakers: Vec<Waker> = Vec::new();
        let mut unreachable: Vec<ReplicaId> = Vec::new();
        {
            let book = self.shared.book.read();
            for OutMessage { to, bulk, bytes } in messages {
                let Some(peer) = book.peer(shard, to) else {
                    self.shared.drops.unknown_peer.increment(1);
                    continue;
                };
                let lane = if bulk { Lane::Bulk } else { Lane::Control };
                let traces = match lane {
                    Lane::Bulk if !notes.is_empty() => {
                        let taken = notes.extract_if(.., |(whom, _)| *whom == to);
                        taken.map(|(_, note)| note).collect()
                    }
                    Lane::Bulk | Lane::Control => Vec::new(),
                };
                match peer.outbox(lane).push(Waiting { shard, from, to, bytes, traces }) {
                    Push::Queued(waker) => wakers.extend(waker),
                    Push::Dropped { tell } => {
                        if tell {
                            unreachable.push(to);
                        }
                    }
                }
            }
        }
        // Last, so that all of a call's messages go into one frame.
        for waker in wakers {
            waker.wake();
        }
        for peer in unreachable {
            self.shared.events.unreachable(shard, peer);
        }
    }

    /// Replaces what is known of a shard: this node's replica of it, and where every other replica
    /// is. Connects to nodes that are new, and lets go of those that no shard needs any more.
    /// Replicas on this very node are left out.
    pub fn set_peers(
        &self,
        shard: ShardId,
        local: ReplicaId,
        mut peers: BTreeMap<ReplicaId, PeerAddress>,
    ) {
        let shared = &self.shared;
        peers.retain(|_, address| address.node != shared.me.node);
        let mut book = shared.book.write();
        let started = book.replace(shard, local, peers, |name, grpc| {
            let metrics = PeerMetrics::new(name);
            Peer::new(name.clone(), grpc.to_owned(), shared.stop.child_token(), metrics)
        });
        for peer in started {
            for lane in Lane::ALL {
                let task = LaneTask::new(Arc::clone(shared), Arc::clone(&peer), lane);
                shared.tasks.spawn_on(task.run(), &shared.runtime);
            }
        }
    }

    /// The receiving side, for [`nbd_rpc::server`].
    #[must_use]
    pub fn service(&self) -> RaftTransportServer<TransportService> {
        RaftTransportServer::new(TransportService::new(Arc::clone(&self.shared)))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Waits, after `stop`, until all tasks have ended: at most about
    /// [`FLUSH_TIMEOUT`](limits::FLUSH_TIMEOUT).
    pub async fn closed(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}
