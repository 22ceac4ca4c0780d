//! Liveness and readiness, and their HTTP routes.
//!
//! Liveness says that the process runs; readiness says that it can serve. Readiness is a latch:
//! each condition (store opened, listener bound, ...) is met once, and what is ready stays ready
//! until the process drains. Whether a shard can commit right now is neither: that is `/health`,
//! which each service adds itself.
//!
//! | route | answer |
//! | --- | --- |
//! | `/livez` | 200 `ok` |
//! | `/readyz` | 200 `ready`, or 503 with what it still waits for |
//! | `/metrics` | 200, Prometheus text format |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use crate::telemetry::PrometheusHandle;

/// Whether the process can serve; clones look at the same latch.
#[derive(Debug, Clone)]
pub struct Readiness {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    conditions: Vec<Condition>,
    draining: AtomicBool,
}

#[derive(Debug)]
struct Condition {
    name: &'static str,
    met: AtomicBool,
}

/// One condition of a [`Readiness`], held by whoever brings it about. Dropping the last clone meets
/// it, unless that happens because the holder panics.
#[derive(Debug, Clone)]
#[must_use = "dropping the latch says that its condition is met"]
pub struct ReadyLatch {
    _last: Arc<LatchGuard>,
}

#[derive(Debug)]
struct LatchGuard {
    inner: Arc<Inner>,
    condition: usize,
}

impl Readiness {
    /// A readiness that waits for each of `conditions`, and one latch for each, in the same order.
    pub fn new<const N: usize>(conditions: [&'static str; N]) -> (Self, [ReadyLatch; N]) {
        let conditions =
            conditions.map(|name| Condition { name, met: AtomicBool::new(false) }).into();
        let inner = Arc::new(Inner { conditions, draining: AtomicBool::new(false) });
        let latches = std::array::from_fn(|condition| ReadyLatch {
            _last: Arc::new(LatchGuard { inner: Arc::clone(&inner), condition }),
        });
        (Self { inner }, latches)
    }

    /// Whether every condition is met and the process is not draining.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.waiting_for().next().is_none()
    }

    /// The conditions that are not met yet.
    pub fn waiting_for(&self) -> impl Iterator<Item = &'static str> {
        let unmet = |condition: &&Condition| !condition.met.load(Ordering::Acquire);
        self.inner.conditions.iter().filter(unmet).map(|condition| condition.name)
    }

    /// From now on not ready, for good: called when the process begins to stop, so that load
    /// balancers send it nothing new while it finishes what it holds.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
    }

    fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::Acquire)
    }
}

impl ReadyLatch {
    /// Says that the condition is met, as far as this clone is concerned. The same as dropping it.
    pub fn release(self) {}
}

impl Drop for LatchGuard {
    fn drop(&mut self) {
        // A holder that unwinds has not brought its condition about.
        if !std::thread::panicking() {
            self.inner.conditions[self.condition].met.store(true, Ordering::Release);
        }
    }
}

/// The routes `/livez`, `/readyz` and `/metrics`. A service merges its own (`/health`) into them.
pub fn probes(readiness: Readiness, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready).with_state(readiness))
        .route("/metrics", get(render).with_state(metrics))
}

async fn ready(State(readiness): State<Readiness>) -> (StatusCode, String) {
    if readiness.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
    }
    let missing: Vec<&str> = readiness.waiting_for().collect();
    if missing.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", missing.join(", ")))
    }
}

async fn render(State(metrics): State<PrometheusHandle>) -> impl IntoResponse {
    crate::process_metrics::observe();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_once_every_condition_is_met() {
        let (readiness, [store, listener]) = Readiness::new(["store", "listener"]);
        assert_eq!(readiness.waiting_for().collect::<Vec<_>>(), ["store", "listener"]);
        listener.release();
        assert_eq!(readiness.waiting_for().collect::<Vec<_>>(), ["store"]);
        let second_holder = store.clone();
        drop(store);
        assert!(!readiness.is_ready());
        drop(second_holder);
        assert!(readiness.is_ready());
        readiness.drain();
        assert!(!readiness.is_ready());
    }

    #[test]
    fn a_panicking_holder_meets_nothing() {
        let (readiness, [store]) = Readiness::new(["store"]);
        let holder = std::thread::spawn(move || {
            let _store = store;
            panic!("the store does not open");
        });
        assert!(holder.join().is_err());
        assert!(!readiness.is_ready());
    }
}
