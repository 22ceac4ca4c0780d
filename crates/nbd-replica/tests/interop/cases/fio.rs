//! fio's nbd engine, which verifies what it wrote.

use nbd_testkit::{Cluster, require_tools};

use super::command::tool;
use super::map::json;
use super::{MIB, cluster};

/// Bytes that a run of fio moved without any error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) written: u64,
    /// Verified, where nothing else reads.
    pub(crate) read: u64,
    pub(crate) trimmed: u64,
}

/// Runs fio with 16 requests in flight on the volume `volume`, every block with a checksum in it.
/// Panics if fio meets an error or a block that is not what it wrote.
pub(crate) fn fio(cluster: &Cluster, volume: &str, arguments: &[&str]) -> Moved {
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--group_reporting",
        "--output-format=json",
    ];
    let uri = format!("--uri={}", cluster.front().uri(volume));
    let fio = tool("fio").directory(cluster.directory()).args(common).arg(uri);
    let output = fio.args(arguments).run();
    // Warnings come first.
    let report = json(&output[output.find('{').expect("fio writes JSON")..]);
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{job}");
    let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().expect("a byte count");
    Moved { written: bytes("write"), read: bytes("read"), trimmed: bytes("trim") }
}

#[test]
fn random_writes_verify() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    let moved = fio(&cluster, "volume", &["--rw=randwrite", "--bs=4k", "--size=16m"]);
    assert_eq!(moved, Moved { written: 16 * MIB, read: 16 * MIB, trimmed: 0 });
}

#[test]
fn random_writes_of_any_size_and_place_verify() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    let arguments = ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=32m"];
    let moved = fio(&cluster, "volume", &arguments);
    assert_eq!(moved, Moved { written: 32 * MIB, read: 32 * MIB, trimmed: 0 });
}

#[test]
fn writes_verify_while_others_are_under_way() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    let arguments =
        ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--verify_backlog=32"];
    let moved = fio(&cluster, "volume", &[&arguments[..], &["--size=32m"]].concat());
    assert_eq!(moved.written, 32 * MIB);
    assert!(moved.read >= 31 * MIB, "{moved:?}");
}

#[test]
fn blocks_written_over_and_over_verify() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    // fio itself must not have two writes of one place under way, or it cannot know which wins.
    let arguments = ["--rw=randwrite", "--bs=4k", "--norandommap", "--serialize_overlap=1"];
    let moved =
        fio(&cluster, "volume", &[&arguments[..], &["--size=2m", "--io_size=16m"]].concat());
    assert_eq!(moved.written, 16 * MIB);
    assert!(moved.read > MIB, "{moved:?}");
}

#[test]
fn blocks_trimmed_and_written_again_verify() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    let arguments = ["--rw=randtrimwrite", "--bs=4k", "--serialize_overlap=1", "--size=8m"];
    let moved = fio(&cluster, "volume", &arguments);
    assert_eq!(moved, Moved { written: 8 * MIB, read: 8 * MIB, trimmed: 8 * MIB });
}
