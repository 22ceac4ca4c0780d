//! The programs that interoperability tests drive, and installing those that are missing.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{process, test};

mod python;

/// A program that tests run, and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
struct Tool {
    binary: &'static str,
    package: &'static str,
}

const fn tool(binary: &'static str, package: &'static str) -> Tool {
    Tool { binary, package }
}

const TOOLS: [Tool; 17] = [
    tool("nbdinfo", "libnbd-bin"),
    tool("nbdcopy", "libnbd-bin"),
    // Part of libnbd-bin on bookworm and later; it mounts through fusermount3.
    tool("nbdfuse", "libnbd-bin"),
    tool("fusermount3", "fuse3"),
    tool("nbdkit", "nbdkit"),
    tool("nbd-client", "nbd-client"),
    tool("qemu-img", "qemu-utils"),
    tool("qemu-io", "qemu-utils"),
    tool("qemu-nbd", "qemu-utils"),
    tool("fio", "fio"),
    // For the tools in Python.
    tool("python3", "python3-venv"),
    tool("mke2fs", "e2fsprogs"),
    tool("e2fsck", "e2fsprogs"),
    tool("debugfs", "e2fsprogs"),
    // A terminal for `nbdctl top` and its like.
    tool("tmux", "tmux"),
    tool("promtool", "prometheus"),
    tool("systemd-analyze", "systemd"),
];

/// Sees to it that the test tools are there: programs of the system, and those in Python, which go
/// into the target directory. Never fails: tests that need a missing tool are skipped and counted
/// as such.
pub(crate) fn ensure(root: &Path, may_install: bool) {
    ensure_programs(may_install);
    match test::target_directory(root) {
        Ok(target) => python::ensure(&target, may_install),
        Err(error) => println!("no directory for tools in Python: {error:#}"),
    }
}

/// Sees to it that the system's programs are there: as root on a Debian-like system by installing
/// what is missing, elsewhere by saying how.
fn ensure_programs(may_install: bool) {
    let missing = missing();
    if missing.is_empty() {
        return;
    }
    let binaries: Vec<&str> = missing.iter().map(|tool| tool.binary).collect();
    let packages = packages(&missing);
    println!("missing test tools: {}", binaries.join(" "));
    if !(may_install && is_root() && find("apt-get").is_some()) {
        println!("tests that need them are skipped; on Debian or Ubuntu, install them with");
        println!("    sudo apt-get install --no-install-recommends {}", packages.join(" "));
        return;
    }
    println!("installing {}", packages.join(" "));
    if let Err(error) = install(&packages) {
        println!("could not install them, so tests that need them are skipped: {error:#}");
    }
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["-qq", "-o", "DPkg::Lock::Timeout=120"]);
        command
    };
    process::output(apt().arg("update"))?;
    process::output(apt().args(["install", "-y", "--no-install-recommends"]).args(packages))?;
    Ok(())
}

fn missing() -> Vec<Tool> {
    TOOLS.into_iter().filter(|tool| find(tool.binary).is_none()).collect()
}

fn packages(tools: &[Tool]) -> Vec<&'static str> {
    tools.iter().map(|tool| tool.package).collect::<BTreeSet<_>>().into_iter().collect()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Looks along `PATH`, and where Debian keeps what only root's `PATH` has.
fn find(binary: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = std::env::split_paths(&path).chain(system);
    directories.map(|directory| directory.join(binary)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_there_only() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }

    #[test]
    fn a_package_is_installed_once() {
        assert_eq!(packages(&TOOLS[..4]), ["fuse3", "libnbd-bin"]);
    }
}
