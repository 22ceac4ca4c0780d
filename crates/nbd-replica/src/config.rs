//! Settings of one replica process: parsed, checked and frozen before any socket opens.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory as _, Parser};
use nbd_front::{InvalidDefaultSize, VolumesConfig};
use nbd_service::trace::{self, InvalidTrace};
use nbd_service::{ByteSize, ClusterConfig, HumanDuration, LogFormat, NodeAddresses};
use nbd_topology::{NodeName, ShardId};

/// Command line of `nbd-replica`. Each flag can also be given by the environment variable named.
#[derive(Debug, Clone, Parser)]
#[command(name = "nbd-replica", version, about = "Serves the replicas of one node over NBD")]
pub struct Args {
    /// The cluster file. Without it the cluster is taken from NBD_SHARDS.
    #[arg(long, env = "NBD_CLUSTER_FILE", value_name = "FILE")]
    pub cluster: Option<PathBuf>,

    /// Which of the cluster's nodes this is.
    #[arg(long, env = "NBD_NODE", value_name = "NAME")]
    pub node: NodeName,

    /// Where this node keeps its data. Created if missing.
    #[arg(long, env = "NBD_DATA_DIR", value_name = "DIR")]
    pub data_dir: PathBuf,

    /// Settings with good defaults.
    #[command(flatten)]
    pub tuning: Tuning,

    /// Time after which the process ends itself, with exit code 75, if the leader of one of its
    /// shards has not heard from it and no shard needs it: for supervisors that start it again. 0s:
    /// never. Else at least 5s.
    #[arg(long, env = "NBD_ISOLATION_EXIT", default_value = "0s", value_name = "TIME")]
    pub isolation_exit: HumanDuration,

    /// Log lines as text or as JSON.
    #[arg(long, env = "NBD_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: LogFormat,

    /// Check the configuration, print what would be used, and exit.
    #[arg(long)]
    pub check_config: bool,
}

/// What one process may be tuned in; the same for `nbd-replica` and for each node of `nbdctl up`.
#[derive(Debug, Clone, Parser)]
pub struct Tuning {
    /// Connections served at the same time. Minimum 1.
    #[arg(long, env = "NBD_CONNECTIONS_MAX", default_value_t = 4096, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,

    /// Bytes of requests that all connections together may hold. Past it, replicas read no further
    /// request until others are answered. From 64MiB to 4GiB.
    #[arg(long, env = "NBD_REQUEST_BYTES_MAX", default_value = "96MiB", value_name = "SIZE")]
    pub request_bytes_max: ByteSize,

    /// Size of one log file; fixed when the data directory is created. From 4MiB to 1GiB.
    #[arg(long, env = "NBD_LOG_SEGMENT_BYTES", default_value = "64MiB", value_name = "SIZE")]
    pub log_segment_bytes: ByteSize,

    /// Bound of the whole log. Writers are slowed from 60 % on. At least 4 segments.
    #[arg(long, env = "NBD_LOG_BYTES_MAX", default_value = "1GiB", value_name = "SIZE")]
    pub log_bytes_max: ByteSize,

    /// Bytes of recent log data kept in memory for reads and checkpoints.
    #[arg(long, env = "NBD_LOG_CACHE_BYTES", default_value = "48MiB", value_name = "SIZE")]
    pub log_cache_bytes: ByteSize,

    /// A checkpoint runs when this much log has gathered. At most half of the log's bound.
    #[arg(long, env = "NBD_CHECKPOINT_LOG_BYTES", default_value = "256MiB", value_name = "SIZE")]
    pub checkpoint_log_bytes: ByteSize,

    /// Room on the file system that is left alone: writes to new places are refused before it is
    /// used.
    #[arg(long, env = "NBD_SPACE_RESERVE", default_value = "256MiB", value_name = "SIZE")]
    pub space_reserve: ByteSize,

    /// Bytes of log kept for replicas that were away, beside what checkpoints need; who was away
    /// for longer is sent the chunks that changed. Never more than a quarter of the log's bound; 0
    /// keeps nothing.
    #[arg(long, env = "NBD_LOG_RETENTION_BYTES", default_value = "256MiB", value_name = "SIZE")]
    pub log_retention_bytes: ByteSize,

    /// How the leader answers reads: `lease`, from its own store while it holds a lease, or
    /// `quorum`, after a round to a majority each time, which needs no clocks. The same on all
    /// nodes.
    #[arg(long, env = "NBD_READ_MODE", default_value = "lease", value_name = "lease|quorum")]
    pub read_mode: ReadModeArg,

