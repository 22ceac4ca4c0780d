//! The replica service: serves the volumes of a node's shards over NBD, orders mutations through
//! each shard's Raft group, and keeps them on disk.
//!
//! It knows sockets, tasks and threads; it does not know the bytes of the NBD protocol
//! (`nbd-proto`), of the log (`nbd-log`) or of the store (`nbd-store`), nor how consensus is
//! reached (`nbd-consensus`). In the order of a write's life:
//!
//! ```text
//!  client ─▶ nbd::listener ─▶ nbd::attach ─▶ nbd::session ─▶ group_task ─▶ log_thread ─▶ disk
//!                                                  ▲              │ apply
//!                                                  └──────────────┘      checkpoint_thread ─▶ disk
//! ```
//!
//! - [`config`]: settings, checked before any socket opens.
//! - [`app`]: starts and stops everything; who waits for whom is drawn there.
//! - `nbd`: connections and sessions. `shard_client`: their way to the leader, here or on another
//!   node, where `session_service` takes it up. `group_task`: owner of one replica of a shard;
//!   `reply`: whom it tells. `log_thread`, `checkpoint_thread`: the two that wait for the disk.
//! - [`transport`]: Raft messages to and from the other nodes; `peers`: who and where they are.
//! - `formation`, `join`: which replica of a shard this node is. `resync`, `chunk_service`,
//!   `fetch`: catching up. `scrub`, `repair`: keeping copies whole. `admin_service`: members.
//! - `http`: `/health`. `budget`, `limits`: what is bounded, and by how much. `metrics`: what is
//!   counted.

mod admin_service;
pub mod app;
mod budget;
mod checkpoint_thread;
mod chunk_service;
mod clock;
pub mod config;
mod failure;
mod fetch;
mod formation;
mod group_task;
mod http;
mod join;
mod limits;
mod log_thread;
mod metrics;
mod nbd;
mod peers;
mod repair;
mod reply;
mod resync;
mod scrub;
mod session_service;
mod shard_client;
pub mod transport;

pub use app::{Replica, StartError};
pub use config::{Args, Config, InvalidConfig, Tuning};
pub use failure::Failure;
