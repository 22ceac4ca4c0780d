//! Support for tests that run real processes: the tier below is tested in each crate itself.
//!
//! Everything here is blocking and panics with what a person needs to see, since its callers are
//! tests; only [`NbdClient`] returns errors, because tests want to look at them. Nothing of this
//! ships.
//!
//! - [`Cluster`], [`NodeProcess`]: `nbd-replica` processes on free loopback ports, each with a data
//!   directory of its own: kill, terminate, pause, wipe, restart; gone with the test.
//! - [`Network`]: proxies between the nodes, which cut, hold or delay what passes, one-way too.
//! - [`load`]: requests over many connections to many nodes, each answer held against what may
//!   legally be there; [`history`]: whether registers were linearizable.
//! - [`chaos`]: a cluster under load, with faults by a schedule from a seed.
//! - [`NbdClient`]: an NBD client over `nbd-proto`'s client side, with pipelining and access to the
//!   bytes for tests that misbehave.
//! - [`http`]: GET, for probes and metrics.
//! - [`tools`]: finding programs, and skipping tests that need a missing one ([`require_tools!`]).
//! - [`Ext4Image`]: an ext4 image with known files, and a check of one.
//! - [`process`]: memory use and signals, by process id. [`seed()`]: of random tests.

pub mod chaos;
pub mod history;
pub mod http;
pub mod load;
pub mod process;
pub mod tools;

mod binary;
mod client;
mod cluster;
mod ext4;
mod health;
mod network;
mod node;
mod seed;

pub use self::binary::binary;
pub use self::client::{
    ClientError, ConnectOptions, ErrorReply, NbdClient, Outcome, Reply, list_exports,
};
pub use self::cluster::{Cluster, ClusterBuilder};
pub use self::ext4::Ext4Image;
pub use self::health::{Health, ShardDigest, ShardHealth};
pub use self::network::{Fault, Network};
pub use self::node::{NodeProcess, Target};
pub use self::seed::seed;
