//! Leases, restarts, hints and transfers: who may answer reads alone, and how fast the next leader
//! comes. The harness checks at every step that no two hold a lease.

use nbd_consensus::{GroupConfig, Input, ReadMode, Role, Timestamp};

use crate::harness::{Cluster, TICK};

fn three(change: impl Fn(&mut GroupConfig) + 'static) -> Cluster {
    let mut cluster = Cluster::new(3, 1, change);
    cluster.run(15);
    assert_eq!(cluster.leader(), Some(0), "the shortest timeout wins");
    assert!(cluster.group(0).status().serving);
    cluster
}

fn has_lease(cluster: &Cluster, at: usize) -> bool {
    let now = Timestamp(cluster.clock(at));
    cluster.group(at).read_lease().is_some_and(|until| now < until)
}

/// Ticks until a leader other than the first comes to serve.
fn ticks_to_failover(cluster: &mut Cluster) -> usize {
    for ticks in 1..100 {
        cluster.run(1);
        let serves = |at: &usize| cluster.group(*at).status().serving;
        if [1, 2].iter().any(serves) {
            return ticks;
        }
    }
    panic!("nobody took over");
}

#[test]
fn heartbeats_renew_the_lease_and_cost_one_message_each_way() {
    let mut cluster = three(|_| ());
    cluster.run(4);
    let before = cluster.sent;
    for _ in 0..50 {
        cluster.run(2);
        assert!(has_lease(&cluster, 0));
    }
    assert_eq!(cluster.sent - before, 50 * 4, "two followers, there and back");
    // Without answers it runs out, before anyone else can lead.
    cluster.isolate(0);
    cluster.run(8);
    assert!(!has_lease(&cluster, 0));
    assert_eq!(cluster.group(0).status().role, Role::Leader);
    cluster.check_end();
}

#[test]
fn in_quorum_mode_there_is_no_lease() {
    let mut cluster = three(|config| config.read_mode = ReadMode::Quorum);
    cluster.run(4);
    assert_eq!(cluster.group(0).read_lease(), None);
    cluster.read(0);
    cluster.settle();
    assert_eq!(cluster.reads_served, 1);
    let mut alone = Cluster::new(1, 1, |config| config.read_mode = ReadMode::Quorum);
    alone.run(15);
    assert_eq!(alone.group(0).read_lease(), None);
}

#[test]
fn the_only_voter_needs_nobody() {
    let mut cluster = Cluster::new(1, 1, |_| ());
    cluster.step(0, Input::Campaign);
    assert_eq!(cluster.group(0).read_lease(), None, "nothing is committed yet");
    cluster.settle();
    assert_eq!(cluster.group(0).read_lease(), Some(Timestamp::MAX));
    // And leads again at once.
    cluster.crash(0);
    cluster.step(0, Input::Campaign);
    assert_eq!(cluster.group(0).status().role, Role::Leader);
}

// Goal: a replica that acknowledged the leader and restarted does not help to depose it while the
// leader may still hold a lease that counts on it.
pub(crate) fn restart_inside_a_lease(change: impl Fn(&mut GroupConfig) + 'static) {
    let mut cluster = three(change);
    // The third replica hears nothing and asks, time and again; the second still hears the leader.
    cluster.cut.extend([(0, 2), (2, 0)]);
    cluster.step(2, Input::LeaderLost);
    cluster.run(20);
    assert_eq!(cluster.leader(), Some(0));
    assert!(has_lease(&cluster, 0));
    cluster.crash(1);
    cluster.cut.extend([(0, 1), (1, 0)]);
    cluster.run(10);
    assert_eq!(cluster.leader(), Some(0), "no vote within an election timeout of the start");
    cluster.run(10);
    assert_eq!(cluster.leader(), Some(2));
    cluster.check_end();
}

#[test]
fn a_restarted_replica_waits_before_it_votes() {
    restart_inside_a_lease(|_| ());
}

