//! Clients that other people wrote, against a real node: what they see is what the NBD document
//! promises them, and what they wrote is there.
//!
//! A module for each client: [`nbdinfo`], [`nbdcopy`], [`qemu`], [`fio`], [`ext4`] (through nbdfuse
//! and a loop device). Then what concerns several: [`multi_conn`], [`restart`], [`old_clients`],
//! and [`trouble`], of which there must be none. The helpers are [`command`] (running a program),
//! [`map`] (where data is) and [`content`] (what to write). A test whose client is not installed
//! skips itself.

mod command;
mod content;
mod ext4;
mod fio;
mod map;
mod multi_conn;
mod nbdcopy;
mod nbdinfo;
mod old_clients;
mod qemu;
mod restart;
mod trouble;

use nbd_testkit::Cluster;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A node whose volumes have `size`, as in `64MiB`. Its log is so short that checkpoints run while
/// the clients write, and what they read comes from the chunk store as well as from the log.
fn cluster(size: &str) -> Cluster {
    Cluster::builder()
        .default_size(size)
        .argument("--log-segment-bytes=8MiB")
        .argument("--log-bytes-max=64MiB")
        .argument("--checkpoint-log-bytes=8MiB")
        .start()
}
