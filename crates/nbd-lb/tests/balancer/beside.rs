//! What goes on beside a test.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// Does something over and over beside a test, until it is told to stop.
pub(crate) struct Beside {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Beside {
    pub(crate) fn start(mut act: impl FnMut() + Send + 'static) -> Self {
        let (stop, rounds) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let shared = (stop.clone(), rounds.clone());
        let thread = thread::spawn(move || {
            while !shared.0.load(Ordering::Relaxed) {
                act();
                shared.1.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, rounds, thread: Some(thread) }
    }

    /// Rounds so far.
    pub(crate) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Stops it. Gives how many rounds there were, all of which went well.
    pub(crate) fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.rounds.load(Ordering::Relaxed)
    }
}
