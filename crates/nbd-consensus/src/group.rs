//! The owner of one group's state.
//!
//! `ready`: from raft-rs's decisions to effects. `messages`: what peers say. `elections`: time,
//! heartbeats, leases, and who may stand. `propose`: what clients want. `members`: membership
//! changes. `snapshots`: when the log no longer reaches back far enough.

mod elections;
mod members;
mod messages;
mod propose;
mod ready;
mod snapshots;

use std::collections::BTreeMap;
use std::fmt;

use nbd_topology::{LogIndex, ReplicaId, Term};
use raft::{ProgressState, RawNode, StateRole};

use crate::codec;
use crate::config::{GroupConfig, ReadMode, Recovered};
use crate::effect::{Effects, HardState, Leadership, PeerStatus, RejectReason, Role, Status};
use crate::error::GroupError;
use crate::input::{Entry, Input, Ticket, Timestamp};
use crate::lease::Lease;
use crate::log_cache::LogCache;
use crate::logger::logger;
use crate::membership::{Members, from_conf_state};
use crate::proposals::Proposals;
use crate::readies::Readies;
use crate::reads::Reads;
use crate::watch::Watch;

/// This replica's member of a shard's Raft group.
///
/// Everything goes through [`Self::step`]. A group of one voter needs `Input::Campaign` once after
/// [`Self::new`] and leads within that step; its first proposals may follow at once. A larger group
/// elects a leader from ticks and messages.
pub struct Group {
    config: GroupConfig,
    /// raft-rs. After each step it has no ready waiting and no unstable entry: everything it
    /// decided has been turned into effects and is in its [`LogCache`].
    raw: RawNode<LogCache>,
    readies: Readies,
    proposals: Proposals,
    reads: Reads,
    members: Members,
    watch: Watch,
    lease: Lease,
    /// The time of the current step.
    now: Timestamp,
    /// Ticks since the start.
    ticks: u64,
    /// As leader: ticks since the last heartbeat, and since snapshots were last offered again.
    beat_elapsed: u32,
    offer_elapsed: u32,
    /// As leader: at which of `ticks` each peer was last heard from in this term.
    heard: BTreeMap<ReplicaId, u64>,
    /// As leader: at which of `ticks` it became that.
    led_since: u64,
    /// Whether a snapshot is being put in place of the log, which must not change meanwhile.
    log_held: bool,
    /// The last hard state in an append. Its `commit` may lag behind raft-rs's.
    hard_state_sent: HardState,
    /// Highest index handed out to be applied. `applied <= handed_out <= min(committed,
    /// persisted)`.
    handed_out: u64,
    /// As last reported in [`Effects::role_changed`].
    leadership: Leadership,
}

impl Group {
    /// A follower with the recovered log.
    ///
    /// # Errors
    ///
    /// If a setting, or what was recovered, breaks a rule stated on its field.
    pub fn new(config: GroupConfig, mut recovered: Recovered) -> Result<Self, GroupError> {
        config.validate()?;
        recovered.validate()?;
        let hard_state_sent = recovered.hard_state;
        let commit = &mut recovered.hard_state.commit;
        *commit = members::known_committed(&recovered.tail).max(*commit);
        let mut group = Self {
            raw: raw_node(&config, &recovered),
            readies: Readies::default(),
            proposals: Proposals::default(),
            reads: Reads::default(),
            members: Members::new(recovered.applied.0, recovered.membership),
            watch: Watch::new(&config),
            lease: Lease::new(&config),
            now: Timestamp::default(),
            ticks: 0,
            beat_elapsed: 0,
            offer_elapsed: 0,
            heard: BTreeMap::new(),
            led_since: 0,
            log_held: false,
            hard_state_sent,
            handed_out: recovered.applied.0,
            leadership: Leadership { role: Role::Follower, term: Term::ZERO, leader: None },
            config,
        };
        group.leadership = group.current_leadership();
        group.offer_applied();
        group.check_invariants();
        Ok(group)
    }

    /// Takes one event and returns what it makes necessary. `now` is the time at which the event is
    /// stepped; should it go back, the latest so far counts.
    ///
    /// # Panics
    ///
    /// If the caller breaks the rules stated on [`Input::Persisted`], [`Input::Applied`],
    /// [`Input::Checkpointed`], [`Input::Compacted`] or [`Input::SnapshotInstalled`], or an
    /// invariant of this group is broken. Peer messages do not panic.
    pub fn step(&mut self, now: Timestamp, input: Input) -> Effects {
        self.now = self.now.max(now);
        let mut effects = Effects::default();
        self.take_input(input, &mut effects);
        loop {
            while self.raw.has_ready() {
                self.take_ready(&mut effects);
            }
            if !self.start_round() {
                break;
            }
        }
        effects.fetch = self.raw.mut_store().take_fetches();
        self.report_leadership(&mut effects);
        self.check_invariants();
        effects
    }

