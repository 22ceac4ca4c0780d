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
//!  other ──▶ session_service ─┘     ▲            │ apply
//!  nodes                            └────────────┘      checkpoint_thread ─▶ disk
//! ```
//!
//! - [`config`]: settings, checked before any socket opens.
//! - [`app`]: starts and stops everything; who waits for whom is drawn there.
//! - `hosted`: the replicas of this node, as front ends use them: its own, and by way of
//!   `session_service` those of others. `group_task`: owner of one replica of a shard; `reply`:
//!   whom it tells. `log_thread`, `checkpoint_thread`: the two that wait for the disk.
//! - [`transport`]: Raft messages to and from the other nodes; `peers`: who and where they are.
//! - `formation`, `join`: which replica of a shard this node is. `resync`, `chunk_service`,
//!   `fetch`: catching up. `scrub`, `repair`: keeping copies whole. `admin_service`: members.
//! - `http`: `/health`. `limits`: what is bounded, and by how much. `metrics`: what is counted.

mod admin_service;
pub mod app;
mod checkpoint_thread;
mod chunk_service;
mod clock;
pub mod config;
mod failure;
mod fetch;
mod formation;
mod group_task;
mod hosted;
mod http;
mod join;
mod limits;
mod log_thread;
mod metrics;
mod peers;
mod repair;
mod reply;
mod resync;
mod scrub;
mod session_service;
pub mod transport;

pub use app::{Replica, StartError};
pub use config::{Args, Config, InvalidConfig, Tuning};
pub use failure::Failure;
