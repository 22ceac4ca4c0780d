//! `/health`: proves that each shard of this node can commit, by moving its replicated counter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use nbd_consensus::Role;
use nbd_store::{Outcome, command};
use nbd_topology::NodeName;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::failure::Failure;
use crate::group_task::GroupHandle;

/// Age up to which a result is given to further callers, so that probes are not load.
const SHARED_FOR: Duration = Duration::from_millis(100);

/// Answers `/health`.
pub(crate) fn router(health: Arc<Health>) -> Router {
    Router::new().route("/health", get(health_handler)).with_state(health)
}

/// The shards of a node and how their last probe went.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) node: NodeName,
    pub(crate) failure: Failure,
    pub(crate) deadline: Duration,
    pub(crate) shards: Vec<Arc<ShardProbe>>,
}

/// Probes one shard. Whoever comes while a probe runs waits for it and shares its result.
#[derive(Debug)]
pub(crate) struct ShardProbe {
    group: GroupHandle,
    last: Mutex<Option<(Instant, ShardHealth)>>,
}

#[derive(Debug, Serialize)]
struct Report {
    status: &'static str,
    node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    shards: Vec<ShardHealth>,
}

/// One shard's part of the answer.
#[derive(Debug, Clone, Serialize)]
struct ShardHealth {
    shard: u32,
    role: &'static str,
    term: u64,
    leader: Option<String>,
    /// The counter's value behind the probe's own change.
    #[serde(skip_serializing_if = "Option::is_none")]
    counter: Option<i64>,
    committed: u64,
    applied: u64,
    elapsed_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn health_handler(State(health): State<Arc<Health>>) -> (StatusCode, Json<Report>) {
    // All at once: the answer takes one deadline, not one a shard.
    let mut probes = JoinSet::new();
    for probe in &health.shards {
        let (probe, node, deadline) = (Arc::clone(probe), health.node.clone(), health.deadline);
        probes.spawn(async move { probe.result(&node, deadline).await });
    }
    let mut shards = probes.join_all().await;
    shards.sort_by_key(|shard| shard.shard);
    let error = health.failure.reason();
    let healthy = error.is_none() && shards.iter().all(|shard| shard.error.is_none());
    let (code, status) = if healthy {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
    };
    (code, Json(Report { status, node: health.node.to_string(), error, shards }))
}

impl ShardProbe {
    pub(crate) fn new(group: GroupHandle) -> Self {
        Self { group, last: Mutex::new(None) }
    }

    async fn result(&self, node: &NodeName, deadline: Duration) -> ShardHealth {
        let mut last = self.last.lock().await;
        if let Some((at, health)) = &*last
            && at.elapsed() < SHARED_FOR
        {
            return health.clone();
        }
        let before = last.as_ref().and_then(|(_, health)| health.counter);
        let health = self.probe(node, deadline, before.unwrap_or(0)).await;
        *last = Some((Instant::now(), health.clone()));
        health
    }

    async fn probe(&self, node: &NodeName, deadline: Duration, before: i64) -> ShardHealth {
        let started = Instant::now();
        // Up and down in turn, so that the counter moves and yet stays small.
        let addend = if before > 0 { -1 } else { 1 };
        let run = self.group.run(command::encode_add_counter(addend));
        let (counter, error) = match tokio::time::timeout(deadline, run).await {
            Ok(Ok(Outcome::Counter(value))) => (Some(value), None),
            Ok(Ok(other)) => (None, Some(format!("the counter did not move: {other:?}"))),
            Ok(Err(stopped)) => (None, Some(stopped.to_string())),
            Err(_) => (None, Some(format!("the counter did not commit within {deadline:?}"))),
        };
        let status = self.group.status();
        let leads = status.role == Role::Leader;
        ShardHealth {
            shard: self.group.shard().0,
            role: match status.role {
                Role::Leader => "leader",
                Role::Follower => "follower",
                Role::Candidate | Role::PreCandidate => "candidate",
            },
            term: status.term.0,
            leader: leads.then(|| node.to_string()),
            counter,
            committed: status.committed.0,
            applied: status.applied.0,
            elapsed_ms: started.elapsed().as_secs_f64() * 1000.0,
            error,
        }
    }
}
