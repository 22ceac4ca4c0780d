//! What replicas cost when nothing happens.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use nbd_testkit::process;

use crate::Place;
use crate::server::{EXPORT, cluster};

/// Time for what a start leaves to be done.
const SETTLE: Duration = Duration::from_secs(3);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds to watch.
    #[arg(long, default_value_t = 30)]
    for_seconds: u64,
}

/// Starts three replicas, attaches a client that does nothing, and prints a table.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let cluster = cluster(3, &place.dir, &place.replica);
    let leader = cluster.wait_leader();
    let client = cluster.at(leader).connect(EXPORT)?;
    thread::sleep(SETTLE);
    let pids: Vec<u32> = (0..3).map(|at| cluster.at(at).pid()).collect();
    let before: Vec<Duration> = pids.iter().map(|pid| process::cpu_time(*pid)).collect();
    let watched = Duration::from_secs(args.for_seconds.max(1));
    thread::sleep(watched);
    println!("idle for {} s    role        CPU %    resident MiB", watched.as_secs());
    for (at, (pid, before)) in pids.into_iter().zip(before).enumerate() {
        let share = (process::cpu_time(pid) - before).as_secs_f64() / watched.as_secs_f64();
        println!(
            "{:<16} {:<9} {:>7.2} {:>15}",
            cluster.at(at).name(),
            if at == leader { "leader" } else { "follower" },
            share * 100.0,
            process::rss_bytes(pid) >> 20,
        );
    }
    drop(client);
    Ok(())
}
