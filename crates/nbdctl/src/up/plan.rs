//! What is to run, with which settings: found out and checked before anything is made or started.

use std::path::{Path, PathBuf};

use clap::Parser as _;
use nbd_replica::Tuning;
use nbd_service::{ClusterConfig, Failure, HostPort, LogFormat};
use nbd_topology::NodeName;

use super::Args;
use super::crew::{BALANCER, CONTROL, FIRST_REPLICA};
use super::directory::{Contents, Directory};
use super::ports::{self, Wanted};
use super::shape::{self, Shape, Wishes};

/// What the load balancer is called in messages and log lines.
pub(super) const BALANCER_NAME: &str = "nbd-lb";

/// The same for the control API.
pub(super) const CONTROL_NAME: &str = "nbd-control";

/// A cluster that can be started.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) cluster: ClusterConfig,
    /// Whether the cluster is made now: it forms once all its nodes are there.
    pub(super) is_new: bool,
    /// Nodes that join a cluster that was there before.
    pub(super) added: Vec<NodeName>,
    /// Where clients attach to the load balancer, and where it tells how it is.
    pub(super) nbd: HostPort,
    pub(super) http: HostPort,
    /// Where the control API is served.
    pub(super) api: HostPort,
    /// Absolute.
    pub(super) data_dir: PathBuf,
    pub(super) tuning: Tuning,
    pub(super) log_format: LogFormat,
}

/// Finds out what is to run, checks it, and takes the directory for it. Makes the directory and
/// describes the cluster there, if need be.
///
/// # Errors
/// What cannot be; then nothing was made, but for the lock in a directory that was there.
pub(super) fn make(args: Args) -> Result<(Plan, Directory), Failure> {
    let data_dir = std::path::absolute(&args.data_dir)?;
    let (nbd, http) = (ports::settle(&args.nbd)?, ports::settle(&args.http)?);
    let api = ports::settle(&args.api)?;
    let given = [nbd.port(), http.port(), api.port()];
    let is_free = |port: u16| !given.contains(&port) && ports::is_free(port);
    let directory = Directory::open(&data_dir)?;
    let contents = directory.as_ref().map_or(Ok(Contents::Nothing), Directory::contents)?;
    let is_new = matches!(contents, Contents::Nothing);
    let (before, shape) = match contents {
        Contents::Nothing => (None, shape::create(&args.wishes, &is_free)),
        Contents::OneNode(identity) => {
            let one = one_node(&identity.cluster, args.wishes.ports, &is_free);
            let one = one.map_err(Failure::usage)?;
            (None, shape::follow(&one, &args.wishes, &is_free))
        }
        Contents::Cluster(cluster) => {
            let shape = shape::follow(&cluster, &args.wishes, &is_free);
            (Some(cluster), shape)
        }
    };
    let Shape { cluster, added } =
        shape.map_err(|error| Failure::usage(error.context(in_words(&args.data_dir))))?;
    let Args { tuning, log_format, .. } = args;
    let plan = Plan { cluster, is_new, added, nbd, http, api, data_dir, tuning, log_format };
    plan.balancer()?;
    plan.control()?;
    for node in plan.cluster.nodes() {
        plan.replica(node.name.clone())?;
    }
    ports::check(&plan.wanted())?;
    let directory = match directory {
        Some(directory) => directory,
        None => Directory::create(&plan.data_dir)?,
    };
    if before.as_ref() != Some(&plan.cluster) {
        directory.store(&plan.cluster)?;
    }
    Ok((plan, directory))
}

/// What an earlier version made: a cluster of one node, whose ports were not written down.
fn one_node(
    name: &nbd_topology::ClusterName,
    ports: Option<u16>,
    is_free: &dyn Fn(u16) -> bool,
) -> anyhow::Result<ClusterConfig> {
    let (name, shards, replicas) = (Some(name.clone()), Some(1), Some(1));
    let wishes = Wishes { name, shards, replicas, ports, ..Wishes::default() };
    Ok(shape::create(&wishes, is_free)?.cluster)
}

fn in_words(data_dir: &Path) -> String {
    format!("cannot run this in {}", data_dir.display())
}

impl Plan {
    /// The settings of the load balancer.
    pub(super) fn balancer(&self) -> Result<nbd_lb::Config, Failure> {
        let flags = self.balancer_flags();
        let args = nbd_lb::Args::try_parse_from(["nbd-lb".to_owned()].into_iter().chain(flags));
        nbd_lb::Config::new(self.cluster.clone(), args.map_err(Failure::usage)?)
            .map_err(Failure::usage)
    }

