//! What the leader makes of a call about members, by the group's state alone.

use nbd_consensus::{RejectReason, Status};
use nbd_store::{ReplicaInfo, ReplicaRegistration};
use nbd_topology::ReplicaId;

/// Why a call is turned down. The texts are for operators.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// A node's old replica is alive: two directories must not be one node.
    #[error(
        "replica {replica} of node {node}, in another data directory, is alive: stop that process \
         first, or wait until the group has not heard from it for an election timeout"
    )]
    Alive { replica: ReplicaId, node: String },
    /// No such member.
    #[error("replica {0} is not a member of the group")]
    NotMember(ReplicaId),
    /// It cannot vote.
    #[error("replica {0} is a learner and cannot lead")]
    CannotLead(ReplicaId),
    /// It would not answer.
    #[error("replica {0} has not been heard from lately and cannot take over")]
    Silent(ReplicaId),
    /// There is nobody to hand leadership to.
    #[error("there is no other voter that is alive")]
    NoSuccessor,
    /// Removing it would leave no voter.
    #[error("replica {0} is the only voter: add another one first")]
    LastVoter(ReplicaId),
    /// The log did not take the change.
    #[error("{0}")]
    Rejected(RejectReason),
}

/// Whether the leader, or a peer that it has heard from lately.
fn is_alive(status: &Status, me: ReplicaId, replica: ReplicaId) -> bool {
    let is_active = |peer: &&nbd_consensus::PeerStatus| peer.replica == replica && peer.active;
    replica == me || status.peers.iter().any(|peer| is_active(&peer))
}

/// Members on the same node, but with another directory.
fn predecessors<'a>(
    status: &'a Status,
    replicas: &'a [ReplicaInfo],
    node: &'a nbd_topology::NodeName,
    directory: u128,
) -> impl Iterator<Item = &'a ReplicaInfo> {
    replicas.iter().filter(move |info| {
        info.node == *node && info.directory != directory && status.membership.contains(info.id)
    })
}

/// Whether a node may become a replica with this directory.
pub(crate) fn may_join(
    status: &Status,
    replicas: &[ReplicaInfo],
    me: ReplicaId,
    new: &ReplicaRegistration,
) -> Result<(), Denied> {
    let mut old = predecessors(status, replicas, &new.node, new.directory);
    match old.find(|old| is_alive(status, me, old.id)) {
        Some(old) => Err(Denied::Alive { replica: old.id, node: new.node.to_string() }),
        None => Ok(()),
    }
}

/// The next step on the way to a learner's vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promotion {
    /// It votes.
    Done,
    /// First this one leaves: the node's dead replica.
    Remove(ReplicaId),
    /// Nothing is in the way.
    Promote,
}

/// How to go on with a learner that has caught up.
pub(crate) fn promotion(
    status: &Status,
    replicas: &[ReplicaInfo],
    me: ReplicaId,
    replica: ReplicaId,
) -> Result<Promotion, Denied> {
    if status.membership.is_voter(replica) {
        return Ok(Promotion::Done);
    }
    let new = replicas.iter().find(|info| info.id == replica);
    let new = new.filter(|_| status.membership.contains(replica));
    let new = new.ok_or(Denied::NotMember(replica))?;
    let mut old = predecessors(status, replicas, &new.node, new.directory);
    match old.next() {
        None => Ok(Promotion::Promote),
        Some(old) if is_alive(status, me, old.id) => {
            Err(Denied::Alive { replica: old.id, node: new.node.to_string() })
        }
        Some(old) => Ok(Promotion::Remove(old.id)),
    }
}

/// How to remove a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It is no member.
    Done,
    /// It leads: first this one takes over.
    HandOver(ReplicaId),
    /// Nothing is in the way but the group's own rules.
    Remove,
}

