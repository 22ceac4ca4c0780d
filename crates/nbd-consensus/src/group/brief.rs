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
}
