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
//!                │                            ▲             ▲        └─ Remote ═▶ leader (relay)
//!                │                        ByteBudget        │                │
//!                └──────────────────────────────────────────┼────────────────┘
//!  whoever knows the leaders ─────────────── Route (watch) ─┘
//! ```
//!
//! To serve NBD: make one [`Access`], a [`ShardClient`] for each shard, a [`Front`] of them, and
//! run a [`Listener`]. Who leads each shard comes from outside, over a watch channel of [`Route`]s:
//! in a replica from the shard's group, in a load balancer from whatever asks around. A process
//! without replicas may also [move bytes](Front::splicing) between clients and replicas' own NBD
//! servers.
//!
//! - `relay_stream`: the socket under a relay, for the side that asks and the one that answers.
//! - `nbd`: connections, handshake, requests and replies.
//! - `shard_client`: reaching a shard's leader. `route`: where it is. `local`: what a replica in
//!   this process has to do.
//! - `sessions`: who is attached, as a list.
//! - `budget`, [`limits`]: what is bounded, and by how much. `metrics`: what is counted.
//! - `volumes`: what attaching to a new name does.

mod budget;
pub mod limits;
mod local;
mod metrics;
mod nbd;
mod relay_stream;
mod route;
mod sessions;
mod shard_client;
mod volumes;

pub use budget::{ByteBudget, BytePermit};
pub use local::{Attaching, Boxed, Granted, LocalAttachment, LocalReplica, Share};
pub use nbd::{
    Adopted, Adopter, Connections, Front, Handover, Listener, MalformedParcel, NotAdopted, Offer,
    Output, PARCEL_BYTES_MAX,
};
pub use relay_stream::{Received, RelayStream};
pub use route::{GroupStopped, LeaderAt, NbdAt, Route, RunError};
pub use sessions::Sessions;
pub use shard_client::{
    Access, Answered, ClientAt, Event, Links, QueryData, ReadBuffer, ReadData, SessionClient,
    SessionEnd, ShardClient, Signal, end_earlier_sessions,
};
pub use volumes::{InvalidDefaultSize, VolumesConfig};
