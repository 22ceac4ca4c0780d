//! What a cluster is to be, and the files its nodes start from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Cluster, Front};
use crate::binary::binary;
use crate::network::Network;
use crate::node::{NodeProcess, NodeSetup};
use crate::ports::{Ports, free_ports};

/// What a [`Cluster`] is to be: one shard of one replica, unless told otherwise.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    name: String,
    shards: Vec<Vec<String>>,
    auto_create: bool,
    default_size: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    directory: Option<PathBuf>,
    program: Option<PathBuf>,
    proxied: bool,
}

impl ClusterBuilder {
    pub(super) fn new() -> Self {
        Self {
            name: "test".to_owned(),
            shards: vec![vec!["nbd-1-1".to_owned()]],
            auto_create: true,
            default_size: "64MiB".to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
            program: None,
            proxied: false,
        }
    }

    /// The cluster's name. Default `test`.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The names of the replicas' nodes, for each shard. Default `[["nbd-1-1"]]`.
    #[must_use]
    pub fn shards(mut self, shards: &[&[&str]]) -> Self {
        let owned = |names: &&[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        self.shards = shards.iter().map(owned).collect();
        self
    }

    /// One shard with this many replicas, on nodes `nbd-1-1`, `nbd-1-2`, ... Default 1.
    #[must_use]
    pub fn replicas(mut self, count: usize) -> Self {
        self.shards = vec![(1..=count).map(|number| format!("nbd-1-{number}")).collect()];
        self
    }

    /// Puts a proxy between each two nodes' gRPC, so that the network can be made to fail:
    /// [`Cluster::network`]. Each node then has a `cluster.toml` of its own, in which the others'
    /// addresses are those of the proxies.
    #[must_use]
    pub fn proxied(mut self) -> Self {
        self.proxied = true;
        self
    }

    /// The `nbd-replica` to run. Default: the one of this workspace, built if need be.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    /// Whether attaching to an unknown name creates the volume. Default true.
    #[must_use]
    pub fn auto_create(mut self, auto_create: bool) -> Self {
        self.auto_create = auto_create;
        self
    }

    /// Size of a volume created by attaching to it. Default `64MiB`.
    #[must_use]
    pub fn default_size(mut self, size: &str) -> Self {
        size.clone_into(&mut self.default_size);
        self
    }

    /// A further flag for every node: `--log-bytes-max=64MiB`.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// A further environment variable for every node.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Puts the cluster's files in a new directory under this one, say on a file system of a
    /// certain kind. Default: the system's directory for temporary files.
    #[must_use]
    pub fn under(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// Builds the program if need be, starts every node, and waits until all are ready.
    ///
    /// # Panics
    /// If the program does not build, or a node does not become ready.
    pub fn start(self) -> Cluster {
        let mut cluster = self.prepare();
        // All at once: with several replicas to a shard, one alone is not ready.
        cluster.nodes.iter_mut().for_each(|node| node.spawn());
        cluster.nodes.iter_mut().for_each(|node| node.wait_ready());
        cluster
    }

    /// As [`start`](Self::start), but starts no node yet.
    ///
    /// # Panics
    /// If the program does not build, or its directory cannot be made.
    pub fn prepare(self) -> Cluster {
        let mut builder = tempfile::Builder::new();
        builder.prefix("cinderblock-test-");
        let directory = match &self.directory {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        };
        let directory = directory.expect("make a temporary directory");
        let names = self.shards.iter().flatten().cloned();
        let ports: BTreeMap<String, Ports> = names.map(|name| (name, free_ports())).collect();
        let grpc: Vec<u16> = ports.values().map(|ports| ports.grpc).collect();
        let network = self.proxied.then(|| Network::new(&grpc));
        let cluster_file = directory.path().join("cluster.toml");
        fs::write(&cluster_file, self.cluster_toml(&ports)).expect("write cluster.toml");
        let program = self.program.clone().unwrap_or_else(|| binary("nbd-replica"));
        let node = |(place, (name, own)): (usize, (&String, &Ports))| {
            let own_directory = directory.path().join(name);
            fs::create_dir_all(&own_directory).expect("create a node's directory");
            let cluster_file = match &network {
                Some(network) => {
                    let file = own_directory.join("cluster.toml");
                    let text = self.cluster_toml(&seen_from(place, &ports, network));
                    fs::write(&file, text).expect("write cluster.toml");
                    file
                }
                None => cluster_file.clone(),
            };
            NodeProcess::new(NodeSetup {
                name: name.clone(),
                ports: *own,
                program: program.clone(),
                cluster_file,
                directory: own_directory,
                arguments: self.arguments.clone(),
                environment: self.environment.clone(),
            })
        };
        let nodes = ports.iter().enumerate().map(node).collect();
        let (program, environment) = (self.program, self.environment);
        Cluster {
            nodes,
            front: Front::Node(0),
            network,
            program,
            environment,
            cluster_file,
            directory,
        }
    }

    fn cluster_toml(&self, nodes: &BTreeMap<String, Ports>) -> String {
        let mut text = format!("name = {:?}\n", self.name);
        for (name, Ports { nbd, grpc, http }) in nodes {
            let _ = write!(
                text,
                "[[nodes]]\nname = {name:?}\nnbd = \"127.0.0.1:{nbd}\"\n\
                 grpc = \"127.0.0.1:{grpc}\"\nhttp = \"127.0.0.1:{http}\"\n"
            );
        }
        for replicas in &self.shards {
            let _ = write!(text, "[[shards]]\nreplicas = {replicas:?}\n");
        }
        let _ = write!(
            text,
            "[volumes]\nauto_create = {}\ndefault_size = {:?}\n",
            self.auto_create, self.default_size
        );
        text
    }
}

/// The nodes' ports as node `place` is to know them: its own, and of the others their proxies'.
fn seen_from(
    place: usize,
    ports: &BTreeMap<String, Ports>,
    network: &Network,
) -> BTreeMap<String, Ports> {
    let seen = |(other, (name, ports)): (usize, (&String, &Ports))| {
        let grpc = if other == place { ports.grpc } else { network.port(place, other) };
        (name.clone(), Ports { grpc, ..*ports })
    };
    ports.iter().enumerate().map(seen).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_reaches_the_others_through_proxies() {
        let ports = ["a", "b"].map(|name| (name.to_owned(), free_ports()));
        let ports = BTreeMap::from(ports);
        let network = Network::new(&[ports["a"].grpc, ports["b"].grpc]);
        let seen = seen_from(1, &ports, &network);
        assert_eq!(seen["b"].grpc, ports["b"].grpc);
        assert_eq!(seen["a"].grpc, network.port(1, 0));
        assert_eq!((seen["a"].nbd, seen["a"].http), (ports["a"].nbd, ports["a"].http));
    }

    #[test]
    fn the_cluster_file_has_the_documented_shape() {
        let ports = Ports { nbd: 11001, grpc: 11002, http: 11003 };
        let nodes = BTreeMap::from([("nbd-1-1".to_owned(), ports)]);
        let text = Cluster::builder().name("demo").default_size("1GiB").cluster_toml(&nodes);
        let expected = r#"name = "demo"
[[nodes]]
name = "nbd-1-1"
nbd = "127.0.0.1:11001"
grpc = "127.0.0.1:11002"
http = "127.0.0.1:11003"
[[shards]]
replicas = ["nbd-1-1"]
[volumes]
auto_create = true
default_size = "1GiB"
"#;
        assert_eq!(text, expected);
    }
}
