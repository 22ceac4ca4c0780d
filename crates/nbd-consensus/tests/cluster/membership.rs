//! Members that come, catch up, and leave.

use nbd_consensus::{Input, RejectReason, Role};
use nbd_topology::MembershipChange::{AddLearner, AddVoter, Remove};
use nbd_topology::{LogIndex, Membership, ReplicaId};

use crate::harness::{Cluster, Outcome};

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).expect("above 0")
}

fn members(voters: &[u64], learners: &[u64]) -> Membership {
    let ids = |ids: &[u64]| ids.iter().map(|n| id(*n)).collect::<Vec<_>>();
    Membership::new(ids(voters), ids(learners)).expect("disjoint")
}

fn group(size: usize) -> Cluster {
    let mut cluster = Cluster::new(size, 1, |_| ());
    cluster.run(15);
    assert_eq!(cluster.leader(), Some(0));
    cluster
}

/// A leader of three whose log begins with a checkpoint, and a newcomer it has just added.
fn with_newcomer() -> Cluster {
    let mut cluster = group(3);
    cluster.forgetful = true;
    cluster.propose(0, 20);
    cluster.run(3);
    cluster.checkpoint(0);
    let newcomer = cluster.newcomer();
    assert_eq!(cluster.change_refused(0, AddLearner(newcomer)), None);
    cluster
}

#[test]
fn a_newcomer_learns_is_promoted_and_replaces_another() {
    let mut cluster = group(3);
    cluster.propose(0, 20);
    cluster.run(3);
    let newcomer = cluster.newcomer();
    let learner = cluster.change(0, AddLearner(newcomer));
    cluster.run(3);
    assert_eq!(cluster.outcomes[&learner], Outcome::Applied);
    let status = cluster.group(0).status();
    assert_eq!(status.membership, members(&[1, 2, 3], &[4]));
    let peer = status.peers.iter().find(|peer| peer.replica == newcomer).expect("listed");
    assert!(peer.learner && peer.active && !peer.snapshot);
    assert_eq!(peer.matched, status.last);
    assert_eq!(cluster.change_refused(0, AddVoter(newcomer)), None);
    cluster.run(3);
    assert_eq!(cluster.change_refused(0, Remove(id(2))), None);
    cluster.run(3);
    for at in [0, 2, 3] {
        assert_eq!(cluster.group(at).status().membership, members(&[1, 3, 4], &[]));
    }
    // The two that are left of the first three are not a majority by themselves any longer.
    cluster.isolate(0);
    cluster.run(40);
    assert!([2, 3].contains(&cluster.leader().expect("a majority of the new members")));
    cluster.check_end();
    assert_eq!(cluster.installed, 0);
}

#[test]
fn a_learner_has_no_say() {
    let mut cluster = group(1);
    let newcomer = cluster.newcomer();
    cluster.change(0, AddLearner(newcomer));
    cluster.run(10);
    assert_eq!(cluster.group(1).status().applied, cluster.group(0).status().applied);
    cluster.step(1, Input::Campaign);
    cluster.isolate(1);
    let ticket = cluster.propose(0, 1)[0];
    cluster.run(40);
    assert_eq!(cluster.outcomes[&ticket], Outcome::Applied);
    assert_eq!(cluster.group(1).status().role, Role::Follower, "it never stands");
    assert!(cluster.group(0).read_lease().is_some());
    cluster.check_end();
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    let mut cluster = group(3);
    let newcomer = cluster.newcomer();
    for (change, reason) in [
        (AddVoter(id(2)), RejectReason::NoEffect),
        (AddLearner(id(2)), RejectReason::NoEffect),
        (Remove(newcomer), RejectReason::NoEffect),
        (AddVoter(newcomer), RejectReason::NotCaughtUp),
    ] {
        assert_eq!(cluster.change_refused(0, change), Some(reason), "{change}");
    }
    let leader = Some(id(1));
    let elsewhere = cluster.change_refused(1, AddLearner(newcomer));
    assert_eq!(elsewhere, Some(RejectReason::NotLeader { leader }));
    // One at a time.
    cluster.change(0, AddLearner(newcomer));
    assert_eq!(cluster.change_refused(0, Remove(id(3))), Some(RejectReason::MembershipBusy));
    cluster.run(3);
    // A learner that is far behind, or silent, is not promoted.
    cluster.isolate(3);
    cluster.propose(0, 600);
    cluster.run(1);
    assert_eq!(cluster.change_refused(0, AddVoter(newcomer)), Some(RejectReason::NotCaughtUp));
    cluster.cut.clear();
    cluster.run(5);
    cluster.isolate(3);
    cluster.run(20);
    assert_eq!(cluster.change_refused(0, AddVoter(newcomer)), Some(RejectReason::NotCaughtUp));
    cluster.step(0, Input::TransferLeader(id(2)));
    assert_eq!(cluster.change_refused(0, Remove(id(3))), Some(RejectReason::Transferring));
    cluster.check_end();
}

