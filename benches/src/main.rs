//! Measurements of Cinderblock, most of them in pairs with other NBD servers, in one run on one
//! disk.
//!
//! Machines drift, so no figure is judged alone: every job runs against Cinderblock and its
//! reference in turn, several rounds, and what counts is the median of the ratios. fio's nbd engine
//! is the client for all.
//!
//! | job | reference | aim, 1 replica | aim, 3 replicas on this machine |
//! | --- | --- | --- | --- |
//! | 4 KiB random writes, depth 64, durable | `qemu-nbd --cache=writethrough`, raw file | 3.0 | 1.5 |
//! | 4 KiB random writes, depth 1, durable | the same | 0.8 | 0.6 |
//! | 4 KiB random reads of cached data, depth 32 | `nbdkit file` | 0.6 | 0.6 |
//! | 1 MiB sequential writes, depth 8, durable | `qemu-nbd --cache=writethrough` | none | none |
//! | 1 MiB sequential reads, cached, depth 8 | `nbdkit file` | none | none |
//!
//! Through a load balancer the same jobs run against another such cluster, attached to at the
//! leader: the aims are 0.8 at depth 64, 0.75 for reads at depth 32 and 0.85 for large requests.
//!
//! The other servers keep one copy, also where Cinderblock keeps three. Three replicas are attached
//! to at the leader; at a follower as well, which has no aims.
//!
//! Then there is what no other server has: [`failover`], [`idle`], [`elections`], [`away`],
//! [`control`], [`tracing`]; and [`carrying`], which compares a load balancer's two modes, and
//! [`apart`], in which the load balancer does not compete with client and leader.

mod apart;
mod away;
mod carrying;
mod control;
mod elections;
mod failover;
mod fio;
mod idle;
mod server;
mod tracing;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::fio::Job;
use crate::server::{Server, ServerKind};

/// Runs measurements and prints tables.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    compare: CompareArgs,
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    measurement: Option<Measurement>,
}

/// How comparisons run.
#[derive(Debug, clap::Args)]
struct CompareArgs {
    /// Rounds; each runs every job once against each server.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run, behind a warm-up of a fifth of it.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Runs only the jobs whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Runs only the servers whose description contains this: `1 replica`, `leader`, `follower`,
    /// `balancer`.
    #[arg(long)]
    server: Option<String>,
    /// Prints each figure as a line of JSON as well.
    #[arg(long)]
    json: bool,
}

/// What is measured, and where.
#[derive(Debug, clap::Args)]
struct Place {
    /// Where the servers keep their data: on the disk to be measured.
    #[arg(long, global = true, default_value = "target/bench-data")]
    dir: PathBuf,
    /// The `nbd-replica` binary to measure; beside it, the `nbd-lb`.
    #[arg(long, global = true, default_value = "target/release/nbd-replica")]
    replica: PathBuf,
}

/// Without any, the comparisons.
#[derive(Debug, Subcommand)]
enum Measurement {
    /// How long clients stand still when the leader is lost.
    Failover(failover::Args),
    /// What servers use when nothing happens.
    Idle(idle::Args),
    /// How often the leader changes under full load.
    Elections(elections::Args),
    /// What a replica fetches that was away while there were light writes.
    Away(away::Args),
    /// CPU and throughput of a load balancer, by how it carries connections.
    Carrying(carrying::Args),
    /// What managing volumes costs, and what it takes away from I/O.
    Control(control::Args),
    /// Through a load balancer and at the leader, each process with a share of its own of the CPU.
    Apart(apart::Args),
    /// What tracing takes away from small writes.
    Tracing(tracing::Args),
}

/// A job, the servers it is compared on, and the ratio aimed at.
struct Comparison {
    job: Job,
    ours: ServerKind,
    reference: ServerKind,
    aim: Option<f64>,
}

/// The jobs that everything is compared on.
fn jobs(seconds: u32) -> [Job; 5] {
    let job = |name, rw, block_kib, depth| Job { name, rw, block_kib, depth, seconds };
    [
        job("4k-randwrite-qd64", "randwrite", 4, 64),
        job("4k-randwrite-qd1", "randwrite", 4, 1),
        job("4k-randread-qd32", "randread", 4, 32),
        job("1m-write-qd8", "write", 1024, 8),
        job("1m-read-qd8", "read", 1024, 8),
    ]
}

