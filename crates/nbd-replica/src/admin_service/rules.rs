//! What the leader makes of a call about members, by the group's state alone.
//!
//! Replicas on cordoned nodes are *avoided*: they lead only if no other can.

use std::collections::BTreeSet;

use nbd_consensus::{PeerStatus, RejectReason, Status};
use nbd_store::{ReplicaInfo, ReplicaRegistration};
use nbd_topology::{NodeName, ReplicaId};

/// Committed entries that a replica may lack and still be asked to take over from a leader that has
/// no other reason to leave: nothing is committed until it has them.
const RELIEF_LAG_MAX: u64 = 256;

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
    /// An id that no replica ever had.
    #[error("there never was a replica {replica}: ids up to {newest} were given")]
    NeverWas { replica: ReplicaId, newest: u64 },
    /// It cannot vote.
    #[error("replica {0} is a learner and cannot lead")]
    CannotLead(ReplicaId),
    /// It would not answer.
    #[error("replica {0} has not been heard from lately and cannot take over")]
    Silent(ReplicaId),
    /// There is nobody to hand leadership to.
    #[error("there is no other voter that is alive")]
    NoSuccessor,
    /// Its node is cordoned.
    #[error("node {node} is cordoned: it leads only if no other replica can, and takes no new one")]
    Cordoned { node: String },
    /// Removing it would leave no voter.
    #[error("replica {0} is the only voter: add another one first")]
    LastVoter(ReplicaId),
    /// The log did not take the change.
    #[error("{0}")]
    Rejected(RejectReason),
}

/// Whether the leader, or a peer that it has heard from lately.
fn is_alive(status: &Status, me: ReplicaId, replica: ReplicaId) -> bool {
    let is_active = |peer: &&PeerStatus| peer.replica == replica && peer.active;
    replica == me || status.peers.iter().any(|peer| is_active(&peer))
}

/// Members on the same node, but with another directory.
fn predecessors<'a>(
    status: &'a Status,
    replicas: &'a [ReplicaInfo],
    node: &'a NodeName,
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
    cordoned: &BTreeSet<NodeName>,
) -> Result<(), Denied> {
    // Who is known already asks for its id again.
    let is_known = replicas.iter().any(|info| info.directory == new.directory);
    if !is_known && cordoned.contains(&new.node) {
        return Err(Denied::Cordoned { node: new.node.to_string() });
    }
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
    /// It was one once, and is no member any more.
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
    next_replica: u64,
    avoided: &BTreeSet<ReplicaId>,
) -> Result<Removal, Denied> {
    if replica.get() >= next_replica {
        return Err(Denied::NeverWas { replica, newest: next_replica - 1 });
    }
    if !status.membership.contains(replica) {
        return Ok(Removal::Done);
    }
    if status.membership.is_voter(replica) && status.membership.voters().len() == 1 {
        return Err(Denied::LastVoter(replica));
    }
    if replica == me {
        return Ok(Removal::HandOver(successor(status, avoided)?));
    }
    Ok(Removal::Remove)
}

/// Other voters that are alive.
fn fit(status: &Status) -> impl Iterator<Item = &PeerStatus> {
    status.peers.iter().filter(|peer| peer.active && !peer.learner && !peer.snapshot)
}

/// The voter, other than the leader, that is alive and furthest; one that is avoided if there is no
/// other.
pub(crate) fn successor(
    status: &Status,
    avoided: &BTreeSet<ReplicaId>,
) -> Result<ReplicaId, Denied> {
    // Of several the one with the lowest id, so that the choice can be foretold.
    let best = fit(status).max_by_key(|peer| {
        (!avoided.contains(&peer.replica), peer.matched, std::cmp::Reverse(peer.replica))
    });
    best.map(|peer| peer.replica).ok_or(Denied::NoSuccessor)
}

