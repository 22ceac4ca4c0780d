//! The program `nbd-control`: the control API. Two binaries are it: that of
//! this crate, and `nbdctl` when it is called by that name.

use std::process::ExitCode;

use anyhow::Context as _;
use nbd_service::exit::{parse_args, report};
use nbd_service::shutdown::StopSignals;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{ClusterConfig, Failure, program};

use crate::{Args, Config, ControlApi, StartError};

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
        config.check_tokens().map_err(Failure::usage)?;
        print!("{config}");
        return Ok(());
    }
    program::run(log_format, |metrics| serve(config, metrics))
}

/// Runs until told to stop; told so again while it does, it ends at once.
async fn serve(config: Config, metrics: PrometheusHandle) -> Result<(), Failure> {
    let mut signals = StopSignals::install().context("watch for signals")?;
    let control = match ControlApi::start(config, metrics).await {
        Ok(control) => control,
        Err(error @ StartError::Tokens(_)) => return Err(Failure::usage(error)),
        Err(error) => return Err(error.into()),
    };
    let signal = signals.next().await;
    tracing::info!(?signal, "stopping");
    tokio::select! {
        () = control.stop() => {}
        signal = signals.next() => tracing::warn!(?signal, "ending at once"),
    }
    Ok(())
}
