//! The cluster of the shipped compose file, as one project of its own: names, ports, looks at it.

use std::fmt::Write as _;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nbd_testkit::http::{self, Response};
use nbd_testkit::{Health, NbdClient, Target, free_port};

use crate::bounded;
use crate::engine::{Container, Engine, docker};
use crate::waiting::wait_for;

/// The shipped files that are used, and nothing else: what cannot be had without a registry is left
/// out by the second.
const FILES: [&str; 2] = ["compose.yaml", "deploy/compose.offline.yaml"];

/// What a replica waits for before it ends itself: the least there is.
pub(crate) const ISOLATION_EXIT: Duration = Duration::from_secs(5);

/// The one address in front of the load balancers.
pub(crate) const FRONT: &str = "nbd";

/// The control API.
pub(crate) const CONTROL: &str = "nbd-control";

/// The load balancers.
pub(crate) const BALANCERS: [&str; 3] = ["nbd-lb-1", "nbd-lb-2", "nbd-lb-3"];

/// The replicas of each shard.
pub(crate) const REPLICAS: [[&str; 3]; 2] =
    [["nbd-1-1", "nbd-1-2", "nbd-1-3"], ["nbd-2-1", "nbd-2-2", "nbd-2-3"]];

/// Time for a command of compose that starts or stops everything.
const COMPOSE_MAX: Duration = Duration::from_secs(180);

/// Time for an answer of a server that may stand still; above the deadline of `/health`.
const LOOK_MAX: Duration = Duration::from_secs(4);

/// Lines of each container's log that are shown after a failure.
const TAIL_LINES: &str = "80";

/// Variables that the user's shell may have for a cluster of their own.
const FOREIGN: [&str; 8] =
    ["NBD_", "OTEL_", "JAEGER_", "PROMETHEUS_", "GRAFANA_", "CINDERBLOCK_", "COMPOSE_", "RUST_LOG"];

/// All services that are ours.
pub(crate) fn services() -> impl Iterator<Item = &'static str> {
    let replicas = REPLICAS.into_iter().flatten();
    [FRONT, CONTROL].into_iter().chain(BALANCERS).chain(replicas)
}

/// The variable of compose.yaml that says where a service's HTTP is published.
fn http_variable(service: &str) -> String {
    match service {
        CONTROL => "NBD_CONTROL_PORT".to_owned(),
        _ => format!("{}_HTTP_PORT", service.replace('-', "_").to_uppercase()),
    }
}

/// The same for NBD.
fn nbd_variable(service: &str) -> String {
    format!("{}_PORT", service.replace('-', "_").to_uppercase())
}

