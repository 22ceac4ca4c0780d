//! A cluster of real processes on this machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::binary::binary;
use crate::node::{NodeProcess, NodeSetup, Ports, free_ports};

/// `nbd-replica` processes that serve one cluster. Dropping it kills them and removes their data.
#[derive(Debug)]
pub struct Cluster {
    // Above the directory, so that the processes are gone before their data is.
    nodes: Vec<NodeProcess>,
    cluster_file: PathBuf,
    directory: TempDir,
}

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
}

impl Cluster {
    /// A running cluster of one shard and one replica.
    ///
    /// # Panics
    /// As [`ClusterBuilder::start`].
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// A cluster to be described further.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            name: "test".to_owned(),
            shards: vec![vec!["nbd-1-1".to_owned()]],
            auto_create: true,
            default_size: "64MiB".to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
        }
    }

    /// The first node: the only one of a cluster of one replica.
    pub fn node(&self) -> &NodeProcess {
        &self.nodes[0]
    }

    /// The first node, to act on.
    pub fn node_mut(&mut self) -> &mut NodeProcess {
        &mut self.nodes[0]
    }

    /// Every node, in the order of their names.
    pub fn nodes(&mut self) -> &mut [NodeProcess] {
        &mut self.nodes
    }

    /// The `cluster.toml` that the nodes read.
    pub fn cluster_file(&self) -> &Path {
        &self.cluster_file
    }

    /// A directory that lasts as long as the cluster, for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl ClusterBuilder {
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
        cluster.nodes.iter_mut().for_each(NodeProcess::spawn);
        cluster.nodes.iter_mut().for_each(NodeProcess::wait_ready);
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
        let nodes: BTreeMap<String, Ports> = names.map(|name| (name, free_ports())).collect();
        let cluster_file = directory.path().join("cluster.toml");
        fs::write(&cluster_file, self.cluster_toml(&nodes)).expect("write cluster.toml");
        let program = binary("nbd-replica");
        let node = |(name, ports): (String, Ports)| {
            NodeProcess::new(NodeSetup {
                ports,
                program: program.clone(),
                cluster_file: cluster_file.clone(),
                directory: directory.path().join(&name),
                arguments: self.arguments.clone(),
                environment: self.environment.clone(),
                name,
            })
        };
        let nodes = nodes.into_iter().map(node).collect();
        Cluster { nodes, cluster_file, directory }
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

#[cfg(test)]
mod tests {
    use super::*;

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