    /// How the group stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let raft = &self.raw.raft;
        let Leadership { role, term, leader } = self.current_leadership();
        Status {
            role,
            term,
            leader,
            serving: self.is_serving(),
            compacted: LogIndex(raft.store().compacted()),
            applied: LogIndex(raft.raft_log.applied),
            handed_out: LogIndex(self.handed_out),
            committed: LogIndex(raft.raft_log.committed),
            persisted: LogIndex(raft.raft_log.persisted),
            last: LogIndex(raft.raft_log.last_index()),
            appends_outstanding: self.readies.len(),
            proposals_open: self.proposals.len(),
            reads_waiting: self.reads.len(),
            uncommitted_bytes: if role == Role::Leader { raft.uncommitted_size() } else { 0 },
            membership: self.members.current().clone(),
            transferring: raft.lead_transferee.and_then(ReplicaId::new),
            lease_until: self.read_lease(),
            peers: self.peers(),
        }
    }

    /// Until when this leader may answer reads alone: everything that was ever acknowledged to
    /// anyone is committed here. `None` if it may not: it is not serving, reads go by
    /// [`ReadMode::Quorum`], a transfer of leadership was begun in this term, or no majority has
    /// answered a heartbeat yet. The only voter may for ever.
    ///
    /// To be compared with the clock *after* the data was read.
    #[must_use]
    pub fn read_lease(&self) -> Option<Timestamp> {
        if self.config.read_mode == ReadMode::Quorum || !self.is_serving() {
            return None;
        }
        if self.is_only_voter() && !self.lease.is_given_up() {
            return Some(Timestamp::MAX);
        }
        self.lease.until()
    }

    /// The hard state to write along with a checkpoint of everything applied so far. Its commit
    /// index covers the applied one and never exceeds what is on stable storage, so that a restart
    /// from the checkpoint finds `applied <= commit <= last`. Term and vote may be newer than in
    /// the log, which does no harm.
    #[must_use]
    pub fn hard_state(&self) -> HardState {
        let log = &self.raw.raft.raft_log;
        let commit = LogIndex(log.committed.min(log.persisted));
        HardState { commit, ..self.current_hard_state() }
    }

    /// Ends the group and returns the tickets of every proposal and read without an answer. Whether
    /// the proposals happened is unknown.
    #[must_use]
    pub fn close(mut self) -> Vec<Ticket> {
        self.proposals.into_tickets().chain(self.reads.abandon()).collect()
    }

    fn take_input(&mut self, input: Input, effects: &mut Effects) {
        match input {
            Input::Tick => self.tick(),
            Input::Message(bytes) => effects.refused = self.take_message(&bytes, effects).err(),
            Input::Propose(proposals) => self.propose(proposals, effects),
            Input::Persisted(number) => {
                let through = self.readies.persisted(number);
                self.raw.on_persist_ready(through);
            }
            Input::Applied(index) => {
                let range = self.raw.store().applied()..=self.handed_out;
                assert!(range.contains(&index.0), "applied {index} is not within {range:?}");
                self.raw.advance_apply_to(index.0);
                self.raw.mut_store().applied_to(index.0);
            }
            Input::Checkpointed { index, term } => self.checkpointed(index, term),
            Input::Compacted(index) => self.raw.mut_store().compact(index.0),
            Input::PeerUnreachable(peer) => {
                self.raw.report_unreachable(peer.get());
                self.offer_again(peer);
            }
            Input::LeaderLost => self.leader_lost(),
            Input::Read(tickets) => self.read(tickets, effects),
            Input::Campaign => self.campaign(),
            Input::TransferLeader(to) => self.transfer_leader(to),
            Input::ChangeMembership { ticket, change } => {
                self.propose_change(ticket, change, effects);
            }
            Input::HoldLog(held) => self.hold_log(held),
            Input::SnapshotInstalled { index, term, membership } => {
                self.install_snapshot(index, term, membership, effects);
            }
            Input::SnapshotFailed(peer) => self.offer_again(peer),
            Input::Fetched { first, entries } => self.take_fetched(first, &entries),
        }
    }

    fn take_fetched(&mut self, first: LogIndex, entries: &[Entry]) {
        let entries = entries.iter().map(codec::to_raft_entry).collect();
        for context in self.raw.mut_store().arrived(first.0, entries) {
            self.raw.on_entries_fetched(context);
        }
        self.raw.mut_store().forget_arrived();
    }

    fn report_leadership(&mut self, effects: &mut Effects) {
        let now = self.current_leadership();
        let before = std::mem::replace(&mut self.leadership, now);
        if now == before {
            return;
        }
        effects.role_changed = Some(now);
        let removed = !self.members.current().is_voter(self.config.replica);
        if before.role == Role::Leader
            && now.role != Role::Leader
            && now.term == before.term
            && !removed
        {
            let heard: Vec<_> =
                self.heard.iter().map(|(peer, heard)| (peer.get(), self.ticks - heard)).collect();
            tracing::warn!(
                shard = %self.config.shard, ?heard,
                "no majority was heard from, so the leader steps down; peers, and ticks since each \
                 was heard from"
            );
        }
        if now.role != Role::Leader || now.term != before.term {
            let reason = RejectReason::NotLeader { leader: now.leader };
            effects.rejected.extend(self.reads.abandon().map(|ticket| (ticket, reason)));
            self.lease.reset();
            self.heard.clear();
            self.led_since = self.ticks;
            self.beat_elapsed = 0;
            self.offer_elapsed = 0;
        }
    }

    fn peers(&self) -> Vec<PeerStatus> {
        if !self.is_leader() {
            return Vec::new();
        }
        let members = self.members.current();
        let others = members.all().filter(|id| *id != self.config.replica);
        let status = |replica: ReplicaId| {
            let progress = self.raw.raft.prs().get(replica.get())?;
            Some(PeerStatus {
                replica,
                matched: LogIndex(progress.matched),
                active: self.is_active(replica),
                learner: !members.is_voter(replica),
                snapshot: progress.state == ProgressState::Snapshot,
            })
        };
        others.filter_map(status).collect()
    }

    fn current_leadership(&self) -> Leadership {
        let raft = &self.raw.raft;
        Leadership {
            role: codec::role(raft.state),
            term: Term(raft.term),
            leader: ReplicaId::new(raft.leader_id),
        }
    }

    fn current_hard_state(&self) -> HardState {
        let raft = &self.raw.raft;
        HardState {
            term: Term(raft.term),
            vote: ReplicaId::new(raft.vote),
            commit: LogIndex(raft.raft_log.committed),
        }
    }

    fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Whether this replica leads and has applied an entry of its own term.
    fn is_serving(&self) -> bool {
        self.is_leader() && self.raw.raft.apply_to_current_term()
    }

    fn is_only_voter(&self) -> bool {
        let voters = self.members.current().voters();
        voters.len() == 1 && voters.contains(&self.config.replica)
    }

    fn is_log_persisted(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        log.persisted == log.last_index()
    }

    /// Asserts what holds between any two steps. Cheap enough to stay on in release.
    fn check_invariants(&self) {
        let raft = &self.raw.raft;
        let log = &raft.raft_log;
        let last = log.last_index();
        let store = raft.store();
        assert!(store.compacted() <= log.applied, "compacted what is not applied");
        assert!(log.applied <= self.handed_out, "applied what was not handed out");
        assert!(
            self.handed_out <= log.committed.min(log.persisted),
            "handed out {} of committed {} and persisted {}",
            self.handed_out,
            log.committed,
            log.persisted
        );
        assert!(log.committed <= last, "committed {} of {last}", log.committed);
        assert!(log.persisted <= last, "persisted {} of {last}", log.persisted);
        assert_eq!(store.applied(), log.applied, "cache and raft-rs disagree on what is applied");
        assert_eq!(store.last(), last, "raft-rs holds entries the cache does not have");
        assert!(store.window_first() <= log.applied + 1, "an entry not yet applied was evicted");
        assert!(self.readies.is_ordered(), "ready numbers are out of order");
        assert!(
            self.readies.len() > 0 || log.persisted == last,
            "nothing is outstanding, but the log is durable only to {} of {last}",
            log.persisted
        );
        let sent = self.hard_state_sent;
        assert!(sent.commit.0 <= log.committed, "a hard state claims too much");
        let now = self.current_hard_state();
        assert_eq!((sent.term, sent.vote), (now.term, now.vote), "a vote was not written");
        let open = self.proposals.lowest();
        assert!(open.is_none_or(|open| open > self.handed_out), "a committed ticket is still open");
        if let Some((index, term)) = self.proposals.highest() {
            let own = self.is_leader() && term == raft.term;
            assert!(!own || index <= last, "an open proposal of this leader is beyond its log");
        }
        let own = raft.leader_id == raft.id;
        assert_eq!(self.is_leader(), own, "role and leader disagree");
        let leads = self.is_leader();
        assert!(leads || (self.reads.len() == 0 && self.reads.is_idle()), "reads without leading");
        assert!(leads || self.lease.until().is_none(), "a lease without leading");
        assert!(!leads || !self.log_held, "a leader's log is held");
        let voter = self.members.current().is_voter(self.config.replica);
        assert!(!leads || voter, "leads without being a voter");
        assert_eq!(raft.promotable(), voter, "cache and raft-rs disagree on the members");
    }
}

/// raft-rs, set up with this log.
fn raw_node(config: &GroupConfig, recovered: &Recovered) -> RawNode<LogCache> {
    let cache = LogCache::new(recovered, config.cache_bytes_max);
    let raft_config = config.to_raft(recovered.applied);
    let raw = RawNode::new(&raft_config, cache, &logger(config.shard));
    let Ok(raw) = raw else {
        unreachable!("raft-rs refuses only what `validate` refuses");
    };
    let members = from_conf_state(&raw.raft.prs().conf().to_conf_state());
    assert_eq!(members.as_ref(), Some(&recovered.membership), "raft-rs has other members");
    raw
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("shard", &self.config.shard)
            .field("replica", &self.config.replica)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

mod brief;
#[cfg(test)]
mod tests;