    /// The settings of the control API.
    pub(super) fn control(&self) -> Result<nbd_control::Config, Failure> {
        let flags = [CONTROL_NAME.to_owned()].into_iter().chain(self.control_flags());
        let args = nbd_control::Args::try_parse_from(flags).map_err(Failure::usage)?;
        nbd_control::Config::new(self.cluster.clone(), args).map_err(Failure::usage)
    }

    /// The settings of a replica.
    pub(super) fn replica(&self, node: NodeName) -> Result<nbd_replica::Config, Failure> {
        let data_dir = Directory::of_node(&self.data_dir, &node);
        nbd_replica::Config::new(self.cluster.clone(), node, data_dir, self.tuning.clone())
            .map_err(Failure::usage)
    }

    /// The command line of each service as a process of its own: its name, its program, its flags.
    /// In the order of their places in the crew.
    pub(super) fn commands(&self) -> Vec<(String, &'static str, Vec<String>)> {
        let node = |name: &NodeName| {
            let directory = Directory::of_node(&self.data_dir, name);
            let mut flags = vec![
                self.cluster_flag(),
                format!("--node={name}"),
                format!("--data-dir={}", directory.display()),
            ];
            flags.extend(self.tuning.flags());
            flags.extend(self.log_flag());
            (name.to_string(), "nbd-replica", flags)
        };
        let balancer = (BALANCER_NAME.to_owned(), "nbd-lb", self.balancer_flags());
        let control = (CONTROL_NAME.to_owned(), "nbd-control", self.control_flags());
        let nodes = self.cluster.nodes().iter().map(|config| node(&config.name));
        [balancer, control].into_iter().chain(nodes).collect()
    }

    fn balancer_flags(&self) -> Vec<String> {
        let Tuning { connections_max, request_bytes_max, shutdown_deadline, .. } = &self.tuning;
        let mut flags = vec![
            self.cluster_flag(),
            // Whoever ends the cluster means it: its clients' replicas go, too.
            "--drain-deadline=0s".to_owned(),
            format!("--name={BALANCER_NAME}"),
            format!("--nbd={}", self.nbd),
            format!("--http={}", self.http),
            format!("--connections-max={connections_max}"),
            format!("--request-bytes-max={request_bytes_max}"),
            format!("--shutdown-deadline={shutdown_deadline}"),
        ];
        flags.extend(self.log_flag());
        flags
    }

    fn control_flags(&self) -> Vec<String> {
        let mut flags = vec![
            self.cluster_flag(),
            format!("--http={}", self.api),
            format!("--shutdown-deadline={}", self.tuning.shutdown_deadline),
        ];
        flags.extend(self.log_flag());
        flags
    }

    fn cluster_flag(&self) -> String {
        format!("--cluster={}", Directory::cluster_file(&self.data_dir).display())
    }

    fn log_flag(&self) -> Option<String> {
        let format = self.log_format;
        (format != LogFormat::default()).then(|| format!("--log-format={format}"))
    }

    /// The name of the service at this place of the crew.
    pub(super) fn name_of(&self, place: usize) -> &str {
        match place {
            BALANCER => BALANCER_NAME,
            CONTROL => CONTROL_NAME,
            replica => self.cluster.nodes()[replica - FIRST_REPLICA].name.as_str(),
        }
    }

    /// The place of a node in the crew.
    pub(super) fn place_of(&self, node: &NodeName) -> Option<usize> {
        let place = self.cluster.nodes().iter().position(|known| known.name == *node)?;
        Some(FIRST_REPLICA + place)
    }

    /// What is listened on, and for what.
    fn wanted(&self) -> Vec<Wanted> {
        let mut wanted = vec![
            ("NBD of the load balancer (--nbd)".to_owned(), self.nbd.clone()),
            ("HTTP of the load balancer (--http)".to_owned(), self.http.clone()),
            ("the control API (--api)".to_owned(), self.api.clone()),
        ];
        let file = Directory::cluster_file(&self.data_dir);
        let origin = if self.is_new { "--ports".to_owned() } else { file.display().to_string() };
        for node in self.cluster.nodes() {
            let addresses = &node.listen;
            let services =
                [("NBD", &addresses.nbd), ("gRPC", &addresses.grpc), ("HTTP", &addresses.http)];
            wanted.extend(services.map(|(service, address)| {
                (format!("{service} of {} ({origin})", node.name), address.clone())
            }));
        }
        wanted
    }
}
