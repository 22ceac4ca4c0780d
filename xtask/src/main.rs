//! The one door for developers: `cargo xtask <command>`.
//!
//! CI runs exactly `cargo xtask ci`; whatever passes here passes there. Commands are plain child
//! processes and each says what it runs.
//!
//! - [`mod@test`]: install missing test tools, run every test, print the totals.
//! - [`ci`]: the static checks, then the same tests.
//! - [`deps`]: who may depend on whom.
//! - [`tidy`]: what neither the compiler, clippy nor rustfmt checks; [`drawings`]: that documents
//!   and modules draw the same.
//! - [`mod@bench`]: paired measurements, in release.
//! - [`chaos`]: three replicas under load with faults all the time, in release, for as long as one
//!   likes.
//! - [`compose`]: the cluster of `compose.yaml` in containers, under faults.
//! - [`sim`]: a whole cluster in one thread, over as many seeds as one likes, in release.

mod bench;
mod chaos;
mod ci;
mod compose;
mod deps;
mod drawings;
mod process;
mod sim;
mod test;
mod tidy;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of Cinderblock.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every test; the last line is `N passed, N failed, N skipped`.
    Test {
        /// Leave missing test tools missing; the tests that need them are skipped.
        #[arg(long)]
        no_install: bool,
        /// Passed on to `cargo test`, as in `-- placement`.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Format, lints, docs, deps, tidy, then every test. Each check counts as one test.
    Ci {
        /// Leave missing test tools missing; the tests that need them are skipped.
        #[arg(long)]
        no_install: bool,
    },
    /// Check the direction of dependencies and the fences around them.
    Deps,
    /// Check file sizes, leftovers and crate docs.
    Tidy,
    /// Build in release and run the benchmarks.
    Bench {
        /// Passed on to the benchmark program: `--rounds 3`, or `failover --kills 50`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Build in release, and kill, pause and cut off replicas, and load balancers if there are any,
    /// under a verified load.
    Chaos(chaos::Args),
    /// Build the image as it ships, and test the cluster of compose.yaml under faults. Needs Docker
    /// and compose, and no image registry.
    ComposeTest(compose::Args),
    /// Build in release and run the simulation.
    Sim {
        /// Passed on to the simulation: `--seeds 10000`, or `--seed 4711` to see one again.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was asked for succeeded.
fn run(command: Command) -> anyhow::Result<bool> {
    let root = process::workspace_root();
    match command {
        Command::Test { no_install, args } => {
            tools::ensure(&root, !no_install);
            Ok(test::run(&root, &args).report())
        }
        Command::Ci { no_install } => Ok(ci::run(&root, no_install).report()),
        Command::Deps => deps::check(&root).map(|()| true),
        Command::Tidy => tidy::check(&root).and_then(|()| drawings::check(&root)).map(|()| true),
        Command::Bench { args } => bench::run(&root, &args).map(|()| true),
        Command::Sim { args } => sim::run(&root, &args).map(|()| true),
        Command::ComposeTest(args) => compose::run(&root, args).map(|()| true),
        Command::Chaos(args) => chaos::run(&root, args),
    }
}
