//! A running `nbdctl balance`, and what is behind it.

use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::http::{self, Response};
use nbd_testkit::process::Signal;
use nbd_testkit::{Cluster, NbdClient, ServerProcess, StartedProcess};

/// Time for anything that is awaited; nothing takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(60);

#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < DEADLINE, "still waiting for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// `nbdctl`, with nothing of the tests' own environment.
pub(crate) fn nbdctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// A replica, load balancers, and the balancer in front of them.
pub(crate) struct Stack {
    pub(crate) balance: Balance,
    pub(crate) lbs: Vec<ServerProcess>,
    _cluster: Cluster,
}

impl Stack {
    pub(crate) fn start(lbs: usize, flags: &[&str]) -> Self {
        let mut cluster = Cluster::builder()
            .argument("--log-segment-bytes=4MiB")
            .argument("--log-bytes-max=32MiB")
            .argument("--checkpoint-log-bytes=4MiB")
            .start();
        cluster.wait_until_serving();
        let lbs: Vec<_> = (0..lbs).map(|_| cluster.balancer()).collect();
        let backends: Vec<_> =
            lbs.iter().map(|lb| format!("{}:{}", lb.nbd_address().0, lb.nbd_address().1)).collect();
        let balance = Balance::start(&backends, flags);
        wait_until("all to be up", || balance.up() == lbs.len());
        Self { balance, lbs, _cluster: cluster }
    }

    /// Clients that each load balancer says it has.
    pub(crate) fn spread(&self) -> Vec<usize> {
        let clients = |lb: &ServerProcess| {
            let listed = lb.get("/sessions").json();
            usize::try_from(listed["total"].as_u64().unwrap()).unwrap()
        };
        self.lbs.iter().map(clients).collect()
    }
}

/// A running `nbdctl balance`. Dropping it kills it.
pub(crate) struct Balance(StartedProcess);

impl Balance {
    pub(crate) fn start(backends: &[String], flags: &[&str]) -> Self {
        let mut command = nbdctl();
        command.args(["balance", "--nbd=127.0.0.1:0", "--http=127.0.0.1:0", "--log-format=json"]);
        command.arg(format!("--backends={}", backends.join(",")));
        Self(StartedProcess::start(command.args(flags)))
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.nbd())
    }

    pub(crate) const fn nbd(&self) -> SocketAddr {
        self.0.nbd()
    }

    pub(crate) const fn http(&self) -> SocketAddr {
        self.0.http()
    }

    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(self.nbd(), export).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        http::get(self.http(), path).unwrap()
    }

    /// Load balancers that greeted when they were last asked.
    pub(crate) fn up(&self) -> usize {
        let health = self.get("/health").json();
        health["backends"].as_array().unwrap().iter().filter(|it| it["up"] == true).count()
    }

    /// Connections that are carried.
    pub(crate) fn connections(&self) -> u64 {
        let health = self.get("/health").json();
        let backends = health["backends"].as_array().unwrap().clone();
        backends.iter().map(|it| it["connections"].as_u64().unwrap()).sum()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.0.signal(signal);
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.0.wait()
    }
}
