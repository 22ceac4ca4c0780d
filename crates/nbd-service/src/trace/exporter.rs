//! Sends spans that have ended, in batches.

use std::time::Duration;

use metrics::Counter;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter as OtlpExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Spans that may wait to be sent, about 2 MiB. A write through a load balancer makes some 20.
pub const QUEUE_SPANS_MAX: usize = 4096;

/// Spans sent at once.
const BATCH_SPANS_MAX: usize = 512;

/// How long the first span of a batch waits for others.
const GATHER_MAX: Duration = Duration::from_secs(1);

/// Time that a batch has to be sent.
const EXPORT_MAX: Duration = Duration::from_secs(5);

/// Makes an exporter, which connects when it first sends, and again whenever that is necessary.
pub(super) fn connect(
    endpoint: &str,
    resource: Resource,
) -> Result<OtlpExporter, ExporterBuildError> {
    let builder = OtlpExporter::builder().with_tonic();
    let mut exporter = builder.with_endpoint(endpoint).with_timeout(EXPORT_MAX).build()?;
    exporter.set_resource(&resource);
    Ok(exporter)
}

/// The task that sends.
pub(super) struct Task {
    pub(super) endpoint: String,
    pub(super) exporter: OtlpExporter,
    pub(super) spans: mpsc::Receiver<SpanData>,
    pub(super) exported: Counter,
    pub(super) dropped: Counter,
    /// Cancelled when what waits is to be sent, and nothing more.
    pub(super) stop: CancellationToken,
}

impl Task {
    /// Runs until the last tracer is dropped, or nothing is left to be sent behind the stop.
    pub(super) async fn run(mut self) {
        let mut is_failing = false;
        while let Some(batch) = self.batch().await {
            let count = batch.len() as u64;
            let sent = timeout(EXPORT_MAX, self.exporter.export(batch)).await;
            let error = match sent {
                Ok(Ok(())) => {
                    self.exported.increment(count);
                    if std::mem::take(&mut is_failing) {
                        info!(endpoint = self.endpoint, "traces are sent again");
                    }
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(late) => late.to_string(),
            };
            self.dropped.increment(count);
            if !std::mem::replace(&mut is_failing, true) {
                let endpoint = &self.endpoint;
                warn!(endpoint, error, "traces cannot be sent: dropping them until they can");
            }
            if self.stop.is_cancelled() {
                return;
            }
        }
    }

    /// The next spans to be sent. `None` if no more will come.
    async fn batch(&mut self) -> Option<Vec<SpanData>> {
        let mut batch = Vec::new();
        tokio::select! {
            count = self.spans.recv_many(&mut batch, BATCH_SPANS_MAX) => if count == 0 {
                return None;
            },
            () = self.stop.cancelled() => {
                self.spans.close();
                let count = self.spans.recv_many(&mut batch, BATCH_SPANS_MAX).await;
                return (count > 0).then_some(batch);
            }
        }
        let until = Instant::now() + GATHER_MAX;
        while batch.len() < BATCH_SPANS_MAX {
            let room = BATCH_SPANS_MAX - batch.len();
            tokio::select! {
                more = timeout_at(until, self.spans.recv_many(&mut batch, room)) => match more {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => break,
                },
                () = self.stop.cancelled() => break,
            }
        }
        Some(batch)
    }
}
