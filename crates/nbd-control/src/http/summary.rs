//! The cluster as a whole.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use nbd_api::{Cluster, ClusterHealth, HealthStatus};

use super::Api;
use super::input::Params;
use super::problem::Failure;
use crate::overview::Overview;

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Show the cluster
///
/// A summary. What it counts is of the shards that answer.
#[utoipa::path(
    get, path = "/cluster", tag = "cluster", operation_id = "getCluster",
    responses((status = 200, description = "The cluster.", body = Cluster))
)]
pub(super) async fn cluster(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Cluster>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    let up = overview.nodes.values().filter(|node| node.answer.is_ok()).count();
    let mut cluster = Cluster {
        name: api.cluster.config().name().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        health: overview.health().status,
        shards: api.shard_count(),
        nodes: count(overview.nodes.len()),
        nodes_up: count(up),
        volumes: 0,
        provisioned: 0,
        allocated: 0,
        sessions: 0,
    };
    for (_, shard) in overview.answering() {
        cluster.volumes += shard.volumes;
        cluster.provisioned = cluster.provisioned.saturating_add(shard.provisioned);
        cluster.allocated = cluster.allocated.saturating_add(shard.allocated);
        cluster.sessions += u64::from(shard.sessions);
    }
    Ok(Json(cluster))
}

/// Show whether the cluster is well
///
/// Always 200, unless the control API itself is not well; `/health` has a status for machines.
#[utoipa::path(
    get, path = "/cluster/health", tag = "cluster", operation_id = "getClusterHealth",
    responses((status = 200, description = "Whether it is well.", body = ClusterHealth))
)]
pub(super) async fn cluster_health(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<ClusterHealth>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    Ok(Json(overview.health()))
}

/// 200 if every shard has a leader that answers, else 503; the body says which has none. Asks the
/// shards and not the nodes: a replica that is away is no reason to take the cluster for dead.
pub(super) async fn health(State(api): State<Arc<Api>>) -> (StatusCode, Json<ClusterHealth>) {
    let shards = api.cluster.shards();
    let overview = Overview::of_shards(&api.cluster, shards, api.list_deadline()).await;
    let health = overview.leaders();
    let status = match health.status {
        HealthStatus::Down => StatusCode::SERVICE_UNAVAILABLE,
        HealthStatus::Ok | HealthStatus::Degraded => StatusCode::OK,
    };
    (status, Json(health))
}
