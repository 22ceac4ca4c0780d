//! Runs of `nbd-replica` that are expected to end by themselves.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::binary;

/// Time that a run which must not succeed, or only prints, may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a run ended and what it said.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Runs `nbd-replica` with these flags and variables, to its end.
    pub(crate) fn new(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut outputs = [(); 2].map(|()| tempfile::tempfile().expect("make a temporary file"));
        let [stdout, stderr] = outputs
            .each_ref()
            .map(|file| Stdio::from(file.try_clone().expect("duplicate a descriptor")));
        let mut command = Command::new(binary("nbd-replica"));
        // A run has only those settings that it was given.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("NBD_") {
                command.env_remove(name);
            }
        }
        command.env_remove("RUST_LOG");
        command.args(arguments).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let mut child = command.spawn().expect("start nbd-replica");
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait for a child") {
                break Some(status);
            }
            if began.elapsed() > DEADLINE {
                child.kill().and_then(|()| child.wait()).expect("kill a child");
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let [stdout, stderr] = outputs.each_mut().map(whole);
        assert!(status.is_some(), "{arguments:?} still ran after {DEADLINE:?}: {stderr}");
        Self { code: status.and_then(|status| status.code()), stdout, stderr }
    }

    /// It ended with `code` and one line on standard error that holds each of `words`.
    pub(crate) fn fails(&self, code: i32, words: &[&str]) {
        self.fails_with_explanation(code, words);
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
    }

    /// As [`fails`](Self::fails), but help may follow the line: mistakes in flags get some.
    pub(crate) fn fails_with_explanation(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        let line = self.stderr.lines().next().unwrap_or_default();
        assert!(line.starts_with("error: "), "{self:?}");
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line:?}");
        }
        assert_eq!(self.stdout, "", "{self:?}");
    }
}

fn whole(file: &mut File) -> String {
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("read a temporary file");
    text
}
