//! Between this crate's types and raft-rs's, and between raft-rs's messages and opaque bytes.

use bytes::Bytes;
use nbd_topology::{LogIndex, ReplicaId, Term};
use protobuf::Message as _;
use raft::StateRole;
use raft::eraftpb::{self, EntryType, MessageType};

use crate::effect::{OutMessage, Role};
use crate::error::MessageError;
use crate::input::{Entry, EntryKind};
use crate::limits::MESSAGE_BYTES_MAX;

/// An entry as raft-rs has it. The data is shared.
pub(crate) fn to_raft_entry(entry: &Entry) -> eraftpb::Entry {
    let entry_type = match entry.kind {
        EntryKind::Command => EntryType::EntryNormal,
        EntryKind::ConfChange => EntryType::EntryConfChange,
        EntryKind::ConfChangeV2 => EntryType::EntryConfChangeV2,
    };
    eraftpb::Entry {
        entry_type,
        index: entry.index.0,
        term: entry.term.0,
        data: entry.data.clone(),
        ..eraftpb::Entry::default()
    }
}

/// An entry from raft-rs. The data is shared.
pub(crate) fn from_raft_entry(entry: &eraftpb::Entry) -> Entry {
    Entry {
        index: LogIndex(entry.index),
        term: Term(entry.term),
        kind: match entry.entry_type {
            EntryType::EntryNormal => EntryKind::Command,
            EntryType::EntryConfChange => EntryKind::ConfChange,
            EntryType::EntryConfChangeV2 => EntryKind::ConfChangeV2,
        },
        data: entry.data.clone(),
    }
}

/// A role from raft-rs.
pub(crate) const fn role(state: StateRole) -> Role {
    match state {
        StateRole::Follower => Role::Follower,
        StateRole::PreCandidate => Role::PreCandidate,
        StateRole::Candidate => Role::Candidate,
        StateRole::Leader => Role::Leader,
    }
}

/// Parses a peer's message; data in it refers to `bytes`.
pub(crate) fn decode(bytes: &Bytes) -> Result<eraftpb::Message, MessageError> {
    eraftpb::Message::parse_from_carllerche_bytes(bytes).map_err(|_| MessageError::Malformed)
}

/// Encodes a message of raft-rs and appends it to `out`.
///
/// raft-rs's `batch_append` merges what it would have sent as many messages into one, up to the
/// whole in-flight window. Such a message is cut again into pieces of [`MESSAGE_BYTES_MAX`], each a
/// proper append of its own, so that nothing waits long behind one message.
pub(crate) fn encode(mut message: eraftpb::Message, out: &mut Vec<OutMessage>) {
    let entries = message.take_entries().into_vec();
    if message.msg_type != MessageType::MsgAppend || entries.is_empty() {
        message.set_entries(entries.into());
        push(&message, out);
        return;
    }
    let mut piece = Vec::new();
    let mut piece_bytes = 0;
    for entry in entries {
        let bytes = u64::from(entry.compute_size());
        if piece_bytes + bytes > MESSAGE_BYTES_MAX && !piece.is_empty() {
            push_piece(&mut message, &mut piece, out);
            piece_bytes = 0;
        }
        piece_bytes += bytes;
        piece.push(entry);
    }
    push_piece(&mut message, &mut piece, out);
}

/// Sends `piece` in `message`, and makes `message` continue behind it.
fn push_piece(
    message: &mut eraftpb::Message,
    piece: &mut Vec<eraftpb::Entry>,
    out: &mut Vec<OutMessage>,
) {
    let last = piece.last().map(|entry| (entry.index, entry.term));
    message.set_entries(std::mem::take(piece).into());
    push(message, out);
    message.entries.clear();
    if let Some((index, term)) = last {
        message.index = index;
        message.log_term = term;
    }
}

fn push(message: &eraftpb::Message, out: &mut Vec<OutMessage>) {
    let Some(to) = ReplicaId::new(message.to) else {
        unreachable!("raft-rs sends to members only");
    };
    let mut bytes = Vec::with_capacity(message.compute_size() as usize);
    let written = message.write_to_vec(&mut bytes);
    assert!(written.is_ok(), "a message of proto3 has no field that could be missing");
    // Also without entries: one that overtook those with entries would be taken for a gap.
    let bulk = message.msg_type == MessageType::MsgAppend;
    out.push(OutMessage { to, bulk, bytes: bytes.into() });
}
