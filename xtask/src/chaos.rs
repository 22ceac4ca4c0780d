//! `cargo xtask chaos`: release builds of the replica and the load balancer, and the test kit's
//! chaos.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nbd_testkit::chaos::{self, ChaosOptions};
use nbd_testkit::load::LoadOptions;

use crate::process;
use crate::test::target_directory;

/// What is to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Repeats the schedule of an earlier run. Default: a random one, which is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Load balancers that clients attach through, which are killed, stopped and paused as well.
    /// With 0 clients attach to the replicas.
    #[arg(long, default_value_t = 0)]
    balancers: usize,
    /// Where the nodes keep their data. Default: the system's directory for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Builds the servers and runs chaos for so long. `false`: something was wrong, and is printed.
pub(crate) fn run(root: &Path, args: Args) -> anyhow::Result<bool> {
    let Args { minutes, seed, balancers, dir: directory } = args;
    let duration = Duration::try_from_secs_f64(minutes * 60.0).context("use --minutes")?;
    let mut build = process::cargo(root);
    build.args(["build", "--locked", "--release", "--workspace"]);
    build.args(["--bin", "nbd-replica", "--bin", "nbd-lb"]);
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
        balancers,
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
