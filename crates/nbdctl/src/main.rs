//! `nbdctl`: the user's command.
//!
//! - `up`: a whole cluster on this machine.
//! - `volume`, `session`, `shard`, `node`, `operation`, `health`, `top`: what the control API knows
//!   and does. `api` asks it, `output` prints, `failure` says how they end.
//! - `replica`: what a single replica knows and does, without a control API. `probe`: one HTTP
//!   request.
//! - `program`: the services, which this program is when it is called by their names.

mod api;
mod attach;
mod child;
mod completions;
mod copy;
mod failure;
mod health;
mod node;
mod operation;
mod output;
mod probe;
mod program;
mod replica;
mod session;
mod shard;
mod top;
mod up;
mod volume;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use nbd_service::exit::{parse_command, report};

use self::api::Connection;
use self::failure::{EXIT_CODES, Failure};

/// Cinderblock: block volumes over NBD that survive what happens to machines.
#[derive(Debug, Parser)]
#[command(name = "nbdctl", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Args {
    #[command(flatten)]
    connection: Connection,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster on this machine and say how to attach a volume.
    Up(Box<up::Args>),
    /// Make, show, grow and delete volumes.
    #[command(after_help = volume::HELP)]
    Volume(volume::Args),
    /// Show who uses volumes, and disconnect them.
    #[command(after_help = session::HELP)]
    Session(session::Args),
    /// Show the shards, and change which nodes hold them and lead them.
    #[command(after_help = shard::HELP)]
    Shard(shard::Args),
    /// Show the nodes, and take them out of use for maintenance.
    #[command(after_help = node::HELP)]
    Node(node::Args),
    /// Show and cancel what takes long.
    #[command(after_help = operation::HELP)]
    Operation(operation::Args),
    /// Say whether the cluster is well, by the exit code too.
    #[command(after_help = health::HELP)]
    Health,
    /// Watch volumes and shards at work.
    #[command(after_help = top::HELP)]
    Top(top::Args),
    /// Make a volume a block device of this machine.
    Attach(attach::AttachArgs),
    /// Take a block device away again.
    Detach(attach::DetachArgs),
    /// Copy an image into a volume.
    Import(Box<copy::ImportArgs>),
    /// Copy a volume into an image.
    Export(Box<copy::ExportArgs>),
    /// Show and change which nodes hold a shard, asking a replica itself: of use where no control
    /// API runs. The usual way is `nbdctl shard`.
    Replica(Box<replica::Args>),
    /// Give NBD clients to several load balancers: one address where the network has none to offer.
    Balance(Box<nbd_balance::Args>),
    /// Ask for one URL, and say by the exit code whether it answers well: for health checks.
    #[command(after_help = probe::HELP)]
    Probe(probe::Args),
    /// Print what makes a shell complete the words of nbdctl.
    #[command(after_help = completions::HELP)]
    Completions(completions::Args),
    /// Become another program, which ends when its parent does.
    #[command(hide = true)]
    RunChild(child::Args),
}

/// Commands that do not ask the control API.
const WITHOUT_API: [&str; 9] =
    ["up", "attach", "detach", "export", "replica", "balance", "probe", "completions", "run-child"];

/// The command line. What says whom to ask is shown where somebody is asked.
fn command() -> clap::Command {
    let mut command = Args::command();
    let connection = command.get_arguments().filter(|arg| arg.is_global_set());
    let hidden: Vec<clap::Arg> = connection.map(|arg| arg.clone().hide(true)).collect();
    for name in WITHOUT_API {
        command = command.mut_subcommand(name, |command| with(command, &hidden));
    }
    command
}

/// Gives a command, and those below it, these in place of the global ones of the same names.
fn with(mut command: clap::Command, hidden: &[clap::Arg]) -> clap::Command {
    let nested: Vec<String> =
        command.get_subcommands().map(|nested| nested.get_name().to_owned()).collect();
    for name in nested {
        command = command.mut_subcommand(name, |command| with(command, hidden));
    }
    command.args(hidden)
}

fn main() -> ExitCode {
    if let Some(main) = program::named(std::env::args_os().next().as_deref()) {
        return main();
    }
    let Args { connection, command } = match parse_command::<Args>(command()) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let done = match command {
        Command::Up(args) => return alone(&connection, || report(up::run(*args))),
        Command::Replica(args) => return alone(&connection, || report(replica::run(*args))),
        Command::Attach(args) => return alone(&connection, || report(attach::attach(&args))),
        Command::Detach(args) => return alone(&connection, || report(attach::detach(&args))),
        Command::Import(args) => return ended(copy::import(*args, &connection)),
        Command::Export(args) => return alone(&connection, || ended(copy::export(*args))),
        Command::Balance(args) => {
            return alone(&connection, || report(nbd_balance::program::run(*args)));
        }
        Command::Probe(args) => return alone(&connection, || ended(probe::run(&args))),
        Command::RunChild(args) => return report(child::run(args)),
        Command::Completions(args) => {
            return alone(&connection, || ended(completions::run(&args)));
        }
        Command::Volume(args) => volume::run(args, &connection),
        Command::Session(args) => session::run(args, &connection),
        Command::Shard(args) => shard::run(args, &connection),
        Command::Node(args) => node::run(args, &connection),
        Command::Operation(args) => operation::run(args, &connection),
        Command::Health => health::run(&connection),
        Command::Top(args) => top::run(&args, &connection),
    };
    ended(done)
}

fn ended(done: Result<(), Failure>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Runs what has no use for the control API.
fn alone(connection: &Connection, run: impl FnOnce() -> ExitCode) -> ExitCode {
    match connection.given() {
        None => run(),
        Some(flag) => {
            Failure::usage(format!("this command does not ask the control API: take {flag} away"))
                .report()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_of_the_control_api_are_shown_where_it_is_asked() {
        let help = |path: &[&str]| {
            let words = ["nbdctl"].iter().chain(path).chain(&["--help"]);
            command().try_get_matches_from(words).unwrap_err().to_string()
        };
        for asks in [&["volume", "list"][..], &["top"], &["operation", "watch"], &[]] {
            assert!(help(asks).contains("--server"), "{asks:?}");
        }
        for does_not in [
            &["up"][..],
            &["replica"],
            &["probe"],
            &["balance"],
            &["replica", "list"],
            &["completions"],
        ] {
            assert!(!help(does_not).contains("--server"), "{does_not:?}");
        }
    }
}
