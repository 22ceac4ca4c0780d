//! The checkpoint thread: moves data from the log to its home, keeps a prefilled log segment at
//! hand, and refreshes the view of free space.
//!
//! It runs a checkpoint when enough log has gathered, when dirty data has waited for
//! [`DIRTY_AGE_MAX`], when somebody needs one (the log is full, a write looks for room, shutdown),
//! and otherwise sleeps.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nbd_log::log::SegmentPool;
use nbd_store::{CheckpointError, Checkpointer, SpaceGauge};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;
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

#[derive(Debug, Default)]
struct Wish {
    /// Number of the newest checkpoint that somebody waits for.
    wanted: u64,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    wish: Mutex<Wish>,
    wake: Condvar,
    /// Number of wishes met by a finished attempt, successful or not.
    done: watch::Sender<u64>,
}

/// Asks for checkpoints.
#[derive(Debug, Clone)]
pub(crate) struct CheckpointHandle {
    shared: Arc<Shared>,
}

impl CheckpointHandle {
    pub(crate) fn new() -> Self {
        let shared =
            Shared { wish: Mutex::default(), wake: Condvar::new(), done: watch::Sender::new(0) };
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
}

/// Lets go whoever waits for an attempt when the thread ends, in whatever way.
struct Finished(CheckpointHandle);

impl Drop for Finished {
    fn drop(&mut self) {
        self.0.shared.done.send_replace(u64::MAX);
    }
}

/// What the thread owns and uses.
pub(crate) struct CheckpointThread {
    pub(crate) checkpointer: Checkpointer,
    pub(crate) segments: Arc<SegmentPool>,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) groups: Vec<GroupHandle>,
    pub(crate) handle: CheckpointHandle,
    pub(crate) failure: Failure,
}

impl CheckpointThread {
    /// Starts the thread.
    pub(crate) fn spawn(self) -> std::io::Result<thread::JoinHandle<()>> {
        thread::Builder::new().name("checkpoint".into()).spawn(move || self.run())
    }

    fn run(mut self) {
        let _guard = FailOnPanic::new(&self.failure, "checkpoint thread");
        let _finished = Finished(self.handle.clone());
        let metrics = CheckpointMetrics::new();
        metrics.gauges(&self.segments, &self.space);
        let mut dirty_since = None;
        loop {
            let (wanted, stop) = self.wait();
            if self.failure.is_set() {
                return;
            }
            prepare_segment(&self.segments);
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
                let room = self.checkpoint(&metrics);
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
    fn wait(&self) -> (u64, bool) {
        let mut wish = self.handle.shared.wish.lock();
        if wish.wanted == *self.handle.shared.done.borrow() && !wish.stop {
            self.handle.shared.wake.wait_for(&mut wish, POLL);
        }
        (wish.wanted, wish.stop)
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
                for (shard, index) in &report.applied {
                    for group in self.groups.iter().filter(|group| group.shard() == *shard) {
                        group.compacted(*index);
                    }
                }
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
