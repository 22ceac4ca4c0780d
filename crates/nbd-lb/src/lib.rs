//! The load balancer: one address for all volumes, whoever leads their shards.
//!
//! It keeps nothing on disk and decides nothing: any number of them run side by side, and all send
//! a name to the same shard. What it serves NBD with is [`nbd_front`], as the replicas do; what is
//! its own is to know where the leaders are.
//!
//! ```text
//!  NBD client ──▶ nbd-front ═══ session (gRPC stream) ═══▶ nbd-replica that leads the shard
//!                     ▲
//!                     │ Route (watch)
//!                  routes ◀──views── finder ◀══ShardView (gRPC stream)══ nbd-replica, each of them
//!                   pure              tasks
//! ```
//!
//! A client's requests are kept until they are answered. When the leader is lost or moves, its
//! session is resumed at the next one: what was applied is answered, the rest is sent again, in
//! order. With no majority the client waits. It sees neither an error nor a disconnect.
//!
//! That is mode `replay`. In mode `splice` the client's bytes are moved, within the kernel, to the
//! NBD server of a replica, at best the leader's, and back: for clients that attach anew by
//! themselves when their replica is lost.
//!
//! - [`config`]: settings, checked before any socket opens.
//! - [`routes`]: [`Routes`], which route follows from what each node last said. No clock, no I/O.
//! - [`finder`]: [`Finder`], the streams that feed it, and the routes as they change.
//! - [`app`]: starts and stops everything; who ends when is drawn there.
//! - [`takeover`]: a new process in the place of a running one, clients and all. `sockets`: the
//!   listening ones, bound or taken over.
//! - `http`: `/health`. `metrics`: what is counted.
//! - [`program`]: the whole as a process.

pub mod app;
pub mod config;
pub mod finder;
mod http;
mod metrics;
pub mod program;
pub mod routes;
mod sockets;
pub mod takeover;

pub use app::{LoadBalancer, StartError};
pub use config::{Args, Config, InvalidConfig, Mode};
pub use finder::{Finder, ShardStatus};
pub use routes::Routes;
pub use takeover::TakeoverError;
