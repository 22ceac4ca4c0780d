//! A small ext4 of its own, loop-mounted: a disk that a test may fill.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nbd_testkit::{Ext4Image, tools};
use tempfile::TempDir;

/// A mounted file system. Dropping it unmounts it and removes its image.
pub(crate) struct SmallDisk {
    path: PathBuf,
    _directory: TempDir,
}

impl SmallDisk {
    /// Makes and mounts a file system of `bytes` bytes. `Err` says what the test lacks.
    pub(crate) fn mount(bytes: u64) -> Result<Self, String> {
        let missing = tools::missing(&["mke2fs", "mount", "umount"]);
        if !missing.is_empty() {
            return Err(format!("needs {}", missing.join(" ")));
        }
        if fs::metadata("/proc/self").map_or(u32::MAX, |data| data.uid()) != 0 {
            return Err("needs root, to mount".to_owned());
        }
        let directory = TempDir::with_prefix("cinderblock-disk-").expect("make a directory");
        let (empty, path) = (directory.path().join("empty"), directory.path().join("mnt"));
        fs::create_dir(&empty).expect("make a directory");
        fs::create_dir(&path).expect("make a directory");
        let image = Ext4Image::create(&directory.path().join("image"), bytes, &empty);
        let mut mount = Command::new(tools::tool("mount").expect("looked for above"));
        let output = mount.args(["-o", "loop"]).arg(image.path()).arg(&path).output();
        let output = output.expect("start mount");
        if !output.status.success() {
            return Err(format!("needs loop devices: {}", message(&output)));
        }
        Ok(Self { path, _directory: directory })
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let Some(umount) = tools::tool("umount") else { return };
        // Lazily, should a process of a failed test still sit on it.
        let output = Command::new(umount).arg("--lazy").arg(&self.path).output();
        match output {
            Ok(output) if output.status.success() => {}
            other => eprintln!("cannot unmount {}: {other:?}", self.path.display()),
        }
    }
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ")
}
