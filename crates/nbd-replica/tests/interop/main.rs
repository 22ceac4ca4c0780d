//! Clients that other people wrote, against a real node: what they see is what the NBD document
//! promises them, and what they wrote is there.
//!
//! A module for each client: [`nbdinfo`], [`nbdcopy`], [`qemu`], [`fio`], [`ext4`] (through nbdfuse
//! and a loop device). Then what concerns several: [`multi_conn`], [`restart`], [`old_clients`],
//! and [`trouble`], of which there must be none. The helpers are [`command`] (running a program),
//! [`map`] (where data is), [`content`] (what to write) and [`cluster`] (the node they meet). A
//! test whose client is not installed skips itself.
//!
//! All of it runs twice: here with one replica, and in `interop_replicated` with three, attached to
//! one that does not lead.

mod cluster;
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

use nbd_testkit::{Cluster, ClusterBuilder};

use self::cluster::{KIB, MIB, cluster};

/// The cluster that all tests of this binary meet.
fn start(builder: ClusterBuilder) -> Cluster {
    builder.start()
}