    /// Most bytes a second that a replica which was away for long, or is new, takes in to catch up.
    /// At least 1MiB.
    #[arg(
        long,
        env = "NBD_RESYNC_BYTES_PER_SECOND",
        default_value = "128MiB",
        value_name = "SIZE"
    )]
    pub resync_bytes_per_second: ByteSize,

    /// Bytes a second that the background scrub reads to verify what is at rest; 0 turns it off.
    #[arg(long, env = "NBD_SCRUB_BYTES_PER_SECOND", default_value = "8MiB", value_name = "SIZE")]
    pub scrub_bytes_per_second: ByteSize,

    /// Time from the end of one pass of the scrub to the start of the next.
    #[arg(long, env = "NBD_SCRUB_INTERVAL", default_value = "24h", value_name = "TIME")]
    pub scrub_interval: HumanDuration,

    /// Time after which a session is closed that no front end has been attached to: its front end
    /// is gone for good, or cut off for so long that its clients are disconnected when it returns.
    /// At least 1s.
    #[arg(long, env = "NBD_SESSION_EXPIRY", default_value = "1h", value_name = "TIME")]
    pub session_expiry: HumanDuration,

    /// How long /health waits for the replicated counter to move.
    #[arg(long, env = "NBD_HEALTH_DEADLINE", default_value = "1s", value_name = "TIME")]
    pub health_deadline: HumanDuration,

    /// How long a stopping process waits for requests under way.
    #[arg(long, env = "NBD_SHUTDOWN_DEADLINE", default_value = "10s", value_name = "TIME")]
    pub shutdown_deadline: HumanDuration,
}

impl Tuning {
    /// The defaults, as if no flag and no variable were given.
    #[must_use]
    pub fn defaults() -> Self {
        Self::parse_from(["defaults"])
    }

    /// The flags that give another process these settings, without those that have their default.
    #[must_use]
    pub fn flags(&self) -> Vec<String> {
        let command = Self::command();
        let is_default = |name: &str, value: &str| {
            let flag = command.get_arguments().find(|flag| flag.get_long() == Some(name));
            flag.is_some_and(|flag| flag.get_default_values().iter().any(|d| d == value))
        };
        let settings = self.settings().into_iter();
        let settings = settings.filter(|(name, value)| !is_default(name, value));
        settings.map(|(name, value)| format!("--{name}={value}")).collect()
    }

    /// Each flag by name, and its value as it would be given.
    fn settings(&self) -> [(&'static str, String); 15] {
        [
            ("connections-max", self.connections_max.to_string()),
            ("request-bytes-max", self.request_bytes_max.to_string()),
            ("log-segment-bytes", self.log_segment_bytes.to_string()),
            ("log-bytes-max", self.log_bytes_max.to_string()),
            ("log-cache-bytes", self.log_cache_bytes.to_string()),
            ("checkpoint-log-bytes", self.checkpoint_log_bytes.to_string()),
            ("space-reserve", self.space_reserve.to_string()),
            ("log-retention-bytes", self.log_retention_bytes.to_string()),
            ("read-mode", self.read_mode.to_string()),
            ("resync-bytes-per-second", self.resync_bytes_per_second.to_string()),
            ("scrub-bytes-per-second", self.scrub_bytes_per_second.to_string()),
            ("scrub-interval", self.scrub_interval.to_string()),
            ("session-expiry", self.session_expiry.to_string()),
            ("health-deadline", self.health_deadline.to_string()),
            ("shutdown-deadline", self.shutdown_deadline.to_string()),
        ]
    }
}

/// How reads are answered, as a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ReadModeArg {
    /// Under the leader's lease.
    Lease,
    /// By a round to a majority for each read.
    Quorum,
}

impl From<ReadModeArg> for nbd_consensus::ReadMode {
    fn from(mode: ReadModeArg) -> Self {
        match mode {
            ReadModeArg::Lease => Self::Lease,
            ReadModeArg::Quorum => Self::Quorum,
        }
    }
}

impl fmt::Display for ReadModeArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lease => "lease",
            Self::Quorum => "quorum",
        })
    }
}

