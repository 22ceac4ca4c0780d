//! Who is in the cluster and where: `cluster.toml`, or the environment.
//!
//! This is the bootstrap, the same for every process of a cluster; what a node alone decides (its
//! data directory, its limits) is not here. Everything is checked when it is read, and each error
//! names the file, the field, the value and what is allowed.
//!
//! ```toml
//! name = "demo"
//! [[nodes]]
//! name = "nbd-1-1"
//! nbd = "127.0.0.1:11001"
//! grpc = "127.0.0.1:11002"
//! http = "127.0.0.1:11003"
//! [[shards]]
//! replicas = ["nbd-1-1"]
//! [volumes]
//! auto_create = true
//! default_size = "1GiB"
//! ```
//!
//! The environment gives the same where host names do the addressing (compose, Kubernetes):
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `NBD_SHARDS` | JSON: for each shard the host names of its replicas, which are the node names | required |
//! | `NBD_CLUSTER` | the cluster's name | `cinderblock` |
//! | `NBD_AUTO_CREATE` | `true` or `false` | `true` |
//! | `NBD_DEFAULT_SIZE` | size of a volume created by attaching to it | `1GiB` |
//!
//! Ports are then 10809 (NBD), 7400 (gRPC) and 8080 (HTTP), and a node listens on 0.0.0.0.

mod address;
mod error;
mod raw;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::Path;

use nbd_topology::{ClusterName, NodeName, ReplicaId, ShardId, ShardMap};

pub use self::address::{HostPort, InvalidAddress};
pub use self::error::{ConfigError, Origin, Problem};
use crate::exit::Failure;
use crate::units::ByteSize;

/// NBD's registered port.
pub const NBD_PORT: u16 = 10809;
/// Port of Raft and internal gRPC.
pub const GRPC_PORT: u16 = 7400;
/// Port of probes, metrics and APIs.
pub const HTTP_PORT: u16 = 8080;

/// Smallest volume, in bytes: one block.
pub const VOLUME_BYTES_MIN: u64 = 4096;
/// Largest volume, in bytes: NBD clients hold sizes in signed 64-bit numbers. A node's store may
/// hold less, and says so itself.
pub const VOLUME_BYTES_MAX: u64 = (1 << 63) - SECTOR_BYTES;
/// A volume's size is a multiple of this, the smallest unit that kernels address.
const SECTOR_BYTES: u64 = 512;

/// A checked cluster description: every replica names a node in it, and no two nodes share a name
/// or an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    name: ClusterName,
    nodes: Vec<NodeConfig>,
    shards: ShardMap,
    volumes: VolumePolicy,
}

/// One node: its name, where others reach it, where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// The node's name, unique in the cluster.
    pub name: NodeName,
    /// Where others reach it.
    pub addresses: NodeAddresses,
    /// Where it listens. From a file, the same as `addresses`.
    pub listen: NodeAddresses,
}

/// The three addresses of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAddresses {
    /// NBD clients.
    pub nbd: HostPort,
    /// Raft and internal gRPC.
    pub grpc: HostPort,
    /// Probes and metrics.
    pub http: HostPort,
}

/// What happens when a client attaches to a name nobody created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumePolicy {
    /// Whether the first attach creates the volume. Default true; when false it is refused.
    pub auto_create: bool,
    /// Size of a volume created that way: a multiple of 512 bytes between [`VOLUME_BYTES_MIN`] and
    /// [`VOLUME_BYTES_MAX`]. Default 1 GiB. Space is taken only for what is written.
    pub default_size: ByteSize,
}

impl Default for VolumePolicy {
    fn default() -> Self {
        Self { auto_create: true, default_size: ByteSize::new(1 << 30) }
    }
}