// Goal: a lease counts from when the heartbeat was sent, however late its answers are.
pub(crate) fn answers_that_come_late(change: impl Fn(&mut GroupConfig) + 'static) {
    let mut cluster = three(change);
    cluster.run(1);
    while cluster.pending_for(0) == 0 {
        cluster.pass(TICK);
        while cluster.deliver_to(1) || cluster.deliver_to(2) {}
    }
    // The answers are on their way; nothing else gets through.
    for other in [1, 2] {
        cluster.cut.insert((0, other));
        cluster.step(other, Input::LeaderLost);
    }
    for _ in 0..6 {
        cluster.pass(TICK);
    }
    while cluster.deliver_to(0) {}
    cluster.cut.extend([(1, 0), (2, 0)]);
    let before = cluster.elections;
    cluster.run(10);
    assert_eq!(cluster.elections, before + 1);
    cluster.check_end();
}

#[test]
fn late_answers_lengthen_no_lease() {
    answers_that_come_late(|_| ());
}

// Goal: a broken connection to the leader saves the random part of the wait, and no more.
#[test]
fn a_hint_makes_failover_quick() {
    let slow = |config: &mut GroupConfig| config.election_ticks_extra += 8;
    let mut without = Cluster::new(3, 1, slow);
    without.run(25);
    without.isolate(0);
    let without = ticks_to_failover(&mut without);
    let mut with = Cluster::new(3, 1, slow);
    with.run(25);
    assert_eq!(with.leader(), Some(0));
    with.isolate(0);
    with.step(1, Input::LeaderLost);
    with.step(2, Input::LeaderLost);
    let ticks = ticks_to_failover(&mut with);
    assert!((9..=12).contains(&ticks), "{ticks}");
    assert!(without >= 18, "{without}");
    with.check_end();
}

pub(crate) fn connections_break(change: impl Fn(&mut GroupConfig) + 'static) {
    let mut cluster = three(change);
    cluster.run(1);
    cluster.isolate(0);
    cluster.step(1, Input::LeaderLost);
    cluster.step(2, Input::LeaderLost);
    cluster.run(6);
    assert_eq!(cluster.leader(), Some(0), "its lease may last");
    cluster.run(10);
    assert_ne!(cluster.leader(), Some(0));
    cluster.check_end();
}

#[test]
fn a_broken_connection_is_no_proof() {
    connections_break(|_| ());
}

#[test]
fn a_follower_that_still_hears_the_leader_grants_nothing() {
    let mut cluster = three(|_| ());
    cluster.cut.extend([(0, 1), (1, 0)]);
    cluster.step(1, Input::LeaderLost);
    cluster.step(1, Input::Campaign);
    cluster.run(40);
    assert_eq!(cluster.leader(), Some(0));
    assert_eq!(cluster.group(2).status().term, cluster.group(0).status().term);
    cluster.check_end();
}

#[test]
fn in_quorum_mode_the_next_leader_comes_at_once() {
    let mut cluster = three(|config| config.read_mode = ReadMode::Quorum);
    cluster.isolate(0);
    cluster.step(2, Input::LeaderLost);
    cluster.step(1, Input::LeaderLost);
    assert!(ticks_to_failover(&mut cluster) <= 3);
    cluster.check_end();
}

// Goal: once a transfer was begun its request may still arrive, even when it was given up.
#[test]
fn a_transfer_gives_the_lease_up_for_the_term() {
    let mut cluster = three(|_| ());
    cluster.run(2);
    assert!(has_lease(&cluster, 0));
    cluster.cut.insert((0, 2));
    let third = cluster.id(2);
    cluster.step(0, Input::TransferLeader(third));
    assert_eq!(cluster.group(0).status().transferring, Some(third));
    assert_eq!(cluster.group(0).read_lease(), None);
    cluster.run(30);
    let status = cluster.group(0).status();
    assert_eq!((status.role, status.transferring), (Role::Leader, None), "it came to nothing");
    assert_eq!((status.lease_until, cluster.group(0).read_lease()), (None, None));
    cluster.read(0);
    cluster.settle();
    assert_eq!(cluster.reads_served, 1, "reads ask a majority");
    // One that cannot begin costs nothing.
    let mut cluster = three(|_| ());
    let own = cluster.id(0);
    cluster.step(0, Input::TransferLeader(own));
    assert!(has_lease(&cluster, 0));
    cluster.check_end();
}
