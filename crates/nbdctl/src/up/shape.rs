//! The shape of a cluster: how many shards of how many replicas, their names and ports.
//!
//! It is fixed when the cluster is created, but for replicas, which may become more: a node that is
//! added to a shard's list joins its group by itself. What cannot be followed is refused.

use anyhow::{Context as _, bail};
use nbd_service::{ByteSize, ClusterConfig, HostPort, NodeAddresses, NodeConfig, VolumePolicy};
use nbd_topology::{ClusterName, NodeName, ShardId};

/// Name of a cluster that the user does not name.
const NAME_DEFAULT: &str = "cinderblock";

/// Shards of a cluster that the user says nothing of.
const SHARDS_DEFAULT: u16 = 1;

/// Replicas of a shard that the user says nothing of: the loss of any one is survived.
const REPLICAS_DEFAULT: u16 = 3;

/// Most shards: each has nodes of its own here, and one digit of their ports.
pub(super) const SHARDS_MAX: i64 = 9;

/// Most replicas of a shard, as anywhere.
pub(super) const REPLICAS_MAX: i64 = nbd_topology::shard_map::REPLICAS_MAX as i64;

/// Where a search for free ports begins, how it goes on, and where it ends.
const PORTS_FIRST: u16 = 11_000;
const PORTS_STEP: usize = 1000;
const PORTS_LAST: u16 = 31_000;

/// Smallest value of `--ports`: below are ports of the system.
const PORTS_MIN: i64 = 1024;

/// Largest value of `--ports`: all ports of the largest cluster are below 65536.
pub(super) const PORTS_MAX: i64 = 64_000;

/// What the user asks of a cluster. `None`: as it is, or the default of a new one.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Wishes {
    /// Name of the cluster; its directory remembers it. New ones are named cinderblock.
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<ClusterName>,

    /// Shards, among which volumes are distributed. Fixed when the cluster is created, as 1 unless
    /// told otherwise.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=SHARDS_MAX))]
    pub(super) shards: Option<u16>,

    /// Replicas of each shard: 3 unless told otherwise. A higher number adds replicas to a cluster
    /// that is there.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u16).range(1..=REPLICAS_MAX))]
    pub(super) replicas: Option<u16>,

    /// Size of volumes that are created by attaching to them: 1GiB unless told otherwise; the
    /// cluster remembers it.
    #[arg(long, value_name = "SIZE")]
    pub(super) size: Option<ByteSize>,

    /// From where the ports of replicas count: replica M of shard N serves NBD at 100 N + 10 M + 1
    /// from here, gRPC at the next port, HTTP at the one behind. 11000, or the next thousand at
    /// which all are free, when the cluster is created; fixed from then on.
    #[arg(long, value_name = "PORT",
          value_parser = clap::value_parser!(u16).range(PORTS_MIN..=PORTS_MAX))]
    pub(super) ports: Option<u16>,
}

/// A cluster as it shall run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) cluster: ClusterConfig,
    /// Nodes that were added to a cluster that was there before.
    pub(super) added: Vec<NodeName>,
}

/// The shape of a new cluster. `is_free` tells whether a port can be listened on.
pub(super) fn create(wishes: &Wishes, is_free: &dyn Fn(u16) -> bool) -> anyhow::Result<Shape> {
    let shards = wishes.shards.unwrap_or(SHARDS_DEFAULT);
    let replicas = wishes.replicas.unwrap_or(REPLICAS_DEFAULT);
    let names: Vec<Vec<Place>> = (1..=shards)
        .map(|shard| (1..=replicas).map(|replica| Place { shard, replica }).collect())
        .collect();
    let places = names.concat();
    let base = choose_ports(wishes.ports, &places, is_free)?;
    let nodes = places.iter().map(|place| place.node(base)).collect();
    let lists = names.iter().map(|shard| shard.iter().map(Place::name).collect()).collect();
    let name = wishes.name.clone().map_or_else(|| NAME_DEFAULT.parse(), Ok)?;
    let mut volumes = VolumePolicy { auto_create: true, ..VolumePolicy::default() };
    volumes.default_size = wishes.size.unwrap_or(volumes.default_size);
    let cluster = ClusterConfig::new(name, nodes, lists, volumes)?;
    Ok(Shape { cluster, added: Vec::new() })
}

/// The cluster that is there already, with what may be changed as wished.
pub(super) fn follow(
    existing: &ClusterConfig,
    wishes: &Wishes,
    is_free: &dyn Fn(u16) -> bool,
) -> anyhow::Result<Shape> {
    let Wishes { name, shards, replicas, size, ports } = wishes;
    if let Some(name) = name.as_ref().filter(|name| *name != existing.name()) {
        bail!("the cluster there is named {}, not {name}", existing.name());
    }
    let count = existing.shard_count().get();
    if let Some(shards) = shards.filter(|shards| u32::from(*shards) != count) {
        bail!(
            "the cluster there has {}, not {shards}: which volume is where depends on that number, \
             so it is fixed when a cluster is created; a new --data-dir makes a new cluster",
            counted(count as usize, "shard"),
        );
    }
    let added = match replicas {
        Some(replicas) => missing_replicas(existing, *replicas)?,
        None => Vec::new(),
    };
    if let Some(base) = ports {
        check_ports(existing, *base)?;
    }
    let mut nodes = existing.nodes().to_vec();
    if !added.is_empty() {
        let base = choose_ports(*ports, &added, &|port| is_free(port) && !uses(existing, port))?;
        nodes.extend(added.iter().map(|place| place.node(base)));
    }
    let of_shard = |shard: ShardId| {
        let new = added.iter().filter(move |place| ShardId(u32::from(place.shard) - 1) == shard);
        existing.replicas(shard).iter().cloned().chain(new.map(Place::name)).collect()
    };
    let lists = existing.shard_map().shards().map(|(shard, _)| of_shard(shard)).collect();
    let mut volumes = existing.volumes();
    volumes.default_size = size.unwrap_or(volumes.default_size);
    let cluster = ClusterConfig::new(existing.name().clone(), nodes, lists, volumes)?;
    Ok(Shape { cluster, added: added.iter().map(Place::name).collect() })
}

