//! Sessions.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use nbd_api::time::from_millis;
use nbd_api::{Attachment, IoCounts, Page, Session, Timestamp};
use nbd_rpc::v1;
use nbd_topology::ShardId;
use serde::{Deserialize, Serialize};

use super::input::{Params, Segments};
use super::problem::Failure;
use super::volumes::id_of;
use super::{Api, some_answered};
use crate::cluster::CallError;
use crate::overview::each;
use crate::paging::{cursor, merge};

/// What a cursor holds: the id of the last session of the page before.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cursor {
    session: String,
}

/// What was read and written, as clients see it.
pub(super) const fn counts(counts: v1::IoCounts) -> IoCounts {
    let v1::IoCounts { reads, read_bytes, writes, write_bytes, read_us, write_us } = counts;
    IoCounts { reads, read_bytes, writes, write_bytes, read_us, write_us }
}

fn id_of_bytes(bytes: &[u8]) -> u128 {
    // The service says 16 bytes; others are an id that nobody finds.
    bytes.try_into().map_or(0, u128::from_be_bytes)
}

/// The id that a text stands for: 32 hexadecimal digits, in small letters.
fn parse_id(text: &str) -> Option<u128> {
    let id = u128::from_str_radix(text, 16).ok()?;
    (format!("{id:032x}") == text).then_some(id)
}

fn moment(millis: u64) -> Timestamp {
    from_millis(millis).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn view(shard: ShardId, leader: &str, session: v1::SessionView) -> Session {
    let attachment = session.attachment.map(|at| Attachment {
        client: at.client,
        via: at.via,
        leader: leader.to_owned(),
        since: moment(at.since_ms),
        attached: moment(at.attached_ms),
        counts: counts(at.counts.unwrap_or_default()),
        pending: at.pending,
    });
    Session {
        id: format!("{:032x}", id_of_bytes(&session.id)),
        volume: session.name,
        shard: shard.0,
        epoch: session.epoch,
        attachment,
    }
}

/// List sessions
///
/// The clients of volumes, attached or not, in pages, in the order of their ids.
#[utoipa::path(
    get, path = "/sessions", tag = "sessions", operation_id = "listSessions",
    params(
        ("volume" = Option<String>, Query, description = "Only those of this volume."),
        ("shard" = Option<u32>, Query, description = "Only those of this shard."),
        ("limit" = Option<u32>, Query, description = "Sessions in the page at most.",
            minimum = 1, maximum = 1000),
        ("cursor" = Option<String>, Query, description = "`next` of the page before."),
    ),
    responses((status = 200, description = "A page of sessions.", body = Page<Session>))
)]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    params: Params,
) -> Result<Json<Page<Session>>, Failure> {
    params.only(&["volume", "shard", "limit", "cursor"], &[])?;
    let limit = params.limit()?;
    let wanted = params.shard(api.shard_count())?;
    let after = params.cursor::<Cursor>()?.map(|cursor| {
        parse_id(&cursor.session)
            .ok_or_else(|| Failure::malformed("cursor", "it is none that this list has given"))
    });
    let after = after.transpose()?;
    let (mut shards, mut volume) = (api.cluster.shards().collect::<Vec<_>>(), 0);
    if let Some(name) = params.one("volume") {
        let (shard, id) = id_of(&api, name, api.deadline()).await?;
        (shards, volume) = (vec![shard], id);
    }
    if let Some(wanted) = wanted {
        shards.retain(|shard| *shard == wanted);
    }
    // About one shard alone, silence is an error and no gap in a list.
    let alone = shards.len() == 1 && (wanted.is_some() || params.one("volume").is_some());
    let time = if alone { api.cluster.deadline() } else { api.list_deadline() };
    let page = merge(
        shards.clone(),
        limit as usize,
        after,
        |(_, session): &(ShardId, v1::SessionView)| id_of_bytes(&session.id),
        |shard, after, limit| {
            let after = after.map(|after: u128| after.to_be_bytes().to_vec().into());
            let after = after.unwrap_or_default();
            let request = v1::ListSessionsRequest { target: None, volume, after, limit };
            let cluster = api.cluster.clone();
            async move {
                let reply = cluster.list_sessions(shard, time, request).await?;
                let sessions = reply.sessions.into_iter().map(|session| (shard, session));
                Ok((sessions.collect(), reply.more))
            }
        },
    )
    .await?;
    if alone && let Some(shard) = page.missing.first() {
        return Err(Failure::unavailable(format!("shard {shard} does not answer")));
    }
    some_answered(shards.len(), &page.missing)?;
    let leaders = leaders(&api, &page.items).await;
    let last = page.items.last().filter(|_| page.more);
    let next = last
        .map(|(_, last)| cursor(&Cursor { session: format!("{:032x}", id_of_bytes(&last.id)) }));
    let items = page.items.into_iter().map(|(shard, session)| {
        let leader = leaders.iter().find(|(led, _)| *led == shard);
        view(shard, leader.map_or("", |(_, leader)| leader), session)
    });
    Ok(Json(Page { items: items.collect(), next, missing_shards: page.missing }))
}

