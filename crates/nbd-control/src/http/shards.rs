//! Shards and their replicas.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use nbd_api::{
    Activity, AddMember, Operation, PREFIX, Page, ReplaceMember, Shard, TransferLeadership,
    VolumeActivity,
};
use nbd_rpc::v1;
use nbd_service::HostPort;
use nbd_service::cluster::GRPC_PORT;
use nbd_topology::{NodeName, ShardId};

use super::input::{self, Body, Fields, OptionalBody, Params, Segments};
use super::problem::Failure;
use super::sessions::counts;
use super::{Api, Deadline, located, some_answered};
use crate::cluster::{CallError, Cluster};
use crate::operations::OperationId;
use crate::overview::{Overview, each, leader, members, node_of};

/// How often a transfer of leadership is looked at.
const TRANSFER_POLL: Duration = Duration::from_millis(50);

/// Longest name of a node, in bytes; what characters it has is checked besides.
const NODE_NAME_MAX: usize = 64;

/// The shard as it is, or why that is not known.
async fn view(api: &Api, shard: ShardId, deadline: Deadline) -> Result<Json<Shard>, Failure> {
    let overview = Overview::of(&api.cluster, [shard], deadline.left()).await;
    match overview.shard(shard) {
        Some(Ok(view)) => Ok(Json(view)),
        Some(Err(error)) => Err(error.into()),
        None => Err(Failure::not_found(format!("there is no shard {shard}"))),
    }
}

/// List shards
///
/// With their replicas.
#[utoipa::path(
    get, path = "/shards", tag = "shards", operation_id = "listShards",
    responses((status = 200, description = "All shards.", body = Page<Shard>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Shard>>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    let shards = overview.shards.keys().filter_map(|shard| overview.shard(*shard)?.ok());
    let missing_shards = overview.missing();
    some_answered(overview.shards.len(), &missing_shards)?;
    Ok(Json(Page { items: shards.collect(), next: None, missing_shards }))
}

/// Show a shard
#[utoipa::path(
    get, path = "/shards/{shard}", tag = "shards", operation_id = "getShard",
    params(("shard" = u32, Path, description = "The shard's number.")),
    responses((status = 200, description = "The shard.", body = Shard))
)]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(shard): Segments<String>,
    params: Params,
) -> Result<Json<Shard>, Failure> {
    params.none()?;
    view(&api, input::shard(&shard, api.shard_count())?, api.deadline()).await
}

/// A node's name, from a body.
fn node_name(fields: &mut Fields) -> Option<NodeName> {
    let text = fields.text("node", 1..=NODE_NAME_MAX)?;
    match text.parse() {
        Ok(name) => Some(name),
        Err(error) => {
            fields.wrong("/node", error.to_string());
            None
        }
    }
}

/// Move a shard's leadership
///
/// Clients notice a pause of some milliseconds. Without a body the most advanced replica that is
/// not on a cordoned node takes over.
#[utoipa::path(
    post, path = "/shards/{shard}/transfer", tag = "shards", operation_id = "transferLeadership",
    params(("shard" = u32, Path, description = "The shard's number.")),
    request_body(content = Option<TransferLeadership>, description = "Who is to lead."),
    responses((status = 200, description = "The shard, led by another node.", body = Shard))
)]
pub(super) async fn transfer(
    State(api): State<Arc<Api>>,
    Segments(shard): Segments<String>,
    params: Params,
    OptionalBody(mut fields): OptionalBody,
) -> Result<Json<Shard>, Failure> {
    params.none()?;
    let shard = input::shard(&shard, api.shard_count())?;
    let node = node_name(&mut fields);
    fields.finish()?;
    let deadline = api.deadline();
    let at = api.cluster.shard(shard, deadline.left()).await?;
    // Whom it goes to is settled before it is asked for: asked again, it goes to the same.
    let replica = match &node {
        None => successor(&at).ok_or_else(|| {
            Failure::conflict(format!("shard {shard} has no other replica that could lead"))
        })?,
        Some(node) => {
            let Some(replica) = replica_on(&at, node) else {
                let detail = format!("shard {shard} has no replica on node {node}");
                return Err(Failure::invalid("/node", detail));
            };
            if leader(&at).as_deref() == Some(node.as_str()) {
                return view(&api, shard, deadline).await;
            }
            replica
        }
    };
    let request = v1::TransferLeadershipRequest { to: None, replica };
    let reply = api.cluster.transfer_leadership(shard, deadline.left(), request).await?;
    let to = reply.replica;
    // Asked to take over is not yet done so.
    while !deadline.left().is_zero() {
        let at = api.cluster.shard(shard, deadline.left()).await?;
        if at.members.is_some_and(|members| members.leader == to) {
            return view(&api, shard, deadline).await;
        }
        tokio::time::sleep(TRANSFER_POLL).await;
    }
    let detail = format!("replica {to} was asked to lead, and has not taken over yet");
    Err(Failure::unavailable(detail))
}

