//! Settings of one control API: parsed, checked and frozen before any socket opens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use nbd_service::trace::{self, InvalidTrace};
use nbd_service::{ByteSize, ClusterConfig, HostPort, HumanDuration, LogFormat};
use nbd_store::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_SIZE_MULTIPLE};

use crate::TokenFileError;
use crate::tokens::Tokens;

/// Where HTTP is served while no token is asked for: for this machine only.
const HTTP_OPEN: &str = "127.0.0.1:8080";

/// The same with tokens.
const HTTP_GUARDED: &str = "0.0.0.0:8080";

/// Command line of `nbd-control`. Each flag can also be given by the environment variable named.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "nbd-control",
    version,
    about = "The control API: volumes and the cluster, as JSON over HTTP",
    long_about = "The control API: volumes, sessions, shards and nodes of a cluster, as JSON over \
                  HTTP. It keeps nothing: any number of them may run. What it serves is described \
                  at /openapi.json, for people at /docs."
)]
pub struct Args {
    /// The cluster file. Without it the cluster is taken from NBD_SHARDS.
    #[arg(long, env = "NBD_CLUSTER_FILE", value_name = "FILE")]
    pub cluster: Option<PathBuf>,

    /// Where the API is served. Default: 127.0.0.1:8080, for this machine only; with --token-file
    /// 0.0.0.0:8080.
    #[arg(long, env = "NBD_CONTROL_HTTP", value_name = "ADDR")]
    pub http: Option<HostPort>,

    /// File of those who may use the API, a line for each: `reader:NAME:TOKEN` or
    /// `admin:NAME:TOKEN`. It is read again when it changes. Without it, everybody who reaches the
    /// API may do everything.
    #[arg(long, env = "NBD_CONTROL_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// A host name by which clients may ask while no token is asked for; may be given several
    /// times. Addresses and localhost always may. Others are refused: a page of another site could
    /// have its name point here.
    #[arg(
        long = "allowed-host",
        env = "NBD_CONTROL_ALLOWED_HOSTS",
        value_name = "NAME",
        value_delimiter = ','
    )]
    pub allowed_hosts: Vec<HostName>,

    /// How long a shard is waited for before the answer is 503. From 100ms to 20s.
    #[arg(long, env = "NBD_CONTROL_DEADLINE", default_value = "5s", value_name = "TIME")]
    pub deadline: HumanDuration,

    /// Where people see traces: the address of Jaeger's user interface, as in
    /// http://localhost:16686. With it, who asks for traces of a volume is told where they are.
    #[arg(long, env = "NBD_JAEGER_UI", value_name = "URL")]
    pub jaeger_ui: Option<String>,

    /// How long a process that stops waits for answers under way. From 0s to 1h.
    #[arg(long, env = "NBD_SHUTDOWN_DEADLINE", default_value = "10s", value_name = "TIME")]
    pub shutdown_deadline: HumanDuration,

    /// Log lines as text or as JSON.
    #[arg(long, env = "NBD_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: LogFormat,

    /// Check the configuration, print what would be used, and exit.
    #[arg(long)]
    pub check_config: bool,
}

/// A host name as it stands in `Host`, without a port. Case does not matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostName(String);

/// A text that is no host name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is no host name: 1 to 253 characters of A-Z a-z 0-9 . _ -, and no port")]
pub struct InvalidHostName;

impl HostName {
    pub(crate) fn is(&self, name: &str) -> bool {
        self.0.eq_ignore_ascii_case(name)
    }
}

impl FromStr for HostName {
    type Err = InvalidHostName;

    fn from_str(text: &str) -> Result<Self, InvalidHostName> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_name = (1..=253).contains(&text.len()) && text.bytes().all(allowed);
        if is_name { Ok(Self(text.to_owned())) } else { Err(InvalidHostName) }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What `--deadline` may be: below the silence at which connections are closed, with time left for
/// the answer.
const DEADLINE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(20);

/// Longest that a stopping process may be told to wait.
const SHUTDOWN_DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// Checked settings of one control API.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) cluster: ClusterConfig,
    pub(crate) http: HostPort,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) allowed_hosts: Vec<HostName>,
    pub(crate) deadline: Duration,
    pub(crate) shutdown_deadline: Duration,
    /// Without a slash at its end.
    pub(crate) jaeger_ui: Option<String>,
    pub(crate) trace: trace::Settings,
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
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
    /// An address that no browser can go to.
    #[error("--jaeger-ui is {0:?}: allowed is http://HOST or https://HOST, with a port or a path")]
    JaegerUi(String),
    /// A setting of traces that makes no sense.
    #[error(transparent)]
    Trace(#[from] InvalidTrace),
    /// A size that no volume can have.
    #[error(
        "the cluster's default_size is {0}: allowed is a multiple of 512 bytes from 4KiB to 64TiB"
    )]
    DefaultSize(ByteSize),
}

