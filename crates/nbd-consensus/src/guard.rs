//! Checks on peer messages, before raft-rs sees them.
//!
//! raft-rs trusts its peers: it panics on a commit index beyond its log, takes a term of 0 for a
//! local event, and adds to numbers it was sent. Everything a broken peer could trip it with is
//! refused here. What cannot be checked is a peer that lies plausibly, say about what it persisted.

use protobuf::ProtobufEnum as _;
use raft::eraftpb::{EntryType, Message, MessageType};

use crate::error::MessageError;
use crate::limits::COUNTER_MAX;
use crate::membership::from_conf_state;

/// What a message is checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    /// This replica.
    pub(crate) replica: u64,
    /// The current term.
    pub(crate) term: u64,
    /// Whether this replica leads in `term`.
    pub(crate) leader: bool,
    /// Highest index in the log.
    pub(crate) last: u64,
    /// Largest data of an entry.
    pub(crate) entry_bytes_max: usize,
    /// Whether the data of a command entry is whole.
    pub(crate) is_sound: fn(&[u8]) -> bool,
}

impl Guard {
    /// Refuses what raft-rs must not see. `is_member` tells whether an id belongs to the group as
    /// far as this replica knows. That may be less than the truth, for a membership change reaches
    /// some later than others: of a sender unknown here, what a new leader or candidate would say
    /// is taken, in a term that is not past. Raft keeps that safe.
    pub(crate) fn check(
        &self,
        message: &Message,
        is_member: impl Fn(u64) -> bool,
    ) -> Result<(), MessageError> {
        if message.to != self.replica {
            return Err(MessageError::Recipient { to: message.to });
        }
        let from = message.from;
        let newcomer = message.term >= self.term && leads_or_stands(message.msg_type);
        if from == self.replica || from == 0 || !(newcomer || is_member(from)) {
            return Err(MessageError::Sender { from });
        }
        let counters = [
            message.term,
            message.log_term,
            message.index,
            message.commit,
            message.commit_term,
            message.reject_hint,
        ];
        if let Some(&value) = counters.iter().find(|value| **value > COUNTER_MAX) {
            return Err(MessageError::Range { value });
        }
        // Each kind that peers send carries its sender's term; 0 would pass for a local event.
        if message.term == 0 {
            return Err(MessageError::Range { value: 0 });
        }
        match message.msg_type {
            MessageType::MsgAppend => self.check_append(message),
            MessageType::MsgHeartbeat => self.check_heartbeat(message),
            MessageType::MsgAppendResponse => self.check_append_response(message),
            MessageType::MsgSnapshot => check_snapshot(message),
            MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse
            | MessageType::MsgTimeoutNow => Ok(()),
            kind => Err(MessageError::Kind { kind: kind.value() }),
        }
    }

    fn check_append(&self, message: &Message) -> Result<(), MessageError> {
        let mut index = message.index;
        let mut term = message.log_term;
        for entry in &message.entries {
            index += 1;
            if entry.index != index || entry.term < term || entry.term > message.term {
                return Err(MessageError::Entries { index });
            }
            term = entry.term;
            let bytes = entry.data.len();
            if bytes > self.entry_bytes_max {
                return Err(MessageError::EntryTooLarge { index, bytes });
            }
            if entry.entry_type == EntryType::EntryNormal && !(self.is_sound)(&entry.data) {
                return Err(MessageError::Damaged { index });
            }
        }
        if term > message.term {
            return Err(MessageError::Entries { index });
        }
        Ok(())
    }

    /// A heartbeat's commit index never exceeds what this replica acknowledged.
    const fn check_heartbeat(&self, message: &Message) -> Result<(), MessageError> {
        if message.commit > self.last {
            return Err(MessageError::CommitBeyondLog { commit: message.commit, last: self.last });
        }
        Ok(())
    }

    /// Answers from an earlier term may name entries that were lost since; raft-rs ignores them.
    fn check_append_response(&self, message: &Message) -> Result<(), MessageError> {
        if message.request_snapshot != 0 {
            return Err(MessageError::Kind { kind: MessageType::MsgSnapshot.value() });
        }
        let index = message.index.max(message.reject_hint);
        if self.leader && message.term == self.term && index > self.last {
            return Err(MessageError::IndexBeyondLog { index, last: self.last });
        }
        Ok(())
    }
}

/// Whether messages of this kind come from leaders or candidates.
const fn leads_or_stands(kind: MessageType) -> bool {
    matches!(
        kind,
        MessageType::MsgAppend
            | MessageType::MsgHeartbeat
            | MessageType::MsgSnapshot
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestPreVote
    )
}

/// A snapshot is a place in the log and the members there, and nothing else.
fn check_snapshot(message: &Message) -> Result<(), MessageError> {
    let snapshot = message.get_snapshot();
    let metadata = snapshot.get_metadata();
    let (index, term) = (metadata.index, metadata.term);
    if let Some(&value) = [index, term].iter().find(|value| **value > COUNTER_MAX) {
        return Err(MessageError::Range { value });
    }
    let members = from_conf_state(metadata.get_conf_state());
    let voters = members.map_or(0, |members| members.voters().len());
    let sane = index > 0 && (1..=message.term).contains(&term) && snapshot.data.is_empty();
    if !sane || voters == 0 || !message.entries.is_empty() {
        return Err(MessageError::Snapshot { index });
    }
    Ok(())
}