/// The replica that is best suited to lead in place of the one that does: one that is not on a
/// cordoned node if there is one, and of these the most advanced.
fn successor(at: &v1::GetShardReply) -> Option<u64> {
    let leader = at.members.as_ref()?.leader;
    let able = members(at).filter(|member| member.voter && member.active && !member.resyncing);
    let able = able.filter_map(|member| {
        let id = member.replica.as_ref()?.id;
        let cordoned = at.cordoned.iter().any(|node| node == node_of(member));
        (id != leader).then_some((cordoned, member.lag, id))
    });
    able.min().map(|(_, _, id)| id)
}

fn replica_on(at: &v1::GetShardReply, node: &NodeName) -> Option<u64> {
    let on_it = |member: &&v1::Member| node_of(member) == node.as_str();
    members(at).find(on_it)?.replica.as_ref().map(|replica| replica.id)
}

/// The node that is to hold a replica, and where it is.
fn new_member(cluster: &Cluster, fields: &mut Fields) -> Option<(NodeName, String)> {
    let node = node_name(fields);
    let missing = node.is_none();
    let _: String = fields.required("node", node.as_ref().map(ToString::to_string));
    let grpc = fields.text("grpc", 1..=300).and_then(|text| match text.parse::<HostPort>() {
        Ok(address) => Some(address.to_string()),
        Err(error) => {
            fields.wrong("/grpc", error.to_string());
            None
        }
    });
    if missing {
        return None;
    }
    let node = node?;
    let configured = cluster.config().node(&node).map(|node| node.addresses.grpc.to_string());
    let grpc = grpc.or(configured).unwrap_or_else(|| format!("{node}:{GRPC_PORT}"));
    Some((node, grpc))
}

/// Refuses a node that holds a replica of the shard already, or is not to.
async fn may_join(
    api: &Api,
    shard: ShardId,
    node: &NodeName,
    deadline: Deadline,
) -> Result<(), Failure> {
    let at = api.cluster.shard(shard, deadline.left()).await?;
    if at.cordoned.iter().any(|cordoned| cordoned == node.as_str()) {
        let detail = format!("node {node} is cordoned: uncordon it first");
        return Err(Failure::conflict(detail));
    }
    Ok(())
}

/// The answer to what has begun.
async fn begun(api: &Api, id: OperationId, deadline: Deadline) -> Result<Response, Failure> {
    let shards: Vec<_> = id.shard().into_iter().collect();
    let overview = Overview::of(&api.cluster, shards, deadline.left()).await;
    let operation = overview.operation(&id)?;
    let operation = operation.ok_or_else(|| Failure::not_found("the shard is gone"))?;
    Ok(located(StatusCode::ACCEPTED, format!("{PREFIX}/operations/{id}"), operation))
}

/// Add a replica to a shard
///
/// On a node that runs, has an empty data directory, and is configured to hold the shard. It
/// fetches the shard's data, and then votes.
#[utoipa::path(
    post, path = "/shards/{shard}/members", tag = "shards", operation_id = "addMember",
    params(("shard" = u32, Path, description = "The shard's number.")),
    request_body(content = AddMember, description = "The node."),
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "Where the operation is."))))
)]
pub(super) async fn add_member(
    State(api): State<Arc<Api>>,
    Segments(shard): Segments<String>,
    params: Params,
    Body(mut fields): Body,
) -> Result<Response, Failure> {
    params.none()?;
    let shard = input::shard(&shard, api.shard_count())?;
    let new = new_member(&api.cluster, &mut fields);
    fields.finish()?;
    let Some((node, grpc)) = new else { return Err(Failure::invalid("/node", "it is missing")) };
    let deadline = api.deadline();
    may_join(&api, shard, &node, deadline).await?;
    let request = v1::AddReplicaRequest { to: None, node: node.to_string(), grpc };
    let reply = api.cluster.add_replica(shard, deadline.left(), request).await?;
    begun(&api, OperationId::Add { shard, replica: reply.replica }, deadline).await
}

/// Finds a member of the shard by the id in the path.
async fn known_member(
    api: &Api,
    shard: ShardId,
    replica: &str,
    deadline: Deadline,
) -> Result<u64, Failure> {
    let replica = input::replica(replica)?;
    let at = api.cluster.shard(shard, deadline.left()).await?;
    if crate::overview::member(&at, replica).is_none() {
        return Err(Failure::not_found(format!("shard {shard} has no replica {replica}")));
    }
    Ok(replica)
}

