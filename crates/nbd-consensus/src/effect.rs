//! What a [`Group`](crate::Group) wants done, and how it stands.

use bytes::Bytes;
use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, Term};

use crate::error::MessageError;
use crate::input::{Entry, ReadyNumber, Ticket, Timestamp};

/// The part of Raft's state that must survive a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    /// Highest term seen. Never goes back.
    pub term: Term,
    /// Whom this replica voted for in `term`, if anyone.
    pub vote: Option<ReplicaId>,
    /// Highest index known to be committed when this was written; a lower bound of the truth.
    /// `applied <= commit <= last` of what is on stable storage at the time.
    pub commit: LogIndex,
}

/// Updates for the log. Carried out in the order of their numbers, as they came out of
/// [`Effects::appends`]; several may be written in one go.
///
/// **Order within one append**: `hard_state` is written before `entries`, or in the same atomic
/// unit. `hard_state.commit` therefore never claims an entry of its own append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Append {
    /// To be reported in [`Input::Persisted`](crate::Input::Persisted).
    pub ready: ReadyNumber,
    /// Entries without gaps. If the first is at or below the log's last index, everything from
    /// there on is replaced.
    pub entries: Vec<Entry>,
    /// The hard state, if it changed since the last append.
    pub hard_state: Option<HardState>,
    /// Whether this append itself needs a flush. False only for an append that holds nothing but
    /// messages: it is durable as soon as its predecessors are.
    pub must_sync: bool,
    /// To be sent once `Persisted` was stepped for this append, and not before: votes and append
    /// responses promise that it is on stable storage.
    pub send_after_persist: Vec<OutMessage>,
}

impl Append {
    /// Whether there is nothing to write: the append only holds messages back until its
    /// predecessors are durable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.hard_state.is_none()
    }
}

/// A message for a peer. May be lost, delayed, repeated and overtaken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutMessage {
    /// The receiver.
    pub to: ReplicaId,
    /// Whether it is of the stream of entries, which is in order and may be long. The others
    /// (heartbeats, votes, answers) are small, and should not queue behind it.
    pub bulk: bool,
    /// The message, opaque: for [`Input::Message`](crate::Input::Message) of the receiver.
    pub bytes: Bytes,
}

/// A committed entry, to be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The entry.
    pub entry: Entry,
    /// The proposal it came from, if that was made here and since the last restart.
    pub ticket: Option<Ticket>,
    /// The membership change that the entry is, if it is one that has an effect.
    pub change: Option<MembershipChange>,
    /// The members from this entry on, if it changed them. In force here as of this step.
    pub membership: Option<Membership>,
}

/// A leader offers its state machine instead of its log, which no longer reaches back far enough
/// for this replica. Nothing has happened yet: fetch the contents by other means, install them, and
/// step [`Input::SnapshotInstalled`](crate::Input::SnapshotInstalled). The offer is repeated for as
/// long as this replica has not caught up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotOffer {
    /// The leader.
    pub from: ReplicaId,
    /// The last entry the leader's checkpoint covers. The contents may come from a later one.
    pub index: LogIndex,
    /// Its term.
    pub term: Term,
}

/// Why a proposal or a read did not come through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RejectReason {
    /// Not the leader. Nothing was logged; ask `leader` if known, else wait for an election.
    #[error("not the leader")]
    NotLeader {
        /// The leader as far as this replica knows.
        leader: Option<ReplicaId>,
    },
    /// Too many bytes uncommitted, or too many reads waiting. Nothing was logged; hold the request
    /// and try again after the next commit.
    #[error("too much is waiting to be committed")]
    Full,
    /// The last membership change is not yet applied here, or this new leader has not yet applied
    /// an entry of its own. Nothing was logged; try again.
    #[error("an earlier membership change is under way")]
    MembershipBusy,
    /// The membership change would change nothing, or leave no voter. Nothing was logged.
    #[error("the membership change has no effect")]
    NoEffect,
    /// There are as many voters, or learners, as there may be. Nothing was logged.
    #[error("the group has as many members as it may have")]
    TooManyMembers,
    /// Of the voters that would be left, too few are active for a majority: the group would stop.
    /// Nothing was logged.
    #[error("too few of the voters that would be left are active")]
    QuorumAtRisk,
    /// The new voter is not a learner whose log has nearly caught up. Nothing was logged; add it as
    /// a learner, and try again later.
    #[error("the new voter has to catch up as a learner first")]
    NotCaughtUp,
    /// Leadership is being handed over. Nothing was logged; try again.
    #[error("leadership is being transferred")]
    Transferring,
    /// The data is longer than [`GroupConfig::entry_bytes_max`](crate::GroupConfig). Nothing was
    /// logged; trying again does not help.
    #[error("the proposal is larger than an entry may be")]
    TooLarge,
    /// It was logged, and then another leader's entry was committed in its place or before it: it
    /// did not happen and never will.
    #[error("another leader's entry was committed instead")]
    Superseded,
    /// It was logged, and then this replica's log gave way to a snapshot that reaches past it:
    /// whether it happened is not known here.
    #[error("a snapshot took the place of the log that would have told")]
    Unknown,
}