/// A project of compose.
#[derive(Debug)]
pub(crate) struct Cluster {
    engine: Engine,
    root: PathBuf,
    project: String,
    /// Variables of compose.yaml.
    environment: Vec<(String, String)>,
    /// Where each service's HTTP is published, on 127.0.0.1.
    http: Vec<(&'static str, u16)>,
    /// The same for NBD.
    nbd: Vec<(&'static str, Target, u16)>,
}

impl Cluster {
    /// The project of this name, of which nothing runs yet; its spans go to `collector`.
    pub(crate) fn new(
        engine: Engine,
        root: PathBuf,
        project: &str,
        image: &str,
        collector: &str,
    ) -> Self {
        let mut environment = vec![
            ("CINDERBLOCK_IMAGE".to_owned(), image.to_owned()),
            ("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), collector.to_owned()),
            ("NBD_ISOLATION_EXIT".to_owned(), format!("{}s", ISOLATION_EXIT.as_secs())),
        ];
        let mut published = |variable| {
            let port = free_port();
            environment.push((variable, port.to_string()));
            port
        };
        let http = services().map(|service| (service, published(http_variable(service))));
        let http = http.collect();
        let nbd = [FRONT].into_iter().chain(BALANCERS).map(|service| {
            let port = published(nbd_variable(service));
            (service, Target::lasting(service, port), port)
        });
        let nbd = nbd.collect();
        Self { engine, root, project: project.to_owned(), environment, http, nbd }
    }

    /// A call of compose for this project.
    fn compose(&self, words: &[&str]) -> anyhow::Result<String> {
        let mut command: Command = self.engine.compose();
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if FOREIGN.iter().any(|foreign| name.starts_with(foreign)) {
                command.env_remove(&*name);
            }
        }
        command.current_dir(&self.root).envs(self.environment.clone());
        command.args(["--project-name", &self.project]);
        for file in FILES {
            command.args(["--file", file]);
        }
        bounded::output(command.args(words), COMPOSE_MAX)
    }

    /// Starts everything, and waits until every health check of Docker's has passed.
    ///
    /// # Errors
    /// Compose fails; something is not healthy in time.
    pub(crate) fn up(&self) -> anyhow::Result<()> {
        self.compose(&["up", "--detach", "--no-build"])?;
        self.wait_healthy()
    }

    /// Stops everything in good order, and holds every process to having ended well.
    ///
    /// # Errors
    /// Compose fails; a process did not end with 0.
    pub(crate) fn stop(&self) -> anyhow::Result<()> {
        self.compose(&["stop"])?;
        let ended_badly: Vec<_> = self
            .containers()?
            .into_iter()
            .filter(|container| container.status != "exited" || container.exit_code != 0)
            .map(|Container { service, status, exit_code, .. }| (service, status, exit_code))
            .collect();
        if !ended_badly.is_empty() {
            bail!("did not stop with exit code 0: {ended_badly:?}");
        }
        Ok(())
    }

    /// Removes containers and networks; volumes too if asked for.
    ///
    /// # Errors
    /// Compose fails.
    pub(crate) fn down(&self, volumes: bool) -> anyhow::Result<()> {
        let words = if volumes { &["down", "--volumes"][..] } else { &["down"] };
        self.compose(words).map(drop)
    }

    /// Waits until every health check of Docker's has passed.
    ///
    /// # Errors
    /// One has not in time.
    pub(crate) fn wait_healthy(&self) -> anyhow::Result<()> {
        wait_for("all containers to be healthy", || {
            let containers = self.containers()?;
            let ill = containers.iter().filter(|container| container.health != "healthy");
            let ill: Vec<_> = ill.map(|it| (&it.service, &it.status, &it.health)).collect();
            if containers.len() == services().count() && ill.is_empty() {
                return Ok(());
            }
            bail!("{} containers, of which these are not: {ill:?}", containers.len())
        })
    }

    /// Waits until every service answers that it is well, and every replica takes part in its
    /// shard. Gives the time that took.
    ///
    /// # Errors
    /// Not in time.
    pub(crate) fn wait_well(&self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        wait_for("all services to be well", || {
            for service in services() {
                let answer = self.get(service, "/health").with_context(|| service.to_owned())?;
                if answer.status != 200 {
                    bail!("{service} answers {}: {}", answer.status, answer.body);
                }
            }
            for replica in REPLICAS.iter().flatten() {
                let role = self.role(replica)?;
                if role != "leader" && role != "follower" {
                    bail!("{replica} is a {role}");
                }
            }
            Ok(())
        })?;
        Ok(started.elapsed())
    }

    /// What a replica is in its shard.
    ///
    /// # Errors
    /// It does not say.
    pub(crate) fn role(&self, replica: &str) -> anyhow::Result<String> {
        let answer = self.get(replica, "/health").with_context(|| replica.to_owned())?;
        let health = Health::parse(answer.status, &answer.json());
        let shard = health.and_then(|health| health.shards.into_iter().next());
        Ok(shard.with_context(|| format!("{replica} has no shard: {answer:?}"))?.role)
    }

    /// The service that leads a shard, and the two that follow, in order of their names.
    ///
    /// # Errors
    /// Nobody leads for as long as everything may take.
    pub(crate) fn roles(&self, shard: usize) -> anyhow::Result<(&'static str, [&'static str; 2])> {
        wait_for("a leader", || {
            let leads = |replica: &&&str| self.role(replica).is_ok_and(|role| role == "leader");
            let leader = REPLICAS[shard].iter().find(leads).context("nobody says that it leads")?;
            let mut others = REPLICAS[shard].into_iter().filter(|other| other != leader);
            let both = [others.next(), others.next()].map(Option::unwrap_or_default);
            Ok((*leader, both))
        })
    }

    /// Waits until the stores of all replicas of each shard are equal. Gives the time that took.
    ///
    /// # Errors
    /// They are not in time.
    pub(crate) fn wait_equal(&self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        wait_for("all replicas of a shard to be equal", || {
            for replicas in REPLICAS {
                let digest = |replica| anyhow::Ok(self.get(replica, "/debug/digest")?.body);
                let digests: Vec<_> = replicas.into_iter().map(digest).collect::<Result<_, _>>()?;
                let shards = |body: &String| {
                    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
                    nbd_testkit::ShardDigest::parse_all(&body).filter(|all| !all.is_empty())
                };
                let first = shards(&digests[0]).context("no digest")?;
                if !digests.iter().all(|other| shards(other).as_ref() == Some(&first)) {
                    bail!("{digests:?}");
                }
            }
            Ok(())
        })?;
        Ok(started.elapsed())
    }

    /// Every container of the project.
    ///
    /// # Errors
    /// Docker fails.
    pub(crate) fn containers(&self) -> anyhow::Result<Vec<Container>> {
        Container::of_project(&self.project)
    }

    /// The container of a service.
    ///
    /// # Errors
    /// There is none; Docker fails.
    pub(crate) fn container(&self, service: &str) -> anyhow::Result<Container> {
        let mut containers = self.containers()?.into_iter();
        let found = containers.find(|container| container.service == service);
        found.with_context(|| format!("{service} has no container"))
    }

    /// The name that a network of the compose file has here.
    pub(crate) fn network(&self, name: &str) -> String {
        format!("{}_{name}", self.project)
    }

    /// Gets a page from where a service is published.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) fn get(&self, service: &str, path: &str) -> io::Result<Response> {
        http::get_within(LOOK_MAX, self.http_address(service), path)
    }

