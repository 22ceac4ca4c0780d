//! The one way in which a node stops by itself: its disk cannot be trusted any more.
//!
//! A failed write or sync is never retried. The first failure is kept, every part of the node can
//! see it, and the process ends with it, so that nothing is served from a disk in doubt.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::error;

/// Set once, by the first part that fails; seen by all.
#[derive(Debug, Clone)]
pub struct Failure {
    reason: Arc<watch::Sender<Option<String>>>,
}

impl Default for Failure {
    fn default() -> Self {
        Self { reason: Arc::new(watch::Sender::new(None)) }
    }
}

impl Failure {
    /// Records `reason` unless an earlier one is there.
    pub(crate) fn set(&self, reason: String) {
        self.reason.send_if_modified(|current| {
            if current.is_some() {
                return false;
            }
            error!(%reason, "this node stops serving");
            *current = Some(reason);
            true
        });
    }

    /// Whether the node has failed.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.reason.borrow().is_some()
    }

    /// The reason, once there is one.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.reason.borrow().clone()
    }

    /// Waits until the node has failed and gives the reason.
    pub async fn wait(&self) -> String {
        let mut reason = self.reason.subscribe();
        match reason.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => unreachable!("the sender is held by self"),
        }
    }
}

/// Makes a panic of the thread or task that holds it the node's failure: what panicked cannot be
/// done without, and nobody must wait for it.
#[derive(Debug)]
pub(crate) struct FailOnPanic {
    failure: Failure,
    who: &'static str,
}

impl FailOnPanic {
    pub(crate) fn new(failure: &Failure, who: &'static str) -> Self {
        Self { failure: failure.clone(), who }
    }
}

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failure.set(format!("the {} panicked", self.who));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_and_the_first_reason_stays() {
        let failure = Failure::default();
        drop(FailOnPanic::new(&failure, "calm thread"));
        assert!(!failure.is_set());
        let held = failure.clone();
        let thread = std::thread::spawn(move || {
            let _guard = FailOnPanic::new(&held, "log thread");
            panic!("as the test wants");
        });
        assert!(thread.join().is_err());
        failure.set("later".to_owned());
        assert_eq!(failure.reason().as_deref(), Some("the log thread panicked"));
    }
}
