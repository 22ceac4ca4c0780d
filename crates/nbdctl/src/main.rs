//! `nbdctl`: the user's command.

mod replica;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nbd_service::exit::{parse_args, report};

/// Cinderblock: block volumes over NBD that survive what happens to machines.
#[derive(Debug, Parser)]
#[command(name = "nbdctl", version, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster in this process and say how to attach a volume.
    Up(Box<up::Args>),
    /// Show and change which nodes hold a shard.
    Replica(Box<replica::Args>),
}

fn main() -> ExitCode {
    match parse_args::<Args>() {
        Ok(Args { command: Command::Up(args) }) => report(up::run(*args)),
        Ok(Args { command: Command::Replica(args) }) => report(replica::run(*args)),
        Err(code) => code,
    }
}
