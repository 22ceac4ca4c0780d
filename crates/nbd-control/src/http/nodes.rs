//! Nodes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use nbd_api::{Node, Operation, PREFIX, Page};
use nbd_rpc::v1;
use nbd_topology::ShardId;

use super::input::{Params, Segments};
use super::problem::Failure;
use super::{Api, encoded, located};
use crate::cluster::CallError;
use crate::operations::OperationId;
use crate::overview::{Overview, each};

fn unknown(node: &str) -> Failure {
    Failure::not_found(format!("there is no node {node:?}"))
}

/// List nodes
///
/// Those that are configured, and those that hold replicas.
#[utoipa::path(
    get, path = "/nodes", tag = "nodes", operation_id = "listNodes",
    responses((status = 200, description = "All nodes.", body = Page<Node>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Node>>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    let items = overview.nodes.keys().filter_map(|name| overview.node(name)).collect();
    Ok(Json(Page { items, next: None, missing_shards: overview.missing() }))
}

/// Show a node
#[utoipa::path(
    get, path = "/nodes/{node}", tag = "nodes", operation_id = "getNode",
    params(("node" = String, Path, description = "The node's name.")),
    responses((status = 200, description = "The node.", body = Node))
)]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(node): Segments<String>,
    params: Params,
) -> Result<Json<Node>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    overview.node(&node).map(Json).ok_or_else(|| unknown(&node))
}

/// Cordons the node, or takes that back, for each shard that it is on; for all shards if it is on
/// none.
pub(super) async fn set_cordon(api: &Api, node: &str, cordoned: bool) -> Result<(), Failure> {
    let before = Overview::of_all(&api.cluster, api.list_deadline()).await;
    if !before.nodes.contains_key(node) {
        return Err(unknown(node));
    }
    let mut shards = before.shards_of(node);
    if shards.is_empty() {
        shards = api.cluster.shards().collect();
    }
    let time = api.cluster.deadline();
    let asked = each(shards, |shard: ShardId| {
        let node = node.to_owned();
        let request = v1::CordonNodeRequest { target: None, node, cordoned };
        let cluster = api.cluster.clone();
        async move { (shard, cluster.cordon_node(shard, time, request).await) }
    });
    let mut done = Vec::new();
    let mut failed = None;
    for (shard, answer) in asked.await {
        match answer {
            Ok(_) => done.push(shard.to_string()),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        None => Ok(()),
        Some(CallError::Unavailable { shard, reason }) => {
            let done = if done.is_empty() { "none".to_owned() } else { done.join(", ") };
            let detail = format!(
                "shard {shard} does not answer: {reason}. Done for shards: {done}. Ask again"
            );
            Err(Failure::unavailable(detail))
        }
        Some(error) => Err(error.into()),
    }
}

/// Cordon a node
///
/// It leads a shard only if no other replica can, and no replica is added on it. It need not be
/// alive.
#[utoipa::path(
    post, path = "/nodes/{node}/cordon", tag = "nodes", operation_id = "cordonNode",
    params(("node" = String, Path, description = "The node's name.")),
    responses((status = 200, description = "The node.", body = Node))
)]
pub(super) async fn cordon(
    State(api): State<Arc<Api>>,
    Segments(node): Segments<String>,
    params: Params,
) -> Result<Json<Node>, Failure> {
    params.none()?;
    set_cordon(&api, &node, true).await?;
    get(State(api), Segments(node), params).await
}

/// Take a node into use again
#[utoipa::path(
    post, path = "/nodes/{node}/uncordon", tag = "nodes", operation_id = "uncordonNode",
    params(("node" = String, Path, description = "The node's name.")),
    responses((status = 200, description = "The node.", body = Node))
)]
pub(super) async fn uncordon(
    State(api): State<Arc<Api>>,
    Segments(node): Segments<String>,
    params: Params,
) -> Result<Json<Node>, Failure> {
    params.none()?;
    set_cordon(&api, &node, false).await?;
    get(State(api), Segments(node), params).await
}

/// Drain a node
///
/// Cordons it, and moves the leadership of its shards to other nodes. Its replicas stay: it may
/// then be stopped without anybody noticing.
#[utoipa::path(
    post, path = "/nodes/{node}/drain", tag = "nodes", operation_id = "drainNode",
    params(("node" = String, Path, description = "The node's name.")),
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "Where the operation is."))))
)]
pub(super) async fn drain(
    State(api): State<Arc<Api>>,
    Segments(node): Segments<String>,
    params: Params,
) -> Result<Response, Failure> {
    params.none()?;
    set_cordon(&api, &node, true).await?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    let id = OperationId::Drain { node: node.clone() };
    let operation = overview.operation(&id)?.ok_or_else(|| unknown(&node))?;
    let location = format!("{PREFIX}/operations/{}", encoded(&operation.id));
    Ok(located(StatusCode::ACCEPTED, location, operation))
}
