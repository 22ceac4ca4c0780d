//! `cargo xtask sim`: the simulation in release, over many seeds or one again.

use std::path::Path;
use std::process::Command;

use crate::process;
use crate::test::target_directory;

const PROGRAM: &str = "nbd-sim";

/// Builds the simulation and runs it with `args`.
pub(crate) fn run(root: &Path, args: &[String]) -> anyhow::Result<()> {
    let mut build = process::cargo(root);
    build.args(["build", "--locked", "--release", "--package", PROGRAM]);
    process::run(&mut build)?;
    let mut program = Command::new(target_directory(root)?.join("release").join(PROGRAM));
    process::run(program.current_dir(root).args(args))
}
