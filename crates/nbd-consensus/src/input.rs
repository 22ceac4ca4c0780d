//! What a [`Group`](crate::Group) is told.

use bytes::Bytes;
use nbd_topology::{LogIndex, ReplicaId, Term};

/// Names one proposal or read of the caller. Chosen by the caller, unique among those unanswered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Number of a batch of updates that must become durable, from [`Append`](crate::Append). Grows
/// within the life of one [`Group`](crate::Group); starts over with the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadyNumber(pub u64);

/// What an entry carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A proposal's data, or nothing: a new leader's first entry is an empty command.
    Command,
    /// A single membership change, encoded by this crate.
    ConfChange,
    /// A membership change of several steps, encoded by this crate.
    ConfChangeV2,
}

/// One entry of the group's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place. Without gaps from one entry to the next.
    pub index: LogIndex,
    /// The term of the leader that made it.
    pub term: Term,
    /// What `data` is.
    pub kind: EntryKind,
    /// Opaque to this crate if `kind` is [`EntryKind::Command`]; shared, not copied.
    pub data: Bytes,
}

/// Data that the leader is asked to put into the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// Comes back with the committed entry, or with the reason why there is none.
    pub ticket: Ticket,
    /// The entry's data, at most [`GroupConfig::entry_bytes_max`](crate::GroupConfig) bytes.
    pub data: Bytes,
}

/// One event. Any input may be stepped at any time; several [`Append`](crate::Append)s may be
/// outstanding meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// One unit of time has passed. After a pause, one tick and not the backlog.
    Tick,
    /// A message from a peer, byte for byte what its [`OutMessage`](crate::OutMessage) held. Every
    /// payload in it has arrived and its checksum is right.
    Message(Bytes),
    /// Put these into the log, in this order.
    Propose(Vec<Proposal>),
    /// The append of this number, and every earlier one, is on stable storage. Numbers may be
    /// skipped, never repeated or taken back.
    Persisted(ReadyNumber),
    /// Every entry up to this index that was handed out in [`Effects::apply`](crate::Effects) is
    /// applied. Never beyond what was handed out, never less than last time.
    Applied(LogIndex),
    /// The log up to this index, and no further, may be forgotten: a durable checkpoint covers it.
    /// At most the applied index; less than last time is ignored.
    Compacted(LogIndex),
    /// The stream to this peer broke. Not for a single dropped message: it costs the peer its
    /// pipeline until it answers again.
    PeerUnreachable(ReplicaId),
    /// Find the index that makes a read that starts now linearizable.
    Read(Vec<Ticket>),
    /// Stand for election now. A group of one voter leads at once, without an election timeout.
    Campaign,
    /// Hand leadership to this replica. Ignored unless leader.
    TransferLeader(ReplicaId),
    /// The answer to a [`Fetch`](crate::Fetch): entries from `first` on without a gap, at least one
    /// and no more than were asked for, or none if the log could not be read.
    Fetched {
        /// The `first` of the request.
        first: LogIndex,
        /// The entries, as they are in the log.
        entries: Vec<Entry>,
    },
}