#[test]
fn learners_are_bounded() {
    let mut cluster = group(1);
    for _ in 0..7 {
        let newcomer = cluster.newcomer();
        assert_eq!(cluster.change_refused(0, AddLearner(newcomer)), None);
        cluster.run(1);
    }
    let newcomer = cluster.newcomer();
    let refused = cluster.change_refused(0, AddLearner(newcomer));
    assert_eq!(refused, Some(RejectReason::TooManyMembers));
}

#[test]
fn a_majority_that_lives_is_never_removed() {
    let mut cluster = group(3);
    cluster.isolate(2);
    cluster.run(15);
    // With the second gone, the leader and the dead third would be left.
    assert_eq!(cluster.change_refused(0, Remove(id(2))), Some(RejectReason::QuorumAtRisk));
    assert_eq!(cluster.change_refused(0, Remove(id(3))), None);
    cluster.run(3);
    assert_eq!(cluster.change_refused(0, Remove(id(2))), None);
    cluster.run(3);
    assert_eq!(cluster.group(0).status().membership, members(&[1], &[]));
    assert_eq!(cluster.change_refused(0, Remove(id(1))), Some(RejectReason::NoEffect));
    cluster.check_end();
}

#[test]
fn a_leader_that_is_removed_steps_down() {
    let mut cluster = group(3);
    let ticket = cluster.change(0, Remove(id(1)));
    cluster.settle();
    assert_eq!(cluster.outcomes[&ticket], Outcome::Applied);
    let status = cluster.group(0).status();
    assert_eq!((status.role, status.serving), (Role::Follower, false));
    assert_eq!(cluster.group(0).read_lease(), None);
    cluster.run(40);
    assert_eq!(cluster.group(0).status().role, Role::Follower, "it stands no more");
    assert!([1, 2].contains(&cluster.leader().expect("the others go on")));
    for at in [1, 2] {
        assert_eq!(cluster.group(at).status().membership, members(&[2, 3], &[]));
    }
    cluster.check_end();
}

#[test]
fn what_the_log_no_longer_has_comes_as_a_snapshot() {
    let mut cluster = with_newcomer();
    cluster.run(5);
    assert_eq!(cluster.installed, 1);
    let last = cluster.group(0).status().last;
    let status = cluster.group(3).status();
    assert_eq!((status.applied, status.compacted), (last, LogIndex(21)));
    assert_eq!(status.membership, members(&[1, 2, 3], &[4]));
    assert_eq!(cluster.change_refused(0, AddVoter(id(4))), None);
    cluster.run(3);
    cluster.crash(3);
    cluster.check_end();
    assert_eq!(cluster.installed, 1, "it goes on by the log");
}

#[test]
fn a_lost_offer_is_made_again() {
    let mut cluster = with_newcomer();
    cluster.settle_messages(3);
    let snapshot = |cluster: &Cluster| {
        let peers = cluster.group(0).status().peers;
        peers.iter().any(|peer| peer.snapshot)
    };
    assert!(snapshot(&cluster));
    cluster.lose_offer(3);
    cluster.run(5);
    assert_eq!(cluster.installed, 0);
    // The stream breaks, or it was offered long ago, or its side of the leader gives up.
    cluster.step(0, Input::PeerUnreachable(id(4)));
    cluster.settle_messages(3);
    cluster.run(5);
    assert_eq!(cluster.installed, 1);
    assert!(!snapshot(&cluster));
    cluster.check_end();
}

#[test]
fn an_answer_that_was_lost_is_given_again() {
    let mut cluster = with_newcomer();
    cluster.settle_messages(3);
    cluster.isolate(3);
    while cluster.resync(3) {}
    assert_eq!(cluster.installed, 1);
    cluster.settle();
    cluster.cut.clear();
    cluster.run(60);
    assert_eq!(cluster.installed, 1, "the leader learns how far it got");
    assert_eq!(cluster.group(3).status().last, cluster.group(0).status().last);
    cluster.check_end();
}

// Goal: a log that moved on since the offer stops nobody: the follower is offered the next.
#[test]
fn an_offer_that_is_overtaken_by_compaction_is_renewed() {
    let mut cluster = with_newcomer();
    cluster.settle_messages(3);
    cluster.isolate(3);
    while cluster.resync(3) {}
    cluster.propose(0, 30);
    cluster.run(3);
    cluster.checkpoint(0);
    cluster.cut.clear();
    cluster.run(60);
    assert_eq!(cluster.installed, 2);
    cluster.check_end();
}

// Goal: whoever has what was compacted goes on by the log, even if it was offered more since.
#[test]
fn an_earlier_snapshot_than_was_offered_last_will_do() {
    let mut cluster = with_newcomer();
    cluster.settle_messages(3);
    cluster.isolate(3);
    while cluster.resync(3) {}
    cluster.settle();
    cluster.forgetful = false;
    cluster.propose(0, 30);
    cluster.run(3);
    cluster.checkpoint(0);
    cluster.cut.clear();
    cluster.settle_messages(3);
    cluster.lose_offer(3);
    cluster.run(5);
    assert_eq!(cluster.installed, 1);
    assert_eq!(cluster.group(3).status().last, cluster.group(0).status().last);
    cluster.check_end();
}
