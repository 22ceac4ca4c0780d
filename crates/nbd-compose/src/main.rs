//! The cluster of `compose.yaml`, as shipped, under faults: `cargo xtask compose-test`.
//!
//! Builds the image of `deploy/Dockerfile` around a program that is built already, starts the
//! cluster as a compose project of its own, at free ports, and holds it to what the documents
//! promise: health checks, metrics, one write's trace across all services, other people's clients,
//! and no wrong byte and no error while containers are killed, frozen, cut off and made deaf. Needs
//! a Docker engine and compose, and no registry: in Jaeger's place there is a collector of spans in
//! this process. Whatever it makes bears the project's name, and is taken down in the end, however
//! that comes about.
//!
//! - `story`: the run, from the image to the last check. `steps`: what it tells.
//! - [`cluster`]: the project, and looks at it. [`image`]: its image.
//! - [`trial`]: load and faults. [`fault`]: what is done to one container. [`attaching`]: clients
//!   that come and go meanwhile.
//! - [`clients`], [`metrics`], [`traces`]: what else is checked.
//! - [`engine`]: Docker and compose. [`bounded`], [`waiting`]: deadlines.
//! - [`sweeper`]: takes down what was made.

mod attaching;
mod bounded;
mod clients;
mod cluster;
mod engine;
mod fault;
mod image;
mod metrics;
mod steps;
mod story;
mod sweeper;
mod traces;
mod trial;
mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The cluster of compose.yaml, under faults.
#[derive(Debug, Parser)]
#[command(name = "nbd-compose")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build an image, start the cluster, and test it. Without Docker: say so, and succeed.
    Test(TestArgs),
    /// Wait for the end of standard input, and remove all of a project.
    #[command(hide = true)]
    Sweep {
        /// The project.
        project: String,
    },
}

/// What is to be tested.
#[derive(Debug, clap::Args)]
struct TestArgs {
    /// The repository, with compose.yaml.
    #[arg(long, default_value = ".")]
    root: PathBuf,
    /// The `nbdctl` for the image. One that is not static takes its libraries along.
    #[arg(long)]
    program: PathBuf,
    /// It is what ships: it must be static, and the image as small as is promised.
    #[arg(long)]
    shipped: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Test(args) => story::run(&args),
        Command::Sweep { project } => sweeper::main(&project),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
