//! Sessions in the shard's state, seen from outside.

use std::thread;
use std::time::Duration;

use nbd_testkit::Cluster;

use super::{builder, wait_until};

/// Sessions open, as the leader has them.
fn open_sessions(cluster: &Cluster) -> Option<f64> {
    let leader = cluster.leader()?;
    cluster.at(leader).metric(r#"shard_sessions{shard="0"}"#)
}

// Goal: a node that is lost for good leaves no sessions behind, and a client that merely has
// nothing to say keeps its own.
#[test]
fn sessions_of_a_front_end_that_never_returns_expire() {
    let mut cluster = builder().argument("--session-expiry=2s").start();
    cluster.wait_until_serving();
    let [lost, kept] = cluster.followers()[..] else { panic!("two of three follow") };
    let mut of_lost = cluster.at(lost).connect("v").unwrap();
    let mut of_kept = cluster.at(kept).connect("v").unwrap();
    of_lost.write(0, &[1; 4096]).unwrap();
    of_kept.write(8192, &[2; 4096]).unwrap();
    wait_until("two sessions", || open_sessions(&cluster) == Some(2.0));
    cluster.at_mut(lost).kill_9();
    wait_until("one session", || open_sessions(&cluster) == Some(1.0));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(of_kept.read(0, 4096).unwrap(), [1; 4096], "the idle client goes on");
    of_kept.write(8192, &[3; 4096]).unwrap();
    assert_eq!(of_kept.read(8192, 4096).unwrap(), [3; 4096]);
}
