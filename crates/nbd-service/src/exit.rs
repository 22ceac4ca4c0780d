//! How a process ends: exit codes, and errors as one line on standard error.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::{FromArgMatches, Parser};

/// Exit code for a mistake in flags, environment or configuration: `EX_USAGE` of `sysexits.h`.
/// Restarting does not help, so supervisors may tell it from a failure at run time (1).
pub const USAGE: u8 = 64;

/// Exit code of a process that has ended so that a supervisor starts it again: `EX_TEMPFAIL` of
/// `sysexits.h`.
pub const RESTART: u8 = 75;

/// Why a process ends without success.
#[derive(Debug)]
pub enum Failure {
    /// The operator's mistake: exit code [`USAGE`].
    Usage(anyhow::Error),
    /// Anything that went wrong at run time: exit code 1.
    Runtime(anyhow::Error),
    /// Nothing is broken, and a new process is what helps: exit code [`RESTART`].
    Restart(anyhow::Error),
}

impl Failure {
    /// Marks `error` as the operator's mistake, for `map_err`.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }

    /// Says that a new process is what helps.
    pub fn restart(error: impl Into<anyhow::Error>) -> Self {
        Self::Restart(error.into())
    }

    /// The exit code of this failure.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::Runtime(_) => 1,
            Self::Restart(_) => RESTART,
        }
    }

    /// The failure and its causes as one line without line breaks: `error: outer: inner:
    /// innermost`.
    #[must_use]
    pub fn line(&self) -> String {
        let (Self::Usage(error) | Self::Runtime(error) | Self::Restart(error)) = self;
        one_line(error)
    }
}

/// So that `?` on any error in a service's `main` makes a failure at run time.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Runtime(error.into())
    }
}

fn one_line(error: &anyhow::Error) -> String {
    let mut line = "error".to_owned();
    let mut previous = String::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        // A wrapper that only repeats its source (`#[error(transparent)]`) adds nothing.
        if text != previous {
            let _ = write!(line, ": {text}");
        }
        previous = text;
    }
    line
}

/// Turns the result of a service's main function into an exit code, and reports a failure as one
/// line on standard error.
pub fn report(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{}", failure.line());
            ExitCode::from(failure.code())
        }
    }
}

/// Parses the command line. `--help` and `--version` print and give `Err(success)`; a mistake
/// prints clap's explanation to standard error and gives `Err` with code [`USAGE`].
///
/// # Errors
/// The exit code that `main` should return at once.
pub fn parse_args<T: Parser>() -> Result<T, ExitCode> {
    parse_command(T::command())
}

/// As [`parse_args`], by `command`: that of `T`, with changes.
///
/// # Errors
/// As [`parse_args`].
pub fn parse_command<T: FromArgMatches>(mut command: clap::Command) -> Result<T, ExitCode> {
    let matches = command.try_get_matches_from_mut(std::env::args_os());
    let parsed = matches.and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let error = error.format(&mut command);
        let _ = error.print();
        clap_exit_code(&error).into()
    })
}

fn clap_exit_code(error: &clap::Error) -> u8 {
    if error.use_stderr() { USAGE } else { 0 }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[derive(Debug, Parser)]
    struct Args {
        #[arg(long)]
        count: u32,
    }

    #[test]
    fn a_chain_is_one_line() {
        let inner = std::io::Error::other("disk\n  on fire");
        let error = Err::<(), _>(inner).context("open log").context("start node").unwrap_err();
        assert_eq!(Failure::Runtime(error).line(), "error: start node: open log: disk on fire");
    }

    #[test]
    fn codes_tell_mistakes_from_failures() {
        assert_eq!(Failure::usage(anyhow::anyhow!("no such flag")).code(), 64);
        let failed = || -> Result<(), Failure> { Err(std::io::Error::other("x"))? };
        assert_eq!(failed().unwrap_err().code(), 1);
    }

    #[test]
    fn clap_mistakes_are_usage_errors_and_help_is_not() {
        let bad = Args::try_parse_from(["x", "--count", "many"]).unwrap_err();
        assert_eq!(clap_exit_code(&bad), 64);
        let help = Args::try_parse_from(["x", "--help"]).unwrap_err();
        assert_eq!(clap_exit_code(&help), 0);
        assert_eq!(Args::try_parse_from(["x", "--count", "3"]).unwrap().count, 3);
    }
}
