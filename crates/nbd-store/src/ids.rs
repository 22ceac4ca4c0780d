//! Identities inside a shard.

use std::fmt;

use nbd_topology::ShardId;

/// A volume, for the life of its cluster: the shard in the upper 32 bits, a number that rises by
/// one with each volume of the shard in the lower. Never 0, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u64);

/// One logical client of a volume. 128 random bits drawn by whoever opens the session; 0 is
/// "no session".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u128);

/// Generation of a session: rises with each resume, so that what an earlier connection left in
/// flight can be told and refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

/// Place of a chunk in its volume: byte offset / 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(pub u64);

/// Who holds a session open: one life of one node's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Owner {
    /// The node: XXH3-64 of its name.
    pub node: u64,
    /// Tells this life of the node's process from earlier ones: higher than theirs.
    pub incarnation: u64,
}

impl VolumeId {
    /// The `number`-th volume of `shard`.
    pub(crate) const fn new(shard: ShardId, number: u32) -> Self {
        Self((shard.0 as u64) << 32 | number as u64)
    }

    /// The id that follows.
    pub(crate) const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The shard that the volume belongs to.
    #[must_use]
    pub const fn shard(self) -> ShardId {
        ShardId((self.0 >> 32) as u32)
    }
}

impl Epoch {
    /// The epoch that a session is opened with.
    pub const FIRST: Self = Self(1);
}

impl SessionId {
    /// "No session": metadata operations carry it.
    pub const NONE: Self = Self(0);
}

impl ChunkIndex {
    /// The chunk that follows.
    pub(crate) const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
