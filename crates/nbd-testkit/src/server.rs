//! A process that serves HTTP, and NBD: an `nbd-replica`, an `nbd-lb` or an `nbd-control`.

use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::client::{ClientError, NbdClient};
use crate::http::{self, Response};
use crate::process::{self, Signal};

/// Time a process has to become ready, and to end after SIGTERM. Far above what either takes, also
/// on a loaded machine; one that stands still is seen by this only.
const DEADLINE: Duration = Duration::from_secs(60);

/// Time a process has to answer a look at its state; it may stand still on purpose. Above the
/// deadline that `/health` has by default.
const LOOK_TIMEOUT: Duration = Duration::from_secs(4);

/// Lines of a process's standard error that go into a panic's message.
const TAIL_LINES: usize = 60;

/// A program of a [`Cluster`](crate::Cluster) that serves NBD and HTTP at ports of its own, the
/// same for all its runs, and its process while it runs. Dropping it kills the process.
///
/// A load balancer is no more than this; what a node has besides is [`NodeProcess`]'s.
///
/// [`NodeProcess`]: crate::NodeProcess
#[derive(Debug)]
pub struct ServerProcess {
    name: String,
    nbd: u16,
    http: u16,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    stderr: PathBuf,
    child: Option<Child>,
    /// Whether the last of SIGSTOP and SIGCONT was the former.
    paused: bool,
    endings: Arc<AtomicU64>,
}

/// What a process is started with.
#[derive(Debug)]
pub(crate) struct ServerSetup {
    pub(crate) name: String,
    /// Port of 127.0.0.1 where it serves NBD, as its arguments or its cluster file say.
    pub(crate) nbd: u16,
    /// The same for HTTP.
    pub(crate) http: u16,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    /// Holds its captured output. Made if need be.
    pub(crate) directory: PathBuf,
}

/// Where a load finds a process, and how it tells a connection lost for a reason from one that was
/// not to be lost.
#[derive(Debug, Clone)]
pub struct Target {
    name: String,
    port: u16,
    endings: Arc<AtomicU64>,
}

impl Target {
    /// Something else that serves NBD at this port of 127.0.0.1: no connection to it may be lost,
    /// unless [`count_ending`](Self::count_ending) says that it is ended.
    pub fn lasting(name: &str, port: u16) -> Self {
        Self { name: name.to_owned(), port, endings: Arc::default() }
    }

    /// The process's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its NBD clients connect.
    pub fn address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.port)
    }

    /// Says that it will be ended on purpose, now.
    pub fn count_ending(&self) {
        self.endings.fetch_add(1, Ordering::SeqCst);
    }

    /// How often the process was ended on purpose so far; counted before it is.
    pub fn endings(&self) -> u64 {
        self.endings.load(Ordering::SeqCst)
    }
}

impl ServerProcess {
    /// A process that does not run yet.
    pub(crate) fn new(setup: ServerSetup) -> Self {
        let ServerSetup { name, nbd, http, program, arguments, environment, directory } = setup;
        fs::create_dir_all(&directory).expect("create a directory for a process's output");
        let stderr = directory.join("stderr");
        let (child, paused, endings) = (None, false, Arc::default());
        Self { name, nbd, http, program, arguments, environment, stderr, child, paused, endings }
    }

