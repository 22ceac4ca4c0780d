//! Who may do what.

use std::fs;
use std::io::Read as _;
use std::time::Duration;

use crate::fake::{Mode, Scene, wait_for};

#[test]
fn tokens_tell_who_may_do_what() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    fs::write(&file, "reader:monitor:look\nadmin:ops:touch\n").unwrap();
    let scene = Scene::new(1, &[&format!("--token-file={}", file.display())]);
    let send = |method: &str, token: &str, body: &str| {
        let header = format!("Bearer {token}");
        scene.send(method, "/api/v1/volumes", &[("Authorization", &header)], body)
    };
    let body = r#"{"name":"x"}"#;
    let without = scene.get("/api/v1/volumes");
    assert_eq!(without.status, 401);
    assert_eq!(without.header("www-authenticate"), Some("Bearer"));
    assert_eq!(without.json()["type"], "/problems/unauthorized");
    assert_eq!(send("GET", "loo", "").status, 401);
    assert_eq!(send("GET", "look", "").status, 200);
    assert_eq!(send("POST", "look", body).json()["type"], "/problems/forbidden");
    assert_eq!(send("POST", "touch", body).status, 201);
    for open in ["/livez", "/readyz", "/health", "/metrics", "/openapi.json", "/docs/"] {
        assert_eq!(scene.get(open).status, 200, "{open}");
    }
    assert_eq!(scene.get("/nowhere").status, 401, "what is not known to be open is guarded");
    let named = "GET /api/v1/volumes HTTP/1.0\r\nHost: any.example\r\n\
                 Authorization: Bearer look\r\n\r\n";
    assert_eq!(status(&scene, named), "200", "with tokens, names do not matter");
    // A change of the file counts without a restart.
    fs::write(&file, "admin:ops:touched\n").unwrap();
    wait_for("the new token", || send("GET", "touched", "").status == 200);
    assert_eq!(send("GET", "look", "").status, 401);
}

#[test]
fn pages_of_other_sites_change_nothing() {
    let scene = Scene::new(1, &[]);
    let foreign = [("Origin", "http://evil.example")];
    let answer = scene.send("POST", "/api/v1/nodes/a/cordon", &foreign, "");
    assert_eq!((answer.status, &answer.json()["type"]), (403, &"/problems/forbidden".into()));
    let own = "POST /api/v1/nodes/a/cordon HTTP/1.0\r\nHost: localhost:1\r\n\
               Origin: http://localhost:1\r\n\r\n";
    assert_eq!(status(&scene, own), "200");
}

/// The status of the answer to a request.
fn status(scene: &Scene, request: &str) -> String {
    let mut answer = String::new();
    scene.raw(request).read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().to_owned()
}

#[test]
fn without_tokens_names_of_others_are_not_answered() {
    let scene = Scene::new(1, &["--allowed-host=control.lan"]);
    let get =
        |path: &str, host: &str| status(&scene, &format!("GET {path} HTTP/1.0\r\n{host}\r\n"));
    for own in ["", "Host: 10.0.0.9:80\r\n", "Host: LocalHost\r\n", "Host: control.lan:80\r\n"] {
        assert_eq!(get("/api/v1/volumes", own), "200", "{own}");
    }
    let evil = "Host: evil.example:8090\r\n";
    for path in ["/api/v1/volumes", "/api/v1/cluster", "/openapi.json", "/docs/", "/nowhere"] {
        assert_eq!(get(path, evil), "403", "{path}");
    }
    assert_eq!(get("http://evil.example/api/v1/volumes", "Host: localhost\r\n"), "403");
    assert_eq!(get("/api/v1/volumes", &format!("Host: localhost\r\n{evil}")), "403");
    for path in ["/livez", "/readyz", "/health", "/metrics"] {
        assert_eq!(get(path, evil), "200", "{path}");
    }
}

#[test]
fn a_change_goes_on_although_its_client_has_left() {
    let scene = Scene::new(1, &["--deadline=10s"]);
    scene.shard_mode(0, Mode::NoLeader);
    let body = r#"{"name":"x"}"#;
    let client = scene.raw(&format!(
        "POST /api/v1/volumes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    ));
    wait_for("the first calls", || scene.calls() > 3);
    drop(client);
    // Time for the server to notice.
    std::thread::sleep(Duration::from_millis(300));
    scene.shard_mode(0, Mode::Serve);
    wait_for("the volume", || scene.world.lock().shards[&0].volumes.contains_key("x"));
}
