//! `nbd-lb`: the load balancer.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbd_lb::program::main()
}
