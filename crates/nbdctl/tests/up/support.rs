//! A running `nbdctl up`, and what it says.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::http::{self, Response};
use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::{NbdClient, Target, binary, free_port, free_ports_at};

/// Time that anything awaited may take on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Logs of a size for tests.
pub(crate) const SMALL_LOG: [&str; 3] =
    ["--log-segment-bytes=4MiB", "--log-bytes-max=32MiB", "--checkpoint-log-bytes=4MiB"];

/// The last line of what a person is told once the cluster is up.
const LAST_LINE: &str = "Stop with Ctrl-C";

/// What a replica says that has got no processor for a while.
const STOOD_STILL: &str = "stood still: the processors are overrun";

/// What a leader says that has not heard from others for a while: they stood still, perhaps.
const NO_MAJORITY: &str = "no majority was heard from, so the leader steps down";

/// A running `nbdctl up`. Dropping it kills it.
pub(crate) struct Up {
    pub(crate) child: Child,
    lines: mpsc::Receiver<String>,
    errors: Arc<Mutex<String>>,
    error_reader: Option<thread::JoinHandle<()>>,
    /// All that was printed until it was up.
    pub(crate) welcome: String,
    pub(crate) nbd: u16,
    pub(crate) http: u16,
}

/// A value for `--ports` at which the ports of 2 shards of 3 replicas are free.
pub(crate) fn replica_ports() -> u16 {
    let of_replica = |shard: u16, replica: u16| [1, 2, 3].map(|n| 100 * shard + 10 * replica + n);
    let offsets = [1, 2].map(|shard| [1, 2, 3].map(|replica| of_replica(shard, replica)));
    free_ports_at(offsets.as_flattened().as_flattened())
}

/// `nbdctl` with none of the tester's own settings.
pub(crate) fn nbdctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD_")) {
        command.env_remove(name);
    }
    command.env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `nbdctl up` on these ports.
pub(crate) fn command(data: &Path, nbd: u16, http: u16) -> Command {
    let mut command = nbdctl();
    command.arg("up").arg(format!("--data-dir={}", data.display()));
    command.arg(format!("--nbd=127.0.0.1:{nbd}")).arg(format!("--http=127.0.0.1:{http}"));
    command.arg(format!("--api=127.0.0.1:{}", free_port()));
    command
}

impl Up {
    /// A cluster with small logs in `data`, at ports of its own if it is new.
    pub(crate) fn start(data: &Path, arguments: &[&str]) -> Self {
        let ports = format!("--ports={}", replica_ports());
        let ports = (!data.join("cluster.toml").exists()).then_some(ports.as_str());
        let arguments: Vec<&str> =
            SMALL_LOG.iter().chain(arguments).copied().chain(ports).collect();
        Self::start_as_is(data, &arguments)
    }

