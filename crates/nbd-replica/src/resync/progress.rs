//! How far a resync is, for people and for `/health`.

use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, counter, gauge};
use nbd_topology::ShardId;
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::info;

/// Time between log lines.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// How far a resync is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResyncProgress {
    /// Bytes of chunks dealt with: fetched, or found in place.
    pub(crate) bytes_done: u64,
    /// Bytes of chunks in all, as known so far. `bytes_done <= bytes_total`.
    pub(crate) bytes_total: u64,
    /// Estimated time until all is done; `None` before there is anything to go by.
    pub(crate) eta: Option<Duration>,
}

impl ResyncProgress {
    fn new(bytes_done: u64, bytes_total: u64, elapsed: Duration) -> Self {
        let bytes_done = bytes_done.min(bytes_total);
        let left = bytes_total - bytes_done;
        let eta = elapsed.as_millis() * u128::from(left);
        let eta = eta.checked_div(u128::from(bytes_done));
        let eta = eta.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or(u64::MAX)));
        Self { bytes_done, bytes_total, eta }
    }
}

/// Counts one resync after the other.
#[derive(Debug)]
pub(crate) struct Meter {
    shard: ShardId,
    count: Mutex<Count>,
    shown: watch::Sender<Option<ResyncProgress>>,
    metrics: ResyncMetrics,
}

#[derive(Debug)]
struct Count {
    began: Instant,
    logged: Instant,
    done: u64,
    received: u64,
    total: u64,
}

/// What a resync came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Total {
    /// Bytes of chunks dealt with.
    pub(crate) bytes: u64,
    /// Of these, bytes that were fetched.
    pub(crate) received: u64,
    pub(crate) elapsed: Duration,
}

/// | name | labels | meaning |
/// | --- | --- | --- |
/// | `resync_received_bytes_total` | | data of chunks that came from peers to catch up |
/// | `resync_chunks_total` | | the same in chunks |
/// | `resync_done_bytes`, `resync_size_bytes` | `shard` | of the resync under way, else 0 |
/// | `resync_eta_seconds` | `shard` | estimated time until it is done, else 0 |
struct ResyncMetrics {
    received: Counter,
    chunks: Counter,
    done: Gauge,
    total: Gauge,
    eta: Gauge,
}

impl std::fmt::Debug for ResyncMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResyncMetrics").finish_non_exhaustive()
    }
}

impl Count {
    const fn new(now: Instant) -> Self {
        Self { began: now, logged: now, done: 0, received: 0, total: 0 }
    }
}

impl Meter {
    pub(crate) fn new(shard: ShardId) -> Self {
        let label = shard.to_string();
        let metrics = ResyncMetrics {
            received: counter!("resync_received_bytes_total"),
            chunks: counter!("resync_chunks_total"),
            done: gauge!("resync_done_bytes", "shard" => label.clone()),
            total: gauge!("resync_size_bytes", "shard" => label.clone()),
            eta: gauge!("resync_eta_seconds", "shard" => label),
        };
        let now = Instant::now();
        let count = Count::new(now);
        Self { shard, count: Mutex::new(count), shown: watch::Sender::new(None), metrics }
    }

    /// The progress of the resync under way, if one is.
    pub(crate) fn shown(&self) -> watch::Receiver<Option<ResyncProgress>> {
        self.shown.subscribe()
    }

    /// A resync begins.
    pub(crate) fn begin(&self) {
        let now = Instant::now();
        *self.count.lock() = Count::new(now);
        self.show();
    }

    /// So much is left from here on, as measured.
    pub(crate) fn expect(&self, bytes: u64) {
        {
            let mut count = self.count.lock();
            count.total = count.done + bytes;
        }
        self.show();
    }

    /// Chunks were found in place.
    pub(crate) fn found(&self, bytes: u64) {
        self.count.lock().done += bytes;
        self.show();
    }

    /// Chunks were fetched and stored.
    pub(crate) fn stored(&self, chunks: usize, bytes: u64) {
        self.metrics.received.increment(bytes);
        self.metrics.chunks.increment(chunks as u64);
        {
            let mut count = self.count.lock();
            count.done += bytes;
            count.received += bytes;
        }
        self.show();
    }

    /// The resync has ended, in whatever way.
    pub(crate) fn end(&self) -> Total {
        self.shown.send_replace(None);
        for gauge in [&self.metrics.done, &self.metrics.total, &self.metrics.eta] {
            gauge.set(0.0);
        }
        let count = self.count.lock();
        let (bytes, received, elapsed) = (count.done, count.received, count.began.elapsed());
        Total { bytes, received, elapsed }
    }

    fn show(&self) {
        let mut count = self.count.lock();
        let now = ResyncProgress::new(count.done, count.total, count.began.elapsed());
        self.metrics.done.set(float(now.bytes_done));
        self.metrics.total.set(float(now.bytes_total));
        self.metrics.eta.set(now.eta.unwrap_or_default().as_secs_f64());
        self.shown.send_replace(Some(now));
        if count.logged.elapsed() >= LOG_INTERVAL {
            count.logged = Instant::now();
            let ResyncProgress { bytes_done, bytes_total, eta } = now;
            let eta = eta.unwrap_or_default();
            info!(shard = %self.shard, bytes_done, bytes_total, ?eta, "resync under way");
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
const fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_rate_so_far() {
        let second = Duration::from_secs(1);
        let quarter = ResyncProgress::new(100, 400, second);
        assert_eq!(quarter.eta, Some(3 * second));
        assert_eq!(ResyncProgress::new(0, 400, second).eta, None);
        let more_than_thought = ResyncProgress::new(500, 400, second);
        assert_eq!(
            (more_than_thought.bytes_done, more_than_thought.eta),
            (400, Some(Duration::ZERO))
        );
    }

    #[test]
    fn a_meter_shows_the_resync_under_way_and_only_that() {
        let meter = Meter::new(ShardId(0));
        let shown = meter.shown();
        assert_eq!(*shown.borrow(), None);
        meter.begin();
        meter.expect(1000);
        meter.found(300);
        meter.stored(1, 200);
        let now = shown.borrow().unwrap();
        assert_eq!((now.bytes_done, now.bytes_total), (500, 1000));
        // Measured anew: what is done stays done.
        meter.expect(100);
        assert_eq!(shown.borrow().unwrap().bytes_total, 600);
        let total = meter.end();
        assert_eq!((total.bytes, total.received), (500, 200));
        assert_eq!(*shown.borrow(), None);
    }
}
