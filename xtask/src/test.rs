//! `cargo xtask test`: every test of the workspace, and honest totals.
//!
//! cargo prints one summary per test binary and none over all; this adds them up. A binary that
//! dies without a summary counts as a failure, and so does a workspace that does not compile. A
//! test that finds a tool missing at run time writes its name to the file named by [`SKIP_LOG`]
//! (`nbd_testkit::require_tools!`); the harness calls it passed, here it counts as skipped. So does
//! the cluster in containers ([`compose`]), which is one test more.

mod summary;

use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;

use self::summary::Summary;
use crate::{compose, process};

/// Names the file to which tests append the reason why they skip themselves, one line each.
pub(crate) const SKIP_LOG: &str = "CINDERBLOCK_SKIP_LOG";

/// Names the directory of freshly built binaries, so that tests need not build them again.
pub(crate) const BIN_DIR: &str = "CINDERBLOCK_BIN_DIR";

/// How many tests did what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Totals {
    const ONE_FAILED: Self = Self { passed: 0, failed: 1, skipped: 0 };

    /// Whether something ran and nothing failed.
    pub(crate) const fn is_success(self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// Prints the totals as the last line, and returns [`is_success`](Self::is_success).
    pub(crate) fn report(self) -> bool {
        let Self { passed, failed, skipped } = self;
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        self.is_success()
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Builds and runs every test; `args` go on to `cargo test`.
pub(crate) fn run(root: &Path, args: &[String]) -> Totals {
    try_run(root, args).unwrap_or_else(|error| {
        println!("error: {error:#}");
        Totals::ONE_FAILED
    })
}

fn try_run(root: &Path, args: &[String]) -> anyhow::Result<Totals> {
    // All targets in one go, with one set of features: the tests then find the programs they start.
    process::run(process::cargo(root).args(["build", "--locked", "--workspace", "--all-targets"]))?;
    let target = target_directory(root)?;
    let skip_log = target.join(format!("skipped-tests-{}.log", std::process::id()));
    std::fs::write(&skip_log, "").with_context(|| format!("create {}", skip_log.display()))?;
    let result = run_all(root, &target, &skip_log, args);
    let log =
        std::fs::read_to_string(&skip_log).with_context(|| format!("read {}", skip_log.display()));
    let _ = std::fs::remove_file(&skip_log);
    let (mut totals, log) = (result?, log?);
    let skips = skipped(&log);
    for skip in &skips {
        println!("SKIPPED {skip}");
    }
    account_for_skips(&mut totals, skips.len());
    Ok(totals)
}

fn run_all(root: &Path, target: &Path, skip_log: &Path, args: &[String]) -> anyhow::Result<Totals> {
    let mut tests = process::cargo(root);
    tests.args(["test", "--locked", "--workspace", "--no-fail-fast"]).args(args);
    tests.env(SKIP_LOG, skip_log).env(BIN_DIR, target.join("debug"));
    let mut totals = run_cargo_test(tests)?;
    if !args.is_empty() {
        return Ok(totals);
    }
    totals += compose::as_one_test(root, target, skip_log);
    // Mistakes made on purpose are not built into what the other tests start; and thousands of
    // seeds want to be fast.
    let mut planted = process::cargo(root);
    planted.args(["test", "--locked", "--release", "--package", "nbd-sim", "--test", "planted"]);
    planted.args(["--features", "planted-faults", "--target-dir"]).arg(target.join("planted"));
    totals += run_cargo_test(planted)?;
    Ok(totals)
}

fn run_cargo_test(mut command: Command) -> anyhow::Result<Totals> {
    println!("$ {}", process::show(&command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no standard output")?;

    let mut summary = Summary::default();
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).context("read from cargo test")? > 0 {
        // Nobody may be reading what we print; the totals count all the same.
        let _ = std::io::stdout().write_all(&line);
        summary.read_line(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    let status = child.wait().context("wait for cargo test")?;
    Ok(summary.finish(status.success()))
}

/// The distinct tests that a skip log names.
fn skipped(log: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    lines.dedup();
    lines
}

/// Moves tests that skipped themselves from passed, where the harness put them, to skipped.
fn account_for_skips(totals: &mut Totals, skips: usize) {
    let skips = u64::try_from(skips).unwrap_or(u64::MAX).min(totals.passed);
    totals.passed -= skips;
    totals.skipped += skips;
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory(root: &Path) -> anyhow::Result<PathBuf> {
    let mut command = process::cargo(root);
    command.args(["metadata", "--format-version", "1", "--locked", "--no-deps"]);
    let metadata: serde_json::Value = serde_json::from_slice(&process::output(&mut command)?)?;
    let directory = metadata["target_directory"].as_str();
    directory.map(PathBuf::from).context("cargo metadata names no target directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_skips_itself_is_not_passed() {
        let log =
            "kill::survives: needs fio\n\nkill::survives: needs fio\nio::reads: needs qemu-io\n";
        let skips = skipped(log);
        assert_eq!(skips, ["io::reads: needs qemu-io", "kill::survives: needs fio"]);
        let mut totals = Totals { passed: 10, failed: 1, skipped: 2 };
        account_for_skips(&mut totals, skips.len());
        assert_eq!(totals, Totals { passed: 8, failed: 1, skipped: 4 });
    }

    #[test]
    fn success_needs_a_test_that_ran() {
        assert!(!Totals::default().is_success());
        assert!(!Totals { passed: 0, failed: 0, skipped: 3 }.is_success());
        assert!(!Totals { passed: 3, failed: 1, skipped: 0 }.is_success());
        assert!(Totals { passed: 1, failed: 0, skipped: 3 }.is_success());
    }
}
