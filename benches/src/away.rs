//! What it takes to bring a replica up to date that was away.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nbd_testkit::{Cluster, NbdClient};

use crate::Place;
use crate::server::{EXPORT, cluster};

/// Bytes that a transfer moves together at most: a chunk.
const CHUNK_BYTES: u64 = 64 << 10;

/// Bytes of one write.
const WRITE_BYTES: u64 = 4 << 10;

/// Bytes of a write that fills the region before.
const FILL_BYTES: u64 = 1 << 20;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Minutes that a follower is away.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Writes of 4 KiB a second meanwhile.
    #[arg(long, default_value_t = 100)]
    writes_per_second: u32,
    /// MiB that the writes are spread over; all of it is written before.
    #[arg(long, default_value_t = 512)]
    region_mib: u64,
}

/// Kills a follower of three, writes, starts it again, and prints how much it fetched of what
/// changed. That is nothing as long as the log reaches back to where it was.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    ensure!(args.writes_per_second > 0 && args.region_mib > 0, "nothing to write");
    let away = Duration::try_from_secs_f64(args.minutes * 60.0).context("use --minutes")?;
    let mut cluster = cluster(3, &place.dir, &place.replica);
    let (leader, follower) = (cluster.wait_leader(), cluster.followers()[0]);
    let mut client = cluster.at(leader).connect(EXPORT)?;
    let region = args.region_mib << 20;
    ensure!(region <= client.size(), "the volume has {} bytes", client.size());
    for offset in (0..region).step_by(1 << 20) {
        client.write(offset, &content(offset, FILL_BYTES))?;
    }
    cluster.wait_until_equal();
    cluster.at_mut(follower).kill_9();
    let (writes, changed) = write_for(&mut client, args, away)?;

    let started = Instant::now();
    cluster.at_mut(follower).start();
    cluster.wait_until_equal();
    let took = started.elapsed();
    let moved = fetched(&cluster, follower)?;
    #[expect(clippy::cast_precision_loss, reason = "a ratio of sizes needs no last digit")]
    let changed = changed as f64;
    println!("away                {:>10.0} s", away.as_secs_f64());
    println!("writes of 4 KiB     {writes:>10}");
    println!("changed, in chunks  {:>10.1} MiB", changed / f64::from(1 << 20));
    println!("fetched             {:>10.1} MiB", moved / f64::from(1 << 20));
    println!("fetched / changed   {:>10.3}", moved / changed);
    println!("equal again after   {:>10.1} s", took.as_secs_f64());
    Ok(())
}

/// Writes at an even pace. Returns the number of writes, and the bytes of all chunks they fell in.
fn write_for(client: &mut NbdClient, args: &Args, time: Duration) -> Result<(u64, u64)> {
    let pause = Duration::from_secs(1) / args.writes_per_second;
    let places = (args.region_mib << 20) / WRITE_BYTES;
    let (started, mut writes, mut chunks) = (Instant::now(), 0_u64, HashSet::new());
    let mut next = started;
    while started.elapsed() < time {
        // A multiplier without a factor in common with the places visits all of them.
        let offset = writes.wrapping_mul(2_654_435_761) % places * WRITE_BYTES;
        client.write(offset, &content(writes, WRITE_BYTES))?;
        chunks.insert(offset / CHUNK_BYTES);
        writes += 1;
        next += pause;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok((writes, chunks.len() as u64 * CHUNK_BYTES))
}

/// Bytes that are not zero and differ from number to number.
fn content(number: u64, len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|at| (number ^ at << 40 ^ 0xa5a5).to_le_bytes()).collect()
}

/// Bytes of chunks that a node has fetched since its start.
fn fetched(cluster: &Cluster, at: usize) -> Result<f64> {
    let bytes = cluster.at(at).metric("resync_received_bytes_total");
    bytes.context("the node does not tell what it fetched")
}
