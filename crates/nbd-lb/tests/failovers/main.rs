//! Other people's clients attached through a load balancer while leaders are lost, in every way
//! that they can be: the clients must not notice more than a pause.
//!
//! [`fio`]: writes and verifies. [`file_system`]: an ext4 that is mounted and worked on by
//! [`files`]. [`leaders`]: loses them.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

#[path = "../../../nbd-replica/tests/interop/cases/command.rs"]
mod command;
#[expect(dead_code, reason = "of what there is to write, these tests need a part")]
#[path = "../../../nbd-replica/tests/interop/cases/content.rs"]
mod content;
mod file_system;
mod files;
mod fio;
mod leaders;
#[expect(dead_code, reason = "a mount that must not be lost is not abandoned")]
#[path = "../../../nbd-replica/tests/interop/cases/mount.rs"]
mod mount;

use std::sync::atomic::{AtomicBool, Ordering};

use nbd_testkit::Cluster;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Three replicas with a load balancer in front, which can be cut off from each other.
fn cluster() -> Cluster {
    let mut cluster = Cluster::builder()
        .replicas(3)
        .proxied()
        .argument("--log-segment-bytes=8MiB")
        .argument("--log-bytes-max=64MiB")
        .argument("--checkpoint-log-bytes=8MiB")
        .start();
    cluster.wait_until_serving();
    cluster.put_balancer_in_front();
    cluster
}

/// Set when this is dropped: a thread that looks at it ends also when the test that waits for it
/// fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
