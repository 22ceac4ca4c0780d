//! What it costs a load balancer to carry connections: `--mode splice` beside `--mode replay`, both
//! in front of the same three replicas, in turn.
//!
//! CPU is the time of the load balancer's process, user and kernel, for each GiB that clients
//! moved; what the replicas use is not in it. Where the machine is busy otherwise (replicas and
//! clients run on it too), throughput says little of the load balancer, and CPU still much.

use std::time::Duration;

use anyhow::Result;
use nbd_testkit::ServerProcess;
use nbd_testkit::process::cpu_time;

use crate::fio::Job;
use crate::server::{self, EXPORT};
use crate::{Place, median};

/// How the two modes are compared.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rounds; each runs every job once in each mode.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Runs only the jobs whose name contains this.
    #[arg(long)]
    only: Option<String>,
}

/// What one run came to.
struct Figures {
    mib_per_second: f64,
    cpu_seconds_per_gib: f64,
}

fn jobs(seconds: u32) -> [Job; 4] {
    let job = |name, rw, block_kib, depth| Job { name, rw, block_kib, depth, seconds };
    [
        job("1m-read-qd8", "read", 1024, 8),
        job("1m-write-qd8", "write", 1024, 8),
        job("4k-randread-qd32", "randread", 4, 32),
        job("4k-randwrite-qd64", "randwrite", 4, 64),
    ]
}

pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let cluster = server::cluster(3, &place.dir, &place.replica);
    let replay = cluster.balancer_with(&["--mode=replay"]);
    let splice = cluster.balancer_with(&["--mode=splice"]);
    println!("                    MiB/s                     CPU seconds a GiB");
    println!("job                 replay   splice   ratio   replay   splice   ratio");
    for job in jobs(args.seconds) {
        if args.only.as_ref().is_none_or(|part| job.name.contains(part)) {
            compare(&job, args.rounds, &replay, &splice)?;
        }
    }
    Ok(())
}

/// Runs one job in both modes, and prints medians, and medians of the rounds' ratios.
fn compare(job: &Job, rounds: usize, replay: &ServerProcess, splice: &ServerProcess) -> Result<()> {
    job.prepare(&replay.uri(EXPORT))?;
    let (mut of_replay, mut of_splice) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // In turn, so that neither always comes behind the other.
        for second in [round % 2 == 1, round % 2 == 0] {
            let (program, into) =
                if second { (splice, &mut of_splice) } else { (replay, &mut of_replay) };
            into.push(measure(job, program)?);
        }
    }
    let middle = |runs: &[Figures], of: fn(&Figures) -> f64| {
        median(&mut runs.iter().map(of).collect::<Vec<_>>())
    };
    let ratio = |of: fn(&Figures) -> f64| {
        median(
            &mut of_splice.iter().zip(&of_replay).map(|(a, b)| of(a) / of(b)).collect::<Vec<_>>(),
        )
    };
    let rate: fn(&Figures) -> f64 = |run| run.mib_per_second;
    let cpu: fn(&Figures) -> f64 = |run| run.cpu_seconds_per_gib;
    println!(
        "{:<18} {:>7.0} {:>8.0} {:>7.2} {:>8.3} {:>8.3} {:>7.2}",
        job.name,
        middle(&of_replay, rate),
        middle(&of_splice, rate),
        ratio(rate),
        middle(&of_replay, cpu),
        middle(&of_splice, cpu),
        ratio(cpu),
    );
    Ok(())
}

fn measure(job: &Job, balancer: &ServerProcess) -> Result<Figures> {
    let before = cpu_time(balancer.pid());
    let moved = job.run_counted(&balancer.uri(EXPORT))?;
    let cpu: Duration = cpu_time(balancer.pid()) - before;
    Ok(Figures {
        mib_per_second: moved.bytes_per_second / f64::from(1 << 20),
        cpu_seconds_per_gib: cpu.as_secs_f64() / (moved.bytes / f64::from(1 << 30)),
    })
}
