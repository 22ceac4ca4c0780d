//! A load balancer as a process of its own: what it exports as metrics, holds open and logs.

use std::fs;
use std::process::{Command, ExitStatus, Stdio};

use nbd_testkit::http::{self, Response};
use nbd_testkit::process::Signal;
use nbd_testkit::{Cluster, NbdClient, StartedProcess};

use crate::support::wait_until;

/// A running `nbd-lb`. Dropping it kills it.
pub(crate) struct Process(StartedProcess);

/// `nbd-lb`, with nothing of the tests' own environment.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-lb"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

impl Process {
    /// One that has reached the leader of each shard of `cluster`.
    #[track_caller]
    pub(crate) fn start(cluster: &Cluster, flags: &[&str]) -> Self {
        let mut command = command();
        command.arg(format!("--cluster={}", cluster.cluster_file().display()));
        // Not the defaults, which a cluster may have that somebody runs beside the tests.
        command.args(["--nbd=127.0.0.1:0", "--http=127.0.0.1:0", "--log-format=json"]);
        let process = Self(StartedProcess::start(command.args(flags)));
        wait_until("a load balancer that is ready", || process.get("/readyz").status == 200);
        process
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.0.nbd())
    }

    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(self.0.nbd(), export).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        http::get(self.0.http(), path).unwrap()
    }

    /// The value of a series, as in `nbd_connections`.
    #[track_caller]
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let page = self.get("/metrics").body;
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok();
        page.lines().find_map(value).unwrap_or_else(|| panic!("no {series} in:\n{page}"))
    }

    /// Files, sockets and pipes that it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0.pid())).unwrap().count()
    }

    /// Tells it to stop, and waits until it has.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.0.signal(Signal::TERM);
        self.0.wait()
    }
}
