//! `nbd-replica`: serves the replicas of one node.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbd_replica::program::main()
}
