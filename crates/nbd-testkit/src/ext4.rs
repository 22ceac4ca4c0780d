//! ext4 images made without mounting anything.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::tools::tool;

/// An ext4 image in a file. Needs `mke2fs` and `e2fsck`:
/// `require_tools!["mke2fs", "e2fsck"]`.
#[derive(Debug, Clone)]
pub struct Ext4Image {
    path: PathBuf,
}

impl Ext4Image {
    /// Makes an image of `bytes` bytes at `path`, which holds a copy of what is in the directory
    /// `content`.
    ///
    /// # Panics
    /// If `mke2fs` is missing or fails.
    pub fn create(path: &Path, bytes: u64, content: &Path) -> Self {
        let kib = format!("{}k", bytes / 1024);
        let options = ["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"];
        run("mke2fs", |command| command.args(options).arg(content).arg(path).arg(&kib));
        Self { path: path.to_owned() }
    }

    /// An image that is there already, for checking.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks every structure of the file system, changing nothing.
    ///
    /// # Panics
    /// If `e2fsck` is missing or finds anything at all.
    pub fn check(&self) {
        run("e2fsck", |command| command.args(["-f", "-n"]).arg(&self.path));
    }

    /// The content of a file in the image, by its path there.
    ///
    /// # Panics
    /// If `debugfs` is missing, or there is no such file.
    pub fn read_file(&self, name: &str) -> Vec<u8> {
        let request = format!("cat {name}");
        let output = run("debugfs", |command| command.arg("-R").arg(&request).arg(&self.path));
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!message.contains("not found"), "debugfs: {message}");
        output.stdout
    }
}

fn run(name: &str, arguments: impl FnOnce(&mut Command) -> &mut Command) -> std::process::Output {
    let program = tool(name).unwrap_or_else(|| panic!("{name} is not installed"));
    let mut command = Command::new(program);
    let output = arguments(&mut command).output().unwrap_or_else(|e| panic!("start {name}: {e}"));
    assert!(
        output.status.success(),
        "{name}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_what_it_was_made_from() {
        crate::require_tools!["mke2fs", "e2fsck", "debugfs"];
        let directory = tempfile::tempdir().unwrap();
        let content = directory.path().join("content");
        std::fs::create_dir(&content).unwrap();
        std::fs::write(content.join("greeting"), "hello").unwrap();
        let image = Ext4Image::create(&directory.path().join("image"), 8 << 20, &content);
        image.check();
        assert_eq!(image.read_file("/greeting"), b"hello");
        assert_eq!(image.path().metadata().unwrap().len(), 8 << 20);
    }
}
