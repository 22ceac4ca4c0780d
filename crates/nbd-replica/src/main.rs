//! `nbd-replica`: serves the replicas of one node.

use std::process::ExitCode;

use anyhow::Context;
use nbd_replica::{Args, Config, Replica};
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
    let config =
        Config::new(cluster, args.node, args.data_dir, args.tuning).map_err(Failure::usage)?;
    if args.check_config {
        print!("{config}");
        return Ok(());
    }
    telemetry::init_logging(args.log_format, None)?;
    nbd_service::open_files::raise_limit();
    let metrics = telemetry::metrics_recorder()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
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
            reason = replica.failed() => {
                replica.abandon();
                Err(anyhow::anyhow!(reason).into())
            }
        }
    });
    // Not waiting for reads that a failed disk may never finish.
    runtime.shutdown_background();
    ended
}
