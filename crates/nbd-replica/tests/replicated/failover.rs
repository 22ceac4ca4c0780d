//! The leader is lost, and clients of the others go on.

use std::time::{Duration, Instant};

use nbd_testkit::load::{Finished, Load};
use nbd_testkit::{Cluster, Target};

use crate::{cluster, finish, load};

/// No client may stand still for longer while one term passes: votes that are split cost another.
/// Far above the promise, which a release build is measured against: tests run in debug builds on
/// machines that do other things.
const STALL_MAX: Duration = Duration::from_secs(5);

/// The targets that are not at `place`.
fn others(cluster: &Cluster, place: usize) -> Vec<Target> {
    let mut targets = cluster.targets();
    targets.remove(place);
    targets
}

/// The term that the shard has come to, by what its replicas say.
fn term(cluster: &Cluster) -> f64 {
    let terms = (0..3).filter_map(|at| cluster.at(at).metric("raft_term{shard=\"0\"}"));
    terms.fold(0.0, f64::max)
}

/// It was not longer than may be while so many terms passed, or the one that had to.
#[track_caller]
fn assert_bounded(stall: Duration, terms: f64) {
    assert!(stall < STALL_MAX.mul_f64(terms.max(1.0)), "{stall:?} while {terms} terms passed");
}

/// Each client has kept its one connection and stood still for a bounded time only, while one
/// leader was lost and so many terms passed.
#[track_caller]
fn assert_unharmed(finished: &Finished, terms: f64) {
    assert_eq!((finished.reconnects, finished.lost), (0, 0));
    let longest = finished.stalls.iter().map(nbd_testkit::load::Stall::length).max();
    assert_bounded(longest.unwrap_or_default(), terms);
}

fn wait_for(load: &Load, answers: u64) {
    load.wait_for_answers(answers).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn a_killed_leader_costs_clients_of_others_no_error_and_no_data() {
    let mut cluster = cluster();
    for _ in 0..2 {
        let before = term(&cluster);
        let leader = cluster.wait_leader();
        let load = load(&others(&cluster, leader));
        wait_for(&load, 50);
        cluster.at_mut(leader).kill_9();
        wait_for(&load, 100);
        let next = cluster.wait_leader();
        assert_ne!(next, leader);
        cluster.at_mut(leader).spawn();
        cluster.wait_until_serving();
        assert_unharmed(&finish(load, &mut cluster), term(&cluster) - before);
        fresh_volume(&cluster);
    }
}

/// The load wants an empty volume.
fn fresh_volume(cluster: &Cluster) {
    let mut client = cluster.node().connect("load").unwrap();
    let size = client.size();
    client.write_zeroes(0, size, false).unwrap();
}

#[test]
fn a_silent_leader_costs_clients_of_others_no_error_and_no_data() {
    let mut cluster = cluster();
    let before = term(&cluster);
    let leader = cluster.wait_leader();
    let load = load(&others(&cluster, leader));
    wait_for(&load, 50);
    cluster.at_mut(leader).pause();
    wait_for(&load, 100);
    assert_ne!(cluster.wait_leader(), leader);
    // It still takes itself for the leader, and must not answer as one.
    cluster.at_mut(leader).resume();
    wait_for(&load, 50);
    assert_unharmed(&finish(load, &mut cluster), term(&cluster) - before);
}

#[test]
fn a_client_of_the_paused_leader_goes_on_through_it_afterwards() {
    let mut cluster = cluster();
    let leader = cluster.wait_leader();
    let load = load(&cluster.targets()[leader..=leader]);
    wait_for(&load, 50);
    let before = term(&cluster);
    cluster.at_mut(leader).pause();
    let started = Instant::now();
    crate::wait_until("another leader", || cluster.leader().is_some_and(|now| now != leader));
    assert_bounded(started.elapsed(), term(&cluster) - before);
    cluster.at_mut(leader).resume();
    wait_for(&load, 50);
    let finished = finish(load, &mut cluster);
    assert_eq!((finished.reconnects, finished.lost), (0, 0));
}

#[test]
fn a_leader_that_is_stopped_hands_over_before_it_goes() {
    let mut cluster = cluster();
    for _ in 0..2 {
        let before = term(&cluster);
        let leader = cluster.wait_leader();
        let load = load(&others(&cluster, leader));
        wait_for(&load, 50);
        assert!(cluster.at_mut(leader).terminate().success());
        // No election timeout has gone by since it ended.
        let leads = |at: &usize| cluster.at(*at).metric("raft_role{shard=\"0\"}") == Some(1.0);
        assert_eq!((0..3).filter(leads).count(), 1);
        wait_for(&load, 50);
        cluster.at_mut(leader).start();
        assert_unharmed(&finish(load, &mut cluster), term(&cluster) - before);
        fresh_volume(&cluster);
    }
}

#[test]
fn a_client_of_a_killed_replica_finds_its_data_at_another() {
    let mut cluster = cluster();
    let load = load(&cluster.targets());
    for at in [0, 1, 2] {
        wait_for(&load, 30);
        cluster.at_mut(at).kill_9();
        wait_for(&load, 30);
        cluster.at_mut(at).start();
        cluster.wait_until_serving();
    }
    let finished = finish(load, &mut cluster);
    assert!(finished.reconnects >= 2, "{}", finished.reconnects);
}
