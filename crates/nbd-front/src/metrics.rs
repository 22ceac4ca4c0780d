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

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use nbd_proto::CommandKind;

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
    /// Registers them with the process's recorder.
    pub(crate) fn new() -> Self {
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
