//! What the servers themselves say of their clients.

use nbd_testkit::{Cluster, ServerProcess, require_tools};

use super::command::tool;
use super::content::scattered_image;
use super::fio::fio;
use super::map::{nbdinfo_map, qemu_map};
use super::{MIB, cluster};

/// Every client at its work, one after the other.
fn use_all_clients(cluster: &Cluster) {
    let uri = cluster.front().uri("volume");
    let image = cluster.directory().join("image");
    scattered_image(&image, 32 * MIB);
    tool("nbdcopy").arg(&image).arg(&uri).run();
    tool("nbdcopy").arg(&uri).arg(cluster.directory().join("back")).run();
    let convert = tool("qemu-img").args(["convert", "-n", "-f", "raw", "-O", "raw"]);
    convert.arg(&image).arg(&uri).run();
    let io = ["-f", "raw", "-c", "discard 0 1M", "-c", "write -z -u -n 1M 1M", "-c", "flush"];
    tool("qemu-io").args(io).arg(&uri).run();
    tool("nbdinfo").args(["--list", &uri]).run();
    nbdinfo_map(&uri);
    qemu_map(&uri);
    fio(cluster, "volume", &["--rw=randtrimwrite", "--bs=8k", "--iodepth=1", "--size=2m"]);
}

#[test]
fn clients_cause_no_warning_and_no_refusal() {
    require_tools!["nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio"];
    let mut cluster = cluster("32MiB");
    use_all_clients(&cluster);
    let log = cluster.front().stderr();
    let grave = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
    assert_eq!(log.lines().filter(grave).collect::<Vec<_>>(), [""; 0]);
    for name in
        ["nbd_requests_refused_total", "nbd_requests_failed_total", "nbd_connections_refused_total"]
    {
        assert_eq!(metric(cluster.front(), name), 0, "{name}");
    }
    let mut of_nodes = |name| cluster.nodes().iter().map(|node| metric(node, name)).sum::<u64>();
    assert_eq!(of_nodes("store_corrupt_reads_total"), 0);
    // Else none of these tests has read from the chunk store.
    assert!(of_nodes("checkpoint_seconds_count") > 0);
}

#[test]
fn the_requests_of_clients_are_counted() {
    require_tools!["nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio"];
    let cluster = cluster("32MiB");
    use_all_clients(&cluster);
    for op in ["read", "write", "flush", "trim", "write_zeroes", "block_status"] {
        let name = format!("nbd_requests_seconds_count{{op=\"{op}\"}}");
        assert!(metric(cluster.front(), &name) > 0, "{name}");
    }
}

/// The value of a counter, by its name and labels.
fn metric(server: &ServerProcess, name: &str) -> u64 {
    let page = server.get("/metrics").body;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.unwrap_or_else(|| panic!("no {name} in\n{page}"));
    value.parse().unwrap_or_else(|_| panic!("{name} is {value}, no count"))
}
