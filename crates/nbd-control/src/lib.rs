//! The control API: volumes and the cluster, for people and programs.
//!
//! It keeps nothing and decides nothing: it turns HTTP and JSON into calls to the replicas, and
//! their answers into resources. Any number of them run side by side and give the same answers. It
//! knows no storage and no Raft; what it knows of the cluster is what the replicas' `Control` and
//! `Admin` services say.
//!
//! ```text
//!  HTTP ──▶ http::guard ──▶ a handler ──▶ cluster ──▶ any replica of the shard ──▶ its leader
//!           who may, audit   checks input  asks on, waits out elections        (gRPC)
//!                              │
//!                              ├─▶ paging: the lists of all shards, merged
//!                              └─▶ overview ──▶ operations: what is under way, by looking
//! ```
//!
//! - [`config`]: settings, checked before any socket opens.
//! - `cluster`: shards and nodes as something to ask.
//! - `overview`: what they say at one moment, and whether that is well. `operations`: what takes
//!   long, derived from it. `paging`: lists over all shards. All three hold no state.
//! - `tokens`: who may do what. `http`: routes, input, problems, the OpenAPI document.
//! - [`app`]: starts and stops everything.
//! - [`program`]: the whole as a process.
//! - `metrics`: what is counted. [`limits`]: bounds and times.

pub mod app;
pub mod config;
pub mod limits;
pub mod program;

mod cluster;
mod http;

mod metrics;
mod operations;
mod overview;
mod paging;
mod tokens;

pub use app::{ControlApi, StartError};
pub use config::{Args, Config, HostName, InvalidConfig, InvalidHostName};
pub use tokens::TokenFileError;
