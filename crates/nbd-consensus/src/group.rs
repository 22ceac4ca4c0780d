//! The owner of one group's state.

use std::fmt;

use bytes::Bytes;
use nbd_topology::{LogIndex, ReplicaId, Term};
use protobuf::Message as _;
use raft::eraftpb::{self, ConfChange, ConfChangeV2, EntryType, MessageType};
use raft::{ProgressState, RawNode, StateRole};

use crate::codec;
use crate::config::{GroupConfig, Recovered};
use crate::effect::{
    Append, Committed, Effects, HardState, Leadership, PeerStatus, RejectReason, Role, Status,
};
use crate::error::{GroupError, MessageError};
use crate::guard::Guard;
use crate::input::{Entry, Input, Proposal, Ticket, Timestamp};
use crate::limits::READS_WAITING_MAX;
use crate::log_cache::LogCache;
use crate::logger::logger;
use crate::membership::Members;
use crate::proposals::Proposals;
use crate::readies::Readies;
use crate::reads::Reads;

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
    /// The last hard state in an append. Its `commit` may lag behind raft-rs's.
    hard_state_sent: HardState,
    /// Highest index handed out to be applied. `applied <= handed_out <= min(committed,
    /// persisted)`.
    handed_out: u64,
    members: Members,
    /// As last reported in [`Effects::role_changed`].
    leadership: Leadership,
}

impl Group {
    /// A follower with the recovered log.
    ///
    /// # Errors
    ///
    /// If a setting, or what was recovered, breaks a rule stated on its field.
    pub fn new(config: GroupConfig, recovered: Recovered) -> Result<Self, GroupError> {
        config.validate()?;
        recovered.validate()?;
        let cache = LogCache::new(&recovered, config.cache_bytes_max);
        let raft_config = config.to_raft(recovered.applied);
        let raw = RawNode::new(&raft_config, cache, &logger(config.shard));
        let Ok(raw) = raw else {
            unreachable!("raft-rs refuses only what `validate` refuses");
        };
        let mut group = Self {
            config,
            raw,
            readies: Readies::default(),
            proposals: Proposals::default(),
            reads: Reads::default(),
            hard_state_sent: recovered.hard_state,
            handed_out: recovered.applied.0,
            members: Members::new(recovered.applied.0, recovered.membership),
            leadership: Leadership { role: Role::Follower, term: Term::ZERO, leader: None },
        };
        group.leadership = group.current_leadership();
        group.check_invariants();
        Ok(group)
    }

