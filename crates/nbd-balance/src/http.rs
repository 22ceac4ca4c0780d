//! `/health`: whether there is a load balancer to give clients to.
//!
//! Each is asked every second whether it greets; a 200 tells of the last few seconds.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use crate::race::Backends;

/// Answers `/health`.
pub(crate) fn router(backends: Arc<Backends>) -> Router {
    Router::new().route("/health", get(health)).with_state(backends)
}

#[derive(Debug, Serialize)]
struct Report {
    status: &'static str,
    backends: Vec<BackendHealth>,
}

#[derive(Debug, Serialize)]
struct BackendHealth {
    /// Where it is, as configured.
    backend: String,
    /// Whether it greeted when it was last asked.
    up: bool,
    connections: usize,
}

async fn health(State(backends): State<Arc<Backends>>) -> (StatusCode, Json<Report>) {
    let backends: Vec<BackendHealth> = backends
        .all()
        .iter()
        .map(|backend| BackendHealth {
            backend: backend.name().to_owned(),
            up: backend.is_up(),
            connections: backend.candidate().connections,
        })
        .collect();
    if backends.iter().any(|backend| backend.up) {
        (StatusCode::OK, Json(Report { status: "ok", backends }))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(Report { status: "unavailable", backends }))
    }
}
