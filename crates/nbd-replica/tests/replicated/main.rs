//! Three replicas as processes: what a client and an operator see when nodes come, fall away, come
//! back with what they had, with too little, with nothing, or with something broken.
//!
//! [`formation`]: a cluster that begins. [`failover`]: the leader is lost under load. [`catch_up`]:
//! a replica comes back. [`majority`]: too few replicas are left. [`identity`]: data directories
//! that do not belong. [`isolation`]: a node whose peers do without it ends. [`measures`]: what its
//! metrics say of a write and of the members. [`repair`]: a disk that changes what it holds.
//! [`sessions`]: what is left of clients whose node is gone.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod catch_up;
mod failover;
mod formation;
mod identity;
mod isolation;
mod majority;
mod measures;
mod repair;
mod sessions;

use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::load::{Load, LoadOptions};
use nbd_testkit::{Cluster, ClusterBuilder, NbdClient, Target, seed};

const MIB: u64 = 1 << 20;

/// Time for anything that is awaited; nothing takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(60);

/// Three replicas with volumes of 64 MiB, and a log so short that checkpoints and recycling happen.
fn builder() -> ClusterBuilder {
    Cluster::builder()
        .replicas(3)
        .argument("--log-segment-bytes=4MiB")
        .argument("--log-bytes-max=32MiB")
        .argument("--checkpoint-log-bytes=4MiB")
        .argument("--log-cache-bytes=4MiB")
}

fn cluster() -> Cluster {
    let mut cluster = builder().start();
    cluster.wait_until_serving();
    cluster
}

/// A load of two threads that ends soon enough for tests.
fn load(targets: &[Target]) -> Load {
    let seed = seed();
    let options = LoadOptions { threads: 2, region_bytes: 1 << 20, seed, ..Default::default() };
    Load::start(targets, options)
}

/// Stops a load, and checks all it knows through every node and that all nodes hold the same.
fn finish(load: Load, cluster: &mut Cluster) -> nbd_testkit::load::Finished {
    cluster.wait_until_serving();
    let mut finished = load.stop().unwrap_or_else(|failure| panic!("{failure}"));
    for target in cluster.targets() {
        finished.verify(&target).unwrap_or_else(|failure| panic!("{failure}"));
    }
    finished.check_history().unwrap_or_else(|failure| panic!("{failure}"));
    cluster.wait_until_equal();
    finished
}

/// Waits for a condition.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Writes `len` bytes from `offset` on that tell where they belong and which `round` wrote them.
fn fill(client: &mut NbdClient, offset: u64, len: u64, round: u64) {
    for offset in (offset..offset + len).step_by(1 << 20) {
        client.write(offset, &pattern(offset, round)).expect("write");
    }
}

/// Expects what [`fill`] wrote.
#[track_caller]
fn expect(client: &mut NbdClient, offset: u64, len: u64, round: u64) {
    for offset in (offset..offset + len).step_by(1 << 20) {
        let content = client.read(offset, 1 << 20).expect("read");
        assert!(content == pattern(offset, round), "content at {offset}");
    }
}

/// A MiB whose every 16 bytes are unlike any others.
fn pattern(offset: u64, round: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 << 20);
    for place in (offset..offset + MIB).step_by(16) {
        bytes.extend_from_slice(&(place ^ 0xc1de_0000_0000_0000).to_le_bytes());
        bytes.extend_from_slice(&(round + 1).to_le_bytes());
    }
    bytes
}
