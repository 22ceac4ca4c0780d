//! Settings of one load balancer: parsed, checked and frozen before any socket opens.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use nbd_front::limits::PROCESS_NAME_BYTES_MAX;
use nbd_front::{InvalidDefaultSize, VolumesConfig};
use nbd_service::trace::{self, InvalidTrace};
use nbd_service::{ByteSize, ClusterConfig, HostPort, HumanDuration, LogFormat};

/// Command line of `nbd-lb`. Each flag can also be given by the environment variable named.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "nbd-lb",
    version,
    about = "One address for all volumes of a cluster",
    long_about = "One address for all volumes of a cluster. Clients attach here by the name of a \
                  volume; their requests go to the leader of its shard, and when that is lost or \
                  moves, to the next one: a client sees a pause, never an error or a disconnect. \
                  Any number of load balancers may run."
)]
pub struct Args {
    /// The cluster file. Without it the cluster is taken from NBD_SHARDS.
    #[arg(long, env = "NBD_CLUSTER_FILE", value_name = "FILE")]
    pub cluster: Option<PathBuf>,

    /// Name of this load balancer, by which the control API says through whom a client is attached:
    /// 1 to 255 bytes without control characters. Default: the host's name.
    #[arg(long, env = "NBD_LB_NAME", value_name = "NAME")]
    pub name: Option<String>,

    /// Where NBD clients attach.
    #[arg(long, env = "NBD_LB_NBD", default_value = "0.0.0.0:10809", value_name = "ADDR")]
    pub nbd: HostPort,

    /// Where health and metrics are served.
    #[arg(long, env = "NBD_LB_HTTP", default_value = "0.0.0.0:8080", value_name = "ADDR")]
    pub http: HostPort,

    /// How connections are carried. With `replay` requests are kept until they are answered, and
    /// sent again to the next leader: a client sees a pause when a replica is lost. With `splice`
    /// bytes are moved between client and replica within the kernel, for less CPU: a client is
    /// disconnected when its replica is lost, and has to attach anew by itself.
    #[arg(long, env = "NBD_LB_MODE", default_value = "replay", value_name = "replay|splice")]
    pub mode: Mode,

    /// Connections served at the same time. Minimum 1.
    #[arg(long, env = "NBD_CONNECTIONS_MAX", default_value_t = 4096, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,

    /// Bytes of requests that all connections together may hold. Past it no further request is read
    /// until others are answered. From 64MiB to 4GiB.
    #[arg(long, env = "NBD_REQUEST_BYTES_MAX", default_value = "96MiB", value_name = "SIZE")]
    pub request_bytes_max: ByteSize,

    /// Unix socket for taking over from a running load balancer: a new one that finds it there
    /// gets its listening sockets and its clients, which notice nothing, and the other one ends.
    /// Without it, none is found. Put it into a directory that only this user can write to.
    #[arg(long, env = "NBD_LB_TAKEOVER", value_name = "PATH")]
    pub takeover: Option<PathBuf>,

    /// How long attached clients are served on after SIGTERM, or after a takeover those that could
    /// not be handed over. New ones are not accepted meanwhile, and /readyz says so. Together with
    /// --shutdown-deadline it should be less than what a supervisor waits before it kills
    /// (Kubernetes: 30s). From 0s to 24h.
    #[arg(long, env = "NBD_LB_DRAIN_DEADLINE", default_value = "15s", value_name = "TIME")]
    pub drain_deadline: HumanDuration,

    /// How long a process that ends its clients' connections waits for what is under way to be
    /// answered. From 0s to 1h.
    #[arg(long, env = "NBD_SHUTDOWN_DEADLINE", default_value = "10s", value_name = "TIME")]
    pub shutdown_deadline: HumanDuration,

    /// Log lines as text or as JSON.
    #[arg(long, env = "NBD_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: LogFormat,

    /// Check the configuration, print what would be used, and exit.
    #[arg(long)]
    pub check_config: bool,
}

/// How a client's connection is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Requests are kept until they are answered, and sent again to the next leader.
    Replay,
    /// Bytes are moved within the kernel; the client reconnects by itself.
    Splice,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Replay => "replay",
            Self::Splice => "splice",
        })
    }
}

/// What `--request-bytes-max` may be: the largest request must fit.
const REQUEST_BYTES: std::ops::Range<u64> = 64 << 20..4 << 30;

/// Longest that a stopping process may be told to wait.
const SHUTDOWN_DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// Longest that clients may be served on by a process that is to stop.
const DRAIN_DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// The name of the machine, or of the container.
fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "nbd-lb".to_owned() } else { name }
}

