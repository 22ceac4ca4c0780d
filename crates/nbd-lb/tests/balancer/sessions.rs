//! Who is attached, and what is counted of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, NbdClient};
use serde_json::Value;

use crate::process::Process;
use crate::support::{Balancer, cluster, start, toml, wait_until};

fn sessions(balancer: &Balancer) -> Vec<Value> {
    balancer.get("/sessions").json()["sessions"].as_array().unwrap().clone()
}

#[test]
fn sessions_are_listed_as_long_as_they_last() {
    let cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    assert_eq!(balancer.get("/sessions").json()["total"], 0);
    let mut one = balancer.connect("one");
    let mut other = balancer.connect("other");
    one.write(0, &[1; 8192]).unwrap();
    other.write(0, &[1; 4096]).unwrap();
    other.read(0, 4096).unwrap();
    let leader = cluster.at(cluster.wait_leader());
    let (host, port) = leader.grpc_address();
    wait_until("both to be counted", || {
        sessions(&balancer).iter().all(|session| session["requests_pending"] == 0)
    });
    let listed = sessions(&balancer);
    let [first, second] = &listed[..] else { panic!("{listed:?}") };
    for (session, export, client) in [(first, "one", &mut one), (second, "other", &mut other)] {
        assert_eq!(session["export"], export);
        assert_eq!(session["client"], client.stream().local_addr().unwrap().to_string());
        assert_eq!((&session["mode"], &session["shard"]), (&"replay".into(), &0.into()));
        assert_eq!(session["backend"]["node"], leader.name());
        assert_eq!(session["backend"]["address"], format!("{host}:{port}"));
        assert_eq!(session["session"].as_str().unwrap().len(), 32);
        assert!(session["age_seconds"].as_f64().unwrap() < 60.0);
    }
    assert_ne!(first["volume"], second["volume"]);
    assert_ne!(first["session"], second["session"]);
    // Requests and replies have headers of 16 to 32 bytes.
    let bytes = |session: &Value, what: &str| session[what].as_u64().unwrap();
    assert!((8192..8300).contains(&bytes(first, "received_bytes")), "{first}");
    assert!((4096..4300).contains(&bytes(second, "received_bytes")), "{second}");
    assert!((4096..4300).contains(&bytes(second, "sent_bytes")), "{second}");
    drop(one);
    wait_until("the first to be gone", || {
        let listed = sessions(&balancer);
        listed.len() == 1 && listed[0]["export"] == "other"
    });

    // A replica lists those who attach to it.
    let direct = leader.connect("direct").unwrap();
    let listed = leader.get("/sessions").json();
    assert_eq!((&listed["total"], &listed["sessions"][0]["export"]), (&1.into(), &"direct".into()));
    drop(direct);
}

#[test]
fn a_list_comes_in_pages() {
    let cluster = start(Cluster::builder());
    let balancer = Balancer::of(&toml(&cluster));
    let _clients: Vec<_> = (0..5).map(|_| balancer.connect("v")).collect();
    let (mut seen, mut path) = (Vec::new(), "/sessions?limit=2".to_owned());
    loop {
        let page = balancer.get(&path).json();
        assert_eq!(page["total"], 5);
        let connections = page["sessions"].as_array().unwrap().iter();
        seen.extend(connections.map(|session| session["connection"].as_u64().unwrap()));
        let Some(next) = page["next"].as_u64() else { break };
        path = format!("/sessions?limit=2&after={next}");
    }
    assert!(seen.len() == 5 && seen.is_sorted_by(|a, b| a < b), "{seen:?}");
    assert_eq!(balancer.get("/sessions?limit=two").status, 400);
}

#[test]
fn a_session_without_a_leader_is_listed_as_waiting() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let mut client = balancer.connect("v");
    client.write(0, &[1; 512]).unwrap();
    for follower in cluster.followers() {
        cluster.at_mut(follower).kill_9();
    }
    let writer = thread::spawn(move || {
        client.write(0, &[2; 512]).unwrap();
        client
    });
    wait_until("a session that waits", || {
        let listed = sessions(&balancer);
        listed[0]["backend"].is_null() && listed[0]["requests_pending"] == 1
    });
    let waits = sessions(&balancer);
    assert!(waits[0]["backend_seconds"].as_f64() < waits[0]["age_seconds"].as_f64(), "{waits:?}");
    for place in 0..3 {
        if !cluster.at_mut(place).is_running() {
            cluster.at_mut(place).start();
        }
    }
    let _client = writer.join().unwrap();
    let listed = sessions(&balancer);
    assert!(listed[0]["backend"]["node"].is_string(), "{listed:?}");
}

