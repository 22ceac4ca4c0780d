//! Volumes.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use nbd_api::time::from_millis;
use nbd_api::{
    CreateVolume, IDEMPOTENCY_KEY, PREFIX, Page, ResizeVolume, TraceVolume, Traced, UpdateVolume,
    Volume, VolumeDetails,
};
use nbd_rpc::v1;
use nbd_store::labels::is_label_name;
use nbd_store::limits::{DESCRIPTION_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use nbd_topology::ShardId;
use serde::{Deserialize, Serialize};

use super::input::{Body, Fields, Params, Segments};
use super::problem::Failure;
use super::{Api, Deadline, encoded, located, now_ms, some_answered};
use crate::cluster::{CallError, Conflict};
use crate::limits::{KEY_MAX, TRACED_MAX};
use crate::overview::leader;
use crate::paging::{cursor, merge};

/// A volume as clients see it.
pub(super) fn view(shard: ShardId, volume: v1::Volume) -> Volume {
    let v1::Volume { id, name, size, description, labels, created_ms, modified_ms } = volume;
    Volume {
        name,
        id: format!("{id:016x}"),
        shard: shard.0,
        size,
        description,
        labels: labels.into_iter().collect(),
        created: from_millis(created_ms),
        modified: from_millis(modified_ms),
    }
}

/// A shard's answer without what it is about.
pub(super) fn incomplete(shard: ShardId) -> Failure {
    let reason = "it gives an answer that is not complete".to_owned();
    CallError::Unavailable { shard, reason }.into()
}

/// What a list is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sort {
    order: v1::VolumeOrder,
    descending: bool,
}

/// A place in a list of volumes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    value: u64,
    name: String,
}

/// What a cursor holds: a place, and in which list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cursor {
    sort: String,
    after: Place,
}

impl Sort {
    fn parse(text: &str) -> Option<Self> {
        let (name, descending) = match text.strip_prefix('-') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let order = match name {
            "name" => v1::VolumeOrder::Name,
            "size" => v1::VolumeOrder::Size,
            "created" => v1::VolumeOrder::Created,
            "modified" => v1::VolumeOrder::Modified,
            _ => return None,
        };
        Some(Self { order, descending })
    }

    fn place(self, volume: &v1::Volume) -> Place {
        let value = match self.order {
            v1::VolumeOrder::Name | v1::VolumeOrder::Unspecified => 0,
            v1::VolumeOrder::Size => volume.size,
            v1::VolumeOrder::Created => volume.created_ms,
            v1::VolumeOrder::Modified => volume.modified_ms,
        };
        Place { value, name: volume.name.clone() }
    }
}

/// A place in one of the two directions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Directed {
    Up(Place),
    Down(Reverse<Place>),
}

impl Directed {
    fn new(place: Place, descending: bool) -> Self {
        if descending { Self::Down(Reverse(place)) } else { Self::Up(place) }
    }

    fn position(self) -> v1::VolumePosition {
        let (Self::Up(place) | Self::Down(Reverse(place))) = self;
        v1::VolumePosition { name: place.name, value: place.value }
    }
}

/// The labels that a query asks for; `None` if no volume can have them all.
fn labels_of(params: &Params) -> Result<Option<HashMap<String, String>>, Failure> {
    let mut labels = HashMap::<String, String>::new();
    let mut possible = true;
    for text in params.all("label") {
        let pair = text.split_once('=').filter(|(name, _)| is_label_name(name));
        let Some((name, value)) = pair else {
            return Err(Failure::malformed("label", format!("{text:?} is not NAME=VALUE")));
        };
        let before = labels.insert(name.to_owned(), value.to_owned());
        possible &= before.is_none_or(|before| before == value);
    }
    Ok(possible.then_some(labels))
}

