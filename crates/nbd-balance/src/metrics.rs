//! The metrics of this process, in Prometheus's terms, always on.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `balance_connections` | `backend` | clients given to it, and those that are just being |
//! | `balance_backend_up` | `backend` | 1 if it greeted when it was last asked, else 0 |
//! | `balance_attached_total` | `backend` | clients given to it so far |
//! | `balance_received_bytes_total` | `backend` | bytes moved from clients to it |
//! | `balance_sent_bytes_total` | `backend` | bytes moved from it to clients |
//! | `balance_attach_seconds` | | from a client's connection to the greeting |
//! | `balance_unserved_total` | | clients for whom nobody was found in time |
//! | `balance_refused_total` | | clients closed at the limit of connections |

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};
use metrics::{describe_counter, describe_gauge, describe_histogram};

/// Of one load balancer.
pub(crate) struct BackendMetrics {
    connections: Gauge,
    up: Gauge,
    attached: Counter,
    received: Counter,
    sent: Counter,
}

/// Of all.
pub(crate) struct BalanceMetrics {
    attach: Histogram,
    unserved: Counter,
    refused: Counter,
}

/// Says what each metric means.
pub(crate) fn describe() {
    describe_gauge!("balance_connections", "Clients of a load balancer, arriving ones included.");
    describe_gauge!("balance_backend_up", "1 if a load balancer greeted when last asked, else 0.");
    describe_counter!("balance_attached_total", "Clients given to a load balancer.");
    describe_counter!(
        "balance_received_bytes_total",
        Unit::Bytes,
        "Bytes moved from clients to a load balancer."
    );
    describe_counter!(
        "balance_sent_bytes_total",
        Unit::Bytes,
        "Bytes moved from a load balancer to clients."
    );
    describe_histogram!(
        "balance_attach_seconds",
        Unit::Seconds,
        "Time from a client's connection to its greeting."
    );
    describe_counter!("balance_unserved_total", "Clients for whom no load balancer was found.");
    describe_counter!("balance_refused_total", "Clients closed at the limit of connections.");
}

impl BackendMetrics {
    pub(crate) fn new(backend: &str) -> Self {
        let backend = backend.to_owned();
        let metrics = Self {
            connections: gauge!("balance_connections", "backend" => backend.clone()),
            up: gauge!("balance_backend_up", "backend" => backend.clone()),
            attached: counter!("balance_attached_total", "backend" => backend.clone()),
            received: counter!("balance_received_bytes_total", "backend" => backend.clone()),
            sent: counter!("balance_sent_bytes_total", "backend" => backend),
        };
        metrics.up(false);
        metrics.connections(0);
        metrics
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
    pub(crate) fn connections(&self, count: usize) {
        self.connections.set(count as f64);
    }

    pub(crate) fn up(&self, up: bool) {
        self.up.set(f64::from(u8::from(up)));
    }

    pub(crate) fn attached(&self) {
        self.attached.increment(1);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.received.increment(bytes);
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.sent.increment(bytes);
    }
}

/// A handle on a metric has nothing to show.
impl std::fmt::Debug for BackendMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackendMetrics").finish_non_exhaustive()
    }
}

impl BalanceMetrics {
    pub(crate) fn new() -> Self {
        Self {
            attach: histogram!("balance_attach_seconds"),
            unserved: counter!("balance_unserved_total"),
            refused: counter!("balance_refused_total"),
        }
    }

    pub(crate) fn served(&self, after: Duration) {
        self.attach.record(after);
    }

    pub(crate) fn unserved(&self) {
        self.unserved.increment(1);
    }

    pub(crate) fn refused(&self) {
        self.refused.increment(1);
    }
}
