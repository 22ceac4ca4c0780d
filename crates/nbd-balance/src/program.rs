//! The balancer as a process: `nbdctl balance`.

use anyhow::Context as _;
use nbd_service::shutdown::StopSignals;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{Failure, program};

use crate::{Args, Balancer, Config};

/// Runs until told to stop.
///
/// # Errors
/// Settings that cannot be used; addresses that cannot be listened at.
pub fn run(args: Args) -> Result<(), Failure> {
    let (log_format, check_config) = (args.log_format, args.check_config);
    let config = Config::new(args).map_err(Failure::usage)?;
    if check_config {
        print!("{config}");
        return Ok(());
    }
    program::run(log_format, |metrics| serve(config, metrics))
}

/// The first signal lets clients go on for a while, the second does not.
async fn serve(config: Config, metrics: PrometheusHandle) -> Result<(), Failure> {
    let mut signals = StopSignals::install().context("watch for signals")?;
    let balancer = Balancer::start(config, metrics).await?;
    let signal = signals.next().await;
    tracing::info!(?signal, "stopping");
    let end = async {
        balancer.drain().await;
        balancer.stop().await;
    };
    tokio::select! {
        () = end => {}
        signal = signals.next() => tracing::warn!(?signal, "ending at once"),
    }
    Ok(())
}