/// The names of all nodes that a cluster may be made with, that of the smallest first.
pub(super) fn all_names() -> impl Iterator<Item = NodeName> {
    let digits = |max: i64| (1..).take_while(move |n| i64::from(*n) <= max);
    digits(SHARDS_MAX)
        .flat_map(move |shard| digits(REPLICAS_MAX).map(move |replica| Place { shard, replica }))
        .map(|place| place.name())
}

/// A number of things, for people.
pub(super) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A node by the shard that it was made for and its number there, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    shard: u16,
    replica: u16,
}

impl Place {
    fn name(&self) -> NodeName {
        let name = format!("nbd-{}-{}", self.shard, self.replica);
        name.parse().expect("a few letters and digits are a name")
    }

    /// The ports of NBD, gRPC and HTTP. Shard and replica are digits of them.
    fn ports(&self, base: u16) -> [u16; 3] {
        [1, 2, 3].map(|service| base + 100 * self.shard + 10 * self.replica + service)
    }

    fn node(&self, base: u16) -> NodeConfig {
        let addresses = self.addresses(base);
        NodeConfig { name: self.name(), listen: addresses.clone(), addresses }
    }

    fn addresses(&self, base: u16) -> NodeAddresses {
        let address = |port: u16| -> HostPort {
            format!("127.0.0.1:{port}").parse().expect("an address and a port")
        };
        let [nbd, grpc, http] = self.ports(base).map(address);
        NodeAddresses { nbd, grpc, http }
    }
}

/// The nodes that each shard lacks to have so many replicas.
fn missing_replicas(existing: &ClusterConfig, replicas: u16) -> anyhow::Result<Vec<Place>> {
    let mut missing = Vec::new();
    for (shard, nodes) in existing.shard_map().shards() {
        let has = nodes.len();
        if has > usize::from(replicas) {
            bail!(
                "shard {shard} of the cluster there has {}, not {replicas}: replicas are added by \
                 a higher number, and none may be left out, for they make up the majority",
                counted(has, "replica"),
            );
        }
        let lacks = usize::from(replicas) - has;
        if lacks == 0 {
            continue;
        }
        if i64::from(shard.0) >= SHARDS_MAX {
            bail!("replicas can be added to clusters of up to {SHARDS_MAX} shards");
        }
        let shard = u16::try_from(shard.0 + 1)?;
        let places = (1..).map(|replica| Place { shard, replica });
        let free = places.filter(|place| existing.node(&place.name()).is_none());
        missing.extend(free.take(lacks));
    }
    Ok(missing)
}

/// The port from which those of `places` count: as wished, or the first at which all are free.
fn choose_ports(
    wished: Option<u16>,
    places: &[Place],
    is_free: &dyn Fn(u16) -> bool,
) -> anyhow::Result<u16> {
    if let Some(wished) = wished {
        return Ok(wished);
    }
    let all_free = |base: &u16| places.iter().flat_map(|place| place.ports(*base)).all(is_free);
    (PORTS_FIRST..=PORTS_LAST)
        .step_by(PORTS_STEP)
        .find(all_free)
        .context("no free ports for the replicas: say where they begin with --ports")
}

/// Whether a node has this port.
fn uses(cluster: &ClusterConfig, port: u16) -> bool {
    let of_node = |NodeAddresses { nbd, grpc, http }: &NodeAddresses| {
        [nbd, grpc, http].iter().any(|address| address.port() == port)
    };
    cluster.nodes().iter().any(|node| of_node(&node.addresses))
}

/// Whether the nodes that are there have the ports that `base` would give them.
fn check_ports(existing: &ClusterConfig, base: u16) -> anyhow::Result<()> {
    let shards = existing.shard_map().shards().map(|(_, nodes)| nodes);
    for (shard, nodes) in (1..=SHARDS_MAX).zip(shards) {
        let shard = u16::try_from(shard)?;
        let places = (1..).map(|replica| Place { shard, replica });
        for (place, name) in places.zip(nodes) {
            let node = existing.node(name).context("a shard's replica is a node")?;
            if node.name == place.name() && node.addresses != place.addresses(base) {
                bail!(
                    "the ports of the cluster there are fixed, and others than {base} gives: \
                     {name} has {}; they may be changed in its cluster.toml",
                    node.addresses.nbd,
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
