//! Load balancers as processes, one after the other at the same address.

use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::http::{self, Response};
use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::{Cluster, NbdClient, Target, free_port};

use crate::support::{DEADLINE, wait_until};

/// Where load balancers of a test listen, and their files.
pub(crate) struct Place {
    host: &'static str,
    pub(crate) nbd: u16,
    pub(crate) http: u16,
    directory: Rc<tempfile::TempDir>,
    /// Processes started, to name their logs.
    started: Cell<usize>,
}

/// A load balancer as a process. Dropping it kills it.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::on("127.0.0.1")
    }

    /// On other addresses of this machine.
    pub(crate) fn on(host: &'static str) -> Self {
        let (nbd, http) = (free_port(), free_port());
        let directory = Rc::new(tempfile::tempdir().unwrap());
        Self { host, nbd, http, directory, started: Cell::new(0) }
    }

    /// On other ports, but found by those that are here.
    pub(crate) fn elsewhere(&self) -> Self {
        Self { directory: Rc::clone(&self.directory), started: Cell::new(100), ..Self::new() }
    }

    /// Where load balancers find each other.
    pub(crate) fn takeover(&self) -> PathBuf {
        self.directory.path().join("takeover")
    }

    /// Starts a load balancer that finds the nodes by this file.
    pub(crate) fn spawn_with(&self, cluster: &Path, flags: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-lb"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD_")) {
            command.env_remove(name);
        }
        self.started.set(self.started.get() + 1);
        let log = self.directory.path().join(format!("lb-{}.log", self.started.get()));
        command
            .arg(format!("--cluster={}", cluster.display()))
            .arg(format!("--nbd={}:{}", self.host, self.nbd))
            .arg(format!("--http=127.0.0.1:{}", self.http))
            .arg(format!("--takeover={}", self.takeover().display()))
            .args(flags)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap());
        Process { child: command.spawn().unwrap(), log }
    }

    pub(crate) fn spawn(&self, cluster: &Cluster, flags: &[&str]) -> Process {
        self.spawn_with(cluster.cluster_file(), flags)
    }

    /// Starts a load balancer and waits until it is ready.
    pub(crate) fn start(&self, cluster: &Cluster, flags: &[&str]) -> Process {
        let mut process = self.spawn(cluster, flags);
        wait_until("a load balancer that is ready", || {
            assert_eq!(process.ended(), None, "{}", process.log());
            self.get("/readyz").is_some_and(|answer| answer.status == 200)
        });
        process
    }

    /// Where clients attach.
    pub(crate) fn target(&self) -> Target {
        Target::lasting("lb", self.nbd)
    }

    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(self.target().address(), export).unwrap()
    }

    /// An answer over HTTP, if there is one.
    pub(crate) fn get(&self, path: &str) -> Option<Response> {
        http::get_within(Duration::from_secs(4), ("127.0.0.1", self.http), path).ok()
    }

    /// A metric without labels.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let body = self.get("/metrics")?.body;
        body.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send_signal(self.child.id(), signal);
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub(crate) fn kill_9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn wait_log(&mut self, text: &str) {
        wait_until(text, || {
            assert_eq!(self.ended(), None, "{}", self.log());
            self.log().contains(text)
        });
    }

    /// Waits until it has ended well; gives how long that took.
    #[track_caller]
    pub(crate) fn wait_success(&mut self) -> Duration {
        let began = Instant::now();
        while began.elapsed() < DEADLINE {
            if let Some(status) = self.ended() {
                assert!(status.success(), "{status}: {}", self.log());
                return began.elapsed();
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end: {}", self.log());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("---- {}\n{}", self.log.display(), self.log());
        }
    }
}
