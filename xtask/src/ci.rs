//! `cargo xtask ci`: everything that must pass before a change goes in.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::process::{cargo, run as run_command};
use crate::test::Totals;
use crate::{deps, drawings, test, tidy, tools};

/// Runs every check, also past a failed one, and then the tests. Each check counts as one passed or
/// failed test in the totals.
pub(crate) fn run(root: &Path, no_install: bool) -> Totals {
    let mut totals = Totals::default();
    totals += check("format", || format(root));
    totals += check("clippy", || clippy(root));
    totals += check("docs", || docs(root));
    totals += check("deps", || deps::check(root));
    totals += check("tidy", || tidy::check(root).and_then(|()| drawings::check(root)));
    let started = start("tests");
    tools::ensure(root, !no_install);
    let tests = test::run(root, &[]);
    end("tests", tests.is_success(), started);
    totals += tests;
    totals
}

fn check(name: &str, action: impl FnOnce() -> anyhow::Result<()>) -> Totals {
    let started = start(name);
    let result = action();
    if let Err(error) = &result {
        println!("{error:#}");
    }
    end(name, result.is_ok(), started);
    Totals { passed: u64::from(result.is_ok()), failed: u64::from(result.is_err()), skipped: 0 }
}

fn start(name: &str) -> Instant {
    println!("==> {name}");
    Instant::now()
}

fn end(name: &str, succeeded: bool, started: Instant) {
    let verdict = if succeeded { "ok" } else { "FAILED" };
    println!("<== {name}: {verdict} in {:.1} s", started.elapsed().as_secs_f64());
}

fn format(root: &Path) -> anyhow::Result<()> {
    let workspace = run_command(cargo(root).args(["fmt", "--all", "--", "--check"]));
    // The fuzz package stands outside the workspace, so that its toolchain needs reach no further.
    let fuzz: Vec<PathBuf> = tidy::rust_files(&root.join("fuzz"))?;
    if !fuzz.is_empty() {
        let mut rustfmt = std::process::Command::new("rustfmt");
        rustfmt.current_dir(root).args(["--check", "--edition", "2024"]).args(fuzz);
        run_command(&mut rustfmt)?;
    }
    workspace
}

fn clippy(root: &Path) -> anyhow::Result<()> {
    let mut clippy = cargo(root);
    clippy.args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    run_command(&mut clippy)
}

fn docs(root: &Path) -> anyhow::Result<()> {
    let mut doc = cargo(root);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    doc.args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    run_command(&mut doc)
}
