//! `nbdctl up` as a person runs it.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::{NbdClient, http};
use rand::Rng as _;
use tempfile::TempDir;

/// Time that a start or an end may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// The last line of what a person is told once the cluster is up.
const LAST_LINE: &str = "Stop with Ctrl-C";

/// A running `nbdctl up`. Dropping it kills it.
struct Up {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// All that was printed until it was up.
    welcome: String,
    nbd: u16,
    http: u16,
}

/// A port that nobody listens on, given out once, below those of outgoing connections.
fn free_port() -> u16 {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap();
    let given = given.get_or_insert_default();
    loop {
        let port = rand::rng().random_range(12_000..32_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && given.insert(port) {
            return port;
        }
    }
}

/// `nbdctl up` on these ports, with none of the tester's own settings.
fn command(data: &Path, nbd: u16, http: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD_")) {
        command.env_remove(name);
    }
    command.env_remove("RUST_LOG").arg("up");
    command.arg(format!("--data-dir={}", data.display()));
    command.arg(format!("--nbd=127.0.0.1:{nbd}")).arg(format!("--http=127.0.0.1:{http}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Up {
    fn start(data: &Path, arguments: &[&str]) -> Self {
        let (nbd, http) = (free_port(), free_port());
        let mut child = command(data, nbd, http).args(arguments).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // It ends with the process, or with the test that no longer listens.
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut up = Self { child, lines, welcome: String::new(), nbd, http };
        let began = Instant::now();
        while !up.welcome.contains(LAST_LINE) {
            let left = DEADLINE.saturating_sub(began.elapsed());
            match up.lines.recv_timeout(left) {
                Ok(line) => up.welcome += &format!("{line}\n"),
                Err(error) => {
                    let stderr = up.stderr();
                    panic!("{error}: {}\n{stderr}", up.welcome)
                }
            }
        }
        up
    }

    fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(("127.0.0.1", self.nbd), export).unwrap()
    }

    /// What it prints on standard error until its end, which is brought about.
    fn stderr(&mut self) -> String {
        let _ = self.child.kill();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Sends `signal` and waits for the end. Gives the exit status and what it printed since.
    fn stop(mut self, signal: Signal) -> (ExitStatus, String) {
        send_signal(self.child.id(), signal);
        let status = wait(&mut self.child);
        let rest: Vec<String> = self.lines.iter().collect();
        let stderr = self.stderr();
        assert_eq!(stderr, "", "an orderly life has no warnings");
        (status, rest.join("\n"))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> ExitStatus {
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

#[test]
fn says_how_to_attach_to_look_and_to_stop() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("deep/data");
    let up = Up::start(&data, &[]);
    let (nbd, http) = (up.nbd, up.http);
    let expected = [
        format!("nbd-client 127.0.0.1 {nbd} "),
        format!("nbdinfo nbd://127.0.0.1:{nbd}/"),
        format!("http://127.0.0.1:{http}/health"),
        format!("http://127.0.0.1:{http}/metrics"),
        data.display().to_string(),
        "Ctrl-C".to_owned(),
    ];
    for text in expected {
        assert!(up.welcome.contains(&text), "{text:?} is not in\n{}", up.welcome);
    }
    let qemu = up.welcome.lines().find(|line| line.contains("qemu")).unwrap();
    assert!(qemu.contains("127.0.0.1") && qemu.contains(&nbd.to_string()), "{qemu}");
    // All of it holds as soon as it is said.
    let address = ("127.0.0.1", http);
    assert_eq!(http::get(address, "/readyz").unwrap().status, 200);
    let health = http::get(address, "/health").unwrap();
    assert_eq!((health.status, &health.json()["status"]), (200, &"ok".into()));
    let metrics = http::get(address, "/metrics").unwrap().body;
    assert!(metrics.contains("raft_role{shard=\"0\"} 1"), "{metrics}");
    let mut client = up.connect("vol1");
    assert_eq!(client.size(), 1 << 30);
    client.write(5, b"here").unwrap();
    assert_eq!(client.read(4, 6).unwrap(), b"\0here\0");
}

#[test]
fn stops_at_either_signal_and_keeps_what_was_written() {
    let directory = TempDir::new().unwrap();
    for (round, signal) in (1..).zip([Signal::INT, Signal::TERM, Signal::INT]) {
        let up = Up::start(directory.path(), &["--size=32MiB"]);
        let mut client = up.connect("kept");
        assert_eq!(client.size(), 32 << 20);
        for earlier in 1..round {
            let content = client.read(u64::from(earlier) * 10_000, 10_000).unwrap();
            assert_eq!(content, [earlier; 10_000]);
        }
        client.write(u64::from(round) * 10_000, &[round; 10_000]).unwrap();
        // With the client still attached.
        let began = Instant::now();
        let (status, said) = up.stop(signal);
        assert_eq!(status.code(), Some(0), "{signal:?}");
        assert!(said.contains("Stopping"), "{said:?}");
        assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    }
}

/// A run that must fail by itself: its code, and its words on standard error.
fn fails(command: &mut Command) -> (i32, String) {
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
fn fails_in_one_line(command: &mut Command, code: i32, words: &[&str]) {
    let (found, err) = fails(command);
    assert_eq!(found, code, "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    for word in words {
        assert!(err.contains(word), "{word:?} is not in {err}");
    }
}

#[test]
fn what_is_in_the_way_of_a_start_is_said_in_one_line() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    let other = directory.path().join("other");
    let up = Up::start(&data, &[]);
    let (nbd, http) = (up.nbd.to_string(), up.http.to_string());
    let mut to_nbd = command(&other, up.nbd, free_port());
    fails_in_one_line(&mut to_nbd, 1, &["NBD", &nbd, "in use"]);
    let mut to_http = command(&other, free_port(), up.http);
    fails_in_one_line(&mut to_http, 1, &["HTTP", &http, "in use"]);
    let mut to_data = command(&data, free_port(), free_port());
    fails_in_one_line(&mut to_data, 1, &[&data.display().to_string(), "use"]);
    up.connect("vol1").write(0, b"x").unwrap();
    up.stop(Signal::TERM);

    let mut renamed = command(&data, free_port(), free_port());
    fails_in_one_line(renamed.arg("--name=theirs"), 1, &["cinderblock", "theirs"]);
    let up = Up::start(&data, &[]);
    assert_eq!(up.connect("vol1").read(0, 1).unwrap(), b"x");
}

#[test]
fn a_directory_of_something_else_is_left_alone() {
    let directory = TempDir::new().unwrap();
    let foreign = directory.path().join("foreign/nbd-1-1");
    fs::create_dir_all(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    let mut in_foreign = command(foreign.parent().unwrap(), free_port(), free_port());
    fails_in_one_line(&mut in_foreign, 1, &[&foreign.display().to_string()]);
    let mut in_file = command(&foreign.join("letter"), free_port(), free_port());
    fails_in_one_line(&mut in_file, 1, &["letter"]);
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "something was added");
    assert_eq!(fs::read(foreign.join("letter")).unwrap(), b"dear");
}

#[test]
fn silly_settings_are_usage_errors() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    for size in ["0", "1000", "4097", "65TiB"] {
        let mut command = command(&data, free_port(), free_port());
        fails_in_one_line(command.arg(format!("--size={size}")), 64, &["size"]);
    }
    let (nbd, http) = (free_port(), free_port());
    fails_in_one_line(&mut command(&data, nbd, nbd), 64, &[&nbd.to_string()]);
    let mut small_log = command(&data, nbd, http);
    fails_in_one_line(small_log.arg("--log-bytes-max=1MiB"), 64, &["--log-bytes-max"]);
    let mistakes = [
        "--size=big",
        "--size=8EiB",
        "--size=-1",
        "--size=",
        "--nbd=nowhere",
        "--name=my cluster",
        "--nosuch",
    ];
    for mistake in mistakes {
        let mut command = command(&data, nbd, http);
        let (code, err) = fails(command.arg(mistake));
        assert_eq!(code, 64, "{mistake}: {err}");
        let first = err.lines().next().unwrap();
        assert!(first.contains(mistake.split('=').next().unwrap()), "{first}");
    }
    assert!(!data.exists(), "a data directory was made for a mistake");
}

#[test]
fn sizes_are_those_of_new_volumes_only() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--size=16MiB"]);
    assert_eq!(up.connect("first").size(), 16 << 20);
    assert_eq!(up.stop(Signal::TERM).0.code(), Some(0));
    let up = Up::start(directory.path(), &["--size=2TiB"]);
    assert_eq!(up.connect("first").size(), 16 << 20);
    assert_eq!(up.connect("second").size(), 2 << 40);
}
