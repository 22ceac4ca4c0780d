//! The log thread: the only writer of the node's log and, with the checkpointer, the only place
//! that waits for the disk.
//!
//! It drains its queue, joins what it finds into one durable write for all groups (group commit),
//! and tells each group what is now persisted. While the log fills faster than checkpoints empty
//! it, the thread adds a pause that grows with the fill, so that writers slow down smoothly and
//! never stop short.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nbd_log::log::{LogWriter, SegmentPool};
use nbd_service::trace::Span;
use nbd_shard::log_write::{AppendTo, Queued, take_copies, take_urgent, write_first};
use nbd_shard::{LogTail, LogWrite, Persisted};
use nbd_topology::{LogIndex, NodeName, ShardId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::checkpoint_thread::CheckpointHandle;
use crate::failure::{FailOnPanic, Failure};
use crate::group_trace;
use crate::limits::{LOG_BATCH_BYTES_MAX, LOG_QUEUE_MAX};
use crate::metrics::LogMetrics;

/// Longest pause between two log writes, however full the log. A writer always gets on.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Share of the log's room for ordinary writes from which on the thread pauses. Below, checkpoints
/// keep up.
const PAUSE_FILL: f64 = 0.8;

/// Time between looks at a log that has no room at all.
const FULL_POLL: Duration = Duration::from_millis(5);

/// Log writes of one group: what to persist and whom to tell.
#[derive(Debug)]
pub(crate) struct LogJob {
    pub(crate) shard: ShardId,
    pub(crate) write: LogWrite,
    pub(crate) queued_at: Instant,
    pub(crate) persisted: mpsc::Sender<Persisted>,
    /// The `append` of each traced entry in it: ends when it is durable.
    pub(crate) traced: Vec<Span>,
}

impl Queued for LogJob {
    fn shard(&self) -> ShardId {
        self.shard
    }

    fn write(&self) -> &LogWrite {
        &self.write
    }
}

/// Sends work to the log thread. The thread ends when all handles are dropped.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle {
    jobs: SyncSender<LogJob>,
    segments: Arc<SegmentPool>,
}

impl LogHandle {
    /// Queues a log write. When the thread has failed, the write is dropped: the node is stopping.
    ///
    /// # Panics
    /// If the queue is full: every group bounds what it has in flight.
    pub(crate) fn submit(&self, job: LogJob) {
        if let Err(TrySendError::Full(job)) = self.jobs.try_send(job) {
            panic!("the group of shard {} broke its bound on log writes", job.shard);
        }
    }

    /// Entries of `shard` above this index are worth keeping for its followers.
    pub(crate) fn retain(&self, shard: ShardId, above: LogIndex) {
        self.segments.retain(shard, above);
    }

    /// What the log need not keep of `shard`.
    pub(crate) fn tail_begins(&self, shard: ShardId, tail: LogTail) {
        self.segments.tail_begins(shard, tail.applied, tail.from);
    }
}

/// Starts the thread. It is named after the node, which log lines may show.
pub(crate) fn spawn(
    node: &NodeName,
    writer: LogWriter,
    segments: Arc<SegmentPool>,
    checkpoints: CheckpointHandle,
    failure: Failure,
    abandon: CancellationToken,
) -> std::io::Result<(LogHandle, thread::JoinHandle<()>)> {
    let (jobs, queue) = sync_channel(LOG_QUEUE_MAX);
    let metrics = LogMetrics::new();
    let handle = LogHandle { jobs, segments: Arc::clone(&segments) };
    let worker = LogThread { writer, segments, checkpoints, failure, abandon, metrics };
    let name = format!("{node}:log");
    let thread = thread::Builder::new().name(name).spawn(move || worker.run(&queue))?;
    Ok((handle, thread))
}

struct LogThread {
    writer: LogWriter,
    segments: Arc<SegmentPool>,
    checkpoints: CheckpointHandle,
    failure: Failure,
    /// Cancelled when the process will not wait any longer.
    abandon: CancellationToken,
    metrics: LogMetrics,
}

