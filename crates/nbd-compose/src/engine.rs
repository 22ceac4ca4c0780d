//! The Docker engine and compose, by their command lines.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::Value;

use crate::bounded;

/// Time for one command of Docker. Far above what any takes here, on a loaded machine too.
const DOCKER_MAX: Duration = Duration::from_secs(60);

/// Time in which an engine that is there answers.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// The compose commands there are, in the order in which they are tried.
const COMPOSE: [&[&str]; 2] = [&["docker", "compose"], &["docker-compose"]];

/// The label by which compose marks what belongs to a project.
pub(crate) const PROJECT_LABEL: &str = "com.docker.compose.project";

/// The same for a container's service.
const SERVICE_LABEL: &str = "com.docker.compose.service";

/// An engine that answers, and how compose is called.
#[derive(Debug)]
pub(crate) struct Engine {
    compose: &'static [&'static str],
    /// What both call themselves, for people.
    pub(crate) versions: String,
}

impl Engine {
    /// The machine's engine.
    ///
    /// # Errors
    /// Why there is none that can be used here, in a few words.
    pub(crate) fn find() -> Result<Self, String> {
        let asked = |words: &[&str]| {
            let mut command = command_of(words);
            bounded::output(&mut command, ANSWER_MAX).ok().map(|said| said.trim().to_owned())
        };
        let server =
            asked(&["docker", "version", "--format", "{{.Server.Version}} {{.Server.Os}}"]);
        let server = server.ok_or("needs a Docker engine that answers")?;
        if !server.ends_with(" linux") {
            return Err("needs a Docker engine that runs Linux containers".to_owned());
        }
        let mut found = COMPOSE.into_iter().filter_map(|compose| {
            Some((compose, asked(&[compose, &["version", "--short"]].concat())?))
        });
        let (compose, version) =
            found.next().ok_or("needs docker compose, or docker-compose 1.29 or newer")?;
        let versions = format!("Docker {server}, compose {version}");
        Ok(Self { compose, versions })
    }

    /// One that is not there, for tests that call nothing.
    #[cfg(test)]
    pub(crate) fn stand_in() -> Self {
        Self { compose: COMPOSE[1], versions: String::new() }
    }

    /// A call of compose.
    pub(crate) fn compose(&self) -> Command {
        command_of(self.compose)
    }
}

fn command_of(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}

/// Runs a command of Docker and gives what it says.
///
/// # Errors
/// It fails, or is not done within [`DOCKER_MAX`].
pub(crate) fn docker(words: &[&str]) -> anyhow::Result<String> {
    bounded::output(Command::new("docker").args(words), DOCKER_MAX)
}

/// The ids that a listing (`ps --all`, `network ls`, `volume ls`) has for a project.
///
/// # Errors
/// As [`docker`].
pub(crate) fn ids(listing: &[&str], project: &str) -> anyhow::Result<Vec<String>> {
    let filter = format!("label={PROJECT_LABEL}={project}");
    let listed = docker(&[listing, &["--quiet", "--filter", &filter]].concat())?;
    Ok(listed.split_whitespace().map(str::to_owned).collect())
}

/// A container, as it was when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// Its service in the compose file.
    pub(crate) service: String,
    /// `running`, `paused`, `restarting`, `exited` and so on.
    pub(crate) status: String,
    /// `healthy`, `unhealthy`, `starting`; empty if it has no health check.
    pub(crate) health: String,
    /// Of its first process; 0 while it does not run.
    pub(crate) pid: u64,
    /// Of its last run; 0 while it runs.
    pub(crate) exit_code: i64,
    /// How often the restart policy has started it again.
    pub(crate) restarts: u64,
    /// When it was last started.
    pub(crate) started: String,
    /// Its networks, and its address in each.
    pub(crate) networks: Vec<(String, Option<Ipv4Addr>)>,
}

impl Container {
    /// All containers of a project.
    ///
    /// # Errors
    /// As [`docker`]; an answer of another form.
    pub(crate) fn of_project(project: &str) -> anyhow::Result<Vec<Self>> {
        let ids = ids(&["ps", "--all"], project)?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let words: Vec<&str> =
            ["inspect"].into_iter().chain(ids.iter().map(String::as_str)).collect();
        Self::parse_all(&docker(&words)?)
    }

    /// Reads the answer of `docker inspect`.
    fn parse_all(answer: &str) -> anyhow::Result<Vec<Self>> {
        let answer: Value = serde_json::from_str(answer).context("docker inspect")?;
        let list = answer.as_array().context("docker inspect gives no list")?;
        let parse = |value| Self::parse(value).with_context(|| format!("docker inspect: {value}"));
        list.iter().map(parse).collect()
    }

    fn parse(value: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let state = &value["State"];
        let networks = value["NetworkSettings"]["Networks"].as_object()?;
        let address = |network: &Value| network["IPAddress"].as_str()?.parse().ok();
        Some(Self {
            id: text(&value["Id"])?,
            service: text(&value["Config"]["Labels"][SERVICE_LABEL])?,
            status: text(&state["Status"])?,
            health: text(&state["Health"]["Status"]).unwrap_or_default(),
            pid: state["Pid"].as_u64()?,
            exit_code: state["ExitCode"].as_i64()?,
            restarts: value["RestartCount"].as_u64()?,
            started: text(&state["StartedAt"])?,
            networks: networks.iter().map(|(name, at)| (name.clone(), address(at))).collect(),
        })
    }

