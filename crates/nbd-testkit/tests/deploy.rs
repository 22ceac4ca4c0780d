//! What lies under `deploy/`, held to the tools that know the formats: `deploy/tests/check.py`. A
//! check whose tool is missing is skipped, with the reason.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_testkit::require_tools;
use nbd_testkit::tools::{python_tool, skip};

/// The Python that has the packages of the checks, or else the system's.
fn python() -> PathBuf {
    let beside = |tool: PathBuf| Some(tool.parent()?.join("python3"));
    python_tool("kubernetes-validate").and_then(beside).unwrap_or_else(|| "python3".into())
}

fn check(name: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let output = Command::new(python())
        .arg("deploy/tests/check.py")
        .arg(name)
        .current_dir(root)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{error}");
    if let Some((_, reason)) = said.split_once("SKIPPED: ") {
        skip(file!(), reason.lines().next().unwrap_or_default());
        return;
    }
    assert!(said.contains("1 passed, 0 failed, 0 skipped"), "{said}");
}

#[test]
fn rules_and_dashboard_name_metrics_that_exist() {
    require_tools!["python3"];
    check("monitoring");
}

#[test]
fn compose_accepts_its_files() {
    require_tools!["python3"];
    check("compose");
}

#[test]
fn manifests_fit_the_schemas_of_kubernetes() {
    require_tools!["python3"];
    check("kubernetes");
}

#[test]
fn units_are_valid() {
    require_tools!["python3"];
    check("systemd");
}
