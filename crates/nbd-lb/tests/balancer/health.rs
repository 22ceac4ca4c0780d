//! What an operator sees of it.

use nbd_testkit::Cluster;

use crate::process::{Process, command};
use crate::support::{Balancer, cluster, toml, wait_until};

#[test]
fn health_tells_whether_there_is_a_majority() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    wait_until("the leader", || balancer.get("/health").status == 200);
    assert_eq!(balancer.get("/readyz").status, 200);
    assert_eq!(balancer.get("/livez").status, 200);
    let leader = cluster.wait_leader();
    let name = cluster.at(leader).name().to_owned();
    balancer.wait_leader(cluster.at(leader));
    wait_until("the leader's name", || {
        let body = balancer.get("/health").json();
        body["status"] == "ok" && body["shards"][0]["leader"] == name.as_str()
    });

    // The followers are lost: the leader cannot lead any more, and says so.
    for follower in cluster.followers() {
        cluster.at_mut(follower).kill_9();
    }
    wait_until("503 without a majority", || balancer.get("/health").status == 503);
    let body = balancer.get("/health").json();
    assert_eq!(body["status"], "unavailable");
    let error = body["shards"][0]["error"].as_str().unwrap().to_owned();
    assert!(error.contains("1 nodes answer") || error.contains("cannot be reached"), "{error}");
    // What was ready stays so: it waits, as clients do.
    assert_eq!(balancer.get("/readyz").status, 200);

    // Nobody is left.
    cluster.at_mut(leader).kill_9();
    wait_until("nobody to answer", || {
        let body = balancer.get("/health").json();
        body["shards"][0]["error"].as_str().is_some_and(|error| error.starts_with("none of"))
    });

    for place in 0..3 {
        cluster.at_mut(place).spawn();
    }
    wait_until("200 again", || balancer.get("/health").status == 200);
    cluster.wait_until_serving();
    balancer.stop();
}

#[test]
fn the_program_starts_serves_and_stops() {
    let cluster = Cluster::start();
    let lb = Process::start(&cluster, &[]);
    assert_eq!(lb.get("/health").status, 200);
    let metrics = lb.get("/metrics").body;
    assert!(metrics.contains("lb_shard_reached{shard=\"0\"} 1\n"), "{metrics}");
    assert!(metrics.contains("lb_route_changes_total{shard=\"0\"} "), "{metrics}");
    assert_eq!(lb.terminate().code(), Some(0));
}

#[test]
fn mistakes_are_told_before_anything_starts() {
    let cluster = Cluster::builder().prepare();
    let file = format!("--cluster={}", cluster.cluster_file().display());
    let run = |arguments: &[&str]| {
        let output = command().args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, _) = run(&[&file, "--check-config"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("name = \"nbd-1-1\"") && out.contains("0.0.0.0:8080"), "{out}");
    let (code, out, _) = run(&[&file, "--mode=splice", "--check-config"]);
    assert!(code == Some(0) && out.contains("mode                 splice"), "{out}");
    let (code, _, error) = run(&[&file, "--mode=copy"]);
    assert!(code == Some(64) && error.contains("possible values: replay, splice"), "{error}");
    let (code, _, error) = run(&[]);
    assert_eq!(code, Some(64));
    assert_eq!(error, "error: no cluster: give --cluster FILE or set NBD_SHARDS\n");
    let (code, _, error) = run(&["--cluster=/nowhere/cluster.toml"]);
    assert_eq!(code, Some(64));
    assert!(error.contains("/nowhere/cluster.toml"), "{error}");
}
