//! Paired measurements of Cinderblock against other NBD servers, in one run on one disk.
//!
//! Machines drift, so no figure is judged alone: every job runs against Cinderblock and its
//! reference in turn, several rounds, and what counts is the median of the ratios. fio's nbd engine
//! is the client for all.
//!
//! | job | reference | aim |
//! | --- | --- | --- |
//! | 4 KiB random writes, depth 64, durable | `qemu-nbd --cache=writethrough`, raw file | 3.0 |
//! | 4 KiB random writes, depth 1, durable | the same | 0.8 |
//! | 4 KiB random reads of cached data, depth 32 | `nbdkit file` | 0.6 |
//! | 1 MiB sequential writes, depth 8, durable | `qemu-nbd --cache=writethrough` | none |
//! | 1 MiB sequential reads, cached, depth 8 | `nbdkit file` | none |

mod fio;
mod server;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

use crate::fio::Job;
use crate::server::{Server, ServerKind};

/// Runs paired measurements and prints ratios.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds; each runs every job once against each server.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run, behind a warm-up of a fifth of it.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Where the servers keep their data: on the disk to be measured.
    #[arg(long, default_value = "target/bench-data")]
    dir: PathBuf,
    /// Runs only the jobs whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// The `nbd-replica` binary to measure.
    #[arg(long, default_value = "target/release/nbd-replica")]
    replica: PathBuf,
    /// Prints each figure as a line of JSON as well.
    #[arg(long)]
    json: bool,
}

/// A job, the server it is compared with, and the ratio aimed at.
struct Comparison {
    job: Job,
    reference: ServerKind,
    aim: Option<f64>,
}

fn comparisons(seconds: u32) -> Vec<Comparison> {
    let job = |name, rw, block_kib, depth| Job { name, rw, block_kib, depth, seconds };
    let writethrough = ServerKind::QemuWritethrough;
    let compare = |job, reference, aim| Comparison { job, reference, aim };
    vec![
        compare(job("4k-randwrite-qd64", "randwrite", 4, 64), writethrough, Some(3.0)),
        compare(job("4k-randwrite-qd1", "randwrite", 4, 1), writethrough, Some(0.8)),
        compare(job("4k-randread-qd32", "randread", 4, 32), ServerKind::NbdkitFile, Some(0.6)),
        compare(job("1m-write-qd8", "write", 1024, 8), writethrough, None),
        compare(job("1m-read-qd8", "read", 1024, 8), ServerKind::NbdkitFile, None),
    ]
}

fn main() -> Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.dir).context("create the data directory")?;
    println!("job                  cinderblock    reference      ratio   aim   reference");
    let mut missed = 0;
    for comparison in comparisons(args.seconds) {
        if args.only.as_ref().is_some_and(|only| !comparison.job.name.contains(only.as_str())) {
            continue;
        }
        missed += usize::from(!run(&args, &comparison)?);
    }
    if missed > 0 {
        println!("{missed} of the aims were missed in this run");
    }
    Ok(())
}

/// Runs one comparison. `false` if its aim was missed.
fn run(args: &Args, comparison: &Comparison) -> Result<bool> {
    let ours = Server::start(ServerKind::Cinderblock, &args.dir, &args.replica)?;
    let reference = Server::start(comparison.reference, &args.dir, &args.replica)?;
    for server in [&ours, &reference] {
        comparison.job.prepare(&server.uri())?;
    }
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
    let aim = comparison.aim.map_or_else(|| "-".to_owned(), |aim| format!("{aim:.1}"));
    println!(
        "{:<20} {:>8.0} {:<5} {:>8.0} {:<5} {:>5.2} {:>5}   {}",
        comparison.job.name,
        ours_rate,
        comparison.job.unit(),
        reference_rate,
        comparison.job.unit(),
        ratio,
        aim,
        comparison.reference.describe(),
    );
    if args.json {
        let line = serde_json::json!({
            "job": comparison.job.name,
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
