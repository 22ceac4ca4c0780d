//! `cargo xtask compose-test`: the cluster of `compose.yaml` in containers, under faults.
//!
//! The test itself is the program `nbd-compose`; here is what it needs: an `nbdctl` for the image.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;
use crate::test::{SKIP_LOG, Totals, target_directory};

const PROGRAM: &str = "nbd-compose";

/// What is to be tested.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An `nbdctl` that is built already, statically linked. Default: it is built as it ships.
    #[arg(long)]
    program: Option<PathBuf>,
}

/// Tests what ships: the static program of the profile `dist`, in an image as small as is promised.
pub(crate) fn run(root: &Path, args: Args) -> anyhow::Result<()> {
    let target = target_directory(root)?;
    let program = match args.program {
        Some(program) => program,
        None => build_shipped(root, &target)?,
    };
    // The whole workspace, so that dependencies have the features that they have in tests.
    let mut build = process::cargo(root);
    process::run(build.args(["build", "--locked", "--workspace", "--bin", PROGRAM]))?;
    process::run(test(root, &target, &program).arg("--shipped"))
}

/// As docs/DEPLOYMENT.md has it, "Without a registry".
fn build_shipped(root: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    let host = process::host()?;
    let mut build = process::cargo(root);
    build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    build.args(["build", "--locked", "--profile", "dist", "--package", "nbdctl"]);
    process::run(build.args(["--target", &host]))?;
    Ok(target.join(host).join("dist/nbdctl"))
}

/// The same as one of the tests, with the `nbdctl` that they use: nothing is built.
pub(crate) fn as_one_test(root: &Path, target: &Path, skip_log: &Path) -> Totals {
    let mut test = test(root, target, &target.join("debug/nbdctl"));
    match process::run(test.env(SKIP_LOG, skip_log)) {
        Ok(()) => Totals { passed: 1, ..Totals::default() },
        Err(error) => {
            println!("error: {error:#}");
            Totals { failed: 1, ..Totals::default() }
        }
    }
}

fn test(root: &Path, target: &Path, program: &Path) -> Command {
    let mut test = Command::new(target.join("debug").join(PROGRAM));
    test.current_dir(root).args(["test", "--program"]).arg(program);
    test
}
