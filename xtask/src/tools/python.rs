//! Test tools in Python: each in a virtual environment of its own under the target directory, so
//! that nothing of the system is touched and `cargo clean` takes them away.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

/// A tool, and its version: what it makes up and looks at must not change by itself.
const TOOLS: [(&str, &str); 2] = [("schemathesis", "4.32.5"), ("kubernetes-validate", "1.37.0")];

/// Sees to it that the tools are there, or says why they are not.
pub(super) fn ensure(target: &Path, may_install: bool) {
    for (name, version) in TOOLS {
        let directory = directory(target, name);
        if is_there(&directory, name, version) {
            continue;
        }
        if !may_install {
            println!("{name} is missing, so tests that need it are skipped");
            continue;
        }
        println!("installing {name} {version} into {}", directory.display());
        if let Err(error) = install(&directory, name, version) {
            println!("could not install it, so tests that need it are skipped: {error:#}");
            // Half a tool would be taken for one that finds mistakes.
            let _ = std::fs::remove_dir_all(&directory);
        }
    }
}

/// `nbd_testkit::tools::python_tool` looks there.
fn directory(target: &Path, name: &str) -> PathBuf {
    target.join("tools").join(name)
}

fn is_there(directory: &Path, name: &str, version: &str) -> bool {
    let shown = process::output(Command::new(directory.join("bin").join(name)).arg("--version"));
    shown.is_ok_and(|shown| String::from_utf8_lossy(&shown).trim_end().ends_with(version))
}

fn install(directory: &Path, name: &str, version: &str) -> anyhow::Result<()> {
    process::output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(directory))?;
    let mut pip = Command::new(directory.join("bin").join("pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    process::output(pip.arg(format!("{name}=={version}")))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_of_another_version_is_not_there() {
        let target = tempfile::tempdir().unwrap();
        let directory = directory(target.path(), "tool");
        assert!(!is_there(&directory, "tool", "1.2"));
        std::fs::create_dir_all(directory.join("bin")).unwrap();
        // Any program that tells its version: the last word is taken for it.
        std::os::unix::fs::symlink("/bin/echo", directory.join("bin").join("tool")).unwrap();
        let shown = process::output(Command::new("/bin/echo").arg("--version")).unwrap();
        let shown = String::from_utf8(shown).unwrap();
        let last = shown.split_whitespace().last().unwrap();
        assert!(is_there(&directory, "tool", last), "{shown}");
        assert!(!is_there(&directory, "tool", "1.2"));
    }
}
