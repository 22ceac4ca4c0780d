//! The OpenAPI document: what the code says of itself, and what all operations have in common.

use serde_json::{Map, Value, json};
use utoipa::OpenApi as _;

use super::examples::{Example, examples};
use super::problem;
use crate::limits::RETRY_AFTER_S;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Cinderblock control API",
        description = "Volumes, sessions, shards and nodes of a Cinderblock cluster.\n\nErrors are \
                       problem details (RFC 9457). Lists come in pages: give `next` as `cursor` to \
                       go on. A shard that does not answer is named in `missing_shards`, and its \
                       share is left out; a request about that shard alone is answered 503 with \
                       `Retry-After`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(nbd_api::Problem)),
    tags(
        (name = "cluster", description = "The cluster as a whole."),
        (name = "volumes", description = "Named block devices."),
        (name = "sessions", description = "The clients of volumes."),
        (name = "shards", description = "Parts of the cluster, and their replicas."),
        (name = "nodes", description = "The processes that hold replicas."),
        (name = "operations", description = "What takes long."),
    ),
)]
struct Base;

/// What there is besides the operations.
pub(super) fn base() -> utoipa::openapi::OpenApi {
    Base::openapi()
}

/// The document with errors, examples and the security scheme put in.
pub(super) fn finish(document: &utoipa::openapi::OpenApi) -> Value {
    // The document is made of text and numbers, and has a JSON form.
    let mut document = serde_json::to_value(document).unwrap_or_default();
    document["components"]["responses"] = responses();
    document["components"]["securitySchemes"] = json!({"token": {
        "type": "http", "scheme": "bearer",
        "description": "A token of the file given with --token-file. Readers may GET, admins do \
                        everything. Without such a file, none is needed.",
    }});
    document["security"] = json!([{"token": []}, {}]);
    say_what_labels_are(&mut document);
    let examples = examples();
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (_, methods) in paths {
        for (method, operation) in methods.as_object_mut().into_iter().flatten() {
            declare_problems(method, operation);
            let id = operation["operationId"].as_str().unwrap_or_default();
            if let Some(example) = examples.iter().find(|example| example.operation == id) {
                show(operation, example);
            }
        }
    }
    document
}

/// What JSON Schema can say of labels and utoipa's attributes cannot.
fn say_what_labels_are(document: &mut Value) {
    for schema in ["CreateVolume", "UpdateVolume"] {
        let labels = &mut document["components"]["schemas"][schema]["properties"]["labels"];
        labels["propertyNames"] = json!({"pattern": "^[A-Za-z0-9._/-]{1,63}$"});
        labels["maxProperties"] = json!(nbd_store::limits::LABELS_MAX);
        labels["additionalProperties"]["maxLength"] =
            json!(nbd_store::limits::LABEL_VALUE_BYTES_MAX);
    }
}

/// Name of a type of problem among the examples: that of `/problems/key-reused` is `key-reused`.
fn name_of(kind: nbd_api::ProblemType) -> String {
    let kind = serde_json::to_value(kind).unwrap_or_default();
    kind.as_str().unwrap_or_default().trim_start_matches("/problems/").to_owned()
}

/// One response for each status of problems, with an example for each type.
fn responses() -> Value {
    let mut responses = Map::new();
    for kind in problem::ALL {
        let (status, title) = problem::words(kind);
        let response =
            responses.entry(format!("problem{}", status.as_u16())).or_insert_with(|| {
                let schema = json!({"$ref": "#/components/schemas/Problem"});
                let content = json!({nbd_api::problem::MEDIA_TYPE: {"schema": schema}});
                json!({"description": title, "content": content})
            });
        let example = json!({
            "type": kind, "title": title, "status": status.as_u16(), "detail": "...",
        });
        let content = &mut response["content"][nbd_api::problem::MEDIA_TYPE];
        content["examples"][name_of(kind)] = json!({"value": example});
        if status.as_u16() == 503 {
            let schema = json!({"type": "integer", "example": RETRY_AFTER_S});
            let text = "Seconds after which to ask again.";
            response["headers"]["Retry-After"] = json!({"description": text, "schema": schema});
        }
    }
    Value::Object(responses)
}

/// Says what can go wrong with an operation.
fn declare_problems(method: &str, operation: &mut Value) {
    let has_path = operation["parameters"].as_array().into_iter().flatten();
    let has_path = has_path.clone().any(|parameter| parameter["in"] == "path");
    // A list of one volume's sessions needs the volume.
    let finds = has_path || operation["operationId"] == "listSessions";
    let changes = method != "get";
    let body = operation.get("requestBody").is_some();
    let statuses = [
        (400, true),
        (401, true),
        (403, true),
        (404, finds),
        (409, changes),
        (413, body),
        (415, body),
        (422, changes),
        (500, true),
        (503, true),
    ];
    for (status, _) in statuses.into_iter().filter(|(_, applies)| *applies) {
        let reference = json!({"$ref": format!("#/components/responses/problem{status}")});
        operation["responses"][status.to_string()] = reference;
    }
}

/// Puts an example into an operation: its parameters, what is sent, what is answered.
fn show(operation: &mut Value, example: &Example) {
    // Looked up, not indexed: that would put what is not there in, as null.
    let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in parameters.into_iter().flatten() {
        let name = parameter["name"].as_str().unwrap_or_default();
        if let Some((_, value)) = example.parameters.iter().find(|(other, _)| *other == name) {
            parameter["example"] = value.clone();
        }
    }
    if let (Some(request), Some(body)) = (&example.request, operation.get_mut("requestBody")) {
        put(body, request);
    }
    if let Some(response) = &example.response {
        for (status, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
            if status.starts_with('2') {
                put(answer, response);
            }
        }
    }
}

/// Puts an example into each of the forms that something has, if any.
fn put(said: &mut Value, example: &Value) {
    let content = said.get_mut("content").and_then(Value::as_object_mut);
    for (_, media) in content.into_iter().flatten() {
        media["example"] = example.clone();
    }
}
