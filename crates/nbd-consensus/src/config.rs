//! What a [`Group`](crate::Group) starts from.

use std::time::Duration;

use nbd_topology::{LogIndex, Membership, ReplicaId, ShardId, Term};

use crate::effect::HardState;
use crate::error::GroupError;
use crate::input::Entry;
use crate::limits::{
    APPLY_BYTES_MAX, CACHE_BYTES_MAX, ENTRY_BYTES_MAX, INFLIGHT_MESSAGES_MAX, LEARNERS_MAX,
    MESSAGE_BYTES_MAX, TICK, TICK_MAX, UNCOMMITTED_BYTES_MAX, VOTERS_MAX,
};

/// How a leader knows that it still leads when it answers a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadMode {
    /// It holds a lease: until when nobody can have been elected in its place, for its followers
    /// grant no vote for an election timeout after they heard from it. Relies on clocks that run
    /// within 10 % of each other for the length of a lease.
    #[default]
    Lease,
    /// It asks a majority each time, and relies on no clock. Followers may then vote as soon as
    /// the connection to the leader breaks.
    Quorum,
}

/// Settings of a group. Validated by [`Group::new`](crate::Group::new).
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// The shard the group serves. For log lines only: messages do not carry it.
    pub shard: ShardId,
    /// This replica. If it is not in the membership, it takes the log but has no part in
    /// elections.
    pub replica: ReplicaId,
    /// Time from one [`Input::Tick`](crate::Input::Tick) to the next, above 0 and at most a minute.
    /// The same on all replicas. Default: 25 ms.
    pub tick: Duration,
    /// Ticks without a leader until a follower stands for election; a leader steps down that hears
    /// from no majority for [`STEP_DOWN_ELECTIONS`](crate::limits::STEP_DOWN_ELECTIONS) times as
    /// long, and up to once longer. Well above the slowest flush. Leases and votes are measured by
    /// it: the same on all replicas. Default: 12 (300 ms at 25 ms a tick).
    pub election_ticks: u32,
    /// Ticks from one heartbeat to the next. Default: 2.
    pub heartbeat_ticks: u32,
    /// How reads are answered, and when votes may be given. The same on all replicas: a leader with
    /// a lease relies on how its followers vote. Default: [`ReadMode::Lease`].
    pub read_mode: ReadMode,
    /// Whether this replica may have voted or acknowledged anything in an earlier life. It then
    /// gives no vote, and does not stand for election, for an election timeout from its start: it
    /// cannot know how lately it heard from a leader that holds a lease. Default: true.
    pub restarted: bool,
    /// Whether each wait is drawn from `election_ticks..2 * election_ticks`, by raft-rs's
    /// thread-local generator, which keeps candidates from colliding. Simulations switch it off
    /// and give each replica an `election_ticks_extra` of its own. Default: true.
    pub election_ticks_jitter: bool,
    /// Without jitter: ticks that this replica waits beyond `election_ticks` before it stands, at
    /// most 2^30. Default: 0.
    pub election_ticks_extra: u32,
    /// Largest data of an entry, proposed here or sent by a peer. Default: 2 MiB.
    pub entry_bytes_max: usize,
    /// Whether the data of a command is whole, by the checksums inside it. A message with an entry
    /// that is not is refused, before any of it has an effect. Default: always.
    pub is_sound: fn(&[u8]) -> bool,
    /// Bytes a leader logs ahead of what is committed; past it proposals are refused as
    /// [`Full`](crate::RejectReason::Full), though one always passes. Default: 64 MiB. Higher lets
    /// a stalled majority pile up more memory; lower stalls large sequential writes.
    pub uncommitted_bytes_max: usize,
    /// Bytes of applied entries kept in memory for followers that lag. Entries not yet applied are
    /// kept regardless. Default: 16 MiB.
    pub cache_bytes_max: usize,
    /// A mistake to be made. Default: none.
    #[cfg(feature = "planted-faults")]
    pub fault: Option<crate::fault::Fault>,
}

impl GroupConfig {
    /// Default settings.
    #[must_use]
    pub const fn new(shard: ShardId, replica: ReplicaId) -> Self {
        Self {
            shard,
            replica,
            tick: TICK,
            election_ticks: 12,
            heartbeat_ticks: 2,
            read_mode: ReadMode::Lease,
            restarted: true,
            election_ticks_jitter: true,
            election_ticks_extra: 0,
            entry_bytes_max: ENTRY_BYTES_MAX,
            is_sound: |_| true,
            uncommitted_bytes_max: UNCOMMITTED_BYTES_MAX,
            cache_bytes_max: CACHE_BYTES_MAX,
            #[cfg(feature = "planted-faults")]
            fault: None,
        }
    }

