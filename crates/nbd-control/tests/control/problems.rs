//! What goes wrong, and what the client is told.

use std::time::{Duration, Instant};

use nbd_rpc::v1::Conflict;
use nbd_testkit::http::Response;

use crate::fake::{Mode, Scene};

/// Checks that an answer is a problem of this kind.
#[track_caller]
fn assert_problem(answer: &Response, status: u16, kind: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{answer:?}");
    let problem = answer.json();
    assert_eq!(problem["type"], format!("/problems/{kind}"), "{problem}");
    assert_eq!(problem["status"], status, "{problem}");
    for text in ["title", "detail"] {
        assert!(problem[text].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
    }
}

#[test]
fn every_mistake_is_a_problem() {
    let scene = Scene::new(1, &[]);
    assert_problem(&scene.get("/nowhere"), 404, "not-found");
    assert_problem(&scene.get("/api/v1/nowhere"), 404, "not-found");
    assert_problem(&scene.get("/api/v1/volumes/none"), 404, "not-found");
    assert_problem(&scene.get("/api/v1/volumes/%FF"), 404, "not-found");
    for shard in ["1", "01", "-1", "x"] {
        assert_problem(&scene.get(&format!("/api/v1/shards/{shard}")), 404, "not-found");
    }
    let put = scene.send("PUT", "/api/v1/volumes", &[], "{}");
    assert_problem(&put, 405, "method-not-allowed");
    assert!(put.header("allow").is_some_and(|allow| allow.contains("POST")), "{put:?}");
    for query in [
        "?limit=0",
        "?limit=1001",
        "?limit=x",
        "?sort=color",
        "?cursor=x",
        "?label=x",
        "?labels=a%3Db",
        "?limit=1&limit=2",
    ] {
        assert_problem(&scene.get(&format!("/api/v1/volumes{query}")), 400, "malformed");
    }
    assert_problem(&scene.post("/api/v1/volumes", "{"), 400, "malformed");
    assert_problem(&scene.post("/api/v1/volumes", "[]"), 400, "malformed");
    assert_problem(&scene.post("/api/v1/volumes", r#"{"name":"x","sise":1}"#), 400, "malformed");
    let text = [("content-type", "text/plain")];
    let answer = scene.send("POST", "/api/v1/volumes", &text, r#"{"name":"x"}"#);
    assert_problem(&answer, 415, "unsupported-media-type");
    let long = format!(r#"{{"name":"{}"}}"#, "x".repeat(2 << 20));
    assert_problem(&scene.post("/api/v1/volumes", &long), 413, "too-large");
}

#[test]
fn every_wrong_field_is_named_at_once() {
    let scene = Scene::new(1, &[]);
    let body = r#"{"name":"","size":5000,"description":7,"labels":{"a b":"x"}}"#;
    let answer = scene.post("/api/v1/volumes", body);
    assert_problem(&answer, 422, "invalid");
    let errors = answer.json()["errors"].clone();
    let fields = errors.as_array().unwrap().iter().map(|error| error["field"].as_str().unwrap());
    let fields: Vec<_> = fields.collect();
    assert_eq!(fields, ["/name", "/size", "/description", "/labels/a b"]);
    let key = [("Idempotency-Key", "a b")];
    let answer = scene.send("POST", "/api/v1/volumes", &key, r#"{"name":"x"}"#);
    assert_problem(&answer, 422, "invalid");
}

#[test]
fn what_a_shard_refuses_says_why() {
    let scene = Scene::new(1, &[]);
    for (conflict, status, kind) in [
        (Conflict::VolumeExists, 409, "volume-exists"),
        (Conflict::KeyReused, 422, "key-reused"),
        (Conflict::LimitReached, 409, "limit-reached"),
        (Conflict::Attached, 409, "volume-attached"),
        (Conflict::Shrinks, 409, "volume-shrinks"),
        (Conflict::Unspecified, 409, "conflict"),
    ] {
        scene.shard_mode(0, Mode::Refuse(conflict));
        let answer = scene.post("/api/v1/volumes", r#"{"name":"x"}"#);
        assert_problem(&answer, status, kind);
    }
}

#[test]
fn a_shard_without_a_leader_is_503_and_lists_leave_it_out() {
    let scene = Scene::new(2, &["--deadline=500ms"]);
    scene.shard_mode(1, Mode::NoLeader);
    for path in [
        "/api/v1/shards/1",
        "/api/v1/shards/1/activity",
        "/api/v1/sessions?shard=1",
        "/api/v1/operations/add-1-1",
    ] {
        let answer = scene.get(path);
        assert_problem(&answer, 503, "unavailable");
        assert_eq!(answer.header("retry-after"), Some("1"));
        let detail = answer.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains("shard 1"), "{detail}");
    }
    for path in ["volumes", "sessions", "shards", "nodes", "operations", "activity"] {
        let answer = scene.get(&format!("/api/v1/{path}"));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["missing_shards"], serde_json::json!([1]), "{path}");
    }
    assert_eq!(scene.get("/api/v1/shards/0").status, 200);
    let health = scene.get("/health");
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["shards"][1]["status"], "down");
    let health = scene.get("/api/v1/cluster/health").json();
    assert_eq!((&health["status"], &health["shards"][0]["status"]), (&"down".into(), &"ok".into()));
    scene.shard_mode(1, Mode::Serve);
    assert_eq!(scene.get("/health").status, 200);
}

#[test]
fn a_dead_or_frozen_node_costs_little() {
    let scene = Scene::new(1, &["--deadline=5s"]);
    for mode in [Mode::NoLeader, Mode::Hang] {
        // The one that is asked first, because it leads.
        scene.node_mode("a", mode);
        let started = Instant::now();
        for name in ["x", "y"] {
            let body = format!(r#"{{"name":"{name}-{mode:?}"}}"#);
            assert_eq!(scene.post("/api/v1/volumes", &body).status, 201);
        }
        // A change waits for one that is frozen as long as that has for an attempt, 1.5 s, and once
        // only.
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
    let nodes = scene.get("/api/v1/nodes").json();
    assert_eq!(nodes["items"][0]["state"], "down");
    assert!(nodes["items"][0]["reason"].is_string(), "{nodes}");
    assert_eq!(nodes["items"][1]["state"], "up");
}

#[test]
fn a_change_is_not_sent_to_a_second_node_while_the_first_may_make_it() {
    let scene = Scene::new(1, &["--deadline=1s"]);
    scene.shard_mode(0, Mode::Hang);
    assert_problem(&scene.post("/api/v1/volumes", r#"{"name":"x"}"#), 503, "unavailable");
    assert_eq!(scene.calls(), 1);
    // What only looks is asked of all.
    assert_problem(&scene.get("/api/v1/shards/0/activity"), 503, "unavailable");
    assert_eq!(scene.calls(), 4);
}

#[test]
fn a_list_of_nothing_but_silence_is_503() {
    let scene = Scene::new(2, &["--deadline=300ms"]);
    (0..2).for_each(|shard| scene.shard_mode(shard, Mode::NoLeader));
    for list in ["volumes", "sessions", "shards", "activity"] {
        let answer = scene.get(&format!("/api/v1/{list}"));
        assert_problem(&answer, 503, "unavailable");
        assert_eq!(answer.header("retry-after"), Some("1"), "{list}");
    }
}

#[test]
fn a_node_that_hosts_nothing_does_not_make_what_is_unknown_seem_ended() {
    let scene = Scene::new(1, &[]);
    scene.node_mode("a", Mode::Stranger);
    let path = format!("/api/v1/sessions/{:032x}", 7);
    assert_problem(&scene.send("DELETE", &path, &[], ""), 404, "not-found");
}

#[test]
fn a_shard_that_hangs_is_given_up_at_the_deadline() {
    let scene = Scene::new(1, &["--deadline=700ms"]);
    scene.shard_mode(0, Mode::Hang);
    let started = Instant::now();
    assert_problem(&scene.get("/api/v1/volumes/x"), 503, "unavailable");
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(700) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn an_election_is_waited_out() {
    let scene = Scene::new(1, &[]);
    scene.shard_mode(0, Mode::NoLeader);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| scene.post("/api/v1/volumes", r#"{"name":"x"}"#));
        // Until somebody has asked in vain, more than once.
        crate::fake::wait_for("calls", || scene.world.lock().calls.values().sum::<usize>() > 3);
        scene.shard_mode(0, Mode::Serve);
        assert_eq!(answer.join().unwrap().status, 201);
    });
}
