//! Shards, nodes, and what takes long.

use serde_json::json;

use crate::fake::{Scene, wait_for};

#[test]
fn leadership_moves_to_whom_it_is_given() {
    let scene = Scene::new(1, &[]);
    let led = |body: &str| scene.post("/api/v1/shards/0/transfer", body);
    assert_eq!(led(r#"{"node":"c"}"#).json()["leader"], "c");
    assert_eq!(led(r#"{"node":"c"}"#).json()["leader"], "c", "again");
    assert_eq!(led("").json()["leader"], "a");
    assert_eq!(led(r#"{"node":"z"}"#).status, 422);
    scene.world.lock().shards.get_mut(&0).unwrap().cordoned.insert("b".to_owned());
    assert_eq!(led("").json()["leader"], "c", "b is cordoned");
    let mut world = scene.world.lock();
    world.shards.get_mut(&0).unwrap().members.iter_mut().for_each(|member| member.active = false);
    drop(world);
    assert_eq!(led("").status, 409, "nobody else is there");
}

#[test]
fn a_replica_is_added_watched_and_cancelled() {
    let scene = Scene::new(1, &[]);
    let added = scene.post("/api/v1/shards/0/members", r#"{"node":"n4"}"#);
    assert_eq!(added.status, 202, "{added:?}");
    let location = added.header("location").unwrap().to_owned();
    assert_eq!(location, "/api/v1/operations/add-0-4");
    assert_eq!(added.json()["state"], "running");
    let running = scene.get("/api/v1/operations").json();
    assert_eq!(running["items"][0]["id"], "add-0-4");

    std::thread::scope(|scope| {
        let events = scope.spawn(|| scene.get(&format!("{location}/events")));
        wait_for("the stream", || scene.get("/metrics").status == 200);
        let cancelled = scene.send("DELETE", &location, &[], "");
        assert_eq!(cancelled.json()["state"], "ended", "{cancelled:?}");
        let events = events.join().unwrap();
        assert_eq!(events.header("content-type"), Some("text/event-stream"));
        let last = events.body.trim_end().rsplit("data: ").next().unwrap();
        let last: serde_json::Value = serde_json::from_str(last).unwrap();
        assert_eq!(last["state"], "ended", "{}", events.body);
        assert!(events.body.starts_with("event: operation\n"), "{}", events.body);
    });
    let again = scene.send("DELETE", &location, &[], "");
    assert_eq!((again.status, &again.json()["type"]), (409, &json!("/problems/conflict")));
    assert_eq!(scene.get("/api/v1/operations/add-0-4").json()["state"], "ended");
    assert_eq!(scene.get("/api/v1/operations/nonsense").status, 404);
    assert_eq!(scene.get("/api/v1/operations/add-7-4").status, 404);
}

#[test]
fn a_replica_is_replaced() {
    let scene = Scene::new(1, &[]);
    let replaced = scene.post("/api/v1/shards/0/members/2/replace", r#"{"node":"n4"}"#);
    assert_eq!(replaced.json()["id"], "replace-0-2-4", "{replaced:?}");
    {
        let mut world = scene.world.lock();
        let shard = world.shards.get_mut(&0).unwrap();
        shard.replacements.clear();
        shard.members.remove(1);
        shard.members.iter_mut().for_each(|member| member.voter = true);
    }
    assert_eq!(scene.get("/api/v1/operations/replace-0-2-4").json()["state"], "done");
    assert_eq!(scene.post("/api/v1/shards/0/members/9/replace", r#"{"node":"n5"}"#).status, 404);
    let unreachable = scene.post("/api/v1/shards/0/members/3/replace", r#"{"node":"x"}"#);
    assert_eq!(unreachable.status, 409, "{unreachable:?}");
}

#[test]
fn a_removal_that_costs_the_majority_is_refused() {
    let scene = Scene::new(1, &[]);
    assert_eq!(scene.send("DELETE", "/api/v1/shards/0/members/3", &[], "").status, 204);
    assert_eq!(scene.send("DELETE", "/api/v1/shards/0/members/3", &[], "").status, 404);
    let refused = scene.send("DELETE", "/api/v1/shards/0/members/2", &[], "");
    assert_eq!((refused.status, &refused.json()["type"]), (409, &json!("/problems/conflict")));
    let shard = scene.get("/api/v1/shards/0").json();
    assert_eq!(shard["health"], "degraded");
    assert_eq!(shard["reason"], "2 replicas vote, and 3 are configured");
}

#[test]
fn a_node_is_drained_and_taken_back() {
    let scene = Scene::new(2, &[]);
    let drain = scene.post("/api/v1/nodes/a/drain", "");
    assert_eq!(drain.status, 202, "{drain:?}");
    assert_eq!(
        drain.json()["progress"],
        json!({"done": 0, "total": 2, "unit": "shards", "seconds_left": null})
    );
    assert_eq!(scene.get("/api/v1/nodes/a").json()["cordoned"], true);
    let refused = scene.post("/api/v1/shards/0/members", r#"{"node":"a"}"#);
    assert_eq!(refused.status, 409, "{refused:?}");
    scene.world.lock().shards.values_mut().for_each(|shard| shard.leader = 2);
    assert_eq!(scene.get("/api/v1/operations/drain-a").json()["state"], "done");
    assert_eq!(scene.post("/api/v1/nodes/a/uncordon", "").json()["cordoned"], false);
    assert_eq!(scene.get("/api/v1/operations/drain-a").json()["state"], "ended");
    assert_eq!(scene.post("/api/v1/nodes/zz/cordon", "").status, 404);
}

#[test]
fn stopping_ends_streams() {
    let mut scene = Scene::new(1, &[]);
    scene.post("/api/v1/shards/0/members", r#"{"node":"n4"}"#);
    let address = scene.http;
    let watching = std::thread::spawn(move || {
        nbd_testkit::http::get(address, "/api/v1/operations/add-0-4/events")
    });
    // An answer to another request does not tell that the stream is open; its calls do.
    let calls = |scene: &Scene| scene.world.lock().calls.values().sum::<usize>();
    let before = calls(&scene);
    wait_for("the stream to look", || calls(&scene) > before + 1);
    let started = std::time::Instant::now();
    scene.stop();
    assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(watching.join().unwrap().unwrap().body.contains("event: operation"));
}