/// A client that writes all the time. Its longest wait for an answer, and bytes written.
fn write_until(mut client: NbdClient, stop: &AtomicBool) -> (Duration, u64) {
    let (mut longest, mut written) = (Duration::ZERO, 0);
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        client.write(written % (1 << 20), &[1; 4096]).unwrap();
        longest = longest.max(asked.elapsed());
        written += 4096;
    }
    (longest, written)
}

// Goal: failovers and stalls are counted as clients felt them.
// Method: two clients write all the time and a third is idle while the leader is killed. Each is
// resumed once; the two waited, each as long as its longest answer took, and the third did not.
#[test]
fn failovers_and_stalls_are_counted_as_felt() {
    let mut cluster = cluster();
    let balancer = Process::start(&cluster, &[]);
    let shard = |name: &str| format!("{name}{{shard=\"0\"}}");
    let mut idle = balancer.connect("idle");
    for name in ["nbd_failovers_total", "nbd_received_bytes_total", "nbd_sent_bytes_total"] {
        assert_eq!(balancer.metric(&shard(name)), 0.0, "{name}");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writers = ["one", "other"].map(|export| {
        let (client, stop) = (balancer.connect(export), Arc::clone(&stop));
        thread::spawn(move || write_until(client, &stop))
    });
    assert_eq!(balancer.metric("nbd_connections"), 3.0);
    assert_eq!(balancer.metric(&shard("nbd_sessions")), 3.0);
    let leader = cluster.wait_leader();
    let term = balancer.metric(&shard("lb_shard_term"));
    cluster.at_mut(leader).kill_9();
    wait_until("all to be resumed", || {
        balancer.metric(&shard("nbd_failovers_total")) >= 3.0
            && balancer.metric(&shard("nbd_stall_seconds_count")) >= 2.0
    });
    stop.store(true, Ordering::Relaxed);
    let felt = writers.map(|writer| writer.join().unwrap());

    let (failovers, stalled) = (
        balancer.metric(&shard("nbd_failovers_total")),
        balancer.metric(&shard("nbd_stall_seconds_count")),
    );
    // Unless a machine that does other things has held more than one election.
    if balancer.metric(&shard("lb_shard_term")) == term + 1.0 {
        assert_eq!((failovers, stalled), (3.0, 2.0));
    }
    let longest: f64 = felt.iter().map(|(longest, _)| longest.as_secs_f64()).sum();
    let stalls = balancer.metric(&shard("nbd_stall_seconds_sum"));
    // Nobody leads before the lease of the one that was lost has run out.
    assert!(stalls > 0.2 && stalls < longest * stalled / 2.0, "{stalls} of {longest} s");
    assert_eq!(balancer.metric("nbd_stall_seconds_bucket{shard=\"0\",le=\"0.01\"}"), 0.0);
    assert_eq!(balancer.metric("nbd_stall_seconds_bucket{shard=\"0\",le=\"60\"}"), stalled);
    #[expect(clippy::cast_precision_loss, reason = "some megabytes")]
    let written = felt.iter().map(|(_, written)| *written as f64).sum::<f64>();
    let received = balancer.metric(&shard("nbd_received_bytes_total"));
    // A header of 32 bytes to each write of 4096, and three for the ends.
    let expected = written * (4096.0 + 32.0) / 4096.0;
    assert!((expected..=expected + 96.0).contains(&received), "{received} of {expected}");
    assert!(balancer.metric(&shard("nbd_sent_bytes_total")) >= written / 4096.0 * 16.0);
    wait_until("one session", || balancer.metric(&shard("nbd_sessions")) == 1.0);
    assert_eq!(balancer.metric(&shard("nbd_requests_pending")), 0.0);
    idle.read(0, 512).unwrap();
    let stalls = balancer.metric(&shard("nbd_stall_seconds_count"));
    assert_eq!(stalls, stalled, "it asked when all was over");
    cluster.at_mut(leader).start();
}

#[test]
fn requests_that_wait_are_counted() {
    let mut cluster = cluster();
    let balancer = Process::start(&cluster, &[]);
    let pending = "nbd_requests_pending{shard=\"0\"}";
    let mut client = balancer.connect("v");
    for follower in cluster.followers() {
        cluster.at_mut(follower).kill_9();
    }
    for place in 0..5 {
        let write = nbd_proto::Command::Write { offset: place * 512, len: 512 };
        client.send(&write, &[1; 512]).unwrap();
    }
    wait_until("five that wait", || balancer.metric(pending) == 5.0);
    drop(client);
    wait_until("none to wait", || balancer.metric(pending) == 0.0);
}
