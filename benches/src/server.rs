//! The servers that are measured, each on a free loopback port with data of its own.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Size of every export.
const VOLUME_BYTES: u64 = 1 << 30;

/// Time a server has to accept connections.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerKind {
    /// `nbd-replica`, one replica.
    Cinderblock,
    /// `qemu-nbd` on a raw file, every write durable when answered.
    QemuWritethrough,
    /// `nbdkit file`, cached.
    NbdkitFile,
}

impl ServerKind {
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::Cinderblock => "nbd-replica",
            Self::QemuWritethrough => "qemu-nbd --cache=writethrough, raw file",
            Self::NbdkitFile => "nbdkit file",
        }
    }
}

/// A running server; stopped and its data removed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    port: u16,
    data: PathBuf,
}

impl Server {
    pub(crate) fn start(kind: ServerKind, dir: &Path, replica: &Path) -> Result<Self> {
        let port = free_port()?;
        let data = dir.join(format!("{kind:?}-{port}"));
        let mut command = match kind {
            ServerKind::Cinderblock => cinderblock(replica, &data, port)?,
            ServerKind::QemuWritethrough => {
                let mut command = Command::new("qemu-nbd");
                command.args(["--cache=writethrough", "--format=raw", "--persistent"]);
                command.args(["--shared=8", "--bind=127.0.0.1", &format!("--port={port}")]);
                command.args(["--export-name=bench"]).arg(raw_file(&data)?);
                command
            }
            ServerKind::NbdkitFile => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--ipaddr=127.0.0.1", &format!("--port={port}")]);
                command.arg("file").arg(raw_file(&data)?);
                command
            }
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", kind.describe()))?;
        let mut server = Self { child, port, data };
        server.wait_for_port(kind)?;
        Ok(server)
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/bench", self.port)
    }

    fn wait_for_port(&mut self, kind: ServerKind) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once: {status}", kind.describe());
            }
            if Instant::now() > deadline {
                bail!("{} did not listen within {START_DEADLINE:?}", kind.describe());
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only what this run started, by its pid.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.data);
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

fn cinderblock(replica: &Path, data: &Path, port: u16) -> Result<Command> {
    fs::create_dir_all(data).context("create the data directory")?;
    let (grpc, http) = (free_port()?, free_port()?);
    let cluster = data.join("cluster.toml");
    let text = format!(
        r#"name = "bench"
[[nodes]]
name = "nbd-1-1"
nbd = "127.0.0.1:{port}"
grpc = "127.0.0.1:{grpc}"
http = "127.0.0.1:{http}"
[[shards]]
replicas = ["nbd-1-1"]
"#
    );
    fs::write(&cluster, text).context("write cluster.toml")?;
    let mut command = Command::new(replica);
    command.arg("--cluster").arg(cluster).args(["--node", "nbd-1-1"]);
    command.arg("--data-dir").arg(data.join("replica"));
    Ok(command)
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
