//! Images in formats that qemu knows: a `qemu-nbd` of our own makes the file one more NBD server,
//! on a Unix socket that only this user can reach.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::time::sleep;

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Time for `qemu-nbd` to listen, and to write back what it has when it is told to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A `qemu-nbd` that serves one image. Dropping it ends it.
#[derive(Debug)]
pub(super) struct QemuNbd {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

/// Whether a file's first bytes are those of a qcow2 image.
pub(super) fn is_qcow2(path: &Path) -> Result<bool> {
    let about = || format!("open {}", path.display());
    let mut start = Vec::new();
    let file = std::fs::File::open(path).with_context(about)?;
    file.take(4).read_to_end(&mut start).with_context(about)?;
    Ok(start == QCOW2_MAGIC)
}

impl QemuNbd {
    /// Serves the image at `path`. Must be called from a thread that lasts as long as the process:
    /// `qemu-nbd` ends with it.
    pub(super) async fn start(path: &Path, format: &str, read_only: bool) -> Result<Self> {
        let program = program("qemu-nbd")?;
        let directory = tempfile::tempdir().context("make a directory for a socket")?;
        let socket = directory.path().join("nbd");
        let nbdctl = std::env::current_exe().context("find nbdctl itself")?;
        let mut command = Command::new(nbdctl);
        command.args(["run-child", &format!("--parent={}", std::process::id()), "--"]);
        command.arg(program).args(["--persistent", "--shared=16", "--discard=unmap"]);
        command.arg(format!("--format={format}"));
        command.arg(format!("--socket={}", socket.display()));
        command.args(read_only.then_some("--read-only"));
        command.arg("--").arg(absolute(path)?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().context("start qemu-nbd")?;
        let mut server = Self { child, socket, _directory: directory };
        let began = Instant::now();
        // It listens before it has looked at the image.
        while greeting(&server.socket).await.is_err() {
            if server.child.try_wait().context("wait for qemu-nbd")?.is_some() {
                let reason = server.complaint();
                bail!("qemu-nbd cannot open {} as {format}: {reason}", path.display());
            }
            if began.elapsed() > PATIENCE {
                bail!("qemu-nbd does not serve {}", path.display());
            }
            sleep(Duration::from_millis(10)).await;
        }
        Ok(server)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Lets it write back all it has, and waits for its end.
    pub(super) async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("qemu-nbd has no process id")?;
        kill_process(pid, Signal::TERM).context("stop qemu-nbd")?;
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().context("wait for qemu-nbd")? {
                if status.success() {
                    return Ok(());
                }
                bail!("qemu-nbd ended with {status}: {}", self.complaint());
            }
            if began.elapsed() > PATIENCE {
                bail!("qemu-nbd does not stop");
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// What it wrote, once it has ended.
    fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            // What cannot be read is not there to be told.
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().replace("qemu-nbd: ", "")
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // It has ended already, unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the first bytes that an NBD server sends.
async fn greeting(socket: &Path) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut [0; 8])).await??;
    Ok(())
}

/// Makes an empty image of `size` bytes.
pub(super) fn create(path: &Path, format: &str, size: u64) -> Result<()> {
    let arguments = ["create", "-q", "-f", format];
    let mut command = Command::new(program("qemu-img")?);
    command.args(arguments).arg(absolute(path)?).arg(size.to_string());
    run(command, &format!("make an image {}", path.display()))
}

/// Gives back what an interrupted run has allocated and not used.
pub(super) fn repair_leaks(path: &Path, format: &str) -> Result<()> {
    let mut command = Command::new(program("qemu-img")?);
    command.args(["check", "-q", "-r", "leaks", "-f", format]).arg(absolute(path)?);
    run(command, &format!("check {}", path.display()))
}

fn run(mut command: Command, what: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| what.to_owned())?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(anyhow!("{}", text.trim())).with_context(|| what.to_owned())
}

/// So that no name is taken for a flag or a protocol (`json:`, `nbd:`).
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find {}", path.display()))
}

fn program(name: &str) -> Result<PathBuf> {
    super::super::attach::find_program(name).with_context(|| {
        format!(
            "images other than raw ones need {name}, which is not installed: \
             `apt install qemu-utils` (Debian, Ubuntu), `dnf install qemu-img` (Fedora)"
        )
    })
}
