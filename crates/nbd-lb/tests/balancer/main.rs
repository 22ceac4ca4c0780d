//! The load balancer and replicas as processes: who leads, found and kept up with, clients whose
//! connection outlives every replica, and those whose bytes are moved within the kernel.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod beside;
mod carrying;
#[path = "../../../nbd-replica/tests/interop/cases/command.rs"]
mod command;
mod draining;
mod finding;
mod health;
mod idle;
mod limits;
mod memory;
mod multi_conn;
mod placement;
mod process;
mod reading;
mod sessions;
mod splicing;
mod succession;
mod successor;
mod support;
mod takeover;
