//! `/health`: proves that each shard of this node can commit, by moving its replicated counter,
//! here or through the leader elsewhere. `/debug/digest`: what this node's own replicas hold, in
//! one number each, to be compared with the others'.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::chunk_service::DIGEST_RANGES_MAX;
use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use nbd_consensus::Role;
use nbd_front::ShardClient;
use nbd_store::{Outcome, ReadError, ShardReader, command};
use nbd_topology::NodeName;
use serde::Serialize;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint_thread::CheckpointHandle;
use crate::failure::Failure;
use crate::group_task::GroupHandle;
use crate::resync::ResyncProgress;

/// Age up to which a result is given to further callers, so that probes are not load.
const SHARED_FOR: Duration = Duration::from_millis(100);

/// Answers `/health` and `/debug/digest`.
pub(crate) fn router(health: Arc<Health>) -> Router {
    Router::new()
        .route("/health", get(health_handler))
        .route("/debug/digest", get(digest_handler))
        .with_state(health)
}

/// The shards of a node and how their last probe went.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) node: NodeName,
    pub(crate) failure: Failure,
    pub(crate) deadline: Duration,
    pub(crate) shards: Vec<Arc<ShardProbe>>,
    pub(crate) checkpoints: CheckpointHandle,
}

/// Probes one shard. Whoever comes while a probe runs waits for it and shares its result.
#[derive(Debug)]
pub(crate) struct ShardProbe {
    client: ShardClient,
    group: GroupHandle,
    resync: watch::Receiver<Option<ResyncProgress>>,
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
    /// Id of this node's replica, once it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<u64>,
    role: &'static str,
    term: u64,
    /// The node that leads, as far as this one knows.
    leader: Option<String>,
    /// The counter's value behind the probe's own change.
    #[serde(skip_serializing_if = "Option::is_none")]
    counter: Option<i64>,
    committed: u64,
    applied: u64,
    elapsed_ms: f64,
    /// How far this replica has caught up, while it fetches data from a peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    resync: Option<Resync>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A resync under way.
#[derive(Debug, Clone, Serialize)]
struct Resync {
    bytes_done: u64,
    bytes_total: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<f64>,
}

async fn health_handler(State(health): State<Arc<Health>>) -> (StatusCode, Json<Report>) {
    // All at once: the answer takes one deadline, not one a shard.
    let mut probes = JoinSet::new();
    for probe in &health.shards {
        let (probe, deadline) = (Arc::clone(probe), health.deadline);
        probes.spawn(async move { probe.result(deadline).await });
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
    pub(crate) fn new(
        client: ShardClient,
        group: GroupHandle,
        resync: watch::Receiver<Option<ResyncProgress>>,
    ) -> Self {
        Self { client, group, resync, last: Mutex::new(None) }
    }

    async fn result(&self, deadline: Duration) -> ShardHealth {
        let mut last = self.last.lock().await;
        if let Some((at, health)) = &*last
            && at.elapsed() < SHARED_FOR
        {
            return health.clone();
        }
        let before = last.as_ref().and_then(|(_, health)| health.counter);
        let health = self.probe(deadline, before.unwrap_or(0)).await;
        *last = Some((Instant::now(), health.clone()));
        health
    }

    async fn probe(&self, deadline: Duration, before: i64) -> ShardHealth {
        let started = Instant::now();
        // Up and down in turn, so that the counter moves and yet stays small.
        let addend = if before > 0 { -1 } else { 1 };
        let command = command::encode_add_counter(addend);
        // Moving it twice, should an answer be lost on the way, does no harm.
        let (counter, error) = match tokio::time::timeout(deadline, self.client.run(&command)).await
        {
            Ok(Ok(Outcome::Counter(value))) => (Some(value), None),
            Ok(Ok(other)) => (None, Some(format!("the counter did not move: {other:?}"))),
            Ok(Err(stopped)) => (None, Some(stopped.to_string())),
            Err(_) => (None, Some(self.why_late(deadline))),
        };
        let group = &self.group;
        let (status, route) = (group.status(), group.route().borrow().clone());
        ShardHealth {
            shard: group.shard().0,
            replica: group.reader().formation().map(|formation| formation.replica.get()),
            role: match status.role {
                Role::Leader => "leader",
                Role::Follower if !status.voter => "learner",
                Role::Follower => "follower",
                Role::Candidate | Role::PreCandidate => "candidate",
            },
            term: status.term.0,
            leader: route.leader.map(|leader| leader.node.to_string()),
            counter,
            committed: status.committed.0,
            applied: status.applied.0,
            elapsed_ms: started.elapsed().as_secs_f64() * 1000.0,
            resync: self.resync.borrow().as_ref().map(Resync::of),
            error,
        }
    }

    /// What is known of why a probe did not come through.
    fn why_late(&self, deadline: Duration) -> String {
        let group = &self.group;
        let late = format!("the counter did not commit within {deadline:?}");
        if group.reader().formation().is_none() {
            return format!("{late}: the shard is not formed yet");
        }
        match &group.route().borrow().leader {
            None => format!("{late}: no leader is known, this replica hears of no majority"),
            Some(leader) if leader.local => {
                format!("{late}: this replica leads and a majority does not answer")
            }
            Some(leader) => format!("{late}: the leader on {} does not answer", leader.node),
        }
    }
}

impl Resync {
    fn of(progress: &ResyncProgress) -> Self {
        Self {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            eta_seconds: progress.eta.map(|eta| eta.as_secs_f64()),
        }
    }
}

#[derive(Debug, Serialize)]
struct Digests {
    node: String,
    shards: Vec<ShardDigest>,
}

/// What one replica holds at home: equal on two replicas that have the same entry applied, if what
/// they hold is equal.
#[derive(Debug, Serialize)]
struct ShardDigest {
    shard: u32,
    applied: u64,
    digest: String,
}

/// Takes a checkpoint first, so that what is compared is all that was applied.
async fn digest_handler(
    State(health): State<Arc<Health>>,
) -> Result<Json<Digests>, (StatusCode, String)> {
    health.checkpoints.attempt().await;
    let failed = |error: String| (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"));
    let mut shards = Vec::new();
    for probe in &health.shards {
        let reader = probe.group.reader().clone();
        let digested = tokio::task::spawn_blocking(move || digest(&reader)).await;
        let digested = digested.map_err(|error| failed(error.to_string()))?;
        shards.push(digested.map_err(|error| failed(error.to_string()))?);
    }
    Ok(Json(Digests { node: health.node.to_string(), shards }))
}

/// One number for all chunks, as of the last checkpoint. **Blocks.**
fn digest(reader: &ShardReader) -> Result<ShardDigest, ReadError> {
    loop {
        let applied = reader.snapshot()?.applied;
        let digest = digest_of_chunks(reader)?;
        // Else a checkpoint came in between, and some of it is newer.
        if reader.snapshot()?.applied == applied {
            let (shard, digest) = (reader.shard().0, format!("{digest:016x}"));
            return Ok(ShardDigest { shard, applied: applied.0, digest });
        }
    }
}

fn digest_of_chunks(reader: &ShardReader) -> Result<u64, ReadError> {
    let (mut all, mut after) = (Xxh3::new(), None);
    loop {
        let ranges = reader.digests(after, DIGEST_RANGES_MAX)?;
        let Some(last) = ranges.last() else { return Ok(all.digest()) };
        after = Some((last.volume, last.first));
        for range in &ranges {
            for number in [range.volume.0, range.first.0, range.digest] {
                all.update(&number.to_le_bytes());
            }
        }
    }
}
