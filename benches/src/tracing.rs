//! What tracing takes away from writes: the same cluster without a collector, with one and no
//! request sampled, and with one request in a thousand sampled.
//!
//! The differences looked for are smaller than what a shared machine does to throughput from one
//! run to the next. So there are many short rounds, each with every cluster in turn, and beside the
//! rate the CPU time of balancer and replicas for each write is compared, which other programs
//! touch less.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use nbd_testkit::process::cpu_time;
use nbd_testkit::{Cluster, ClusterBuilder, ServerProcess, SpanCollector};

use crate::fio::Job;
use crate::server::{EXPORT, VOLUME_BYTES};
use crate::{Place, median};

/// How much is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rounds; in each, every cluster is written to once.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// An `nbd-replica` that knows nothing of tracing, with its `nbd-lb` beside it, as a fourth
    /// cluster: what the others are compared with then.
    #[arg(long)]
    without: Option<PathBuf>,
}

/// A cluster, and a load balancer in front of it.
struct Traced {
    name: &'static str,
    cluster: Cluster,
    balancer: ServerProcess,
    rates: Vec<f64>,
    cpu_us: Vec<f64>,
}

impl Traced {
    fn start(
        name: &'static str,
        replica: &Path,
        place: &Place,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let builder = Cluster::builder().replicas(3).program(replica).under(&place.dir);
        let builder = builder.name("bench").default_size(&format!("{VOLUME_BYTES}B"));
        let with = |builder: ClusterBuilder, (name, value): &(&str, &str)| {
            builder.environment(name, value)
        };
        let mut cluster = environment.iter().fold(builder, with).start();
        cluster.wait_until_serving();
        let balancer = cluster.balancer();
        JOB.prepare(&balancer.uri(EXPORT))?;
        Ok(Self { name, cluster, balancer, rates: Vec::new(), cpu_us: Vec::new() })
    }

    fn cpu_s(&mut self) -> f64 {
        let balancer = cpu_time(self.balancer.pid());
        let replicas = self.cluster.nodes().iter().map(|node| cpu_time(node.pid()));
        (balancer + replicas.sum::<Duration>()).as_secs_f64()
    }

    fn write(&mut self, seconds: u32) -> Result<()> {
        let before = self.cpu_s();
        let moved = Job { seconds, ..JOB }.run_counted(&self.balancer.uri(EXPORT))?;
        let writes = moved.bytes / f64::from(JOB.block_kib << 10);
        self.rates.push(moved.bytes_per_second / f64::from(JOB.block_kib << 10));
        let took = self.cpu_s() - before;
        self.cpu_us.push(took * 1e6 / writes);
        Ok(())
    }
}

/// What is compared: small writes, of which there are most a second.
const JOB: Job =
    Job { name: "4k-randwrite-qd64", rw: "randwrite", block_kib: 4, depth: 64, seconds: 4 };

pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let collector = SpanCollector::start();
    let endpoint = collector.endpoint();
    let to_it = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint);
    let ratio =
        [to_it, ("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.001")];
    let none = [to_it, ("OTEL_TRACES_SAMPLER", "always_off")];
    let mut clusters = Vec::new();
    if let Some(replica) = &args.without {
        clusters.push(Traced::start("no tracing built in", replica, place, &[])?);
    }
    clusters.push(Traced::start("no collector", &place.replica, place, &[])?);
    clusters.push(Traced::start("nothing sampled", &place.replica, place, &none)?);
    clusters.push(Traced::start("1 in 1000 sampled", &place.replica, place, &ratio)?);
    for round in 0..args.rounds {
        // Who begins changes: whatever a run leaves behind is not always the same one's.
        for turn in 0..clusters.len() {
            let place = (round + turn) % clusters.len();
            clusters[place].write(args.seconds)?;
        }
    }
    println!("4 KiB writes at depth 64 through a load balancer, {} rounds", args.rounds);
    println!("                      IOPS   ratio   CPU us a write   ratio");
    let first = (clusters[0].rates.clone(), clusters[0].cpu_us.clone());
    let ratios = |own: &[f64], first: &[f64]| {
        median(&mut own.iter().zip(first).map(|(own, first)| own / first).collect::<Vec<_>>())
    };
    for Traced { name, rates, cpu_us, .. } in &clusters {
        println!(
            "{name:<20} {:>6.0} {:>7.3} {:>16.1} {:>7.3}",
            median(&mut rates.clone()),
            ratios(rates, &first.0),
            median(&mut cpu_us.clone()),
            ratios(cpu_us, &first.1),
        );
    }
    println!("{} spans were collected", collector.seen().len());
    Ok(())
}
