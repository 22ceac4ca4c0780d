//! Several connections to one volume at once, which `CAN_MULTI_CONN` allows.

use nbd_testkit::{NbdClient, require_tools};

use super::command::tool;
use super::content::{assert_same_file, noise, scattered_image};
use super::fio::{Moved, fio};
use super::{KIB, MIB, cluster};

#[test]
fn clients_are_told_that_they_may() {
    require_tools!["nbdinfo"];
    let cluster = cluster("1MiB");
    // It says so by its exit status.
    tool("nbdinfo").args(["--can", "multi-conn", &cluster.front().uri("volume")]).run();
}

#[test]
fn four_connections_copy_what_one_reads_back() {
    require_tools!["nbdcopy"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    let copy = tool("nbdcopy").args(["--connections=4", "--threads=4", "--request-size=65536"]);
    copy.arg(&image).arg(&uri).run();
    let back = cluster.directory().join("back");
    tool("nbdcopy").arg("--connections=1").arg(&uri).arg(&back).run();
    assert_same_file(&back, &image);
}

#[test]
fn four_connections_read_back_what_one_copied() {
    require_tools!["nbdcopy"];
    let cluster = cluster("32MiB");
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    tool("nbdcopy").arg("--connections=1").arg(&image).arg(&uri).run();
    let back = cluster.directory().join("back");
    let copy = tool("nbdcopy").args(["--connections=4", "--threads=4", "--request-size=65536"]);
    copy.arg(&uri).arg(&back).run();
    assert_same_file(&back, &image);
}

#[test]
fn what_four_connections_wrote_four_others_verify() {
    require_tools!["fio"];
    let cluster = cluster("64MiB");
    let arguments =
        ["--rw=randwrite", "--bs=4k", "--numjobs=4", "--size=4m", "--offset_increment=4m"];
    let moved = fio(&cluster, "volume", &[&arguments[..], &["--do_verify=0"]].concat());
    assert_eq!(moved, Moved { written: 16 * MIB, read: 0, trimmed: 0 });
    let moved = fio(&cluster, "volume", &[&arguments[..], &["--verify_only"]].concat());
    assert_eq!(moved.read, 16 * MIB);
}

#[test]
fn what_one_connection_wrote_the_others_read_at_once() {
    let cluster = cluster("8MiB");
    let connect = |_| cluster.front().connect("volume").unwrap();
    let mut clients: Vec<NbdClient> = (0..4).map(connect).collect();
    for round in 0..200_u64 {
        let offset = round * 7777 % (4 * MIB);
        let data = noise(round, 5000);
        let writer = usize::try_from(round % 4).unwrap();
        clients[writer].write(offset, &data).unwrap();
        for reader in &mut clients {
            assert!(reader.read(offset, data.len()).unwrap() == data, "round {round}");
        }
    }
    clients[0].trim(0, 4 * MIB).unwrap();
    for reader in &mut clients {
        let status = reader.block_status(0, 8 * MIB).unwrap();
        assert!(status[0].hole && status[0].len >= 4 * MIB - 4 * KIB, "{status:?}");
    }
}
