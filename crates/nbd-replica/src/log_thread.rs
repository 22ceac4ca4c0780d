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

use nbd_consensus::Append;
use nbd_log::checksum::crc32c;
use nbd_log::log::{
    AppendError, EntryRecord, HardState, LogPosition, LogWriter, Record, SegmentPool,
};
use nbd_shard::{Persisted, log_kind};
use nbd_store::EntryPlace;
use nbd_topology::{LogIndex, ReplicaId, ShardId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::checkpoint_thread::CheckpointHandle;
use crate::failure::{FailOnPanic, Failure};
use crate::limits::{LOG_BATCH_BYTES_MAX, LOG_QUEUE_MAX};
use crate::metrics::LogMetrics;

/// Longest pause between two log writes, however full the log. A writer always gets on.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Share of the log's size limit from which on the thread pauses. Below, checkpoints keep up.
const PAUSE_FILL: f64 = 0.6;

/// Time between looks at a log that has no room at all.
const FULL_POLL: Duration = Duration::from_millis(5);

/// Log writes of one group: what to persist and whom to tell.
#[derive(Debug)]
pub(crate) struct AppendJob {
    pub(crate) shard: ShardId,
    pub(crate) append: Append,
    pub(crate) queued_at: Instant,
    pub(crate) persisted: mpsc::Sender<Persisted>,
}

/// Sends work to the log thread. The thread ends when all handles are dropped.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle {
    jobs: SyncSender<AppendJob>,
    segments: Arc<SegmentPool>,
}

impl LogHandle {
    /// Queues a log write. When the thread has failed, the write is dropped: the node is stopping.
    ///
    /// # Panics
    /// If the queue is full: every group bounds what it has in flight.
    pub(crate) fn submit(&self, job: AppendJob) {
        if let Err(TrySendError::Full(job)) = self.jobs.try_send(job) {
            panic!("the group of shard {} broke its bound on log writes", job.shard);
        }
    }

    /// Entries of `shard` above this index are worth keeping for its followers.
    pub(crate) fn retain(&self, shard: ShardId, above: LogIndex) {
        self.segments.retain(shard, above);
    }
}

/// Starts the thread.
pub(crate) fn spawn(
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
    let thread = thread::Builder::new().name("log".into()).spawn(move || worker.run(&queue))?;
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
    fn run(mut self, queue: &Receiver<AppendJob>) {
        let _guard = FailOnPanic::new(&self.failure, "log thread");
        let mut batch = Vec::new();
        loop {
            let Ok(job) = queue.recv() else { return };
            batch.push(job);
            let mut bytes = append_bytes(&batch[0].append);
            while bytes < LOG_BATCH_BYTES_MAX {
                let Ok(job) = queue.try_recv() else { break };
                bytes += append_bytes(&job.append);
                batch.push(job);
            }
            let started = Instant::now();
            let Some(positions) = self.write(&batch) else { return };
            self.metrics.write(started.elapsed(), bytes, batch.len());
            self.acknowledge(&mut batch, positions);
            self.pause(started.elapsed());
        }
    }

    /// Writes one batch durably. `None` when the disk failed, after the node was told to stop.
    fn write(&mut self, batch: &[AppendJob]) -> Option<Vec<LogPosition>> {
        let records = records(batch);
        if records.is_empty() {
            // Only messages that waited for earlier writes, and those are done.
            return Some(Vec::new());
        }
        loop {
            match self.writer.append(&records) {
                Ok(positions) => return Some(positions),
                // Nothing was written: a checkpoint frees a segment.
                Err(error @ (AppendError::Full | AppendError::NoSpace)) => {
                    debug!(%error, "waiting for a segment");
                    self.checkpoints.nudge();
                    if self.failure.is_set() || self.abandon.is_cancelled() {
                        return None;
                    }
                    thread::sleep(FULL_POLL);
                }
                Err(error) => {
                    self.failure.set(format!("cannot write the log: {error}"));
                    return None;
                }
            }
        }
    }

    fn acknowledge(&self, batch: &mut Vec<AppendJob>, positions: Vec<LogPosition>) {
        let now = Instant::now();
        let mut positions = positions.into_iter();
        for job in batch.drain(..) {
            if job.append.hard_state.is_some() {
                positions.next();
            }
            let place = |(entry, position): (&nbd_consensus::Entry, LogPosition)| EntryPlace {
                index: entry.index,
                term: entry.term,
                kind: log_kind(entry.kind),
                position,
                len: entry.data.len(),
                crc: crc32c(&entry.data),
            };
            let places = job.append.entries.iter().zip(positions.by_ref()).map(place).collect();
            self.metrics.append(now.saturating_duration_since(job.queued_at));
            // A group that is gone needs no answer; a live one never waits for this thread.
            let _ = job.persisted.blocking_send(Persisted { ready: job.append.ready, places });
        }
    }

    /// Slows the writers in proportion to how little room is left: not at all up to [`PAUSE_FILL`],
    /// then by a growing multiple of the time that the write itself took.
    fn pause(&self, write_time: Duration) {
        let fill = float(self.segments.live_bytes()) / float(self.segments.bytes_max());
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

fn append_bytes(append: &Append) -> usize {
    append.entries.iter().map(|entry| entry.data.len()).sum()
}

fn log_hard_state(state: &nbd_consensus::HardState) -> HardState {
    HardState { term: state.term, vote: state.vote.map_or(0, ReplicaId::get), commit: state.commit }
}

/// The log's records of a batch, in order: of each job its hard state, then its entries.
fn records(batch: &[AppendJob]) -> Vec<Record<'_>> {
    let mut records = Vec::with_capacity(batch.len() * 2);
    for job in batch {
        if let Some(state) = &job.append.hard_state {
            records.push(Record::HardState(job.shard, log_hard_state(state)));
        }
        records.extend(job.append.entries.iter().map(|entry| {
            Record::Entry(EntryRecord {
                shard: job.shard,
                index: entry.index,
                term: entry.term,
                kind: log_kind(entry.kind),
                data: &entry.data,
            })
        }));
    }
    records
}