/// Checked settings of one node.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) cluster: ClusterConfig,
    pub(crate) node: NodeName,
    pub(crate) listen: NodeAddresses,
    pub(crate) data_dir: PathBuf,
    pub(crate) shards: Vec<ShardId>,
    pub(crate) volumes: VolumesConfig,
    pub(crate) tuning: Tuning,
    pub(crate) trace: trace::Settings,
    /// Time after which a node without part in a shard ends itself; `None`: never.
    pub(crate) isolation_exit: Option<Duration>,
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// The node is not in the cluster.
    #[error("node {node} is not in the cluster: it has {known}")]
    UnknownNode {
        /// The name given.
        node: NodeName,
        /// The names there are.
        known: String,
    },
    /// The node has no shard to serve.
    #[error("node {0} holds no shard")]
    NoShards(NodeName),
    /// A setting of traces that makes no sense.
    #[error(transparent)]
    Trace(#[from] InvalidTrace),
    /// A size out of its range.
    #[error("{name} is {value}: allowed is {allowed}")]
    OutOfRange {
        /// The flag.
        name: &'static str,
        /// What was given.
        value: ByteSize,
        /// What may be given.
        allowed: &'static str,
    },
    /// A time out of its range.
    #[error("{name} is {value}: allowed is {allowed}")]
    TimeOutOfRange {
        /// The flag.
        name: &'static str,
        /// What was given.
        value: HumanDuration,
        /// What may be given.
        allowed: &'static str,
    },
    /// A volume size that the store cannot make.
    #[error(transparent)]
    DefaultSize(#[from] InvalidDefaultSize),
}

impl Config {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(
        cluster: ClusterConfig,
        node: NodeName,
        data_dir: PathBuf,
        tuning: Tuning,
    ) -> Result<Self, InvalidConfig> {
        let Some(known) = cluster.node(&node) else {
            let names: Vec<_> = cluster.nodes().iter().map(|n| n.name.to_string()).collect();
            return Err(InvalidConfig::UnknownNode { node, known: names.join(", ") });
        };
        let listen = known.listen.clone();
        let shards: Vec<_> = cluster.shards_of(&node).collect();
        if shards.is_empty() {
            return Err(InvalidConfig::NoShards(node));
        }
        let volumes = VolumesConfig::new(cluster.volumes())?;
        check_sizes(&tuning)?;
        let (name, value) = ("--session-expiry", tuning.session_expiry);
        if value.get() < Duration::from_secs(1) {
            return Err(InvalidConfig::TimeOutOfRange { name, value, allowed: "at least 1s" });
        }
        Ok(Self {
            cluster,
            node,
            listen,
            data_dir,
            shards,
            volumes,
            tuning,
            trace: trace::Settings::from_env()?,
            isolation_exit: None,
        })
    }

    /// The same, of a node that ends itself after so long without part in a shard that does without
    /// it (0: never).
    ///
    /// # Errors
    /// A time in which elections and restarts would be taken for that.
    pub fn with_isolation_exit(mut self, after: HumanDuration) -> Result<Self, InvalidConfig> {
        if !after.get().is_zero() && after.get() < ISOLATION_EXIT_MIN {
            let (name, allowed) = ("--isolation-exit", "0s, or at least 5s");
            return Err(InvalidConfig::TimeOutOfRange { name, value: after, allowed });
        }
        self.isolation_exit = (!after.get().is_zero()).then_some(after.get());
        Ok(self)
    }
}

/// Least time after which a node may end itself: longer than an election, and than a leader takes
/// to hear from one that has just started.
const ISOLATION_EXIT_MIN: Duration = Duration::from_secs(5);

fn check_sizes(tuning: &Tuning) -> Result<(), InvalidConfig> {
    const MIB: u64 = 1 << 20;
    let in_range = |name, value: ByteSize, low: u64, high: u64, allowed| {
        if (low..=high).contains(&value.bytes()) {
            Ok(())
        } else {
            Err(InvalidConfig::OutOfRange { name, value, allowed })
        }
    };
    let requests = tuning.request_bytes_max;
    in_range("--request-bytes-max", requests, 64 * MIB, 4096 * MIB - 1, "64MiB to below 4GiB")?;
    let segment = tuning.log_segment_bytes;
    in_range("--log-segment-bytes", segment, 4 * MIB, 1024 * MIB, "4MiB to 1GiB")?;
    if !segment.bytes().is_multiple_of(4096) {
        let allowed = "a multiple of 4KiB";
        let name = "--log-segment-bytes";
        return Err(InvalidConfig::OutOfRange { name, value: segment, allowed });
    }
    let log = tuning.log_bytes_max;
    in_range("--log-bytes-max", log, 4 * segment.bytes(), 1 << 40, "4 segments to 1TiB")?;
    let cache = tuning.log_cache_bytes;
    in_range("--log-cache-bytes", cache, MIB, 1 << 40, "1MiB to 1TiB")?;
    let checkpoint = tuning.checkpoint_log_bytes;
    let half = log.bytes() / 2;
    in_range("--checkpoint-log-bytes", checkpoint, MIB, half, "1MiB to half of --log-bytes-max")?;
    let resync = tuning.resync_bytes_per_second;
    in_range("--resync-bytes-per-second", resync, MIB, u64::MAX, "at least 1MiB")
}

/// What would be used, for people: the cluster as a `cluster.toml`, then this node's own settings.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, node, listen, data_dir, shards, isolation_exit, .. } = self;
        let shards: Vec<_> = shards.iter().map(ToString::to_string).collect();
        writeln!(f, "# cluster\n{}", cluster.to_toml().trim_end())?;
        writeln!(f, "\n# node {node}")?;
        writeln!(f, "data directory       {}", data_dir.display())?;
        writeln!(f, "shards               {}", shards.join(", "))?;
        writeln!(f, "NBD                  {}", listen.nbd)?;
        writeln!(f, "gRPC                 {}", listen.grpc)?;
        writeln!(f, "HTTP                 {}", listen.http)?;
        let after = HumanDuration::new(isolation_exit.unwrap_or_default());
        writeln!(f, "traces               {}", self.trace)?;
        writeln!(f, "isolation-exit       {after}")?;
        write!(f, "{}", self.tuning)
    }
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut settings = self.settings().into_iter();
        settings.try_for_each(|(name, value)| writeln!(f, "{name:<20} {value}"))
    }
}

