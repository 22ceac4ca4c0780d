//! `nbd-control`: the control API.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbd_control::program::main()
}
