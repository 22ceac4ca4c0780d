//! The checkpoint thread: owner of the store's home. It moves data from the log to its home, takes
//! over what peers have sent, keeps a prefilled log segment at hand, and refreshes the view of free
//! space.
//!
//! It runs a checkpoint when enough log has gathered, when dirty data has waited for
//! [`DIRTY_AGE_MAX`], when somebody needs one (the log is full, a write looks for room, shutdown).
//! Jobs ([`CheckpointHandle::write_chunks`] and the like) are carried out in their order as soon as
//! no checkpoint is under way, and never keep one from starting for longer than [`JOBS_PER_TURN`].
//! Otherwise it sleeps.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nbd_log::log::SegmentPool;
use nbd_shard::resync::Absent;
use nbd_shard::{Checkpointed, InstallPlan};
use nbd_store::{
    CheckpointError, CheckpointReport, Checkpointer, ChunkImage, DamagedChunk, FormError,
    Formation, ReceiveError, SpaceGauge,
};
use nbd_topology::{LogIndex, NodeName, ShardId};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::failure::{FailOnPanic, Failure};
use crate::group_task::GroupHandle;
use crate::metrics::CheckpointMetrics;

/// Longest time that data stays only in the log while nothing else asks for a checkpoint. Bounds
/// the replay after a crash of a lightly used node.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(30);

/// Time between looks at the log's fill and the disk's free space.
const POLL: Duration = Duration::from_millis(200);

/// Wait after a checkpoint that found no room, before the next try.
const NO_SPACE_WAIT: Duration = Duration::from_secs(1);

/// Jobs that may wait. One holds up to 8 MiB of a peer's data, so this many are 64 MiB; who has
/// more waits with it.
const JOBS_MAX: usize = 8;

/// Jobs carried out before the thread looks again whether it is time for a checkpoint.
const JOBS_PER_TURN: usize = 4;

/// Damaged chunks found by checkpoints that may wait for their repair. Those past it are found
/// again by the scrub.
pub(crate) const DAMAGED_MAX: usize = 1024;

/// Why a job was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError<E: fmt::Debug + fmt::Display> {
    /// The thread has ended: the node stops, or has failed.
    #[error("the store's thread has ended")]
    Stopped,
    /// The store turned it down.
    #[error("{0}")]
    Refused(E),
}

type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// Something for the owner of the store to do.
enum Work {
    Form(ShardId, Box<Formation>, Reply<(), FormError>),
    WriteChunks(ShardId, LogIndex, Vec<ChunkImage>, Reply<(), ReceiveError>),
    RemoveAbsent(ShardId, Absent, Reply<u64, ReceiveError>),
    Install(ShardId, Box<InstallPlan>, Reply<(), ReceiveError>),
    Replace(ShardId, Box<ChunkImage>, Reply<bool, ReceiveError>),
}

struct Job {
    work: Work,
    _permit: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Wish {
    /// Number of the newest checkpoint that somebody waits for.
    wanted: u64,
    stop: bool,
    /// At most [`JOBS_MAX`].
    jobs: VecDeque<Job>,
    /// Nothing will be done any more.
    ended: bool,
}

struct Shared {
    wish: Mutex<Wish>,
    wake: Condvar,
    /// Number of wishes met by a finished attempt, successful or not.
    done: watch::Sender<u64>,
    /// Room for jobs.
    room: Arc<Semaphore>,
}

/// Asks for checkpoints and gives jobs.
#[derive(Clone)]
pub(crate) struct CheckpointHandle {
    shared: Arc<Shared>,
}

impl fmt::Debug for CheckpointHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointHandle").finish_non_exhaustive()
    }
}

