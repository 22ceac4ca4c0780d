//! qemu-img and qemu-io, which speak NBD by qemu's own client.

use nbd_testkit::require_tools;

use super::command::{Outcome, tool};
use super::content::{assert_same_file, ext4_image, scattered_image};
use super::map::{Kind, assert_same_map, map_of, nbdinfo_map, qemu_map, sparsest_map};
use super::{KIB, MIB, cluster};

/// Panics unless `qemu-img compare` finds two images to be the same, byte by byte.
fn assert_identical(format: &str, image: &std::path::Path, uri: &str) {
    let compare = tool("qemu-img").args(["compare", "-f", format, "-F", "raw"]);
    assert_eq!(compare.arg(image).arg(uri).run().trim(), "Images are identical.");
}

#[test]
fn a_raw_image_is_converted_in_with_its_holes() {
    require_tools!["qemu-img"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    let convert = tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]);
    convert.arg(&image).arg(&uri).run();
    assert_identical("raw", &image, &uri);
    assert_same_map(&qemu_map(&uri), &sparsest_map(&image));
}

#[test]
fn a_raw_image_is_converted_in_out_of_order() {
    require_tools!["qemu-img"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    let convert =
        tool("qemu-img").args(["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw"]);
    convert.arg(&image).arg(&uri).run();
    assert_identical("raw", &image, &uri);
    assert_same_map(&qemu_map(&uri), &sparsest_map(&image));
}

#[test]
fn a_qcow2_image_is_converted_in() {
    require_tools!["qemu-img", "mke2fs", "e2fsck"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let image = ext4_image(cluster.directory(), 64 * MIB);
    let qcow2 = cluster.directory().join("qcow2");
    let convert = tool("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(image.path()).arg(&qcow2).run();
    let convert = tool("qemu-img").args(["convert", "-n", "-f", "qcow2", "-O", "raw"]);
    convert.arg(&qcow2).arg(&uri).run();
    assert_identical("qcow2", &qcow2, &uri);
    assert_identical("raw", image.path(), &uri);
    assert_same_map(&qemu_map(&uri), &sparsest_map(image.path()));
}

#[test]
fn a_volume_is_converted_out_to_raw_and_qcow2() {
    require_tools!["qemu-img", "mke2fs", "e2fsck"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let image = ext4_image(cluster.directory(), 64 * MIB);
    let convert = tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]);
    convert.arg(image.path()).arg(&uri).run();
    for format in ["raw", "qcow2"] {
        let back = cluster.directory().join(format);
        let convert = tool("qemu-img").args(["convert", "-f", "raw", "-O", format, &uri]);
        convert.arg(&back).run();
        assert_identical(format, &back, &uri);
    }
    let back = cluster.directory().join("raw");
    assert_same_file(&back, image.path());
    nbd_testkit::Ext4Image::at(&back).check();
}

/// Runs qemu-io commands in one process. It ends with an error if any of them fails.
fn qemu_io(uri: &str, commands: &[&str]) -> Outcome {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    tool("qemu-io").args(["-f", "raw"]).args(commands).arg(uri).outcome()
}

#[track_caller]
fn qemu_io_does(uri: &str, commands: &[&str]) {
    let outcome = qemu_io(uri, commands);
    assert!(outcome.status.success(), "{outcome}");
    assert!(!outcome.stdout.contains("failed"), "{outcome}");
}

#[test]
fn patterns_read_back_wherever_they_lie() {
    require_tools!["qemu-io"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let write = [
        "write -P 0x11 0 4k",
        "write -P 0x22 4k 1M",
        "write -P 0x33 5000 3",
        "write -P 0x44 65530 12",
        "write -P 0x55 3145727 131073",
        "write -P 0x66 67108863 1",
        "writev -P 0x77 10M 512 4096 1000 65536",
    ];
    qemu_io_does(&uri, &write);
    let read = [
        "read -P 0x11 0 4k",
        "read -P 0x22 4096 904",
        "read -P 0x33 5000 3",
        "read -P 0x22 5003 60527",
        "read -P 0x44 65530 12",
        "read -P 0x22 65542 987130",
        "read -P 0 1052672 2093055",
        "read -P 0x55 3145727 131073",
        "read -P 0 3276800 7208960",
        "read -P 0x77 10M 71144",
        "read -P 0 67108000 863",
        "read -P 0x66 67108863 1",
    ];
    qemu_io_does(&uri, &read);
}

#[test]
fn a_wrong_pattern_is_seen() {
    require_tools!["qemu-io"];
    let cluster = cluster("1MiB");
    let uri = cluster.front().uri("volume");
    let outcome = qemu_io(&uri, &["write -P 1 0 8k", "read -P 2 0 8k"]);
    assert!(!outcome.status.success(), "{outcome}");
}

#[test]
fn zeroes_and_discards_read_as_zero_and_show_in_the_map() {
    require_tools!["qemu-io", "nbdinfo"];
    let cluster = cluster("8MiB");
    let uri = cluster.front().uri("volume");
    let commands = [
        "write -P 1 0 8M",
        "write -z 1M 1M",
        "write -z -u 3M 1M",
        "write -z -u -n 4M 64k",
        "discard 5M 1M",
        "write -z 7340033 6",
        "flush",
        "read -P 1 0 1M",
        "read -P 0 1M 1M",
        "read -P 1 2M 1M",
        "read -P 0 3M 1114112",
        "read -P 1 4259840 983040",
        "read -P 0 5M 1M",
        "read -P 1 6M 1048577",
        "read -P 0 7340033 6",
        "read -P 1 7340039 1048569",
    ];
    qemu_io_does(&uri, &commands);
    let expected = map_of(&[
        (MIB, Kind::Data),
        (MIB, Kind::Zero),
        (MIB, Kind::Data),
        (MIB + 64 * KIB, Kind::Hole),
        (MIB - 64 * KIB, Kind::Data),
        (MIB, Kind::Hole),
        (2 * MIB, Kind::Data),
    ]);
    assert_same_map(&nbdinfo_map(&uri), &expected);
}

#[test]
fn requests_in_flight_together_are_all_carried_out() {
    require_tools!["qemu-io"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let place = |n: u64| n * (MIB + 4 * KIB + 512);
    let write = (1..50).map(|n| format!("aio_write -P {n} {} 70000", place(n)));
    let read = (1..50).map(|n| format!("aio_read -P {n} {} 70000", place(n)));
    let wait = || std::iter::once("aio_flush".to_owned());
    let commands: Vec<_> = write.chain(wait()).chain(read).chain(wait()).collect();
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    qemu_io_does(&uri, &commands);
}

#[test]
fn writes_through_the_cache_are_there_for_the_next_process() {
    require_tools!["qemu-io"];
    let cluster = cluster("8MiB");
    let uri = cluster.front().uri("volume");
    // -f: with FUA.
    qemu_io_does(&uri, &["write -f -P 9 1000 5000", "write -P 8 1M 64k", "flush"]);
    qemu_io_does(&uri, &["read -P 9 1000 5000", "read -P 8 1M 64k"]);
}

#[test]
fn a_request_of_32_mib_is_carried_out() {
    require_tools!["qemu-io"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    qemu_io_does(&uri, &["write -P 5 1M 32M", "read -P 5 1M 32M", "read -P 0 33M 31M"]);
}
