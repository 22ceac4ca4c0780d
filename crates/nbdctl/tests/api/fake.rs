//! A control API in memory: a few volumes and shards, the rules that `nbdctl` meets, and whatever
//! answer a test puts into it.

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// Volumes on a page, so that lists have several.
const PAGE: usize = 2;

/// A running one. It ends with the test's process.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    world: Arc<Mutex<World>>,
}

/// A request, as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) line: String,
    pub(crate) body: Value,
    pub(crate) token: Option<String>,
    pub(crate) key: Option<String>,
}

/// Status, headers and body.
type Scripted = (u16, Vec<(&'static str, String)>, String);

#[derive(Default)]
struct World {
    volumes: BTreeMap<String, Value>,
    keys: HashMap<String, String>,
    seen: Vec<Seen>,
    /// Answers that a test has put in: status, headers, body.
    scripted: HashMap<String, Scripted>,
    missing: Vec<u32>,
    looks: u64,
}

/// So many seconds ago.
fn ago(seconds: i64) -> String {
    let now = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(now - seconds).unwrap().to_string()
}

const HOUR: i64 = 3600;

impl Fake {
    pub(crate) fn start() -> Self {
        let mut world = World::default();
        for (number, (name, size, hours)) in
            [("db/main", 1_u64 << 40, 30 * 24 + 1), ("größe", 3 << 29, 5), ("vol1", 1 << 30, 3)]
                .into_iter()
                .enumerate()
        {
            let labels = if number == 0 { json!({"team": "a", "tier": "gold"}) } else { json!({}) };
            let description = if number == 0 { "the shop\nits orders" } else { "" };
            world.volumes.insert(
                name.to_owned(),
                json!({"name": name, "id": format!("{:016x}", number + 1), "shard": number % 2,
                    "size": size, "description": description, "labels": labels,
                    "created": ago(hours * HOUR + 60), "modified": ago(hours * HOUR),
                    "future": true}),
            );
        }
        let world = Arc::new(Mutex::new(world));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&world));
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        Self { address, world }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers `line` (`GET /volumes`, without parameters) so from now on.
    pub(crate) fn script(
        &self,
        line: &str,
        status: u16,
        headers: &[(&'static str, &str)],
        body: &str,
    ) {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let answer = (status, headers, body.to_owned());
        self.world.lock().unwrap().scripted.insert(line.to_owned(), answer);
    }

    /// Lists leave these shards out.
    pub(crate) fn lose(&self, shards: &[u32]) {
        self.world.lock().unwrap().missing = shards.to_vec();
    }

    pub(crate) fn add_volume(&self, name: &str, labels: Value) {
        let volume = json!({"name": name, "id": "9", "shard": 0, "size": 4096, "description": "",
            "labels": labels, "created": null, "modified": null});
        self.world.lock().unwrap().volumes.insert(name.to_owned(), volume);
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.world.lock().unwrap().volumes.contains_key(name)
    }

    /// The requests so far, and forgets them.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.world.lock().unwrap().seen)
    }
}

async fn answer(
    State(world): State<Arc<Mutex<World>>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().strip_prefix(nbd_api::PREFIX).unwrap_or_else(|| uri.path()).to_owned();
    let line = format!("{method} {path}");
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let seen = Seen {
        line: format!("{line}{query}"),
        body: body.clone(),
        token: header("authorization"),
        key: header("idempotency-key"),
    };
    let delay = {
        let mut world = world.lock().unwrap();
        world.seen.push(seen.clone());
        if let Some((status, headers, body)) = world.scripted.get(&line) {
            let mut response = Response::new(body.clone().into());
            *response.status_mut() = StatusCode::from_u16(*status).unwrap();
            for (name, value) in headers {
                response.headers_mut().insert(*name, value.parse().unwrap());
            }
            return response;
        }
        path.ends_with("/events")
    };
    if delay {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.lock().unwrap().answer(&line, uri.query().unwrap_or_default(), &body, seen.key)
}

fn ok(body: Value) -> Response {
    (StatusCode::OK, axum::Json(body)).into_response()
}

fn created(status: StatusCode, body: Value) -> Response {
    (status, axum::Json(body)).into_response()
}

pub(crate) fn problem(kind: &str, status: u16, detail: &str) -> String {
    json!({"type": format!("/problems/{kind}"), "title": "In general", "status": status,
        "detail": detail})
    .to_string()
}

fn refuse(kind: &str, status: u16, detail: &str) -> Response {
    let status_code = StatusCode::from_u16(status).unwrap();
    let media = [(header::CONTENT_TYPE, nbd_api::problem::MEDIA_TYPE)];
    (status_code, media, problem(kind, status, detail)).into_response()
}

impl World {
    fn answer(&mut self, line: &str, query: &str, body: &Value, key: Option<String>) -> Response {
        let parts: Vec<String> = line.split(['/', ' ']).map(decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let page = |items: Value| ok(json!({"items": items, "next": null}));
        match parts.as_slice() {
            ["GET", "", "volumes"] => self.volumes(query),
            ["POST", "", "volumes"] => self.create(body, key),
            ["GET", "", "volumes", name] => match self.volumes.get(*name) {
                None => no_volume(name),
                Some(volume) => {
                    let mut details = volume.clone();
                    details["allocated"] = json!(26 << 16);
                    details["sessions"] = json!(1);
                    details["leader"] = json!("nbd-1-1");
                    ok(details)
                }
            },
            ["PATCH", "", "volumes", name] => match self.volumes.get_mut(*name) {
                None => no_volume(name),
                Some(volume) => {
                    for (key, value) in body["labels"].as_object().unwrap() {
                        let labels = volume["labels"].as_object_mut().unwrap();
                        match value {
                            Value::Null => drop(labels.remove(key)),
                            value => drop(labels.insert(key.clone(), value.clone())),
                        }
                    }
                    ok(volume.clone())
                }
            },
            ["POST", "", "volumes", name, "resize"] => match self.volumes.get_mut(*name) {
                None => no_volume(name),
                Some(volume) => {
                    let size = body["size"].as_u64().unwrap();
                    if size < volume["size"].as_u64().unwrap() && body["force"] != true {
                        return refuse("volume-shrinks", 409, "it would become smaller");
                    }
                    volume["size"] = json!(size);
                    ok(volume.clone())
                }
            },
            ["POST", "", "volumes", name, "trace"] => match self.volumes.get(*name) {
                None => no_volume(name),
                Some(_) => {
                    let sessions = u32::from(*name == "db/main");
                    let search = "http://jaeger/search?service=nbd-replica";
                    let requests = &body["requests"];
                    ok(json!({"requests": requests, "sessions": sessions, "search": search}))
                }
            },
            ["DELETE", "", "volumes", name] => {
                if *name == "db/main" && query != "force=true" {
                    return refuse("volume-attached", 409, "1 client is attached to db/main");
                }
                match self.volumes.remove(*name) {
                    None => no_volume(name),
                    Some(_) => StatusCode::NO_CONTENT.into_response(),
                }
            }
            ["GET", "", "sessions"] => page(json!([
                {"id": "00000000000000000000000000000abc", "volume": "db/main", "shard": 0,
                 "epoch": 2, "attachment": {"client": "10.0.0.9:50312", "via": "nbd-lb",
                 "leader": "nbd-1-1", "since": ago(5 * 60 + 5), "attached": ago(100), "counts":
                 counts(5), "pending": 3}},
                {"id": "00000000000000000000000000000def", "volume": "vol 1", "shard": 1,
                 "epoch": 1, "attachment": null},
            ])),
            ["DELETE", "", "sessions", "00000000000000000000000000000abc"] => {
                StatusCode::NO_CONTENT.into_response()
            }
            ["GET", "", "shards"] => page(json!([shard(0, true), shard(1, false)])),
            ["GET", "", "shards", "0"] => ok(shard(0, true)),
            ["GET", "", "shards", "1"] => ok(shard(1, false)),
            ["POST", "", "shards", "0", "transfer"] => {
                let mut shard = shard(0, true);
                if let Some(node) = body["node"].as_str() {
                    shard["leader"] = json!(node);
                }
                ok(shard)
            }
            ["POST", "", "shards", "0", "members"] => {
                created(StatusCode::ACCEPTED, operation("add-0-4", "running", 0))
            }
            ["DELETE", "", "shards", "0", "members", "3"] => StatusCode::NO_CONTENT.into_response(),
            ["POST", "", "shards", "0", "members", "2", "replace"] => {
                created(StatusCode::ACCEPTED, operation("replace-0-2-4", "running", 0))
            }
            ["GET", "", "nodes"] => page(json!([node("nbd-1-1", true), node("nbd-1-2", false)])),
            ["GET", "", "nodes", name @ ("nbd-1-1" | "nbd-1-2")] => {
                ok(node(name, *name == "nbd-1-1"))
            }
            ["POST", "", "nodes", name, action @ ("cordon" | "uncordon")] => {
                let mut node = node(name, true);
                node["cordoned"] = json!(*action == "cordon");
                ok(node)
            }
            ["POST", "", "nodes", name, "drain"] => {
                created(StatusCode::ACCEPTED, operation(&format!("drain-{name}"), "running", 0))
            }
            ["GET", "", "operations"] => page(json!([operation("resync-0-3", "running", 30)])),
            ["GET", "", "operations", id] if known(id) => ok(operation(id, "running", 30)),
            ["GET", "", "operations", id, "events"] if known(id) => {
                let end = if id.starts_with("resync") { "ended" } else { "done" };
                let states = [("running", 0), ("running", 45), (end, 100)];
                let events = states.map(|(state, percent)| {
                    format!("event: operation\ndata: {}\n\n", operation(id, state, percent))
                });
                let kind = [(header::CONTENT_TYPE, "text/event-stream")];
                (kind, format!(": hello\n\n{}", events.concat())).into_response()
            }
            ["DELETE", "", "operations", id @ "drain-nbd-1-1"] => ok(operation(id, "ended", 0)),
            ["DELETE", "", "operations", _] => {
                refuse("conflict", 409, "it cannot be cancelled any more")
            }
            ["GET", "", "cluster"] => ok(json!({"name": "demo", "version": "0.1.0",
                "health": "degraded", "shards": 2, "nodes": 6, "nodes_up": 5, "volumes": 3,
                "provisioned": 1_u64 << 41, "allocated": 26 << 16, "sessions": 1})),
            ["GET", "", "cluster", "health"] => ok(json!({"status": "degraded", "shards": [
                {"shard": 0, "status": "ok", "reason": null},
                {"shard": 1, "status": "degraded", "reason": "nbd-2-3 does not answer"}]})),
            ["GET", "", "activity"] => {
                self.looks += 1;
                page(json!([{"shard": 0, "origin": "x", "lag": 2, "total": counts(self.looks),
                    "volumes": [
                        {"name": "quiet", "counts": counts(0), "sessions": 0},
                        {"name": "vol1", "counts": counts(self.looks), "sessions": 1}]}]))
            }
            _ => refuse("not-found", 404, &format!("there is no {line}")),
        }
    }

    fn volumes(&self, query: &str) -> Response {
        let parameters: Vec<(String, String)> = query
            .split('&')
            .filter_map(|part| part.split_once('='))
            .map(|(name, value)| (name.to_owned(), decode(value)))
            .collect();
        let parameter = |wanted: &str| {
            parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
        };
        let prefix = parameter("prefix").unwrap_or_default();
        let labels = parameters.iter().filter(|(name, _)| name == "label");
        let labels: Vec<(&str, &str)> =
            labels.filter_map(|(_, label)| label.split_once('=')).collect();
        let fits = |volume: &&Value| {
            volume["name"].as_str().unwrap().starts_with(prefix)
                && labels.iter().all(|(key, value)| volume["labels"][*key] == *value)
        };
        let skip: usize = parameter("cursor").map_or(0, |cursor| cursor.parse().unwrap());
        let limit: usize = parameter("limit").unwrap().parse().unwrap();
        let count = limit.min(PAGE);
        let fitting: Vec<&Value> = self.volumes.values().filter(fits).collect();
        let items: Vec<&Value> = fitting.iter().skip(skip).take(count).copied().collect();
        let next = (skip + count < fitting.len()).then(|| (skip + count).to_string());
        ok(json!({"items": items, "next": next, "missing_shards": self.missing}))
    }

    fn create(&mut self, body: &Value, key: Option<String>) -> Response {
        let name = body["name"].as_str().unwrap().to_owned();
        if let Some(made) = key.as_ref().and_then(|key| self.keys.get(key)) {
            return match *made == name {
                true => ok(self.volumes[made].clone()),
                false => refuse("key-reused", 422, "the key was used for another volume"),
            };
        }
        if self.volumes.contains_key(&name) {
            return refuse("volume-exists", 409, &format!("there is a volume {name} already"));
        }
        if let Some(key) = key {
            self.keys.insert(key, name.clone());
        }
        let size = body["size"].as_u64().unwrap_or(1 << 30);
        let volume = json!({"name": name, "id": "a", "shard": 1, "size": size,
            "description": body["description"], "labels": body["labels"], "created": ago(0),
            "modified": ago(0)});
        self.volumes.insert(name, volume.clone());
        created(StatusCode::CREATED, volume)
    }
}

fn known(id: &str) -> bool {
    ["replace-0-2-4", "add-0-4", "resync-0-3", "drain-nbd-1-1"].contains(&id)
}

fn no_volume(name: &str) -> Response {
    refuse("not-found", 404, &format!("there is no volume {name}"))
}

fn counts(times: u64) -> Value {
    json!({"reads": times * 1000, "read_bytes": times * 4_096_000, "writes": times * 10,
        "write_bytes": times << 20, "read_us": times * 250_000, "write_us": times * 15_000})
}

fn shard(number: u32, well: bool) -> Value {
    let node = |replica: u32| format!("nbd-{}-{replica}", number + 1);
    let member = |replica: u32| {
        let away = !well && replica == 3;
        json!({"replica": replica, "node": node(replica),
            "role": if replica == 1 { "leader" } else if away { "learner" } else { "voter" },
            "alive": !away, "lag": if away { 77 } else { 0 },
            "writable": if away { Value::Null } else { json!(40_u64 << 30) },
            "resync": if away { json!({"bytes_done": 1 << 20, "bytes_total": 4 << 20,
                "seconds_left": 35}) } else { Value::Null }})
    };
    json!({"shard": number, "health": if well { "ok" } else { "degraded" },
        "reason": if well { Value::Null } else { json!("nbd-2-3 does not answer") },
        "leader": node(1), "term": 3, "committed": 90, "volumes": 2, "provisioned": 1_u64 << 40,
        "allocated": 26 << 16, "sessions": 1, "writable": 40_u64 << 30,
        "members": [member(1), member(2), member(3)]})
}

fn node(name: &str, up: bool) -> Value {
    let some = |value: Value| if up { value } else { Value::Null };
    json!({"node": name, "state": if up { "up" } else { "down" },
        "reason": if up { Value::Null } else { json!("connection refused") },
        "cordoned": !up, "version": some(json!("0.1.0")), "started": some(json!(ago(50 * HOUR))),
        "disk": some(json!(100_u64 << 30)), "disk_free": some(json!(50_u64 << 30)),
        "writable": some(json!(40_u64 << 30)), "grpc": "127.0.0.1:11112",
        "shards": [{"shard": 0, "replica": 1, "role": if up { "leader" } else { "voter" }}]})
}

fn operation(id: &str, state: &str, percent: u64) -> Value {
    let kind = id.split('-').next().unwrap();
    let message = match state {
        "running" => "fetching chunks",
        "done" => "all is there",
        _ => "it was cancelled",
    };
    let progress = json!({"done": percent << 20, "total": 100 << 20, "unit": "bytes",
        "seconds_left": 100 - percent});
    json!({"id": id, "kind": kind, "state": state, "message": message, "shard": 0,
        "node": "nbd-1-4", "progress": progress, "cancellable": state == "running"})
}

fn decode(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).unwrap()
}
