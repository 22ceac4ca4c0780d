//! Which nodes a cluster starts with.

use std::num::NonZeroU32;

use crate::ids::{NodeName, ShardId};
use crate::placement::shard_of;

/// Shards in a cluster. The count is fixed when the cluster is created, so the bound leaves far
/// more than the 64 advised for growth, while a list of all shards stays small.
pub const SHARDS_MAX: usize = 65_536;

/// Replicas of one shard. A majority of 7 survives three losses; each further replica costs every
/// write another copy.
pub const REPLICAS_MAX: usize = 7;

/// A shard map that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardMapError {
    /// Not 1 to [`SHARDS_MAX`] shards.
    #[error("a cluster has 1 to {SHARDS_MAX} shards, not {shards}")]
    Shards {
        /// Shards given.
        shards: usize,
    },
    /// A shard without 1 to [`REPLICAS_MAX`] replicas.
    #[error("shard {shard} has {replicas} replicas: use 1 to {REPLICAS_MAX}")]
    Replicas {
        /// The shard.
        shard: ShardId,
        /// Replicas given.
        replicas: usize,
    },
    /// A node is named twice in one shard.
    #[error("shard {shard} names node {node} twice")]
    Repeated {
        /// The shard.
        shard: ShardId,
        /// The node.
        node: NodeName,
    },
}

/// The nodes of each shard as configured when the cluster is created: 1 to [`SHARDS_MAX`] shards of
/// 1 to [`REPLICAS_MAX`] distinct nodes. A node may hold replicas of several shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardMap {
    shards: Vec<Vec<NodeName>>,
    /// `shards.len()`.
    count: NonZeroU32,
}

impl ShardMap {
    /// The map in which shard `n` is held by the nodes `shards[n]`.
    ///
    /// # Errors
    ///
    /// If a count is out of range, or a shard names a node twice.
    pub fn new(shards: Vec<Vec<NodeName>>) -> Result<Self, ShardMapError> {
        let count = u32::try_from(shards.len()).ok().and_then(NonZeroU32::new);
        let Some(count) = count.filter(|_| shards.len() <= SHARDS_MAX) else {
            return Err(ShardMapError::Shards { shards: shards.len() });
        };
        for (shard, nodes) in (0..).map(ShardId).zip(&shards) {
            if nodes.is_empty() || nodes.len() > REPLICAS_MAX {
                return Err(ShardMapError::Replicas { shard, replicas: nodes.len() });
            }
            for (place, node) in nodes.iter().enumerate() {
                if nodes[..place].contains(node) {
                    return Err(ShardMapError::Repeated { shard, node: node.clone() });
                }
            }
        }
        Ok(Self { shards, count })
    }

    /// Number of shards.
    #[must_use]
    pub const fn shard_count(&self) -> NonZeroU32 {
        self.count
    }

    /// Every shard with its nodes, by id.
    pub fn shards(&self) -> impl Iterator<Item = (ShardId, &[NodeName])> {
        (0..).map(ShardId).zip(self.shards.iter().map(Vec::as_slice))
    }

    /// The nodes of a shard, in the order given; `None` if there is no such shard.
    #[must_use]
    pub fn nodes_of(&self, shard: ShardId) -> Option<&[NodeName]> {
        self.shards.get(usize::try_from(shard.0).ok()?).map(Vec::as_slice)
    }

    /// The shards that a node holds a replica of, by id; none if the map does not name it.
    pub fn shards_of(&self, node: &NodeName) -> impl Iterator<Item = ShardId> {
        self.shards().filter(|(_, nodes)| nodes.contains(node)).map(|(shard, _)| shard)
    }

    /// The shard that holds the volume of this name.
    #[must_use]
    pub fn shard_of(&self, export_name: &[u8]) -> ShardId {
        shard_of(export_name, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> Vec<NodeName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn maps_nodes_and_shards_both_ways() {
        let map = ShardMap::new(vec![nodes(&["a", "b", "c"]), nodes(&["d"]), nodes(&["b", "a"])]);
        let map = map.unwrap();
        assert_eq!(map.shard_count().get(), 3);
        assert_eq!(map.nodes_of(ShardId(2)), Some(nodes(&["b", "a"]).as_slice()));
        assert_eq!(map.nodes_of(ShardId(3)), None);
        let of = |name: &str| map.shards_of(&name.parse().unwrap()).collect::<Vec<_>>();
        assert_eq!(of("a"), [ShardId(0), ShardId(2)]);
        assert_eq!(of("d"), [ShardId(1)]);
        assert_eq!(of("x"), []);
        assert_eq!(map.shards().count(), 3);
        assert_eq!(map.shard_of(b"vol1"), shard_of(b"vol1", map.shard_count()));
    }

    #[test]
    fn refuses_maps_that_cannot_be() {
        let shards = |shards| Err(ShardMapError::Shards { shards });
        assert_eq!(ShardMap::new(vec![]), shards(0));
        assert_eq!(ShardMap::new(vec![nodes(&["a"]); SHARDS_MAX + 1]), shards(SHARDS_MAX + 1));
        assert!(ShardMap::new(vec![nodes(&["a"]); SHARDS_MAX]).is_ok());

        let replicas =
            |shard, replicas| Err(ShardMapError::Replicas { shard: ShardId(shard), replicas });
        assert_eq!(ShardMap::new(vec![vec![]]), replicas(0, 0));
        let eight = nodes(&["a", "b", "c", "d", "e", "f", "g", "h"]);
        assert_eq!(ShardMap::new(vec![nodes(&["a"]), eight.clone()]), replicas(1, 8));
        assert!(ShardMap::new(vec![eight[..7].to_vec()]).is_ok());

        let repeated = ShardMap::new(vec![nodes(&["a", "b", "a"])]).unwrap_err();
        let node = "a".parse().unwrap();
        assert_eq!(repeated, ShardMapError::Repeated { shard: ShardId(0), node });
        assert_eq!(repeated.to_string(), "shard 0 names node a twice");
    }
}
