//! The examples of the OpenAPI document, made of the types themselves: they cannot differ from what
//! is sent.

use nbd_api::operation::ProgressUnit;
use nbd_api::*;
use serde::Serialize;
use serde_json::{Value, json};

/// The example of an operation.
pub(super) struct Example {
    pub(super) operation: &'static str,
    pub(super) parameters: Vec<(&'static str, Value)>,
    pub(super) request: Option<Value>,
    pub(super) response: Option<Value>,
}

fn example(operation: &'static str) -> Example {
    Example { operation, parameters: Vec::new(), request: None, response: None }
}

impl Example {
    fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.parameters.push((name, value.into()));
        self
    }

    fn sends<T: Serialize>(mut self, request: &T) -> Self {
        self.request = serde_json::to_value(request).ok();
        self
    }

    fn gets<T: Serialize>(mut self, response: &T) -> Self {
        self.response = serde_json::to_value(response).ok();
        self
    }
}

/// 2026-01-31T12:00:00.123Z.
fn moment() -> Option<Timestamp> {
    time::from_millis(1_769_860_800_123)
}

fn page<T>(item: T) -> Page<T> {
    Page { items: vec![item], next: None, missing_shards: Vec::new() }
}

fn labels() -> Labels {
    [("tier".to_owned(), "gold".to_owned())].into()
}

fn volume() -> Volume {
    Volume {
        name: "vol1".to_owned(),
        id: "0000000000000001".to_owned(),
        shard: 0,
        size: 1 << 30,
        description: "Scratch space".to_owned(),
        labels: labels(),
        created: moment(),
        modified: moment(),
    }
}

const fn counts() -> IoCounts {
    IoCounts {
        reads: 1200,
        read_bytes: 4_915_200,
        writes: 300,
        write_bytes: 1_228_800,
        read_us: 96_000,
        write_us: 210_000,
    }
}

fn session() -> Session {
    let moment = moment().unwrap_or_default();
    Session {
        id: "00000000000000000000000000000abc".to_owned(),
        volume: "vol1".to_owned(),
        shard: 0,
        epoch: 1,
        attachment: Some(Attachment {
            client: "10.0.0.9:50312".to_owned(),
            via: "lb-1".to_owned(),
            leader: "nbd-1-1".to_owned(),
            since: moment,
            attached: moment,
            counts: counts(),
            pending: 2,
        }),
    }
}

fn shard() -> Shard {
    let member = |replica: u64, role| Member {
        replica,
        node: format!("nbd-1-{replica}"),
        role,
        alive: true,
        lag: 0,
        writable: Some(64 << 30),
        resync: None,
    };
    Shard {
        shard: 0,
        health: HealthStatus::Ok,
        reason: None,
        leader: Some("nbd-1-1".to_owned()),
        term: 3,
        committed: 41_003,
        volumes: 1,
        provisioned: 1 << 30,
        allocated: 64 << 20,
        sessions: 1,
        writable: Some(64 << 30),
        members: vec![
            member(1, MemberRole::Leader),
            member(2, MemberRole::Voter),
            member(3, MemberRole::Voter),
        ],
    }
}

fn node() -> Node {
    Node {
        node: "nbd-1-1".to_owned(),
        state: NodeState::Up,
        reason: None,
        cordoned: false,
        version: Some("0.1.0".to_owned()),
        started: moment(),
        disk: Some(256 << 30),
        disk_free: Some(64 << 30),
        writable: Some(64 << 30),
        grpc: "10.0.0.1:7400".to_owned(),
        shards: vec![NodeShard { shard: 0, replica: 1, role: MemberRole::Leader }],
    }
}

fn activity() -> Activity {
    let name = "vol1".to_owned();
    Activity {
        shard: 0,
        origin: "00000192f3a1b2c3".to_owned(),
        lag: 2,
        total: counts(),
        volumes: vec![VolumeActivity { name, counts: counts(), sessions: 1 }],
    }
}

fn adding() -> Operation {
    Operation {
        id: "add-0-4".to_owned(),
        kind: OperationKind::Add,
        state: OperationState::Running,
        message: "replica 4 is catching up".to_owned(),
        shard: Some(0),
        node: Some("nbd-1-4".to_owned()),
        progress: Some(Progress {
            done: 16 << 20,
            total: 64 << 20,
            unit: ProgressUnit::Bytes,
            seconds_left: Some(3),
        }),
        cancellable: true,
    }
}

/// What a stream says of it.
fn event() -> OperationEvent {
    let data = serde_json::to_string(&adding()).unwrap_or_default();
    OperationEvent { event: OperationEventKind::Operation, data }
}

