//! Programs that some tests need, and skipping the tests when they are missing.
//!
//! The test harness cannot say "skipped" at run time. So a test that lacks a tool prints
//! `SKIPPED <test>: needs <tools>`, appends `<test>: needs <tools>` to the file named by
//! `CINDERBLOCK_SKIP_LOG`, and returns; `cargo xtask test` sets that variable and moves those tests
//! from passed to skipped.

use std::env;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Names the file to which skipped tests are appended.
const SKIP_LOG: &str = "CINDERBLOCK_SKIP_LOG";

/// The path of the program `name`: along `PATH`, then where Debian keeps what only root's `PATH`
/// has.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = env::split_paths(&path).chain(system);
    directories.map(|directory| directory.join(name)).find(|path| is_executable(path))
}

/// The path of a tool in Python that `cargo xtask test` puts under the target directory, which the
/// running test is somewhere below. `None` if it is not there.
pub fn python_tool(name: &str) -> Option<PathBuf> {
    let test = env::current_exe().ok()?;
    let place = |directory: &Path| directory.join("tools").join(name).join("bin").join(name);
    test.ancestors().map(place).find(|path| is_executable(path))
}

/// Those of `names` that are not installed.
pub fn missing<'a>(names: &[&'a str]) -> Vec<&'a str> {
    names.iter().copied().filter(|name| tool(name).is_none()).collect()
}

/// Records that the running test is skipped because of `reason`. `place` tells tests of the same
/// name in different files apart. Tests call [`require_tools!`](crate::require_tools), or this for
/// a need that is no program, and then return.
///
/// # Panics
/// If the skip log cannot be written: the totals would then call the test passed.
pub fn skip(place: &str, reason: &str) {
    let thread = std::thread::current();
    let line = format!("{place}::{}: {reason}", thread.name().unwrap_or("main"));
    eprintln!("SKIPPED {line}");
    let Some(log) = env::var_os(SKIP_LOG) else { return };
    let line = line + "\n";
    // One write in append mode, so that lines of tests that run at the same time stay whole.
    let written = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&log)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|error| panic!("append to {}: {error}", Path::new(&log).display()));
}

/// Skips the calling test, by returning from it, unless all the programs named are installed:
/// `require_tools!["nbdinfo", "qemu-io"];`.
#[macro_export]
macro_rules! require_tools {
    ($($name:expr),+ $(,)?) => {
        let missing = $crate::tools::missing(&[$($name),+]);
        if !missing.is_empty() {
            $crate::tools::skip(file!(), &format!("needs {}", missing.join(" ")));
            return;
        }
    };
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_there_only() {
        assert!(tool("sh").is_some());
        assert_eq!(missing(&["sh", "no-such-program-anywhere"]), ["no-such-program-anywhere"]);
    }

    #[test]
    fn goes_on_with_the_tools_at_hand() {
        let mut went_on = false;
        let mut test = || {
            require_tools!["sh", "cat"];
            went_on = true;
        };
        test();
        assert!(went_on);
    }
}
