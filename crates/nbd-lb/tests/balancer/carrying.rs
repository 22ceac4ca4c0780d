//! Clients attached through the load balancer: what they see of what happens to replicas.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::load::{Finished, Load, LoadOptions, Stall};
use nbd_testkit::{Cluster, NbdClient, Target, list_exports, require_tools, seed};

use crate::support::{Balancer, cluster, start, toml, wait_until};

/// No client may stand still for longer while one term passes: votes that are split cost another.
/// Far above the promise, which a release build is measured against: tests run in debug builds on
/// machines that do other things.
const STALL_MAX: Duration = Duration::from_secs(5);

fn load(balancer: &Balancer) -> Load {
    let options =
        LoadOptions { threads: 2, region_bytes: 1 << 20, seed: seed(), ..Default::default() };
    Load::start(&[balancer.target()], options)
}

fn wait_for(load: &Load, answers: u64) {
    load.wait_for_answers(answers).unwrap_or_else(|failure| panic!("{failure}"));
}

/// Stops a load and checks all that it knows: through the load balancer and at each replica.
fn finish(load: Load, cluster: &mut Cluster, balancer: &Balancer) -> Finished {
    finish_at(load, cluster, &balancer.target())
}

/// The same through the load balancer at this address.
pub(crate) fn finish_at(load: Load, cluster: &mut Cluster, balancer: &Target) -> Finished {
    cluster.wait_until_serving();
    let mut finished = load.stop().unwrap_or_else(|failure| panic!("{failure}"));
    for target in cluster.targets().into_iter().chain([balancer.clone()]) {
        finished.verify(&target).unwrap_or_else(|failure| panic!("{failure}"));
    }
    finished.check_history().unwrap_or_else(|failure| panic!("{failure}"));
    cluster.wait_until_equal();
    finished
}

/// The term that the shard has come to, by what its replicas say.
pub(crate) fn term(cluster: &Cluster) -> f64 {
    let places = 0..cluster.targets().len();
    let terms = places.filter_map(|place| cluster.at(place).metric("raft_term{shard=\"0\"}"));
    terms.fold(0.0, f64::max)
}

/// Each client has kept its one connection, got every answer, and stood still for a bounded time.
/// Meanwhile so many leaders were lost, and so many terms have `passed`: those beyond one for each
/// leader may all be part of the longest stall.
#[track_caller]
pub(crate) fn assert_unharmed(finished: &Finished, leaders: u32, passed: f64) {
    assert_eq!((finished.reconnects, finished.lost), (0, 0));
    let longest = finished.stalls.iter().map(Stall::length).max().unwrap_or_default();
    let terms = (1.0 + passed - f64::from(leaders)).max(1.0);
    assert!(longest < STALL_MAX.mul_f64(terms), "{longest:?} while {passed} terms passed");
}

fn connect(balancer: &Balancer, export: &str) -> NbdClient {
    NbdClient::connect(balancer.target().address(), export).unwrap()
}

#[test]
fn a_client_outlives_every_replica() {
    let mut cluster = cluster();
    let before = term(&cluster);
    let balancer = Balancer::of(&toml(&cluster));
    let load = load(&balancer);
    wait_for(&load, 50);
    for _ in 0..3 {
        let leader = cluster.wait_leader();
        cluster.at_mut(leader).kill_9();
        wait_for(&load, 100);
        cluster.at_mut(leader).start();
        cluster.wait_until_serving();
    }
    // One that is frozen with its connections open, and one that stops in good order.
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).pause();
    wait_for(&load, 100);
    cluster.at_mut(leader).resume();
    cluster.wait_until_serving();
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).terminate();
    wait_for(&load, 100);
    cluster.at_mut(leader).start();
    assert_unharmed(&finish(load, &mut cluster, &balancer), 5, term(&cluster) - before);
    balancer.stop();
}

