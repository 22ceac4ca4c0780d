//! The OpenAPI document, held against the server.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::fake::Scene;

/// Every operation there is to be. One that is missing here is missing in what was agreed on.
const OPERATIONS: [&str; 28] = [
    "GET /api/v1/activity",
    "GET /api/v1/cluster",
    "GET /api/v1/cluster/health",
    "GET /api/v1/nodes",
    "GET /api/v1/nodes/{node}",
    "POST /api/v1/nodes/{node}/cordon",
    "POST /api/v1/nodes/{node}/drain",
    "POST /api/v1/nodes/{node}/uncordon",
    "GET /api/v1/operations",
    "DELETE /api/v1/operations/{id}",
    "GET /api/v1/operations/{id}",
    "GET /api/v1/operations/{id}/events",
    "GET /api/v1/sessions",
    "DELETE /api/v1/sessions/{id}",
    "GET /api/v1/shards",
    "GET /api/v1/shards/{shard}",
    "GET /api/v1/shards/{shard}/activity",
    "POST /api/v1/shards/{shard}/members",
    "DELETE /api/v1/shards/{shard}/members/{replica}",
    "POST /api/v1/shards/{shard}/members/{replica}/replace",
    "POST /api/v1/shards/{shard}/transfer",
    "GET /api/v1/volumes",
    "POST /api/v1/volumes",
    "DELETE /api/v1/volumes/{name}",
    "GET /api/v1/volumes/{name}",
    "PATCH /api/v1/volumes/{name}",
    "POST /api/v1/volumes/{name}/resize",
    "POST /api/v1/volumes/{name}/trace",
];

/// Each operation: path, method, and what the document says of it.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, methods): (&String, &Value)| {
        let methods = methods.as_object().unwrap().clone();
        let path = path.clone();
        methods.into_iter().map(move |(method, said)| (path.clone(), method.to_uppercase(), said))
    };
    paths.iter().flat_map(of_path).collect()
}

#[test]
fn the_document_has_every_route_and_the_server_every_operation() {
    let scene = Scene::new(1, &[]);
    let document = scene.get("/openapi.json").json();
    let mut said = BTreeSet::new();
    let mut methods = std::collections::BTreeMap::<String, BTreeSet<String>>::new();
    for (path, method, _) in operations(&document) {
        said.insert(format!("{method} {path}"));
        methods.entry(path).or_default().insert(method);
    }
    assert_eq!(said, OPERATIONS.map(str::to_owned).into());
    for (path, mut methods) in methods {
        let concrete = path.replace("{shard}", "0").replace("{replica}", "1");
        let concrete = concrete.replace("{name}", "x").replace("{node}", "a").replace("{id}", "x");
        let answer = scene.send("PUT", &concrete, &[], "");
        assert_eq!(answer.status, 405, "{path}: {answer:?}");
        if methods.contains("GET") {
            methods.insert("HEAD".to_owned());
        }
        let allowed = answer.header("allow").unwrap().split(',').map(|m| m.trim().to_owned());
        assert_eq!(allowed.collect::<BTreeSet<_>>(), methods, "{path}");
    }
}

#[test]
fn the_document_says_all_that_a_client_needs() {
    let scene = Scene::new(1, &[]);
    let document = scene.get("/openapi.json").json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."), "{}", document["openapi"]);
    assert_eq!(document["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    let mut ids = BTreeSet::new();
    for (path, method, said) in operations(&document) {
        let id = said["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path}: no id"));
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
        assert!(said["summary"].as_str().is_some_and(|text| !text.is_empty()), "{id}: no summary");
        assert_eq!(said["tags"].as_array().map(Vec::len), Some(1), "{id}");
        for parameter in said["parameters"].as_array().into_iter().flatten() {
            assert!(parameter["description"].is_string(), "{id}: {parameter}");
            if parameter["in"] == "path" {
                assert!(!parameter["example"].is_null(), "{id}: {parameter}");
            }
        }
        let bodies = said["requestBody"]["content"].as_object().into_iter().flatten();
        for (kind, body) in bodies {
            assert!(!body["example"].is_null(), "{id}: no example of a request as {kind}");
        }
        let responses = said["responses"].as_object().unwrap();
        for status in ["400", "401", "500", "503"] {
            assert!(responses.contains_key(status), "{id}: {status} is not declared");
        }
        for (status, response) in responses {
            if let Some(reference) = response["$ref"].as_str() {
                let pointer = reference.trim_start_matches('#');
                let problem = document.pointer(pointer).unwrap_or_else(|| panic!("{reference}"));
                let content = &problem["content"]["application/problem+json"];
                assert!(!content["examples"].is_null(), "{reference}: no example");
                continue;
            }
            for (kind, body) in response["content"].as_object().into_iter().flatten() {
                assert!(!body["example"].is_null(), "{id}: no example of {status} as {kind}");
            }
        }
    }
}

/// Where the document says null, outside of examples.
fn nulls(at: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Null => found.push(at.to_owned()),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| nulls(&format!("{at}/{i}"), item, found));
        }
        Value::Object(fields) => {
            let said =
                fields.iter().filter(|(name, _)| !matches!(&***name, "example" | "examples"));
            said.for_each(|(name, field)| nulls(&format!("{at}/{name}"), field, found));
        }
        _ => {}
    }
}

#[test]
fn the_document_says_nothing_of_what_is_not_there() {
    let scene = Scene::new(1, &[]);
    let mut found = Vec::new();
    nulls("", &scene.get("/openapi.json").json(), &mut found);
    assert!(found.is_empty(), "null is nothing that OpenAPI allows there: {found:?}");
}

#[test]
fn the_reference_needs_nothing_from_elsewhere() {
    let scene = Scene::new(1, &[]);
    let page = scene.get("/docs/");
    assert_eq!(page.status, 200, "{page:?}");
    assert!(!page.body.contains("https://") && !page.body.contains("http://"), "{}", page.body);
    for asset in ["swagger-ui-bundle.js", "swagger-ui.css"] {
        assert!(page.body.contains(asset), "{}", page.body);
        let head = scene.send("HEAD", &format!("/docs/{asset}"), &[], "");
        assert_eq!(head.status, 200, "{asset}");
    }
    let start = scene.get("/docs/swagger-initializer.js");
    assert!(start.body.contains("/openapi.json"), "{}", start.body);
}