    /// Where a service's HTTP is published.
    ///
    /// # Panics
    /// If it has none.
    pub(crate) fn http_address(&self, service: &str) -> (Ipv4Addr, u16) {
        let found = self.http.iter().find(|(of, _)| *of == service);
        (Ipv4Addr::LOCALHOST, found.unwrap_or_else(|| panic!("{service} has no HTTP")).1)
    }

    /// How a load finds what is published for NBD clients.
    ///
    /// # Panics
    /// If the service is not.
    pub(crate) fn target(&self, service: &str) -> &Target {
        let found = self.nbd.iter().find(|(of, ..)| *of == service);
        &found.unwrap_or_else(|| panic!("{service} has no NBD")).1
    }

    /// The URI of a volume at the one published address.
    pub(crate) fn uri(&self, volume: &str) -> String {
        let (host, port) = self.target(FRONT).address();
        format!("nbd://{host}:{port}/{volume}")
    }

    /// A client attached to a volume at the one published address.
    ///
    /// # Errors
    /// It is not served.
    pub(crate) fn attach(&self, volume: &str) -> anyhow::Result<NbdClient> {
        let attached = NbdClient::connect(self.target(FRONT).address(), volume);
        attached.with_context(|| format!("attach to {volume}"))
    }

    /// The end of every container's log, for people.
    pub(crate) fn tails(&self) -> String {
        let mut tails = String::new();
        for container in self.containers().unwrap_or_default() {
            let Container { service, status, health, exit_code, restarts, .. } = &container;
            let state = format!("{status} {health}, exit code {exit_code}, {restarts} restarts");
            let log = container.log(&["--tail", TAIL_LINES]);
            let log = log.unwrap_or_else(|error| format!("{error:#}"));
            let _ = writeln!(tails, "--- {service}: {state}\n{log}");
        }
        tails
    }

    /// Does something to the container of a service: `kill`, `pause`, `start` and so on.
    ///
    /// # Errors
    /// Docker fails.
    pub(crate) fn act(&self, verb: &str, service: &str) -> anyhow::Result<()> {
        docker(&[verb, &self.container(service)?.id]).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    // Goal: a variable that is misspelt here would leave the port at its default, which may be the
    // user's own cluster.
    #[test]
    fn every_variable_is_one_of_compose_yaml() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../compose.yaml");
        let file = std::fs::read_to_string(file).unwrap();
        let cluster = Cluster::new(
            Engine::stand_in(),
            PathBuf::new(),
            "project",
            "image",
            "http://127.0.0.1:4317",
        );
        for (name, _) in &cluster.environment {
            assert!(file.contains(&format!("${{{name}:-")), "{name}");
        }
        let published = file.lines().filter(|line| line.contains("_PORT:-")).count();
        let left_out = ["JAEGER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"].len();
        assert_eq!(cluster.http.len() + cluster.nbd.len(), published - left_out);
    }
}