impl ClusterConfig {
    /// Reads a `cluster.toml`.
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML of this shape, or breaks a rule.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_toml(&text, path)
    }

    /// The cluster that a service is started for: from the file that it is given, else from its
    /// environment.
    ///
    /// # Errors
    /// The operator's mistake: neither is there, or what is there cannot be used.
    pub fn given(file: Option<&Path>) -> Result<Self, Failure> {
        match file {
            Some(path) => Self::load(path).map_err(Failure::usage),
            None => Self::from_env().map_err(Failure::usage)?.ok_or_else(|| {
                Failure::usage(anyhow::anyhow!("no cluster: give --cluster FILE or set NBD_SHARDS"))
            }),
        }
    }

    /// Checks the text of a `cluster.toml`; `path` is for messages only.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        raw::from_toml(text, &Origin::File(path.to_owned()))
    }

    /// Takes the cluster from the process's environment; `None` when `NBD_SHARDS` is not set.
    ///
    /// # Errors
    /// A variable that is not UTF-8, does not parse, or breaks a rule.
    pub fn from_env() -> Result<Option<Self>, ConfigError> {
        raw::from_env(|name| std::env::var_os(name))
    }

    /// A cluster from typed parts, held to the same rules.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(
        name: ClusterName,
        nodes: Vec<NodeConfig>,
        shards: Vec<Vec<NodeName>>,
        volumes: VolumePolicy,
    ) -> Result<Self, ConfigError> {
        Self::checked(&Origin::Program, name, nodes, shards, volumes)
    }

    /// The cluster's name, the same in all its processes and data directories.
    #[must_use]
    pub const fn name(&self) -> &ClusterName {
        &self.name
    }

    /// Every node, in the order given.
    #[must_use]
    pub fn nodes(&self) -> &[NodeConfig] {
        &self.nodes
    }

    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.name == *name)
    }

    /// How many shards there are; fixed for the life of the cluster.
    #[must_use]
    pub const fn shard_count(&self) -> NonZeroU32 {
        self.shards.shard_count()
    }

    /// Which nodes hold which shard.
    #[must_use]
    pub const fn shard_map(&self) -> &ShardMap {
        &self.shards
    }

    /// The nodes that hold a replica of `shard`, in the order given. Empty for a shard out of
    /// range.
    #[must_use]
    pub fn replicas(&self, shard: ShardId) -> &[NodeName] {
        self.shards.nodes_of(shard).unwrap_or_default()
    }

    /// The shards that `node` holds a replica of, rising.
    pub fn shards_of(&self, node: &NodeName) -> impl Iterator<Item = ShardId> {
        self.shards.shards_of(node)
    }

    /// The bootstrap id of the replica of `shard` on `node`: its place in the shard's list, from 1.
    /// The order of that list must therefore never change once the cluster has started.
    #[must_use]
    pub fn replica_id(&self, shard: ShardId, node: &NodeName) -> Option<ReplicaId> {
        let place = self.replicas(shard).iter().position(|replica| replica == node)?;
        ReplicaId::new(u64::try_from(place).ok()? + 1)
    }

    /// What attaching to an unknown name does.
    #[must_use]
    pub const fn volumes(&self) -> VolumePolicy {
        self.volumes
    }

    /// The text of a `cluster.toml` that reads as this cluster (listen addresses apart), for
    /// `--check-config` and for writing one.
    #[must_use]
    pub fn to_toml(&self) -> String {
        raw::to_toml(self)
    }

    fn checked(
        origin: &Origin,
        name: ClusterName,
        nodes: Vec<NodeConfig>,
        shards: Vec<Vec<NodeName>>,
        volumes: VolumePolicy,
    ) -> Result<Self, ConfigError> {
        check_nodes(origin, &nodes)?;
        let shards = ShardMap::new(shards).map_err(|error| origin.shard_map_error(error))?;
        check_replicas(origin, &nodes, &shards)?;
        check_volumes(origin, volumes)?;
        Ok(Self { name, nodes, shards, volumes })
    }
}

fn check_nodes(origin: &Origin, nodes: &[NodeConfig]) -> Result<(), ConfigError> {
    let mut names = HashMap::new();
    let mut addresses: HashMap<&HostPort, String> = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        if let Some(earlier) = names.insert(&node.name, index) {
            let field = format!("nodes[{index}].name");
            let problem = Problem::Repeats(format!("nodes[{earlier}].name"));
            return Err(origin.field(field, &node.name, problem));
        }
        let NodeAddresses { nbd, grpc, http } = &node.addresses;
        for (key, address) in [("nbd", nbd), ("grpc", grpc), ("http", http)] {
            let field = format!("nodes[{index}].{key}");
            if address.port() == 0 {
                return Err(origin.field(field, address, Problem::PortZero));
            }
            if let Some(earlier) = addresses.insert(address, field.clone()) {
                return Err(origin.field(field, address, Problem::Repeats(earlier)));
            }
        }
    }
    Ok(())
}

fn check_replicas(
    origin: &Origin,
    nodes: &[NodeConfig],
    shards: &ShardMap,
) -> Result<(), ConfigError> {
    for (shard, replicas) in shards.shards() {
        let unknown = |replica: &&NodeName| !nodes.iter().any(|node| node.name == **replica);
        if let Some(replica) = replicas.iter().find(unknown) {
            let known: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
            let problem = Problem::UnknownNode(known.join(", "));
            return Err(origin.field(origin.replicas_field(shard), replica, problem));
        }
    }
    Ok(())
}

fn check_volumes(origin: &Origin, volumes: VolumePolicy) -> Result<(), ConfigError> {
    let bytes = volumes.default_size.bytes();
    let in_range = (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&bytes);
    if in_range && bytes.is_multiple_of(SECTOR_BYTES) {
        return Ok(());
    }
    Err(origin.field(origin.default_size_field(), volumes.default_size, Problem::VolumeSize))
}
