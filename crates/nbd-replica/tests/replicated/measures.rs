//! What the metrics of a leader say of its writes and of its followers.

use nbd_testkit::{Cluster, NodeProcess};

use crate::{cluster, wait_until};

/// How many samples each stage of a write has.
fn samples(node: &NodeProcess, stage: &str) -> f64 {
    let series = format!("request_stage_seconds_count{{stage=\"{stage}\"}}");
    node.metric(&series).unwrap_or(0.0)
}

/// The values of a metric that each member of a shard has a series of.
fn of_members(node: &NodeProcess, name: &str) -> Vec<f64> {
    let page = node.get("/metrics").body;
    let series = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    series.map(|rest| rest.rsplit_once(' ').unwrap().1.parse().unwrap()).collect()
}

fn write(cluster: &Cluster, place: usize, count: u64) {
    let mut client = cluster.at(place).connect("v").unwrap();
    for number in 0..count {
        client.write(number * 4096, &[7; 4096]).unwrap();
    }
}

#[test]
fn each_stage_of_a_write_is_timed_wherever_its_client_is() {
    let cluster = cluster();
    let leader = cluster.wait_leader();
    let follower = cluster.followers()[0];
    write(&cluster, leader, 20);
    let (at_leader, at_follower) = (cluster.at(leader), cluster.at(follower));
    let all = ["queue", "append", "fsync", "replicate", "commit", "apply", "reply"];
    let before = all.map(|stage| samples(at_leader, stage));
    for (stage, count) in all.iter().zip(before) {
        assert!(count >= 20.0, "{stage}: {count}");
    }
    write(&cluster, follower, 20);
    for (stage, before) in all.iter().zip(before) {
        let count = samples(at_leader, stage);
        assert!(count >= before + 20.0, "{stage}: {before}, then {count}");
    }
    for stage in ["queue", "replicate", "reply"] {
        assert_eq!(samples(at_follower, stage), 0.0, "{stage} is the leader's to tell");
    }
    // How many entries a follower makes durable at once is its own affair.
    let before = samples(at_follower, "fsync");
    assert!(before > 0.0);
    write(&cluster, leader, 20);
    wait_until("the follower to have written its log", || {
        samples(cluster.at(follower), "fsync") > before
    });
}

#[test]
fn a_leader_tells_how_its_followers_stand() {
    let mut cluster = cluster();
    let leader = cluster.wait_leader();
    write(&cluster, leader, 1);
    let is = |cluster: &Cluster, name: &str, wanted: &[f64]| {
        let mut values = of_members(cluster.at(leader), name);
        values.sort_by(f64::total_cmp);
        values == wanted
    };
    wait_until("both to be alive", || is(&cluster, "raft_member_alive", &[1.0, 1.0]));
    wait_until("both to have all", || is(&cluster, "raft_member_lag_entries", &[0.0, 0.0]));
    let [lost, other] = cluster.followers()[..] else { panic!("two followers") };
    cluster.at_mut(lost).kill_9();
    wait_until("one to be lost", || is(&cluster, "raft_member_alive", &[0.0, 1.0]));
    write(&cluster, leader, 50);
    wait_until("one to lag", || {
        let lags = of_members(cluster.at(leader), "raft_member_lag_entries");
        lags.iter().any(|lag| *lag >= 50.0)
    });
    let told = of_members(cluster.at(other), "raft_member_alive");
    assert!(told.iter().all(|value| value.is_nan()), "it does not lead: {told:?}");
    cluster.at_mut(lost).start();
    cluster.wait_until_serving();
    wait_until("it to be back", || is(&cluster, "raft_member_alive", &[1.0, 1.0]));
}
