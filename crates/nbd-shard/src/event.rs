//! What a [`ShardReplica`](crate::ShardReplica) is told, and what it wants done.

use std::time::Duration;

use bytes::Bytes;
use nbd_consensus::{Entry, OutMessage, ReadyNumber, SnapshotOffer};
use nbd_log::log::{HardState, LogPosition};
use nbd_store::{EntryPlace, Outcome, ShardSnapshot};
use nbd_topology::{LogIndex, MembershipChange, ReplicaId, Term};

use crate::log_write::LogWrite;

/// One event.
#[derive(Debug)]
pub enum Event<R> {
    /// One unit of time has passed. After a pause, one tick and not the backlog.
    Tick,
    /// A message from a peer, whole. The group refuses it if a payload in it is damaged.
    Message(Bytes),
    /// Put these commands into the log, in this order, and answer each.
    Propose(Vec<(Bytes, R)>),
    /// Answer when a read that starts then sees everything acknowledged before now.
    Barrier(R),
    /// Change who belongs to the group, and answer when that is in force here.
    ChangeMembership(MembershipChange, R),
    /// A log write, and all earlier ones, are on stable storage.
    Persisted(Persisted),
    /// The entries of a [`FetchPlan`], or none if the log could not be read.
    Fetched {
        /// The `first` of the plan.
        first: LogIndex,
        /// The entries, with the places' index, term and kind.
        entries: Vec<Entry>,
    },
    /// The entries of [`Actions::read_back`], or none if the log could not be read.
    ReadBack(Vec<Entry>),
    /// A checkpoint is durable.
    Checkpointed(Checkpointed),
    /// The connection to the leader broke: a hint, never a proof, of its death.
    LeaderLost,
    /// The stream to this peer broke.
    PeerUnreachable(ReplicaId),
    /// Hand leadership to this replica.
    TransferLeader(ReplicaId),
    /// Stand for election now: for a group of one voter.
    Campaign,
    /// Everything that this snapshot needs is in the store; what is left is to install it.
    ResyncReady(ShardSnapshot),
    /// The store was switched to the snapshot of an [`InstallPlan`], durably.
    Installed,
}

/// A durable checkpoint, as far as it matters to one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpointed {
    /// The last entry that it covers.
    pub applied: LogIndex,
    /// That entry's term.
    pub term: Term,
    /// Lowest entry of this group that the node's log still has; without any, the next one.
    pub first_kept: LogIndex,
    /// Whether the log, half full, cannot let go of its oldest part because of entries of this
    /// group: [`nbd_log::log::SegmentPool::is_held_up_by`].
    pub holds_up_log: bool,
}

/// A [`LogWrite`] of the group is on stable storage, together with all earlier ones.
#[derive(Debug)]
pub struct Persisted {
    /// Its number, if it carried out an append.
    pub ready: Option<ReadyNumber>,
    /// Where each of its entries lies, in index order.
    pub places: Vec<EntryPlace>,
}

impl Persisted {
    /// Of copies that were not written: there was no room.
    #[must_use]
    pub const fn given_up() -> Self {
        Self { ready: None, places: Vec::new() }
    }
}

/// What came of a command, a barrier or a change of membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The command was applied.
    Outcome(Outcome),
    /// A read that starts now sees everything acknowledged before the barrier was asked for.
    Ready,
    /// The change is in force, or has no effect.
    Changed,
    /// The change was refused: ask again later, or never, as the reason says.
    Refused(nbd_consensus::RejectReason),
    /// Nothing was logged, since this replica does not lead. The leader, if known.
    NotLeader(Option<ReplicaId>),
    /// It may or may not have happened, or may yet happen: leadership was lost meanwhile.
    Lost,
}

/// Entries to be read from the log for a follower that lags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchPlan {
    /// The first entry wanted.
    pub first: LogIndex,
    /// Where the entries lie; empty if they are not kept any more.
    pub places: Vec<EntryPlace>,
}

/// Which part of the node's log a group no longer needs, beside what checkpoints cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogTail {
    /// The last entry applied.
    pub applied: LogIndex,
    /// Every later entry that counts lies here or behind.
    pub from: LogPosition,
}

/// The store is to be switched to a snapshot: [`nbd_store::Checkpointer::install`].
#[derive(Debug)]
pub struct InstallPlan {
    /// What it is switched to.
    pub snapshot: ShardSnapshot,
    /// Newest term and vote of this replica.
    pub hard_state: HardState,
}

/// What a step wants done. The lists are in order; between them there is none.
#[derive(Debug)]
pub struct Actions<R> {
    /// For the log, in order. The messages that wait for them are kept back by the replica itself.
    pub log_writes: Vec<LogWrite>,
    /// For the peers, at once.
    pub send: Vec<OutMessage>,
    /// For whoever asked.
    pub answers: Vec<(R, Answer)>,
    /// Entries to be read.
    pub fetch: Vec<FetchPlan>,
    /// Entries to be read so that copies of them can be written to the log's end.
    pub read_back: Option<Vec<EntryPlace>>,
    /// What the log need not keep for entries that are not applied yet.
    pub log_tail: Option<LogTail>,
    /// The leader's log no longer reaches back to this replica's end: a resync is needed.
    pub snapshot_offered: Option<SnapshotOffer>,
    /// A resync has come to its last step. No step but [`Event::Installed`] matters until then.
    pub install: Option<InstallPlan>,
    /// The last [`Event::ResyncReady`] is not needed: the log covers it.
    pub resync_dropped: bool,
    /// Members came, went or were promoted.
    pub membership_changed: bool,
    /// Sessions were ended by what was applied: closed, or gone with their owner or their volume.
    pub sessions_ended: bool,
    /// For each entry proposed here and applied now: the time from packing to committed.
    pub commit_times: Vec<Duration>,
    /// Entries above this index are worth keeping in the node's log.
    pub keep_above: Option<LogIndex>,
}

impl<R> Default for Actions<R> {
    fn default() -> Self {
        Self {
            log_writes: Vec::new(),
            send: Vec::new(),
            answers: Vec::new(),
            fetch: Vec::new(),
            read_back: None,
            log_tail: None,
            snapshot_offered: None,
            install: None,
            resync_dropped: false,
            membership_changed: false,
            sessions_ended: false,
            commit_times: Vec::new(),
            keep_above: None,
        }
    }
}
