//! What one client wrote, another reads after what they attach to died in between.

use nbd_testkit::{Cluster, require_tools};

use super::command::tool;
use super::content::{assert_same_file, ext4_image, scattered_image};
use super::fio::{Moved, fio};
use super::map::{assert_same_map, nbdinfo_map, sparsest_map};
use super::{MIB, cluster};

fn die_and_start(cluster: &mut Cluster) {
    cluster.front_mut().kill_9();
    cluster.front_mut().start();
}

#[test]
fn what_qemu_wrote_libnbd_reads_after_a_kill() {
    require_tools!["qemu-img", "nbdcopy", "nbdinfo"];
    let mut cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    let convert = tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]);
    convert.arg(&image).arg(&uri).run();
    die_and_start(&mut cluster);
    let back = cluster.directory().join("back");
    tool("nbdcopy").arg(&uri).arg(&back).run();
    assert_same_file(&back, &image);
    assert_same_map(&nbdinfo_map(&uri), &sparsest_map(&image));
}

#[test]
fn what_libnbd_wrote_qemu_reads_after_two_kills() {
    require_tools!["qemu-img", "nbdcopy", "mke2fs", "e2fsck"];
    let mut cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let image = ext4_image(cluster.directory(), 64 * MIB);
    tool("nbdcopy").arg(image.path()).arg(&uri).run();
    die_and_start(&mut cluster);
    // The second start comes upon what the first one recovered.
    die_and_start(&mut cluster);
    let back = cluster.directory().join("back");
    tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&back).run();
    assert_same_file(&back, image.path());
}

#[test]
fn what_fio_wrote_it_verifies_after_a_kill() {
    require_tools!["fio"];
    let mut cluster = cluster("64MiB");
    let arguments = ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=24m"];
    let moved = fio(&cluster, "volume", &[&arguments[..], &["--do_verify=0"]].concat());
    assert_eq!(moved, Moved { written: 24 * MIB, read: 0, trimmed: 0 });
    die_and_start(&mut cluster);
    let moved = fio(&cluster, "volume", &[&arguments[..], &["--verify_only"]].concat());
    assert_eq!(moved.read, 24 * MIB);
}

#[test]
fn what_was_written_is_there_after_an_orderly_stop() {
    require_tools!["qemu-io"];
    let mut cluster = cluster("8MiB");
    let uri = cluster.front().uri("volume");
    let io = |command: &str| tool("qemu-io").args(["-f", "raw", "-c", command, &uri]).run();
    io("write -P 7 12345 100000");
    cluster.front_mut().restart();
    io("read -P 7 12345 100000");
}
