//! Whether full load makes replicas take their leader for dead.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nbd_testkit::Cluster;

use crate::Place;
use crate::fio::Job;
use crate::server::{EXPORT, cluster};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Minutes of load.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
}

/// Loads three replicas through the leader and through a follower in turn, with small writes, large
/// ones and reads, and prints how often the term changed.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let cluster = cluster(3, &place.dir, &place.replica);
    let duration = Duration::try_from_secs_f64(args.minutes * 60.0).context("use --minutes")?;
    let job = |name, rw, block_kib, depth| Job { name, rw, block_kib, depth, seconds: 10 };
    let jobs = [
        job("4k-randwrite-qd64", "randwrite", 4, 64),
        job("1m-write-qd8", "write", 1024, 8),
        job("4k-randread-qd32", "randread", 4, 32),
    ];
    let before = term(&cluster)?;
    let started = Instant::now();
    println!("job                  attached to     rate          term");
    let mut turn = 0;
    while started.elapsed() < duration {
        let job = jobs[turn % jobs.len()];
        let leader = cluster.wait_leader();
        let at = if turn / jobs.len() % 2 == 0 { leader } else { cluster.followers()[0] };
        let rate = job.run(&cluster.at(at).uri(EXPORT))?;
        let role = if at == leader { "leader" } else { "follower" };
        println!(
            "{:<20} {role:<10} {rate:>9.0} {:<5} {:>9}",
            job.name,
            job.unit(),
            term(&cluster)?
        );
        turn += 1;
    }
    let changes = term(&cluster)? - before;
    println!("{changes} changes of the term in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// The highest term that any node knows.
fn term(cluster: &Cluster) -> Result<f64> {
    let terms = (0..3).filter_map(|at| cluster.at(at).metric("raft_term{shard=\"0\"}"));
    terms.max_by(f64::total_cmp).context("no node tells its term")
}