#[test]
fn a_client_waits_while_there_is_no_majority() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let mut client = connect(&balancer, "v");
    client.write(0, &[1; 4096]).unwrap();
    let [one, other] = cluster.followers()[..] else { panic!("two of three follow") };
    cluster.at_mut(one).kill_9();
    cluster.at_mut(other).kill_9();
    let writer = thread::spawn(move || {
        client.write(0, &[2; 4096]).unwrap();
        client
    });
    thread::sleep(Duration::from_secs(3));
    assert!(!writer.is_finished(), "one of three answered a write");
    cluster.at_mut(one).start();
    let mut client = writer.join().unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [2; 4096]);
}

// Goal: one shard that is down costs the list its own exports, and nothing else.
#[test]
fn the_exports_of_shards_that_answer_are_listed() {
    let mut cluster = start(Cluster::builder().shards(&[&["a"], &["b"]]));
    let balancer = Balancer::of(&toml(&cluster));
    let names: Vec<String> = (0..8).map(|n| format!("volume-{n}")).collect();
    names.iter().for_each(|name| drop(connect(&balancer, name)));
    let listed = || list_exports(balancer.target().address()).unwrap();
    assert_eq!(listed(), names);
    cluster.at_mut(1).kill_9();
    let began = Instant::now();
    let rest = listed();
    assert!(began.elapsed() < Duration::from_secs(8));
    assert!(!rest.is_empty() && rest.len() < names.len(), "{rest:?}");
    assert!(rest.iter().all(|name| names.contains(name)));
    // They are served, too.
    connect(&balancer, &rest[0]).write(0, &[1; 512]).unwrap();
}

#[test]
fn a_stop_answers_what_was_received_and_ends_the_sessions() {
    // So that open sessions are counted every five seconds, and none expires before 40.
    let cluster = start(Cluster::builder().replicas(3).argument("--session-expiry=40s"));
    let balancer = Balancer::of(&toml(&cluster));
    let open_sessions = || {
        let leader = cluster.leader()?;
        cluster.at(leader).metric(r#"shard_sessions{shard="0"}"#)
    };
    let mut client = connect(&balancer, "v");
    client.write(0, &[7; 4096]).unwrap();
    wait_until("the session to be counted", || open_sessions() == Some(1.0));
    let began = Instant::now();
    balancer.stop();
    client.read(0, 4096).unwrap_err();
    wait_until("the session to be gone", || open_sessions() == Some(0.0));
    assert!(began.elapsed() < Duration::from_secs(30), "it was left to expire");
    let mut direct = cluster.at(cluster.wait_leader()).connect("v").unwrap();
    assert_eq!(direct.read(0, 4096).unwrap(), [7; 4096]);
}

#[test]
fn other_peoples_clients_are_served() {
    require_tools!["nbdinfo", "nbdcopy"];
    let cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let (host, port) = balancer.target().address();
    let uri = format!("nbd://{host}:{port}/copied");
    let directory = tempfile::tempdir().unwrap();
    let (image, back) = (directory.path().join("image"), directory.path().join("back"));
    let bytes: Vec<u8> =
        (0..8_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    run(Command::new("nbdcopy").arg(&image).arg(&uri));
    let told = run(Command::new("nbdinfo").arg(&uri));
    assert!(told.contains("can_multi_conn: true"), "{told}");
    run(Command::new("nbdcopy").arg(&uri).arg(&back));
    assert!(std::fs::read(&back).unwrap()[..bytes.len()] == bytes);
    wait_until("the copy to be listed", || {
        list_exports(balancer.target().address()).unwrap() == ["copied"]
    });
}

// Bug: a client that left while its leader stood still kept its place and its memory for ever, once
// another leader was known before the old one was given up.
#[test]
fn a_client_that_leaves_while_its_leader_is_frozen_is_let_go() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let mut client = connect(&balancer, "v");
    client.write(0, &[1; 4096]).unwrap();
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).pause();
    client.send(&nbd_proto::Command::Write { offset: 0, len: 4096 }, &[2; 4096]).unwrap();
    drop(client);
    let elsewhere = cluster.at(leader).name().to_owned();
    balancer.wait_reached_elsewhere(crate::support::SHARD, &elsewhere);
    wait_until("the client to be let go", || balancer.get("/sessions").json()["total"] == 0);
    cluster.at_mut(leader).resume();
    cluster.wait_until_serving();
    balancer.stop();
}
