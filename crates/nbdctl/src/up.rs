//! `nbdctl up`: a whole cluster in one process, for trying, developing and small set-ups.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use nbd_replica::{Config, Replica, Tuning};
use nbd_service::cluster::{GRPC_PORT, VolumePolicy};
use nbd_service::{
    ByteSize, ClusterConfig, Failure, HostPort, LogFormat, NodeAddresses, cluster, shutdown,
    telemetry,
};

/// Name of the only node.
const NODE: &str = "nbd-1-1";

/// Time between looks whether the cluster is ready.
const READY_POLL: Duration = Duration::from_millis(10);

/// Flags of `nbdctl up`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the cluster keeps its data, one directory a node. Created if missing.
    #[arg(long, default_value = "./data", value_name = "DIR")]
    data_dir: PathBuf,

    /// Where NBD clients attach.
    #[arg(long, default_value = "127.0.0.1:10809", value_name = "ADDR")]
    nbd: HostPort,

    /// Where health and metrics are served.
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    http: HostPort,

    /// Size of a volume that is created by attaching to it.
    #[arg(long, default_value = "1GiB", value_name = "SIZE")]
    size: ByteSize,

    /// Name of the cluster; the data directory remembers it.
    #[arg(long, default_value = "cinderblock", value_name = "NAME")]
    name: nbd_topology::ClusterName,

    /// Log lines as text or as JSON. They go to standard error; RUST_LOG sets the level.
    #[arg(long, default_value = "text", value_name = "text|json")]
    log_format: LogFormat,

    #[command(flatten)]
    tuning: Tuning,
}

/// Runs the cluster until it is told to stop.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let log_format = args.log_format;
    let data_dir = args.data_dir.clone();
    let config = config(args)?;
    // Warnings only, unless asked otherwise: the output is for a person at a terminal.
    let filter = std::env::var_os("RUST_LOG").is_none().then_some("warn");
    telemetry::init_logging(log_format, filter)?;
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
        let ready = async {
            while !replica.is_ready() {
                tokio::time::sleep(READY_POLL).await;
            }
            print!("{}", welcome(replica.nbd_address(), replica.http_address(), &data_dir));
            std::future::pending::<()>().await;
        };
        tokio::select! {
            signal = signal => {
                signal.context("watch for signals")?;
                println!("\nStopping.");
                replica.stop().await.map_err(|reason| anyhow::anyhow!(reason).into())
            }
            reason = replica.failed() => {
                replica.abandon();
                Err(anyhow::anyhow!(reason).into())
            }
            () = ready => unreachable!("waits for ever once it has printed"),
        }
    });
    // Not waiting for reads that a failed disk may never finish.
    runtime.shutdown_background();
    ended
}

fn config(args: Args) -> Result<Config, Failure> {
    let node: nbd_topology::NodeName = NODE.parse()?;
    let grpc = HostPort::of_node(&"127.0.0.1".parse()?, GRPC_PORT);
    let addresses = NodeAddresses { nbd: args.nbd, grpc, http: args.http };
    // A node on its own has no peers that would have to find it: any port will do.
    let anywhere = HostPort::of_node(&"127.0.0.1".parse()?, 0);
    let listen = NodeAddresses { grpc: anywhere, ..addresses.clone() };
    let nodes = vec![cluster::NodeConfig { name: node.clone(), addresses, listen }];
    let volumes = VolumePolicy { auto_create: true, default_size: args.size };
    let cluster = ClusterConfig::new(args.name, nodes, vec![vec![node.clone()]], volumes)
        .map_err(Failure::usage)?;
    let data_dir = args.data_dir.join(NODE);
    Config::new(cluster, node, data_dir, args.tuning).map_err(Failure::usage)
}

/// What a person needs to know now.
fn welcome(nbd: SocketAddr, http: SocketAddr, data_dir: &std::path::Path) -> String {
    let (host, port) = (nbd.ip(), nbd.port());
    let data_dir = data_dir.display();
    format!(
        "\
Cinderblock is up: 1 shard, 1 replica. Data in {data_dir}.

Attach a volume (any name; the first attach creates it):
  nbd-client {host} {port} /dev/nbd0 -name vol1
  qemu-system-x86_64 ... -drive format=raw,file=nbd://{nbd}/vol1
  nbdinfo nbd://{nbd}/vol1

Health:   curl http://{http}/health
Metrics:  curl http://{http}/metrics

Stop with Ctrl-C. Everything acknowledged is on disk.
"
    )
}