/// How to go on with removing a replica.
pub(crate) fn removal(
    status: &Status,
    me: ReplicaId,
    replica: ReplicaId,
) -> Result<Removal, Denied> {
    if !status.membership.contains(replica) {
        return Ok(Removal::Done);
    }
    if status.membership.is_voter(replica) && status.membership.voters().len() == 1 {
        return Err(Denied::LastVoter(replica));
    }
    if replica == me { Ok(Removal::HandOver(successor(status)?)) } else { Ok(Removal::Remove) }
}

/// The voter, other than the leader, that is alive and furthest.
pub(crate) fn successor(status: &Status) -> Result<ReplicaId, Denied> {
    let fit = status.peers.iter().filter(|peer| peer.active && !peer.learner && !peer.snapshot);
    // Of several the one with the lowest id, so that the choice can be foretold.
    let best = fit.max_by_key(|peer| (peer.matched, std::cmp::Reverse(peer.replica)));
    best.map(|peer| peer.replica).ok_or(Denied::NoSuccessor)
}

/// Whether leadership may be handed to `to`.
pub(crate) fn may_lead(status: &Status, to: ReplicaId) -> Result<(), Denied> {
    if !status.membership.contains(to) {
        return Err(Denied::NotMember(to));
    }
    if !status.membership.is_voter(to) {
        return Err(Denied::CannotLead(to));
    }
    let is_active = status.peers.iter().any(|peer| peer.replica == to && peer.active);
    if is_active { Ok(()) } else { Err(Denied::Silent(to)) }
}

