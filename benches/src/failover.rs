//! How long a client stands still when the leader is lost.
//!
//! One client, attached to a replica that stays, writes 4 KiB blocks one after the other. The
//! leader is lost; what counts is the time from just before that to the acknowledgement of the
//! first write that was sent after it. Then the lost node comes back, all serve, and so on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nbd_testkit::{Cluster, ConnectOptions, NbdClient, NodeProcess};

use crate::Place;
use crate::server::{EXPORT, VOLUME_BYTES, cluster};

/// Bytes of each write.
const BLOCK_BYTES: usize = 4096;

/// Writes acknowledged before the leader is lost.
const WRITES_BEFORE: usize = 100;

/// Time in which the first write must be acknowledged, or the measurement is given up.
const GIVE_UP: Duration = Duration::from_secs(30);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Times that the leader is lost, for each way of losing it.
    #[arg(long, default_value_t = 50)]
    kills: usize,
}

/// A way of losing the leader, and the stall promised for 99 of 100 cases.
struct Way {
    name: &'static str,
    aim: Duration,
    lose: fn(&mut NodeProcess),
    restore: fn(&mut NodeProcess),
}

const WAYS: [Way; 3] = [
    Way {
        name: "kill -9",
        aim: Duration::from_millis(500),
        lose: NodeProcess::kill_9,
        restore: NodeProcess::start,
    },
    Way {
        name: "SIGSTOP",
        aim: Duration::from_millis(1500),
        lose: NodeProcess::pause,
        restore: NodeProcess::resume,
    },
    Way {
        name: "SIGTERM",
        aim: Duration::from_millis(500),
        lose: |node| assert!(node.terminate().success(), "a stop ends well"),
        restore: NodeProcess::start,
    },
];

/// Measures each way and prints a table.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    println!("leader lost by    times    p50 ms    p99 ms    max ms    aim p99 ms");
    for way in WAYS {
        let mut cluster = cluster(3, &place.dir, &place.replica);
        let mut stalls = Vec::new();
        for _ in 0..args.kills {
            stalls.push(lose_leader(&mut cluster, &way)?);
        }
        stalls.sort_unstable();
        let at = |percent: usize| {
            let place = (stalls.len() * percent).div_ceil(100).max(1) - 1;
            stalls.get(place).map_or(f64::NAN, |stall| stall.as_secs_f64() * 1000.0)
        };
        println!(
            "{:<15} {:>7} {:>9.1} {:>9.1} {:>9.1} {:>13}",
            way.name,
            stalls.len(),
            at(50),
            at(99),
            at(100),
            way.aim.as_millis(),
        );
    }
    Ok(())
}

fn lose_leader(cluster: &mut Cluster, way: &Way) -> Result<Duration> {
    cluster.wait_until_serving();
    let leader = cluster.wait_leader();
    let survivor = cluster.followers()[0];
    let options =
        ConnectOptions { export: EXPORT.to_owned(), timeout: GIVE_UP, ..ConnectOptions::default() };
    let address = cluster.at(survivor).nbd_address();
    let client = NbdClient::connect_with(address, &options).context("attach to a follower")?;
    let stop = Arc::new(AtomicBool::new(false));
    let (writer, writes) = start_writer(client, Arc::clone(&stop));
    for _ in 0..WRITES_BEFORE {
        writes.recv_timeout(GIVE_UP).context("write before the leader is lost")?;
    }
    let lost = Instant::now();
    (way.lose)(cluster.at_mut(leader));
    let stall = first_after(&writes, lost);
    stop.store(true, Ordering::Relaxed);
    (way.restore)(cluster.at_mut(leader));
    let _ = writer.join();
    stall
}

/// From `lost` to the end of the first write that was sent after it.
fn first_after(writes: &Receiver<(Instant, Instant)>, lost: Instant) -> Result<Duration> {
    loop {
        let (sent, done) =
            writes.recv_timeout(GIVE_UP).context("write after the leader is lost")?;
        if sent >= lost {
            return Ok(done - lost);
        }
    }
}

/// Writes until told to stop, and tells when each write was sent and acknowledged.
fn start_writer(
    mut client: NbdClient,
    stop: Arc<AtomicBool>,
) -> (thread::JoinHandle<()>, Receiver<(Instant, Instant)>) {
    let (told, writes) = channel();
    let writer = thread::spawn(move || {
        let block = [0x5a; BLOCK_BYTES];
        let mut offset = 0;
        while !stop.load(Ordering::Relaxed) {
            let sent = Instant::now();
            if client.write(offset, &block).is_err() || told.send((sent, Instant::now())).is_err() {
                return;
            }
            offset = (offset + BLOCK_BYTES as u64) % VOLUME_BYTES;
        }
    });
    (writer, writes)
}
