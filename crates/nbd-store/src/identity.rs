//! Whose data directory this is.
//!
//! The file `identity`, 176 bytes, little-endian, is written once, when an empty directory is taken
//! into use, and appears under its name only when it is complete.
//!
//! ```text
//! 0           8            12          13       14       16              32               40
//! +-----------+------------+-----------+--------+--------+---------------+----------------+
//! | magic     | version u32| cluster   | node   | 0      | directory id  | segment bytes  |
//! | "CNDRBLCK"| 1          | length u8 | len u8 | u16    | u128, random  | u64            |
//! +-----------+------------+-----------+--------+--------+---------------+----------------+
//! 40                        104                      168        172       176
//! +-------------------------+------------------------+----------+---------+
//! | cluster name, 0-padded  | node name, 0-padded    | crc32c   | 0 u32   |
//! +-------------------------+------------------------+----------+---------+
//! ```
//!
//! The checksum covers bytes 0 to 168.

use std::io;

use nbd_log::checksum::crc32c;
use nbd_log::io::{Disk, OpenMode};
use nbd_log::log::LogIdentity;
use nbd_topology::ids::NAME_BYTES_MAX;
use nbd_topology::{ClusterName, NodeName};
use rand::{Rng, RngCore};

/// Name of the file.
pub(crate) const IDENTITY_FILE: &str = "identity";
/// Its name while it is being written.
const UNFINISHED_FILE: &str = "identity.new";
/// Name of the lock file.
pub(crate) const LOCK_FILE: &str = "lock";
/// What a directory without identity may hold: what is there before the identity is, and what a
/// file system puts into its root.
const HARMLESS_FILES: [&str; 3] = [LOCK_FILE, UNFINISHED_FILE, "lost+found"];

const MAGIC: [u8; 8] = *b"CNDRBLCK";
const VERSION: u32 = 1;
const IDENTITY_BYTES: usize = 176;

/// Whose data directory this is, and what is fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterName,
    /// The node.
    pub node: NodeName,
    /// Tells this directory from an earlier one of the same node.
    pub directory: u128,
    /// Size of a log segment.
    pub segment_bytes: u64,
}

/// Why a data directory is not this node's.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There are files, but none of ours.
    #[error("the data directory is not empty and has no identity file: it holds {found:?}")]
    NotEmpty {
        /// The first file found.
        found: String,
    },
    /// The identity file is not one.
    #[error("the identity file is damaged")]
    Damaged,
    /// Written by another version of this program.
    #[error("the data directory has format version {found}, this program reads {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Another cluster's.
    #[error("the data directory belongs to cluster {found}, not {expected}")]
    Cluster {
        /// The cluster of this process.
        expected: ClusterName,
        /// The cluster in the file.
        found: ClusterName,
    },
    /// Another node's.
    #[error("the data directory belongs to node {found}, not {expected}")]
    Node {
        /// The node of this process.
        expected: NodeName,
        /// The node in the file.
        found: NodeName,
    },
    /// Made with another segment size, which is fixed for a directory's life.
    #[error("the data directory has log segments of {found} bytes, not {expected}")]
    SegmentBytes {
        /// The size asked for.
        expected: u64,
        /// The size in the file.
        found: u64,
    },
    /// The disk failed.
    #[error("cannot read or write the identity file")]
    Io(#[from] io::Error),
}

impl Identity {
    /// What the log's segments carry.
    #[must_use]
    pub fn fingerprint(&self) -> LogIdentity {
        let (high, low) = (self.directory >> 64, self.directory & u128::from(u64::MAX));
        LogIdentity(u64::try_from(high ^ low).expect("both halves have 64 bits"))
    }

    /// Refuses a directory that holds something else, without changing anything in it.
    pub(crate) fn refuse_foreign(disk: &dyn Disk) -> Result<(), IdentityError> {
        if disk.exists(IDENTITY_FILE)? {
            return Ok(());
        }
        let mut files = disk.list("")?.into_iter();
        match files.find(|name| !HARMLESS_FILES.contains(&name.as_str())) {
            Some(found) => Err(IdentityError::NotEmpty { found }),
            None => Ok(()),
        }
    }

