//! Elections, replication, loss and return of leaders.

use nbd_consensus::{Input, Role};
use nbd_topology::{LogIndex, ReplicaId};

use crate::harness::{Cluster, Outcome};

fn three(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(3, seed, |_| ());
    cluster.run(15);
    assert_eq!(cluster.leader(), Some(0), "the shortest timeout wins");
    cluster
}

#[test]
fn a_leader_is_elected_and_replicates() {
    let mut cluster = three(1);
    let tickets = cluster.propose(0, 5);
    cluster.settle();
    assert!(tickets.iter().all(|ticket| cluster.outcomes[ticket] == Outcome::Applied));
    // Followers learn of the commit with the next heartbeat.
    cluster.run(3);
    for at in 0..3 {
        let status = cluster.group(at).status();
        assert_eq!((status.applied, status.leader), (LogIndex(6), ReplicaId::new(1)));
    }
    let peers = cluster.group(0).status().peers;
    assert!(peers.iter().all(|peer| peer.matched == LogIndex(6) && peer.active), "{peers:?}");
    cluster.check_end();
}

#[test]
fn a_leader_knows_what_enough_followers_have() {
    let mut cluster = Cluster::new(5, 1, |_| ());
    cluster.run(15);
    let leader = cluster.leader().unwrap();
    let replicated = |cluster: &Cluster| cluster.group(leader).replicated();
    cluster.propose(leader, 3);
    cluster.settle();
    let last = cluster.group(leader).status().last;
    assert_eq!(replicated(&cluster), Some(last));
    let others: Vec<usize> = (0..5).filter(|at| *at != leader).collect();
    assert!(others.iter().all(|at| cluster.group(*at).replicated().is_none()), "they follow");
    // Two of four are enough, one is not.
    cluster.isolate(others[0]);
    cluster.isolate(others[1]);
    cluster.propose(leader, 1);
    cluster.settle();
    assert_eq!(replicated(&cluster), Some(LogIndex(last.0 + 1)));
    cluster.isolate(others[2]);
    cluster.propose(leader, 1);
    cluster.settle();
    assert_eq!(replicated(&cluster), Some(LogIndex(last.0 + 1)));
    cluster.check_end();
}

#[test]
fn a_majority_is_enough_and_a_minority_is_not() {
    let mut cluster = three(2);
    cluster.isolate(2);
    let ticket = cluster.propose(0, 1)[0];
    cluster.settle();
    assert_eq!(cluster.outcomes[&ticket], Outcome::Applied);
    cluster.isolate(1);
    let ticket = cluster.propose(0, 1)[0];
    cluster.settle();
    assert!(!cluster.outcomes.contains_key(&ticket));
    // Without a majority the leader resigns, and its proposal's fate stays open.
    cluster.run(30);
    assert_eq!(cluster.leader(), None);
    assert!(!cluster.outcomes.contains_key(&ticket));
    cluster.check_end();
    assert_eq!(cluster.outcomes[&ticket], Outcome::Applied);
}

// Goal: a proposal that lost its place is reported as such, once, and is applied nowhere.
#[test]
fn proposals_of_a_deposed_leader_are_superseded() {
    let mut cluster = three(3);
    cluster.isolate(0);
    let lost = cluster.propose(0, 3);
    cluster.run(40);
    let new = cluster.leader().unwrap();
    assert_ne!(new, 0);
    let kept = cluster.propose(new, 5);
    cluster.settle();
    assert!(kept.iter().all(|ticket| cluster.outcomes[ticket] == Outcome::Applied));
    assert!(lost.iter().all(|ticket| !cluster.outcomes.contains_key(ticket)));
    cluster.cut.clear();
    cluster.run(40);
    assert!(lost.iter().all(|ticket| cluster.outcomes[ticket] == Outcome::Superseded));
    cluster.check_end();
}

#[test]
fn a_deposed_leader_that_resigned_refuses() {
    let mut cluster = three(4);
    cluster.isolate(0);
    cluster.read(0);
    cluster.run(40);
    assert_ne!(cluster.group(0).status().role, Role::Leader);
    assert_eq!(cluster.reads_served, 0, "no majority, no read");
    let ticket = cluster.propose(0, 1)[0];
    assert_eq!(cluster.outcomes[&ticket], Outcome::Refused);
    cluster.check_end();
}

#[test]
fn leadership_is_handed_over() {
    let mut cluster = three(5);
    cluster.propose(0, 1);
    cluster.run(3);
    cluster.step(0, Input::TransferLeader(ReplicaId::new(3).unwrap()));
    let during = cluster.propose(0, 1)[0];
    assert_eq!(cluster.outcomes[&during], Outcome::Refused);
    cluster.settle();
    assert_eq!(cluster.leader(), Some(2));
    let after = cluster.propose(2, 1)[0];
    cluster.settle();
    assert_eq!(cluster.outcomes[&after], Outcome::Applied);
    cluster.check_end();
}

#[test]
fn one_round_answers_all_waiting_reads() {
    let mut cluster = three(6);
    for _ in 0..10 {
        cluster.read(0);
    }
    assert_eq!(cluster.reads_served, 0, "a majority has to answer first");
    cluster.settle();
    assert_eq!(cluster.reads_served, 10);
    cluster.read(1);
    assert_eq!(cluster.reads_served, 10, "followers refuse");
    cluster.check_end();
}

// Goal: a follower that was away for longer than memory lasts catches up from the leader's log.
#[test]
fn a_follower_far_behind_is_fed_from_the_log() {
    let mut cluster = Cluster::new(3, 7, |config| config.cache_bytes_max = 1000);
    cluster.run(15);
    cluster.isolate(2);
    for _ in 0..50 {
        cluster.propose(0, 3);
        cluster.settle();
    }
    assert_eq!(cluster.fetches, 0);
    assert_eq!(cluster.group(2).status().last, LogIndex(1));
    cluster.cut.clear();
    cluster.run(30);
    assert!(cluster.fetches > 0);
    assert_eq!(cluster.group(2).status().applied, LogIndex(151));
    cluster.check_end();
}

#[test]
fn a_broken_stream_costs_the_pipeline_and_nothing_else() {
    let mut cluster = three(8);
    cluster.isolate(1);
    cluster.propose(0, 3);
    cluster.settle();
    cluster.step(0, Input::PeerUnreachable(ReplicaId::new(2).unwrap()));
    cluster.cut.clear();
    cluster.run(5);
    assert_eq!(cluster.group(1).status().applied, LogIndex(4));
    cluster.check_end();
}
