//! A cluster of real processes on this machine.

mod builder;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use tempfile::TempDir;

use crate::binary::binary;
use crate::health::{Health, ShardDigest};
use crate::network::Network;
use crate::node::{NodeProcess, NodeSetup};
use crate::ports::{Ports, free_port, free_ports};
use crate::server::{ServerProcess, ServerSetup, Target};

pub use self::builder::ClusterBuilder;

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
    front: Front,
    network: Option<Network>,
    /// The `nbd-replica` that runs, if it is not the one of this workspace.
    program: Option<PathBuf>,
    environment: Vec<(String, String)>,
    cluster_file: PathBuf,
    directory: TempDir,
}

/// What clients attach to.
#[derive(Debug)]
enum Front {
    /// The node at this place.
    Node(usize),
    Balancer(Box<ServerProcess>),
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
        ClusterBuilder::new()
    }

    /// What clients attach to: the first node, unless [`put_in_front`](Self::put_in_front) or
    /// [`put_balancer_in_front`](Self::put_balancer_in_front) said otherwise.
    pub fn front(&self) -> &ServerProcess {
        match &self.front {
            Front::Node(place) => &self.nodes[*place],
            Front::Balancer(balancer) => balancer,
        }
    }

    /// What clients attach to, to act on.
    pub fn front_mut(&mut self) -> &mut ServerProcess {
        match &mut self.front {
            Front::Node(place) => &mut self.nodes[*place],
            Front::Balancer(balancer) => balancer,
        }
    }

    /// The node in front, or else the first, which is the only one of a cluster of one replica.
    pub fn node(&self) -> &NodeProcess {
        &self.nodes[self.node_place()]
    }

    /// The same, to act on.
    pub fn node_mut(&mut self) -> &mut NodeProcess {
        let place = self.node_place();
        &mut self.nodes[place]
    }

    const fn node_place(&self) -> usize {
        match self.front {
            Front::Node(place) => place,
            Front::Balancer(_) => 0,
        }
    }

    /// Makes the node at `place` what clients attach to.
    pub fn put_in_front(&mut self, place: usize) {
        assert!(place < self.nodes.len(), "there is no node {place}");
        self.front = Front::Node(place);
    }

    /// Makes a new load balancer what clients attach to.
    ///
    /// # Panics
    /// As [`balancer`](Self::balancer).
    pub fn put_balancer_in_front(&mut self) {
        self.front = Front::Balancer(Box::new(self.balancer()));
    }

    /// Starts a load balancer in front of the cluster, and waits until it has reached the leader of
    /// every shard. It reaches nodes directly, also those of a [`proxied`](ClusterBuilder::proxied)
    /// cluster. It must not outlive the cluster.
    ///
    /// # Panics
    /// If the program does not build, or does not become ready.
    pub fn balancer(&self) -> ServerProcess {
        self.balancer_with(&[])
    }

    /// The same with further flags.
    ///
    /// # Panics
    /// As [`balancer`](Self::balancer).
    #[must_use]
    pub fn balancer_with(&self, flags: &[&str]) -> ServerProcess {
        let program = match &self.program {
            Some(replica) => replica.with_file_name("nbd-lb"),
            None => binary("nbd-lb"),
        };
        let (nbd, http) = (free_port(), free_port());
        let name = format!("lb-{nbd}");
        let mut arguments = vec![
            format!("--cluster={}", self.cluster_file.display()),
            format!("--nbd=127.0.0.1:{nbd}"),
            format!("--http=127.0.0.1:{http}"),
        ];
        arguments.extend(flags.iter().map(ToString::to_string));
        let mut balancer = ServerProcess::new(ServerSetup {
            nbd,
            http,
            program,
            arguments,
            environment: self.environment.clone(),
            directory: self.directory.path().join(&name),
            name,
        });
        balancer.start();
        balancer
    }

    /// Starts a control API for the cluster, and waits until it serves. It reaches nodes directly,
    /// also those of a [`proxied`](ClusterBuilder::proxied) cluster, and serves no NBD.
    ///
    /// # Panics
    /// If the program does not build, or does not become ready.
    pub fn control(&self) -> ServerProcess {
        self.control_with(&[])
    }

    /// The same with further flags.
    ///
    /// # Panics
    /// As [`control`](Self::control).
    #[must_use]
    pub fn control_with(&self, flags: &[&str]) -> ServerProcess {
        let program = match &self.program {
            Some(replica) => replica.with_file_name("nbd-control"),
            None => binary("nbd-control"),
        };
        let http = free_port();
        let name = format!("control-{http}");
        let mut arguments = vec![
            format!("--cluster={}", self.cluster_file.display()),
            format!("--http=127.0.0.1:{http}"),
        ];
        arguments.extend(flags.iter().map(ToString::to_string));
        let mut control = ServerProcess::new(ServerSetup {
            // Nobody listens there.
            nbd: 0,
            http,
            program,
            arguments,
            environment: self.environment.clone(),
            directory: self.directory.path().join(&name),
            name,
        });
        control.start();
        control
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
        self.nodes.iter().map(|node| node.target()).collect()
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

    /// Starts a further node, with an empty directory, that knows itself as a replica of shard 0:
    /// it joins by itself. The others' configuration does not name it. Gives its place.
    ///
    /// # Panics
    /// If the program does not build.
    pub fn join(&mut self, name: &str, arguments: &[&str]) -> usize {
        let ports = free_ports();
        let directory = self.directory.path().join(name);
        fs::create_dir_all(&directory).expect("create a node's directory");
        let known = fs::read_to_string(&self.cluster_file).expect("read cluster.toml");
        let cluster_file = directory.join("cluster.toml");
        fs::write(&cluster_file, with_node(&known, name, &ports)).expect("write cluster.toml");
        let program = self.program.clone().unwrap_or_else(|| binary("nbd-replica"));
        let mut node = NodeProcess::new(NodeSetup {
            name: name.to_owned(),
            ports,
            program,
            cluster_file,
            directory,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            environment: self.environment.clone(),
        });
        node.spawn();
        self.nodes.push(node);
        self.nodes.len() - 1
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

/// A `cluster.toml` with one more node, the last replica of the first shard.
fn with_node(known: &str, name: &str, ports: &Ports) -> String {
    let Ports { nbd, grpc, http } = ports;
    let (nodes, shards) = known.split_once("[[shards]]").expect("there are shards");
    let (replicas, rest) = shards.split_once(']').expect("a shard has replicas");
    format!(
        "{nodes}[[nodes]]\nname = {name:?}\nnbd = \"127.0.0.1:{nbd}\"\ngrpc = \
         \"127.0.0.1:{grpc}\"\nhttp = \"127.0.0.1:{http}\"\n[[shards]]{replicas}, {name:?}]{rest}"
    )
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
