//! A cluster with pieces missing.

use std::time::{Duration, Instant};

use nbd_testkit::ServerProcess;
use serde_json::json;

use crate::{cluster, create, get, name_on, wait_for};

/// Place of the node of this name, in the order of the names.
fn place(node: &str) -> usize {
    let names = ["nbd-1-1", "nbd-1-2", "nbd-1-3", "nbd-2-1", "nbd-2-2", "nbd-2-3"];
    names.iter().position(|name| *name == node).unwrap()
}

#[test]
fn calls_succeed_while_leaders_are_lost() {
    let mut cluster = cluster();
    let control = crate::control(&cluster);
    for (round, frozen) in [(0, false), (1, true)] {
        let leader = get(&control, "shards/0")["leader"].as_str().unwrap().to_owned();
        let leader = place(&leader);
        if frozen {
            cluster.at_mut(leader).pause();
        } else {
            cluster.at_mut(leader).kill_9();
        }
        let started = Instant::now();
        for number in 0..6 {
            create(&control, &format!("f{round}-{number}"));
        }
        change(&control, &format!("f{round}-0"));
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        let health = wait_for(&control, "cluster/health", |health| {
            health["shards"][0]["status"] == "degraded"
        });
        assert!(health["shards"][0]["reason"].is_string(), "{health}");
        assert_eq!(control.get("/health").status, 200, "a majority is there");
        let nodes = get(&control, "nodes");
        assert_eq!(nodes["items"][leader]["state"], "down", "{nodes}");
        if frozen {
            cluster.at_mut(leader).resume();
        } else {
            cluster.at_mut(leader).start();
        }
        wait_for(&control, "cluster/health", |health| health["status"] == "ok");
    }
    let page = get(&control, "volumes?prefix=f");
    assert_eq!(page["items"].as_array().map(Vec::len), Some(12), "each was created once");
}

/// Every other kind of call, each carried out once.
fn change(control: &ServerProcess, name: &str) {
    let path = format!("/api/v1/volumes/{name}");
    let patch = r#"{"description":"seen"}"#;
    let patched = control.send("PATCH", &path, &[], patch);
    assert_eq!((patched.status, &patched.json()["description"]), (200, &json!("seen")));
    let grown = control.send("POST", &format!("{path}/resize"), &[], r#"{"size":16777216}"#);
    assert_eq!((grown.status, &grown.json()["size"]), (200, &json!(16_777_216)), "{grown:?}");
    let shown = get(control, &format!("volumes/{name}"));
    assert_eq!((&shown["description"], &shown["size"]), (&json!("seen"), &json!(16_777_216)));
    for list in ["volumes", "sessions", "shards", "nodes", "operations", "activity"] {
        let page = get(control, list);
        assert!(page["missing_shards"].is_null(), "{list}: {page}");
    }
    let doomed = format!("{name}-doomed");
    create(control, &doomed);
    let path = format!("/api/v1/volumes/{doomed}");
    assert_eq!(control.send("DELETE", &path, &[], "").status, 204);
    assert_eq!(control.get(&path).status, 404);
}

#[test]
fn a_shard_without_majority_is_503_and_the_other_goes_on() {
    let mut cluster = cluster();
    let control = crate::control_with(&cluster, &["--deadline=2s"]);
    let there = name_on(&control, 0, "a");
    let gone = name_on(&control, 1, "b");
    // The leader is among those lost: left alone, it may answer for as long as its lease lasts.
    let leader = place(get(&control, "shards/1")["leader"].as_str().unwrap());
    let other = ["nbd-2-1", "nbd-2-2"].map(place).into_iter().find(|node| *node != leader).unwrap();
    for node in [leader, other] {
        cluster.at_mut(node).kill_9();
    }
    let started = Instant::now();
    let answer = control.get(&format!("/api/v1/volumes/{gone}"));
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    assert_eq!(answer.json()["type"], "/problems/unavailable");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(get(&control, &format!("volumes/{there}"))["name"], there.as_str());
    for list in ["volumes", "sessions", "shards", "nodes", "operations", "activity"] {
        assert_eq!(get(&control, list)["missing_shards"], json!([1]), "{list}");
    }
    let health = control.get("/health");
    assert_eq!((health.status, &health.json()["shards"][1]["status"]), (503, &json!("down")));
    assert_eq!(get(&control, "cluster")["health"], "down");
    cluster.at_mut(leader).start();
    wait_for(&control, &format!("volumes/{gone}"), |volume| volume["name"] == gone.as_str());
}
