//! What the control API and its clients say to each other, as JSON over HTTP.
//!
//! The service (`nbd-control`) makes its OpenAPI document from these types, and the command line
//! (`nbdctl`) reads its answers into them, so that the three cannot drift apart.
//!
//! - [`volume`], [`session`], [`shard`], [`node`], [`cluster`]: resources, and what is asked of
//!   them.
//! - [`operation`]: what takes long.
//! - [`page`]: lists in pages.
//! - [`problem`]: errors, as RFC 9457 has them.
//! - [`time`]: moments, as RFC 3339 has them.
//!
//! Sizes are bytes, as JSON numbers. Fields that a client does not know are to be ignored; requests
//! with fields that the service does not know are refused.

pub mod cluster;
pub mod node;
pub mod operation;
pub mod page;
pub mod problem;
pub mod session;
pub mod shard;
pub mod time;
pub mod volume;

pub use cluster::{Cluster, ClusterHealth, HealthStatus, ShardHealth};
pub use node::{Node, NodeShard, NodeState};
pub use operation::{
    Operation, OperationEvent, OperationEventKind, OperationKind, OperationState, Progress,
};
pub use page::Page;
pub use problem::{FieldProblem, Problem, ProblemType};
pub use session::{Attachment, IoCounts, Session};
pub use shard::{
    Activity, AddMember, Member, MemberRole, ReplaceMember, Resync, Shard, TransferLeadership,
    VolumeActivity,
};
pub use time::Timestamp;
pub use volume::{
    CreateVolume, Labels, ResizeVolume, TraceVolume, Traced, UpdateVolume, Volume, VolumeDetails,
};

/// Where the resources of this version begin.
pub const PREFIX: &str = "/api/v1";

/// Header by which a client makes a creation repeatable: 1 to 255 visible characters.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";
