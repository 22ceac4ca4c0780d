//! How a command ends that could not do what it was asked: an exit code that programs can tell
//! apart, and lines that tell people what to do about it.

use std::fmt;
use std::io;
use std::process::ExitCode;

use nbd_service::exit::USAGE;

use crate::output::human;

/// Exit code: it failed, for none of the reasons below.
pub(crate) const FAILED: u8 = 1;

/// Exit code: there is no such thing.
pub(crate) const NOT_FOUND: u8 = 2;

/// Exit code: as things stand, it cannot be done.
pub(crate) const CONFLICT: u8 = 3;

/// Exit code: no control API, or the shard has no majority. Trying again later may help.
pub(crate) const UNAVAILABLE: u8 = 4;

/// Exit code: no token, an unknown one, or one that does not allow it.
pub(crate) const NOT_ALLOWED: u8 = 5;

/// The codes, for `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0   it is done
  1   it failed
  2   there is no such thing
  3   conflict: as things stand, it cannot be done
  4   unavailable: no control API there, or a shard without majority; try again later
  5   not allowed: no token, or one that is not known or does not suffice
  64  a mistake in flags, environment or configuration";

/// Why a command ends without success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    code: u8,
    /// What went wrong; none if the output has said so.
    message: Option<String>,
    /// What is wrong with each value, and what to do.
    notes: Vec<String>,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: Some(message.into()), notes: Vec::new() }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, message)
    }

    /// Of an error and its causes.
    pub(crate) fn with_code(code: u8, error: &anyhow::Error) -> Self {
        let mut message = String::new();
        let mut previous = String::new();
        for cause in error.chain() {
            let text = cause.to_string();
            // A wrapper that only repeats its source adds nothing.
            if text != previous {
                let colon = if message.is_empty() { "" } else { ": " };
                message = format!("{message}{colon}{text}");
            }
            previous = text;
        }
        Self::new(code, message)
    }

    /// An end with this code, of which nothing is left to be said.
    pub(crate) const fn silent(code: u8) -> Self {
        Self { code, message: None, notes: Vec::new() }
    }

    pub(crate) const fn code(&self) -> u8 {
        self.code
    }

    /// Adds what to do about it.
    pub(crate) fn hint(self, hint: impl AsRef<str>) -> Self {
        let hint = format!("hint: {}", hint.as_ref());
        self.note(hint)
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// The lines for standard error.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        let message = self.message.iter().map(|message| format!("error: {}", one_line(message)));
        message.chain(self.notes.iter().map(|note| one_line(note)))
    }

    /// Does something with each of several, by name, also after one that failed, and tells of those
    /// at once. The code is theirs, if they have the same.
    pub(crate) fn of_each(
        names: &[String],
        mut each: impl FnMut(&str) -> Result<(), Self>,
    ) -> Result<(), Self> {
        let mut codes = Vec::new();
        for name in names {
            match each(name) {
                Err(failure) if names.len() == 1 => return Err(failure),
                // The output is gone: nobody would learn what becomes of the others.
                Err(failure) if failure.message.is_none() => return Err(failure),
                Err(failure) => {
                    failure.report_as(&human::name(name));
                    codes.push(failure.code);
                }
                Ok(()) => {}
            }
        }
        match codes.as_slice() {
            [] => Ok(()),
            [first, rest @ ..] => {
                let alike = rest.iter().all(|code| code == first);
                Err(Self::silent(if alike { *first } else { FAILED }))
            }
        }
    }

    /// Writes them, the first one with what it is about: one of several.
    pub(crate) fn report_as(&self, subject: &str) {
        let about = |message| format!("{subject}: {message}");
        let failure = Self { message: self.message.as_deref().map(about), ..self.clone() };
        failure.report();
    }

    /// Writes them, and gives the code.
    pub(crate) fn report(&self) -> ExitCode {
        for line in self.lines() {
            eprintln!("{line}");
        }
        self.code.into()
    }
}

/// What went wrong and what to do, in one line.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self.message.iter().chain(&self.notes).map(|text| one_line(text));
        f.write_str(&texts.collect::<Vec<_>>().join("; "))
    }
}

/// So that it can be the cause of another error, and be found again.
impl std::error::Error for Failure {}

/// With the exit code of a failure among the causes, if there is one.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => Self::with_code(FAILED, &error),
        }
    }
}

/// Of writing the output. A reader that has gone away (`| head`) has all it wanted.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::silent(0),
            _ => Self::new(FAILED, format!("cannot write the output: {error}")),
        }
    }
}

/// Without line breaks and without anything that a terminal would obey; blanks in front stay.
fn one_line(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.trim_end().chars().map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_code_and_tells_its_causes() {
        use anyhow::Context as _;

        let taken = Failure::new(CONFLICT, "there is a volume vol1 already").hint("another name");
        assert_eq!(Failure::from(anyhow::Error::from(taken.clone())), taken);
        let error = Err::<(), _>(io::Error::other("it is gone")).context("open x").unwrap_err();
        assert_eq!(Failure::from(error), Failure::new(FAILED, "open x: it is gone"));
    }

    #[test]
    fn what_a_server_says_cannot_steer_the_terminal() {
        let failure = Failure::new(CONFLICT, "no\n\x1b[2Jroom").hint("tidy\rup");
        let lines: Vec<String> = failure.lines().collect();
        assert_eq!(lines, ["error: no  [2Jroom", "hint: tidy up"]);
    }

    #[test]
    fn a_reader_that_has_enough_is_no_failure() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((failure.code(), failure.lines().count()), (0, 0));
        let full = Failure::from(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(full.code(), FAILED);
    }
}
