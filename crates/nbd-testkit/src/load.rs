//! A load whose every answer is held against what may legally be on the volume.
//!
//! Several threads, each with one connection to some node. A thread owns a region of the volume and
//! keeps account of each of its sectors (`region`); all threads write and read a shared region,
//! whose sectors' histories are checked in the end ([`crate::history`]). A thread keeps several
//! requests of all kinds under way. When its node is ended it connects to another; what was under
//! way may have happened, may happen later, or never: a client of NBD cannot know.
//!
//! A failure is: content that cannot be there, an error reply, a connection lost although its node
//! was not ended, no answer within [`ANSWER_MAX`].

mod region;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::client::{ClientError, NbdClient};
use crate::history;
use crate::server::Target;

use self::region::{Region, SECTOR, value_in};
use self::worker::Worker;

/// Time for an answer. Above any stall that faults on purpose cause, full outages too.
pub const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Bytes read at once when everything is verified.
const VERIFY_BYTES: usize = 1 << 20;

/// What a [`Load`] is to be.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The volume's name. It must be empty and large enough.
    pub volume: String,
    /// Threads, each with a connection.
    pub threads: usize,
    /// Requests under way on each connection.
    pub depth: usize,
    /// Bytes that each thread owns, a multiple of 4096.
    pub region_bytes: usize,
    /// Sectors that all threads share.
    pub shared_sectors: usize,
    /// Requests a second of each thread at most.
    pub pace: u32,
    /// Where the threads' random choices come from.
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            volume: "load".to_owned(),
            threads: 4,
            depth: 8,
            region_bytes: 2 << 20,
            shared_sectors: 48,
            pace: 400,
            seed: 1,
        }
    }
}

impl LoadOptions {
    /// Bytes that the volume must have.
    pub const fn volume_bytes(&self) -> usize {
        (self.region_bytes * self.threads + self.shared_sectors * SECTOR).next_multiple_of(4096)
    }

    const fn shared_offset(&self) -> usize {
        self.region_bytes * self.threads
    }
}

/// A time without any answer although requests were under way.
#[derive(Debug, Clone)]
pub struct Stall {
    /// The node attached to when it ended.
    pub node: String,
    /// Whether the connection was lost and made anew in it.
    pub reconnected: bool,
    /// When it began.
    pub begin: Instant,
    /// When it ended.
    pub end: Instant,
}

impl Stall {
    /// How long it was.
    pub fn length(&self) -> Duration {
        self.end - self.begin
    }
}

/// What the threads of a load share.
#[derive(Debug)]
struct Shared {
    options: LoadOptions,
    targets: Vec<Target>,
    /// Times in histories are nanoseconds since this.
    epoch: Instant,
    stop: AtomicBool,
    failure: Mutex<Option<String>>,
    /// Answers so far, for each thread.
    answers: Vec<AtomicU64>,
}

impl Shared {
    fn fail(&self, reason: String) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(reason);
        self.stop.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A load that runs.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<Outcome>>,
}

/// What one thread comes back with.
#[derive(Debug)]
struct Outcome {
    region: Region,
    /// For each operation on a sector of the shared region: which, and what.
    history: Vec<(usize, history::Operation)>,
    stalls: Vec<Stall>,
    lost: u64,
    reconnects: u64,
}

/// A load that has ended without a failure, and what is known about the volume.
#[derive(Debug)]
pub struct Finished {
    /// Requests answered.
    pub operations: u64,
    /// Requests that were never answered, since their connection was lost.
    pub lost: u64,
    /// Connections made after the first.
    pub reconnects: u64,
    /// Every time of at least `worker::STALL_MIN` that a thread got no answer.
    pub stalls: Vec<Stall>,
    options: LoadOptions,
    epoch: Instant,
    regions: Vec<Region>,
    histories: Vec<Vec<history::Operation>>,
}

impl Load {
    /// Starts the threads; the first is attached to the first target, the second to the second, and
    /// so on around. Returns when all are attached.
    ///
    /// # Panics
    /// If one cannot attach.
    pub fn start(targets: &[Target], options: LoadOptions) -> Self {
        let shared = Arc::new(Shared {
            targets: targets.to_vec(),
            epoch: Instant::now(),
            stop: AtomicBool::new(false),
            failure: Mutex::default(),
            answers: (0..options.threads).map(|_| AtomicU64::new(0)).collect(),
            options,
        });
        let worker = |number| Worker::start(number, Arc::clone(&shared));
        let workers: Vec<Worker> = (0..shared.options.threads).map(worker).collect();
        let threads = workers.into_iter().map(|worker| thread::spawn(move || worker.run()));
        Self { threads: threads.collect(), shared }
    }