    /// The identity of a data directory, `None` of an empty one. Changes nothing.
    ///
    /// # Errors
    /// The directory holds something else, its identity is damaged or of another version, or the
    /// disk fails.
    pub fn peek(disk: &dyn Disk) -> Result<Option<Self>, IdentityError> {
        if disk.exists(IDENTITY_FILE)? {
            return Self::read(disk).map(Some);
        }
        Self::refuse_foreign(disk)?;
        Ok(None)
    }

    fn read(disk: &dyn Disk) -> Result<Self, IdentityError> {
        let file = disk.open(IDENTITY_FILE, OpenMode::Existing)?;
        let mut bytes = [0; IDENTITY_BYTES];
        if file.len()? != IDENTITY_BYTES as u64 {
            return Err(IdentityError::Damaged);
        }
        file.read_exact_at(&mut bytes, 0)?;
        Self::decode(&bytes)
    }

    /// Reads the identity of the data directory, or gives an empty directory one.
    pub(crate) fn open(
        disk: &dyn Disk,
        cluster: &ClusterName,
        node: &NodeName,
        segment_bytes: u64,
        rng: &mut dyn RngCore,
    ) -> Result<Self, IdentityError> {
        let Some(found) = Self::peek(disk)? else {
            let (cluster, node) = (cluster.clone(), node.clone());
            let new = Self { cluster, node, directory: rng.random(), segment_bytes };
            new.create(disk)?;
            return Ok(new);
        };
        if found.cluster != *cluster {
            return Err(IdentityError::Cluster { expected: cluster.clone(), found: found.cluster });
        }
        if found.node != *node {
            return Err(IdentityError::Node { expected: node.clone(), found: found.node });
        }
        if found.segment_bytes != segment_bytes {
            let (expected, found) = (segment_bytes, found.segment_bytes);
            return Err(IdentityError::SegmentBytes { expected, found });
        }
        Ok(found)
    }

    fn create(&self, disk: &dyn Disk) -> io::Result<()> {
        let file = disk.open(UNFINISHED_FILE, OpenMode::CreateOrOpen)?;
        file.set_len(0)?;
        file.write_at(&self.encode(), 0)?;
        file.sync()?;
        disk.rename(UNFINISHED_FILE, IDENTITY_FILE)?;
        disk.sync_dir("")
    }

    fn encode(&self) -> [u8; IDENTITY_BYTES] {
        let len = |name: &str| u8::try_from(name.len()).expect("names are bounded");
        let mut out = [0; IDENTITY_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12] = len(self.cluster.as_str());
        out[13] = len(self.node.as_str());
        out[16..32].copy_from_slice(&self.directory.to_le_bytes());
        out[32..40].copy_from_slice(&self.segment_bytes.to_le_bytes());
        for (at, name) in [(40, self.cluster.as_str()), (104, self.node.as_str())] {
            out[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
        let crc = crc32c(&out[..168]);
        out[168..172].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; IDENTITY_BYTES]) -> Result<Self, IdentityError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if bytes[..8] != MAGIC || crc32c(&bytes[..168]) != u32_at(168) {
            return Err(IdentityError::Damaged);
        }
        if u32_at(8) != VERSION {
            return Err(IdentityError::Version { found: u32_at(8) });
        }
        let name = |at: usize, len: u8| {
            let len = usize::from(len);
            let text = bytes[at..at + NAME_BYTES_MAX].get(..len);
            text.and_then(|text| std::str::from_utf8(text).ok()).ok_or(IdentityError::Damaged)
        };
        Ok(Self {
            cluster: name(40, bytes[12])?.parse().map_err(|_| IdentityError::Damaged)?,
            node: name(104, bytes[13])?.parse().map_err(|_| IdentityError::Damaged)?,
            directory: u128::from_le_bytes(bytes[16..32].try_into().expect("16 bytes")),
            segment_bytes: u64::from_le_bytes(bytes[32..40].try_into().expect("8 bytes")),
        })
    }
}

#[cfg(test)]
mod tests;
