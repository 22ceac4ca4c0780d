//! `cargo xtask chaos`: the release build of the replica, and the test kit's chaos.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nbd_testkit::chaos::{self, ChaosOptions};
use nbd_testkit::load::LoadOptions;

use crate::process;
use crate::test::target_directory;

/// Builds the replica and runs chaos for so long. `false`: something was wrong, and is printed.
pub(crate) fn run(
    root: &Path,
    minutes: f64,
    seed: Option<u64>,
    directory: Option<PathBuf>,
) -> anyhow::Result<bool> {
    let duration = Duration::try_from_secs_f64(minutes * 60.0).context("use --minutes")?;
    let mut build = process::cargo(root);
    build.args(["build", "--locked", "--release", "--package", "nbd-replica"]);
    process::run(&mut build)?;
    if let Some(directory) = &directory {
        std::fs::create_dir_all(directory).context("create the data directory")?;
    }
    let seed = seed.unwrap_or_else(nbd_testkit::seed);
    println!("chaos for {minutes} minutes, seed {seed}");
    let options = ChaosOptions {
        seed,
        duration,
        load: LoadOptions::default(),
        program: Some(target_directory(root)?.join("release/nbd-replica")),
        directory,
    };
    match chaos::run(&options) {
        Ok(report) => {
            println!("{report}");
            Ok(true)
        }
        Err(failure) => {
            println!("FAILED with CINDERBLOCK_SEED={}: {failure}", options.seed);
            Ok(false)
        }
    }
}
