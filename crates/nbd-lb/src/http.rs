//! `/health`: whether the leader of each shard can be reached.
//!
//! A leader that is reached says so over a stream that lasts. A node that freezes or is cut off
//! loses its stream within about two seconds, and a leader that loses its majority steps down
//! within three election timeouts: so a 200 tells of the last seconds, and asking costs the nodes
//! nothing.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use crate::finder::{Finder, ShardStatus};

/// Answers `/health`.
pub(crate) fn router(finder: Finder) -> Router {
    Router::new().route("/health", get(health)).with_state(Arc::new(finder))
}

#[derive(Debug, Serialize)]
struct Report {
    status: &'static str,
    shards: Vec<ShardHealth>,
}

/// One shard's part of the answer.
#[derive(Debug, Serialize)]
struct ShardHealth {
    shard: u32,
    term: u64,
    /// The node that leads, as far as is known.
    leader: Option<String>,
    /// Where it is, as host:port.
    grpc: Option<String>,
    /// Addresses at which nodes of the shard are looked for, ...
    contacts: usize,
    /// ... and those of them that answer.
    answering: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn health(State(finder): State<Arc<Finder>>) -> (StatusCode, Json<Report>) {
    let shards: Vec<_> =
        finder.statuses().map(|status| ShardHealth::of(&status.borrow())).collect();
    if shards.iter().all(|shard| shard.error.is_none()) {
        (StatusCode::OK, Json(Report { status: "ok", shards }))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(Report { status: "unavailable", shards }))
    }
}

impl ShardHealth {
    fn of(status: &ShardStatus) -> Self {
        let ShardStatus { shard, route, reached, contacts, streams } = status;
        let leader = route.leader.as_ref();
        Self {
            shard: shard.0,
            term: route.term.0,
            leader: leader.map(|leader| leader.node.to_string()),
            grpc: leader.map(|leader| leader.grpc.clone()),
            contacts: *contacts,
            answering: *streams,
            error: (!reached).then(|| why(status)),
        }
    }
}

/// What is known of why a leader is not reached.
fn why(status: &ShardStatus) -> String {
    match &status.route.leader {
        _ if status.streams == 0 => {
            format!("none of {} addresses answers", status.contacts)
        }
        None => format!("{} nodes answer, and none knows a leader", status.streams),
        Some(leader) => {
            format!("the leader on {} cannot be reached at {}", leader.node, leader.grpc)
        }
    }
}

#[cfg(test)]
mod tests {
    use nbd_front::{LeaderAt, Route};
    use nbd_topology::{ReplicaId, ShardId, Term};

    use super::*;

    fn status(led: bool, reached: bool, streams: usize) -> ShardStatus {
        let leader = LeaderAt {
            replica: ReplicaId::new(2).unwrap(),
            node: "n2".parse().unwrap(),
            grpc: "n2:7400".to_owned(),
            local: false,
        };
        let route = Route { term: Term(4), leader: led.then_some(leader), serving: false };
        ShardStatus { shard: ShardId(1), route, reached, contacts: 3, streams }
    }

    #[test]
    fn the_answer_has_the_documented_form() {
        let json = |status| serde_json::to_value(ShardHealth::of(&status)).unwrap();
        let reached = serde_json::json!({"shard": 1, "term": 4, "leader": "n2",
            "grpc": "n2:7400", "contacts": 3, "answering": 2});
        assert_eq!(json(status(true, true, 2)), reached);
        let error = |status| json(status)["error"].as_str().unwrap().to_owned();
        assert_eq!(error(status(true, false, 2)), "the leader on n2 cannot be reached at n2:7400");
        assert_eq!(error(status(false, false, 1)), "1 nodes answer, and none knows a leader");
        assert_eq!(error(status(true, false, 0)), "none of 3 addresses answers");
    }
}
