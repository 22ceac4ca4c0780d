//! The terminal: whether there is one, what it can do, and asking whoever sits at it.

use std::env;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::fd::AsFd;

use crate::failure::{FAILED, Failure};

/// Columns and rows of a terminal that does not tell.
const SIZE_DEFAULT: (usize, usize) = (80, 24);

/// Whether colours are of use on standard output.
pub(crate) fn shows_colours() -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// Columns and rows.
pub(crate) fn size(terminal: impl AsFd) -> (usize, usize) {
    match rustix::termios::tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            (usize::from(size.ws_col), usize::from(size.ws_row))
        }
        _ => SIZE_DEFAULT,
    }
}

/// Asks at a terminal whether something is meant. Without one, nobody can be asked, and what a
/// script says is meant.
///
/// # Errors
/// It is not meant.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    if yes || !io::stdin().is_terminal() {
        return Ok(());
    }
    let mut stderr = io::stderr();
    write!(stderr, "{question} [y/N] ")?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if !answer.ends_with('\n') {
        writeln!(stderr)?;
    }
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::new(FAILED, "nothing was done")),
    }
}
