//! What was acknowledged survives `kill -9`, at any moment, any number of times.
//!
//! Each round runs several clients with a write load whose content can be recognised, kills the
//! process at a random moment, starts it again, and reads every block: it holds the newest
//! acknowledged version or one that was under way when the process died, and nothing else. A block
//! once seen with a version never shows an older one later.

mod model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, seed};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::model::Writer;

/// Kills; each is followed by a check of everything.
const ROUNDS: u32 = 50;

/// Clients that write at the same time, each to a volume of its own.
const WRITERS: u64 = 3;

/// Longest time that a load runs before the kill.
const LOAD_MAX: Duration = Duration::from_millis(250);

/// Longest start after a crash.
const START_MAX: Duration = Duration::from_secs(5);

/// Runs the rounds against a node with these flags.
fn survive(flags: &[&str], rounds: u32) {
    let mut rng = StdRng::seed_from_u64(seed());
    let mut builder = Cluster::builder().default_size(&format!("{}B", model::VOLUME_BYTES));
    for flag in flags {
        builder = builder.argument(flag);
    }
    let mut cluster = builder.start();
    let mut writers: Vec<_> =
        (0..WRITERS).map(|number| Writer::new(number, rng.random())).collect();
    let mut acknowledged = 0;
    let mut slowest_start = Duration::ZERO;
    for round in 0..rounds {
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = writers
            .into_iter()
            .map(|mut writer| {
                let client = cluster.node().connect(&writer.volume()).expect("attach");
                let stop = Arc::clone(&stop);
                thread::spawn(move || {
                    let acknowledged = writer.run(client, &stop);
                    (writer, acknowledged)
                })
            })
            .collect();
        thread::sleep(rng.random_range(Duration::from_millis(5)..LOAD_MAX));
        cluster.node_mut().kill_9();
        stop.store(true, Ordering::Relaxed);
        writers = threads
            .into_iter()
            .map(|thread| {
                let (writer, count) = thread.join().expect("a writer found no fault");
                acknowledged += count;
                writer
            })
            .collect();
        let started = Instant::now();
        cluster.node_mut().start();
        slowest_start = slowest_start.max(started.elapsed());
        for writer in &mut writers {
            let mut client = cluster.node().connect(&writer.volume()).expect("attach");
            writer.verify(&mut client, &format!("round {round}"));
        }
    }
    println!(
        "{rounds} kills, {acknowledged} acknowledged mutations, slowest start {slowest_start:?}"
    );
    assert!(acknowledged > u64::from(rounds) * 10, "the load did not get going");
    assert!(slowest_start < START_MAX, "a start after a crash took {slowest_start:?}");
    assert!(cluster.node_mut().terminate().success(), "a graceful stop exits with 0");
    cluster.node_mut().start();
    for writer in &mut writers {
        let mut client = cluster.node().connect(&writer.volume()).expect("attach");
        writer.verify(&mut client, "after a graceful restart");
    }
}

#[test]
fn acknowledged_writes_survive_kill_9() {
    // Small log and frequent checkpoints: kills land in checkpoints, rotations and recycling too.
    let flags = [
        "--log-segment-bytes=4MiB",
        "--log-bytes-max=16MiB",
        "--checkpoint-log-bytes=2MiB",
        "--log-cache-bytes=1MiB",
    ];
    survive(&flags, ROUNDS);
}

#[test]
fn acknowledged_writes_survive_kill_9_with_default_sizes() {
    survive(&[], ROUNDS / 5);
}
