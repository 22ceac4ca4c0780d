//! A cluster of real processes on this machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, thread};

use tempfile::TempDir;

use crate::binary::binary;
use crate::health::{Health, ShardDigest};
use crate::network::Network;
use crate::node::{NodeProcess, NodeSetup, Ports, Target, free_ports};

/// Time a cluster has to serve again, or its replicas to become equal. Far above what either takes,
/// also on a loaded machine and with a whole volume to copy.
const DEADLINE: Duration = Duration::from_secs(90);

/// Time between two looks at a condition.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Set to anything, keeps the files of a cluster whose test fails, and says where they are.
const KEEP: &str = "CINDERBLOCK_KEEP";

/// `nbd-replica` processes that serve one cluster. Dropping it kills them and removes their data.
#[derive(Debug)]
pub struct Cluster {
    // Above the directory, so that the processes are gone before their data is.
    nodes: Vec<NodeProcess>,
    /// Place of the node that [`node`](Self::node) gives.
    front: usize,
    network: Option<Network>,
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
    program: Option<PathBuf>,
    proxied: bool,
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
            program: None,
            proxied: false,
        }
    }

    /// The node to attach to: the first, which is the only one of a cluster of one replica, unless
    /// [`put_in_front`](Self::put_in_front) said otherwise.
    pub fn node(&self) -> &NodeProcess {
        &self.nodes[self.front]
    }

    /// The node to attach to, to act on.
    pub fn node_mut(&mut self) -> &mut NodeProcess {
        &mut self.nodes[self.front]
    }

    /// Makes the node at `place` the one that [`node`](Self::node) gives.
    pub fn put_in_front(&mut self, place: usize) {
        assert!(place < self.nodes.len(), "there is no node {place}");
        self.front = place;
    }

    /// Every node, in the order of their names.
    pub fn nodes(&mut self) -> &mut [NodeProcess] {
        &mut self.nodes
    }

    /// The node at `place`, in the order of their names.
    pub fn at(&self, place: usize) -> &NodeProcess {
        &self.nodes[place]
    }

    /// The node at `place`, to act on.
    pub fn at_mut(&mut self, place: usize) -> &mut NodeProcess {
        &mut self.nodes[place]
    }

    /// How a load finds each node.
    pub fn targets(&self) -> Vec<Target> {
        self.nodes.iter().map(NodeProcess::target).collect()
    }

    /// The network between the nodes, to put faults into.
    ///
    /// # Panics
    /// If the cluster was not built [`proxied`](ClusterBuilder::proxied).
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("the cluster is not proxied")
    }

    /// Place of the node that leads shard 0 and can commit. `None` if none says so now.
    pub fn leader(&self) -> Option<usize> {
        let leads = |health: Health| {
            let shard = health.shards.iter().find(|shard| shard.shard == 0)?;
            (health.is_ok() && shard.role == "leader").then_some(shard.term)
        };
        let term = |place: &usize| self.nodes[*place].health().and_then(leads);
        let terms = (0..self.nodes.len()).filter_map(|place| Some((term(&place)?, place)));
        terms.max().map(|(_, place)| place)
    }

    /// Place of the node that leads shard 0, once there is one.
    ///
    /// # Panics
    /// If there is none in time.
    pub fn wait_leader(&self) -> usize {
        wait_for("a leader", || self.leader().ok_or_else(|| self.describe()))
    }

    /// Places of two nodes or more that do not lead shard 0, in order.
    ///
    /// # Panics
    /// As [`wait_leader`](Self::wait_leader).
    pub fn followers(&self) -> Vec<usize> {
        let leader = self.wait_leader();
        (0..self.nodes.len()).filter(|place| *place != leader).collect()
    }

    /// Waits until every node that runs and is not paused can serve, by its `/health`.
    ///
    /// # Panics
    /// If one cannot in time.
    pub fn wait_until_serving(&mut self) {
        let started = Instant::now();
        for place in 0..self.nodes.len() {
            let node = &mut self.nodes[place];
            while node.is_running()
                && !node.is_paused()
                && !node.health().is_some_and(|health| health.is_ok())
            {
                if started.elapsed() > DEADLINE {
                    panic!("{} does not serve: {}", self.nodes[place].name(), self.describe());
                }
                thread::sleep(LOOK_AGAIN);
            }
        }
    }

    /// Waits until all nodes' stores hold the same, and gives what that is. Nothing may write.
    ///
    /// # Panics
    /// If they do not in time.
    pub fn wait_until_equal(&self) -> Vec<ShardDigest> {
        wait_for("all replicas to be equal", || {
            let digests: Vec<_> = self.nodes.iter().map(NodeProcess::digests).collect();
            match digests.first() {
                Some(Some(first)) if digests.iter().all(|other| other.as_ref() == Some(first)) => {
                    Ok(first.clone())
                }
                _ => Err(format!("{digests:?}\n{}", self.describe())),
            }
        })
    }

    /// Each node's state in a line, for people.
    fn describe(&self) -> String {
        let line = |node: &NodeProcess| format!("{}: {:?}\n", node.name(), node.health());
        self.nodes.iter().map(line).collect()
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

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() && env::var_os(KEEP).is_some() {
            self.directory.disable_cleanup(true);
            eprintln!("kept {}", self.directory.path().display());
        }
    }
}

/// Asks until the answer is there.
///
/// # Panics
/// If it is not in time; with the last reason why not.
fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(reason) if started.elapsed() > DEADLINE => {
                panic!("waited {DEADLINE:?} for {what}: {reason}")
            }
            Err(_) => thread::sleep(LOOK_AGAIN),
        }
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
        Cluster { nodes, front: 0, network, cluster_file, directory }
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
