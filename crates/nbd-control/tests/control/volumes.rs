//! The life of a volume.

use serde_json::json;

use crate::fake::{Mode, Scene};

#[test]
fn a_volume_is_created_changed_and_deleted() {
    let scene = Scene::new(2, &[]);
    let body = r#"{"name":"a/b é","size":8192,"labels":{"tier":"gold"}}"#;
    let created = scene.post("/api/v1/volumes", body);
    assert_eq!(created.status, 201, "{created:?}");
    let location = created.header("location").unwrap().to_owned();
    assert_eq!(location, "/api/v1/volumes/a%2Fb%20%C3%A9");
    let volume = created.json();
    assert_eq!((&volume["size"], &volume["labels"]), (&json!(8192), &json!({"tier": "gold"})));
    assert!(volume["created"].as_str().is_some_and(|time| time.ends_with('Z')), "{volume}");

    let shown = scene.get(&location).json();
    assert_eq!((&shown["name"], &shown["leader"]), (&json!("a/b é"), &json!("a")));
    assert_eq!((&shown["allocated"], &shown["sessions"]), (&json!(65536), &json!(0)));

    let merge = [("content-type", "application/merge-patch+json")];
    let patch = r#"{"description":"ours","labels":{"tier":null,"owner":"me"}}"#;
    let changed = scene.send("PATCH", &location, &merge, patch).json();
    assert_eq!(changed["description"], "ours");
    assert_eq!(changed["labels"], json!({"owner": "me"}));
    let kept = scene.send("PATCH", &location, &merge, "{}").json();
    assert_eq!((&kept["description"], &kept["labels"]), (&json!("ours"), &changed["labels"]));

    let resize = format!("{location}/resize");
    assert_eq!(scene.post(&resize, r#"{"size":16384}"#).json()["size"], 16384);
    let shrunk = scene.post(&resize, r#"{"size":4096}"#);
    assert_eq!(shrunk.json()["type"], "/problems/volume-shrinks");
    assert_eq!(scene.post(&resize, r#"{"size":4096,"force":true}"#).json()["size"], 4096);

    let deleted = scene.send("DELETE", &location, &[], "");
    assert_eq!((deleted.status, deleted.body.as_str()), (204, ""));
    assert_eq!(scene.get(&location).status, 404);
    assert_eq!(scene.send("DELETE", &location, &[], "").status, 404);
}

#[test]
fn requests_of_a_volume_are_asked_to_be_traced() {
    let scene = Scene::new(1, &["--jaeger-ui=http://jaeger:16686/"]);
    scene.post("/api/v1/volumes", r#"{"name":"a/b","size":4096}"#);
    let trace = "/api/v1/volumes/a%2Fb/trace";
    let asked = scene.post(trace, r#"{"requests":7}"#).json();
    assert_eq!((&asked["requests"], &asked["sessions"]), (&json!(7), &json!(0)));
    let search = asked["search"].as_str().unwrap();
    let begins = "http://jaeger:16686/search?service=nbd-replica&";
    assert!(search.starts_with(begins), "{search}");
    assert!(search.contains("tags=%7B%22cinderblock.volume.id%22%3A%22"), "{search}");
    for wrong in ["{}", r#"{"requests":0}"#, r#"{"requests":1001}"#, r#"{"requests":"x"}"#] {
        let refused = scene.post(trace, wrong);
        assert_eq!(refused.json()["type"], "/problems/invalid", "{wrong}: {refused:?}");
    }
    assert_eq!(scene.post("/api/v1/volumes/none/trace", r#"{"requests":1}"#).status, 404);
    let scene = Scene::new(1, &[]);
    scene.post("/api/v1/volumes", r#"{"name":"a","size":4096}"#);
    let asked = scene.post("/api/v1/volumes/a/trace", r#"{"requests":1}"#).json();
    assert_eq!(asked["search"], json!(null));
}

#[test]
fn a_creation_can_be_repeated() {
    let scene = Scene::new(1, &[]);
    let key = [("Idempotency-Key", "k1")];
    let body = r#"{"name":"x","size":4096}"#;
    let first = scene.send("POST", "/api/v1/volumes", &key, body);
    let again = scene.send("POST", "/api/v1/volumes", &key, body);
    assert_eq!((first.status, again.status), (201, 200));
    assert_eq!(first.json(), again.json());
    let other = scene.send("POST", "/api/v1/volumes", &key, r#"{"name":"x","size":8192}"#);
    assert_eq!((other.status, &other.json()["type"]), (422, &json!("/problems/key-reused")));
    let other = scene.post("/api/v1/volumes", body);
    assert_eq!((other.status, &other.json()["type"]), (409, &json!("/problems/volume-exists")));
}

#[test]
fn a_lost_answer_is_asked_for_again() {
    let scene = Scene::new(1, &[]);
    scene.shard_mode(0, Mode::LoseAnswer);
    // Without a key of the client's own, it is still created once, and is not said to exist.
    let created = scene.post("/api/v1/volumes", r#"{"name":"x"}"#);
    assert_eq!(created.status, 201, "{created:?}");
    assert_eq!(created.json()["size"], 1 << 30, "as configured");
    // The volume is found first; the answer to its deletion is lost.
    scene.shard_mode(0, Mode::LoseSecond);
    let gone = scene.send("DELETE", "/api/v1/volumes/x?force=true", &[], "");
    assert_eq!(gone.status, 204, "{gone:?}");
    assert!(scene.world.lock().shards[&0].volumes.is_empty());
}

#[test]
fn a_volume_is_made_smaller_by_one_attempt_only() {
    let scene = Scene::new(1, &[]);
    scene.post("/api/v1/volumes", r#"{"name":"x","size":8192}"#);
    let size = || scene.world.lock().shards[&0].volumes["x"].size;
    let resize = |body: &str| scene.post("/api/v1/volumes/x/resize", body);
    // Growing is repeated, forced or not.
    scene.shard_mode(0, Mode::LoseSecond);
    assert_eq!(resize(r#"{"size":16384,"force":true}"#).status, 200);
    let before = scene.calls();
    scene.shard_mode(0, Mode::LoseSecond);
    let answer = resize(r#"{"size":4096,"force":true}"#);
    assert_eq!((answer.status, size()), (503, 4096), "{answer:?}");
    assert!(answer.body.contains("may have been done"), "{answer:?}");
    assert_eq!(scene.calls(), before + 2, "to find it, and to resize it");
}

#[test]
fn a_volume_named_like_a_step_in_a_path_is_located() {
    let scene = Scene::new(1, &[]);
    let created = scene.post("/api/v1/volumes", r#"{"name":".."}"#);
    assert_eq!(created.header("location"), Some("/api/v1/volumes/%2E%2E"));
    assert_eq!(scene.get("/api/v1/volumes/%2E%2E").json()["name"], "..");
}

#[test]
fn an_attached_volume_is_deleted_by_force_only() {
    let scene = Scene::new(1, &[]);
    scene.post("/api/v1/volumes", r#"{"name":"x"}"#);
    let id = 0xabc_u128;
    let session = nbd_rpc::v1::SessionView {
        id: id.to_be_bytes().to_vec().into(),
        volume: 1,
        name: "x".to_owned(),
        ..nbd_rpc::v1::SessionView::default()
    };
    scene.world.lock().shards.get_mut(&0).unwrap().sessions.insert(id, session);
    let refused = scene.send("DELETE", "/api/v1/volumes/x", &[], "");
    assert_eq!(
        (refused.status, &refused.json()["type"]),
        (409, &json!("/problems/volume-attached"))
    );
    assert_eq!(scene.send("DELETE", "/api/v1/volumes/x?force=maybe", &[], "").status, 400);
    let sessions = scene.get("/api/v1/sessions?volume=x").json();
    assert_eq!(sessions["items"][0]["id"], "00000000000000000000000000000abc");
    assert_eq!(scene.send("DELETE", "/api/v1/volumes/x?force=true", &[], "").status, 204);
}
