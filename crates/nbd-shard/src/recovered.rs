//! From what the store found on disk to what Raft goes on with.

use nbd_consensus::{Entry, EntryKind as RaftKind, HardState, Recovered};
use nbd_log::log::EntryKind;
use nbd_store::{RaftRecovered, TailEntry};
use nbd_topology::ReplicaId;

/// Raft's name for a kind of entry in the log.
#[must_use]
pub const fn raft_kind(kind: EntryKind) -> RaftKind {
    match kind {
        EntryKind::Command => RaftKind::Command,
        EntryKind::ConfChange => RaftKind::ConfChange,
        EntryKind::ConfChangeV2 => RaftKind::ConfChangeV2,
    }
}

/// The log's name for a kind of entry.
#[must_use]
pub const fn log_kind(kind: RaftKind) -> EntryKind {
    match kind {
        RaftKind::Command => EntryKind::Command,
        RaftKind::ConfChange => EntryKind::ConfChange,
        RaftKind::ConfChangeV2 => EntryKind::ConfChangeV2,
    }
}

/// The log's words for a hard state.
pub(crate) fn log_hard_state(state: HardState) -> nbd_log::log::HardState {
    let HardState { term, vote, commit } = state;
    nbd_log::log::HardState { term, vote: vote.map_or(0, ReplicaId::get), commit }
}

/// What the store recovered, for the consensus step; `raft.kept` stays behind.
pub(crate) fn recovered(raft: &mut RaftRecovered) -> Recovered {
    let entry = |entry: TailEntry| Entry {
        index: entry.index,
        term: entry.term,
        kind: raft_kind(entry.kind),
        data: entry.data,
    };
    Recovered {
        hard_state: HardState {
            term: raft.hard_state.term,
            vote: ReplicaId::new(raft.hard_state.vote),
            commit: raft.hard_state.commit,
        },
        membership: raft.membership.clone(),
        applied: raft.applied,
        compacted: raft.compacted,
        terms: std::mem::take(&mut raft.terms),
        tail: std::mem::take(&mut raft.tail).into_iter().map(entry).collect(),
    }
}
