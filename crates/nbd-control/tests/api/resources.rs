//! Every resource of a cluster that is whole.

use serde_json::json;

use crate::{cluster, create, get, name_on, wait_for};

#[test]
fn volumes_live_and_clients_are_seen() {
    let cluster = cluster();
    let control = crate::control(&cluster);
    let first = name_on(&control, 0, "a");
    let second = name_on(&control, 1, "b");
    assert_eq!(get(&control, &format!("volumes/{first}"))["size"], 8_388_608);

    // Clients attach through a replica of the volume's shard.
    let mut client = cluster.at(0).connect(&first).unwrap();
    client.write(0, &[7; 4096]).unwrap();
    let sessions = wait_for(&control, &format!("sessions?volume={first}"), |page| {
        page["items"][0]["attachment"]["counts"]["writes"] == 1
    });
    let session = &sessions["items"][0];
    assert_eq!(session["attachment"]["counts"]["write_bytes"], 4096, "{session}");
    assert!(session["attachment"]["client"].as_str().unwrap().starts_with("127.0.0.1:"));
    let activity = get(&control, "shards/0/activity");
    assert_eq!(activity["total"]["writes"], 1, "{activity}");
    assert_eq!(get(&control, "activity")["items"].as_array().map(Vec::len), Some(2));

    let attached = control.send("DELETE", &format!("/api/v1/volumes/{first}"), &[], "");
    assert_eq!(attached.json()["type"], "/problems/volume-attached", "{attached:?}");
    let id = session["id"].as_str().unwrap();
    assert_eq!(control.send("DELETE", &format!("/api/v1/sessions/{id}"), &[], "").status, 204);
    wait_for(&control, "sessions?shard=0", |page| page["items"] == json!([]));
    let resize = format!("/api/v1/volumes/{second}/resize");
    let grown = control.send("POST", &resize, &[], r#"{"size":16777216}"#);
    assert_eq!(grown.json()["size"], 16_777_216, "{grown:?}");
    let shrunk = control.send("POST", &resize, &[], r#"{"size":4096}"#);
    assert_eq!(shrunk.json()["type"], "/problems/volume-shrinks", "{shrunk:?}");
    let patch = r#"{"description":"d","labels":{"x":"y"}}"#;
    let patched = control.send("PATCH", &format!("/api/v1/volumes/{second}"), &[], patch).json();
    assert_eq!((&patched["description"], &patched["labels"]["x"]), (&json!("d"), &json!("y")));

    // Created again with the same key, and with another body.
    let key = [("Idempotency-Key", "k")];
    let send = |body: &str| control.send("POST", "/api/v1/volumes", &key, body);
    let once = send(r#"{"name":"k","size":4096}"#);
    let twice = send(r#"{"name":"k","size":4096}"#);
    assert_eq!((once.status, twice.status), (201, 200));
    assert_eq!(once.json(), twice.json());
    let other = send(r#"{"name":"k","size":8192}"#);
    assert_eq!(other.json()["type"], "/problems/key-reused", "{other:?}");

    // Pages across both shards, sorted, and only some.
    let mut names = Vec::new();
    for number in 0..12 {
        names.push(format!("p{number:02}"));
        create(&control, &names[number]);
    }
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = get(&control, &format!("volumes?prefix=p&limit=5&sort=-name{cursor}"));
        found.extend(page["items"].as_array().unwrap().iter().map(|v| v["name"].clone()));
        let Some(next) = page["next"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    names.reverse();
    assert_eq!(found, names);
    assert_eq!(get(&control, "volumes?label=x%3Dy")["items"].as_array().map(Vec::len), Some(1));
    let gone = control.send("DELETE", &format!("/api/v1/volumes/{first}?force=true"), &[], "");
    assert_eq!(gone.status, 204, "{gone:?}");
    assert_eq!(control.get(&format!("/api/v1/volumes/{first}")).status, 404);
}

#[test]
fn leadership_moves_and_nodes_are_drained() {
    let cluster = cluster();
    let control = crate::control(&cluster);
    let summary = wait_for(&control, "cluster", |summary| summary["health"] == "ok");
    assert_eq!((&summary["shards"], &summary["nodes_up"]), (&json!(2), &json!(6)));
    assert_eq!(control.get("/health").status, 200);
    let shard = get(&control, "shards/0");
    let leader = shard["leader"].as_str().unwrap().to_owned();
    let members = shard["members"].as_array().unwrap();
    let other = members.iter().find(|member| member["node"] != leader.as_str()).unwrap();
    let body = json!({"node": other["node"]}).to_string();
    let moved = control.send("POST", "/api/v1/shards/0/transfer", &[], &body);
    assert_eq!(moved.json()["leader"], other["node"], "{moved:?}");

    let node = other["node"].as_str().unwrap();
    let drain = control.send("POST", &format!("/api/v1/nodes/{node}/drain"), &[], "");
    assert_eq!(drain.status, 202, "{drain:?}");
    let location = drain.header("location").unwrap().to_owned();
    let events = control.get(&format!("{location}/events"));
    assert!(events.body.trim_end().ends_with('}'), "{events:?}");
    assert!(events.body.contains(r#""state":"done""#), "{events:?}");
    assert_eq!(get(&control, &format!("nodes/{node}"))["cordoned"], true);
    assert_ne!(get(&control, "shards/0")["leader"], node);
    let back = control.send("POST", &format!("/api/v1/nodes/{node}/uncordon"), &[], "");
    assert_eq!(back.json()["cordoned"], false, "{back:?}");
    let nodes = get(&control, "nodes");
    assert_eq!(nodes["items"].as_array().map(Vec::len), Some(6));
    assert_eq!(nodes["items"][0]["shards"].as_array().map(Vec::len), Some(1), "{nodes}");
}