/// List volumes
///
/// Volumes of all shards, in pages. Volumes that are alike in what the list is sorted by are in the
/// order of their names.
#[utoipa::path(
    get, path = "/volumes", tag = "volumes", operation_id = "listVolumes",
    params(
        ("prefix" = Option<String>, Query, description = "Only names that begin with this."),
        ("label" = Option<Vec<String>>, Query, description =
            "Only volumes with this label, as `name=value`. Several times: with all of them."),
        ("sort" = Option<String>, Query, description =
            "`name` (the default), `size`, `created` or `modified`; with a leading `-` the other \
             way round."),
        ("limit" = Option<u32>, Query, description = "Volumes in the page at most.",
            minimum = 1, maximum = 1000),
        ("cursor" = Option<String>, Query, description =
            "`next` of the page before, for the same `sort`."),
    ),
    responses((status = 200, description = "A page of volumes.", body = Page<Volume>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Volume>>, Failure> {
    params.only(&["prefix", "sort", "limit", "cursor"], &["label"])?;
    let text = params.one("sort").unwrap_or("name");
    let allowed = "it is name, size, created or modified, with - before it for the other way round";
    let sort = Sort::parse(text).ok_or_else(|| Failure::malformed("sort", allowed))?;
    let after = params.cursor::<Cursor>()?;
    if after.as_ref().is_some_and(|cursor| cursor.sort != text) {
        return Err(Failure::malformed("cursor", "it is of a list that is sorted otherwise"));
    }
    let limit = params.limit()?;
    let prefix = params.one("prefix").unwrap_or_default();
    if prefix.len() > VOLUME_NAME_BYTES_MAX {
        let detail = format!("a name has at most {VOLUME_NAME_BYTES_MAX} bytes");
        return Err(Failure::malformed("prefix", detail));
    }
    let Some(labels) = labels_of(&params)? else {
        return Ok(Json(Page { items: Vec::new(), next: None, missing_shards: Vec::new() }));
    };
    let request = v1::ListVolumesRequest {
        prefix: prefix.to_owned(),
        labels,
        order: sort.order.into(),
        descending: sort.descending,
        ..v1::ListVolumesRequest::default()
    };
    let page = merge(
        api.cluster.shards().collect(),
        limit as usize,
        after.map(|cursor| Directed::new(cursor.after, sort.descending)),
        |(_, volume)| Directed::new(sort.place(volume), sort.descending),
        |shard, after: Option<Directed>, limit| {
            let (cluster, time) = (api.cluster.clone(), api.list_deadline());
            let after = after.map(Directed::position);
            let request = v1::ListVolumesRequest { after, limit, ..request.clone() };
            async move {
                let reply = cluster.list_volumes(shard, time, request).await?;
                let volumes = reply.volumes.into_iter().map(|volume| (shard, volume)).collect();
                Ok((volumes, reply.more))
            }
        },
    )
    .await?;
    some_answered(api.cluster.shards().count(), &page.missing)?;
    let last = page.items.last().filter(|_| page.more);
    let next =
        last.map(|(_, last)| cursor(&Cursor { sort: text.to_owned(), after: sort.place(last) }));
    let items = page.items.into_iter().map(|(shard, volume)| view(shard, volume)).collect();
    Ok(Json(Page { items, next, missing_shards: page.missing }))
}

/// The key that makes a creation repeatable: the client's, or one for this call alone, so that what
/// is sent to the shard more than once is carried out once.
fn key_of(headers: &HeaderMap) -> Result<String, Failure> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(format!("{:032x}", rand::random::<u128>()));
    };
    let key = value.to_str().unwrap_or_default();
    if (1..=KEY_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(key.to_owned());
    }
    Err(Failure::invalid(IDEMPOTENCY_KEY, "it is 1 to 255 visible ASCII characters"))
}

/// Create a volume
///
/// Space is taken only for what is written. Sent again with the same `Idempotency-Key`, the answer
/// is 200 and nothing is created.
#[utoipa::path(
    post, path = "/volumes", tag = "volumes", operation_id = "createVolume",
    params(("Idempotency-Key" = Option<String>, Header, description =
        "Tells a creation that is sent again from another one: 1 to 255 visible characters.",
        max_length = 255, pattern = "^[!-~]+$")),
    request_body(content = CreateVolume, description = "What the volume is to be."),
    responses(
        (status = 201, description = "It was created.", body = Volume,
            headers(("Location" = String, description = "Where the volume is."))),
        (status = 200, description = "It was created by an earlier request with the same key.",
            body = Volume, headers(("Location" = String, description = "Where the volume is."))),
    )
)]
pub(super) async fn create(
    State(api): State<Arc<Api>>,
    params: Params,
    headers: HeaderMap,
    Body(mut fields): Body,
) -> Result<Response, Failure> {
    params.none()?;
    let key = key_of(&headers)?;
    let CreateVolume { name, size, description, labels } = {
        let name = fields.volume_name();
        let size = fields.size();
        let description = fields.text("description", 0..=DESCRIPTION_BYTES_MAX).unwrap_or_default();
        let labels = fields.labels();
        fields.finish()?;
        CreateVolume { name, size, description, labels }
    };
    let default_size = api.cluster.config().volumes().default_size.bytes();
    let shard = api.cluster.shard_of(&name);
    let request = v1::CreateVolumeRequest {
        target: None,
        name,
        size: size.unwrap_or(default_size),
        description,
        labels: labels.into_iter().collect(),
        key,
        now_ms: now_ms(),
    };
    let given = headers.contains_key(IDEMPOTENCY_KEY);
    let reply = api.cluster.create_volume(shard, api.cluster.deadline(), request).await?;
    let volume = view(shard, reply.volume.ok_or_else(|| incomplete(shard))?);
    // A repetition of our own is not one to the client.
    let repeated = reply.repeated && given;
    let status = if repeated { StatusCode::OK } else { StatusCode::CREATED };
    Ok(located(status, format!("{PREFIX}/volumes/{}", encoded(&volume.name)), volume))
}

