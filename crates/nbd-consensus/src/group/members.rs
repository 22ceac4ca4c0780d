//! Changes of the membership: which ones a leader proposes, and how they come into force.
//!
//! raft-rs puts a change into force when it is applied, not when it is logged. Majorities of two
//! memberships that are one change apart share a replica; what keeps anyone from deciding by a
//! membership two changes old is that nobody stands for election before it has put into force
//! every change that it knows to be committed, and that whoever has a change in its log knows the
//! one before it to be committed: a leader proposes none before the last is applied. A restart must
//! not forget that; see [`known_committed`].

use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId};
use raft::eraftpb::{self, EntryType, MessageType};

use super::Group;
use crate::effect::{Effects, RejectReason};
use crate::input::{Entry, EntryKind, Ticket};
use crate::limits::{LEARNERS_MAX, PROMOTION_LAG_MAX, VOTERS_MAX};
use crate::membership::{decode_change, encode_change, from_conf_state, to_raft_change};

/// Index up to which the entries of a log's end are committed, whatever the hard state says: the
/// last membership change but one. It was applied where the last was proposed.
pub(super) fn known_committed(tail: &[Entry]) -> LogIndex {
    let mut changes = tail.iter().rev().filter(|entry| entry.kind != EntryKind::Command);
    changes.nth(1).map_or(LogIndex::ZERO, |entry| entry.index)
}

impl Group {
    pub(super) fn propose_change(
        &mut self,
        ticket: Ticket,
        change: MembershipChange,
        effects: &mut Effects,
    ) {
        if let Some(reason) = self.change_refused(change) {
            effects.rejected.push((ticket, reason));
            return;
        }
        let raft = &mut self.raw.raft;
        let (index, term) = (raft.raft_log.last_index() + 1, raft.term);
        let mut entry = eraftpb::Entry { data: encode_change(change).into(), ..Default::default() };
        entry.set_entry_type(EntryType::EntryConfChange);
        let mut message = eraftpb::Message { from: raft.id, ..eraftpb::Message::default() };
        message.set_msg_type(MessageType::MsgPropose);
        message.set_entries(vec![entry].into());
        if raft.step(message).is_err() {
            effects.rejected.push((ticket, RejectReason::Full));
            return;
        }
        self.proposals.logged(index, term, ticket);
    }

    fn change_refused(&self, change: MembershipChange) -> Option<RejectReason> {
        if let Some(reason) = self.proposals_refused() {
            return Some(reason);
        }
        // A new leader does not know whether a change that it found in its log is committed.
        if self.raw.raft.has_pending_conf() || !self.is_serving() {
            return Some(RejectReason::MembershipBusy);
        }
        let Some(after) = self.members.current().after(change) else {
            return Some(RejectReason::NoEffect);
        };
        if after.voters().len() > VOTERS_MAX || after.learners().len() > LEARNERS_MAX {
            return Some(RejectReason::TooManyMembers);
        }
        match change {
            MembershipChange::AddVoter(replica) if !self.is_caught_up(replica) => {
                Some(RejectReason::NotCaughtUp)
            }
            MembershipChange::Remove(replica)
                if self.members.current().is_voter(replica)
                    && !self.has_active_majority(&after) =>
            {
                Some(RejectReason::QuorumAtRisk)
            }
            _ => None,
        }
    }

    /// Whether this is an active learner whose log ends close to the leader's.
    fn is_caught_up(&self, replica: ReplicaId) -> bool {
        let learner = self.members.current().learners().contains(&replica);
        let last = self.raw.raft.raft_log.last_index();
        let progress = self.raw.raft.prs().get(replica.get());
        learner
            && self.is_active(replica)
            && progress.is_some_and(|progress| progress.matched + PROMOTION_LAG_MAX >= last)
    }

    fn has_active_majority(&self, members: &Membership) -> bool {
        let own = self.config.replica;
        let active = |voter: &&ReplicaId| **voter == own || self.is_active(**voter);
        members.voters().iter().filter(active).count() >= members.majority()
    }

    /// Puts a committed membership change into force. One that cannot be decoded or done has no
    /// effect, the same on every replica.
    pub(super) fn change_membership(
        &mut self,
        entry: &eraftpb::Entry,
    ) -> Option<(MembershipChange, Membership)> {
        let (shard, index) = (self.config.shard, entry.index);
        let change = match entry.entry_type {
            EntryType::EntryNormal => return None,
            EntryType::EntryConfChange => decode_change(&entry.data),
            // Nobody proposes one.
            EntryType::EntryConfChangeV2 => None,
        };
        let effective = change.and_then(|change| {
            let after = self.members.current().after(change)?;
            Some((change, after))
        });
        let Some((change, after)) = effective else {
            tracing::warn!(%shard, index, ?change, "membership change has no effect");
            return None;
        };
        let state = self.raw.apply_conf_change(&to_raft_change(change));
        let members = state.ok().as_ref().and_then(from_conf_state);
        assert_eq!(members.as_ref(), Some(&after), "raft-rs has other members after {change}");
        if after.voters() != self.members.current().voters() {
            self.lease.void(self.reads.last());
        }
        self.members.change(index, after.clone());
        if let MembershipChange::Remove(replica) = change {
            self.heard.remove(&replica);
        }
        // raft-rs would let it lead on, without a vote of its own.
        if self.is_leader() && !after.is_voter(self.config.replica) {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, raft::INVALID_ID);
        }
        Some((change, after))
    }
}
