//! The metrics of the front end, in Prometheus's terms, always on. Durations are histograms in
//! seconds.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `nbd_connections` | | connections now, in handshake or attached |
//! | `nbd_connections_refused_total` | | connections closed because there were too many |
//! | `nbd_requests_seconds` | `op` | from a request's last byte to its reply being queued |
//! | `nbd_request_bytes_total` | `op` | bytes covered by requests that succeeded |
//! | `nbd_requests_refused_total` | | requests that broke a rule of the protocol or of the export |
//! | `nbd_requests_failed_total` | | valid requests that were answered with an error |
//! | `nbd_sessions` | `shard` | sessions attached to a volume of the shard now |
//! | `nbd_received_bytes_total` | `shard` | bytes that came from their clients, behind the handshake |
//! | `nbd_sent_bytes_total` | `shard` | bytes that went to their clients, behind the handshake |
//! | `nbd_requests_pending` | `shard` | requests received and not answered yet |
//! | `nbd_failovers_total` | `shard` | times that a session was resumed at another leader than before |
//! | `nbd_stall_seconds` | `shard` | how long a client waited because its session's leader was lost or moved: from the loss, or its first request behind it, to the first answer of the next attachment |
//!
//! Of requests whose bytes are only moved (the load balancer's mode `splice`), no more is counted
//! than bytes: `nbd_requests_*`, failovers and stalls are then those of the replica attached to.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};
use metrics::{describe_counter, describe_gauge, describe_histogram};
use nbd_proto::CommandKind;
use nbd_topology::ShardId;

fn describe() {
    for (name, help) in [
        ("nbd_requests_seconds", "Time from a request's last byte to its reply being queued."),
        ("nbd_stall_seconds", "How long a client waited because its leader was lost or moved."),
    ] {
        describe_histogram!(name, Unit::Seconds, help);
    }
    for (name, help) in [
        ("nbd_connections_refused_total", "Connections closed because there were too many."),
        ("nbd_request_bytes_total", "Bytes covered by requests that succeeded."),
        ("nbd_requests_refused_total", "Requests that broke a rule of protocol or export."),
        ("nbd_requests_failed_total", "Valid requests that were answered with an error."),
        ("nbd_received_bytes_total", "Bytes that came from clients, behind the handshake."),
        ("nbd_sent_bytes_total", "Bytes that went to clients, behind the handshake."),
        ("nbd_failovers_total", "Times that a session was resumed at another leader."),
    ] {
        describe_counter!(name, help);
    }
    for (name, help) in [
        ("nbd_connections", "Connections now, in handshake or attached."),
        ("nbd_sessions", "Sessions attached to a volume of the shard now."),
        ("nbd_requests_pending", "Requests received and not answered yet."),
    ] {
        describe_gauge!(name, help);
    }
}

/// Of the connections and their requests.
pub(crate) struct NbdMetrics {
    pub(crate) connections: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) refused: Counter,
    pub(crate) failed: Counter,
    /// By [`CommandKind`] in the order of [`OPS`].
    requests: [(Histogram, Counter); OPS.len()],
}

const OPS: [&str; 7] = ["read", "write", "flush", "trim", "cache", "write_zeroes", "block_status"];

const fn op_place(kind: CommandKind) -> Option<usize> {
    match kind {
        CommandKind::Read => Some(0),
        CommandKind::Write => Some(1),
        CommandKind::Flush => Some(2),
        CommandKind::Trim => Some(3),
        CommandKind::Cache => Some(4),
        CommandKind::WriteZeroes => Some(5),
        CommandKind::BlockStatus => Some(6),
        _ => None,
    }
}

impl std::fmt::Debug for NbdMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdMetrics").finish_non_exhaustive()
    }
}

impl NbdMetrics {
    /// Registers them with the process's recorder, and says what they and those of the shards mean.
    pub(crate) fn new() -> Self {
        describe();
        Self {
            connections: gauge!("nbd_connections"),
            connections_refused: counter!("nbd_connections_refused_total"),
            refused: counter!("nbd_requests_refused_total"),
            failed: counter!("nbd_requests_failed_total"),
            requests: OPS.map(|op| {
                let seconds = histogram!("nbd_requests_seconds", "op" => op);
                (seconds, counter!("nbd_request_bytes_total", "op" => op))
            }),
        }
    }

    /// Counts a request that succeeded.
    pub(crate) fn request(&self, kind: CommandKind, len: u64, elapsed: Duration) {
        if let Some(place) = op_place(kind) {
            let (seconds, bytes) = &self.requests[place];
            seconds.record(elapsed);
            bytes.increment(len);
        }
    }
}

/// Of one shard's sessions.
pub(crate) struct ShardMetrics {
    pub(crate) sessions: Gauge,
    pub(crate) received_bytes: Counter,
    pub(crate) sent_bytes: Counter,
    pub(crate) requests_pending: Gauge,
    pub(crate) failovers: Counter,
    pub(crate) stall: Histogram,
}

impl std::fmt::Debug for ShardMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardMetrics").finish_non_exhaustive()
    }
}

impl ShardMetrics {
    /// Registers them with the process's recorder.
    pub(crate) fn new(shard: ShardId) -> Self {
        let shard = shard.to_string();
        Self {
            sessions: gauge!("nbd_sessions", "shard" => shard.clone()),
            received_bytes: counter!("nbd_received_bytes_total", "shard" => shard.clone()),
            sent_bytes: counter!("nbd_sent_bytes_total", "shard" => shard.clone()),
            requests_pending: gauge!("nbd_requests_pending", "shard" => shard.clone()),
            failovers: counter!("nbd_failovers_total", "shard" => shard.clone()),
            stall: histogram!("nbd_stall_seconds", "shard" => shard),
        }
    }
}

/// A count as gauges take it.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
pub(crate) const fn float(count: u64) -> f64 {
    count as f64
}