    pub(crate) fn start_as_is(data: &Path, arguments: &[&str]) -> Self {
        let (nbd, http) = (free_port(), free_port());
        // As at a terminal: a process group, which Ctrl-C signals as a whole.
        let mut child = command(data, nbd, http).args(arguments).process_group(0).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // It ends with the process, or with the test that no longer listens.
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let errors = Arc::new(Mutex::new(String::new()));
        let written = Arc::clone(&errors);
        let error_reader = thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *written.lock().unwrap() += &format!("{line}\n");
            }
        });
        let (welcome, error_reader) = (String::new(), Some(error_reader));
        let mut up = Self { child, lines, errors, error_reader, welcome, nbd, http };
        up.welcome = up.wait_line(LAST_LINE);
        up
    }

    /// Waits for a line that holds `text`, and gives all up to it.
    #[track_caller]
    pub(crate) fn wait_line(&mut self, text: &str) -> String {
        let (began, mut said) = (Instant::now(), String::new());
        loop {
            let left = DEADLINE.saturating_sub(began.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => said += &format!("{line}\n"),
                Err(error) => {
                    let _ = self.child.kill();
                    panic!("{error} instead of {text:?}: {said}\n{}", self.all_errors())
                }
            }
            if said.lines().last().is_some_and(|line| line.contains(text)) {
                return said;
            }
        }
    }

    /// Waits until it has written `text` on standard error, and gives all that it has.
    #[track_caller]
    pub(crate) fn wait_error(&self, text: &str) -> String {
        wait_until(text, || self.errors().contains(text));
        self.errors()
    }

    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(("127.0.0.1", self.nbd), export).unwrap()
    }

    pub(crate) fn target(&self) -> Target {
        Target::lasting("nbd-lb", self.nbd)
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.nbd)
    }

    /// `nbdctl`, told to ask this cluster's control API.
    pub(crate) fn nbdctl(&self, arguments: &[&str]) -> Command {
        let line = self.welcome.lines().find(|line| line.contains("/docs")).unwrap_or_default();
        let api = line.trim().split("/docs").next().unwrap_or_default();
        let mut command = nbdctl();
        command.arg(format!("--server={api}")).args(arguments);
        command
    }

    /// A page of the load balancer.
    pub(crate) fn get(&self, path: &str) -> Response {
        http::get(("127.0.0.1", self.http), path).unwrap()
    }

    /// The line of the welcome about a service.
    #[track_caller]
    pub(crate) fn line(&self, service: &str) -> &str {
        let line = self.welcome.lines().find(|line| line.starts_with(service));
        line.unwrap_or_else(|| panic!("{service} is not in {}", self.welcome))
    }

    /// The id of a service's process, by the welcome.
    #[track_caller]
    pub(crate) fn pid(&self, service: &str) -> u32 {
        let mut words = self.line(service).split_whitespace().skip_while(|word| *word != "pid");
        words.nth(1).and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("{}", self.welcome))
    }

    /// The ids of all processes but its own.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let services = self.welcome.lines().filter(|line| line.contains(" pid "));
        let services: Vec<&str> = services.filter_map(|l| l.split_whitespace().next()).collect();
        services.into_iter().map(|service| self.pid(service)).collect()
    }

    /// The port at which a replica serves HTTP, by the welcome.
    #[track_caller]
    pub(crate) fn http_of(&self, node: &str) -> u16 {
        port_after(self.line(node), "http://127.0.0.1:")
    }

    /// The node that leads a shard, by the load balancer.
    #[track_caller]
    pub(crate) fn leader(&self, shard: usize) -> String {
        let mut leader = None;
        wait_until("a leader", || {
            let health = self.get("/health").json();
            leader = health["shards"][shard]["leader"].as_str().map(str::to_owned);
            health["shards"][shard]["error"].is_null() && leader.is_some()
        });
        leader.unwrap()
    }

    /// What it has written on standard error so far.
    pub(crate) fn errors(&self) -> String {
        self.errors.lock().unwrap().clone()
    }

    /// What it wrote on standard error until its end, which has come.
    fn all_errors(&mut self) -> String {
        self.error_reader.take().unwrap().join().unwrap();
        self.errors()
    }

    /// Sends `signal` to its process group, as a terminal does, and waits for the end. Gives the
    /// exit status, and what it printed and wrote to standard error.
    pub(crate) fn end(mut self, signal: Signal) -> (ExitStatus, String, String) {
        let group = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process_group(group, signal).unwrap();
        let status = wait(&mut self.child);
        let rest: Vec<String> = self.lines.iter().collect();
        let errors = self.all_errors();
        (status, rest.join("\n"), errors)
    }

    /// As [`end`](Self::end), in good order and without a warning but of an overrun machine. Gives
    /// what it printed.
    #[track_caller]
    pub(crate) fn stop(self, signal: Signal) -> String {
        let (status, said, errors) = self.end(signal);
        assert!(wrong(&errors).is_empty(), "an orderly life has no warnings: {errors}");
        assert_eq!(status.code(), Some(0), "{signal:?}");
        said
    }

    /// Ends it as a crash would.
    pub(crate) fn kill_9(mut self) {
        send_signal(self.child.id(), Signal::KILL);
        wait(&mut self.child);
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("nbdctl up wrote:\n{}", self.errors());
        }
    }
}

/// The lines on standard error that an overrun machine does not explain.
fn wrong(errors: &str) -> Vec<&str> {
    let overrun = errors.contains(STOOD_STILL);
    let is_excused =
        |line: &str| overrun && [STOOD_STILL, NO_MAJORITY].iter().any(|text| line.contains(text));
    errors.lines().filter(|line| !is_excused(line)).collect()
}

/// The port that follows `prefix` in `line`.
#[track_caller]
pub(crate) fn port_after(line: &str, prefix: &str) -> u16 {
    let rest = line.split(prefix).nth(1);
    let digits = rest.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > DEADLINE {
            child.kill().unwrap();
            panic!("still runs after {DEADLINE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether there is a process of this id.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // What has ended and was not waited for is not alive.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// A run that must fail by itself: its code, and its words on standard error.
#[track_caller]
pub(crate) fn fails(command: &mut Command) -> (i32, String) {
    let mut child = command.spawn().unwrap();
    let status = wait(&mut child);
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.unwrap().read_to_string(&mut out).unwrap();
    child.stderr.unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(out, "", "{err}");
    assert!(err.starts_with("error: "), "{err}");
    (status.code().unwrap(), err)
}

/// As [`fails`], with one line that holds each of `words`.
#[track_caller]
pub(crate) fn fails_in_one_line(command: &mut Command, code: i32, words: &[&str]) {
    let (found, err) = fails(command);
    assert_eq!(found, code, "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    for word in words {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
}

/// Sees to it that the services' programs are there, beside `nbdctl`.
pub(crate) fn build_services() -> PathBuf {
    binary("nbd-lb");
    binary("nbd-control");
    binary("nbd-replica")
}
