//! Where a shard's leader is, and why it may not answer.

use nbd_topology::{NodeName, ReplicaId, Term};

/// Where a shard's leader is, as far as this process knows.
///
/// Comes from outside, over a watch channel: whoever learns of a leader sends a new one. While the
/// sender lives, no leader means that one is waited for; once it is gone, nothing more will come
/// ([`GroupStopped`]).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Route {
    /// Term in which it leads.
    pub term: Term,
    /// The leader, if one is known.
    pub leader: Option<LeaderAt>,
    /// The replica in this process leads and has applied an entry of its own term: from then on its
    /// store shows everything that was ever acknowledged. Never true in a process without replicas.
    pub serving: bool,
}

/// A leader and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderAt {
    /// The replica that leads.
    pub replica: ReplicaId,
    /// The node that hosts it.
    pub node: NodeName,
    /// Where that node's gRPC is, as host:port.
    pub grpc: String,
    /// It is this process's own.
    pub local: bool,
}

/// A node's NBD server, which can be attached to for any volume of the shards that the node hosts,
/// whoever leads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdAt {
    /// The node.
    pub node: NodeName,
    /// Host and port.
    pub nbd: String,
}

impl Route {
    /// The leader, if there is one that can be asked.
    #[must_use]
    pub fn usable(&self) -> Option<&LeaderAt> {
        self.leader.as_ref().filter(|leader| !leader.local || self.serving)
    }

    /// Whether another leader than `asked` is known by now.
    pub(crate) fn leads_away_from(&self, asked: &LeaderAt) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader != asked)
    }
}

/// The way to the shard's group is gone: this process is stopping or has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the shard's group has stopped")]
pub struct GroupStopped;

/// Why a command has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// Nothing was logged: this replica does not lead.
    #[error("this replica does not lead the shard")]
    NotLeader,
    /// It may or may not have happened.
    #[error("leadership was lost meanwhile")]
    Lost,
    /// See [`GroupStopped`].
    #[error(transparent)]
    Stopped(#[from] GroupStopped),
}