/// What part this replica plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Takes entries from a leader, or waits for one.
    Follower,
    /// Asks whether an election could be won, without disturbing anyone.
    PreCandidate,
    /// Stands for election.
    Candidate,
    /// Orders the log.
    Leader,
}

/// Who leads, as far as this replica knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// This replica's role.
    pub role: Role,
    /// The term in which `role` and `leader` hold.
    pub term: Term,
    /// The leader, if one is known.
    pub leader: Option<ReplicaId>,
}

/// Entries that a follower needs and that are no longer in memory, to be read from the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// The first entry wanted.
    pub first: LogIndex,
    /// The last entry wanted, `first <= last`.
    pub last: LogIndex,
    /// Stop before the data exceeds this many bytes, but not before the first entry.
    pub bytes_max: u64,
}

/// Everything one step wants done. The lists are in order; between them there is none, other than
/// that nothing in an [`Append::send_after_persist`] may go out early.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effects {
    /// For the log. Seldom more than one: one step may make raft-rs produce several readys, and
    /// each becomes an append of its own, for merging them would tie the first one's messages to
    /// the last one's flush.
    pub appends: Vec<Append>,
    /// For the peers, at once.
    pub send_now: Vec<OutMessage>,
    /// For the state machine: each committed entry exactly once per life of the group, by index
    /// without gaps but for what an installed snapshot covers, and only when it is also durable
    /// here.
    pub apply: Vec<Committed>,
    /// Proposals and reads that did not come through.
    pub rejected: Vec<(Ticket, RejectReason)>,
    /// Reads that may be served as soon as everything up to the index is applied.
    pub reads_ready: Vec<(Ticket, LogIndex)>,
    /// Set if role, term or leader changed.
    pub role_changed: Option<Leadership>,
    /// Entries to be read for followers that lag.
    pub fetch: Vec<Fetch>,
    /// Set if the leader cannot feed this replica from its log.
    pub snapshot_offered: Option<SnapshotOffer>,
    /// Set if the step was a peer's message that made no sense. It had no effect.
    pub refused: Option<MessageError>,
}

impl Effects {
    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A follower, voter or learner, as its leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    /// The follower.
    pub replica: ReplicaId,
    /// Its log is known to agree with the leader's up to here.
    pub matched: LogIndex,
    /// Whether it was heard from within the last election timeout.
    pub active: bool,
    /// Whether it is a learner.
    pub learner: bool,
    /// Whether it was offered a snapshot and has not caught up with it.
    pub snapshot: bool,
}

/// How a group stands, in short. See [`Status`] for what the fields mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brief {
    /// This replica's role.
    pub role: Role,
    /// The current term.
    pub term: Term,
    /// The leader, if known.
    pub leader: Option<ReplicaId>,
    /// Highest index known to be committed.
    pub committed: LogIndex,
    /// Highest index the caller has applied.
    pub applied: LogIndex,
    /// Whether this replica leads and has applied an entry of its own term.
    pub serving: bool,
}

/// How a group stands. `applied <= min(committed, persisted)`, `committed <= last`,
/// `persisted <= last`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// This replica's role.
    pub role: Role,
    /// The current term.
    pub term: Term,
    /// The leader, if known.
    pub leader: Option<ReplicaId>,
    /// Whether this replica leads and has applied an entry of its own term: only then does its
    /// state machine hold everything that was ever acknowledged.
    pub serving: bool,
    /// Everything up to here is forgotten (but for this index's term).
    pub compacted: LogIndex,
    /// Highest index the caller has applied.
    pub applied: LogIndex,
    /// Highest index handed out to be applied.
    pub handed_out: LogIndex,
    /// Highest index known to be committed.
    pub committed: LogIndex,
    /// Highest index on this replica's stable storage.
    pub persisted: LogIndex,
    /// Highest index in the log.
    pub last: LogIndex,
    /// Appends not yet reported as persisted.
    pub appends_outstanding: usize,
    /// Proposals made here whose outcome is open.
    pub proposals_open: usize,
    /// Reads waiting for a barrier.
    pub reads_waiting: usize,
    /// Bytes of proposals logged by this leader and not yet committed.
    pub uncommitted_bytes: usize,
    /// The members in force: as of `handed_out`.
    pub membership: Membership,
    /// To whom this leader is handing over.
    pub transferring: Option<ReplicaId>,
    /// As [`Group::read_lease`](crate::Group::read_lease).
    pub lease_until: Option<Timestamp>,
    /// The followers, by id; empty unless leader.
    pub peers: Vec<PeerStatus>,
}
