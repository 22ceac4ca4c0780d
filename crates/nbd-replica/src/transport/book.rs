//! Which replica is where, and which nodes there are connections to.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use nbd_topology::{NodeName, ReplicaId, ShardId};

use super::peer::Peer;
use super::{Member, PeerAddress};

/// The addresses of all shards on this node. There is one [`Peer`] for each node that any shard
/// names, shared by all.
#[derive(Default)]
pub(super) struct Book {
    shards: HashMap<ShardId, ShardPeers>,
    peers: HashMap<NodeName, Arc<Peer>>,
}

struct ShardPeers {
    /// This node's replica.
    local: ReplicaId,
    others: BTreeMap<ReplicaId, PeerAddress>,
}

/// Why a message that arrived is not for this node, or not from whom it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stranger {
    Shard,
    Receiver,
    /// A replica that is known, on another node or in another data directory.
    Sender,
    /// A replica that is not known.
    Newcomer,
}

impl Book {
    /// The node that a shard's replica is on.
    pub(super) fn peer(&self, shard: ShardId, replica: ReplicaId) -> Option<&Arc<Peer>> {
        let address = self.shards.get(&shard)?.others.get(&replica)?;
        self.peers.get(&address.node)
    }

    /// The node of this name, if any shard has a replica there.
    pub(super) fn node(&self, name: &NodeName) -> Option<&Arc<Peer>> {
        self.peers.get(name)
    }

    /// Every replica on a node.
    pub(super) fn members(&self, node: &NodeName) -> Vec<Member> {
        self.addresses(node).map(|(member, _)| member).collect()
    }

    fn addresses(&self, node: &NodeName) -> impl Iterator<Item = (Member, &PeerAddress)> {
        self.shards.iter().flat_map(move |(shard, peers)| {
            let here = peers.others.iter().filter(move |(_, address)| address.node == *node);
            here.map(|(replica, address)| ((*shard, *replica), address))
        })
    }

    /// Whether a message from `node`, with its data directory, is for this node's replica and from
    /// one that lives there.
    pub(super) fn admit(
        &self,
        (shard, from): Member,
        to: ReplicaId,
        node: &NodeName,
        directory: u128,
    ) -> Result<(), Stranger> {
        let peers = self.shards.get(&shard).ok_or(Stranger::Shard)?;
        if peers.local != to {
            return Err(Stranger::Receiver);
        }
        let address = peers.others.get(&from).ok_or(Stranger::Newcomer)?;
        if address.node != *node || address.directory.is_some_and(|known| known != directory) {
            return Err(Stranger::Sender);
        }
        Ok(())
    }

    /// Replaces what is known of a shard. Peers that are new, or whose address changed, are made
    /// with `make` and returned to be started; peers that are not needed any more are stopped.
    pub(super) fn replace(
        &mut self,
        shard: ShardId,
        local: ReplicaId,
        others: BTreeMap<ReplicaId, PeerAddress>,
        make: impl Fn(&NodeName, &str) -> Peer,
    ) -> Vec<Arc<Peer>> {
        let mut started = Vec::new();
        for PeerAddress { node, grpc, .. } in others.values() {
            if self.peers.get(node).is_some_and(|peer| peer.address() == grpc) {
                continue;
            }
            let peer = Arc::new(make(node, grpc));
            started.push(Arc::clone(&peer));
            if let Some(former) = self.peers.insert(node.clone(), peer) {
                former.stop();
            }
        }
        self.shards.insert(shard, ShardPeers { local, others });
        let Self { shards, peers } = self;
        peers.retain(|name, peer| {
            let needed = shards
                .values()
                .any(|shard| shard.others.values().any(|address| address.node == *name));
            if !needed {
                peer.stop();
            }
            needed
        });
        started
    }
}
