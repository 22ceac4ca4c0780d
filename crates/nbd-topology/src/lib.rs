//! Names and numbers that every part of a cluster must agree on: ids, the shard map, and the
//! placement of an export name on a shard.
//!
//! Nothing here does I/O or keeps state. Placement is fixed for the life of a cluster: the same
//! name gives the same shard in every process, version and machine, and the golden vectors under
//! `tests/golden/` hold it there.
//!
//! - [`ids`]: [`ShardId`], [`ReplicaId`], [`NodeName`], [`ClusterName`], and Raft's [`LogIndex`]
//!   and [`Term`], shared by the crates that store them and the one that decides on them.
//! - [`membership`]: [`Membership`], voters and learners of a group, and [`MembershipChange`].
//! - [`placement`][]: [`shard_of`].
//! - [`shard_map`]: [`ShardMap`], the nodes of each shard.

pub mod ids;
pub mod membership;
pub mod placement;
pub mod shard_map;

pub use ids::{ClusterName, InvalidName, LogIndex, NodeName, ReplicaId, ShardId, Term};
pub use membership::{Membership, MembershipChange};
pub use placement::{DEFAULT_VOLUME_NAME, shard_of};
pub use shard_map::{ShardMap, ShardMapError};
