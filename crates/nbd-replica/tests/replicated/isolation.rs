//! A node that its peers do without ends itself, and no other does.

use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, Fault};

use crate::{builder, wait_until};

/// The least that can be configured.
const AFTER: Duration = Duration::from_secs(5);

/// The exit code of a node that is to be started again.
const ISOLATED: i32 = 75;

/// How often a node is tried to be isolated.
const ATTEMPTS: u32 = 3;

fn cluster() -> Cluster {
    let mut cluster = builder().proxied().argument("--isolation-exit=5s").start();
    cluster.wait_until_serving();
    cluster
}

// Method: what one follower sends to the leader does not arrive. It hears heartbeats, so that it
// does not stand for election, and it reaches the third node, which can ask the leader for it.
#[test]
fn one_that_is_not_heard_ends_and_comes_back() {
    let mut cluster = cluster();
    let isolated = (0..ATTEMPTS).any(|_| is_isolated(&mut cluster));
    assert!(isolated, "leadership moved again and again: are the others disturbed?");
}

/// Isolates a node. `false`: leadership moved meanwhile, as it may when the leader stands still on
/// a machine that does other things. The new leader may well hear the node.
fn is_isolated(cluster: &mut Cluster) -> bool {
    let leader = cluster.wait_leader();
    // Any other node, also if another one leads by now.
    let lost = (leader + 1) % 3;
    let mut client = cluster.at(leader).connect("v").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    let began = Instant::now();
    cluster.network().set(lost, leader, Fault::Hold);
    let mut status = None;
    wait_until("the node to end by itself", || {
        status = cluster.at_mut(lost).ended_by_itself();
        status.is_some() || cluster.at(leader).metric("raft_role{shard=\"0\"}") == Some(0.0)
    });
    let Some(status) = status else {
        begin_anew(cluster, lost);
        return false;
    };
    assert_eq!(status.code(), Some(ISOLATED), "as one that is to be started again");
    assert!(began.elapsed() >= AFTER, "{:?}", began.elapsed());
    client.write(0, &[2; 4096]).unwrap();
    if cluster.wait_leader() != leader {
        begin_anew(cluster, lost);
        return false;
    }
    cluster.network().heal();
    assert_eq!(cluster.at_mut(lost).wait_exit().code(), Some(ISOLATED));
    cluster.at_mut(lost).start();
    cluster.wait_until_serving();
    cluster.wait_until_equal();
    assert_eq!(client.read(0, 4096).unwrap(), [2; 4096]);
    true
}

/// Ends the fault, and starts the node anew that was not heard: the new process does not remember
/// how long that was so.
fn begin_anew(cluster: &mut Cluster, lost: usize) {
    cluster.network().heal();
    if let Some(status) = cluster.at_mut(lost).ended_by_itself() {
        assert_eq!(status.code(), Some(ISOLATED));
    }
    cluster.at_mut(lost).kill_9();
    cluster.at_mut(lost).start();
    cluster.wait_until_serving();
}

// Goal: where no majority is left every node stays, to be there when the network is.
#[test]
fn nobody_ends_in_a_cluster_that_has_fallen_apart() {
    let mut cluster = cluster();
    cluster.network().set_between(0, 1, Fault::Hold);
    cluster.network().set_between(1, 2, Fault::Hold);
    cluster.network().set_between(0, 2, Fault::Hold);
    thread::sleep(3 * AFTER);
    for place in 0..3 {
        assert_eq!(cluster.at_mut(place).ended_by_itself(), None, "node {place}");
    }
    cluster.network().heal();
    cluster.wait_until_serving();
    cluster.wait_until_equal();
}

// Goal: nor does one that was itself cut off from all, for it cannot know how they are.
#[test]
fn one_that_reaches_nobody_stays() {
    let mut cluster = cluster();
    let alone = cluster.followers()[0];
    cluster.network().set_around(alone, Fault::Cut);
    thread::sleep(3 * AFTER);
    assert_eq!(cluster.at_mut(alone).ended_by_itself(), None);
    cluster.network().heal();
    cluster.wait_until_serving();
    cluster.wait_until_equal();
}