fn comparisons(seconds: u32) -> Vec<Comparison> {
    let (writethrough, file) = (ServerKind::QemuWritethrough, ServerKind::NbdkitFile);
    let [writes, write, reads, large_writes, large_reads] = jobs(seconds);
    // With the aims for one replica and for three.
    let jobs = [
        (writes, writethrough, Some(3.0), Some(1.5)),
        (write, writethrough, Some(0.8), Some(0.6)),
        (reads, file, Some(0.6), Some(0.6)),
        (large_writes, writethrough, None, None),
        (large_reads, file, None, None),
    ];
    let mut comparisons = Vec::new();
    for ours in [ServerKind::Single, ServerKind::Leader, ServerKind::Follower] {
        comparisons.extend(jobs.map(|(job, reference, single, replicated)| {
            let aim = match ours {
                ServerKind::Single => single,
                ServerKind::Leader => replicated,
                _ => None,
            };
            Comparison { job, ours, reference, aim }
        }));
    }
    // Of the latency that a balancer adds, depth 1 tells.
    let aims = [Some(0.8), None, Some(0.75), Some(0.85), Some(0.85)];
    comparisons.extend(jobs.iter().zip(aims).map(|((job, ..), aim)| {
        let (ours, reference) = (ServerKind::Balanced, ServerKind::Leader);
        Comparison { job: *job, ours, reference, aim }
    }));
    comparisons
}

fn main() -> Result<()> {
    let Args { compare, place, measurement } = Args::parse();
    std::fs::create_dir_all(&place.dir).context("create the data directory")?;
    match measurement {
        None => compare_all(&compare, &place),
        Some(Measurement::Failover(args)) => failover::run(&args, &place),
        Some(Measurement::Idle(args)) => idle::run(&args, &place),
        Some(Measurement::Elections(args)) => elections::run(&args, &place),
        Some(Measurement::Away(args)) => away::run(&args, &place),
        Some(Measurement::Carrying(args)) => carrying::run(&args, &place),
        Some(Measurement::Control(args)) => control::run(&args, &place),
        Some(Measurement::Apart(args)) => apart::run(&args, &place),
        Some(Measurement::Tracing(args)) => tracing::run(&args, &place),
    }
}

fn compare_all(args: &CompareArgs, place: &Place) -> Result<()> {
    println!(
        "job                  replicas       cinderblock    reference      ratio   aim   reference"
    );
    let lacks = |filter: &Option<String>, name: &str| {
        filter.as_ref().is_some_and(|part| !name.contains(part.as_str()))
    };
    let mut missed = 0;
    for comparison in comparisons(args.seconds) {
        let (job, server) = (comparison.job.name, comparison.ours.describe());
        if !lacks(&args.only, job) && !lacks(&args.server, server) {
            missed += usize::from(!run(args, place, &comparison)?);
        }
    }
    if missed > 0 {
        println!("{missed} of the aims were missed in this run");
    }
    Ok(())
}

/// Runs one comparison. `false` if its aim was missed.
fn run(args: &CompareArgs, place: &Place, comparison: &Comparison) -> Result<bool> {
    let ours = Server::start(comparison.ours, &place.dir, &place.replica)?;
    let reference = Server::start(comparison.reference, &place.dir, &place.replica)?;
    for server in [&ours, &reference] {
        comparison.job.prepare(&server.uri())?;
    }
    let term = ours.term();
    let mut rates = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        // In turn, so that neither always runs on a disk that the other has just left busy.
        let order = if round % 2 == 0 { [true, false] } else { [false, true] };
        for first in order {
            let (server, into) =
                if first { (&ours, &mut rates.0) } else { (&reference, &mut rates.1) };
            into.push(comparison.job.run(&server.uri())?);
        }
    }
    let mut ratios: Vec<f64> = rates.0.iter().zip(&rates.1).map(|(a, b)| a / b).collect();
    let ratio = median(&mut ratios);
    let (ours_rate, reference_rate) = (median(&mut rates.0), median(&mut rates.1));
    let aim = comparison.aim.map_or_else(|| "-".to_owned(), |aim| format!("{aim}"));
    println!(
        "{:<20} {:<12} {:>8.0} {:<5} {:>8.0} {:<5} {:>5.2} {:>5}   {}",
        comparison.job.name,
        comparison.ours.describe(),
        ours_rate,
        comparison.job.unit(),
        reference_rate,
        comparison.job.unit(),
        ratio,
        aim,
        comparison.reference.describe(),
    );
    if ours.term() != term {
        println!("    the leader changed meanwhile: term {term:?}, then {:?}", ours.term());
    }
    if args.json {
        let line = serde_json::json!({
            "job": comparison.job.name,
            "replicas": comparison.ours.describe(),
            "unit": comparison.job.unit(),
            "cinderblock": rates.0,
            "reference": rates.1,
            "ratios": ratios,
        });
        println!("{line}");
    }
    Ok(comparison.aim.is_none_or(|aim| ratio >= aim))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