/// Checked settings of one load balancer.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) cluster: ClusterConfig,
    pub(crate) name: Arc<str>,
    pub(crate) nbd: HostPort,
    pub(crate) http: HostPort,
    pub(crate) mode: Mode,
    pub(crate) connections_max: u32,
    pub(crate) request_bytes_max: ByteSize,
    pub(crate) volumes: VolumesConfig,
    pub(crate) takeover: Option<PathBuf>,
    pub(crate) drain_deadline: Duration,
    pub(crate) shutdown_deadline: Duration,
    pub(crate) trace: trace::Settings,
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// A name that cannot be shown.
    #[error("--name has {0} bytes, or a control character: allowed are 1 to 255 bytes without")]
    Name(usize),
    /// One address for two listeners.
    #[error("--nbd and --http are both {0}: give them different addresses")]
    SameAddress(HostPort),
    /// A bound of the bytes held that is out of its range.
    #[error("--request-bytes-max is {0}: allowed is 64MiB to below 4GiB")]
    RequestBytes(ByteSize),
    /// A size that no volume can have.
    #[error(transparent)]
    DefaultSize(#[from] InvalidDefaultSize),
    /// A setting of traces that makes no sense.
    #[error(transparent)]
    Trace(#[from] InvalidTrace),
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
}

impl Config {
    /// Checks the settings against each other. Where `args` say the cluster is has been looked at
    /// already: `cluster` is what was found.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(cluster: ClusterConfig, args: Args) -> Result<Self, InvalidConfig> {
        let Args { name, nbd, http, mode, connections_max, request_bytes_max, .. } = args;
        let Args { takeover, drain_deadline, shutdown_deadline, .. } = args;
        if nbd == http && nbd.port() != 0 {
            return Err(InvalidConfig::SameAddress(nbd));
        }
        if shutdown_deadline.get() > SHUTDOWN_DEADLINE_MAX {
            let (name, value) = ("--shutdown-deadline", shutdown_deadline);
            return Err(InvalidConfig::TimeOutOfRange { name, value, allowed: "at most 1h" });
        }
        if drain_deadline.get() > DRAIN_DEADLINE_MAX {
            let (name, value) = ("--drain-deadline", drain_deadline);
            return Err(InvalidConfig::TimeOutOfRange { name, value, allowed: "at most 24h" });
        }
        if !REQUEST_BYTES.contains(&request_bytes_max.bytes()) {
            return Err(InvalidConfig::RequestBytes(request_bytes_max));
        }
        let name = name.unwrap_or_else(host_name);
        if name.is_empty() || name.len() > PROCESS_NAME_BYTES_MAX || name.contains(char::is_control)
        {
            return Err(InvalidConfig::Name(name.len()));
        }
        let name = name.into();
        let volumes = VolumesConfig::new(cluster.volumes())?;
        let (drain_deadline, shutdown_deadline) = (drain_deadline.get(), shutdown_deadline.get());
        Ok(Self {
            cluster,
            name,
            nbd,
            http,
            mode,
            connections_max,
            request_bytes_max,
            volumes,
            takeover,
            drain_deadline,
            shutdown_deadline,
            trace: trace::Settings::from_env()?,
        })
    }
}

/// What would be used, for people: the cluster as a `cluster.toml`, then this process's own
/// settings.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, name, nbd, http, mode, shutdown_deadline, .. } = self;
        let Self { connections_max, request_bytes_max, takeover, drain_deadline, .. } = self;
        let trace = &self.trace;
        let takeover =
            takeover.as_ref().map_or_else(|| "none".into(), |path| path.to_string_lossy());
        writeln!(f, "# cluster\n{}", cluster.to_toml().trim_end())?;
        writeln!(f, "\n# load balancer")?;
        writeln!(f, "name                 {name}")?;
        writeln!(f, "NBD                  {nbd}")?;
        writeln!(f, "HTTP                 {http}")?;
        writeln!(f, "mode                 {mode}")?;
        writeln!(f, "connections-max      {connections_max}")?;
        writeln!(f, "request-bytes-max    {request_bytes_max}")?;
        writeln!(f, "traces               {trace}")?;
        writeln!(f, "takeover             {takeover}")?;
        writeln!(f, "drain-deadline       {}", HumanDuration::new(*drain_deadline))?;
        writeln!(f, "shutdown-deadline    {}", HumanDuration::new(*shutdown_deadline))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory as _;

    use super::*;

    const CLUSTER: &str = r#"
        name = "demo"
        [[nodes]]
        name = "a"
        nbd = "127.0.0.1:1"
        grpc = "127.0.0.1:2"
        http = "127.0.0.1:3"
        [[shards]]
        replicas = ["a"]
    "#;

    fn config(flags: &[&str]) -> Result<Config, InvalidConfig> {
        let cluster = ClusterConfig::from_toml(CLUSTER, Path::new("cluster.toml")).unwrap();
        let args = [&["nbd-lb"], flags].concat();
        Config::new(cluster, Args::try_parse_from(args).unwrap())
    }

    #[test]
    fn the_flags_are_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_would_be_used_is_printed() {
        let config = config(&["--name=lb-1", "--nbd=127.0.0.1:7", "--http=[::1]:8"]).unwrap();
        let text = config.to_string();
        for line in [
            "name = \"demo\"",
            "name                 lb-1\n",
            "NBD                  127.0.0.1:7\n",
            "[::1]:8",
            "replay",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(self::config(&["--mode=splice"]).unwrap().to_string().contains("splice"));
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let error = |flags: &[&str]| config(flags).unwrap_err().to_string();
        let same = error(&["--nbd=127.0.0.1:7", "--http=127.0.0.1:7"]);
        assert_eq!(same, "--nbd and --http are both 127.0.0.1:7: give them different addresses");
        assert!(config(&["--nbd=127.0.0.1:0", "--http=127.0.0.1:0"]).is_ok(), "two free ports");
        let unnamed = error(&["--name="]);
        assert!(unnamed.starts_with("--name has 0 bytes"), "{unnamed}");
        assert!(!config(&[]).unwrap().name.is_empty(), "the host's name");
        let long = format!("--name={}", "x".repeat(256));
        assert!(error(&[&long]).contains("allowed are 1 to 255 bytes"));
        let small = error(&["--request-bytes-max=1MiB"]);
        assert_eq!(small, "--request-bytes-max is 1MiB: allowed is 64MiB to below 4GiB");
        let long = error(&["--shutdown-deadline=2h"]);
        assert_eq!(long, "--shutdown-deadline is 2h: allowed is at most 1h");
        let long = error(&["--drain-deadline=25h"]);
        assert_eq!(long, "--drain-deadline is 25h: allowed is at most 24h");
        assert!(Args::try_parse_from(["nbd-lb", "--mode=fast"]).is_err());
        assert!(Args::try_parse_from(["nbd-lb", "--nbd=somewhere"]).is_err());
    }
}