/// Finds a volume by its name.
async fn find(
    api: &Api,
    name: &str,
    deadline: Deadline,
) -> Result<(ShardId, v1::GetVolumeReply), Failure> {
    let shard = api.cluster.shard_of(name);
    let request = v1::GetVolumeRequest { target: None, name: name.to_owned() };
    match api.cluster.get_volume(shard, deadline.left(), request).await {
        Ok(reply) => Ok((shard, reply)),
        Err(CallError::NotFound { .. } | CallError::Invalid { .. }) => {
            Err(Failure::not_found(format!("there is no volume {name:?}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Finds a volume's id, for calls that change it.
pub(super) async fn id_of(
    api: &Api,
    name: &str,
    deadline: Deadline,
) -> Result<(ShardId, u64), Failure> {
    let (shard, reply) = find(api, name, deadline).await?;
    let volume = reply.volume.ok_or_else(|| incomplete(shard))?;
    Ok((shard, volume.id))
}

/// Show a volume
///
/// With what it takes up, and how many clients it has.
#[utoipa::path(
    get, path = "/volumes/{name}", tag = "volumes", operation_id = "getVolume",
    params(("name" = String, Path, description = "The volume's name, percent-encoded.")),
    responses((status = 200, description = "The volume.", body = VolumeDetails))
)]
pub(super) async fn get(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    params: Params,
) -> Result<Json<VolumeDetails>, Failure> {
    params.none()?;
    let shard = api.cluster.shard_of(&name);
    // Who leads is worth knowing, and not worth failing for.
    let at = api.cluster.shard(shard, api.list_deadline());
    let (found, at) = tokio::join!(find(&api, &name, api.deadline()), at);
    let (_, reply) = found?;
    let volume = view(shard, reply.volume.ok_or_else(|| incomplete(shard))?);
    let (allocated, sessions) = (reply.allocated, reply.sessions);
    let leader = at.ok().as_ref().and_then(leader);
    Ok(Json(VolumeDetails { volume, allocated, sessions, leader }))
}

/// Change a volume's description and labels
///
/// A JSON merge patch (RFC 7396): what is absent stays, labels that are null are taken away.
#[utoipa::path(
    patch, path = "/volumes/{name}", tag = "volumes", operation_id = "updateVolume",
    params(("name" = String, Path, description = "The volume's name, percent-encoded.")),
    request_body(content(
        (UpdateVolume = "application/merge-patch+json"), (UpdateVolume = "application/json"))),
    responses((status = 200, description = "The volume as it is now.", body = Volume))
)]
pub(super) async fn update(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    params: Params,
    Body(mut fields): Body,
) -> Result<Json<Volume>, Failure> {
    params.none()?;
    let (description, labels) = (fields.description(), fields.label_changes());
    fields.finish()?;
    let deadline = api.deadline();
    let (shard, volume) = id_of(&api, &name, deadline).await?;
    let mut request = v1::UpdateVolumeRequest {
        volume,
        description,
        now_ms: now_ms(),
        ..v1::UpdateVolumeRequest::default()
    };
    for (name, value) in labels {
        match value {
            Some(value) => _ = request.set_labels.insert(name, value),
            None => request.remove_labels.push(name),
        }
    }
    let reply = api.cluster.update_volume(shard, deadline.left(), request).await?;
    Ok(Json(view(shard, reply.volume.ok_or_else(|| incomplete(shard))?)))
}

/// What a volume's new size is to be.
fn new_size(mut fields: Fields) -> Result<ResizeVolume, Failure> {
    let size = fields.size();
    let size = fields.required("size", size);
    let force = fields.flag("force");
    fields.finish()?;
    Ok(ResizeVolume { size, force })
}

/// Change a volume's size
///
/// New bytes read as zero. Clients that are attached see the new size when they attach next.
/// Refused if the volume would become smaller, unless that is forced: what lies behind its new end
/// is then lost. A forced one is never sent to the shard again by itself: after 503, look whether
/// it was made.
#[utoipa::path(
    post, path = "/volumes/{name}/resize", tag = "volumes", operation_id = "resizeVolume",
    params(("name" = String, Path, description = "The volume's name, percent-encoded.")),
    request_body(content = ResizeVolume, description = "The new size."),
    responses((status = 200, description = "The volume as it is now.", body = Volume))
)]
pub(super) async fn resize(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    params: Params,
    Body(fields): Body,
) -> Result<Json<Volume>, Failure> {
    params.none()?;
    let ResizeVolume { size, force } = new_size(fields)?;
    let deadline = api.deadline();
    let (shard, reply) = find(&api, &name, deadline).await?;
    let now = reply.volume.ok_or_else(|| incomplete(shard))?;
    let (cluster, now_ms) = (&api.cluster, now_ms());
    let request = |force| v1::ResizeVolumeRequest {
        target: None,
        volume: now.id,
        size,
        force,
        now_ms,
        from: now.size,
    };
    // Only what has to be forced is: an attempt that comes late then takes nothing away from a
    // volume that has grown meanwhile.
    let mut answer = None;
    if !force || size >= now.size {
        answer = Some(cluster.resize_volume(shard, deadline.left(), request(false)).await);
    }
    let reply = match answer {
        // It has grown just now.
        Some(Err(CallError::Conflict { conflict: Conflict::Shrinks(_), .. })) if force => {
            cluster.shrink_volume(shard, deadline.left(), request(true)).await?
        }
        Some(answer) => answer?,
        None => cluster.shrink_volume(shard, deadline.left(), request(true)).await?,
    };
    Ok(Json(view(shard, reply.volume.ok_or_else(|| incomplete(shard))?)))
}