impl CheckpointHandle {
    pub(crate) fn new() -> Self {
        let shared = Shared {
            wish: Mutex::default(),
            wake: Condvar::new(),
            done: watch::Sender::new(0),
            room: Arc::new(Semaphore::new(JOBS_MAX)),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Asks for a checkpoint soon, without waiting for it.
    pub(crate) fn nudge(&self) {
        let mut wish = self.shared.wish.lock();
        if wish.wanted == *self.shared.done.borrow() {
            wish.wanted += 1;
            self.shared.wake.notify_one();
        }
    }

    /// Waits for an attempt that began after this call. Returns as well when the thread has ended.
    pub(crate) async fn attempt(&self) {
        let mut done = self.shared.done.subscribe();
        let target = {
            let mut wish = self.shared.wish.lock();
            wish.wanted += 1;
            self.shared.wake.notify_one();
            wish.wanted
        };
        let _ = done.wait_for(|done| *done >= target).await;
    }

    /// Ends the thread after one last checkpoint.
    pub(crate) fn stop(&self) {
        self.shared.wish.lock().stop = true;
        self.shared.wake.notify_one();
    }

    /// Makes a shard that was never formed here one of a group, durably.
    pub(crate) async fn form(
        &self,
        shard: ShardId,
        formation: Formation,
    ) -> Result<(), JobError<FormError>> {
        self.run(|reply| Work::Form(shard, Box::new(formation), reply)).await
    }

    /// Takes over chunks of a peer, durably, of which its checkpoint covers entries up to `upto`.
    pub(crate) async fn write_chunks(
        &self,
        shard: ShardId,
        upto: LogIndex,
        images: Vec<ChunkImage>,
    ) -> Result<(), JobError<ReceiveError>> {
        self.run(|reply| Work::WriteChunks(shard, upto, images, reply)).await
    }

    /// Removes chunks that a peer does not have. Returns how many.
    pub(crate) async fn remove_absent(
        &self,
        shard: ShardId,
        absent: Absent,
    ) -> Result<u64, JobError<ReceiveError>> {
        self.run(|reply| Work::RemoveAbsent(shard, absent, reply)).await
    }

    /// Switches the shard to a snapshot, durably.
    pub(crate) async fn install(
        &self,
        shard: ShardId,
        plan: InstallPlan,
    ) -> Result<(), JobError<ReceiveError>> {
        self.run(|reply| Work::Install(shard, Box::new(plan), reply)).await
    }

    /// Puts a peer's copy of a chunk in the place of ours, if that is of the same version. Returns
    /// whether it was.
    pub(crate) async fn replace(
        &self,
        shard: ShardId,
        image: ChunkImage,
    ) -> Result<bool, JobError<ReceiveError>> {
        self.run(|reply| Work::Replace(shard, Box::new(image), reply)).await
    }

    async fn run<T, E: fmt::Debug + fmt::Display>(
        &self,
        work: impl FnOnce(Reply<T, E>) -> Work,
    ) -> Result<T, JobError<E>> {
        let room = Arc::clone(&self.shared.room);
        let permit = room.acquire_owned().await.map_err(|_| JobError::Stopped)?;
        let (reply, answer) = oneshot::channel();
        {
            let mut wish = self.shared.wish.lock();
            if wish.ended {
                return Err(JobError::Stopped);
            }
            wish.jobs.push_back(Job { work: work(reply), _permit: permit });
            self.shared.wake.notify_one();
        }
        answer.await.map_err(|_| JobError::Stopped)?.map_err(JobError::Refused)
    }
}

/// Lets go whoever waits for an attempt or a job when the thread ends, in whatever way.
struct Finished(CheckpointHandle);

impl Drop for Finished {
    fn drop(&mut self) {
        let shared = &self.0.shared;
        shared.room.close();
        let jobs = {
            let mut wish = shared.wish.lock();
            wish.ended = true;
            std::mem::take(&mut wish.jobs)
        };
        drop(jobs);
        shared.done.send_replace(u64::MAX);
    }
}

/// What the thread owns and uses.
pub(crate) struct CheckpointThread {
    pub(crate) checkpointer: Checkpointer,
    pub(crate) segments: Arc<SegmentPool>,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) groups: Vec<GroupHandle>,
    pub(crate) handle: CheckpointHandle,
    /// Where damaged chunks go that a checkpoint came upon.
    pub(crate) damaged: mpsc::Sender<DamagedChunk>,
    pub(crate) failure: Failure,
}

/// What there is to do.
struct Turn {
    wanted: u64,
    stop: bool,
    jobs: Vec<Job>,
}

impl CheckpointThread {
    /// Starts the thread. It is named after the node, which log lines may show.
    pub(crate) fn spawn(self, node: &NodeName) -> std::io::Result<thread::JoinHandle<()>> {
        let name = format!("{node}:checkpoint");
        // Here: what this thread registers may count for its own service only.
        let metrics = CheckpointMetrics::new();
        thread::Builder::new().name(name).spawn(move || self.run(&metrics))
    }

    fn run(mut self, metrics: &CheckpointMetrics) {
        let _guard = FailOnPanic::new(&self.failure, "checkpoint thread");
        let _finished = Finished(self.handle.clone());
        metrics.gauges(&self.segments, &self.space);
        let mut dirty_since = None;
        loop {
            let Turn { wanted, stop, jobs } = self.wait();
            if self.failure.is_set() {
                return;
            }
            prepare_segment(&self.segments);
            for job in jobs {
                self.carry_out(job);
            }
            if let Err(error) = self.space.refresh() {
                warn!(%error, "cannot see how much room the disk has");
            }
            let asked = wanted > *self.handle.shared.done.borrow();
            if self.checkpointer.dirty_log_bytes() == 0 {
                dirty_since = None;
            } else {
                dirty_since.get_or_insert_with(Instant::now);
            }
            let aged = dirty_since.is_some_and(|since: Instant| since.elapsed() >= DIRTY_AGE_MAX);
            if asked || stop || aged || self.checkpointer.should_run() {
                dirty_since = None;
                let room = self.checkpoint(metrics);
                self.handle.shared.done.send_replace(wanted);
                if !room && !stop {
                    thread::sleep(NO_SPACE_WAIT);
                }
            }
            metrics.gauges(&self.segments, &self.space);
            if stop {
                return;
            }
        }
    }

