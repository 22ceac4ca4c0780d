//! A load balancer as a process of its own: what it exports as metrics, holds open and logs.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::{fs, net::SocketAddr};

use nbd_testkit::http::{self, Response};
use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::{Cluster, NbdClient};
use serde_json::Value;

use crate::support::{DEADLINE, wait_until};

/// A running `nbd-lb`. Dropping it kills it.
pub(crate) struct Process {
    child: Child,
    nbd: SocketAddr,
    http: SocketAddr,
    log: Option<JoinHandle<Vec<String>>>,
}

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
        let mut child = command.args(flags).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (sender, started) = channel();
        let log = thread::spawn(move || read_log(stderr, &sender));
        let (nbd, http) = addresses(&started);
        let process = Self { child, nbd, http, log: Some(log) };
        wait_until("a load balancer that is ready", || process.get("/readyz").status == 200);
        process
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.nbd)
    }

    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(self.nbd, export).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        http::get(self.http, path).unwrap()
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
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Tells it to stop, and waits until it has.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        send_signal(self.child.id(), Signal::TERM);
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
        if thread::panicking() {
            eprintln!("the load balancer's log:\n{}", log.join("\n"));
        }
    }
}

/// Where it serves NBD and HTTP, once it says so.
#[track_caller]
fn addresses(started: &Receiver<Value>) -> (SocketAddr, SocketAddr) {
    let fields = started.recv_timeout(DEADLINE).expect("it starts");
    let address = |name: &str| fields[name].as_str().unwrap().parse().unwrap();
    (address("nbd"), address("http"))
}

/// Reads the log to its end, and passes on what it says of a start.
fn read_log(stderr: ChildStderr, started: &Sender<Value>) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        let entry = serde_json::from_str::<Value>(&line).unwrap_or_default();
        if entry["fields"]["message"] == "started" {
            let _ = started.send(entry["fields"].clone());
        }
        lines.push(line);
    }
    lines
}