    /// Checks every rule stated on the fields.
    pub(crate) fn validate(&self) -> Result<(), GroupError> {
        if self.tick.is_zero() || self.tick > TICK_MAX {
            return Err(GroupError::Tick { tick: self.tick });
        }
        let (heartbeat, election) = (self.heartbeat_ticks, self.election_ticks);
        let long = election.max(self.election_ticks_extra) > 1 << 30;
        if heartbeat == 0 || heartbeat >= election || long {
            return Err(GroupError::Ticks { heartbeat, election });
        }
        let (entry, uncommitted) = (self.entry_bytes_max, self.uncommitted_bytes_max);
        if entry == 0 || entry > uncommitted || (uncommitted as u64) < MESSAGE_BYTES_MAX {
            return Err(GroupError::Sizes { entry, uncommitted });
        }
        Ok(())
    }

    /// These settings as raft-rs takes them. Everything whose default there is off or unlimited is
    /// set: a leader that lost its majority must step down, a replica that was away must not depose
    /// a working leader, and nothing may grow without bound.
    pub(crate) fn to_raft(&self, applied: LogIndex) -> raft::Config {
        let election = self.election_ticks as usize;
        let (shortest, longest) = if self.election_ticks_jitter {
            (election, 2 * election)
        } else {
            let fixed = election + self.election_ticks_extra as usize;
            (fixed, fixed + 1)
        };
        raft::Config {
            id: self.replica.get(),
            election_tick: election,
            heartbeat_tick: self.heartbeat_ticks as usize,
            min_election_tick: shortest,
            max_election_tick: longest,
            applied: applied.0,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: INFLIGHT_MESSAGES_MAX,
            check_quorum: true,
            pre_vote: true,
            read_only_option: raft::ReadOnlyOption::Safe,
            skip_bcast_commit: true,
            batch_append: true,
            priority: 0,
            max_uncommitted_size: self.uncommitted_bytes_max as u64,
            max_committed_size_per_ready: APPLY_BYTES_MAX,
        }
    }
}

/// What the log and the last checkpoint hold of a group. The default is a group that never ran.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovered {
    /// The last hard state on stable storage.
    pub hard_state: HardState,
    /// The members as of `applied`: 1 to [`VOTERS_MAX`] voters, at most [`LEARNERS_MAX`] learners.
    /// This replica may be missing: it has yet to be added, or was removed. (The default, nobody,
    /// is the one thing in it that must be replaced.)
    pub membership: Membership,
    /// Highest index in the state machine, as of a durable checkpoint.
    /// `compacted <= applied <= hard_state.commit <= last`.
    pub applied: LogIndex,
    /// The log starts behind this entry; its term is still needed to match followers.
    pub compacted: (LogIndex, Term),
    /// Term of each entry from behind `compacted` to the last.
    pub terms: Vec<Term>,
    /// Every entry above `applied`, by index. Those up to `hard_state.commit` will be handed out to
    /// be applied; the fate of the others is open.
    pub tail: Vec<Entry>,
}

impl Recovered {
    /// The last entry's index, or the compacted one.
    pub(crate) fn last(&self) -> LogIndex {
        LogIndex(self.compacted.0.0 + self.terms.len() as u64)
    }

    /// Checks every rule stated on the fields.
    pub(crate) fn validate(&self) -> Result<(), GroupError> {
        let (voters, learners) = (self.membership.voters(), self.membership.learners());
        if voters.is_empty() || voters.len() > VOTERS_MAX || learners.len() > LEARNERS_MAX {
            let (voters, learners) = (voters.len(), learners.len());
            return Err(GroupError::Members { voters, learners });
        }
        let (compacted, applied, commit) = (self.compacted.0, self.applied, self.hard_state.commit);
        let last = self.last();
        if compacted > applied || applied > commit || commit > last {
            return Err(GroupError::Indexes { compacted, applied, commit, last });
        }
        let current = self.hard_state.term;
        let mut before = self.compacted.1;
        let mut index = compacted;
        for term in std::iter::once(before).chain(self.terms.iter().copied()) {
            if term < before || term > current {
                return Err(GroupError::Terms { index, term, current });
            }
            before = term;
            index = index.next();
        }
        let mut index = applied;
        for entry in &self.tail {
            index = index.next();
            let place = usize::try_from(index.0 - compacted.0 - 1).ok();
            let term = place.and_then(|place| self.terms.get(place));
            if entry.index != index || term != Some(&entry.term) {
                return Err(GroupError::Tail { applied, index });
            }
        }
        if index != last {
            return Err(GroupError::Tail { applied, index: index.next() });
        }
        Ok(())
    }
}
