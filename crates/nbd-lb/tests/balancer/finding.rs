//! The route follows the leader.

use std::time::{Duration, Instant};

use nbd_front::Route;
use nbd_testkit::Cluster;
use nbd_topology::ShardId;

use crate::support::{Balancer, SHARD, cluster, stale_but, start, toml};

/// Far above what a failover takes, which is measured in release builds: these are debug builds on
/// machines that do other things. For each term that passes: votes that are split cost another.
const FAILOVER_MAX: Duration = Duration::from_secs(5);

/// The route went from one leader to the next soon enough.
#[track_caller]
fn assert_in_time(took: Duration, before: &Route, next: &Route) {
    assert!(next.term > before.term, "{before:?}, then {next:?}");
    let terms = u32::try_from(next.term.0 - before.term.0).unwrap();
    assert!(took < FAILOVER_MAX * terms, "{took:?} in which {terms} terms passed");
}

#[test]
fn the_route_follows_leaders_that_are_killed_and_come_back() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let mut term = 0;
    for _ in 0..3 {
        balancer.wait_streams(3);
        let leader = cluster.wait_leader();
        let route = balancer.wait_leader(cluster.at(leader));
        assert!(route.term.0 > term, "{route:?}");
        term = route.term.0;
        let (host, port) = cluster.at(leader).grpc_address();
        assert_eq!(route.leader.as_ref().unwrap().grpc, format!("{host}:{port}"));

        let killed = Instant::now();
        cluster.at_mut(leader).kill_9();
        let next = balancer.wait_route("to another", |route| {
            let lost = cluster.at(leader).name();
            route.leader.as_ref().is_some_and(|leader| leader.node.as_str() != lost)
        });
        assert_in_time(killed.elapsed(), &route, &next);
        cluster.at_mut(leader).start();
        cluster.wait_until_serving();
    }
    balancer.stop();
}

#[test]
fn a_frozen_leader_is_left_as_soon_as_there_is_another() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let leader = cluster.wait_leader();
    let before = balancer.wait_leader(cluster.at(leader));
    balancer.wait_streams(3);
    cluster.at_mut(leader).pause();
    let paused = Instant::now();
    let next = balancer.wait_route("to another", |route| {
        let lost = cluster.at(leader).name();
        route.leader.as_ref().is_some_and(|leader| leader.node.as_str() != lost)
    });
    assert_in_time(paused.elapsed(), &before, &next);
    cluster.at_mut(leader).resume();
    balancer.wait_streams(3);
}

// Goal: what is configured is where to begin, and no more.
// Method: all addresses but one lead nowhere; then the node at the right one is killed. The others
// were learnt from it, and through them the route is kept current, and the node found again.
#[test]
fn one_configured_address_that_is_right_is_enough() {
    let mut cluster = cluster();
    for right in 0..2 {
        let balancer = Balancer::of(&stale_but(&mut cluster, right));
        balancer.wait_streams(3);
        for _ in 0..2 {
            let leader = cluster.wait_leader();
            balancer.wait_leader(cluster.at(leader));
            cluster.at_mut(right).kill_9();
            let leader = cluster.wait_leader();
            assert_ne!(leader, right);
            let route = balancer.wait_leader(cluster.at(leader));
            let (host, port) = cluster.at(leader).grpc_address();
            assert_eq!(route.leader.unwrap().grpc, format!("{host}:{port}"));
            balancer.wait_streams(2);
            cluster.at_mut(right).start();
            cluster.wait_until_serving();
            balancer.wait_streams(3);
        }
        balancer.stop();
    }
}

#[test]
fn a_leader_that_hands_over_takes_the_route_along() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    balancer.wait_streams(3);
    let leader = cluster.wait_leader();
    let before = balancer.wait_leader(cluster.at(leader));
    assert!(cluster.at_mut(leader).terminate().success());
    let after = balancer.wait_reached_elsewhere(SHARD, cluster.at(leader).name());
    assert!(after.term > before.term);
    balancer.stop();
}

// Goal: shards are followed each for itself, over connections that they share.
// Method: of two shards on the same nodes, whichever node leads the first one dies.
#[test]
fn shards_that_share_nodes_are_followed_each_for_itself() {
    let nodes: &[&str] = &["nbd-1-1", "nbd-1-2", "nbd-1-3"];
    let mut cluster = start(Cluster::builder().shards(&[nodes, nodes]));
    let balancer = Balancer::of(&toml(&cluster));
    for _ in 0..3 {
        let leader = cluster.wait_leader();
        balancer.wait_leader(cluster.at(leader));
        cluster.at_mut(leader).kill_9();
        for shard in [ShardId(0), ShardId(1)] {
            balancer.wait_reached_elsewhere(shard, cluster.at(leader).name());
        }
        cluster.at_mut(leader).start();
        cluster.wait_until_serving();
    }
    balancer.stop();
}
