//! The program `nbd-replica`: serves the replicas of one node. Two binaries are it: that of
//! this crate, and `nbdctl` when it is called by that name.

use std::process::ExitCode;

use anyhow::Context;
use nbd_service::exit::{parse_args, report};
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{ClusterConfig, Failure, program, shutdown};

use crate::{Args, Config, Replica};

/// Runs the program: parses its command line, serves until told to stop, and gives the exit code.
pub fn main() -> ExitCode {
    match parse_args::<Args>() {
        Ok(args) => report(run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), Failure> {
    let cluster = ClusterConfig::given(args.cluster.as_deref())?;
    let config = Config::new(cluster, args.node, args.data_dir, args.tuning)
        .and_then(|config| config.with_isolation_exit(args.isolation_exit))
        .map_err(Failure::usage)?;
    if args.check_config {
        print!("{config}");
        return Ok(());
    }
    program::run(args.log_format, |metrics| serve(config, metrics))
}

/// Runs until told to stop, or until it cannot go on.
async fn serve(config: Config, metrics: PrometheusHandle) -> Result<(), Failure> {
    let signal = shutdown::wait_for_signal();
    tokio::pin!(signal);
    let replica = tokio::select! {
        started = Replica::start(config, metrics) => started?,
        signal = &mut signal => {
            signal.context("watch for signals")?;
            return Ok(());
        }
    };
    tokio::select! {
        signal = signal => {
            let signal = signal.context("watch for signals")?;
            tracing::info!(?signal, "stopping");
            replica.stop().await.map_err(|reason| anyhow::anyhow!(reason).into())
        }
        reason = replica.isolated() => {
            // What it holds is home before the next process reads it.
            replica.stop().await.map_err(|reason| anyhow::anyhow!(reason))?;
            Err(Failure::restart(anyhow::anyhow!(reason)))
        }
        reason = replica.failed() => {
            replica.abandon();
            Err(anyhow::anyhow!(reason).into())
        }
    }
}