/// Time of one Raft tick. The election timeout is 12 of them, the heartbeat interval 2.
pub(crate) const RAFT_TICK: Duration = Duration::from_millis(25);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nbd_service::VolumePolicy;

    use super::*;

    fn config(toml: &str, node: &str, tuning: Tuning) -> Result<Config, InvalidConfig> {
        let cluster = ClusterConfig::from_toml(toml, Path::new("cluster.toml")).unwrap();
        Config::new(cluster, node.parse().unwrap(), "data".into(), tuning)
    }

    const ONE: &str = r#"
        name = "demo"
        [[nodes]]
        name = "a"
        nbd = "127.0.0.1:1"
        grpc = "127.0.0.1:2"
        http = "127.0.0.1:3"
        [[nodes]]
        name = "b"
        nbd = "127.0.0.1:4"
        grpc = "127.0.0.1:5"
        http = "127.0.0.1:6"
        [[shards]]
        replicas = ["a"]
    "#;

    #[test]
    fn a_node_serves_the_shards_it_is_listed_for() {
        let config = config(ONE, "a", Tuning::defaults()).unwrap();
        assert_eq!(config.shards, [ShardId(0)]);
        assert_eq!(config.volumes, VolumesConfig::new(VolumePolicy::default()).unwrap());
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        let error = config(ONE, "c", Tuning::defaults()).unwrap_err();
        assert_eq!(error.to_string(), "node c is not in the cluster: it has a, b");
        let error = config(ONE, "b", Tuning::defaults()).unwrap_err();
        assert_eq!(error.to_string(), "node b holds no shard");
    }

    #[test]
    fn a_node_ends_itself_only_if_told_so_and_not_too_soon() {
        let after = |time: &str| {
            let config = config(ONE, "a", Tuning::defaults()).unwrap();
            config.with_isolation_exit(time.parse().unwrap())
        };
        let config = config(ONE, "a", Tuning::defaults()).unwrap();
        assert_eq!(config.isolation_exit, None);
        assert_eq!(after("0s").unwrap().isolation_exit, None);
        let config = after("1m").unwrap();
        assert_eq!(config.isolation_exit, Some(Duration::from_secs(60)));
        assert!(config.to_string().contains("isolation-exit       1m\n"), "{config}");
        let error = after("4s").unwrap_err().to_string();
        assert_eq!(error, "--isolation-exit is 4s: allowed is 0s, or at least 5s");
    }

    #[test]
    fn settings_pass_on_as_flags() {
        let defaults = Tuning::defaults();
        assert_eq!(defaults.flags(), [""; 0]);
        let flags = ["--log-bytes-max=512MiB", "--read-mode=quorum", "--scrub-interval=90m"];
        let tuning = Tuning::parse_from(["x"].iter().chain(&flags));
        assert_eq!(tuning.flags(), flags);
        // None is forgotten.
        let command = Tuning::command();
        let known: Vec<_> = command.get_arguments().filter_map(|flag| flag.get_long()).collect();
        assert_eq!(known, defaults.settings().map(|(name, _)| name));
    }

    #[test]
    fn sizes_are_held_to_their_ranges() {
        let mut tuning = Tuning::defaults();
        tuning.log_bytes_max = ByteSize::new(128 << 20);
        let error = config(ONE, "a", tuning).unwrap_err();
        assert!(error.to_string().starts_with("--log-bytes-max is 128MiB"), "{error}");
        let mut tuning = Tuning::defaults();
        tuning.log_segment_bytes = ByteSize::new((4 << 20) + 512);
        assert!(config(ONE, "a", tuning).is_err());
        let mut tuning = Tuning::defaults();
        tuning.session_expiry = "500ms".parse().unwrap();
        let error = config(ONE, "a", tuning).unwrap_err();
        assert_eq!(error.to_string(), "--session-expiry is 500ms: allowed is at least 1s");
    }
}
