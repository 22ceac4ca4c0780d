//! The program `nbd-lb`: the load balancer. Two binaries are it: that of
//! this crate, and `nbdctl` when it is called by that name.

use std::process::ExitCode;

use anyhow::Context;
use nbd_service::exit::{parse_args, report};
use nbd_service::shutdown::StopSignals;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{ClusterConfig, Failure, program};

use crate::{Args, Config, LoadBalancer};

/// Runs the program: parses its command line, serves until told to stop, and gives the exit code.
pub fn main() -> ExitCode {
    match parse_args::<Args>() {
        Ok(args) => report(run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), Failure> {
    let cluster = ClusterConfig::given(args.cluster.as_deref())?;
    let (log_format, check_config) = (args.log_format, args.check_config);
    let config = Config::new(cluster, args).map_err(Failure::usage)?;
    if check_config {
        print!("{config}");
        return Ok(());
    }
    program::run(log_format, |metrics| serve(config, metrics))
}

/// Runs until told to stop, or until another process has taken over. The first signal lets clients
/// go on for a while, the second does not.
async fn serve(config: Config, metrics: PrometheusHandle) -> Result<(), Failure> {
    let mut signals = StopSignals::install().context("watch for signals")?;
    let balancer = tokio::select! {
        started = LoadBalancer::start(config, metrics) => started?,
        _ = signals.next() => return Ok(()),
    };
    let mut told = false;
    tokio::select! {
        signal = signals.next() => {
            told = true;
            tracing::info!(?signal, "stopping");
        }
        () = balancer.superseded() => {}
    }
    let end = async {
        balancer.drain().await;
        balancer.stop().await;
    };
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => return Ok(()),
            signal = signals.next() => {
                if told {
                    tracing::warn!(?signal, "ending at once");
                    return Ok(());
                }
                told = true;
            }
        }
    }
}
