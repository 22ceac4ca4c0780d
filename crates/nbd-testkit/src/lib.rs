//! Support for tests that run real processes: the tier below is tested in each crate itself.
//!
//! Everything here is blocking and panics with what a person needs to see, since its callers are
//! tests; only [`NbdClient`] returns errors, because tests want to look at them. Nothing of this
//! ships.
//!
//! - [`Cluster`], [`NodeProcess`]: `nbd-replica` processes on free loopback ports, each with a data
//!   directory of its own: kill, terminate, pause, wipe, restart; gone with the test. `nbd-lb`
//!   processes in front of them: [`Cluster::balancer`]; `nbd-control` processes beside them:
//!   [`Cluster::control`]. [`ServerProcess`]: what all of them are. [`StartedProcess`]: one that
//!   chooses its own ports.
//! - [`Network`]: proxies between the nodes, which cut, hold or delay what passes, one-way too.
//! - [`load`]: requests over many connections to many nodes, each answer held against what may
//!   legally be there; [`history`]: whether registers were linearizable.
//! - [`chaos`]: a cluster under load, with faults by a schedule from a seed.
//! - [`NbdClient`]: an NBD client over `nbd-proto`'s client side, with pipelining and access to the
//!   bytes for tests that misbehave.
//! - [`read_some()`]: from a socket with a time limit, whatever signals come.
//! - [`http`]: requests, for probes, metrics and the control API; [`schemathesis`]: requests made
//!   up from a server's OpenAPI document.
//! - [`tools`]: finding programs, and skipping tests that need a missing one ([`require_tools!`]).
//! - [`Ext4Image`]: an ext4 image with known files, and a check of one.
//! - `SpanCollector`: takes traces, and shows them. Only with the feature `spans`.
//! - [`process`]: memory use and signals, by process id. [`seed()`]: of random tests.

pub mod chaos;
pub mod history;
pub mod http;
pub mod load;
pub mod process;
pub mod schemathesis;
pub mod tools;

mod binary;
mod client;
mod cluster;
mod ext4;
mod health;
mod network;
mod node;
mod ports;
mod read_some;
mod seed;
mod server;
#[cfg(feature = "spans")]
mod spans;
mod started;

pub use self::binary::binary;
pub use self::client::{
    ClientError, ConnectOptions, ErrorReply, NbdClient, Outcome, Reply, list_exports,
};
pub use self::cluster::{Cluster, ClusterBuilder};
pub use self::ext4::Ext4Image;
pub use self::health::{Health, ShardDigest, ShardHealth};
pub use self::network::{Fault, Network};
pub use self::node::NodeProcess;
pub use self::ports::{free_port, free_ports_at};
pub use self::read_some::read_some;
pub use self::seed::seed;
pub use self::server::{ServerProcess, Target};
#[cfg(feature = "spans")]
pub use self::spans::{SeenSpan, SpanCollector, write_tree};
pub use self::started::StartedProcess;
