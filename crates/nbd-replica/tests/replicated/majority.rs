//! Too few replicas are left: nothing is served, nothing is lost, and it is said.

use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::Command;
use nbd_testkit::Reply;

use crate::{cluster, wait_until};

#[test]
fn health_without_a_majority_says_so_within_its_deadline() {
    let mut cluster = cluster();
    let leader = cluster.wait_leader();
    let followers = cluster.followers();
    // First a follower that is left alone, then, once all are back, the leader.
    for alone in [followers[0], leader] {
        let others: Vec<usize> = (0..3).filter(|at| *at != alone).collect();
        for at in &others {
            cluster.at_mut(*at).kill_9();
        }
        let mut refused = None;
        wait_until("health to fail", || {
            let started = Instant::now();
            let health = cluster.at(alone).health().expect("health answers");
            let elapsed = started.elapsed();
            // The default deadline is a second.
            assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
            refused = (!health.is_ok()).then_some(health);
            refused.is_some()
        });
        let refused = refused.unwrap();
        assert_eq!(refused.status, 503);
        let reason = refused.shards[0].error.as_deref().unwrap_or_default();
        assert!(!reason.is_empty(), "{refused:?}");
        assert_eq!(cluster.at(alone).get("/livez").status, 200);
        for at in others {
            cluster.at_mut(at).spawn();
        }
        cluster.wait_until_serving();
    }
}

#[test]
fn requests_wait_for_a_majority_and_then_go_on() {
    let mut cluster = cluster();
    let leader = cluster.wait_leader();
    let followers = cluster.followers();
    // Attached to what becomes a leader without followers, and a follower without others.
    for alone in [leader, followers[0]] {
        let others: Vec<usize> = (0..3).filter(|at| *at != alone).collect();
        let mut client = cluster.at(alone).connect("volume").unwrap();
        client.write(0, &[1; 4096]).unwrap();
        for at in &others {
            cluster.at_mut(*at).kill_9();
        }
        let write = client.send(&Command::Write { offset: 0, len: 4096 }, &[2; 4096]).unwrap();
        let read = Command::Read { offset: 4096, len: 4096, dont_fragment: false };
        let read = client.send(&read, &[]).unwrap();
        let waiting = thread::spawn(move || {
            let mut replies = [client.receive().unwrap(), client.receive().unwrap()];
            replies.sort_by_key(|(cookie, _)| *cookie);
            (client, replies, Instant::now())
        });
        thread::sleep(Duration::from_millis(1500));
        let back = Instant::now();
        assert!(!waiting.is_finished(), "a request was answered without a majority");
        cluster.at_mut(others[0]).spawn();
        let (mut client, replies, answered) = waiting.join().unwrap();
        assert!(answered >= back);
        let expected = [(write, Ok(Reply::Done)), (read, Ok(Reply::Data(vec![0; 4096])))];
        assert!(replies == expected, "the waiting requests were not carried out");
        assert!(client.read(0, 4096).unwrap() == [2; 4096]);
        cluster.at_mut(others[1]).spawn();
        cluster.wait_until_serving();
        client.write(0, &[0; 4096]).unwrap();
    }
    cluster.wait_until_equal();
}

#[test]
fn a_full_outage_loses_nothing() {
    let mut cluster = cluster();
    let load = crate::load(&cluster.targets());
    for _ in 0..2 {
        load.wait_for_answers(100).unwrap();
        for node in cluster.nodes() {
            node.kill_9();
        }
        for node in cluster.nodes() {
            node.spawn();
        }
        cluster.wait_until_serving();
    }
    load.wait_for_answers(50).unwrap();
    crate::finish(load, &mut cluster);
    // Stopped in order, one after the other: the last has no majority to hand over to.
    for node in cluster.nodes() {
        assert!(node.terminate().success());
    }
    for node in cluster.nodes() {
        node.spawn();
    }
    cluster.wait_until_serving();
    cluster.wait_until_equal();
}
