//! What the clients write: trees of files, and images.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use nbd_testkit::Ext4Image;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::command::tool;
use super::{KIB, MIB};

/// Where this machine keeps text of other people; the first that exists is taken.
const MACHINE_TREES: [&str; 3] = ["/usr/share/doc", "/usr/share", "/etc"];

/// Files taken over from the machine, and the most bytes of each and of all.
const MACHINE_FILES: usize = 300;
const MACHINE_FILE_BYTES_MAX: u64 = 256 * KIB;
const MACHINE_BYTES_MAX: u64 = 6 * MIB;

/// Makes a directory with files of this machine and some that are made to be awkward: empty, large,
/// sparse, deep, linked, named in other scripts.
pub(crate) fn make_tree(root: &Path) {
    let mut random = StdRng::seed_from_u64(1);
    let machine = root.join("machine");
    copy_machine_files(&machine);
    let made = root.join("made");
    let deep = (0..20).fold(made.clone(), |path, level| path.join(format!("level {level}")));
    fs::create_dir_all(&deep).expect("create directories");
    let write = |name: &str, bytes: &[u8]| fs::write(made.join(name), bytes).expect("write a file");
    write("empty", b"");
    write("ünïcode 名前", "content\n".as_bytes());
    write(&"long".repeat(60), b"a name of 240 bytes");
    let mut noise = vec![0; 1_234_567];
    random.fill_bytes(&mut noise);
    write("noise", &noise);
    fs::write(deep.join("leaf"), &noise[..5000]).expect("write a file");
    symlink("noise", made.join("link")).expect("make a link");
    symlink("/nowhere", made.join("dangling link")).expect("make a link");
    fs::hard_link(made.join("noise"), made.join("same noise")).expect("make a link");
    let sparse = File::create(made.join("sparse")).expect("create a file");
    sparse.set_len(8 * MIB).expect("extend a file");
    for place in [0, MIB + 5, 3 * MIB, 8 * MIB - 1] {
        sparse.write_all_at(b"!", place).expect("write to a file");
    }
}

/// Copies small regular files, in the order of their names, so that a machine has always the same.
fn copy_machine_files(to: &Path) {
    fs::create_dir_all(to).expect("create a directory");
    let source = MACHINE_TREES.iter().find(|path| Path::new(path).is_dir());
    let mut files = Vec::new();
    small_files(Path::new(source.expect("some directory of the machine")), &mut files);
    let mut bytes = 0;
    for (number, (file, len)) in files.iter().enumerate() {
        bytes += len;
        if bytes > MACHINE_BYTES_MAX {
            break;
        }
        let directory = to.join(format!("{:02}", number % 20));
        fs::create_dir_all(&directory).expect("create a directory");
        let name = file.file_name().expect("a file has a name").to_string_lossy().into_owned();
        fs::copy(file, directory.join(format!("{number} {name}"))).expect("copy a file");
    }
}

fn small_files(directory: &Path, found: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(data) = path.symlink_metadata() else { continue };
        if found.len() == MACHINE_FILES {
            return;
        } else if data.is_dir() {
            small_files(&path, found);
        } else if data.is_file() && (1..=MACHINE_FILE_BYTES_MAX).contains(&data.len()) {
            found.push((path, data.len()));
        }
    }
}

/// An ext4 image of `bytes` bytes with the files of [`make_tree`], both in `directory`.
pub(crate) fn ext4_image(directory: &Path, bytes: u64) -> Ext4Image {
    let tree = directory.join("tree");
    make_tree(&tree);
    Ext4Image::create(&directory.join("image"), bytes, &tree)
}

/// An image of `bytes` bytes whose first half is data, written zeroes and holes in turn, some of
/// them a single block; the second half is one hole.
pub(crate) fn scattered_image(path: &Path, bytes: u64) {
    let mut random = StdRng::seed_from_u64(2);
    let image = File::create(path).expect("create an image");
    image.set_len(bytes).expect("extend an image");
    let mut offset = 0;
    while offset < bytes / 2 {
        let blocks: usize = [1, 1, 2, 3, 7, 16, 40][random.random_range(0..7)];
        let mut run = vec![0; blocks * 4096];
        match random.random_range(0..4) {
            0 => {}
            1 => image.write_all_at(&run, offset).expect("write to an image"),
            _ => {
                random.fill_bytes(&mut run);
                image.write_all_at(&run, offset).expect("write to an image");
            }
        }
        offset += run.len() as u64;
    }
}

/// Bytes that are the same whenever asked for with the same `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Panics unless two files have the same length and bytes.
#[track_caller]
pub(crate) fn assert_same_file(actual: &Path, expected: &Path) {
    let open = |path: &Path| File::open(path).unwrap_or_else(|e| panic!("open {path:?}: {e}"));
    let (mut left, mut right) = (open(actual), open(expected));
    let len = |file: &File| file.metadata().expect("look at a file").len();
    assert_eq!(len(&left), len(&right), "length of {actual:?}");
    let (mut left_buffer, mut right_buffer) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    loop {
        let read = left.read(&mut left_buffer).expect("read a file");
        right.read_exact(&mut right_buffer[..read]).expect("read a file");
        let differs = |i: &usize| left_buffer[*i] != right_buffer[*i];
        if let Some(place) = (0..read).find(differs) {
            panic!("{actual:?} differs from {expected:?} at byte {}", offset + place);
        }
        if read == 0 {
            return;
        }
        offset += read;
    }
}

/// Panics unless two directories hold the same files with the same content, links as links.
#[track_caller]
pub(crate) fn assert_same_tree(actual: &Path, expected: &Path) {
    let diff = tool("diff").args(["-r", "--no-dereference", "--exclude=lost+found"]);
    let outcome = diff.arg(expected).arg(actual).outcome();
    assert!(outcome.status.success() && outcome.stdout.is_empty(), "{outcome}");
}