impl Denied {
    /// The gRPC status: whether it may be worth asking again at once, later, or never.
    pub(crate) fn into_status(self) -> tonic::Status {
        let text = self.to_string();
        match self {
            Self::NotMember(_) => tonic::Status::not_found(text),
            Self::Rejected(
                RejectReason::MembershipBusy
                | RejectReason::Transferring
                | RejectReason::Full
                | RejectReason::NotLeader { .. }
                | RejectReason::Superseded
                | RejectReason::Unknown,
            ) => tonic::Status::unavailable(text),
            _ => tonic::Status::failed_precondition(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use nbd_consensus::{PeerStatus, Role};
    use nbd_store::ReplicaAddresses;
    use nbd_topology::{LogIndex, Membership, Term};

    use super::*;

    fn id(id: u64) -> ReplicaId {
        ReplicaId::new(id).unwrap()
    }

    fn info(n: u64, node: &str, directory: u128) -> ReplicaInfo {
        let (node, addresses) = (node.parse().unwrap(), ReplicaAddresses::default());
        ReplicaInfo { id: id(n), node, directory, addresses }
    }

    fn new(node: &str, directory: u128) -> ReplicaRegistration {
        let (node, addresses) = (node.parse().unwrap(), ReplicaAddresses::default());
        ReplicaRegistration { node, directory, addresses }
    }

    /// Replica 1 leads; each peer is (id, matched, active, learner).
    fn status(peers: &[(u64, u64, bool, bool)]) -> Status {
        let of = |learner: bool| {
            peers.iter().filter(move |peer| peer.3 == learner).map(|peer| id(peer.0))
        };
        let membership = Membership::new([id(1)].into_iter().chain(of(false)), of(true)).unwrap();
        let index = LogIndex(100);
        Status {
            role: Role::Leader,
            term: Term(3),
            leader: Some(id(1)),
            serving: true,
            compacted: LogIndex::ZERO,
            applied: index,
            handed_out: index,
            committed: index,
            persisted: index,
            last: index,
            appends_outstanding: 0,
            proposals_open: 0,
            reads_waiting: 0,
            uncommitted_bytes: 0,
            membership,
            transferring: None,
            lease_until: None,
            peers: peers
                .iter()
                .map(|&(peer, matched, active, learner)| PeerStatus {
                    replica: id(peer),
                    matched: LogIndex(matched),
                    active,
                    learner,
                    snapshot: false,
                })
                .collect(),
        }
    }

    fn three() -> Vec<ReplicaInfo> {
        vec![info(1, "a", 10), info(2, "b", 20), info(3, "c", 30)]
    }

    #[test]
    fn a_wiped_node_joins_once_its_old_replica_is_silent() {
        let (me, replicas) = (id(1), three());
        let alive = status(&[(2, 100, true, false), (3, 100, true, false)]);
        let denied = may_join(&alive, &replicas, me, &new("b", 21)).unwrap_err();
        assert_eq!(denied, Denied::Alive { replica: id(2), node: "b".to_owned() });
        assert_eq!(denied.into_status().code(), tonic::Code::FailedPrecondition);
        let silent = status(&[(2, 100, false, false), (3, 100, true, false)]);
        assert_eq!(may_join(&silent, &replicas, me, &new("b", 21)), Ok(()));
        // The leader's own node, a repeated call, and a node that was never there.
        assert!(may_join(&silent, &replicas, me, &new("a", 11)).is_err());
        assert_eq!(may_join(&alive, &replicas, me, &new("b", 20)), Ok(()));
        assert_eq!(may_join(&alive, &replicas, me, &new("d", 40)), Ok(()));
    }

    #[test]
    fn the_dead_predecessor_leaves_before_its_successor_votes() {
        let me = id(1);
        let mut replicas = three();
        replicas.push(info(4, "b", 21));
        let peers = [(2, 50, false, false), (3, 100, true, false), (4, 100, true, true)];
        let step = promotion(&status(&peers), &replicas, me, id(4));
        assert_eq!(step, Ok(Promotion::Remove(id(2))));
        let step = promotion(&status(&peers[1..]), &replicas, me, id(4));
        assert_eq!(step, Ok(Promotion::Promote));
        let voting = [(3, 100, true, false), (4, 100, true, false)];
        assert_eq!(promotion(&status(&voting), &replicas, me, id(4)), Ok(Promotion::Done));
        let alive = [(2, 50, true, false), (3, 100, true, false), (4, 100, true, true)];
        let denied = promotion(&status(&alive), &replicas, me, id(4));
        assert!(matches!(denied, Err(Denied::Alive { .. })));
        let gone = promotion(&status(&peers), &replicas, me, id(9));
        assert_eq!(gone, Err(Denied::NotMember(id(9))));
    }

    #[test]
    fn a_leader_hands_over_before_it_is_removed() {
        let peers = [(2, 90, true, false), (3, 100, true, false), (4, 100, true, true)];
        let three = status(&peers);
        assert_eq!(removal(&three, id(1), id(2)), Ok(Removal::Remove));
        assert_eq!(removal(&three, id(1), id(1)), Ok(Removal::HandOver(id(3))));
        assert_eq!(removal(&three, id(1), id(9)), Ok(Removal::Done));
        let alone = status(&peers[2..]);
        assert_eq!(removal(&alone, id(1), id(1)), Err(Denied::LastVoter(id(1))));
        assert_eq!(removal(&alone, id(1), id(4)), Ok(Removal::Remove));
    }

    #[test]
    fn leadership_goes_to_the_furthest_voter_that_is_alive() {
        let peers = [(2, 100, true, false), (3, 100, true, false), (4, 200, true, true)];
        assert_eq!(successor(&status(&peers)), Ok(id(2)));
        let dead = [(2, 100, false, false), (3, 90, true, false)];
        assert_eq!(successor(&status(&dead)), Ok(id(3)));
        assert_eq!(successor(&status(&dead[..1])), Err(Denied::NoSuccessor));
        assert_eq!(may_lead(&status(&peers), id(3)), Ok(()));
        assert_eq!(may_lead(&status(&peers), id(4)), Err(Denied::CannotLead(id(4))));
        assert_eq!(may_lead(&status(&dead), id(2)), Err(Denied::Silent(id(2))));
        assert_eq!(may_lead(&status(&dead), id(7)), Err(Denied::NotMember(id(7))));
    }
}
