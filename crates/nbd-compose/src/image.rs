//! The image of `deploy/Dockerfile`, made of a program that is built already: without a registry.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::bounded;
use crate::engine::docker;

/// Time to build an image of files that are there: most of it is spent on sending them.
const BUILD_MAX: Duration = Duration::from_secs(180);

/// Time to look into a program, or strip it.
const TOOL_MAX: Duration = Duration::from_secs(60);

/// What `nbdctl` is called as, besides.
const LINKS: [&str; 3] = ["nbd-replica", "nbd-lb", "nbd-control"];

/// An image.
#[derive(Debug)]
pub(crate) struct Image {
    /// All of its size, as the engine counts it.
    pub(crate) bytes: u64,
    /// Whether the program in it is static, as in what ships.
    pub(crate) is_static: bool,
}

/// Builds the target `prebuilt` of the Dockerfile and calls it `tag`. A program that is not static
/// gets the libraries that it needs beside it, at the places where it looks for them; all else is
/// as in what ships. Tags that begin with `tag` are made on the way.
///
/// # Errors
/// The program is not there; Docker fails.
pub(crate) fn build(root: &Path, program: &Path, tag: &str) -> anyhow::Result<Image> {
    // A context of its own: that of the repository has room for the user's own program.
    let context = tempfile::tempdir().context("make a directory for the image")?;
    let at = |path: &str| context.path().join(path);
    for directory in ["deploy/dist", "deploy/empty", "libraries"] {
        fs::create_dir_all(at(directory))?;
    }
    let dockerfile = root.join("deploy/Dockerfile");
    fs::copy(&dockerfile, at("Dockerfile"))
        .with_context(|| format!("copy {}", dockerfile.display()))?;
    let (libraries, copy) = (libraries(program)?, at("deploy/dist/nbdctl"));
    // What ships is not touched: its size is held against what is promised.
    if libraries.is_empty() || !strip(program, &copy) {
        fs::copy(program, &copy).with_context(|| format!("copy {}", program.display()))?;
    }
    for link in LINKS {
        symlink("nbdctl", at("deploy/dist").join(link))?;
    }
    let (is_static, prebuilt) = match &libraries[..] {
        [] => (true, tag.to_owned()),
        _ => (false, format!("{tag}-prebuilt")),
    };
    build_target(context.path(), "Dockerfile", &["--target", "prebuilt"], &prebuilt)?;
    if !is_static {
        for library in libraries {
            let place = library.strip_prefix("/").context("a library has no absolute path")?;
            let copy = at("libraries").join(place);
            fs::create_dir_all(copy.parent().context("a library is in a directory")?)?;
            fs::copy(&library, &copy).with_context(|| format!("copy {}", library.display()))?;
        }
        fs::write(at("Dockerfile.dynamic"), format!("FROM {prebuilt}\nCOPY libraries/ /\n"))?;
        build_target(context.path(), "Dockerfile.dynamic", &[], tag)?;
    }
    let size = docker(&["image", "inspect", "--format", "{{.Size}}", tag])?;
    let bytes = size.trim().parse().with_context(|| format!("the size of an image: {size:?}"))?;
    Ok(Image { bytes, is_static })
}

fn build_target(context: &Path, file: &str, target: &[&str], tag: &str) -> anyhow::Result<()> {
    let mut build = Command::new("docker");
    build.arg("build").arg("--file").arg(context.join(file)).args(target);
    build.args(["--tag", tag]).arg(context);
    bounded::output(&mut build, BUILD_MAX).map(drop)
}

/// Copies a program without its debug information. `false`: there is no `strip` that can.
fn strip(program: &Path, to: &Path) -> bool {
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(to).arg(program);
    bounded::run(&mut strip, TOOL_MAX).is_ok_and(|ended| ended.status.success())
}

/// The loader and the libraries that a program needs; none if it is static.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let ended = bounded::run(Command::new("ldd").arg(program), TOOL_MAX)?;
    parse_libraries(&ended.stdout, &ended.stderr)
        .with_context(|| format!("ldd {}: {}", program.display(), ended.status))
}

fn parse_libraries(stdout: &str, stderr: &str) -> anyhow::Result<Vec<PathBuf>> {
    let is_static = |text: &str| {
        text.contains("statically linked") || text.contains("not a dynamic executable")
    };
    if is_static(stdout) || is_static(stderr) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for line in stdout.lines().map(str::trim).filter(|line| !line.is_empty()) {
        // `NAME => PATH (ADDRESS)`, `PATH (ADDRESS)`; the kernel's own has a name and no path.
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        let path = path.split(" (").next().unwrap_or(path);
        if path == "not found" {
            bail!("a library is missing: {line}");
        }
        if path.starts_with('/') {
            found.push(PathBuf::from(path));
        }
    }
    if found.is_empty() {
        bail!("no libraries, and not static: {stdout}{stderr}");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd2c1f2000)\n\
            \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f2d5c600000)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2d5b000000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f2d5d000000)\n";
        let paths = [
            "/lib/x86_64-linux-gnu/libgcc_s.so.1",
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(parse_libraries(said, "").unwrap(), paths.map(PathBuf::from));
        assert!(parse_libraries("\tlibx.so => not found\n", "").is_err());
        assert!(parse_libraries("", "ldd: what.txt: No such file or directory\n").is_err());
    }

    #[test]
    fn a_static_program_has_none() {
        assert!(parse_libraries("\tstatically linked\n", "").unwrap().is_empty());
        assert!(parse_libraries("", "\tnot a dynamic executable\n").unwrap().is_empty());
    }
}
