//! A process that chooses its own ports, and says in its log which.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;

use crate::process::{Signal, send_signal};

/// Time for a process to say that it has started. None takes nearly as long.
const START_MAX: Duration = Duration::from_secs(60);

/// A process that serves NBD and HTTP. Dropping it kills it, and shows its log if a test fails.
///
/// For programs that a [`ServerProcess`](crate::ServerProcess), whose ports are given, is not for.
#[derive(Debug)]
pub struct StartedProcess {
    child: Child,
    nbd: SocketAddr,
    http: SocketAddr,
    log: Option<JoinHandle<Vec<String>>>,
}

impl StartedProcess {
    /// Runs `command`, whose log is to be JSON (`--log-format=json`), until it says `started` with
    /// the addresses `nbd` and `http`.
    ///
    /// # Panics
    /// If it cannot be run, or ends before it has started.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("run a program");
        let stderr = child.stderr.take().expect("the log is a pipe");
        let (sender, started) = channel();
        let log = thread::spawn(move || read_log(stderr, &sender));
        let Ok(fields) = started.recv_timeout(START_MAX) else {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} does not start:\n{}", log.join().unwrap_or_default().join("\n"));
        };
        let address = |name: &str| fields[name].as_str().and_then(|text| text.parse().ok());
        let address = |name: &str| address(name).unwrap_or_else(|| panic!("no {name}: {fields}"));
        Self { child, nbd: address("nbd"), http: address("http"), log: Some(log) }
    }

    /// Where it serves NBD.
    pub const fn nbd(&self) -> SocketAddr {
        self.nbd
    }

    /// Where it serves HTTP.
    pub const fn http(&self) -> SocketAddr {
        self.http
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended, and was waited for.
    pub fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// If that fails.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("wait for a process")
    }
}

impl Drop for StartedProcess {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
        if thread::panicking() {
            eprintln!("the process's log:\n{}", log.join("\n"));
        }
    }
}

/// Reads the log to its end, and passes on what it says of a start.
fn read_log(stderr: ChildStderr, started: &Sender<Value>) -> Vec<String> {
    let mut lines = Vec::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        let entry = serde_json::from_str::<Value>(&line).unwrap_or_default();
        if entry["fields"]["message"] == "started" {
            // Nobody waits for it any more, if it started late.
            let _ = started.send(entry["fields"].clone());
        }
        lines.push(line);
    }
    lines
}
