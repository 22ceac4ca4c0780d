//! What is done to a container, and undone.

use std::fmt;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};

use crate::bounded;
use crate::cluster::Cluster;
use crate::engine::{Container, docker, exit_codes};

/// Time for one change of a container's network.
const TOOL_MAX: Duration = Duration::from_secs(20);

/// Seconds that a process has to stop, as the longest `stop_grace_period` of compose.yaml.
const STOP_SECONDS_MAX: &str = "30";

/// A fault of one container, or of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `docker kill`, and a start: the restart policy does not act.
    Kill,
    /// SIGTERM, and a start.
    Restart,
    /// `docker pause` and `docker unpause`.
    Pause,
    /// Out of the network of replicas, and back.
    Disconnect,
    /// Nothing that it sends arrives at the others of its shard.
    Unheard,
    /// Nothing that the others of its shard send arrives.
    Deaf,
    /// SIGKILL to its process from outside of Docker, as a crash: the restart policy starts it.
    Crash,
}

impl Fault {
    /// Whether it takes more than Docker: see [`Inside`].
    pub(crate) const fn needs_inside(self) -> bool {
        matches!(self, Self::Unheard | Self::Deaf | Self::Crash)
    }

    /// Whether the process is another one afterwards.
    pub(crate) const fn ends_process(self) -> bool {
        matches!(self, Self::Kill | Self::Restart | Self::Crash)
    }

    /// Whether something has to be done for it to end.
    pub(crate) const fn lasts(self) -> bool {
        !matches!(self, Self::Restart | Self::Crash)
    }

    /// Begins.
    ///
    /// # Errors
    /// It cannot be done.
    pub(crate) fn begin(
        self,
        cluster: &Cluster,
        inside: Option<&Inside>,
        service: &str,
        others: &[&str],
    ) -> anyhow::Result<()> {
        match self {
            Self::Kill => cluster.act("kill", service),
            Self::Restart => restart(&cluster.container(service)?),
            Self::Pause => cluster.act("pause", service),
            Self::Disconnect => {
                let container = cluster.container(service)?;
                docker(&["network", "disconnect", &cluster.network(BACK), &container.id]).map(drop)
            }
            Self::Crash => inside.context(NEEDS_INSIDE)?.crash(&cluster.container(service)?),
            Self::Unheard | Self::Deaf => {
                self.change_drops(cluster, inside, "--insert", service, others)
            }
        }
    }

    /// Ends what does not end by itself.
    ///
    /// # Errors
    /// It cannot be done.
    pub(crate) fn end(
        self,
        cluster: &Cluster,
        inside: Option<&Inside>,
        service: &str,
        others: &[&str],
    ) -> anyhow::Result<()> {
        match self {
            Self::Kill => cluster.act("start", service),
            Self::Pause => cluster.act("unpause", service),
            Self::Disconnect => {
                let (container, network) = (cluster.container(service)?, cluster.network(BACK));
                // Docker does not remember by what names it was known there.
                docker(&["network", "connect", "--alias", service, &network, &container.id])
                    .map(drop)
            }
            Self::Unheard | Self::Deaf => {
                self.change_drops(cluster, inside, "--delete", service, others)
            }
            Self::Restart | Self::Crash => Ok(()),
        }
    }

    fn change_drops(
        self,
        cluster: &Cluster,
        inside: Option<&Inside>,
        change: &str,
        service: &str,
        others: &[&str],
    ) -> anyhow::Result<()> {
        let (container, inside) = (cluster.container(service)?, inside.context(NEEDS_INSIDE)?);
        for other in others {
            let other = cluster.container(other)?;
            let address = other.address_in(BACK).context("a replica has no address")?;
            let (chain, end) = match self {
                Self::Deaf => ("INPUT", "--source"),
                _ => ("OUTPUT", "--destination"),
            };
            inside.change_drop(&container, change, chain, end, address)?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Restart => "SIGTERM and start",
            Self::Pause => "pause",
            Self::Disconnect => "cut off from the network",
            Self::Unheard => "not heard by the others",
            Self::Deaf => "hears nothing from the others",
            Self::Crash => "crash",
        })
    }
}

/// Has a container's process stop in good order, and starts it again.
fn restart(container: &Container) -> anyhow::Result<()> {
    let since = SystemTime::now();
    docker(&["restart", "--time", STOP_SECONDS_MAX, &container.id])?;
    let codes = exit_codes(container, since)?;
    if codes != [0] {
        bail!("{} ended with {codes:?} after SIGTERM", container.service);
    }
    Ok(())
}

/// The network of the compose file in which replicas hear each other.
const BACK: &str = "back";

const NEEDS_INSIDE: &str = "needs a way into the container";

/// A way to do, from this machine, what goes past Docker: packets dropped in a container's network,
/// a signal to its process.
#[derive(Debug)]
pub(crate) struct Inside {
    /// What goes before each command.
    prefix: &'static [&'static str],
}

impl Inside {
    /// As root, or by sudo where that asks for no password.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub(crate) fn find(container: &Container) -> Result<Self, String> {
        let prefixes: [&[&str]; 2] = [&[], &["sudo", "--non-interactive"]];
        let ways = prefixes.into_iter().map(|prefix| Self { prefix });
        let mut last = String::new();
        for way in ways {
            let words = ["iptables", "--wait", "--list-rules"];
            match way.enter(container, &words) {
                Ok(()) => return Ok(way),
                Err(error) => last = format!("{error:#}"),
            }
        }
        Err(format!("needs root, nsenter and iptables: {last}"))
    }

    fn run(&self, words: &[&str]) -> anyhow::Result<()> {
        let words = [self.prefix, words].concat();
        bounded::output(Command::new(words[0]).args(&words[1..]), TOOL_MAX).map(drop)
    }

    /// Runs a program of this machine in the network of a container.
    fn enter(&self, container: &Container, words: &[&str]) -> anyhow::Result<()> {
        let pid = container.pid.to_string();
        self.run(&[&["nsenter", "--target", &pid, "--net", "--"], words].concat())
    }

    fn change_drop(
        &self,
        container: &Container,
        change: &str,
        chain: &str,
        end: &str,
        address: Ipv4Addr,
    ) -> anyhow::Result<()> {
        let address = address.to_string();
        let rule = ["iptables", "--wait", change, chain, end, &address, "--jump", "DROP"];
        self.enter(container, &rule)
    }

    fn crash(&self, container: &Container) -> anyhow::Result<()> {
        self.run(&["kill", "-KILL", &container.pid.to_string()])
    }
}