impl LogThread {
    fn run(mut self, queue: &Receiver<LogJob>) {
        _ = self.serve(queue);
    }

    /// Writes what comes, until all handles are dropped or the node stops: then `None`.
    fn serve(&mut self, queue: &Receiver<LogJob>) -> Option<()> {
        let _guard = FailOnPanic::new(&self.failure, "log thread");
        let mut batch = Vec::new();
        loop {
            batch.push(queue.recv().ok()?);
            let mut bytes = batch[0].write.data_bytes();
            while bytes < LOG_BATCH_BYTES_MAX {
                let Ok(job) = queue.try_recv() else { break };
                bytes += job.write.data_bytes();
                batch.push(job);
            }
            let (started, count) = (Instant::now(), batch.len());
            for job in &batch {
                self.metrics.waited(started.saturating_duration_since(job.queued_at));
            }
            loop {
                let wrote = self.write(&mut batch, LogWriter::append_ordinary)?;
                if batch.is_empty() {
                    break;
                }
                if !wrote {
                    self.wait_for_room(&mut batch, queue)?;
                }
            }
            self.metrics.write(started.elapsed(), bytes, count);
            self.pause(started.elapsed());
        }
    }

    /// A while in which a checkpoint may free a segment. What comes meanwhile waits behind `batch`,
    /// unless it is urgent. `None` when the node stops.
    fn wait_for_room(&mut self, batch: &mut Vec<LogJob>, queue: &Receiver<LogJob>) -> Option<()> {
        debug!("waiting for a segment");
        self.checkpoints.nudge();
        if self.failure.is_set() || self.abandon.is_cancelled() {
            return None;
        }
        batch.extend(queue.try_iter().take(LOG_QUEUE_MAX));
        let mut urgent = take_urgent(batch, &self.segments);
        let wrote = self.write(&mut urgent, LogWriter::append)?;
        batch.splice(..0, urgent);
        if !wrote {
            for job in take_copies(batch) {
                let _ = job.persisted.blocking_send(Persisted::given_up());
            }
            thread::sleep(FULL_POLL);
        }
        Some(())
    }

    /// Writes as many of the first jobs as there is room for, and tells their groups. False if
    /// there is none; `None` when the disk failed, after the node was told to stop.
    fn write(&mut self, jobs: &mut Vec<LogJob>, append: AppendTo) -> Option<bool> {
        let started = jobs.iter().any(|job| !job.traced.is_empty()).then(Instant::now);
        let written = match write_first(&mut self.writer, append, jobs) {
            Ok(written) => written,
            Err(error) => {
                self.failure.set(format!("cannot write the log: {error}"));
                return None;
            }
        };
        let (now, wrote) = (Instant::now(), !written.is_empty());
        let batch = started.map(|started| {
            let bytes: usize = written.iter().map(|(job, _)| job.write.data_bytes()).sum();
            (started, bytes, written.len())
        });
        for (job, persisted) in written {
            self.metrics.append(now.saturating_duration_since(job.queued_at));
            // A group that is gone needs no answer; a live one never waits for this thread.
            let _ = job.persisted.blocking_send(persisted);
            if let Some((started, bytes, jobs)) = batch
                && !job.traced.is_empty()
            {
                group_trace::written(job.traced, (started, now), bytes, jobs);
            }
        }
        Some(wrote)
    }

    /// Slows the writers in proportion to how little room is left: not at all up to [`PAUSE_FILL`],
    /// then by a growing multiple of the time that the write itself took.
    fn pause(&self, write_time: Duration) {
        let fill = float(self.segments.live_bytes()) / float(self.segments.ordinary_bytes_max());
        if fill <= PAUSE_FILL {
            return;
        }
        self.checkpoints.nudge();
        let factor = (fill - PAUSE_FILL) / (1.0 - fill).max(0.01);
        thread::sleep(write_time.mul_f64(factor).min(PAUSE_MAX));
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio of sizes needs no last digit")]
const fn float(bytes: u64) -> f64 {
    bytes as f64
}