    /// Why the load has failed, if it has.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure()
    }

    /// Answers so far, for each thread.
    pub fn answers(&self) -> Vec<u64> {
        self.shared.answers.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Waits until every thread has had `count` more answers.
    ///
    /// # Errors
    /// The load's failure; one that has had too few for [`ANSWER_MAX`].
    pub fn wait_for_answers(&self, count: u64) -> Result<(), String> {
        let (before, started) = (self.answers(), Instant::now());
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let now = self.answers();
            if now.iter().zip(&before).all(|(now, before)| *now >= before + count) {
                return Ok(());
            }
            if started.elapsed() > ANSWER_MAX {
                return Err(format!(
                    "too few answers in {ANSWER_MAX:?}: from {before:?} to {now:?}"
                ));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Lets every request come to its end and stops.
    ///
    /// # Errors
    /// The first failure of any thread.
    ///
    /// # Panics
    /// If a thread did.
    pub fn stop(self) -> Result<Finished, String> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let outcomes: Vec<Outcome> = self
            .threads
            .into_iter()
            .map(|thread| thread.join().expect("a thread of the load"))
            .collect();
        if let Some(failure) = self.shared.failure() {
            return Err(failure);
        }
        let answers = self.shared.answers.iter().map(|count| count.load(Ordering::Relaxed));
        let options = self.shared.options.clone();
        let mut finished = Finished {
            operations: answers.sum(),
            lost: 0,
            reconnects: 0,
            stalls: Vec::new(),
            epoch: self.shared.epoch,
            regions: Vec::new(),
            histories: vec![Vec::new(); options.shared_sectors],
            options,
        };
        for outcome in outcomes {
            finished.lost += outcome.lost;
            finished.reconnects += outcome.reconnects;
            finished.stalls.extend(outcome.stalls);
            finished.regions.push(outcome.region);
            for (sector, operation) in outcome.history {
                finished.histories[sector].push(operation);
            }
        }
        Ok(finished)
    }
}

impl Finished {
    /// Reads everything through one node and holds it against the account.
    ///
    /// # Errors
    /// What is there and cannot be; a read that fails.
    pub fn verify(&mut self, target: &Target) -> Result<(), String> {
        let explain = |error: ClientError| format!("verify through {}: {error}", target.name());
        let mut client =
            NbdClient::connect(target.address(), &self.options.volume).map_err(explain)?;
        for region in &mut self.regions {
            let mut at = region.offset();
            while at < region.end() {
                let len = VERIFY_BYTES.min(region.end() - at);
                let content = client.read(at as u64, len).map_err(explain)?;
                region
                    .check_all(at, &content)
                    .map_err(|wrong| format!("verify through {}: {wrong}", target.name()))?;
                at += len;
            }
        }
        let start = nanoseconds(self.epoch);
        let shared = self.options.shared_sectors * SECTOR;
        let offset = self.options.shared_offset();
        let content = client.read(offset as u64, shared).map_err(explain)?;
        for (sector, content) in content.chunks_exact(SECTOR).enumerate() {
            let value = value_in(offset / SECTOR + sector, content)?;
            let end = Some(nanoseconds(self.epoch));
            let read = history::Operation { write: false, value, start, end };
            self.histories[sector].push(read);
        }
        Ok(())
    }

    /// Checks that each sector of the shared region was linearizable, and gives the number of
    /// operations that went into it.
    ///
    /// # Errors
    /// The first sector that was not.
    pub fn check_history(&self) -> Result<usize, String> {
        for (sector, operations) in self.histories.iter().enumerate() {
            history::check(0, operations).map_err(|violation| {
                format!("sector {sector} of the shared region: {violation}; {operations:?}")
            })?;
        }
        Ok(self.histories.iter().map(Vec::len).sum())
    }
}

/// Time since `epoch`, in nanoseconds, never 0.
fn nanoseconds(epoch: Instant) -> u64 {
    u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
}
