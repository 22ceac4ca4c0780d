//! volume -> nbdfuse -> file -> loop device -> ext4 -> directory, and back again whatever happens.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::tools;

use super::command::tool;

/// How long nbdfuse may take to come up, and to end once it is unmounted.
const DEADLINE: Duration = Duration::from_secs(20);

/// The bit of `CAP_SYS_ADMIN`, without which root may mount nothing, as in most containers.
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Skips the calling test unless this machine can mount a volume.
macro_rules! require_mounts {
    () => {
        nbd_testkit::require_tools![
            "nbdfuse", "nbdcopy", "losetup", "mount", "umount", "mke2fs", "e2fsck",
        ];
        if let Some(reason) = super::mount::obstacle() {
            nbd_testkit::tools::skip(file!(), &reason);
            return;
        }
    };
}
pub(crate) use require_mounts;

/// Why this machine cannot mount a volume, if so.
pub(crate) fn obstacle() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    if capabilities.is_none_or(|set| set & CAP_SYS_ADMIN == 0) {
        return Some("needs root with CAP_SYS_ADMIN".to_owned());
    }
    let devices = ["/dev/fuse", "/dev/loop-control"];
    let closed = |path: &&str| File::options().read(true).write(true).open(path).is_err();
    devices.into_iter().find(closed).map(|device| format!("needs {device}"))
}

/// A volume's file system in a directory. Dropping it undoes every step that was taken.
pub(crate) struct MountedVolume {
    // In the order in which they must go.
    directory: Option<MountedDirectory>,
    device: Option<LoopDevice>,
    file: FuseFile,
}

impl MountedVolume {
    /// Mounts the volume at `uri`; mount points are made under `directory`.
    ///
    /// # Panics
    /// If any step fails.
    pub(crate) fn mount(uri: &str, directory: &Path) -> Self {
        let file = FuseFile::mount(uri, &directory.join("file"));
        let device = LoopDevice::attach(&file.path());
        let directory = MountedDirectory::mount(&device.path, &directory.join("root"));
        Self { directory: Some(directory), device: Some(device), file }
    }

    /// The root directory of the volume's file system.
    pub(crate) fn root(&self) -> &Path {
        &self.directory.as_ref().expect("mounted until dropped").path
    }

    /// Writes back everything and undoes every step.
    ///
    /// # Panics
    /// If any of them fails.
    pub(crate) fn unmount(mut self) {
        let mut directory = self.directory.take().expect("mounted until dropped");
        tool("sync").arg("-f").arg(&directory.path).run();
        tool("umount").arg(&directory.path).run();
        directory.gone = true;
        let mut device = self.device.take().expect("attached until dropped");
        tool("losetup").arg("-d").arg(&device.path).run();
        device.gone = true;
        assert!(device.lets_go(), "{} still holds its file", device.path.display());
        tool("umount").arg(&self.file.mount_point).run();
        assert!(self.file.ends(), "nbdfuse still runs after {DEADLINE:?}");
        self.file.gone = true;
    }

    /// Undoes every step, whatever of it fails: the volume is gone.
    pub(crate) fn abandon(self) {}
}

/// A mounted directory.
struct MountedDirectory {
    path: PathBuf,
    gone: bool,
}

impl MountedDirectory {
    fn mount(device: &Path, path: &Path) -> Self {
        fs::create_dir_all(path).expect("create a mount point");
        tool("mount").args(["-t", "ext4"]).arg(device).arg(path).run();
        Self { path: path.to_owned(), gone: false }
    }
}

impl Drop for MountedDirectory {
    fn drop(&mut self) {
        if !self.gone {
            clean_up("umount", &["-l"], &self.path);
        }
    }
}

/// A loop device on a file.
struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
    gone: bool,
}

impl LoopDevice {
    fn attach(file: &Path) -> Self {
        let path = tool("losetup").args(["--find", "--show"]).arg(file).run();
        Self { path: PathBuf::from(path.trim()), file: file.to_owned(), gone: false }
    }

    /// Waits until the device has let go of its file. `losetup -d` returns before that if anybody
    /// has the device open, as programs do that look at all devices for a file system.
    fn lets_go(&self) -> bool {
        let name = self.path.file_name().expect("a device has a name");
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        let holds = || {
            let file = fs::read_to_string(&backing).unwrap_or_default();
            Path::new(file.trim_end()) == self.file
        };
        let deadline = Instant::now() + DEADLINE;
        while holds() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        !holds()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.gone {
            clean_up("losetup", &["-d"], &self.path);
        }
    }
}

/// An nbdfuse process, and the directory in which it shows the volume as a file.
struct FuseFile {
    mount_point: PathBuf,
    process: Child,
    stderr: PathBuf,
    gone: bool,
}

impl FuseFile {
    fn mount(uri: &str, mount_point: &Path) -> Self {
        fs::create_dir_all(mount_point).expect("create a mount point");
        let program = tools::tool("nbdfuse").expect("nbdfuse is installed");
        let mut command = Command::new(program);
        let stderr = mount_point.with_extension("stderr");
        let log = File::create(&stderr).expect("create a file");
        command.arg(mount_point.join("volume")).arg(uri).stdin(Stdio::null()).stderr(log);
        let process = command.spawn().expect("start nbdfuse");
        let mount_point = mount_point.to_owned();
        let mut file = Self { mount_point, process, stderr, gone: false };
        file.wait_mounted();
        file
    }

    fn wait_mounted(&mut self) {
        let started = Instant::now();
        while !self.path().metadata().is_ok_and(|data| data.size() > 0) {
            let ended = self.process.try_wait().expect("wait for nbdfuse");
            assert!(ended.is_none(), "nbdfuse ended: {ended:?}");
            assert!(started.elapsed() < DEADLINE, "nbdfuse shows nothing after {DEADLINE:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The volume as a file.
    fn path(&self) -> PathBuf {
        self.mount_point.join("volume")
    }

    /// Whether nbdfuse ends by itself, as it does once nobody has its directory mounted.
    fn ends(&mut self) -> bool {
        let started = Instant::now();
        while started.elapsed() < DEADLINE {
            if self.process.try_wait().is_ok_and(|status| status.is_some()) {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        if thread::panicking() {
            let written = fs::read_to_string(&self.stderr).unwrap_or_default();
            eprintln!("nbdfuse wrote:\n{written}");
        }
        clean_up("umount", &["-l"], &self.mount_point);
        if !self.ends() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Runs a program that must not fail the test: it runs while one is failing, or when the volume is
/// gone and failing is right.
fn clean_up(name: &str, arguments: &[&str], path: &Path) {
    match tool(name).args(arguments).arg(path).try_outcome() {
        Ok(outcome) if outcome.status.success() => {}
        Ok(outcome) => eprintln!("{name} {}: {outcome}", path.display()),
        Err(error) => eprintln!("{error}"),
    }
}