/// The voter to which a leader that is to be avoided hands over: one that is not avoided, and has
/// caught up.
pub(crate) fn relief(status: &Status, avoided: &BTreeSet<ReplicaId>) -> Option<ReplicaId> {
    let best = successor(status, avoided).ok()?;
    let lag = |peer: &PeerStatus| status.committed.0.saturating_sub(peer.matched.0);
    let caught_up = fit(status).any(|peer| peer.replica == best && lag(peer) <= RELIEF_LAG_MAX);
    (caught_up && !avoided.contains(&best)).then_some(best)
}

/// The members on cordoned nodes.
pub(crate) fn avoided(
    replicas: &[ReplicaInfo],
    cordoned: &BTreeSet<NodeName>,
) -> BTreeSet<ReplicaId> {
    let avoided = replicas.iter().filter(|info| cordoned.contains(&info.node));
    avoided.map(|info| info.id).collect()
}

/// Whether leadership may be handed to `to`.
pub(crate) fn may_lead(
    status: &Status,
    replicas: &[ReplicaInfo],
    avoided: &BTreeSet<ReplicaId>,
    to: ReplicaId,
) -> Result<(), Denied> {
    if !status.membership.contains(to) {
        return Err(Denied::NotMember(to));
    }
    if !status.membership.is_voter(to) {
        return Err(Denied::CannotLead(to));
    }
    if avoided.contains(&to) {
        let node = replicas.iter().find(|info| info.id == to).map(|info| info.node.to_string());
        return Err(Denied::Cordoned { node: node.unwrap_or_default() });
    }
    let is_active = status.peers.iter().any(|peer| peer.replica == to && peer.active);
    if is_active { Ok(()) } else { Err(Denied::Silent(to)) }
}

