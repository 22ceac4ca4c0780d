//! What the transport and the groups tell each other, and where the members of a group are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use nbd_rpc::v1::TraceNote;
use nbd_service::ClusterConfig;
use nbd_store::{ReplicaAddresses, ReplicaInfo};
use nbd_topology::{NodeName, ReplicaId, ShardId};

use crate::group_task::GroupHandle;
use crate::transport::{PeerAddress, PeerEvents};

/// Where nodes are reached from here: as this node's own configuration says, for it may know better
/// than what was registered when a shard was formed; else as registered.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    cluster: Arc<ClusterConfig>,
}

impl Addresses {
    pub(crate) const fn new(cluster: Arc<ClusterConfig>) -> Self {
        Self { cluster }
    }

    /// Where a node's gRPC is, as host:port, if the configuration names the node.
    pub(crate) fn configured(&self, node: &NodeName) -> Option<String> {
        Some(self.cluster.node(node)?.addresses.grpc.to_string())
    }

    /// All addresses of a node of the configuration.
    pub(crate) fn of(&self, node: &NodeName) -> Option<ReplicaAddresses> {
        let addresses = &self.cluster.node(node)?.addresses;
        Some(ReplicaAddresses {
            nbd: addresses.nbd.to_string(),
            grpc: addresses.grpc.to_string(),
            http: addresses.http.to_string(),
        })
    }

    /// Members with their addresses as they are reached from here.
    pub(crate) fn resolve(&self, mut members: Vec<ReplicaInfo>) -> Vec<ReplicaInfo> {
        for member in &mut members {
            if let Some(addresses) = self.of(&member.node) {
                member.addresses = addresses;
            }
        }
        members
    }
}

/// Members as the transport takes them.
pub(crate) fn peer_addresses(members: &[ReplicaInfo]) -> BTreeMap<ReplicaId, PeerAddress> {
    let address = |info: &ReplicaInfo| PeerAddress {
        node: info.node.clone(),
        grpc: info.addresses.grpc.clone(),
        directory: Some(info.directory),
    };
    members.iter().map(|info| (info.id, address(info))).collect()
}

/// Passes what the transport tells on to the groups.
#[derive(Debug)]
pub(crate) struct GroupEvents {
    pub(crate) groups: HashMap<ShardId, GroupHandle>,
}

impl PeerEvents for GroupEvents {
    fn message(&self, shard: ShardId, _to: ReplicaId, _from: ReplicaId, bytes: Bytes) {
        if let Some(group) = self.groups.get(&shard) {
            group.message(bytes);
        }
    }

    fn traces(&self, shard: ShardId, traces: Vec<TraceNote>) {
        if let Some(group) = self.groups.get(&shard) {
            group.traces(traces);
        }
    }

    fn newcomer(&self, shard: ShardId, peer: ReplicaId, node: &NodeName, directory: u128) {
        if let Some(group) = self.groups.get(&shard) {
            group.newcomer(peer, node, directory);
        }
    }

    fn connection_lost(&self, node: &NodeName) {
        for group in self.groups.values() {
            group.connection_lost(node);
        }
    }

    fn unreachable(&self, shard: ShardId, peer: ReplicaId) {
        if let Some(group) = self.groups.get(&shard) {
            group.unreachable(peer);
        }
    }
}
