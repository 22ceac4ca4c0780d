//! What the log is given and gives back.

use std::fmt;

use bytes::Bytes;
use nbd_topology::{LogIndex, ShardId, Term};

/// A byte's place in the log: segment sequence number times segment size, plus the offset in the
/// segment. Rises for ever; 0 is never the place of anything, since sequence numbers start at 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPosition(pub u64);

impl LogPosition {
    /// The place `bytes` further on.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What Raft must not forget about a group besides its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    /// Latest term the replica has seen.
    pub term: Term,
    /// Replica that it voted for in `term`, 0 for none.
    pub vote: u64,
    /// Highest index known to be committed. May lag behind the truth.
    pub commit: LogIndex,
}

/// What an entry's data means to Raft. The numbers are those on disk, and Raft's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryKind {
    /// Commands for the state machine, or nothing (a new leader's first entry).
    Command = 0,
    /// A membership change of the first form.
    ConfChange = 1,
    /// A membership change of the second form.
    ConfChangeV2 = 2,
}

impl EntryKind {
    /// The kind with this number on disk.
    #[must_use]
    pub const fn from_u8(kind: u8) -> Option<Self> {
        match kind {
            0 => Some(Self::Command),
            1 => Some(Self::ConfChange),
            2 => Some(Self::ConfChangeV2),
            _ => None,
        }
    }
}

/// Something to append.
#[derive(Debug, Clone, Copy)]
pub enum Record<'a> {
    /// The group's hard state from here on. The last one written counts.
    HardState(ShardId, HardState),
    /// An entry. It supersedes earlier ones of its group at its index and above.
    Entry(EntryRecord<'a>),
}

/// An entry to append.
#[derive(Debug, Clone, Copy)]
pub struct EntryRecord<'a> {
    /// The group that it belongs to.
    pub shard: ShardId,
    /// Its place in the group's log.
    pub index: LogIndex,
    /// The term of the leader that made it.
    pub term: Term,
    /// What `data` means to Raft.
    pub kind: EntryKind,
    /// The payload, at most `LogOptions::entry_bytes_max`. The reader's cache keeps a reference.
    pub data: &'a Bytes,
}

/// Something that recovery found, in the order in which it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScannedRecord<'a> {
    /// A group's hard state.
    HardState(ShardId, HardState),
    /// An entry.
    Entry(ScannedEntry<'a>),
}

/// An entry that recovery found. Its data lasts as long as the call; the position given with it
/// fetches it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScannedEntry<'a> {
    /// The group that it belongs to.
    pub shard: ShardId,
    /// Its place in the group's log.
    pub index: LogIndex,
    /// The term of the leader that made it.
    pub term: Term,
    /// What `data` means to Raft.
    pub kind: EntryKind,
    /// The payload.
    pub data: &'a [u8],
}

/// Fingerprint of the cluster, node and data directory that a log belongs to. Every segment carries
/// it, so that a file copied in from elsewhere is not taken for part of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogIdentity(pub u64);

impl fmt::Display for LogIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
