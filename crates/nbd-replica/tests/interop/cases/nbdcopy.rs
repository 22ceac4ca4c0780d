//! Images copied in and out by nbdcopy.

use std::os::unix::fs::MetadataExt as _;

use nbd_testkit::require_tools;

use super::command::tool;
use super::content::{assert_same_file, ext4_image, scattered_image};
use super::map::{assert_same_map, nbdinfo_map, sparsest_map};
use super::{MIB, cluster};

/// Copies an ext4 image in and out with `flags`, and expects it back bit by bit.
fn copy_in_and_out(flags: &[&str]) {
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let image = ext4_image(cluster.directory(), 64 * MIB);
    let back = cluster.directory().join("back");
    tool("nbdcopy").args(flags).arg(image.path()).arg(&uri).run();
    tool("nbdcopy").args(flags).arg(&uri).arg(&back).run();
    assert_same_file(&back, image.path());
    nbd_testkit::Ext4Image::at(&back).check();
}

#[test]
fn an_image_comes_back_as_it_was() {
    require_tools!["nbdcopy", "mke2fs", "e2fsck"];
    copy_in_and_out(&[]);
}

#[test]
fn an_image_comes_back_as_it_was_one_request_at_a_time() {
    require_tools!["nbdcopy", "mke2fs", "e2fsck"];
    copy_in_and_out(&["--connections=1", "--requests=1"]);
}

#[test]
fn an_image_comes_back_as_it_was_without_libnbds_threads() {
    require_tools!["nbdcopy", "mke2fs", "e2fsck"];
    copy_in_and_out(&["--synchronous", "--request-size=1048576", "--flush"]);
}

#[test]
fn holes_stay_holes() {
    require_tools!["nbdcopy", "nbdinfo"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    tool("nbdcopy").arg(&image).arg(&uri).run();
    assert_same_map(&nbdinfo_map(&uri), &sparsest_map(&image));

    let back = cluster.directory().join("back");
    tool("nbdcopy").arg(&uri).arg(&back).run();
    assert_same_file(&back, &image);
    let allocated = back.metadata().unwrap().blocks() * 512;
    assert!(allocated < 17 * MIB, "the copy takes {allocated} bytes");
}

#[test]
fn what_a_volume_held_before_does_not_show_through_holes() {
    require_tools!["nbdcopy", "nbdinfo"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let mut client = cluster.front().connect("volume").unwrap();
    for offset in (0..32).map(|n| n * MIB) {
        client.write(offset, &vec![0xee; 1 << 20]).unwrap();
    }
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    tool("nbdcopy").arg(&image).arg(&uri).run();
    assert_same_map(&nbdinfo_map(&uri), &sparsest_map(&image));
    let back = cluster.directory().join("back");
    tool("nbdcopy").arg(&uri).arg(&back).run();
    assert_same_file(&back, &image);
}

#[test]
fn a_volume_is_copied_onto_another() {
    require_tools!["nbdcopy", "nbdinfo"];
    let cluster = cluster("32MiB");
    let (one, other) = (cluster.front().uri("one"), cluster.front().uri("other"));
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    tool("nbdcopy").arg(&image).arg(&one).run();
    tool("nbdcopy").arg(&one).arg(&other).run();
    assert_same_map(&nbdinfo_map(&other), &nbdinfo_map(&one));
    let back = cluster.directory().join("back");
    tool("nbdcopy").arg(&other).arg(&back).run();
    assert_same_file(&back, &image);
}
