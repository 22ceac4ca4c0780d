//! The NBD front end: from a client's connection to commands at the leader of its volume's shard,
//! and back.
//!
//! Every process that serves NBD uses it: the replica service, whose shards may be led in the same
//! process, and the load balancer, which has no replicas. It does not know how consensus is reached
//! nor how volumes are stored; of a replica in this process it sees no more than [`LocalReplica`].
//!
//! ```text
//!                ┌──────────────────────── nbd-front ────────────────────────┐
//!  NBD client ───┼─▶ listener ─▶ attach ─▶ session ─▶ SessionClient ─┬───────┼─▶ LocalReplica
//!                │                            ▲             ▲        └─ Remote ═▶ leader (gRPC)
//!                │                        ByteBudget        │                │
//!                └──────────────────────────────────────────┼────────────────┘
//!  whoever knows the leaders ─────────────── Route (watch) ─┘
//! ```
//!
//! To serve NBD: make one [`Access`], a [`ShardClient`] for each shard, a [`Front`] of them, and
//! run a [`Listener`]. Who leads each shard comes from outside, over a watch channel of [`Route`]s:
//! in a replica from the shard's group, in a load balancer from whatever asks around.
//!
//! - `nbd`: connections, handshake, requests and replies.
//! - `shard_client`: reaching a shard's leader. `route`: where it is. `local`: what a replica in
//!   this process has to do.
//! - `budget`, [`limits`]: what is bounded, and by how much. `metrics`: what is counted.
//! - `volumes`: what attaching to a new name does.

mod budget;
pub mod limits;
mod local;
mod metrics;
mod nbd;
mod route;
mod shard_client;
mod volumes;

pub use budget::{ByteBudget, BytePermit};
pub use local::{Boxed, Granted, LocalAttachment, LocalReplica, Share};
pub use nbd::{Front, Listener};
pub use route::{GroupStopped, LeaderAt, Route, RunError};
pub use shard_client::{
    Access, Answered, Event, Failed, Links, QueryData, ReadData, SessionClient, SessionEnd,
    ShardClient, Signal, end_earlier_sessions,
};
pub use volumes::{InvalidDefaultSize, VolumesConfig};
