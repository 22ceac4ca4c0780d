//! What a [`Group`](crate::Group) is told.

use bytes::Bytes;
use std::time::Duration;

use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, Term};

/// A moment, in nanoseconds of a clock that never goes back and counts suspended time
/// (`CLOCK_BOOTTIME`). Only differences matter, and only between moments of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Later than any moment.
    pub const MAX: Self = Self(u64::MAX);

    /// The moment this much later, at most [`Self::MAX`].
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }
}

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
    /// One unit of time has passed: at least [`GroupConfig::tick`](crate::GroupConfig::tick) since
    /// the tick before, by this replica's clock. After a pause, one tick and not the backlog, and
    /// the next a whole unit later: leases hold only if no follower's ticks run fast.
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
    /// A durable checkpoint of the state machine covers everything up to this entry, and nothing
    /// behind it. As leader this replica may offer it to followers that its log cannot feed. At
    /// most the applied index; less than last time is ignored.
    Checkpointed {
        /// The last entry covered.
        index: LogIndex,
        /// Its term.
        term: Term,
    },
    /// The log up to this index, and no further, may be forgotten: a durable checkpoint covers it.
    /// At most the applied index; less than last time is ignored. It may lag behind the checkpoint,
    /// for entries that followers still want.
    Compacted(LogIndex),
    /// The stream to this peer broke. Not for a single dropped message: it costs the peer its
    /// pipeline until it answers again.
    PeerUnreachable(ReplicaId),
    /// The connection to the leader broke. A hint that it may be dead, never a proof: this replica
    /// stands for election without the random part of the wait, in lease mode as soon as the
    /// leader's lease has run out, in quorum mode at once.
    LeaderLost,
    /// Find the index that makes a read that starts now linearizable.
    Read(Vec<Ticket>),
    /// Stand for election now. A group of one voter leads at once, without an election timeout.
    Campaign,
    /// Hand leadership to this replica. Ignored unless leader. The lease is given up for the rest
    /// of the term, even if the transfer fails: the request to take over may still arrive.
    TransferLeader(ReplicaId),
    /// Change the members. Refused unless it has an effect, no earlier change is under way and no
    /// majority is at risk; a newcomer has to catch up as a learner before it votes. It is in force
    /// when it comes back in [`Effects::apply`](crate::Effects).
    ChangeMembership {
        /// Comes back as that of a [`Proposal`].
        ticket: Ticket,
        /// The change.
        change: MembershipChange,
    },
    /// Whether entries that arrive, and news of what is committed, are to be treated as lost: for
    /// the time it takes to put a snapshot in place of the log, so that no entry is acknowledged
    /// that is then void. Ended by `SnapshotInstalled`. This replica does not stand for election
    /// meanwhile. Ignored as leader.
    HoldLog(bool),
    /// A snapshot is installed: the caller's state machine is durably as of this entry, and its log
    /// on disk is void up to and beyond it. [`Group::wants_snapshot`](crate::Group::wants_snapshot)
    /// must still say yes, everything handed out must be applied, and no entry be on its way to the
    /// disk: hold the log (`HoldLog`), let it settle, ask once more, install, step this.
    SnapshotInstalled {
        /// The last entry the state machine covers.
        index: LogIndex,
        /// Its term.
        term: Term,
        /// The members as of this entry. This replica may be missing: it was yet to be added.
        membership: Membership,
    },
    /// This follower cannot get the snapshot it was offered: offer one again with the next answer
    /// to a heartbeat. Ignored unless leader.
    SnapshotFailed(ReplicaId),
    /// The answer to a [`Fetch`](crate::Fetch): entries from `first` on without a gap, at least one
    /// and no more than were asked for, or none if the log could not be read.
    Fetched {
        /// The `first` of the request.
        first: LogIndex,
        /// The entries, as they are in the log.
        entries: Vec<Entry>,
    },
}