    /// Starts the process and waits until `/readyz` says that it can serve.
    ///
    /// # Panics
    /// If it runs already, ends at once, or is not ready in time.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the process without waiting for anything.
    ///
    /// # Panics
    /// If it runs already, or cannot be started.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = OpenOptions::new().create(true).append(true).open(&self.stderr);
        let log: File = log.unwrap_or_else(|e| panic!("open {}: {e}", self.stderr.display()));
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().expect("duplicate a descriptor")).stderr(log);
        self.paused = false;
        let child = command.spawn();
        self.child =
            Some(child.unwrap_or_else(|e| panic!("start {}: {e}", self.program.display())));
    }

    /// Waits until `/readyz` says that the process can serve.
    ///
    /// # Panics
    /// If it ends, or is not ready in time.
    pub fn wait_ready(&mut self) {
        let started = Instant::now();
        while !self.is_ready() {
            if let Some(status) = self.try_wait() {
                self.child = None;
                self.fail(&format!("ended before it was ready: {status}"));
            }
            if started.elapsed() > DEADLINE {
                self.fail(&format!("is not ready after {DEADLINE:?}"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether `/readyz` says that the process can serve.
    pub fn is_ready(&self) -> bool {
        self.look("/readyz").is_some_and(|answer| answer.status == 200)
    }

    /// Ends the process with SIGKILL, as a crash would.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill_9(&mut self) {
        self.endings.fetch_add(1, Ordering::SeqCst);
        let mut child = self.take_child();
        child.kill().and_then(|()| child.wait()).expect("kill a child");
    }

    /// Asks the process to stop with SIGTERM and waits for its end.
    ///
    /// # Panics
    /// If it does not run, or does not end in time.
    pub fn terminate(&mut self) -> ExitStatus {
        self.endings.fetch_add(1, Ordering::SeqCst);
        self.signal(Signal::TERM);
        self.wait_exit()
    }

    /// Waits until the process ends by itself.
    ///
    /// # Panics
    /// If it does not run, or does not end in time.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.try_wait() {
                self.child = None;
                return status;
            }
            if started.elapsed() > DEADLINE {
                self.fail(&format!("still runs after {DEADLINE:?}"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Terminates the process if it runs, and starts it again with the same data and ports.
    ///
    /// # Panics
    /// As [`terminate`](Self::terminate) and [`start`](Self::start), and if it ends with a failure.
    pub fn restart(&mut self) {
        if self.child.is_some() {
            let status = self.terminate();
            if !status.success() {
                self.fail(&format!("ended with {status} after SIGTERM"));
            }
        }
        self.start();
    }

    /// Stops the process where it is, with SIGSTOP, until [`resume`](Self::resume).
    ///
    /// # Panics
    /// If it does not run.
    pub fn pause(&mut self) {
        process::stop(self.pid());
        self.paused = true;
    }

    /// Lets a paused process go on.
    ///
    /// # Panics
    /// If it does not run.
    pub fn resume(&mut self) {
        self.signal(Signal::CONT);
        self.paused = false;
    }

    /// Whether the process is paused.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Sends the process a signal (SIGSTOP, SIGCONT, ...).
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, signal: Signal) {
        process::send_signal(self.pid(), signal);
    }

    /// Replaces the value of a flag, or adds the flag, for the next start: `--log-bytes-max=64MiB`.
    pub fn set_argument(&mut self, argument: &str) {
        let flag = argument.split('=').next().unwrap_or(argument);
        self.arguments.retain(|old| old.split('=').next() != Some(flag));
        self.arguments.push(argument.to_owned());
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.try_wait().is_none()
    }

    /// How the process ended, if it did so without having been ended by the test.
    pub fn ended_by_itself(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("wait for a child")
    }

    /// The id of the process.
    ///
    /// # Panics
    /// If it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap_or_else(|| panic!("{} does not run", self.name)).id()
    }

    /// Memory of the process that is resident now, in bytes.
    ///
    /// # Panics
    /// If it does not run.
    pub fn rss_bytes(&self) -> u64 {
        process::rss_bytes(self.pid())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its NBD clients connect.
    pub fn nbd_address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.nbd)
    }

    /// Where its probes answer.
    pub fn http_address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.http)
    }

    /// The URI of a volume here, as NBD tools take it. `export` needs no quoting.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.nbd)
    }

    /// A client attached to a volume here.
    ///
    /// # Errors
    /// As [`NbdClient::connect`].
    pub fn connect(&self, export: &str) -> Result<NbdClient, ClientError> {
        NbdClient::connect(self.nbd_address(), export)
    }

    /// Gets a page from the process.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn get(&self, path: &str) -> Response {
        let answer = http::get(self.http_address(), path);
        answer.unwrap_or_else(|error| self.fail(&format!("does not answer GET {path}: {error}")))
    }

    /// Sends a request of any kind to the process, with a JSON body unless that is empty.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let mut headers = headers.to_vec();
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
            headers.push(("content-type", "application/json"));
        }
        let answer = http::request(self.http_address(), method, path, &headers, body.as_bytes());
        answer.unwrap_or_else(|e| self.fail(&format!("does not answer {method} {path}: {e}")))
    }

    /// How a load finds it.
    pub fn target(&self) -> Target {
        let endings = Arc::clone(&self.endings);
        Target { name: self.name.clone(), port: self.nbd, endings }
    }

    /// The value of one series of `/metrics`, written as Prometheus writes it: `name` or
    /// `name{label="value"}`. `None` if there is none, or no answer.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let page = self.look("/metrics")?;
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok();
        page.body.lines().find_map(value)
    }

    /// Gets a page from a process that may be down or stand still.
    pub(crate) fn look(&self, path: &str) -> Option<Response> {
        if self.child.is_none() || self.paused {
            return None;
        }
        http::get_within(LOOK_TIMEOUT, self.http_address(), path).ok()
    }

    /// What the process has written to standard error (and output), over all its runs.
    pub fn stderr(&self) -> String {
        let bytes = fs::read(&self.stderr).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The end of what the process has written to standard error.
    pub fn tail(&self) -> String {
        tail(&self.stderr())
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        let name = &self.name;
        let child = self.child.as_mut().unwrap_or_else(|| panic!("{name} does not run"));
        child.try_wait().expect("wait for a child")
    }

    fn take_child(&mut self) -> Child {
        self.child.take().unwrap_or_else(|| panic!("{} does not run", self.name))
    }

    /// Panics with `what` and the end of the process's standard error.
    fn fail(&self, what: &str) -> ! {
        panic!("{} {what}; it wrote:\n{}", self.name, self.tail())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; either way it must be gone when the test is.
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("{} wrote:\n{}", self.name, self.tail());
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::path::Path;

    use super::*;
    use crate::ports::free_port;

    /// A stand-in for a server: a shell that exits with 7 on SIGTERM.
    fn stand_in(directory: &Path) -> ServerProcess {
        let script = "trap 'exit 7' TERM; echo $GREETING >&2; while :; do sleep 0.02; done";
        ServerProcess::new(ServerSetup {
            name: "n".to_owned(),
            nbd: free_port(),
            http: free_port(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            environment: vec![("GREETING".to_owned(), "hello".to_owned())],
            directory: directory.join("n"),
        })
    }

    /// Answers one probe in the stand-in's place.
    fn answer_once(server: &ServerProcess) -> thread::JoinHandle<()> {
        let listener = TcpListener::bind(server.http_address()).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 256];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nready\n").unwrap();
        })
    }

    fn wait_for_greetings(server: &ServerProcess, count: usize) {
        while server.stderr() != "hello\n".repeat(count) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_process_starts_stops_and_starts_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = stand_in(directory.path());
        assert!(!server.is_running());
        let probe = answer_once(&server);
        server.start();
        probe.join().unwrap();
        assert!(server.is_running());
        assert!(server.rss_bytes() > 0);
        wait_for_greetings(&server, 1);
        assert_eq!(server.terminate().code(), Some(7));
        server.spawn();
        wait_for_greetings(&server, 2);
        let pid = server.pid();
        server.kill_9();
        assert!(!server.is_running());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn dropping_a_server_kills_its_process_even_when_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = stand_in(directory.path());
        server.spawn();
        let pid = server.pid();
        server.signal(Signal::STOP);
        drop(server);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    #[should_panic(expected = "ended before it was ready: exit status: 3; it wrote:\nno such disk")]
    fn a_server_that_does_not_start_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = stand_in(directory.path());
        server.arguments[1] = "echo no such disk >&2; exit 3".to_owned();
        server.start();
    }

    #[test]
    fn a_flag_is_replaced_or_added() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = stand_in(directory.path());
        server.arguments = vec!["--a=1".to_owned(), "--b=2".to_owned()];
        server.set_argument("--a=3");
        server.set_argument("--c");
        assert_eq!(server.arguments, ["--b=2", "--a=3", "--c"]);
    }

    #[test]
    fn the_tail_is_the_end() {
        let text: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let tail = tail(&text);
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("line 99"));
    }
}
