//! The shapes as written, before their rules are checked, and the way from them to the typed
//! cluster.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::str::FromStr;

use nbd_topology::{NodeName, ShardId};
use serde::{Deserialize, Serialize};

use super::address::HostPort;
use super::error::{ConfigError, Origin, Problem};
use super::{
    ClusterConfig, GRPC_PORT, HTTP_PORT, NBD_PORT, NodeAddresses, NodeConfig, VolumePolicy,
};
use crate::units::ByteSize;

const SHARDS: &str = "NBD_SHARDS";
const CLUSTER: &str = "NBD_CLUSTER";
const AUTO_CREATE: &str = "NBD_AUTO_CREATE";
const DEFAULT_SIZE: &str = "NBD_DEFAULT_SIZE";

/// Name of a cluster that the environment does not name.
const CLUSTER_DEFAULT: &str = "cinderblock";

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    name: String,
    nodes: Vec<RawNode>,
    shards: Vec<RawShard>,
    #[serde(default)]
    volumes: RawVolumes,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: String,
    nbd: String,
    grpc: String,
    http: String,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawShard {
    replicas: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct RawVolumes {
    auto_create: bool,
    default_size: ByteSize,
}

impl Default for RawVolumes {
    fn default() -> Self {
        let VolumePolicy { auto_create, default_size } = VolumePolicy::default();
        Self { auto_create, default_size }
    }
}

pub(super) fn from_toml(text: &str, origin: &Origin) -> Result<ClusterConfig, ConfigError> {
    let raw: RawCluster = toml::from_str(text).map_err(|error| ConfigError::Shape {
        origin: origin.clone(),
        place: place_in(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    let name = parse_name(origin, "name", &raw.name)?;
    let nodes = (0..).zip(&raw.nodes).map(|(index, node)| parse_node(origin, index, node));
    let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
    let shards = raw.shards.into_iter().map(|shard| shard.replicas).collect::<Vec<_>>();
    let shards = parse_shards(origin, &shards)?;
    let RawVolumes { auto_create, default_size } = raw.volumes;
    ClusterConfig::checked(origin, name, nodes, shards, VolumePolicy { auto_create, default_size })
}

/// Line number and text of the line at byte `offset`: the line holds the field and the value.
fn place_in(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default().trim();
    format!("line {number}: {line}")
}

fn parse_node(origin: &Origin, index: usize, raw: &RawNode) -> Result<NodeConfig, ConfigError> {
    let field = |key: &str| format!("nodes[{index}].{key}");
    let address = |key: &str, text: &str| {
        text.parse::<HostPort>()
            .map_err(|error| origin.field(field(key), text, Problem::Address(error)))
    };
    let name = parse_name(origin, &field("name"), &raw.name)?;
    let addresses = NodeAddresses {
        nbd: address("nbd", &raw.nbd)?,
        grpc: address("grpc", &raw.grpc)?,
        http: address("http", &raw.http)?,
    };
    Ok(NodeConfig { name, listen: addresses.clone(), addresses })
}

fn parse_shards(
    origin: &Origin,
    shards: &[Vec<String>],
) -> Result<Vec<Vec<NodeName>>, ConfigError> {
    let names = |(shard, replicas): (ShardId, &Vec<String>)| {
        let field = origin.replicas_field(shard);
        replicas.iter().map(|name| parse_name(origin, &field, name)).collect()
    };
    (0..).map(ShardId).zip(shards).map(names).collect()
}

fn parse_name<N>(origin: &Origin, field: &str, text: &str) -> Result<N, ConfigError>
where
    N: FromStr<Err = nbd_topology::InvalidName>,
{
    text.parse()
        .map_err(|error| origin.field(field, format_args!("{text:?}"), Problem::Name(error)))
}

pub(super) fn from_env(
    lookup: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<ClusterConfig>, ConfigError> {
    let origin = Origin::Environment;
    // An empty variable is how compose passes one that nobody set.
    let variable = |name: &'static str| match lookup(name).map(OsString::into_string) {
        Some(Ok(text)) if text.trim().is_empty() => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(bytes)) => Err(origin.field(name, bytes.display(), Problem::NotUtf8)),
        None => Ok(None),
    };
    let Some(text) = variable(SHARDS)? else { return Ok(None) };
    let shards: Vec<Vec<String>> =
        serde_json::from_str(&text).map_err(|error| ConfigError::Shape {
            origin: origin.clone(),
            place: format!("{SHARDS} = {text}"),
            message: format!("{error}; write JSON as in [[\"nbd-1-1\"]]"),
        })?;
    let shards = parse_shards(&origin, &shards)?;
    let nodes = nodes_by_host_name(&shards);
    let name = variable(CLUSTER)?;
    let name = parse_name(&origin, CLUSTER, name.as_deref().unwrap_or(CLUSTER_DEFAULT))?;

    let mut volumes = VolumePolicy::default();
    if let Some(text) = variable(AUTO_CREATE)? {
        volumes.auto_create = match text.trim() {
            "true" | "1" => true,
            "false" | "0" => false,
            _ => return Err(origin.field(AUTO_CREATE, text, Problem::NotBool)),
        };
    }
    if let Some(text) = variable(DEFAULT_SIZE)? {
        let size = text.parse();
        volumes.default_size =
            size.map_err(|error| origin.field(DEFAULT_SIZE, &text, Problem::Size(error)))?;
    }
    ClusterConfig::checked(&origin, name, nodes, shards, volumes).map(Some)
}

/// Every node that the shards name, by name, reached at its host name and listening everywhere.
fn nodes_by_host_name(shards: &[Vec<NodeName>]) -> Vec<NodeConfig> {
    let names: BTreeSet<&NodeName> = shards.iter().flatten().collect();
    let node = |name: &NodeName| NodeConfig {
        name: name.clone(),
        addresses: NodeAddresses {
            nbd: HostPort::of_node(name, NBD_PORT),
            grpc: HostPort::of_node(name, GRPC_PORT),
            http: HostPort::of_node(name, HTTP_PORT),
        },
        listen: NodeAddresses {
            nbd: HostPort::any(NBD_PORT),
            grpc: HostPort::any(GRPC_PORT),
            http: HostPort::any(HTTP_PORT),
        },
    };
    names.into_iter().map(node).collect()
}

pub(super) fn to_toml(cluster: &ClusterConfig) -> String {
    let node = |node: &NodeConfig| RawNode {
        name: node.name.to_string(),
        nbd: node.addresses.nbd.to_string(),
        grpc: node.addresses.grpc.to_string(),
        http: node.addresses.http.to_string(),
    };
    let shard = |(_, replicas): (ShardId, &[NodeName])| RawShard {
        replicas: replicas.iter().map(NodeName::to_string).collect(),
    };
    let raw = RawCluster {
        name: cluster.name.to_string(),
        nodes: cluster.nodes.iter().map(node).collect(),
        shards: cluster.shards.shards().map(shard).collect(),
        volumes: RawVolumes {
            auto_create: cluster.volumes.auto_create,
            default_size: cluster.volumes.default_size,
        },
    };
    toml::to_string(&raw).expect("strings, lists and a truth value are always TOML")
}
