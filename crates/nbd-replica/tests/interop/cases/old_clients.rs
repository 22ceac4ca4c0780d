//! Clients that know less of the protocol: no `OPT_GO`, no structured replies.

use nbd_proto::{ClientGoal, ReplyStyle};
use nbd_testkit::{ClientError, Cluster, ConnectOptions, NbdClient, require_tools};

use super::command::tool;
use super::content::noise;
use super::{MIB, cluster};

/// As a client from before 2016 attaches.
fn connect_as_of_old(cluster: &Cluster, export: &str) -> Result<NbdClient, ClientError> {
    let options = ConnectOptions {
        export: export.to_owned(),
        replies: ReplyStyle::Simple,
        goal: ClientGoal::ExportName,
        allocation_context: false,
        ..ConnectOptions::default()
    };
    NbdClient::connect_with(cluster.front().nbd_address(), &options)
}

#[test]
fn an_old_client_attaches_by_export_name() {
    let cluster = cluster("8MiB");
    let client = connect_as_of_old(&cluster, "volume").unwrap();
    assert_eq!(client.size(), 8 * MIB);
    assert_eq!(client.attached().replies, ReplyStyle::Simple);
}

#[test]
fn an_old_client_writes_what_a_new_one_reads() {
    let cluster = cluster("8MiB");
    let mut old = connect_as_of_old(&cluster, "volume").unwrap();
    let mut new = cluster.front().connect("volume").unwrap();
    let data = noise(3, 300_000);
    old.write(1234, &data).unwrap();
    old.trim(MIB, MIB).unwrap();
    old.write_zeroes(2000, 10, false).unwrap();
    old.flush().unwrap();
    let mut expected = data;
    expected[2000 - 1234..][..10].fill(0);
    assert!(new.read(1234, expected.len()).unwrap() == expected);
    assert!(old.read(1234, expected.len()).unwrap() == expected);
}

#[test]
fn an_old_client_is_hung_up_on_if_there_is_no_such_export() {
    let cluster = crate::start(Cluster::builder().auto_create(false));
    let refusal = connect_as_of_old(&cluster, "volume").unwrap_err();
    assert!(matches!(refusal, ClientError::Closed), "{refusal:?}");
}

#[test]
fn nbd_client_lists_the_volumes() {
    require_tools!["nbd-client"];
    let cluster = cluster("1MiB");
    for name in ["one", "two"] {
        cluster.front().connect(name).unwrap();
    }
    let (host, port) = cluster.front().nbd_address();
    let list = tool("nbd-client").args(["-l", host, &port.to_string()]).run();
    let names: Vec<_> = list.lines().filter(|line| !line.starts_with("Negotiation")).collect();
    assert_eq!(names, ["one", "two"], "{list}");
}

#[test]
fn qemu_nbd_lists_the_volumes() {
    require_tools!["qemu-nbd"];
    let cluster = cluster("1MiB");
    for name in ["one", "two"] {
        cluster.front().connect(name).unwrap();
    }
    let (host, port) = cluster.front().nbd_address();
    let list = tool("qemu-nbd").args(["-L", "-b", host, "-p", &port.to_string()]).run();
    assert!(list.contains("exports available: 2"), "{list}");
    assert!(list.contains("export: 'one'") && list.contains("export: 'two'"), "{list}");
}
