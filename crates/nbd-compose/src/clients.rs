//! Other people's clients, at the one published address.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nbd_testkit::tools::missing;

use crate::bounded;
use crate::cluster::Cluster;

/// Time for one run of a client.
const CLIENT_MAX: Duration = Duration::from_secs(60);

/// The programs.
const TOOLS: [&str; 3] = ["nbdinfo", "nbdcopy", "qemu-io"];

/// Size of a volume that nobody gave one, as compose.yaml has it.
const DEFAULT_SIZE: &str = "1073741824";

/// Bytes of the image that is copied in.
pub(crate) const IMAGE_BYTES: usize = 8 << 20;

/// Bytes that qemu-io writes, and the volume for it.
pub(crate) const PATTERN_BYTES: usize = 2 << 20;

const QEMU_VOLUME: &str = "by-qemu-io";

const COPY_VOLUME: &str = "by-nbdcopy";

/// An image that was copied into a volume, to be found there ever after.
#[derive(Debug)]
pub(crate) struct Copied {
    directory: tempfile::TempDir,
    image: PathBuf,
}

/// Has each client do what it is for.
///
/// # Errors
/// One fails, or sees what is not so. `Ok(None)`: some are not installed.
pub(crate) fn use_all(cluster: &Cluster) -> anyhow::Result<Option<Copied>> {
    if !missing(&TOOLS).is_empty() {
        return Ok(None);
    }
    let size = run("nbdinfo", &["--size", &cluster.uri("by-nbdinfo")])?;
    if size.trim() != DEFAULT_SIZE {
        bail!("nbdinfo says that a new volume has {size:?} bytes");
    }
    let write = format!("write -P 0xa5 1M {PATTERN_BYTES}");
    let commands = [&write, "flush", "read -P 0xa5 1M 2M", "read -P 0 0 1M", "read -P 0 3M 64k"];
    let mut words = vec!["-f", "raw"];
    words.extend(commands.iter().flat_map(|command| ["-c", command]));
    let uri = cluster.uri(QEMU_VOLUME);
    words.push(&uri);
    let said = run("qemu-io", &words)?;
    if said.contains("verification failed") || said.contains("failed:") {
        bail!("qemu-io: {said}");
    }

    let directory = tempfile::tempdir().context("make a directory for images")?;
    let image = directory.path().join("image");
    let mut content = vec![0; IMAGE_BYTES];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut content))?;
    fs::write(&image, &content)?;
    run("nbdcopy", &["--flush", path(&image)?, &cluster.uri(COPY_VOLUME)])?;
    let copied = Copied { directory, image };
    copied.check(cluster)?;
    Ok(Some(copied))
}

impl Copied {
    /// Copies the volume out and compares.
    ///
    /// # Errors
    /// It is not as it was copied in.
    pub(crate) fn check(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let back = self.directory.path().join("back");
        run("nbdcopy", &[&cluster.uri(COPY_VOLUME), path(&back)?])?;
        let mut content = vec![0; IMAGE_BYTES];
        File::open(&back)?.read_exact(&mut content)?;
        fs::remove_file(&back)?;
        if content != fs::read(&self.image)? {
            bail!("what nbdcopy reads is not what it wrote");
        }
        Ok(())
    }
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a temporary directory is not UTF-8")
}

fn run(program: &str, words: &[&str]) -> anyhow::Result<String> {
    bounded::output(Command::new(program).args(words), CLIENT_MAX)
}
