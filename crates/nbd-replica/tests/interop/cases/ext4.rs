//! A file system on a volume: mounted through nbdfuse and a loop device, since the kernel's own
//! client needs a module that few test machines have.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nbd_testkit::{Cluster, Ext4Image};

use super::command::tool;
use super::content::{assert_same_file, assert_same_tree, ext4_image, make_tree, noise};
use super::mount::{MountedVolume, require_mounts};
use super::{KIB, MIB, cluster};

/// A cluster whose volume `volume` holds an ext4 image with the files of `tree` in its directory.
fn cluster_with_files() -> Cluster {
    let cluster = cluster("64MiB");
    let image = ext4_image(cluster.directory(), 64 * MIB);
    tool("nbdcopy").arg(image.path()).arg(cluster.front().uri("volume")).run();
    cluster
}

fn mount_volume(cluster: &Cluster) -> MountedVolume {
    MountedVolume::mount(&cluster.front().uri("volume"), &cluster.directory().join("mounts"))
}

#[test]
fn a_mounted_volume_shows_the_files_it_was_made_from() {
    require_mounts!();
    let cluster = cluster_with_files();
    let mounted = mount_volume(&cluster);
    assert_same_tree(mounted.root(), &cluster.directory().join("tree"));
    mounted.unmount();
}

#[test]
fn a_file_system_written_to_is_clean_and_complete() {
    require_mounts!();
    let cluster = cluster_with_files();
    let expected = cluster.directory().join("tree");
    let mounted = mount_volume(&cluster);
    for root in [mounted.root(), &expected] {
        change_files(root);
    }
    assert_same_tree(mounted.root(), &expected);
    mounted.unmount();

    let copy = cluster.directory().join("copy");
    tool("nbdcopy").arg(cluster.front().uri("volume")).arg(&copy).run();
    Ext4Image::at(&copy).check();

    let mounted = mount_volume(&cluster);
    assert_same_tree(mounted.root(), &expected);
    mounted.unmount();
}

/// New files, a large one, one overwritten here and there, one cut off, some gone.
fn change_files(root: &Path) {
    make_tree(&root.join("again"));
    let mut large = File::create(root.join("large")).expect("create a file");
    for part in 0..8 {
        large.write_all(&noise(part, 1 << 20)).expect("write to a file");
    }
    large.sync_all().expect("sync a file");
    for place in 0..200 {
        let offset = place * 39_119 % (8 * MIB - 4 * KIB);
        large.write_all_at(&noise(place, 1500), offset).expect("write to a file");
    }
    large.sync_data().expect("sync a file");
    let cut = File::options().write(true).open(root.join("made/noise")).expect("open a file");
    cut.set_len(1000).expect("cut a file off");
    fs::remove_dir_all(root.join("machine/00")).expect("remove a directory");
    fs::rename(root.join("made/empty"), root.join("moved")).expect("move a file");
}

#[test]
fn files_synced_before_the_node_died_are_there_after() {
    require_mounts!();
    let mut cluster = cluster_with_files();
    let source = cluster.directory().join("synced");
    fs::write(&source, noise(9, 3_000_000)).unwrap();
    let mounted = mount_volume(&cluster);
    fs::copy(&source, mounted.root().join("synced")).unwrap();
    File::open(mounted.root().join("synced")).unwrap().sync_all().unwrap();
    // What the file system has in memory only is lost with the connection, as in a power cut.
    cluster.front_mut().kill_9();
    mounted.abandon();
    cluster.front_mut().start();

    let mounted = mount_volume(&cluster);
    assert_same_file(&mounted.root().join("synced"), &source);
    mounted.unmount();
    let copy = cluster.directory().join("copy");
    tool("nbdcopy").arg(cluster.front().uri("volume")).arg(&copy).run();
    Ext4Image::at(&copy).check();
}
