//! `nbdctl run-child`: becomes another program, which ends when its parent does.
//!
//! The kernel sees to it: it sends SIGKILL to a process whose parent has ended, if the process has
//! asked for that. Only the process itself can ask, and exec keeps the wish: so the services need
//! not know. A child that is stopped (SIGSTOP) ends too.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt as _, parent_id};
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use nbd_service::Failure;
use rustix::process::{Signal, set_parent_process_death_signal};

/// Flags of `nbdctl run-child`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The id of the parent. If another process is, the parent has ended.
    #[arg(long, value_name = "PID")]
    parent: u32,

    /// The program to become.
    program: PathBuf,

    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Returns only if the program cannot be started.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("ask to end with the parent")?;
    // It may have ended before that.
    if parent_id() != args.parent {
        return Err(anyhow::anyhow!("the parent has ended").into());
    }
    let error = Command::new(&args.program).args(&args.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", args.program.display()))?
}
