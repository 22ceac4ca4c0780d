//! Operations.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use nbd_api::{Operation, OperationEvent, OperationEventKind, OperationState, Page, ProblemType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Api;
use super::input::{Params, Segments};
use super::nodes::set_cordon;
use super::problem::Failure;
use super::shards::remove;
use crate::limits::{STREAM_KEEPALIVE, STREAMS_MAX, WATCH_INTERVAL};
use crate::metrics::OpenStream;
use crate::operations::OperationId;
use crate::overview::Overview;

/// How an operation stands.
async fn look(api: &Api, id: &str) -> Result<(OperationId, Operation), Failure> {
    let unknown = || Failure::not_found(format!("there is no operation {id:?}"));
    let parsed: OperationId = id.parse().map_err(|_| unknown())?;
    let overview = match parsed.shard() {
        Some(shard) if shard.0 >= api.shard_count() => return Err(unknown()),
        Some(shard) => Overview::of(&api.cluster, [shard], api.cluster.deadline()).await,
        None => Overview::of_all(&api.cluster, api.list_deadline()).await,
    };
    let operation = overview.operation(&parsed)?.ok_or_else(unknown)?;
    Ok((parsed, operation))
}

/// List operations
///
/// Those under way.
#[utoipa::path(
    get, path = "/operations", tag = "operations", operation_id = "listOperations",
    responses((status = 200, description = "What is under way.", body = Page<Operation>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Operation>>, Failure> {
    params.none()?;
    let overview = Overview::of_all(&api.cluster, api.list_deadline()).await;
    let (items, missing_shards) = (overview.running(), overview.missing());
    Ok(Json(Page { items, next: None, missing_shards }))
}

/// Show an operation
///
/// How it stands, also after its end. An operation is a way to look at the cluster: nothing is kept
/// of it.
#[utoipa::path(
    get, path = "/operations/{id}", tag = "operations", operation_id = "getOperation",
    params(("id" = String, Path, description = "The operation's id.")),
    responses((status = 200, description = "How it stands.", body = Operation))
)]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<String>,
    params: Params,
) -> Result<Json<Operation>, Failure> {
    params.none()?;
    Ok(Json(look(&api, &id).await?.1))
}

/// Cancel an operation
///
/// A replica that is being added is removed again, a node that is drained taken into use.
#[utoipa::path(
    delete, path = "/operations/{id}", tag = "operations", operation_id = "cancelOperation",
    params(("id" = String, Path, description = "The operation's id.")),
    responses((status = 200, description = "It is cancelled.", body = Operation))
)]
pub(super) async fn cancel(
    State(api): State<Arc<Api>>,
    Segments(text): Segments<String>,
    params: Params,
) -> Result<Json<Operation>, Failure> {
    params.none()?;
    let (id, operation) = look(&api, &text).await?;
    if !operation.cancellable {
        let detail = format!("it cannot be cancelled: {}", operation.message);
        return Err(Failure::conflict(detail));
    }
    let time = api.cluster.deadline();
    match &id {
        OperationId::Add { shard, replica } => remove(&api.cluster, *shard, *replica, time).await?,
        OperationId::Replace { shard, new, .. } => remove(&api.cluster, *shard, *new, time).await?,
        OperationId::Drain { node } => set_cordon(&api, node, false).await?,
        OperationId::Resync { .. } => return Err(Failure::conflict("it cannot be cancelled")),
    }
    Ok(Json(look(&api, &text).await?.1))
}

/// Watch an operation
///
/// Server-sent events: one of type `operation` now and with each change, until it is no longer
/// running. While its shard does not answer, one of type `problem` says so; after any other problem
/// the stream ends.
#[utoipa::path(
    get, path = "/operations/{id}/events", tag = "operations", operation_id = "watchOperation",
    params(("id" = String, Path, description = "The operation's id.")),
    responses((status = 200, description = "How it goes on.", body = OperationEvent,
        content_type = "text/event-stream"))
)]
pub(super) async fn events(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<String>,
    params: Params,
) -> Result<impl IntoResponse, Failure> {
    params.none()?;
    let Ok(permit) = Arc::clone(&api.streams).try_acquire_owned() else {
        let detail = format!("{STREAMS_MAX} operations are being watched already");
        return Err(Failure::unavailable(detail));
    };
    let (_, first) = look(&api, &id).await?;
    let (events, stream) = mpsc::channel(1);
    let stop = api.shutdown.token();
    tokio::spawn(async move {
        // Both last as long as the stream.
        let _held = (permit, OpenStream::new());
        tokio::select! {
            () = watch(&api, &id, first, &events) => {}
            () = events.closed() => {}
            () = stop.cancelled() => {}
        }
    });
    let keep_alive = KeepAlive::new().interval(STREAM_KEEPALIVE);
    Ok(Sse::new(ReceiverStream::new(stream)).keep_alive(keep_alive))
}

type Events = mpsc::Sender<Result<Event, Infallible>>;

/// Sends an event for each change, until there will be none any more or nobody listens.
async fn watch(api: &Api, id: &str, mut operation: Operation, events: &Events) {
    let mut silent = false;
    if !send(events, OperationEventKind::Operation, &operation).await {
        return;
    }
    while operation.state == OperationState::Running {
        tokio::time::sleep(WATCH_INTERVAL).await;
        let heard = match look(api, id).await {
            Ok((_, now)) if now == operation && !silent => true,
            Ok((_, now)) => {
                operation = now;
                silent = false;
                send(events, OperationEventKind::Operation, &operation).await
            }
            // It is gone for good, or cannot be told any more.
            Err(failure) if failure.problem().kind != ProblemType::Unavailable => {
                send(events, OperationEventKind::Problem, failure.problem()).await;
                return;
            }
            Err(_) if silent => true,
            Err(failure) => {
                silent = true;
                send(events, OperationEventKind::Problem, failure.problem()).await
            }
        };
        if !heard {
            return;
        }
    }
}

/// Whether somebody still listens.
async fn send<T>(events: &Events, kind: OperationEventKind, data: &T) -> bool
where
    T: serde::Serialize + Sync,
{
    match Event::default().event(kind.name()).json_data(data) {
        Ok(event) => events.send(Ok(event)).await.is_ok(),
        Err(error) => {
            tracing::error!(%error, "an event has no JSON form");
            false
        }
    }
}
