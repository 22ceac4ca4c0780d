//! One client, attached to a replica that stays, writes 4 KiB blocks one after the other. What
//! counts is the time from just before the leader is lost to the acknowledgement of the first write
//! that was sent after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nbd_testkit::{Cluster, ConnectOptions, NbdClient};

use super::Way;
use crate::server::{EXPORT, VOLUME_BYTES};

/// Bytes of each write.
const BLOCK_BYTES: usize = 4096;

/// Writes acknowledged before the leader is lost.
const WRITES_BEFORE: usize = 100;

/// Time in which the first write must be acknowledged, or the measurement is given up.
const GIVE_UP: Duration = Duration::from_secs(30);

/// Loses the leader once. Gives the stall.
pub(super) fn lose_leader(cluster: &mut Cluster, way: &Way) -> Result<Duration> {
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