/// Remove a replica from a shard
///
/// For good, dead or alive. Refused if the replicas that are left and alive would be no majority.
#[utoipa::path(
    delete, path = "/shards/{shard}/members/{replica}", tag = "shards",
    operation_id = "removeMember",
    params(
        ("shard" = u32, Path, description = "The shard's number."),
        ("replica" = u64, Path, description = "The replica's id."),
    ),
    responses((status = 204, description = "It is removed."))
)]
pub(super) async fn remove_member(
    State(api): State<Arc<Api>>,
    Segments((shard, replica)): Segments<(String, String)>,
    params: Params,
) -> Result<StatusCode, Failure> {
    params.none()?;
    let shard = input::shard(&shard, api.shard_count())?;
    let deadline = api.deadline();
    let replica = known_member(&api, shard, &replica, deadline).await?;
    remove(&api.cluster, shard, replica, deadline.left()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a replica that was there.
pub(super) async fn remove(
    cluster: &Cluster,
    shard: ShardId,
    replica: u64,
    time: Duration,
) -> Result<(), CallError> {
    let request = v1::RemoveReplicaRequest { to: None, replica };
    match cluster.remove_replica(shard, time, request).await {
        Ok(_) | Err(CallError::NotFound { repeated: true, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Replace a replica
///
/// Adds one on another node; once that votes, the old one is removed, dead or alive.
#[utoipa::path(
    post, path = "/shards/{shard}/members/{replica}/replace", tag = "shards",
    operation_id = "replaceMember",
    params(
        ("shard" = u32, Path, description = "The shard's number."),
        ("replica" = u64, Path, description = "The id of the replica that is to go."),
    ),
    request_body(content = ReplaceMember, description = "The node that takes over."),
    responses((status = 202, description = "It has begun.", body = Operation,
        headers(("Location" = String, description = "Where the operation is."))))
)]
pub(super) async fn replace_member(
    State(api): State<Arc<Api>>,
    Segments((shard, replica)): Segments<(String, String)>,
    params: Params,
    Body(mut fields): Body,
) -> Result<Response, Failure> {
    params.none()?;
    let shard = input::shard(&shard, api.shard_count())?;
    let new = new_member(&api.cluster, &mut fields);
    fields.finish()?;
    let Some((node, grpc)) = new else { return Err(Failure::invalid("/node", "it is missing")) };
    let deadline = api.deadline();
    let old = known_member(&api, shard, &replica, deadline).await?;
    may_join(&api, shard, &node, deadline).await?;
    let request =
        v1::ReplaceReplicaRequest { to: None, replica: old, node: node.to_string(), grpc };
    let reply = api.cluster.replace_replica(shard, deadline.left(), request).await?;
    begun(&api, OperationId::Replace { shard, old, new: reply.replica }, deadline).await
}

async fn activity_of(
    cluster: &Cluster,
    shard: ShardId,
    time: Duration,
) -> Result<Activity, CallError> {
    let request = v1::ActivityRequest { target: None };
    let reply = cluster.activity(shard, time, request).await?;
    let at = cluster.shard(shard, time).await?;
    let live = members(&at).filter(|member| member.active);
    let volumes = reply.volumes.into_iter().map(|volume| VolumeActivity {
        name: volume.name,
        counts: counts(volume.counts.unwrap_or_default()),
        sessions: volume.sessions,
    });
    Ok(Activity {
        shard: shard.0,
        origin: format!("{:016x}", reply.incarnation),
        lag: live.map(|member| member.lag).max().unwrap_or(0),
        total: counts(reply.total.unwrap_or_default()),
        volumes: volumes.collect(),
    })
}

/// Show what a shard does just now
///
/// Counts since the start of the process that leads it; two answers of one `origin` give rates.
#[utoipa::path(
    get, path = "/shards/{shard}/activity", tag = "shards", operation_id = "getActivity",
    params(("shard" = u32, Path, description = "The shard's number.")),
    responses((status = 200, description = "What it does.", body = Activity))
)]
pub(super) async fn activity(
    State(api): State<Arc<Api>>,
    Segments(shard): Segments<String>,
    params: Params,
) -> Result<Json<Activity>, Failure> {
    params.none()?;
    let shard = input::shard(&shard, api.shard_count())?;
    Ok(Json(activity_of(&api.cluster, shard, api.cluster.deadline()).await?))
}

/// Show what all shards do just now
#[utoipa::path(
    get, path = "/activity", tag = "shards", operation_id = "listActivity",
    responses((status = 200, description = "What they do.", body = Page<Activity>))
)]
pub(super) async fn all_activity(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Activity>>, Failure> {
    params.none()?;
    let time = api.list_deadline();
    let asked = each(api.cluster.shards(), |shard| {
        let cluster = api.cluster.clone();
        async move { (shard, activity_of(&cluster, shard, time).await) }
    });
    let (mut items, mut missing_shards) = (Vec::new(), Vec::new());
    for (shard, answer) in asked.await {
        match answer {
            Ok(activity) => items.push(activity),
            Err(CallError::Unavailable { .. }) => missing_shards.push(shard.0),
            Err(error) => return Err(error.into()),
        }
    }
    some_answered(api.cluster.shards().count(), &missing_shards)?;
    Ok(Json(Page { items, next: None, missing_shards }))
}