impl Config {
    /// Checks the settings. Where `args` say the cluster is has been looked at already: `cluster`
    /// is what was found.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(cluster: ClusterConfig, args: Args) -> Result<Self, InvalidConfig> {
        let Args { http, token_file, allowed_hosts, deadline, shutdown_deadline, .. } = args;
        let jaeger_ui = args.jaeger_ui.filter(|url| !url.is_empty()).map(page).transpose()?;
        if !DEADLINE.contains(&deadline.get()) {
            let (name, allowed) = ("--deadline", "100ms to 20s");
            return Err(InvalidConfig::TimeOutOfRange { name, value: deadline, allowed });
        }
        if shutdown_deadline.get() > SHUTDOWN_DEADLINE_MAX {
            let (name, value) = ("--shutdown-deadline", shutdown_deadline);
            return Err(InvalidConfig::TimeOutOfRange { name, value, allowed: "at most 1h" });
        }
        let size = cluster.volumes().default_size;
        if !is_volume_size(size.bytes()) {
            return Err(InvalidConfig::DefaultSize(size));
        }
        let http = http.unwrap_or_else(|| {
            let default = if token_file.is_some() { HTTP_GUARDED } else { HTTP_OPEN };
            default.parse().unwrap_or_else(|_| unreachable!("{default} is an address"))
        });
        let (deadline, shutdown_deadline) = (deadline.get(), shutdown_deadline.get());
        let trace = trace::Settings::from_env()?;
        Ok(Self {
            cluster,
            http,
            token_file,
            allowed_hosts,
            deadline,
            shutdown_deadline,
            jaeger_ui,
            trace,
        })
    }

    /// Checks the token file, for `--check-config`.
    ///
    /// # Errors
    /// See [`TokenFileError`].
    pub fn check_tokens(&self) -> Result<(), TokenFileError> {
        self.token_file.as_deref().map(Tokens::load).transpose().map(|_| ())
    }
}

/// The address of a page, without a slash at its end.
fn page(url: String) -> Result<String, InvalidConfig> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let is_plain = |rest: &str| {
        !rest.starts_with('/')
            && rest.bytes().all(|b| b.is_ascii_graphic() && !b"?#\"<>".contains(&b))
    };
    match rest {
        Some(rest) if !rest.is_empty() && is_plain(rest) => {
            Ok(url.trim_end_matches('/').to_owned())
        }
        _ => Err(InvalidConfig::JaegerUi(url)),
    }
}

/// Whether a volume can have so many bytes.
pub(crate) fn is_volume_size(bytes: u64) -> bool {
    (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&bytes)
        && bytes.is_multiple_of(VOLUME_SIZE_MULTIPLE)
}

/// What would be used, for people: the cluster as a `cluster.toml`, then this process's own
/// settings.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, http, token_file, allowed_hosts, deadline, shutdown_deadline, .. } =
            self;
        let hosts = allowed_hosts.iter().map(HostName::to_string).collect::<Vec<_>>();
        let hosts = if hosts.is_empty() { "none".to_owned() } else { hosts.join(", ") };
        let (jaeger_ui, trace) = (self.jaeger_ui.as_deref().unwrap_or("none"), &self.trace);
        let tokens =
            token_file.as_ref().map_or_else(|| "none".into(), |path| path.to_string_lossy());
        writeln!(f, "# cluster\n{}", cluster.to_toml().trim_end())?;
        writeln!(f, "\n# control API")?;
        writeln!(f, "HTTP                 {http}")?;
        writeln!(f, "token-file           {tokens}")?;
        writeln!(f, "allowed-hosts        {hosts}")?;
        writeln!(f, "traces               {trace}")?;
        writeln!(f, "jaeger-ui            {jaeger_ui}")?;
        writeln!(f, "deadline             {}", HumanDuration::new(*deadline))?;
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
        let args = [&["nbd-control"], flags].concat();
        Config::new(cluster, Args::try_parse_from(args).unwrap())
    }

    #[test]
    fn the_flags_are_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn without_tokens_it_is_for_this_machine_only_unless_told_otherwise() {
        assert_eq!(config(&[]).unwrap().http.to_string(), HTTP_OPEN);
        assert_eq!(config(&["--token-file=x"]).unwrap().http.to_string(), HTTP_GUARDED);
        assert_eq!(config(&["--http=0.0.0.0:1"]).unwrap().http.to_string(), "0.0.0.0:1");
    }

    #[test]
    fn what_would_be_used_is_printed() {
        let flags = ["--http=[::1]:8", "--token-file=/etc/tokens", "--allowed-host=a.b,c"];
        let text = config(&flags).unwrap().to_string();
        for line in [
            "allowed-hosts        a.b, c\n",
            "name = \"demo\"",
            "[::1]:8",
            "/etc/tokens",
            "deadline             5s\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let error = |flags: &[&str]| config(flags).unwrap_err().to_string();
        for url in
            ["localhost:16686", "ftp://a", "http://", "http:///x", "http://a b", "http://a?b"]
        {
            let error = error(&[&format!("--jaeger-ui={url}")]);
            assert!(error.starts_with("--jaeger-ui is"), "{url}: {error}");
        }
        let ui = config(&["--jaeger-ui=https://traces/jaeger/"]).unwrap().jaeger_ui;
        assert_eq!(ui.as_deref(), Some("https://traces/jaeger"));
        assert_eq!(config(&["--jaeger-ui="]).unwrap().jaeger_ui, None);
        assert_eq!(error(&["--deadline=1ms"]), "--deadline is 1ms: allowed is 100ms to 20s");
        for bad in ["--allowed-host=", "--allowed-host=a:1", "--allowed-host=http://a"] {
            assert!(Args::try_parse_from(["nbd-control", bad]).is_err(), "{bad}");
        }
        assert_eq!(
            error(&["--shutdown-deadline=2h"]),
            "--shutdown-deadline is 2h: allowed is at most 1h"
        );
    }
}
