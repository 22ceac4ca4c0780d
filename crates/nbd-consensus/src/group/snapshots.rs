//! When a follower needs entries that its leader no longer has.
//!
//! Raft snapshots carry no contents here, only a place in the log. A leader sends one to say what
//! it has to offer; the follower passes that on to its caller, which fetches the contents by other
//! means. raft-rs never sees a snapshot arrive: once the contents are installed, it is set up anew
//! behind them, as after a restart.

use nbd_topology::{LogIndex, Membership, ReplicaId, Term};
use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, SnapshotStatus, StateRole, Storage as _};

use super::{Group, raw_node};
use crate::config::Recovered;
use crate::effect::{Effects, HardState, SnapshotOffer};
use crate::membership::Members;

impl Group {
    /// Whether this replica would gain by a snapshot that covers everything up to this entry. If
    /// not, it must not be installed: the log covers it already, or this replica leads, or has not
    /// yet heard of the entry's term (the contents are of a later checkpoint than was offered, and
    /// the next offer will be taken).
    #[must_use]
    pub fn wants_snapshot(&self, index: LogIndex, term: Term) -> bool {
        let known = term.0 <= self.raw.raft.term;
        known && !self.is_leader() && !self.log_covers(index.0, term.0)
    }

    fn log_covers(&self, index: u64, term: u64) -> bool {
        let log = &self.raw.raft.raft_log;
        index <= log.committed || log.match_term(index, term)
    }

    /// Offers the state machine as of what is applied, which is also the last checkpoint.
    pub(super) fn offer_applied(&mut self) {
        let index = self.raw.store().applied();
        let term = self.raw.store().term(index);
        if let (1.., Ok(term)) = (index, term) {
            self.checkpointed(LogIndex(index), Term(term));
        }
    }

    pub(super) fn checkpointed(&mut self, index: LogIndex, term: Term) {
        let store = self.raw.mut_store();
        assert!(index.0 <= store.applied(), "checkpoint {index} is beyond what is applied");
        if store.offered().is_none_or(|offered| offered < index.0) {
            store.offer(index.0, term.0, self.members.forget_before(index.0));
        }
    }

    /// As leader, takes a snapshot that was offered to `peer` for lost.
    pub(super) fn offer_again(&mut self, peer: ReplicaId) {
        let progress = self.raw.raft.prs().get(peer.get());
        if progress.is_some_and(|progress| progress.state == ProgressState::Snapshot) {
            self.raw.report_snapshot(peer.get(), SnapshotStatus::Failure);
        }
    }

    /// As leader, goes on with the log for a peer that turns out to have all that was compacted:
    /// it installed an earlier snapshot than the one it was offered last, or was fed by another
    /// leader.
    pub(super) fn resume_from_log(&mut self, peer: u64) {
        let compacted = self.raw.store().compacted();
        let progress = self.raw.raft.prs().get(peer);
        if progress.is_some_and(|progress| {
            progress.state == ProgressState::Snapshot && progress.matched >= compacted
        }) {
            self.raw.report_snapshot(peer, SnapshotStatus::Failure);
        }
    }

    /// The append that stands in for a leader's offer: it counts as a word from the leader, and is
    /// answered with how far this log agrees with the leader's for certain.
    pub(super) fn stand_in(&self, offer: &Message) -> Message {
        let metadata = offer.get_snapshot().get_metadata();
        let mut append =
            Message { to: offer.to, from: offer.from, term: offer.term, ..Message::default() };
        append.set_msg_type(MessageType::MsgAppend);
        let has = self.raw.raft.raft_log.match_term(metadata.index, metadata.term);
        if has && !self.log_held {
            (append.index, append.log_term) = (metadata.index, metadata.term);
            append.commit = metadata.index;
        }
        append
    }

    /// What the leader of the current term offered, if this replica wants it.
    pub(super) fn wanted_offer(&self, offer: &Message) -> Option<SnapshotOffer> {
        let metadata = offer.get_snapshot().get_metadata();
        let (index, term) = (LogIndex(metadata.index), Term(metadata.term));
        let raft = &self.raw.raft;
        let current = (offer.term, offer.from) == (raft.term, raft.leader_id);
        let from =
            ReplicaId::new(offer.from).filter(|_| current && self.wants_snapshot(index, term))?;
        Some(SnapshotOffer { from, index, term })
    }

    pub(super) fn hold_log(&mut self, held: bool) {
        if self.is_leader() {
            return;
        }
        self.log_held = held;
        let raft = &mut self.raw.raft;
        if held && raft.state != StateRole::Follower {
            // An election that is under way could be won.
            raft.become_follower(raft.term, raft::INVALID_ID);
        }
    }

    pub(super) fn install_snapshot(
        &mut self,
        index: LogIndex,
        term: Term,
        membership: Membership,
        effects: &mut Effects,
    ) {
        let raft = &self.raw.raft;
        assert!(self.wants_snapshot(index, term), "the log covers the snapshot at {index}");
        assert_eq!(raft.raft_log.applied, self.handed_out, "not everything is applied");
        assert!(self.is_log_persisted(), "entries are on their way to the disk");
        let (leader, elapsed) = (raft.leader_id, raft.election_elapsed);
        let recovered = Recovered {
            hard_state: HardState { commit: index, ..self.current_hard_state() },
            membership,
            applied: index,
            compacted: (index, term),
            terms: Vec::new(),
            tail: Vec::new(),
        };
        let valid = recovered.validate();
        assert_eq!(valid, Ok(()), "a snapshot that no leader of this term can have");
        self.raw = raw_node(&self.config, &recovered);
        self.readies.start_over();
        self.members = Members::new(index.0, recovered.membership);
        self.handed_out = index.0;
        self.log_held = false;
        self.offer_applied();
        let raft = &mut self.raw.raft;
        raft.become_follower(raft.term, leader);
        raft.election_elapsed = elapsed;
        if leader != raft::INVALID_ID {
            let mut answer =
                Message { to: leader, from: raft.id, term: raft.term, ..Default::default() };
            answer.set_msg_type(MessageType::MsgAppendResponse);
            (answer.index, answer.commit) = (index.0, index.0);
            raft.msgs.push(answer);
        }
        let mut rejected = Vec::new();
        self.proposals.covered(index.0, term.0, |ticket, reason| rejected.push((ticket, reason)));
        effects.rejected.append(&mut rejected);
    }
}