    /// What its process has written, over all its runs; `which` are flags of `docker logs`.
    ///
    /// # Errors
    /// Docker fails.
    pub(crate) fn log(&self, which: &[&str]) -> anyhow::Result<String> {
        let mut logs = Command::new("docker");
        logs.arg("logs").args(which).arg(&self.id);
        let ended = bounded::run(&mut logs, DOCKER_MAX)?;
        Ok(ended.stdout + &ended.stderr)
    }

    /// Its address in the network whose name in the compose file is this.
    pub(crate) fn address_in(&self, network: &str) -> Option<Ipv4Addr> {
        let end = format!("_{network}");
        self.networks.iter().find(|(name, _)| name.ends_with(&end))?.1
    }
}

/// The exit codes with which a container's process has ended since a moment.
///
/// # Errors
/// As [`docker`].
pub(crate) fn exit_codes(container: &Container, since: SystemTime) -> anyhow::Result<Vec<i64>> {
    let filter = format!("container={}", container.id);
    // A moment told as an age, such as `0s`, is rounded down to a second, and what happened since
    // is left out.
    let (since, until) = (timestamp(since), timestamp(SystemTime::now()));
    let events = ["events", "--since", &since, "--until", &until, "--filter", &filter];
    let of_ends = ["--filter", "event=die", "--format", "{{.Actor.Attributes.exitCode}}"];
    let listed = docker(&[&events[..], &of_ends].concat())?;
    let codes = listed.split_whitespace().map(str::parse).collect::<Result<_, _>>();
    codes.with_context(|| format!("exit codes: {listed:?}"))
}

/// Seconds since 1970, to the nanosecond, as Docker reads them.
fn timestamp(moment: SystemTime) -> String {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}", since.as_secs(), since.subsec_nanos())
}

/// The address of this machine at which containers reach it.
///
/// # Errors
/// As [`docker`]; the engine's bridge has no IPv4 network.
pub(crate) fn host_address() -> anyhow::Result<Ipv4Addr> {
    let answer: Value = serde_json::from_str(&docker(&["network", "inspect", "bridge"])?)?;
    gateway(&answer).context("the network `bridge` of the engine has no IPv4 address")
}

/// The gateway of the first IPv4 subnet of a network. An engine that was not told which takes the
/// subnet's first address, and does not always list it.
fn gateway(answer: &Value) -> Option<Ipv4Addr> {
    let subnets = answer[0]["IPAM"]["Config"].as_array()?;
    subnets.iter().find_map(|subnet| {
        let told = subnet["Gateway"].as_str().and_then(|address| address.parse().ok());
        told.or_else(|| {
            let (network, _) = subnet["Subnet"].as_str()?.split_once('/')?;
            let network: Ipv4Addr = network.parse().ok()?;
            Some(Ipv4Addr::from(u32::from(network) + 1))
        })
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn containers_are_read_from_what_docker_says() {
        let answer = json!([{
            "Id": "0a1b", "RestartCount": 2,
            "Config": {"Labels": {"com.docker.compose.service": "nbd-lb-1"}},
            "State": {"Status": "running", "Running": true, "Pid": 4711, "ExitCode": 0,
                "StartedAt": "2026-01-01T00:00:00Z", "Health": {"Status": "healthy", "Log": []}},
            "NetworkSettings": {"Networks": {
                "p_back": {"IPAddress": "172.19.0.4"}, "p_front": {"IPAddress": ""}}},
        }]);
        let found = Container::parse_all(&answer.to_string()).unwrap();
        let [container] = &found[..] else { panic!("{found:?}") };
        assert_eq!((container.service.as_str(), container.pid), ("nbd-lb-1", 4711));
        assert_eq!((container.health.as_str(), container.restarts), ("healthy", 2));
        assert_eq!(container.address_in("back"), Some(Ipv4Addr::new(172, 19, 0, 4)));
        assert_eq!(container.address_in("front"), None, "not connected at present");
        assert!(Container::parse_all(r#"[{"Id": "x"}]"#).is_err());
    }

    #[test]
    fn moments_are_told_to_the_nanosecond() {
        let moment = UNIX_EPOCH + Duration::new(1_795_761_873, 7_000_009);
        assert_eq!(timestamp(moment), "1795761873.007000009");
    }

    #[test]
    fn the_gateway_is_told_or_the_first_address() {
        let with = |config: Value| gateway(&json!([{"IPAM": {"Config": [config]}}]));
        let first = Some(Ipv4Addr::new(172, 17, 0, 1));
        assert_eq!(with(json!({"Subnet": "172.17.0.0/16"})), first);
        assert_eq!(with(json!({"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"})), first);
        let other = Some(Ipv4Addr::new(10, 0, 0, 254));
        assert_eq!(with(json!({"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.254"})), other);
        assert_eq!(with(json!({"Subnet": "fd00::/64"})), None);
    }
}
