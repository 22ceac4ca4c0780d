//! Running a client to its end.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a client may run. Each takes a few seconds at most; one that waits for an answer that
/// never comes must fail its test rather than hang it.
const DEADLINE: Duration = Duration::from_secs(60);

/// A program to be run.
pub(crate) struct Tool {
    name: String,
    command: Command,
}

/// How a run ended. Shown with all it wrote.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; it wrote:\n{}{}", self.status, self.stdout, self.stderr)
    }
}

/// The program `name`, which is installed: [`nbd_testkit::require_tools!`] has seen to that.
pub(crate) fn tool(name: &str) -> Tool {
    let program =
        nbd_testkit::tools::tool(name).unwrap_or_else(|| panic!("{name} is not installed"));
    Tool { name: name.to_owned(), command: Command::new(program) }
}

impl Tool {
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Where it runs, and leaves what files it makes.
    pub(crate) fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Runs it, and returns its standard output.
    ///
    /// # Panics
    /// If it fails, or does not end in time.
    pub(crate) fn run(self) -> String {
        let line = format!("{:?}", self.command);
        let outcome = self.outcome();
        assert!(outcome.status.success(), "{line}: {outcome}");
        outcome.stdout
    }

    /// Runs it and says how that ended.
    ///
    /// # Panics
    /// If it does not end in time.
    pub(crate) fn outcome(self) -> Outcome {
        self.try_outcome().unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`outcome`](Self::outcome), but a run that does not end in time, or begin, is an error
    /// with a text for people: for use while a test is panicking already.
    pub(crate) fn try_outcome(mut self) -> Result<Outcome, String> {
        // Files, because a pipe that nobody empties would stop a client that writes much.
        let mut stdout = tempfile::tempfile().map_err(|e| e.to_string())?;
        let mut stderr = tempfile::tempfile().map_err(|e| e.to_string())?;
        let clone = |file: &File| file.try_clone().map_err(|e| e.to_string());
        self.command.stdin(Stdio::null()).stdout(clone(&stdout)?).stderr(clone(&stderr)?);
        let mut child = self.command.spawn().map_err(|e| format!("start {}: {e}", self.name))?;
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
                break status;
            }
            if started.elapsed() > DEADLINE {
                // It may have ended just now; either way it must not outlive the test.
                let _ = child.kill();
                let _ = child.wait();
                let written = content(&mut stdout) + &content(&mut stderr);
                let command = &self.command;
                return Err(format!("{command:?} runs after {DEADLINE:?}; it wrote:\n{written}"));
            }
            thread::sleep(Duration::from_millis(2));
        };
        Ok(Outcome { status, stdout: content(&mut stdout), stderr: content(&mut stderr) })
    }
}

fn content(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What cannot be read back is left out: there is no reason it should not be.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}
