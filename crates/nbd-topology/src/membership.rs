//! Who belongs to a group, and how that changes.

use std::collections::BTreeSet;
use std::fmt;

use crate::ids::ReplicaId;

/// The members of a group: voters, a majority of which decides, and learners, which take the log
/// but have no say. Nobody is both. The default has no member at all, which no group in operation
/// has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Membership {
    voters: BTreeSet<ReplicaId>,
    learners: BTreeSet<ReplicaId>,
}

/// One step from a [`Membership`] to the next. A single step keeps any majority of the old voters
/// and any majority of the new ones in touch: they share a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MembershipChange {
    /// A new voter, or a learner that becomes one.
    AddVoter(ReplicaId),
    /// A new learner.
    AddLearner(ReplicaId),
    /// A voter or learner that leaves for good: its id is never used again.
    Remove(ReplicaId),
}

impl Membership {
    /// These voters and no learners.
    pub fn of_voters(voters: impl IntoIterator<Item = ReplicaId>) -> Self {
        Self { voters: voters.into_iter().collect(), learners: BTreeSet::new() }
    }

    /// These voters and learners, or `None` if one is in both.
    pub fn new(
        voters: impl IntoIterator<Item = ReplicaId>,
        learners: impl IntoIterator<Item = ReplicaId>,
    ) -> Option<Self> {
        let membership =
            Self { voters: voters.into_iter().collect(), learners: learners.into_iter().collect() };
        membership.voters.is_disjoint(&membership.learners).then_some(membership)
    }

    /// The voters.
    #[must_use]
    pub const fn voters(&self) -> &BTreeSet<ReplicaId> {
        &self.voters
    }

    /// The learners.
    #[must_use]
    pub const fn learners(&self) -> &BTreeSet<ReplicaId> {
        &self.learners
    }

    /// Voters and learners, each once, by id.
    pub fn all(&self) -> impl Iterator<Item = ReplicaId> {
        self.voters.union(&self.learners).copied()
    }

    /// Whether the replica is a voter or a learner.
    #[must_use]
    pub fn contains(&self, replica: ReplicaId) -> bool {
        self.is_voter(replica) || self.learners.contains(&replica)
    }

    /// Whether the replica is a voter.
    #[must_use]
    pub fn is_voter(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica)
    }

    /// How many voters it takes to decide: more than half of them.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// The membership behind the change, or `None` if it has no effect: it is so already, a voter
    /// would become a learner, or no voter would be left. The same answer on every replica.
    #[must_use]
    pub fn after(&self, change: MembershipChange) -> Option<Self> {
        let mut after = self.clone();
        match change {
            MembershipChange::AddVoter(replica) => {
                after.learners.remove(&replica);
                after.voters.insert(replica);
            }
            MembershipChange::AddLearner(replica) if !self.is_voter(replica) => {
                after.learners.insert(replica);
            }
            MembershipChange::AddLearner(_) => {}
            MembershipChange::Remove(replica) => {
                after.learners.remove(&replica);
                after.voters.remove(&replica);
            }
        }
        (after != *self && !after.voters.is_empty()).then_some(after)
    }
}

impl MembershipChange {
    /// The replica that comes, rises or leaves.
    #[must_use]
    pub const fn replica(self) -> ReplicaId {
        match self {
            Self::AddVoter(replica) | Self::AddLearner(replica) | Self::Remove(replica) => replica,
        }
    }
}

impl fmt::Display for MembershipChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddVoter(replica) => write!(f, "add voter {replica}"),
            Self::AddLearner(replica) => write!(f, "add learner {replica}"),
            Self::Remove(replica) => write!(f, "remove {replica}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::MembershipChange::{AddLearner, AddVoter, Remove};
    use super::*;

    fn ids(ids: &[u64]) -> impl Iterator<Item = ReplicaId> {
        ids.iter().map(|id| ReplicaId::new(*id).unwrap())
    }

    fn id(id: u64) -> ReplicaId {
        ReplicaId::new(id).unwrap()
    }

    fn members(voters: &[u64], learners: &[u64]) -> Membership {
        Membership::new(ids(voters), ids(learners)).unwrap()
    }

    #[test]
    fn nobody_is_voter_and_learner() {
        assert_eq!(Membership::new(ids(&[1, 2]), ids(&[2, 3])), None);
        let some = members(&[3, 1], &[2, 9]);
        assert_eq!(some.all().collect::<Vec<_>>(), ids(&[1, 2, 3, 9]).collect::<Vec<_>>());
        assert!(some.contains(id(2)) && !some.is_voter(id(2)) && some.is_voter(id(3)));
        assert!(!some.contains(id(4)));
        assert_eq!(members(&[1, 2], &[]), Membership::of_voters(ids(&[2, 1])));
    }

    #[test]
    fn a_newcomer_learns_votes_and_leaves() {
        let three = Membership::of_voters(ids(&[1, 2, 3]));
        let learning = three.after(AddLearner(id(4))).unwrap();
        assert_eq!(learning, members(&[1, 2, 3], &[4]));
        let voting = learning.after(AddVoter(id(4))).unwrap();
        assert_eq!(voting, members(&[1, 2, 3, 4], &[]));
        let replaced = voting.after(Remove(id(2))).unwrap();
        assert_eq!(replaced, members(&[1, 3, 4], &[]));
        assert_eq!(learning.after(Remove(id(4))), Some(three.clone()));
        assert_eq!(three.after(AddVoter(id(5))), Some(members(&[1, 2, 3, 5], &[])));
    }

    #[test]
    fn changes_without_effect() {
        let some = members(&[1, 2], &[3]);
        for change in [AddVoter(id(1)), AddLearner(id(1)), AddLearner(id(3)), Remove(id(4))] {
            assert_eq!(some.after(change), None, "{change}");
        }
        // A learner does not replace the last voter.
        assert_eq!(members(&[1], &[3]).after(Remove(id(1))), None);
        assert_eq!(Membership::default().after(AddLearner(id(1))), None);
    }

    #[test]
    fn a_majority_is_more_than_half() {
        let majority = |voters: &[u64]| Membership::of_voters(ids(voters)).majority();
        assert_eq!(majority(&[1]), 1);
        assert_eq!(majority(&[1, 2]), 2);
        assert_eq!(majority(&[1, 2, 3]), 2);
        assert_eq!(majority(&[1, 2, 3, 4]), 3);
    }
}
