//! Nodes: the processes that hold replicas.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{MemberRole, Timestamp};

/// Whether a node is there, and in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// It answers.
    Up,
    /// It does not answer.
    Down,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name.
    #[schema(example = "nbd-1-1")]
    pub node: String,
    /// Whether it answers.
    pub state: NodeState,
    /// Why it does not; absent if it does.
    pub reason: Option<String>,
    /// It leads a shard only if no other replica can, and no replica is added on it.
    pub cordoned: bool,
    /// Version of its program. Absent if it does not answer, like what follows.
    pub version: Option<String>,
    /// When its process was started.
    pub started: Option<Timestamp>,
    /// Bytes of the file system that holds its data.
    pub disk: Option<u64>,
    /// Bytes of it that are free.
    pub disk_free: Option<u64>,
    /// Bytes that can still be written to new places.
    pub writable: Option<u64>,
    /// Its gRPC address.
    pub grpc: String,
    /// The shards that it holds a replica of.
    pub shards: Vec<NodeShard>,
}

/// A node's replica of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeShard {
    /// The shard.
    pub shard: u32,
    /// The replica's id.
    pub replica: u64,
    /// What it is to the group.
    pub role: MemberRole,
}
