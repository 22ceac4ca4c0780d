//! Programs that are run with a deadline: Docker can stand still, and a test must not.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Time between two looks whether a program has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A program that has ended in time.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end.
///
/// # Errors
/// It cannot be started, or is not done in time: then it is killed.
pub(crate) fn run(command: &mut Command, within: Duration) -> anyhow::Result<Ended> {
    run_reading(command, Stdio::null(), within)
}

/// As [`run`], for a program that reads its standard input.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_reading(
    command: &mut Command,
    input: Stdio,
    within: Duration,
) -> anyhow::Result<Ended> {
    let shown = show(command);
    // Files and not pipes: what the program has started itself may outlive it, with a pipe in hand.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(input).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = command.spawn().with_context(|| format!("start {shown}"))?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("wait for {shown}"))? {
            break status;
        }
        if started.elapsed() > within {
            // Either way it is of no more use.
            let _ = child.kill();
            let _ = child.wait();
            bail!(
                "{shown}: not done within {within:?}\n{}{}",
                text(&mut stdout),
                text(&mut stderr)
            );
        }
        thread::sleep(LOOK_AGAIN);
    };
    Ok(Ended { status, stdout: text(&mut stdout), stderr: text(&mut stderr) })
}

/// Runs a program that is to succeed, and gives what it wrote to standard output.
///
/// # Errors
/// As [`run`]; it fails: then what it wrote is in the error.
pub(crate) fn output(command: &mut Command, within: Duration) -> anyhow::Result<String> {
    let Ended { status, stdout, stderr } = run(command, within)?;
    if !status.success() {
        bail!("{}: {status}\n{}{}", show(command), stdout, stderr.trim_end());
    }
    Ok(stdout)
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What cannot be read back is missing from a message, no more.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_and_failures_are_told() {
        assert_eq!(output(&mut shell("echo out; echo err >&2"), LONG).unwrap(), "out\n");
        let error = output(&mut shell("echo why >&2; exit 3"), LONG).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
        assert!(run(&mut Command::new("/no/such/program"), LONG).is_err());
    }

    #[test]
    fn what_is_not_done_in_time_is_killed() {
        let started = Instant::now();
        let script = "echo begun; sleep 60";
        let error = run(&mut shell(script), Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.contains("not done") && error.contains("begun"), "{error}");
        assert!(started.elapsed() < LONG);
    }
}
