//! The metrics of a control API, in Prometheus's terms, always on.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `control_requests_total` | `method`, `route`, `status` | requests answered |
//! | `control_request_seconds` | `method`, `route` | histogram: until the answer began |
//! | `control_streams` | | event streams open now |
//!
//! `route` is the route's template (`/api/v1/volumes/{name}`), or `none` for a path that is no
//! route: so there are as many series as routes, whatever is asked for.

use std::time::Duration;

use axum::http::{Method, StatusCode};
use metrics::{Gauge, Unit, counter, gauge, histogram};
use metrics::{describe_counter, describe_gauge, describe_histogram};

/// The names of methods that have a series of their own.
fn name(method: &Method) -> &'static str {
    const KNOWN: [Method; 5] =
        [Method::GET, Method::POST, Method::PATCH, Method::DELETE, Method::HEAD];
    const NAMES: [&str; 5] = ["GET", "POST", "PATCH", "DELETE", "HEAD"];
    let known = KNOWN.iter().position(|known| known == method);
    known.map_or("other", |place| NAMES[place])
}

/// Says what each metric means.
pub(crate) fn describe() {
    describe_histogram!("control_request_seconds", Unit::Seconds, "Time to answer a request.");
    describe_counter!("control_requests_total", "Requests answered, by status.");
    describe_gauge!("control_streams", "Event streams that are open.");
}

/// A request was answered.
pub(crate) fn answered(method: &Method, route: &str, status: StatusCode, took: Duration) {
    let (method, route) = (name(method), route.to_owned());
    histogram!("control_request_seconds", "method" => method, "route" => route.clone())
        .record(took.as_secs_f64());
    let status = status.as_u16().to_string();
    counter!("control_requests_total", "method" => method, "route" => route, "status" => status)
        .increment(1);
}

/// One event stream, as long as it lives.
#[derive(Debug)]
pub(crate) struct OpenStream(Gauge);

impl OpenStream {
    pub(crate) fn new() -> Self {
        let open = gauge!("control_streams");
        open.increment(1.0);
        Self(open)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
