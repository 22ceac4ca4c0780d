//! The replica service: serves the volumes of a node's shards over NBD, orders mutations through
//! each shard's Raft group, and keeps them on disk.
//!
//! It knows sockets, tasks and threads; it does not know the bytes of the log (`nbd-log`) or of the
//! store (`nbd-store`), nor how consensus is reached (`nbd-consensus`). Nor does it know NBD: that
//! is the front end's (`nbd-front`), for which it is one replica that may lead. In the order of a
//! write's life:
//!
//! ```text
//!  client ─▶ nbd-front ───────┐
//!                             ├─▶ hosted ─▶ group_task ─▶ log_thread ─▶ disk
//!  other ──▶ relay_service ────┘     ▲            │ apply
//!  processes                        └────────────┘      checkpoint_thread ─▶ disk
//! ```
//!
//! - [`config`]: settings, checked before any socket opens.
//! - [`app`]: starts and stops everything; who waits for whom is drawn there.
//! - [`program`]: the whole as a process.
//! - `node_port`: where other processes connect: gRPC, and relays.
//! - `hosted`: the replicas of this node, as front ends use them: its own, and those of others by
//!   way of `relay_service` (sessions) and `session_service` (all else). `group_task`: owner of one
//!   replica of a shard; `reply`: whom it tells; `group_trace`: what it traces. `log_thread`,
//!   `checkpoint_thread`: the two that wait for the disk.
//! - [`transport`]: Raft messages to and from the other nodes; `peers`: who and where they are.
//! - `formation`, `join`: which replica of a shard this node is. `resync`, `chunk_service`,
//!   `fetch`: catching up. `scrub`, `repair`: keeping copies whole. `admin_service`: members.
//! - `control_service`: what the control API asks for. `steward`: what a leader sees to by itself.
//!   `isolation`: when a node that its peers do without ends itself.
//! - `http`: `/health`. `limits`: what is bounded, and by how much. `metrics`: what is counted;
//!   `shard_gauges`: what is looked at for them.

mod admin_service;
pub mod app;
mod checkpoint_thread;
mod chunk_service;
mod clock;
pub mod config;
mod control_service;
mod failure;
mod fetch;
mod formation;
mod group_task;
mod group_trace;
mod hosted;
mod http;
mod isolation;
mod join;
mod limits;
mod log_thread;
mod metrics;
mod node_port;
mod peers;
pub mod program;
mod relay_service;
mod repair;
mod reply;
mod resync;
mod scrub;
mod session_service;
mod shard_gauges;
mod steward;
pub mod transport;

pub use app::{Replica, StartError};
pub use config::{Args, Config, InvalidConfig, Tuning};
pub use failure::Failure;
