//! The HTTP side: routes, what they take and what they answer.
//!
//! A handler checks what it was given, asks the cluster, and puts the answer into the types of
//! [`nbd_api`]. What goes wrong on the way is a [`Failure`]. Who may ask, audit
//! lines and counts are in [`guard`], for all of them alike.

mod document;
mod examples;
mod guard;
mod input;
mod nodes;
mod operations;
mod problem;
mod sessions;
mod shards;
mod summary;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use nbd_api::ProblemType;
use nbd_service::health::probes;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{Readiness, Shutdown};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;

use self::problem::Failure;
use crate::cluster::Cluster;
use crate::config::HostName;
use crate::limits::{BODY_BYTES_MAX, LIST_DEADLINE, STREAMS_MAX};
use crate::tokens::Tokens;

/// What every handler has at hand.
#[derive(Debug)]
pub(crate) struct Api {
    cluster: Cluster,
    /// `None`: everybody may do everything.
    tokens: Option<Tokens>,
    /// A permit for each stream of events.
    streams: Arc<Semaphore>,
    /// Host names by which clients may ask while no token is asked for.
    allowed_hosts: Vec<HostName>,
    /// Where people see traces.
    jaeger_ui: Option<String>,
    /// Ends the streams of events, and waits for changes.
    shutdown: Shutdown,
}

impl Api {
    pub(crate) fn new(
        cluster: Cluster,
        tokens: Option<Tokens>,
        allowed_hosts: Vec<HostName>,
        jaeger_ui: Option<String>,
        shutdown: Shutdown,
    ) -> Self {
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        Self { cluster, tokens, streams, allowed_hosts, jaeger_ui, shutdown }
    }

    /// Until when a request that is here now is to be answered.
    fn deadline(&self) -> Deadline {
        Deadline(Instant::now() + self.cluster.deadline())
    }

    /// How long one shard among several is waited for.
    fn list_deadline(&self) -> Duration {
        self.cluster.deadline().min(LIST_DEADLINE)
    }

    fn shard_count(&self) -> u32 {
        self.cluster.config().shard_count().get()
    }
}

/// Until when a request is to be answered: one for all the calls that it takes.
#[derive(Debug, Clone, Copy)]
struct Deadline(Instant);

impl Deadline {
    /// The time that is left.
    fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Refuses a list of which every shard that was asked is missing: an empty one would say that there
/// is nothing.
fn some_answered(asked: usize, missing: &[u32]) -> Result<(), Failure> {
    if asked > 0 && missing.len() >= asked {
        return Err(Failure::unavailable("none of the shards that were asked answers"));
    }
    Ok(())
}

/// The resources, with what is known of them from the code.
fn resources() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::with_openapi(document::base())
        .routes(routes!(summary::cluster))
        .routes(routes!(summary::cluster_health))
        .routes(routes!(volumes::list, volumes::create))
        .routes(routes!(volumes::get, volumes::update, volumes::delete))
        .routes(routes!(volumes::resize))
        .routes(routes!(volumes::trace))
        .routes(routes!(sessions::list))
        .routes(routes!(sessions::end))
        .routes(routes!(shards::list))
        .routes(routes!(shards::get))
        .routes(routes!(shards::transfer))
        .routes(routes!(shards::add_member))
        .routes(routes!(shards::remove_member))
        .routes(routes!(shards::replace_member))
        .routes(routes!(shards::activity))
        .routes(routes!(shards::all_activity))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::get))
        .routes(routes!(nodes::cordon))
        .routes(routes!(nodes::uncordon))
        .routes(routes!(nodes::drain))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
        .routes(routes!(operations::events))
}

/// Everything that is served.
pub(crate) fn router(api: Arc<Api>, readiness: Readiness, metrics: PrometheusHandle) -> Router {
    let (resources, document) =
        OpenApiRouter::new().nest(nbd_api::PREFIX, resources()).split_for_parts();
    let document = document::finish(&document);
    let ui = SwaggerUi::new("/docs").config(utoipa_swagger_ui::Config::from("/openapi.json"));
    resources
        .route("/health", get(summary::health))
        .route("/openapi.json", get(async move || Json(document)))
        .with_state(Arc::clone(&api))
        .merge(ui)
        .merge(probes(readiness, metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(other_method)
        .layer(axum::middleware::from_fn_with_state(api, guard::guard))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

async fn unknown_path() -> Failure {
    Failure::not_found("there is nothing here: see /docs for what there is")
}

async fn other_method() -> Failure {
    let detail = "see the header Allow for what can be done with it, and /docs for what that does";
    Failure::new(ProblemType::MethodNotAllowed, detail)
}

/// An answer that says where else it, or what became of it, can be found.
fn located<T: Serialize>(status: StatusCode, location: String, body: T) -> Response {
    (status, [(header::LOCATION, location)], Json(body)).into_response()
}

/// Percent-encodes one part of a path. `.` and `..` would be taken for steps in the path.
fn encoded(segment: &str) -> String {
    use std::fmt::Write as _;
    if matches!(segment, "." | "..") {
        return segment.replace('.', "%2E");
    }
    let mut text = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let infallible = write!(text, "%{byte:02X}");
            debug_assert!(infallible.is_ok(), "a String takes everything");
        }
    }
    text
}

/// Now, as the replicas are told.
fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_paths_stay_parts() {
        assert_eq!(encoded("a/b .é"), "a%2Fb%20.%C3%A9");
        assert_eq!((encoded(".").as_str(), encoded("..").as_str()), ("%2E", "%2E%2E"));
    }
}