    /// Sleeps until there may be something to do.
    fn wait(&self) -> Turn {
        let mut wish = self.handle.shared.wish.lock();
        let is_idle = wish.wanted == *self.handle.shared.done.borrow();
        if is_idle && !wish.stop && wish.jobs.is_empty() {
            self.handle.shared.wake.wait_for(&mut wish, POLL);
        }
        let count = wish.jobs.len().min(JOBS_PER_TURN);
        let jobs = wish.jobs.drain(..count).collect();
        Turn { wanted: wish.wanted, stop: wish.stop, jobs }
    }

    fn carry_out(&mut self, job: Job) {
        let store = &mut self.checkpointer;
        match job.work {
            Work::Form(shard, formation, reply) => {
                let done = store.form(shard, &formation);
                if let Err(FormError::Store(error)) = &done {
                    self.failed(error, "forming a shard");
                }
                let _ = reply.send(done);
            }
            Work::WriteChunks(shard, upto, images, reply) => {
                let done = store.write_chunks(shard, upto, images);
                self.received(done, reply, "taking over chunks");
            }
            Work::RemoveAbsent(shard, Absent { upto, after, next, present }, reply) => {
                let done = store.remove_absent(shard, upto, after, next, &present);
                self.received(done, reply, "removing chunks");
            }
            Work::Install(shard, plan, reply) => {
                let done = store.install(shard, &plan.snapshot, plan.hard_state);
                self.received(done, reply, "installing a snapshot");
            }
            Work::Replace(shard, image, reply) => {
                let done = store.replace_chunk(shard, &image);
                self.received(done, reply, "repairing a chunk");
            }
        }
    }

    fn received<T>(
        &self,
        done: Result<T, ReceiveError>,
        reply: Reply<T, ReceiveError>,
        action: &'static str,
    ) {
        if let Err(ReceiveError::Store(error)) = &done {
            self.failed(error, action);
        }
        let _ = reply.send(done);
    }

    fn failed(&self, error: &CheckpointError, action: &'static str) {
        if error.is_fatal() {
            self.failure.set(format!("{action} failed: {error}"));
        }
    }

    /// Runs one checkpoint. `false` when the disk has no room for it.
    fn checkpoint(&mut self, metrics: &CheckpointMetrics) -> bool {
        let started = Instant::now();
        let segments = Arc::clone(&self.segments);
        // The log goes on filling meanwhile, and must not have to wait for a segment.
        let mut pace = |_| prepare_segment(&segments);
        match self.checkpointer.run_paced(&mut pace) {
            Ok(report) => {
                metrics.finished(started.elapsed(), &report);
                debug!(?report, elapsed = ?started.elapsed(), "checkpoint");
                self.announce(&report);
                true
            }
            Err(CheckpointError::NoSpace) => {
                info!("no room to move data out of the log: writes to new places are refused");
                false
            }
            Err(error) => {
                self.failure.set(format!("checkpoint failed: {error}"));
                true
            }
        }
    }

    /// Tells the groups what their log is no longer needed for, and the repair what it is.
    fn announce(&self, report: &CheckpointReport) {
        for group in &self.groups {
            let shard = group.shard();
            if !report.applied.contains_key(&shard) {
                continue;
            }
            match group.reader().snapshot() {
                Ok(at) => {
                    let first_kept = self.segments.first_kept(shard);
                    group.checkpointed(Checkpointed {
                        applied: at.applied,
                        term: at.applied_term,
                        first_kept: first_kept.unwrap_or_else(|| at.applied.next()),
                        holds_up_log: self.segments.is_held_up_by(shard),
                    });
                }
                // The next checkpoint says it again.
                Err(error) => warn!(%shard, %error, "cannot look up the checkpoint"),
            }
        }
        for damaged in &report.damaged {
            if self.damaged.try_send(*damaged).is_err() {
                debug!(?damaged, "left for the scrub to find");
            }
        }
    }
}

/// Keeps one spare segment prefilled, so that the log thread rarely has to.
fn prepare_segment(segments: &SegmentPool) {
    match segments.prepare_spare() {
        Ok(true) => debug!("prefilled a log segment"),
        Ok(false) => {}
        // Not fatal: the log thread meets the same error if it ever needs the segment.
        Err(error) => warn!(%error, "cannot prepare a log segment"),
    }
}