/// The nodes that lead the shards with attached sessions among these.
async fn leaders(api: &Api, sessions: &[(ShardId, v1::SessionView)]) -> Vec<(ShardId, String)> {
    let attached = sessions.iter().filter(|(_, session)| session.attachment.is_some());
    let shards: std::collections::BTreeSet<_> = attached.map(|(shard, _)| *shard).collect();
    let time = api.list_deadline();
    let asked = each(shards, |shard| {
        let cluster = api.cluster.clone();
        async move {
            let reply = cluster.shard(shard, time).await.ok()?;
            Some((shard, crate::overview::leader(&reply)?))
        }
    });
    asked.await.into_iter().flatten().collect()
}

/// End a session
///
/// Its client is disconnected, and cannot go on with the session. Nothing hinders it from attaching
/// anew.
#[utoipa::path(
    delete, path = "/sessions/{id}", tag = "sessions", operation_id = "endSession",
    params(
        ("id" = String, Path, description = "The session's id: 32 hexadecimal digits."),
        ("shard" = Option<u32>, Query, description =
            "The shard of its volume: spares asking all shards."),
    ),
    responses((status = 204, description = "It is ended."))
)]
pub(super) async fn end(
    State(api): State<Arc<Api>>,
    Segments(id): Segments<String>,
    params: Params,
) -> Result<StatusCode, Failure> {
    params.only(&["shard"], &[])?;
    let unknown = || Failure::not_found(format!("there is no session {id:?}"));
    let shards = match params.shard(api.shard_count())? {
        Some(shard) => vec![shard],
        None => api.cluster.shards().collect(),
    };
    let session = parse_id(&id).ok_or_else(unknown)?;
    let time = api.cluster.deadline();
    let asked = each(shards, |shard| {
        let session = session.to_be_bytes().to_vec().into();
        let request = v1::EndSessionRequest { target: None, session };
        let cluster = api.cluster.clone();
        async move { cluster.end_session(shard, time, request).await }
    });
    let mut silent = None;
    let mut maybe = false;
    for answer in asked.await {
        match answer {
            Ok(_) => return Ok(StatusCode::NO_CONTENT),
            // Nobody knows it there; if it was sent before, that may have been what ended it.
            Err(CallError::NotFound { repeated, .. }) => maybe |= repeated,
            Err(error @ CallError::Unavailable { .. }) => silent = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    match silent {
        Some(error) => Err(error.into()),
        // It is not there, which is what was asked for; whether it ever was cannot be told.
        None if maybe => Ok(StatusCode::NO_CONTENT),
        None => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_one_spelling() {
        let text = "00000000000000000000000000000abc";
        assert_eq!(parse_id(text), Some(0xabc));
        for bad in
            ["", "abc", "00000000000000000000000000000ABC", "+0000000000000000000000000000abc"]
        {
            assert_eq!(parse_id(bad), None, "{bad}");
        }
    }
}
