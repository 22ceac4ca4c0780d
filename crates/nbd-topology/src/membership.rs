//! Who belongs to a group, and how that changes.

use std::collections::BTreeSet;

use crate::ids::ReplicaId;

/// The members of a group: voters, whose majority decides, and learners, which only receive. No
/// replica is both. A default membership is empty: that of a group that was not formed yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Membership {
    voters: BTreeSet<ReplicaId>,
    learners: BTreeSet<ReplicaId>,
}

/// One step of a membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MembershipChange {
    /// A new voter, or a learner that becomes one.
    AddVoter(ReplicaId),
    /// A new learner.
    AddLearner(ReplicaId),
    /// A voter or learner that leaves.
    Remove(ReplicaId),
}

impl Membership {
    /// The membership of these voters and no learners.
    #[must_use]
    pub fn of_voters(voters: impl IntoIterator<Item = ReplicaId>) -> Self {
        Self { voters: voters.into_iter().collect(), learners: BTreeSet::new() }
    }

    /// Those whose majority decides.
    #[must_use]
    pub const fn voters(&self) -> &BTreeSet<ReplicaId> {
        &self.voters
    }

    /// Those that only receive.
    #[must_use]
    pub const fn learners(&self) -> &BTreeSet<ReplicaId> {
        &self.learners
    }

    /// Whether the replica is a voter or a learner.
    #[must_use]
    pub fn contains(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica) || self.learners.contains(&replica)
    }

    /// Whether the replica is a voter.
    #[must_use]
    pub fn is_voter(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica)
    }

    /// Voters, then learners, each by id.
    pub fn all(&self) -> impl Iterator<Item = ReplicaId> {
        self.voters.iter().chain(&self.learners).copied()
    }

    /// The membership behind the change; `None` if it has no effect: it is so already, it would
    /// leave no voter, or it would make a voter a learner.
    #[must_use]
    pub fn after(&self, change: MembershipChange) -> Option<Self> {
        let mut next = self.clone();
        let effective = match change {
            MembershipChange::AddVoter(replica) => {
                next.learners.remove(&replica);
                next.voters.insert(replica)
            }
            MembershipChange::AddLearner(replica) => {
                !self.is_voter(replica) && next.learners.insert(replica)
            }
            MembershipChange::Remove(replica) => {
                next.voters.remove(&replica) || next.learners.remove(&replica)
            }
        };
        (effective && !next.voters.is_empty()).then_some(next)
    }
}
