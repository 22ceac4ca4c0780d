//! A replica comes back: after a while, after too long, with an empty disk.

use nbd_testkit::{Cluster, NodeProcess};

use crate::{MIB, builder, cluster, expect, fill, finish, load, wait_until};

/// Bytes of chunks that a node fetched from others to make its copy complete.
fn resynced(node: &NodeProcess) -> f64 {
    node.metric("resync_received_bytes_total").unwrap_or_default()
}

/// The replica id of a node in shard 0.
fn replica_id(node: &NodeProcess) -> u64 {
    let health = node.health().unwrap_or_else(|| panic!("{} is not well", node.name()));
    let shard = &health.shards[0];
    shard.all["replica"].as_u64().unwrap_or_else(|| panic!("no replica id in {}", shard.all))
}

fn is_voter(node: &NodeProcess) -> bool {
    node.health().is_some_and(|health| {
        health.is_ok() && ["leader", "follower"].contains(&health.shards[0].role.as_str())
    })
}

#[test]
fn a_follower_that_was_away_for_a_while_catches_up_by_the_log() {
    let mut cluster = cluster();
    let follower = cluster.followers()[0];
    let mut client = cluster.at(cluster.wait_leader()).connect("volume").unwrap();
    fill(&mut client, 0, 4 * MIB, 0);
    cluster.at_mut(follower).kill_9();
    fill(&mut client, 2 * MIB, 3 * MIB, 1);
    client.trim(0, MIB).unwrap();
    cluster.at_mut(follower).start();
    cluster.wait_until_equal();
    assert_eq!(resynced(cluster.at(follower)), 0.0);
    let mut there = cluster.at(follower).connect("volume").unwrap();
    expect(&mut there, MIB, MIB, 0);
    expect(&mut there, 2 * MIB, 3 * MIB, 1);
}

/// Writes far more than any log keeps, all over the first two MiB.
fn overtake_the_log(cluster: &Cluster, last_round: u64) {
    let mut client = cluster.node().connect("volume").unwrap();
    for round in 1..=last_round {
        fill(&mut client, 0, 2 * MIB, round);
    }
}

#[test]
fn a_follower_that_was_away_too_long_fetches_what_changed_and_no_more() {
    let mut cluster = cluster();
    let follower = cluster.followers()[0];
    cluster.put_in_front(cluster.wait_leader());
    let mut client = cluster.node().connect("volume").unwrap();
    fill(&mut client, 0, 40 * MIB, 0);
    // Else it might not have heard that the last of it is committed, and would rightly fetch that.
    cluster.wait_until_equal();
    cluster.at_mut(follower).kill_9();
    overtake_the_log(&cluster, 40);
    client.write_zeroes(10 * MIB, MIB, false).unwrap();
    cluster.at_mut(follower).start();
    cluster.wait_until_equal();
    let fetched = resynced(cluster.at(follower));
    let mib = |count: u32| f64::from(count) * f64::from(1 << 20);
    assert!(fetched > 0.0, "the log was enough: the test shows nothing");
    assert!(fetched <= 1.2 * mib(2), "{fetched} bytes were fetched for 2 MiB that changed");
    // Alone with another it is a majority, and has everything.
    let other = (0..3).find(|at| *at != follower && *at != cluster.wait_leader()).unwrap();
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).kill_9();
    wait_until("a new leader", || cluster.leader().is_some());
    for at in [follower, other] {
        let mut there = cluster.at(at).connect("volume").unwrap();
        expect(&mut there, 0, 2 * MIB, 40);
        expect(&mut there, 2 * MIB, 8 * MIB, 0);
        expect(&mut there, 11 * MIB, 29 * MIB, 0);
        let zeroed = there.read(10 * MIB, 1 << 20).unwrap();
        assert!(zeroed.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_follower_that_fetches_while_clients_write_ends_equal() {
    let mut cluster = cluster();
    let follower = cluster.followers()[0];
    cluster.put_in_front(cluster.wait_leader());
    overtake_the_log(&cluster, 2);
    cluster.at_mut(follower).kill_9();
    overtake_the_log(&cluster, 40);
    let load = load(&[cluster.node().target()]);
    cluster.at_mut(follower).start();
    load.wait_for_answers(200).unwrap();
    cluster.wait_until_serving();
    assert_eq!(finish(load, &mut cluster).lost, 0);
    assert!(resynced(cluster.at(follower)) > 0.0, "the log was enough");
}

#[test]
fn a_wiped_replica_comes_back_under_a_new_id_with_everything() {
    let mut cluster = builder().default_size("32MiB").start();
    cluster.wait_until_serving();
    let wiped = cluster.followers()[0];
    let old_id = replica_id(cluster.at(wiped));
    assert!((1..=3).contains(&old_id), "{old_id}");
    cluster.put_in_front(cluster.wait_leader());
    let mut client = cluster.node().connect("volume").unwrap();
    fill(&mut client, 0, 16 * MIB, 7);
    cluster.at_mut(wiped).kill_9();
    cluster.at_mut(wiped).wipe();
    cluster.at_mut(wiped).spawn();
    wait_until("the wiped replica to count again", || is_voter(cluster.at(wiped)));
    assert!(replica_id(cluster.at(wiped)) > 3);
    cluster.wait_until_equal();
    // It is one of a majority by what it holds now, also after a start.
    cluster.at_mut(wiped).restart();
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).kill_9();
    wait_until("a new leader", || cluster.leader().is_some());
    expect(&mut cluster.at(wiped).connect("volume").unwrap(), 0, 16 * MIB, 7);
    assert!(replica_id(cluster.at(wiped)) > 3);
}

#[test]
fn every_replica_in_turn_may_lose_its_disk_under_load() {
    let mut cluster = cluster();
    let load = load(&cluster.targets());
    for wiped in 0..3 {
        load.wait_for_answers(30).unwrap();
        cluster.at_mut(wiped).kill_9();
        cluster.at_mut(wiped).wipe();
        cluster.at_mut(wiped).spawn();
        wait_until("the wiped replica to count again", || is_voter(cluster.at(wiped)));
    }
    load.wait_for_answers(30).unwrap();
    finish(load, &mut cluster);
    let mut ids: Vec<u64> = cluster.nodes().iter().map(replica_id).collect();
    ids.sort_unstable();
    assert!(ids[0] > 3 && ids[0] < ids[1] && ids[1] < ids[2], "{ids:?}");
}