    /// Takes one event and returns what it makes necessary.
    ///
    /// # Panics
    ///
    /// If the caller breaks the rules stated on [`Input::Persisted`], [`Input::Applied`] or
    /// [`Input::Compacted`], or an invariant of this group is broken. Peer messages do not panic.
    pub fn step(&mut self, _now: Timestamp, input: Input) -> Effects {
        let mut effects = Effects::default();
        self.take_input(input, &mut effects);
        loop {
            while self.raw.has_ready() {
                self.take_ready(&mut effects);
            }
            // A read barrier asked for before this leader committed in its own term would be
            // dropped by raft-rs without a word: hold it until then.
            if !self.is_leader() || !self.raw.raft.commit_to_current_term() {
                break;
            }
            match self.reads.start() {
                Some(context) => self.raw.read_index(context),
                None => break,
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
        let mut peers = Vec::new();
        if role == Role::Leader {
            peers.extend(raft.prs().iter().filter_map(|(id, progress)| {
                let replica = ReplicaId::new(*id).filter(|id| *id != self.config.replica)?;
                let matched = LogIndex(progress.matched);
                Some(PeerStatus {
                    replica,
                    matched,
                    active: progress.recent_active,
                    learner: self.members.current().learners().contains(&replica),
                    snapshot: progress.state == ProgressState::Snapshot,
                })
            }));
            peers.sort_unstable_by_key(|peer| peer.replica);
        }
        Status {
            role,
            term,
            leader,
            serving: role == Role::Leader && raft.apply_to_current_term(),
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
            peers,
        }
    }

    /// Until when this leader may answer reads alone, if it may.
    #[must_use]
    pub const fn read_lease(&self) -> Option<Timestamp> {
        None
    }

    /// Whether a snapshot at this entry would help.
    #[must_use]
    pub fn wants_snapshot(&self, index: LogIndex, term: Term) -> bool {
        let log = &self.raw.raft.raft_log;
        !self.is_leader() && index.0 > log.committed && !log.match_term(index.0, term.0)
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
            Input::Tick => {
                if self.is_leader() || self.may_campaign() {
                    self.raw.tick();
                }
            }
            Input::Message(bytes) => effects.refused = self.take_message(&bytes).err(),
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
            Input::Compacted(index) => self.raw.mut_store().compact(index.0),
            Input::PeerUnreachable(peer) => self.raw.report_unreachable(peer.get()),
            Input::Read(tickets) => self.read(tickets, effects),
            Input::Campaign => {
                if self.raw.raft.promotable() && self.may_campaign() {
                    let hup = self.raw.campaign();
                    assert!(hup.is_ok(), "standing for election does not fail");
                }
            }
            // As a follower raft-rs would pass the request on to the leader.
            Input::TransferLeader(to) => {
                if self.is_leader() {
                    self.raw.transfer_leader(to.get());
                }
            }
            Input::Fetched { first, entries } => self.take_fetched(first, &entries),
            Input::ChangeMembership { ticket, .. } => {
                effects.rejected.push((ticket, RejectReason::MembershipBusy));
            }
            Input::Checkpointed { .. }
            | Input::LeaderLost
            | Input::HoldLog(_)
            | Input::SnapshotInstalled { .. }
            | Input::SnapshotFailed(_) => {}
        }
    }

    fn take_message(&mut self, bytes: &Bytes) -> Result<(), MessageError> {
        let message = codec::decode(bytes)?;
        let raft = &self.raw.raft;
        let guard = Guard {
            replica: self.config.replica.get(),
            term: raft.term,
            leader: self.is_leader(),
            last: raft.raft_log.last_index(),
            entry_bytes_max: self.config.entry_bytes_max,
        };
        guard.check(&message, |id| raft.prs().get(id).is_some())?;
        // A vote won while entries are not durable would make raft-rs panic. It cannot come about
        // if the request for it waited for them; if it did not, the vote counts as lost.
        let vote = message.msg_type == MessageType::MsgRequestVoteResponse;
        if vote && !self.is_log_persisted() {
            tracing::debug!(shard = %self.config.shard, "vote arrived before the log was durable");
            return Ok(());
        }
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(shard = %self.config.shard, %error, "message had no effect");
        }
        Ok(())
    }

    fn propose(&mut self, proposals: Vec<Proposal>, effects: &mut Effects) {
        if let Some(reason) = self.proposals_refused() {
            effects.rejected.extend(proposals.iter().map(|proposal| (proposal.ticket, reason)));
            return;
        }
        let mut tickets = Vec::with_capacity(proposals.len());
        let mut entries = Vec::with_capacity(proposals.len());
        let mut uncommitted = self.raw.raft.uncommitted_size();
        let mut full = false;
        for Proposal { ticket, data } in proposals {
            if data.len() > self.config.entry_bytes_max {
                effects.rejected.push((ticket, RejectReason::TooLarge));
                continue;
            }
            // raft-rs's own rule, applied to each one so that a batch is cut rather than refused.
            // Behind the first refusal all are, or they would overtake it.
            let fits = uncommitted == 0
                || data.is_empty()
                || uncommitted + data.len() <= self.config.uncommitted_bytes_max;
            full |= !fits;
            if full {
                effects.rejected.push((ticket, RejectReason::Full));
                continue;
            }
            uncommitted += data.len();
            tickets.push(ticket);
            entries.push(eraftpb::Entry { data, ..eraftpb::Entry::default() });
        }
        if entries.is_empty() {
            return;
        }
        let raft = &mut self.raw.raft;
        let (first, term) = (raft.raft_log.last_index() + 1, raft.term);
        let mut message = eraftpb::Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = raft.id;
        message.set_entries(entries.into());
        // Through `step` and not `RawNode::propose`, which would copy each entry's data and send
        // to each follower once per entry.
        if raft.step(message).is_err() {
            effects.rejected.extend(tickets.into_iter().map(|ticket| (ticket, RejectReason::Full)));
            return;
        }
        for (index, ticket) in (first..).zip(tickets) {
            self.proposals.logged(index, term, ticket);
        }
    }

