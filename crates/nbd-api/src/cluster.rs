//! The cluster as a whole.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether something is well. Ordered from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthStatus {
    /// All is there.
    Ok,
    /// It serves, and a replica is missing, behind or full.
    Degraded,
    /// It does not serve: I/O waits.
    Down,
}

/// A summary of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Version of the control API's program.
    pub version: String,
    /// The worst of its shards'.
    pub health: HealthStatus,
    /// Shards it has.
    pub shards: u32,
    /// Nodes it has.
    pub nodes: u32,
    /// Nodes that answer.
    pub nodes_up: u32,
    /// Volumes of the shards that answer.
    pub volumes: u64,
    /// Bytes of all of them together.
    pub provisioned: u64,
    /// Bytes that they take up, counting one replica of each.
    pub allocated: u64,
    /// Sessions of all of them together.
    pub sessions: u64,
}

/// Whether the cluster is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterHealth {
    /// The worst of the shards'.
    pub status: HealthStatus,
    /// Each shard's.
    pub shards: Vec<ShardHealth>,
}

/// Whether a shard is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShardHealth {
    /// The shard.
    pub shard: u32,
    /// Whether it serves, and how safely.
    pub status: HealthStatus,
    /// Why it is not well; absent if it is.
    pub reason: Option<String>,
}