impl Denied {
    /// The gRPC status: whether it may be worth asking again at once, later, or never.
    pub(crate) fn into_status(self) -> tonic::Status {
        let text = self.to_string();
        match self {
            Self::NotMember(_) | Self::NeverWas { .. } => tonic::Status::not_found(text),
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
pub(crate) mod tests {
    use nbd_consensus::Role;
    use nbd_store::ReplicaAddresses;
    use nbd_topology::{LogIndex, Membership, Term};

    use super::*;

    const NONE: BTreeSet<NodeName> = BTreeSet::new();
    const NOBODY: BTreeSet<ReplicaId> = BTreeSet::new();

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

    fn status(peers: &[(u64, u64, bool, bool)]) -> Status {
        status_at(100, peers)
    }

    /// Replica 1 leads, with so many entries committed; each peer is (id, matched, active,
    /// learner).
    pub(crate) fn status_at(committed: u64, peers: &[(u64, u64, bool, bool)]) -> Status {
        let of = |learner: bool| {
            peers.iter().filter(move |peer| peer.3 == learner).map(|peer| id(peer.0))
        };
        let membership = Membership::new([id(1)].into_iter().chain(of(false)), of(true)).unwrap();
        let index = LogIndex(committed);
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
        let denied = may_join(&alive, &replicas, me, &new("b", 21), &NONE).unwrap_err();
        assert_eq!(denied, Denied::Alive { replica: id(2), node: "b".to_owned() });
        assert_eq!(denied.into_status().code(), tonic::Code::FailedPrecondition);
        let silent = status(&[(2, 100, false, false), (3, 100, true, false)]);
        assert_eq!(may_join(&silent, &replicas, me, &new("b", 21), &NONE), Ok(()));
        // The leader's own node, a repeated call, and a node that was never there.
        assert!(may_join(&silent, &replicas, me, &new("a", 11), &NONE).is_err());
        assert_eq!(may_join(&alive, &replicas, me, &new("b", 20), &NONE), Ok(()));
        assert_eq!(may_join(&alive, &replicas, me, &new("d", 40), &NONE), Ok(()));
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
        assert_eq!(removal(&three, id(1), id(2), 10, &NOBODY), Ok(Removal::Remove));
        assert_eq!(removal(&three, id(1), id(1), 10, &NOBODY), Ok(Removal::HandOver(id(3))));
        assert_eq!(removal(&three, id(1), id(9), 10, &NOBODY), Ok(Removal::Done));
        let never = Denied::NeverWas { replica: id(9), newest: 8 };
        assert_eq!(removal(&three, id(1), id(9), 9, &NOBODY), Err(never));
        let alone = status(&peers[2..]);
        assert_eq!(removal(&alone, id(1), id(1), 10, &NOBODY), Err(Denied::LastVoter(id(1))));
        assert_eq!(removal(&alone, id(1), id(4), 10, &NOBODY), Ok(Removal::Remove));
    }

    #[test]
    fn leadership_goes_to_the_furthest_voter_that_is_alive() {
        let peers = [(2, 100, true, false), (3, 100, true, false), (4, 200, true, true)];
        assert_eq!(successor(&status(&peers), &NOBODY), Ok(id(2)));
        let dead = [(2, 100, false, false), (3, 90, true, false)];
        assert_eq!(successor(&status(&dead), &NOBODY), Ok(id(3)));
        assert_eq!(successor(&status(&dead[..1]), &NOBODY), Err(Denied::NoSuccessor));
        assert_eq!(may_lead(&status(&peers), &three(), &NOBODY, id(3)), Ok(()));
        assert_eq!(
            may_lead(&status(&peers), &three(), &NOBODY, id(4)),
            Err(Denied::CannotLead(id(4)))
        );
        assert_eq!(may_lead(&status(&dead), &three(), &NOBODY, id(2)), Err(Denied::Silent(id(2))));
        assert_eq!(
            may_lead(&status(&dead), &three(), &NOBODY, id(7)),
            Err(Denied::NotMember(id(7)))
        );
    }

    #[test]
    fn replicas_on_cordoned_nodes_lead_only_if_no_other_can() {
        let cordoned: BTreeSet<NodeName> = ["b".parse().unwrap()].into();
        let avoided = avoided(&three(), &cordoned);
        assert_eq!(avoided, [id(2)].into());
        let both = [(2, 100, true, false), (3, 90, true, false)];
        assert_eq!(successor(&status(&both), &avoided), Ok(id(3)), "though it is behind");
        let other_dead = [(2, 100, true, false), (3, 90, false, false)];
        assert_eq!(successor(&status(&other_dead), &avoided), Ok(id(2)));
        let denied = may_lead(&status(&both), &three(), &avoided, id(2)).unwrap_err();
        assert!(denied.to_string().starts_with("node b is cordoned"), "{denied}");
        // A cordoned leader goes as soon as somebody else can lead, and stays until then.
        assert_eq!(relief(&status(&both), &avoided), Some(id(3)));
        assert_eq!(relief(&status(&other_dead), &avoided), None);
        let mut behind = status(&both);
        behind.committed = LogIndex(91 + RELIEF_LAG_MAX);
        assert_eq!(relief(&behind, &avoided), None);
        let learner = [(2, 100, true, false), (3, 100, true, true)];
        assert_eq!(relief(&status(&learner), &avoided), None);
    }

    #[test]
    fn no_replica_is_added_on_a_cordoned_node() {
        let (me, replicas) = (id(1), three());
        let cordoned: BTreeSet<NodeName> = ["b", "d"].map(|node| node.parse().unwrap()).into();
        let silent = status(&[(2, 100, false, false), (3, 100, true, false)]);
        for joins in [new("d", 40), new("b", 21)] {
            let denied = may_join(&silent, &replicas, me, &joins, &cordoned).unwrap_err();
            assert_eq!(denied, Denied::Cordoned { node: joins.node.to_string() });
            assert_eq!(denied.into_status().code(), tonic::Code::FailedPrecondition);
        }
        let known = new("b", 20);
        assert_eq!(may_join(&silent, &replicas, me, &known, &cordoned), Ok(()));
        assert_eq!(may_join(&silent, &replicas, me, &new("e", 50), &cordoned), Ok(()));
    }
}
