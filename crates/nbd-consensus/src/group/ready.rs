//! From raft-rs's decisions to effects.

use nbd_topology::LogIndex;
use raft::eraftpb::{self, MessageType};

use super::Group;
use crate::codec;
use crate::effect::{Append, Committed, Effects, RejectReason};
use crate::fault::Fault;

impl Group {
    /// Turns one ready of raft-rs into effects. In between, raft-rs must not be touched otherwise.
    pub(super) fn take_ready(&mut self, effects: &mut Effects) {
        let mut ready = self.raw.ready();
        assert!(ready.snapshot().is_empty(), "raft-rs is shown no snapshot");
        self.readies.issue(ready.number());
        for state in ready.take_read_states() {
            self.round_answered(&state.request_ctx, state.index, effects);
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
            let early = self.leaves_early(message.msg_type);
            let out = if early { &mut effects.send_now } else { &mut send_after_persist };
            codec::encode(message, out);
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
            let (change, membership) = self.change_membership(entry).unzip();
            let entry = codec::from_raft_entry(entry);
            effects.apply.push(Committed { entry, ticket, change, membership });
        }
    }

    /// Whether a message that promises something about the disk is sent without waiting for it: by
    /// mistake only.
    fn leaves_early(&self, kind: MessageType) -> bool {
        match kind {
            MessageType::MsgRequestVote | MessageType::MsgRequestVoteResponse => {
                self.config.makes(Fault::VoteBeforePersist)
            }
            MessageType::MsgAppendResponse => self.config.makes(Fault::AppendAckBeforePersist),
            _ => false,
        }
    }
}
