//! Settings: parsed, checked and frozen before any socket opens.

use std::fmt;
use std::time::Duration;

use nbd_service::{HostPort, HumanDuration, LogFormat};

use crate::limits::BACKENDS_MAX;

/// Flags of `nbdctl balance`. Each can also be given by the environment variable named.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The load balancers to give clients to, as HOST:PORT, separated by commas.
    #[arg(
        long,
        env = "NBD_BALANCE_BACKENDS",
        value_name = "ADDR,...",
        value_delimiter = ',',
        required = true
    )]
    pub backends: Vec<HostPort>,

    /// Where NBD clients attach.
    #[arg(long, env = "NBD_BALANCE_NBD", default_value = "0.0.0.0:10809", value_name = "ADDR")]
    pub nbd: HostPort,

    /// Where health and metrics are served.
    #[arg(long, env = "NBD_BALANCE_HTTP", default_value = "0.0.0.0:8080", value_name = "ADDR")]
    pub http: HostPort,

    /// Connections carried at the same time; each takes two sockets. Minimum 1.
    #[arg(long, env = "NBD_BALANCE_CONNECTIONS_MAX", default_value_t = 4096, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,

    /// How long clients are served on after SIGTERM. From 0s to 24h.
    #[arg(long, env = "NBD_BALANCE_DRAIN_DEADLINE", default_value = "15s", value_name = "TIME")]
    pub drain_deadline: HumanDuration,

    /// Log lines as text or as JSON.
    #[arg(long, env = "NBD_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: LogFormat,

    /// Check the configuration, print what would be used, and exit.
    #[arg(long)]
    pub check_config: bool,
}

/// Longest that clients may be served on by a process that is to stop.
const DRAIN_DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) backends: Vec<HostPort>,
    pub(crate) nbd: HostPort,
    pub(crate) http: HostPort,
    pub(crate) connections_max: u32,
    pub(crate) drain_deadline: Duration,
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// None, or too many.
    #[error("--backends names {0} load balancers: allowed are 1 to {BACKENDS_MAX}")]
    Backends(usize),
    /// One that would count as two.
    #[error("--backends names {0} twice")]
    Repeated(HostPort),
    /// Nobody can be reached there.
    #[error("--backends names {0}: port 0 is no port to connect to")]
    NoPort(HostPort),
    /// One address for two listeners.
    #[error("--nbd and --http are both {0}: give them different addresses")]
    SameAddress(HostPort),
    /// A time out of its range.
    #[error("--drain-deadline is {0}: allowed is at most 24h")]
    DrainDeadline(HumanDuration),
}

impl Config {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn new(args: Args) -> Result<Self, InvalidConfig> {
        let Args { backends, nbd, http, connections_max, drain_deadline, .. } = args;
        if !(1..=BACKENDS_MAX).contains(&backends.len()) {
            return Err(InvalidConfig::Backends(backends.len()));
        }
        for (place, backend) in backends.iter().enumerate() {
            if backend.port() == 0 {
                return Err(InvalidConfig::NoPort(backend.clone()));
            }
            if backends[..place].contains(backend) {
                return Err(InvalidConfig::Repeated(backend.clone()));
            }
        }
        if nbd == http && nbd.port() != 0 {
            return Err(InvalidConfig::SameAddress(nbd));
        }
        if drain_deadline.get() > DRAIN_DEADLINE_MAX {
            return Err(InvalidConfig::DrainDeadline(drain_deadline));
        }
        let drain_deadline = drain_deadline.get();
        Ok(Self { backends, nbd, http, connections_max, drain_deadline })
    }
}

/// What would be used, for people.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backends, nbd, http, connections_max, drain_deadline } = self;
        for backend in backends {
            writeln!(f, "backend              {backend}")?;
        }
        writeln!(f, "NBD                  {nbd}")?;
        writeln!(f, "HTTP                 {http}")?;
        writeln!(f, "connections-max      {connections_max}")?;
        writeln!(f, "drain-deadline       {}", HumanDuration::new(*drain_deadline))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn config(flags: &[&str]) -> Result<Config, InvalidConfig> {
        let flags = [&["balance"], flags].concat();
        Config::new(Command::try_parse_from(flags).unwrap().args)
    }

    #[test]
    fn what_would_be_used_is_printed() {
        let config = config(&["--backends=lb-1:10809,[::1]:7", "--nbd=127.0.0.1:0"]).unwrap();
        let text = config.to_string();
        for line in ["lb-1:10809\n", "[::1]:7\n", "127.0.0.1:0\n", "0.0.0.0:8080\n", "15s\n"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let error = |flags: &[&str]| config(flags).unwrap_err().to_string();
        assert_eq!(error(&["--backends=a:1,b:1,a:1"]), "--backends names a:1 twice");
        assert!(error(&["--backends=a:0"]).contains("port 0"));
        let same = error(&["--backends=a:1", "--nbd=127.0.0.1:7", "--http=127.0.0.1:7"]);
        assert_eq!(same, "--nbd and --http are both 127.0.0.1:7: give them different addresses");
        let long = error(&["--backends=a:1", "--drain-deadline=25h"]);
        assert_eq!(long, "--drain-deadline is 25h: allowed is at most 24h");
        assert!(Command::try_parse_from(["balance"]).is_err(), "somebody to give clients to");
        assert!(Command::try_parse_from(["balance", "--backends=somewhere"]).is_err());
    }
}
