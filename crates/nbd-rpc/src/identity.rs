//! The checks with which two nodes make sure that they belong together.

use bytes::Bytes;
use nbd_topology::{ClusterName, NodeName, ReplicaId, ShardId};

use crate::error::Refusal;

/// Version of the protocol between nodes. Raised with every change that an older node would
/// misunderstand; new fields and services do not count.
pub const PROTOCOL_VERSION: u32 = 1;

/// Checks the caller's protocol version.
///
/// # Errors
/// [`Refusal::Protocol`].
pub const fn check_protocol(found: u32) -> Result<(), Refusal> {
    if found == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Refusal::Protocol { found, expected: PROTOCOL_VERSION })
}

/// Checks the caller's cluster.
///
/// # Errors
/// [`Refusal::Cluster`].
pub fn check_cluster(found: &str, expected: &ClusterName) -> Result<(), Refusal> {
    if found == expected.as_str() {
        return Ok(());
    }
    Err(Refusal::Cluster { found: found.to_owned(), expected: expected.clone() })
}

/// Checks that the caller means this node.
///
/// # Errors
/// [`Refusal::Node`].
pub fn check_node(found: &str, expected: &NodeName) -> Result<(), Refusal> {
    if found == expected.as_str() {
        return Ok(());
    }
    Err(Refusal::Node { found: found.to_owned(), expected: expected.clone() })
}

/// Checks that the caller means this node's replica of the shard.
///
/// # Errors
/// [`Refusal::Replica`].
pub const fn check_replica(shard: ShardId, found: u64, expected: ReplicaId) -> Result<(), Refusal> {
    if found == expected.get() {
        return Ok(());
    }
    Err(Refusal::Replica { shard, found, expected })
}

/// A directory id on the wire: 16 bytes, big-endian.
#[must_use]
pub fn directory_to_bytes(directory: u128) -> Bytes {
    Bytes::copy_from_slice(&directory.to_be_bytes())
}

/// A directory id from the wire.
///
/// # Errors
/// [`Refusal::Malformed`] when it is not 16 bytes.
pub fn directory_from_bytes(bytes: &[u8]) -> Result<u128, Refusal> {
    let bytes = bytes.try_into().map_err(|_| Refusal::Malformed("a directory id is 16 bytes"))?;
    Ok(u128::from_be_bytes(bytes))
}

/// A replica id from the wire.
///
/// # Errors
/// [`Refusal::Malformed`] when it is 0.
pub fn replica_id(id: u64) -> Result<ReplicaId, Refusal> {
    ReplicaId::new(id).ok_or(Refusal::Malformed("a replica id is never 0"))
}

/// A node name from the wire.
///
/// # Errors
/// [`Refusal::Name`].
pub fn node_name(name: &str) -> Result<NodeName, Refusal> {
    Ok(name.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let cluster: ClusterName = "demo".parse().unwrap();
        let node: NodeName = "n1".parse().unwrap();
        assert_eq!(check_protocol(PROTOCOL_VERSION), Ok(()));
        assert_eq!(check_cluster("demo", &cluster), Ok(()));
        assert_eq!(check_node("n1", &node), Ok(()));
        assert!(matches!(check_protocol(2), Err(Refusal::Protocol { found: 2, expected: 1 })));
        assert!(matches!(check_cluster("other", &cluster), Err(Refusal::Cluster { .. })));
        assert!(matches!(check_node("n2", &node), Err(Refusal::Node { .. })));
        assert!(matches!(replica_id(0), Err(Refusal::Malformed(_))));
        assert!(matches!(node_name("a b"), Err(Refusal::Name(_))));
        let mine = ReplicaId::new(3).unwrap();
        assert_eq!(check_replica(ShardId(0), 3, mine), Ok(()));
        assert!(matches!(check_replica(ShardId(0), 1, mine), Err(Refusal::Replica { .. })));
    }

    #[test]
    fn directory_ids_keep_their_bytes() {
        let bytes = directory_to_bytes(0x0102);
        assert_eq!(bytes[..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(directory_from_bytes(&bytes), Ok(0x0102));
        assert!(directory_from_bytes(&bytes[1..]).is_err());
    }
}
