//! The load balancer: finds the leader of every shard, and follows it.
//!
//! It keeps nothing on disk and decides nothing: any number of them run side by side. It carries no
//! NBD traffic yet.
//!
//! ```text
//!  nbd-replica ══ShardView (gRPC stream)══▶ finder ──views──▶ routes ──Route (watch)──▶ /health
//!   (each node that has a replica)          tasks             pure
//! ```
//!
//! - [`config`]: settings, checked before any socket opens.
//! - [`routes`]: [`Routes`], which route follows from what each node last said. No clock, no I/O.
//! - [`finder`]: [`Finder`], the streams that feed it, and the routes as they change.
//! - [`app`]: starts and stops everything; who ends when is drawn there.
//! - `http`: `/health`. `links`: connections to nodes. `metrics`: what is counted.

pub mod app;
pub mod config;
pub mod finder;
mod http;
mod links;
mod metrics;
pub mod routes;

pub use app::{LoadBalancer, StartError};
pub use config::{Args, Config, InvalidConfig, Mode};
pub use finder::{Finder, ShardStatus};
pub use routes::{LeaderAt, Route, Routes};
