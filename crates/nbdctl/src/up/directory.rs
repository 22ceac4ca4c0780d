//! The directory of a cluster: `cluster.toml`, and a data directory for each node.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nbd_log::io::FileDisk;
use nbd_service::{ClusterConfig, Failure};
use nbd_store::Identity;
use nbd_topology::NodeName;

use super::shape;

/// Describes the cluster, for all its processes.
const CLUSTER_FILE: &str = "cluster.toml";

/// Its name while it is being written.
const UNFINISHED_FILE: &str = "cluster.toml.new";

/// Held by the `nbdctl up` that runs the cluster.
const LOCK_FILE: &str = "up.lock";

/// What a reader of the file should know.
const HEADER: &str = "\
# Written by `nbdctl up`, and read by it at each start. Addresses may be changed while the cluster
# is down; names, the number of shards and the order of their replicas never.
";

/// A cluster's directory, kept from other `nbdctl up` until this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    _lock: File,
}

/// What is in a directory.
#[derive(Debug)]
pub(super) enum Contents {
    /// No node.
    Nothing,
    /// The one node of versions that ran no other, and wrote no `cluster.toml`.
    OneNode(Identity),
    /// A cluster.
    Cluster(ClusterConfig),
}

impl Directory {
    /// Opens a directory that exists; `None` if there is none.
    pub(super) fn open(path: &Path) -> anyhow::Result<Option<Self>> {
        let mut options = File::options();
        let lock = path.join(LOCK_FILE);
        match options.read(true).write(true).create(true).truncate(false).open(&lock) {
            Ok(lock) => Self::locked(path, lock).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot use the directory {}", path.display()))
            }
        }
    }

    /// Makes the directory.
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        let unusable = || format!("cannot make the directory {}", path.display());
        fs::create_dir_all(path).with_context(unusable)?;
        let directory = Self::open(path)?.context("it is gone again").with_context(unusable)?;
        if fs::exists(Self::cluster_file(path)).with_context(unusable)? {
            bail!("another nbdctl up has just made a cluster in {}", path.display());
        }
        Ok(directory)
    }

    fn locked(path: &Path, lock: File) -> anyhow::Result<Self> {
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                bail!("the directory {} is in use by another nbdctl up", path.display())
            }
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock the directory {}", path.display()))
            }
        }
    }

    /// Where the cluster in the directory `path` is described.
    pub(super) fn cluster_file(path: &Path) -> PathBuf {
        path.join(CLUSTER_FILE)
    }

    /// Where a node of the cluster in the directory `path` keeps its data.
    pub(super) fn of_node(path: &Path, node: &NodeName) -> PathBuf {
        path.join(node.as_str())
    }

    /// Looks at what is there.
    ///
    /// # Errors
    /// A `cluster.toml` that is none; the data of nodes, and none that tells of which cluster.
    pub(super) fn contents(&self) -> Result<Contents, Failure> {
        let file = Self::cluster_file(&self.path);
        if fs::exists(&file).with_context(|| format!("look for {}", file.display()))? {
            return ClusterConfig::load(&file).map(Contents::Cluster).map_err(Failure::usage);
        }
        let mut names = shape::all_names();
        let first = names.next().map(|first| self.identity(&first)).transpose()?.flatten();
        for node in names {
            if self.identity(&node)?.is_some() {
                let (there, file) = (Self::of_node(&self.path, &node), file.display());
                let there = there.display();
                // How many shards there are cannot be seen, and must not be guessed.
                let lost =
                    format!("{there} has data of a cluster whose {file} is gone: put it back");
                return Err(anyhow::anyhow!(lost).into());
            }
        }
        Ok(first.map_or(Contents::Nothing, Contents::OneNode))
    }

    /// Whose data is in a node's directory; `None` if there is none. Refuses what is no node's.
    fn identity(&self, node: &NodeName) -> anyhow::Result<Option<Identity>> {
        let path = Self::of_node(&self.path, node);
        let unusable = || format!("cannot use the data directory {}", path.display());
        if !fs::exists(&path).with_context(unusable)? {
            return Ok(None);
        }
        let disk = FileDisk::open(&path).with_context(unusable)?;
        Identity::peek(&disk).with_context(unusable)
    }

    /// Writes the description. It appears at once, or, after a crash, not at all.
    pub(super) fn store(&self, cluster: &ClusterConfig) -> anyhow::Result<()> {
        let (unfinished, file) = (self.path.join(UNFINISHED_FILE), Self::cluster_file(&self.path));
        let write = || -> io::Result<()> {
            let mut new = File::create(&unfinished)?;
            new.write_all(format!("{HEADER}{}", cluster.to_toml()).as_bytes())?;
            new.sync_all()?;
            fs::rename(&unfinished, &file)?;
            File::open(&self.path)?.sync_all()
        };
        write().with_context(|| format!("write {}", file.display()))
    }
}
