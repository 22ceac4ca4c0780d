//! What a world can turn out to have broken.

use std::fmt;

use nbd_consensus::HardState;
use nbd_store::VolumeId;
use nbd_topology::{LogIndex, ReplicaId, ShardId, Term};

use crate::history::{OperationId, Value};
use crate::linear::Violation;
use crate::time::SimTime;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// What clients saw cannot be explained.
    #[error("not linearizable: {0}")]
    NotLinearizable(Box<Violation>),
    /// The checker gave up.
    #[error("the history of sector {sector} of volume {volume} is too tangled to be judged")]
    Undecided {
        /// The volume, counted from 0.
        volume: usize,
        /// The sector.
        sector: u64,
    },
    /// Two leaders in one term.
    #[error("replicas {leaders:?} both lead in term {term}")]
    TwoLeaders {
        /// The term.
        term: Term,
        /// Who was seen first, and who was seen then.
        leaders: [ReplicaId; 2],
    },
    /// Two replicas hold different entries for committed.
    #[error("replica {replica} has another entry {index} committed than its peers, or none")]
    CommittedDiffer {
        /// The replica.
        replica: ReplicaId,
        /// The entry.
        index: LogIndex,
    },
    /// A vote that was on stable storage is not there after a restart.
    #[error("after a restart the newest term is {found}, before it was {before:?}")]
    VoteLost {
        /// As it was on stable storage.
        before: HardState,
        /// As it was found.
        found: Term,
    },
    /// An entry that was on stable storage is not there after a restart.
    #[error("entry {index} of term {term} is gone after a restart")]
    EntryLost {
        /// The entry.
        index: LogIndex,
        /// Its term.
        term: Term,
    },
    /// A mutation was answered and had no effect.
    #[error("operation {0:?} was answered, but its command never took effect")]
    AnsweredWithoutEffect(OperationId),
    /// A mutation was accepted that the log forbids.
    #[error("mutation {seq} of session {session} was accepted in epoch {epoch}, against the log")]
    WrongVerdict {
        /// The session.
        session: nbd_store::SessionId,
        /// The epoch of the attachment that sent it.
        epoch: nbd_store::Epoch,
        /// Its number.
        seq: u64,
    },
    /// A mutation that cannot fail was rejected by the log.
    #[error("operation {0:?} was rejected: {1}")]
    Rejected(OperationId, nbd_store::Rejection),
    /// The log forgot a session that nobody ended.
    #[error("the session of client {0} is gone")]
    SessionLost(u32),
    /// A replica holds something else than what was committed.
    #[error("node {node} holds {found:?} in sector {sector} of volume {volume}, not {expected:?}")]
    ReplicaDiffers {
        /// The node.
        node: usize,
        /// The volume.
        volume: VolumeId,
        /// The sector.
        sector: u64,
        /// What was committed.
        expected: Value,
        /// What is there.
        found: Value,
    },
    /// A replica has other volumes than the log has made.
    #[error("node {node} has volumes {found:?}, not {expected:?}")]
    CatalogueDiffers {
        /// The node.
        node: usize,
        /// What the log has made: names, and sizes in sectors.
        expected: Vec<(VolumeId, (String, u64))>,
        /// What is there.
        found: Vec<(VolumeId, (String, u64))>,
    },
    /// A replica keeps chunks of a volume that is gone.
    #[error("node {node} keeps chunks of volume {volume}, which was deleted")]
    ChunksKept {
        /// The node.
        node: usize,
        /// The volume.
        volume: VolumeId,
    },
    /// A replica's volume cannot be read, or holds what nobody wrote.
    #[error("node {node}: {reason}")]
    Unreadable {
        /// The node.
        node: usize,
        /// Why.
        reason: String,
    },
    /// Replicas keep different books.
    #[error("digests of shard {shard} differ between nodes {nodes:?}")]
    DigestsDiffer {
        /// The shard.
        shard: ShardId,
        /// Two nodes that differ.
        nodes: [usize; 2],
    },
    /// A node does not start again.
    #[error("node {node} does not start: {reason}")]
    StartFailed {
        /// The node.
        node: usize,
        /// Why.
        reason: String,
    },
    /// Everything is healed, and still something does not come to an end.
    #[error("stuck: {0}")]
    Stuck(String),
    /// An assertion failed.
    #[error("panicked: {0}")]
    Panicked(String),
}

/// A broken promise, and when it showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: SimTime,
    /// What.
    pub breach: Breach,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}: {}", self.at, self.breach)
    }
}
