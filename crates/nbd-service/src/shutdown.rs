//! Stopping: one token that every task watches, and one tracker that knows which still run.
//!
//! A service spawns every long-lived task through [`Shutdown::spawn`]. The owner (its `main`) waits
//! for a signal, or for a task to start the shutdown, and then drains with a deadline:
//!
//! ```text
//! signal, or a task's fatal error ─▶ start() ─▶ token cancelled
//!     ─▶ tasks finish what they hold and return ─▶ drain(deadline) sees the last of them go
//! ```

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

/// Handle on a process's shutdown; clones are the same shutdown.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tasks: TaskTracker,
}

/// Tasks that were still running when the deadline of [`Shutdown::drain`] passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{still_running} tasks were still running {deadline:?} after shutdown began")]
pub struct DrainTimeout {
    /// How many had not returned.
    pub still_running: usize,
    /// How long they had.
    pub deadline: Duration,
}

/// The signal that asked the process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: a supervisor's request.
    Terminate,
    /// SIGINT: Ctrl-C at a terminal.
    Interrupt,
}

impl Shutdown {
    /// A shutdown that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `task` until it returns; [`drain`](Self::drain) waits for it. The task itself watches
    /// [`token`](Self::token) and returns soon after it is cancelled.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// The token that is cancelled when shutdown begins. Its child tokens stop parts of the
    /// process.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Begins the shutdown. Any task may; doing it again changes nothing.
    pub fn start(&self) {
        self.token.cancel();
    }

    /// Whether the shutdown has begun.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Completes when the shutdown begins.
    pub fn started(&self) -> WaitForCancellationFutureOwned {
        self.token.clone().cancelled_owned()
    }

    /// Begins the shutdown if it has not begun, and waits until every spawned task has returned.
    ///
    /// # Errors
    /// [`DrainTimeout`] when some are still running after `deadline`; they go on until the process
    /// ends.
    pub async fn drain(&self, deadline: Duration) -> Result<(), DrainTimeout> {
        self.start();
        self.tasks.close();
        tokio::time::timeout(deadline, self.tasks.wait())
            .await
            .map_err(|_| DrainTimeout { still_running: self.tasks.len(), deadline })
    }
}

/// SIGTERM and SIGINT, one after the other as they come.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Installs the handlers, which stay: from now on neither signal ends the process by itself.
    ///
    /// # Errors
    /// When the operating system refuses a handler.
    pub fn install() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { terminate, interrupt })
    }

    /// Waits for the next one. Signals of one kind that come in quick succession may count as one.
    pub async fn next(&mut self) -> StopSignal {
        tokio::select! {
            _ = self.terminate.recv() => StopSignal::Terminate,
            _ = self.interrupt.recv() => StopSignal::Interrupt,
        }
    }
}

/// Waits for SIGTERM or SIGINT. The handlers are installed at the first poll, and stay: from then
/// on neither signal ends the process by itself.
///
/// # Errors
/// When the operating system refuses a handler.
pub async fn wait_for_signal() -> io::Result<StopSignal> {
    Ok(StopSignals::install()?.next().await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_waits_for_tasks_that_heed_the_token() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        let task = shutdown.spawn(async move {
            token.cancelled().await;
            7
        });
        assert!(!shutdown.has_started());
        assert_eq!(shutdown.drain(Duration::from_secs(10)).await, Ok(()));
        assert!(shutdown.has_started());
        assert_eq!(task.await.unwrap(), 7);
    }

    #[tokio::test]
    async fn drain_gives_up_on_tasks_that_do_not() {
        let shutdown = Shutdown::new();
        let stuck = shutdown.spawn(std::future::pending::<()>());
        let deadline = Duration::from_millis(10);
        assert_eq!(
            shutdown.drain(deadline).await,
            Err(DrainTimeout { still_running: 1, deadline })
        );
        stuck.abort();
    }
}