    /// Why no proposal at all is taken now. raft-rs would forward it to the leader, or drop it.
    fn proposals_refused(&self) -> Option<RejectReason> {
        let raft = &self.raw.raft;
        let leader = self.current_leadership().leader;
        if !self.is_leader() {
            Some(RejectReason::NotLeader { leader })
        } else if raft.prs().get(raft.id).is_none() {
            Some(RejectReason::NotLeader { leader: None })
        } else if raft.lead_transferee.is_some() {
            Some(RejectReason::Transferring)
        } else {
            None
        }
    }

    fn read(&mut self, tickets: Vec<Ticket>, effects: &mut Effects) {
        let leader = self.current_leadership().leader;
        for ticket in tickets {
            if !self.is_leader() {
                effects.rejected.push((ticket, RejectReason::NotLeader { leader }));
            } else if self.reads.len() >= READS_WAITING_MAX {
                effects.rejected.push((ticket, RejectReason::Full));
            } else {
                self.reads.add(ticket);
            }
        }
    }

    fn take_fetched(&mut self, first: LogIndex, entries: &[Entry]) {
        let entries = entries.iter().map(codec::to_raft_entry).collect();
        for context in self.raw.mut_store().arrived(first.0, entries) {
            self.raw.on_entries_fetched(context);
        }
        self.raw.mut_store().forget_arrived();
    }

    /// Turns one ready of raft-rs into effects. In between, raft-rs must not be touched otherwise.
    fn take_ready(&mut self, effects: &mut Effects) {
        let mut ready = self.raw.ready();
        assert!(ready.snapshot().is_empty(), "snapshots are refused by the guard");
        self.readies.issue(ready.number());
        for state in ready.take_read_states() {
            let index = LogIndex(state.index);
            let tickets = self.reads.finish(&state.request_ctx);
            effects.reads_ready.extend(tickets.into_iter().map(|ticket| (ticket, index)));
        }
        let entries = ready.take_entries();
        let free = ready.take_messages();
        let held = ready.take_persisted_messages();
        let committed = ready.take_committed_entries();
        // From here on raft-rs reads the entries through the cache.
        self.raw.mut_store().append(&entries);
        self.raw.advance_append_async(ready);
        self.emit_append(&entries, free, held, effects);
        self.hand_out(&committed, effects);
    }