fn draining() -> Operation {
    let progress = Progress { done: 0, total: 1, unit: ProgressUnit::Shards, seconds_left: None };
    Operation {
        id: "drain-nbd-1-1".to_owned(),
        kind: OperationKind::Drain,
        message: "shard 0 waits for another replica that can lead it".to_owned(),
        shard: None,
        node: Some("nbd-1-1".to_owned()),
        progress: Some(progress),
        ..adding()
    }
}

fn cancelled() -> Operation {
    Operation {
        state: OperationState::Ended,
        message: "replica 4 is no member of shard 0".to_owned(),
        node: None,
        progress: None,
        cancellable: false,
        ..adding()
    }
}

/// One for each operation.
pub(super) fn examples() -> Vec<Example> {
    let details = VolumeDetails {
        volume: volume(),
        allocated: 64 << 20,
        sessions: 1,
        leader: shard().leader,
    };
    let create = CreateVolume {
        name: "vol1".to_owned(),
        size: Some(1 << 30),
        description: "Scratch space".to_owned(),
        labels: labels(),
    };
    let update = json!({"description": "Ours", "labels": {"tier": "silver", "old": null}});
    let resize = ResizeVolume { size: 2 << 30, force: false };
    let search = Some("http://localhost:16686/search?service=nbd-replica".to_owned());
    let traced = Traced { requests: 10, sessions: 1, search };
    let larger = Volume { size: 2 << 30, ..volume() };
    let new_node = "nbd-1-4".to_owned();
    let grpc = Some("10.0.0.4:7400".to_owned());
    let add = AddMember { node: new_node.clone(), grpc: grpc.clone() };
    let replace = ReplaceMember { node: new_node, grpc };
    let replacing = Operation {
        id: "replace-0-2-4".to_owned(),
        kind: OperationKind::Replace,
        message: "replica 4 is catching up, to take the place of 2".to_owned(),
        ..adding()
    };
    let summary = Cluster {
        name: "demo".to_owned(),
        version: "0.1.0".to_owned(),
        health: HealthStatus::Ok,
        shards: 1,
        nodes: 3,
        nodes_up: 3,
        volumes: 1,
        provisioned: 1 << 30,
        allocated: 64 << 20,
        sessions: 1,
    };
    let well = ShardHealth { shard: 0, status: HealthStatus::Ok, reason: None };
    let health = ClusterHealth { status: HealthStatus::Ok, shards: vec![well] };
    let transfer = TransferLeadership { node: Some("nbd-1-2".to_owned()) };
    let volumes = |operation| example(operation).with("name", "vol1");
    let shards = |operation| example(operation).with("shard", 0);
    let nodes = |operation| example(operation).with("node", "nbd-1-1");
    let operations = |operation| example(operation).with("id", "add-0-4");
    vec![
        example("getCluster").gets(&summary),
        example("getClusterHealth").gets(&health),
        example("listVolumes").with("sort", "-size").with("limit", 100).gets(&page(volume())),
        example("createVolume").with("Idempotency-Key", "7f2c1f0e").sends(&create).gets(&volume()),
        volumes("getVolume").gets(&details),
        volumes("updateVolume").sends(&update).gets(&volume()),
        volumes("resizeVolume").sends(&resize).gets(&larger),
        volumes("traceVolume").sends(&TraceVolume { requests: 10 }).gets(&traced),
        volumes("deleteVolume").with("force", false),
        example("listSessions").with("volume", "vol1").gets(&page(session())),
        example("endSession").with("id", session().id).with("shard", 0),
        example("listShards").gets(&page(shard())),
        shards("getShard").gets(&shard()),
        shards("transferLeadership").sends(&transfer).gets(&shard()),
        shards("addMember").sends(&add).gets(&adding()),
        shards("removeMember").with("replica", 3),
        shards("replaceMember").with("replica", 2).sends(&replace).gets(&replacing),
        shards("getActivity").gets(&activity()),
        example("listActivity").gets(&page(activity())),
        example("listNodes").gets(&page(node())),
        nodes("getNode").gets(&node()),
        nodes("cordonNode").gets(&Node { cordoned: true, ..node() }),
        nodes("uncordonNode").gets(&node()),
        nodes("drainNode").gets(&draining()),
        example("listOperations").gets(&page(adding())),
        operations("getOperation").gets(&adding()),
        operations("cancelOperation").gets(&cancelled()),
        operations("watchOperation").gets(&event()),
    ]
}
