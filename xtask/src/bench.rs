//! `cargo xtask bench`: the benchmark program and the servers it measures, in release.

use std::path::Path;
use std::process::Command;

use crate::process;
use crate::test::{BIN_DIR, target_directory};

const PROGRAM: &str = "cinderblock-benches";

/// Builds the benchmarks, the replica and the load balancer, and runs the former with `args`.
pub(crate) fn run(root: &Path, args: &[String]) -> anyhow::Result<()> {
    let mut build = process::cargo(root);
    build.args(["build", "--locked", "--release", "--workspace"]);
    build.args(["--bin", PROGRAM, "--bin", "nbd-replica", "--bin", "nbd-lb"]);
    process::run(&mut build)?;
    let binaries = target_directory(root)?.join("release");
    let mut program = Command::new(binaries.join(PROGRAM));
    program.current_dir(root).env(BIN_DIR, &binaries);
    if !args.iter().any(|argument| argument.starts_with("--replica")) {
        program.arg("--replica").arg(binaries.join("nbd-replica"));
    }
    process::run(program.args(args))
}
