//! `nbd-lb`: the load balancer.

use std::process::ExitCode;

use anyhow::Context;
use nbd_lb::{Args, Config, LoadBalancer};
use nbd_service::exit::{parse_args, report};
use nbd_service::{ClusterConfig, Failure, shutdown, telemetry};

fn main() -> ExitCode {
    match parse_args::<Args>() {
        Ok(args) => report(run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), Failure> {
    let cluster = match &args.cluster {
        Some(path) => ClusterConfig::load(path).map_err(Failure::usage)?,
        None => ClusterConfig::from_env().map_err(Failure::usage)?.ok_or_else(|| {
            Failure::usage(anyhow::anyhow!("no cluster: give --cluster FILE or set NBD_SHARDS"))
        })?,
    };
    let (log_format, check_config) = (args.log_format, args.check_config);
    let config = Config::new(cluster, args).map_err(Failure::usage)?;
    if check_config {
        print!("{config}");
        return Ok(());
    }
    telemetry::init_logging(log_format, None)?;
    nbd_service::open_files::raise_limit();
    let metrics = telemetry::metrics_recorder()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let signal = shutdown::wait_for_signal();
        tokio::pin!(signal);
        let balancer = tokio::select! {
            started = LoadBalancer::start(config, metrics) => started?,
            signal = &mut signal => {
                signal.context("watch for signals")?;
                return Ok(());
            }
        };
        let signal = signal.await.context("watch for signals")?;
        tracing::info!(?signal, "stopping");
        balancer.stop().await;
        Ok(())
    })
}
