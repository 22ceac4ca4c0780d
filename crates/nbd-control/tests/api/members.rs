//! Replicas that are replaced and added, with what is told of it on the way.

use std::thread;

use nbd_testkit::{Cluster, ServerProcess};
use serde_json::{Value, json};

use crate::{control, get, wait_for};

const MIB: u64 = 1 << 20;

/// So small a log that a new replica has to fetch chunks.
const FLAGS: [&str; 4] = [
    "--log-segment-bytes=4MiB",
    "--log-bytes-max=32MiB",
    "--checkpoint-log-bytes=4MiB",
    "--log-cache-bytes=4MiB",
];

/// One shard of three replicas, and a volume with more data than the log keeps.
fn filled() -> (Cluster, ServerProcess) {
    let nodes: &[&str] = &["nbd-1-1", "nbd-1-2", "nbd-1-3"];
    let builder = Cluster::builder().shards(&[nodes]).default_size("64MiB");
    let mut cluster = FLAGS.iter().fold(builder, |builder, flag| builder.argument(flag)).start();
    cluster.wait_until_serving();
    let control = control(&cluster);
    let mut client = cluster.at(0).connect("v").unwrap();
    for round in 0..3 {
        for mib in 0..24 {
            client.write(mib * MIB, &vec![round + 1; 1 << 20]).unwrap();
        }
    }
    (cluster, control)
}

/// Starts an empty node that fetches no faster than this, and waits until it has asked to join.
fn join(cluster: &mut Cluster, control: &ServerProcess, rate: &str) -> usize {
    let rate = format!("--resync-bytes-per-second={rate}");
    let place = cluster.join("nbd-1-4", &[&FLAGS[..], &[&rate]].concat());
    let joins = |shard: &Value| {
        shard["members"]
            .as_array()
            .is_some_and(|members| members.iter().any(|m| m["node"] == "nbd-1-4"))
    };
    wait_for(control, "shards/0", joins);
    place
}

fn replica_on(control: &ServerProcess, node: &str) -> Option<u64> {
    let shard = get(control, "shards/0");
    let members = shard["members"].as_array().unwrap();
    members.iter().find(|member| member["node"] == node)?["replica"].as_u64()
}

/// The operations that a stream of events told of.
fn told(events: &str) -> Vec<Value> {
    let data = events.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|json| serde_json::from_str(json).unwrap()).collect()
}

#[test]
fn a_dead_replica_is_replaced_and_all_of_it_is_told() {
    let (mut cluster, control) = filled();
    let dead = cluster.followers()[0];
    let old = replica_on(&control, cluster.at(dead).name()).unwrap();
    cluster.at_mut(dead).kill_9();
    let new = join(&mut cluster, &control, "4MiB");
    let (host, port) = cluster.at(new).grpc_address();
    let body = json!({"node": "nbd-1-4", "grpc": format!("{host}:{port}")}).to_string();
    let path = format!("/api/v1/shards/0/members/{old}/replace");
    let begun = control.send("POST", &path, &[], &body);
    assert_eq!(begun.status, 202, "{begun:?}");
    let location = begun.header("location").unwrap().to_owned();
    let events = told(&control.get(&format!("{location}/events")).body);
    let done: Vec<_> =
        events.iter().filter_map(|event| event["progress"]["done"].as_u64()).collect();
    assert!(
        done.len() > 2 && done.is_sorted(),
        "progress is told, and never goes back: {events:?}"
    );
    let (last, earlier) = events.split_last().unwrap();
    assert_eq!(last["state"], "done", "{events:?}");
    assert!(earlier.iter().all(|event| event["state"] == "running"), "{events:?}");

    let shard = wait_for(&control, "shards/0", |shard| shard["health"] == "ok");
    assert_eq!(shard["members"].as_array().map(Vec::len), Some(3), "{shard}");
    assert_eq!(replica_on(&control, cluster.at(dead).name()), None);
    assert_eq!(control.send("POST", &path, &[], &body).status, 404, "it is gone");
    let mut client = cluster.at(new).connect("v").unwrap();
    assert_eq!(client.read(23 * MIB, 4096).unwrap(), [3; 4096]);
    // The new one counts: without another one of the three, there is a majority.
    let other = (0..3).find(|place| *place != dead).unwrap();
    cluster.at_mut(other).kill_9();
    client.write(0, &[9; 4096]).unwrap();
}

#[test]
fn a_replacement_that_is_cancelled_changes_nothing() {
    let (mut cluster, control) = filled();
    let follower = cluster.followers()[0];
    let name = cluster.at(follower).name().to_owned();
    let old = replica_on(&control, &name).unwrap();
    let new = join(&mut cluster, &control, "1MiB");
    let (host, port) = cluster.at(new).grpc_address();
    let body = json!({"node": "nbd-1-4", "grpc": format!("{host}:{port}")}).to_string();
    let path = format!("/api/v1/shards/0/members/{old}/replace");
    let begun = control.send("POST", &path, &[], &body);
    let location = begun.header("location").unwrap_or_else(|| panic!("{begun:?}")).to_owned();
    let id = begun.json()["id"].clone();
    wait_for(&control, "operations", |page| {
        let items = page["items"].as_array().unwrap();
        items.iter().any(|operation| operation["id"] == id)
    });
    thread::scope(|scope| {
        let events = scope.spawn(|| told(&control.get(&format!("{location}/events")).body));
        let cancelled = control.send("DELETE", &location, &[], "");
        assert_eq!((cancelled.status, &cancelled.json()["state"]), (200, &json!("ended")));
        let events = events.join().unwrap();
        assert_eq!(events.last().unwrap()["state"], "ended", "{events:?}");
    });
    assert_eq!(replica_on(&control, &name), Some(old), "the old one stays");
    assert_eq!(replica_on(&control, "nbd-1-4"), None);
    assert_eq!(get(&control, "operations")["items"], json!([]));
    assert_eq!(control.send("DELETE", &location, &[], "").status, 409, "it has ended");
    let mut client = cluster.at(follower).connect("v").unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
}
