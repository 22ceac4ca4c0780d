//! The servers that are measured, each on a free loopback port with data of its own.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nbd_testkit::{Cluster, ServerProcess, free_port};

/// Size of every export.
pub(crate) const VOLUME_BYTES: u64 = 1 << 30;

/// Name of every export.
pub(crate) const EXPORT: &str = "bench";

/// Time a server has to accept connections.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerKind {
    /// `nbd-replica`, one replica.
    Single,
    /// `nbd-replica`, three replicas on this machine, attached to the leader.
    Leader,
    /// The same, attached to a follower.
    Follower,
    /// The same, attached through a load balancer.
    Balanced,
    /// `qemu-nbd` on a raw file, every write durable when answered.
    QemuWritethrough,
    /// `nbdkit file`, cached.
    NbdkitFile,
}

impl ServerKind {
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::Single => "1 replica",
            Self::Leader => "3, leader",
            Self::Follower => "3, follower",
            Self::Balanced => "3, balancer",
            Self::QemuWritethrough => "qemu-nbd --cache=writethrough, raw file",
            Self::NbdkitFile => "nbdkit file",
        }
    }
}

/// A running server; stopped and its data removed when dropped.
#[derive(Debug)]
pub(crate) enum Server {
    /// One of ours.
    Cluster(Cluster),
    /// A load balancer, and one of ours behind it.
    Balanced(ServerProcess, Cluster),
    /// Another's.
    Reference(Reference),
}

impl Server {
    pub(crate) fn start(kind: ServerKind, dir: &Path, replica: &Path) -> Result<Self> {
        Ok(match kind {
            ServerKind::Single => Self::Cluster(cluster(1, dir, replica)),
            ServerKind::Leader => {
                let mut cluster = cluster(3, dir, replica);
                cluster.put_in_front(cluster.wait_leader());
                Self::Cluster(cluster)
            }
            ServerKind::Follower => {
                let mut cluster = cluster(3, dir, replica);
                cluster.put_in_front(cluster.followers()[0]);
                Self::Cluster(cluster)
            }
            ServerKind::Balanced => {
                let cluster = cluster(3, dir, replica);
                Self::Balanced(cluster.balancer(), cluster)
            }
            ServerKind::QemuWritethrough | ServerKind::NbdkitFile => {
                Self::Reference(Reference::start(kind, dir)?)
            }
        })
    }

    pub(crate) fn uri(&self) -> String {
        match self {
            Self::Cluster(cluster) => cluster.node().uri(EXPORT),
            Self::Balanced(balancer, _) => balancer.uri(EXPORT),
            Self::Reference(reference) => {
                format!("nbd://127.0.0.1:{}/{EXPORT}", reference.program.port)
            }
        }
    }

    /// Raft's term: a change means that the leader has changed in a measurement.
    pub(crate) fn term(&self) -> Option<f64> {
        match self {
            Self::Cluster(cluster) | Self::Balanced(_, cluster) => {
                cluster.node().metric("raft_term{shard=\"0\"}")
            }
            Self::Reference(_) => None,
        }
    }
}

/// A serving cluster of this many replicas.
///
/// # Panics
/// If it does not come to serve.
pub(crate) fn cluster(replicas: usize, dir: &Path, replica: &Path) -> Cluster {
    let builder = Cluster::builder().replicas(replicas).program(replica).under(dir);
    let size = format!("{VOLUME_BYTES}B");
    let mut cluster = builder.name("bench").default_size(&size).start();
    cluster.wait_until_serving();
    cluster
}

/// A program that serves NBD at a port; killed when dropped.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    port: u16,
}

impl Program {
    /// Starts it, and waits until it listens at `port`.
    fn start(mut command: Command, port: u16, what: &str) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("start {what}"))?;
        let mut program = Self { child, port };
        let deadline = Instant::now() + START_DEADLINE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = program.child.try_wait()? {
                bail!("{what} ended at once: {status}");
            }
            if Instant::now() > deadline {
                bail!("{what} did not listen within {START_DEADLINE:?}");
            }
            sleep(Duration::from_millis(20));
        }
        Ok(program)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Only what this run started, by its pid.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another's server.
#[derive(Debug)]
pub(crate) struct Reference {
    program: Program,
    data: PathBuf,
}

impl Reference {
    fn start(kind: ServerKind, dir: &Path) -> Result<Self> {
        let port = free_port();
        let data = dir.join(format!("{kind:?}-{port}"));
        let mut command = if kind == ServerKind::QemuWritethrough {
            let mut command = Command::new("qemu-nbd");
            command.args(["--cache=writethrough", "--format=raw", "--persistent"]);
            command.args(["--shared=8", "--bind=127.0.0.1", &format!("--port={port}")]);
            command.arg(format!("--export-name={EXPORT}"));
            command
        } else {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--ipaddr=127.0.0.1", &format!("--port={port}")]);
            command.arg("file");
            command
        };
        command.arg(raw_file(&data)?);
        Ok(Self { program: Program::start(command, port, kind.describe())?, data })
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.data);
    }
}

/// A file of the volume's size. The jobs write it once before they measure, so that the reference
/// does not pay for allocation.
fn raw_file(path: &Path) -> Result<PathBuf> {
    let file = File::create(path).context("create the raw file")?;
    file.set_len(VOLUME_BYTES).context("size the raw file")?;
    Ok(path.to_owned())
}
