//! Shards, and the replicas that hold them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{HealthStatus, IoCounts};

/// A shard: one of a fixed number of parts that the volumes are spread over by their names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Shard {
    /// Its number, from 0.
    pub shard: u32,
    /// Whether it serves, and how safely.
    pub health: HealthStatus,
    /// Why it is not well; absent if it is.
    pub reason: Option<String>,
    /// The node that leads it, if one does.
    pub leader: Option<String>,
    /// Raft term.
    pub term: u64,
    /// Last entry of the log that is committed.
    pub committed: u64,
    /// Volumes it holds.
    pub volumes: u64,
    /// Bytes of all its volumes together.
    pub provisioned: u64,
    /// Bytes that they take up on each replica.
    pub allocated: u64,
    /// Sessions of its volumes.
    pub sessions: u32,
    /// Bytes that can still be written to new places: the least of its members'. Absent if none of
    /// them answers.
    pub writable: Option<u64>,
    /// Its replicas.
    pub members: Vec<Member>,
}

/// What a replica is to its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    /// It leads the group.
    Leader,
    /// It votes.
    Voter,
    /// It is catching up and does not vote yet.
    Learner,
}

/// A replica of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Its id in the shard: never used for another replica.
    pub replica: u64,
    /// The node that it is on.
    pub node: String,
    /// What it is to the group.
    pub role: MemberRole,
    /// Whether the leader has heard from it lately.
    pub alive: bool,
    /// Committed entries that it is not known to have.
    pub lag: u64,
    /// Bytes that can still be written to new places on its disk. Absent if it does not answer.
    pub writable: Option<u64>,
    /// How far it is with fetching the shard's data. Absent if it is not.
    pub resync: Option<Resync>,
}

/// Data that is fetched from another replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resync {
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes there are.
    pub bytes_total: u64,
    /// Estimated seconds until it is done. Absent if not known.
    pub seconds_left: Option<u64>,
}

/// Who is to lead.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TransferLeadership {
    /// The node. Default: the most advanced one that is not cordoned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A node that is to hold a replica of the shard. It runs, its data directory is empty, and its
/// configuration names it in the shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddMember {
    /// The node.
    #[schema(example = "nbd-1-4")]
    pub node: String,
    /// Where its gRPC is. Default: as the control API's configuration says, or port 7400 of the
    /// host that is called like the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10.0.0.4:7400")]
    pub grpc: Option<String>,
}

/// A node that is to take over from a replica; as for [`AddMember`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplaceMember {
    /// The node.
    #[schema(example = "nbd-1-4")]
    pub node: String,
    /// Where its gRPC is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "10.0.0.4:7400")]
    pub grpc: Option<String>,
}

/// What a shard does just now. Counts only rise, until another replica or process leads: then
/// `origin` is another, and they begin anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Activity {
    /// The shard.
    pub shard: u32,
    /// Where the counts are from: comparable as long as it stays.
    pub origin: String,
    /// Committed entries that the slowest live replica does not have.
    pub lag: u64,
    /// Those of all volumes together.
    pub total: IoCounts,
    /// By volume: those that are attached, or were lately.
    pub volumes: Vec<VolumeActivity>,
}

/// What a volume does just now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeActivity {
    /// The volume's name.
    pub name: String,
    /// What was read and written.
    pub counts: IoCounts,
    /// Sessions attached.
    pub sessions: u32,
}
