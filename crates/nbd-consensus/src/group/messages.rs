//! What peers say.

use bytes::Bytes;
use nbd_topology::ReplicaId;
use raft::CAMPAIGN_TRANSFER;
use raft::eraftpb::{Message, MessageType};

use super::Group;
use crate::codec;
use crate::effect::Effects;
use crate::error::MessageError;
use crate::guard::Guard;

impl Group {
    pub(super) fn take_message(
        &mut self,
        bytes: &Bytes,
        effects: &mut Effects,
    ) -> Result<(), MessageError> {
        let mut message = codec::decode(bytes)?;
        let raft = &self.raw.raft;
        let guard = Guard {
            replica: self.config.replica.get(),
            term: raft.term,
            leader: self.is_leader(),
            last: raft.raft_log.last_index(),
            entry_bytes_max: self.config.entry_bytes_max,
            is_sound: self.config.is_sound,
        };
        guard.check(&message, |id| raft.prs().get(id).is_some())?;
        if let Some(why) = self.must_ignore(&message) {
            let (shard, from, kind) = (self.config.shard, message.from, message.msg_type);
            tracing::debug!(%shard, from, ?kind, why, "message counts as lost");
            return Ok(());
        }
        self.note_sender(&message);
        if self.log_held {
            keep_off_log(&mut message);
        }
        let (kind, from, term) = (message.msg_type, message.from, message.term);
        if kind == MessageType::MsgSnapshot {
            let append = self.stand_in(&message);
            self.step_raft(append);
            effects.snapshot_offered = self.wanted_offer(&message);
            return Ok(());
        }
        self.step_raft(message);
        let raft = &self.raw.raft;
        match kind {
            MessageType::MsgAppendResponse if self.is_leader() => self.resume_from_log(from),
            MessageType::MsgRequestVote if (raft.term, raft.vote) == (term, from) => {
                self.watch.drop_hint();
            }
            _ => {}
        }
        Ok(())
    }

    fn step_raft(&mut self, message: Message) {
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(shard = %self.config.shard, %error, "message had no effect");
        }
    }

    /// Why the message must not reach raft-rs, if so. A vote that follows from a transfer may fall
    /// into a lease: the leader gave its own up before it asked for one.
    fn must_ignore(&self, message: &Message) -> Option<&'static str> {
        match message.msg_type {
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
                if self.watch.holds_votes() {
                    Some("too soon after the restart to vote")
                } else if self.watch.in_lease() && message.context != CAMPAIGN_TRANSFER {
                    Some("a leader that was heard from may hold a lease")
                } else {
                    None
                }
            }
            MessageType::MsgTimeoutNow if self.watch.holds_votes() => {
                Some("too soon after the restart to stand")
            }
            MessageType::MsgTimeoutNow if self.log_held => Some("a snapshot is being installed"),
            // A vote won while entries are not durable would make raft-rs panic. It cannot come
            // about if the request for it waited for them; if it did not, the vote counts as lost.
            MessageType::MsgRequestVoteResponse if !self.is_log_persisted() => {
                Some("vote arrived before the log was durable")
            }
            _ => None,
        }
    }

    /// Notes that the sender lives.
    fn note_sender(&mut self, message: &Message) {
        let term = self.raw.raft.term;
        let leads = matches!(
            message.msg_type,
            MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
        );
        if leads && message.term >= term {
            self.watch.heard(message.from);
        }
        if self.is_leader() && message.term == term {
            let member =
                ReplicaId::new(message.from).filter(|id| self.members.current().contains(*id));
            self.heard.extend(member.map(|member| (member, self.ticks)));
        }
    }
}

/// Makes a message one that neither adds to the log nor commits anything.
fn keep_off_log(message: &mut Message) {
    if message.msg_type == MessageType::MsgAppend {
        message.set_msg_type(MessageType::MsgHeartbeat);
        message.entries.clear();
        (message.index, message.log_term) = (0, 0);
    }
    (message.commit, message.commit_term) = (0, 0);
}
