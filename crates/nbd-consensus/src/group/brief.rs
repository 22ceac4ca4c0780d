//! How a group stands, for those who look after every step.

use nbd_topology::LogIndex;

use super::Group;
use crate::effect::{Brief, Leadership, Role};

impl Group {
    /// Role, term and leader as of the last step.
    #[must_use]
    pub const fn leadership(&self) -> Leadership {
        self.leadership
    }

    /// The part of [`Group::status`] that costs nothing.
    #[must_use]
    pub fn brief(&self) -> Brief {
        let raft = &self.raw.raft;
        let Leadership { role, term, leader } = self.leadership;
        Brief {
            role,
            term,
            leader,
            committed: LogIndex(raft.raft_log.committed),
            applied: LogIndex(raft.raft_log.applied),
            serving: role == Role::Leader && raft.apply_to_current_term(),
            voter: raft.promotable(),
        }
    }

    /// The highest index that enough other voters have to make a majority with this leader. `None`
    /// if it does not lead, or needs nobody. Costs next to nothing, unlike [`Group::status`].
    #[must_use]
    pub fn replicated(&self) -> Option<LogIndex> {
        if self.leadership.role != Role::Leader {
            return None;
        }
        let (voters, me) = (self.members.current().voters(), self.config.replica);
        let needed = voters.len() / 2 + 1 - usize::from(voters.contains(&me));
        if needed == 0 {
            return None;
        }
        let matched = || {
            let others = voters.iter().filter(|voter| **voter != me);
            let progress = others.filter_map(|voter| self.raw.raft.prs().get(voter.get()));
            progress.map(|progress| progress.matched)
        };
        let enough = |index: &u64| matched().filter(|other| other >= index).count() >= needed;
        matched().filter(enough).max().map(LogIndex)
    }
}
