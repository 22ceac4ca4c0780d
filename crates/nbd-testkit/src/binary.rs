//! The programs under test.

use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};

/// Names a directory of programs that are built already; set by `cargo xtask test`.
const BIN_DIR: &str = "CINDERBLOCK_BIN_DIR";

/// The path of a program of this workspace, built if need be: `binary("nbd-replica")`.
///
/// cargo tells a test only about the programs of its own package. So: the directory that
/// `CINDERBLOCK_BIN_DIR` names, or else the one the running test was built into, after a
/// `cargo build` there, once a process (cargo itself sees to it that nothing is built twice).
///
/// # Panics
/// If it does not build.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);
    if let Some(directory) = env::var_os(BIN_DIR) {
        let path = Path::new(&directory).join(name);
        assert!(path.is_file(), "{} is not there, though {BIN_DIR} says so", path.display());
        return path;
    }
    // A test that panicked while it built leaves nothing half done here.
    let mut built = BUILT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    let profile_directory = profile_directory();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    cargo.args(["build", "--quiet", "--locked", "--package", name, "--bin", name]);
    if profile_directory.ends_with("release") {
        cargo.arg("--release");
    }
    if let Some(target) = profile_directory.parent() {
        cargo.arg("--target-dir").arg(target);
    }
    let status = cargo.status().expect("start cargo");
    assert!(status.success(), "cargo build of {name}: {status}");
    profile_directory.join(name)
}

/// `target/debug` or `target/release`: tests run from `deps` inside it.
fn profile_directory() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let directory = test.parent().expect("a program is in a directory");
    let deps = directory.ends_with("deps");
    directory.parent().filter(|_| deps).unwrap_or(directory).to_owned()
}
