//! What a service does around its work: set up what a process has once, and run.

use std::future::Future;

use metrics_exporter_prometheus::PrometheusHandle;

use crate::{Failure, LogFormat, open_files, telemetry};

/// Sets up logs, open files and metrics, and runs `serve` to its end.
///
/// Blocking work that is under way then is not waited for: a resolver that does not answer, or a
/// read that a failed disk never finishes, holds up no end.
///
/// # Errors
/// Those of `serve`; the process has logs or metrics already; no threads can be had.
pub fn run<S, W>(log_format: LogFormat, serve: S) -> Result<(), Failure>
where
    S: FnOnce(PrometheusHandle) -> W,
    W: Future<Output = Result<(), Failure>>,
{
    telemetry::init_logging(log_format, None)?;
    open_files::raise_limit();
    let metrics = telemetry::metrics_recorder()?;
    block_on(serve(metrics))
}

fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(work);
    runtime.shutdown_background();
    ended
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_thread_that_is_stuck_holds_up_no_end() {
        let (release, stuck) = channel::<()>();
        let (ended, end) = channel();
        let running = thread::spawn(move || {
            let result = block_on(async move {
                drop(tokio::task::spawn_blocking(move || stuck.recv()));
                tokio::time::sleep(Duration::from_millis(50)).await;
                Ok(())
            });
            let _ = ended.send(result.is_ok());
        });
        let seen = end.recv_timeout(Duration::from_secs(20));
        drop(release);
        assert_eq!(seen, Ok(true));
        running.join().unwrap();
    }
}