    /// Emits the append of the current ready, if it needs one, and its messages.
    fn emit_append(
        &mut self,
        entries: &[eraftpb::Entry],
        free: Vec<eraftpb::Message>,
        held: Vec<eraftpb::Message>,
        effects: &mut Effects,
    ) {
        let mut hard_state = self.current_hard_state();
        let sent = self.hard_state_sent;
        let vote = (hard_state.term, hard_state.vote) != (sent.term, sent.vote);
        let writes = vote || !entries.is_empty();
        // A leader's messages are free to overtake its own disk, but not its own vote: as the only
        // voter it has won with nothing on disk, and after a crash would lead this term again.
        let free_waits = vote || self.readies.vote_outstanding();
        let mut send_after_persist = Vec::new();
        for message in free {
            let out = if free_waits { &mut send_after_persist } else { &mut effects.send_now };
            codec::encode(message, out);
        }
        for message in held {
            codec::encode(message, &mut send_after_persist);
        }
        if !writes && self.readies.len() == 0 {
            effects.send_now.append(&mut send_after_persist);
            self.raw.on_persist_ready(self.readies.issued());
            return;
        }
        if !writes && send_after_persist.is_empty() {
            return;
        }
        let mut append_hard_state = None;
        if writes {
            // Never claim an entry of the same append: if a crash kept the hard state and not the
            // entries, the commit index would point past the log, or at entries about to be
            // replaced.
            if let Some(first) = entries.first() {
                hard_state.commit = hard_state.commit.min(LogIndex(first.index - 1));
            }
            assert!(hard_state.commit >= sent.commit, "commit index went back");
            append_hard_state = Some(hard_state).filter(|state| *state != sent);
            self.hard_state_sent = hard_state;
        }
        effects.appends.push(Append {
            ready: self.readies.append(vote),
            entries: entries.iter().map(codec::from_raft_entry).collect(),
            hard_state: append_hard_state,
            must_sync: writes,
            send_after_persist,
        });
    }

    fn hand_out(&mut self, committed: &[eraftpb::Entry], effects: &mut Effects) {
        for entry in committed {
            assert_eq!(entry.index, self.handed_out + 1, "committed entries are not consecutive");
            self.handed_out = entry.index;
            let rejected = &mut effects.rejected;
            let ticket = self.proposals.committed(entry.index, entry.term, |ticket| {
                rejected.push((ticket, RejectReason::Superseded));
            });
            let entry_out = codec::from_raft_entry(entry);
            effects.apply.push(Committed {
                entry: entry_out,
                ticket,
                change: None,
                membership: None,
            });
            self.change_membership(entry);
        }
    }

    /// Puts a committed membership change into force. One that cannot be decoded or done has no
    /// effect, the same on every replica.
    fn change_membership(&mut self, entry: &eraftpb::Entry) {
        let applied = match entry.entry_type {
            EntryType::EntryNormal => return,
            EntryType::EntryConfChange => ConfChange::parse_from_bytes(&entry.data)
                .map_err(raft::Error::from)
                .and_then(|change| self.raw.apply_conf_change(&change)),
            EntryType::EntryConfChangeV2 => ConfChangeV2::parse_from_bytes(&entry.data)
                .map_err(raft::Error::from)
                .and_then(|change| self.raw.apply_conf_change(&change)),
        };
        if let Err(error) = applied {
            let (shard, index) = (self.config.shard, entry.index);
            tracing::warn!(%shard, index, %error, "membership change has no effect");
        }
    }

    fn report_leadership(&mut self, effects: &mut Effects) {
        let now = self.current_leadership();
        let before = std::mem::replace(&mut self.leadership, now);
        if now == before {
            return;
        }
        effects.role_changed = Some(now);
        if now.role != Role::Leader || now.term != before.term {
            let reason = RejectReason::NotLeader { leader: now.leader };
            effects.rejected.extend(self.reads.abandon().map(|ticket| (ticket, reason)));
        }
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

    fn is_log_persisted(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        log.persisted == log.last_index()
    }

    /// Whether an election may begin. The only voter wins it in the same step, which raft-rs allows
    /// only with a log that is durable to its end.
    fn may_campaign(&self) -> bool {
        !self.raw.raft.prs().is_singleton() || self.is_log_persisted()
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
            let own = raft.state == StateRole::Leader && term == raft.term;
            assert!(!own || index <= last, "an open proposal of this leader is beyond its log");
        }
        let own = raft.leader_id == raft.id;
        assert_eq!(raft.state == StateRole::Leader, own, "role and leader disagree");
        assert!(self.reads.len() == 0 || raft.state == StateRole::Leader, "reads without leading");
    }
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

#[cfg(test)]
mod tests;