/// What is asked for of traces.
fn traced(mut fields: Fields) -> Result<TraceVolume, Failure> {
    let requests = fields.count("requests", 1..=TRACED_MAX);
    let requests = fields.required("requests", requests);
    fields.finish()?;
    Ok(TraceVolume { requests })
}

/// Where Jaeger shows the traces of a volume: each has a span of the leader, which names it.
fn search(jaeger_ui: &str, volume: u64) -> String {
    let tags = encoded(&format!(r#"{{"cinderblock.volume.id":"{volume}"}}"#));
    format!("{jaeger_ui}/search?service=nbd-replica&lookback=1h&limit=100&tags={tags}")
}

/// Trace the next requests of a volume
///
/// The next requests of each client that is attached are traced, from there to every replica, as
/// soon as they come. Nothing comes of it where no collector of traces is configured.
#[utoipa::path(
    post, path = "/volumes/{name}/trace", tag = "volumes", operation_id = "traceVolume",
    params(("name" = String, Path, description = "The volume's name, percent-encoded.")),
    request_body(content = TraceVolume, description = "How many requests."),
    responses((status = 200, description = "Who was asked.", body = Traced))
)]
pub(super) async fn trace(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    params: Params,
    Body(fields): Body,
) -> Result<Json<Traced>, Failure> {
    params.none()?;
    let TraceVolume { requests } = traced(fields)?;
    let shard = api.cluster.shard_of(&name);
    let request = v1::TraceVolumeRequest { target: None, name, requests };
    let reply = api.cluster.trace_volume(shard, api.cluster.deadline(), request).await?;
    let search = api.jaeger_ui.as_deref().map(|base| search(base, reply.volume));
    Ok(Json(Traced { requests, sessions: reply.sessions, search }))
}

/// Delete a volume
///
/// Its data is gone for good. Refused while clients are attached, unless it is forced: then they
/// are disconnected.
#[utoipa::path(
    delete, path = "/volumes/{name}", tag = "volumes", operation_id = "deleteVolume",
    params(
        ("name" = String, Path, description = "The volume's name, percent-encoded."),
        ("force" = Option<bool>, Query, description = "Delete it although it is attached."),
    ),
    responses((status = 204, description = "It is deleted."))
)]
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    Segments(name): Segments<String>,
    params: Params,
) -> Result<StatusCode, Failure> {
    params.only(&["force"], &[])?;
    let force = params.flag("force")?;
    let deadline = api.deadline();
    let (shard, volume) = id_of(&api, &name, deadline).await?;
    let request = v1::DeleteVolumeRequest { target: None, volume, force };
    match api.cluster.delete_volume(shard, deadline.left(), request).await {
        // It is this volume's id: if it was sent before, that is what deleted it.
        Ok(_) | Err(CallError::NotFound { repeated: true, .. }) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_named_as_in_the_query() {
        let size = Sort { order: v1::VolumeOrder::Size, descending: true };
        assert_eq!(Sort::parse("-size"), Some(size));
        assert!(!Sort::parse("modified").unwrap().descending);
        for bad in ["", "-", "Name", "--name", "color"] {
            assert_eq!(Sort::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn places_turn_round_with_the_order() {
        let place = |value, name: &str| Place { value, name: name.to_owned() };
        let up = |value, name| Directed::new(place(value, name), false);
        let down = |value, name| Directed::new(place(value, name), true);
        assert!(up(1, "b") < up(2, "a") && up(2, "a") < up(2, "b"));
        assert!(down(2, "b") < down(2, "a") && down(2, "a") < down(1, "b"));
    }
}
