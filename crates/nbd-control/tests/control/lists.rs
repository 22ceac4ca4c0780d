//! Lists over several shards.

use serde_json::{Value, json};

use crate::fake::Scene;

/// All names of a list, page by page.
fn names(scene: &Scene, query: &str, limit: usize) -> Vec<String> {
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = scene.get(&format!("/api/v1/volumes?limit={limit}&{query}{cursor}"));
        assert_eq!(page.status, 200, "{page:?}");
        let page = page.json();
        let items = page["items"].as_array().unwrap();
        names.extend(items.iter().map(|volume| volume["name"].as_str().unwrap().to_owned()));
        let Some(next) = page["next"].as_str() else { return names };
        assert_eq!(items.len(), limit, "only the last page is short");
        cursor = format!("&cursor={next}");
    }
}

fn create(scene: &Scene, name: &str, size: u64, tier: &str) {
    let body = json!({"name": name, "size": size, "labels": {"tier": tier}});
    assert_eq!(scene.post("/api/v1/volumes", &body.to_string()).status, 201);
}

#[test]
fn pages_are_sorted_across_shards() {
    let scene = Scene::new(3, &[]);
    let mut expected = Vec::new();
    for number in 0..25_u64 {
        let (name, size) = (format!("v{number:02}"), 4096 * (1 + number % 5));
        create(&scene, &name, size, if number % 2 == 0 { "gold" } else { "tin" });
        expected.push((size, name));
    }
    let only = |volumes: &[(u64, String)]| -> Vec<String> {
        volumes.iter().map(|(_, name)| name.clone()).collect()
    };
    for limit in [1, 4, 25, 1000] {
        assert_eq!(names(&scene, "", limit), only(&expected), "{limit}");
    }
    let gold: Vec<_> = only(&expected).into_iter().step_by(2).collect();
    assert_eq!(names(&scene, "label=tier%3Dgold", 4), gold);
    assert_eq!(names(&scene, "prefix=v1&label=tier%3Dtin", 2), ["v11", "v13", "v15", "v17", "v19"]);
    let nobody = "label=tier%3Dtin&label=tier%3Dgold";
    assert_eq!(names(&scene, nobody, 4), [""; 0], "nobody has both");
    assert_eq!(names(&scene, "label=tier%3Dgold&label=tier%3Dgold", 4), gold);
    expected.sort();
    assert_eq!(names(&scene, "sort=size", 7), only(&expected));
    expected.reverse();
    assert_eq!(names(&scene, "sort=-size", 7), only(&expected));
}

#[test]
fn a_cursor_is_for_the_order_it_came_from() {
    let scene = Scene::new(1, &[]);
    create(&scene, "a", 4096, "x");
    create(&scene, "b", 4096, "x");
    let page = scene.get("/api/v1/volumes?limit=1&sort=size").json();
    let next = page["next"].as_str().unwrap();
    let other = scene.get(&format!("/api/v1/volumes?limit=1&sort=name&cursor={next}"));
    assert_eq!((other.status, &other.json()["type"]), (400, &json!("/problems/malformed")));
    let sessions = scene.get(&format!("/api/v1/sessions?cursor={next}"));
    assert_eq!(sessions.status, 400);
}

#[test]
fn sessions_are_listed_and_ended() {
    let scene = Scene::new(2, &[]);
    for number in 1..=5_u128 {
        let attachment = nbd_rpc::v1::SessionAttachment {
            client: "10.0.0.9:1".to_owned(),
            since_ms: 1_769_860_800_123,
            ..nbd_rpc::v1::SessionAttachment::default()
        };
        let session = nbd_rpc::v1::SessionView {
            id: number.to_be_bytes().to_vec().into(),
            volume: 1,
            name: "x".to_owned(),
            epoch: 1,
            attachment: (number == 1).then_some(attachment),
        };
        let shard = u32::try_from(number % 2).unwrap();
        scene.world.lock().shards.get_mut(&shard).unwrap().sessions.insert(number, session);
    }
    let page = scene.get("/api/v1/sessions?limit=2").json();
    let ids = |page: &Value| -> Vec<u8> {
        let items = page["items"].as_array().unwrap().iter();
        items.map(|item| item["id"].as_str().unwrap().as_bytes()[31] - b'0').collect()
    };
    assert_eq!(ids(&page), [1, 2]);
    assert_eq!(page["items"][0]["attachment"]["leader"], "a");
    assert_eq!(page["items"][0]["attachment"]["since"], "2026-01-31T12:00:00.123Z");
    assert_eq!(page["items"][1]["attachment"], Value::Null);
    let next = page["next"].as_str().unwrap();
    let rest = scene.get(&format!("/api/v1/sessions?cursor={next}")).json();
    assert_eq!(ids(&rest), [3, 4, 5]);
    assert_eq!(ids(&scene.get("/api/v1/sessions?shard=0").json()), [2, 4]);

    let id = |number: u128| format!("/api/v1/sessions/{number:032x}");
    assert_eq!(scene.send("DELETE", &id(3), &[], "").status, 204);
    assert_eq!(scene.send("DELETE", &id(3), &[], "").status, 404);
    assert_eq!(scene.send("DELETE", &format!("{}?shard=0", id(5)), &[], "").status, 404);
    assert_eq!(scene.send("DELETE", &format!("{}?shard=1", id(5)), &[], "").status, 204);
    assert_eq!(scene.send("DELETE", "/api/v1/sessions/xyz", &[], "").status, 404);
}
