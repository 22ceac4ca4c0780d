//! What clients want in the log.

use raft::eraftpb::{self, MessageType};

use super::Group;
use crate::effect::{Effects, RejectReason};
use crate::input::Proposal;

impl Group {
    pub(super) fn propose(&mut self, proposals: Vec<Proposal>, effects: &mut Effects) {
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
    pub(super) fn proposals_refused(&self) -> Option<RejectReason> {
        let raft = &self.raw.raft;
        let leader = self.current_leadership().leader;
        if !self.is_leader() {
            Some(RejectReason::NotLeader { leader })
        } else if raft.lead_transferee.is_some() {
            Some(RejectReason::Transferring)
        } else {
            None
        }
    }
}
