//! Running copies, and judging what they left.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, NodeProcess, ServerProcess, tools};
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rustix::process::Signal;

/// Time that anything awaited may take on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// A cluster, or what stands in front of it, and a directory for files.
pub(crate) struct Bench {
    pub(crate) cluster: Cluster,
    pub(crate) directory: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(volume_size: &str, replicas: usize) -> Self {
        let cluster = Cluster::builder().default_size(volume_size).replicas(replicas).start();
        Self { cluster, directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn node(&self) -> &NodeProcess {
        self.cluster.node()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `nbdctl`, with state of its own, for the server in front.
    pub(crate) fn nbdctl(&self, arguments: &[&str]) -> Command {
        nbdctl(self.directory.path(), self.cluster.front(), arguments)
    }

    /// Runs it; it must succeed. What it said.
    #[track_caller]
    pub(crate) fn runs(&self, arguments: &[&str]) -> String {
        let output = self.nbdctl(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        assert!(output.status.success(), "{arguments:?}: {}\n{said}", output.status);
        said
    }

    /// Runs it; it must fail. What it said last.
    #[track_caller]
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let Output { status, stderr, .. } = self.nbdctl(arguments).output().unwrap();
        let said = String::from_utf8(stderr).unwrap();
        assert!(!status.success(), "{arguments:?}\n{said}");
        let last = said.lines().last().unwrap_or_default().to_owned();
        assert!(last.starts_with("error: "), "{said}");
        last
    }

    /// What nbdcopy reads of a volume, as an independent judge.
    pub(crate) fn judged(&self, volume: &str) -> Vec<u8> {
        let path = self.path("judged");
        let uri = self.cluster.front().uri(volume);
        let status = Command::new(tools::tool("nbdcopy").unwrap()).arg(uri).arg(&path).status();
        assert!(status.unwrap().success());
        std::fs::read(path).unwrap()
    }

    /// Waits until a copy is under way.
    pub(crate) fn wait_begun(&self) {
        let began = Instant::now();
        loop {
            let sessions = self.node().get("/sessions").json();
            let bytes = |session: &serde_json::Value| {
                session["received_bytes"].as_u64().unwrap()
                    + session["sent_bytes"].as_u64().unwrap()
            };
            let moved: u64 = sessions["sessions"].as_array().unwrap().iter().map(bytes).sum();
            if moved > 4 << 20 {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "no copy has begun");
        }
    }

    /// Has the server stand still for longer than the time between two entries of the journal: no
    /// copy is too fast for what is looked at.
    pub(crate) fn hold(&self) {
        self.node().signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(1200));
        self.node().signal(Signal::CONT);
    }

    /// Starts it, waits until its journal says that more than `beyond` of the copy is done, and
    /// kills it. How much that is; the journal must be one of `journals`.
    pub(crate) fn interrupted(&self, arguments: &[&str], journals: &Path, beyond: u64) -> u64 {
        let mut child = self.nbdctl(arguments).stderr(Stdio::null()).spawn().unwrap();
        self.wait_begun();
        let began = Instant::now();
        while done(journals).is_none_or(|done| done <= beyond) {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
            assert!(began.elapsed() < DEADLINE, "the journal says nothing");
            // An entry that has come due is made when the server goes on, and little else.
            self.hold();
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        done(journals).unwrap()
    }
}

pub(crate) fn nbdctl(state: &Path, server: &ServerProcess, arguments: &[&str]) -> Command {
    let (host, port) = server.nbd_address();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    command.args(arguments).arg(format!("--nbd={host}:{port}"));
    command.env("XDG_STATE_HOME", state.join("state"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What the one journal in a directory says is done.
fn done(journals: &Path) -> Option<u64> {
    let is_journal = |path: &PathBuf| {
        let name = path.to_string_lossy();
        name.ends_with(".json") || name.ends_with(".journal")
    };
    let entries = std::fs::read_dir(journals).ok()?;
    let path = entries.filter_map(|entry| Some(entry.ok()?.path())).find(is_journal)?;
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    record["done"].as_u64()
}

/// Bytes of data that a run says it carried.
#[track_caller]
pub(crate) fn carried(said: &str) -> u64 {
    let number =
        said.split(" bytes of data carried").next().and_then(|text| text.rsplit(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{said}"))
}

/// A file of random bytes.
pub(crate) fn random_file(path: &Path, mib: usize) {
    let seed = nbd_testkit::seed();
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut file = File::create(path).unwrap();
    let mut block = vec![0; 1 << 20];
    for _ in 0..mib {
        random.fill_bytes(&mut block);
        file.write_all(&block).unwrap();
    }
}

/// A sparse file with some KiB of data at random places, both ends among them.
pub(crate) fn sparse_file(path: &Path, size: u64) {
    let mut random = rand::rngs::StdRng::seed_from_u64(nbd_testkit::seed());
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut places: Vec<u64> = (0..30).map(|_| random.random_range(0..size - 8192)).collect();
    places.extend([0, size - 8192]);
    for place in places {
        let mut data = vec![0; 8192];
        random.fill_bytes(&mut data);
        file.write_all_at(&data, place).unwrap();
    }
}

/// Runs a program to its end; whether it succeeded.
pub(crate) fn status(command: &mut Command) -> bool {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    child.wait().unwrap().success()
}
