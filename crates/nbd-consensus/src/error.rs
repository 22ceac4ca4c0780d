//! Errors of [`Group::new`](crate::Group::new) and of peer messages.

use std::time::Duration;

use nbd_topology::{LogIndex, Term};

use crate::limits::{LEARNERS_MAX, TICK_MAX, VOTERS_MAX};

/// A group that cannot be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// The membership is not of 1 to [`VOTERS_MAX`] voters and at most [`LEARNERS_MAX`] learners.
    #[error(
        "a group has 1 to {VOTERS_MAX} voters and at most {LEARNERS_MAX} learners, \
         not {voters} and {learners}"
    )]
    Members {
        /// Voters given.
        voters: usize,
        /// Learners given.
        learners: usize,
    },
    /// `0 < tick <= TICK_MAX` does not hold.
    #[error("a tick of {tick:?} is not above 0 and at most {TICK_MAX:?}")]
    Tick {
        /// The tick given.
        tick: Duration,
    },
    /// `0 < heartbeat_ticks < election_ticks` does not hold, or ticks are above 2^30.
    #[error(
        "heartbeat of {heartbeat} ticks and election timeout of {election}: \
         0 < heartbeat < election <= 2^30 must hold"
    )]
    Ticks {
        /// Heartbeat interval given.
        heartbeat: u32,
        /// Election timeout given.
        election: u32,
    },
    /// `0 < entry_bytes_max <= uncommitted_bytes_max` does not hold, or the latter is less than one
    /// message ([`MESSAGE_BYTES_MAX`](crate::limits::MESSAGE_BYTES_MAX)).
    #[error("entries of {entry} bytes do not fit into {uncommitted} uncommitted bytes")]
    Sizes {
        /// Largest entry given.
        entry: usize,
        /// Uncommitted bytes given.
        uncommitted: usize,
    },
    /// `compacted <= applied <= commit <= last` does not hold in what was recovered.
    #[error(
        "recovered log is inconsistent: \
         compacted {compacted}, applied {applied}, commit {commit}, last {last}"
    )]
    Indexes {
        /// Index compacted to.
        compacted: LogIndex,
        /// Index applied.
        applied: LogIndex,
        /// Index committed, from the hard state.
        commit: LogIndex,
        /// Last index, from the number of terms.
        last: LogIndex,
    },
    /// A recovered entry's term is less than its predecessor's, or more than the hard state's.
    #[error(
        "recovered entry {index} of term {term} does not fit \
         between its neighbours and term {current}"
    )]
    Terms {
        /// The entry.
        index: LogIndex,
        /// Its term.
        term: Term,
        /// The hard state's term.
        current: Term,
    },
    /// The recovered tail is not exactly the entries above the applied index.
    #[error("recovered entries above {applied} are not without gaps at {index}")]
    Tail {
        /// Index applied.
        applied: LogIndex,
        /// The first index that is missing, out of place or of another term than recorded.
        index: LogIndex,
    },
}

/// A peer's message that was refused. The peer is broken, of another cluster, or has lost its disk;
/// it is told nothing. Raft goes on as if the message had been lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not a message of this protocol.
    #[error("message cannot be decoded")]
    Malformed,
    /// Of a kind that peers do not send each other here: an event local to the sender, or a request
    /// that should have been refused there.
    #[error("message of kind {kind} is not one that peers send")]
    Kind {
        /// The kind's number in the protocol.
        kind: i32,
    },
    /// Meant for another replica.
    #[error("message is for replica {to}")]
    Recipient {
        /// The id in the message.
        to: u64,
    },
    /// Not from a member of this group, or from this replica itself. One that is no member as far
    /// as this replica knows may still be a new leader or candidate: such messages are taken. After
    /// a member was removed, answers of its that were on their way end here.
    #[error("message is from replica {from}, which is no peer in this group")]
    Sender {
        /// The id in the message.
        from: u64,
    },
    /// A term or index out of the range in which they can grow.
    #[error("message holds a term or index of {value}, beyond all bounds")]
    Range {
        /// The number in the message.
        value: u64,
    },
    /// Entries that are not in order, or of a later term than the message.
    #[error("entries are out of order at index {index}")]
    Entries {
        /// Index of the first entry that does not fit.
        index: u64,
    },
    /// An entry larger than [`GroupConfig::entry_bytes_max`](crate::GroupConfig).
    #[error("entry {index} has {bytes} bytes")]
    EntryTooLarge {
        /// The entry.
        index: u64,
        /// Its length.
        bytes: usize,
    },
    /// An entry whose data does not have the checksums inside it
    /// ([`GroupConfig::is_sound`](crate::GroupConfig)): it was damaged at the sender.
    #[error("the data of entry {index} does not have its checksums")]
    Damaged {
        /// The entry.
        index: u64,
    },
    /// A leader says that more is committed than this replica has. It acknowledged entries that it
    /// no longer has: its disk was wiped or replaced under its old id.
    #[error("leader has committed {commit} here, but the log ends at {last}: was this disk wiped?")]
    CommitBeyondLog {
        /// Committed, says the leader.
        commit: u64,
        /// The log's end.
        last: u64,
    },
    /// A snapshot without an index, term or voters, of a later term than the message, or with data:
    /// contents are not sent as Raft snapshots.
    #[error("snapshot at index {index} makes no sense")]
    Snapshot {
        /// The snapshot's index.
        index: u64,
    },
    /// A follower acknowledges or names an index that this leader does not have.
    #[error("follower names index {index}, but the log ends at {last}")]
    IndexBeyondLog {
        /// The index in the message.
        index: u64,
        /// The log's end.
        last: u64,
    },
}
