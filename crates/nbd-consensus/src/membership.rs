//! Membership changes as they are in the log, and the members at earlier indexes.

use std::collections::VecDeque;

use nbd_topology::{Membership, MembershipChange, ReplicaId};
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};

/// The change that the data of an [`EntryKind::ConfChange`](crate::EntryKind) entry stands for.
/// `None` if it cannot be decoded or names nobody: such an entry changes nothing, here as on every
/// replica. Whether the change has an effect is for
/// [`Membership::after`](nbd_topology::Membership::after) to say.
#[must_use]
pub fn decode_change(data: &[u8]) -> Option<MembershipChange> {
    let change = ConfChange::parse_from_bytes(data).ok()?;
    let replica = ReplicaId::new(change.node_id)?;
    Some(match change.change_type {
        ConfChangeType::AddNode => MembershipChange::AddVoter(replica),
        ConfChangeType::AddLearnerNode => MembershipChange::AddLearner(replica),
        ConfChangeType::RemoveNode => MembershipChange::Remove(replica),
    })
}

/// The change as raft-rs has it.
pub(crate) fn to_raft_change(change: MembershipChange) -> ConfChange {
    let change_type = match change {
        MembershipChange::AddVoter(_) => ConfChangeType::AddNode,
        MembershipChange::AddLearner(_) => ConfChangeType::AddLearnerNode,
        MembershipChange::Remove(_) => ConfChangeType::RemoveNode,
    };
    ConfChange { change_type, node_id: change.replica().get(), ..ConfChange::default() }
}

/// The data of the change's entry.
pub(crate) fn encode_change(change: MembershipChange) -> Vec<u8> {
    let bytes = to_raft_change(change).write_to_bytes();
    let Ok(bytes) = bytes else {
        unreachable!("a message of proto3 has no field that could be missing");
    };
    bytes
}

/// The members as raft-rs has them.
pub(crate) fn to_conf_state(membership: &Membership) -> ConfState {
    let ids = |ids: &mut dyn Iterator<Item = &ReplicaId>| ids.map(|id| id.get()).collect();
    ConfState {
        voters: ids(&mut membership.voters().iter()),
        learners: ids(&mut membership.learners().iter()),
        ..ConfState::default()
    }
}

/// The members that raft-rs has, or `None` if it holds what no [`Membership`] can be.
pub(crate) fn from_conf_state(state: &ConfState) -> Option<Membership> {
    if !state.voters_outgoing.is_empty() || !state.learners_next.is_empty() {
        return None;
    }
    let ids = |ids: &[u64]| ids.iter().map(|id| ReplicaId::new(*id)).collect::<Option<Vec<_>>>();
    Membership::new(ids(&state.voters)?, ids(&state.learners)?)
}

/// The members in force, and at every index since the last checkpoint: a snapshot names those as of
/// its own index.
#[derive(Debug)]
pub(crate) struct Members {
    /// From which index on each was in force. Never empty; indexes grow.
    history: VecDeque<(u64, Membership)>,
}

impl Members {
    /// `membership` is in force from `index` on.
    pub(crate) fn new(index: u64, membership: Membership) -> Self {
        Self { history: VecDeque::from([(index, membership)]) }
    }

    /// The members in force.
    pub(crate) fn current(&self) -> &Membership {
        let Some((_, membership)) = self.history.back() else {
            unreachable!("the history ends with the present");
        };
        membership
    }

    /// The entry at `index` puts `membership` into force.
    pub(crate) fn change(&mut self, index: u64, membership: Membership) {
        let last = self.history.back().map_or(0, |(last, _)| *last);
        assert!(last < index, "membership of {index} after that of {last}");
        self.history.push_back((index, membership));
    }

    /// The members as of `index`, which is not below the one of the last call; earlier ones are
    /// forgotten.
    pub(crate) fn forget_before(&mut self, index: u64) -> &Membership {
        while self.history.get(1).is_some_and(|(from, _)| *from <= index) {
            self.history.pop_front();
        }
        let Some((from, membership)) = self.history.front() else {
            unreachable!("the history ends with the present");
        };
        assert!(*from <= index, "the members as of {index} are forgotten");
        membership
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: u64) -> ReplicaId {
        ReplicaId::new(id).unwrap()
    }

    #[test]
    fn changes_survive_the_log() {
        for change in [
            MembershipChange::AddVoter(id(1)),
            MembershipChange::AddLearner(id(u64::MAX)),
            MembershipChange::Remove(id(300)),
        ] {
            assert_eq!(decode_change(&encode_change(change)), Some(change));
        }
        assert_eq!(decode_change(&[]), None, "nobody");
        assert_eq!(decode_change(&[0xff; 9]), None);
    }

    // Goal: logs written today are read by every later version.
    #[test]
    fn the_encoding_is_fixed() {
        assert_eq!(encode_change(MembershipChange::AddVoter(id(5))), [0x18, 5]);
        assert_eq!(encode_change(MembershipChange::Remove(id(5))), [0x10, 1, 0x18, 5]);
        assert_eq!(encode_change(MembershipChange::AddLearner(id(5))), [0x10, 2, 0x18, 5]);
    }

    #[test]
    fn members_survive_raft_rs() {
        let members = Membership::new([id(1), id(3)], [id(7)]).unwrap();
        let state = to_conf_state(&members);
        assert_eq!(from_conf_state(&state), Some(members));
        let both = ConfState { learners: vec![3], ..state.clone() };
        assert_eq!(from_conf_state(&both), None);
        let joint = ConfState { voters_outgoing: vec![1], ..state.clone() };
        assert_eq!(from_conf_state(&joint), None);
        assert_eq!(from_conf_state(&ConfState { voters: vec![0], ..state }), None);
    }

    #[test]
    fn members_are_known_as_of_a_checkpoint() {
        let of = |ids: &[u64]| Membership::of_voters(ids.iter().map(|n| id(*n)));
        let mut members = Members::new(4, of(&[1]));
        members.change(6, of(&[1, 2]));
        members.change(9, of(&[1, 2, 3]));
        assert_eq!(members.current(), &of(&[1, 2, 3]));
        assert_eq!(members.forget_before(5), &of(&[1]));
        assert_eq!(members.forget_before(6), &of(&[1, 2]));
        assert_eq!(members.forget_before(8), &of(&[1, 2]));
        assert_eq!(members.forget_before(20), &of(&[1, 2, 3]));
        assert_eq!(members.current(), &of(&[1, 2, 3]));
    }
}
