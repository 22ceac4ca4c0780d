//! Clusters of other shapes than the default, remembered, grown, and refused.

use std::fs;
use std::process::Command;

use nbd_testkit::process::Signal;
use tempfile::TempDir;

use crate::support::{
    Up, build_services, command, fails_in_one_line, nbdctl, port_after, wait_until,
};
use nbd_testkit::free_port;

#[test]
fn two_shards_share_the_volumes_and_are_remembered() {
    let directory = TempDir::new().unwrap();
    let names: Vec<String> = (0..12).map(|n| format!("volume-{n}")).collect();
    let up = Up::start(directory.path(), &["--shards=2", "--size=1MiB", "--name=mine"]);
    assert!(up.welcome.contains("2 shards of 3 replicas"), "{}", up.welcome);
    for name in &names {
        up.connect(name).write(0, name.as_bytes()).unwrap();
    }
    up.stop(Signal::TERM);
    let described = fs::read_to_string(directory.path().join("cluster.toml")).unwrap();

    // The same command without what is remembered.
    let up = Up::start(directory.path(), &[]);
    assert_eq!(fs::read_to_string(directory.path().join("cluster.toml")).unwrap(), described);
    let exports = |port: u16| nbd_testkit::list_exports(("127.0.0.1", port)).unwrap();
    let of_shard = |node| exports(port_after(up.line(node), "nbd://127.0.0.1:")).len();
    let (first, second) = (of_shard("nbd-1-2"), of_shard("nbd-2-3"));
    assert!(first > 0 && second > 0, "{first} and {second}");
    let mut sorted = names.clone();
    sorted.sort();
    let mut all = exports(up.nbd);
    all.sort();
    assert_eq!(all, sorted);
    for name in &names {
        let mut client = up.connect(name);
        assert_eq!(client.size(), 1 << 20);
        assert_eq!(client.read(0, name.len()).unwrap(), name.as_bytes());
    }
}

#[test]
fn a_wrong_shape_is_refused_and_harms_nothing() {
    let directory = TempDir::new().unwrap();
    let data = directory.path();
    let up = Up::start(data, &["--shards=2", "--replicas=1"]);
    let names = ["one", "two", "three"];
    for name in names {
        up.connect(name).write(0, name.as_bytes()).unwrap();
    }
    up.stop(Signal::TERM);
    let described = fs::read_to_string(data.join("cluster.toml")).unwrap();
    let refused = |flag: &str, words: &[&str]| {
        let mut command = command(data, free_port(), free_port());
        fails_in_one_line(command.arg(flag), 64, words);
    };
    let path = data.display().to_string();
    refused("--shards=1", &[&path, "2 shards, not 1", "--data-dir"]);
    refused("--shards=3", &["2 shards, not 3"]);
    refused("--name=theirs", &["cinderblock", "theirs"]);
    refused("--ports=1024", &["ports", "nbd-1-1"]);
    assert_eq!(fs::read_to_string(data.join("cluster.toml")).unwrap(), described);
    let up = Up::start(data, &["--replicas=2"]);
    for name in names {
        assert_eq!(up.connect(name).read(0, name.len()).unwrap(), name.as_bytes());
    }
    // The new replicas warn that they join.
    let (status, _, errors) = up.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{errors}");
    refused("--replicas=1", &["2 replicas, not 1"]);
}

/// What `nbdctl replica list` says, asked at a node's gRPC.
fn members(up: &Up, node: &str) -> String {
    let grpc = port_after(up.line(node), "nbd://127.0.0.1:") + 1;
    let nbdctl_replica = format!("nbdctl replica --grpc 127.0.0.1:{grpc} list");
    assert!(up.welcome.contains(&nbdctl_replica), "{nbdctl_replica}: {}", up.welcome);
    let mut command = nbdctl();
    command.args(["replica", "--grpc", &format!("127.0.0.1:{grpc}"), "list"]);
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

// Goal: a cluster of one replica, as earlier versions made it, stays what it is until it is asked
// to grow, and then has its data on three.
// Method: its directory without `cluster.toml` is such a one. In the end the first replica goes.
#[test]
fn one_replica_grows_to_three() {
    build_services();
    let directory = TempDir::new().unwrap();
    let data = directory.path();
    let up = Up::start(data, &["--replicas=1", "--size=8MiB"]);
    let mut client = up.connect("vol1");
    for offset in 0..8 {
        client.write(offset << 20, &vec![u8::try_from(offset).unwrap() + 1; 1 << 20]).unwrap();
    }
    up.kill_9();
    fs::remove_file(data.join("cluster.toml")).unwrap();

    let up = Up::start(data, &[]);
    assert!(up.welcome.contains("1 shard of 1 replica."), "{}", up.welcome);
    assert_eq!(up.connect("vol1").read(7 << 20, 4).unwrap(), [8; 4]);
    up.stop(Signal::TERM);

    let up = Up::start(data, &["--replicas=3", "--processes"]);
    assert!(up.welcome.contains("1 shard of 3 replicas"), "{}", up.welcome);
    assert!(up.welcome.contains("nbd-1-2, nbd-1-3"), "{}", up.welcome);
    let voters = || {
        let members = members(&up, "nbd-1-1");
        members.lines().filter(|line| line.contains("voter") || line.contains("leader")).count()
    };
    wait_until("three voters", || voters() == 3);
    nbd_testkit::process::send_signal(up.pid("nbd-1-1"), Signal::KILL);
    let mut client = up.connect("vol1");
    for offset in 0..8 {
        let expected = vec![u8::try_from(offset).unwrap() + 1; 1 << 20];
        assert!(client.read(offset << 20, 1 << 20).unwrap() == expected, "MiB {offset}");
    }
    client.write(0, b"on two").unwrap();
}

#[test]
fn data_whose_description_is_lost_is_not_guessed_at() {
    let directory = TempDir::new().unwrap();
    let data = directory.path();
    Up::start(data, &["--shards=2", "--replicas=1"]).stop(Signal::TERM);
    fs::rename(data.join("cluster.toml"), data.join("away")).unwrap();
    let refused = |command: &mut Command, words: &[&str]| fails_in_one_line(command, 1, words);
    let mut again = command(data, free_port(), free_port());
    refused(&mut again, &["nbd-2-1", "cluster.toml", "gone"]);
    fs::rename(data.join("away"), data.join("cluster.toml")).unwrap();
    Up::start(data, &[]).stop(Signal::TERM);
    // Nor is one that cannot be read.
    fs::write(data.join("cluster.toml"), "name = 7").unwrap();
    fails_in_one_line(&mut command(data, free_port(), free_port()), 64, &["cluster.toml", "name"]);
}

#[test]
fn sizes_are_those_of_new_volumes_only() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--replicas=1", "--size=16MiB"]);
    assert_eq!(up.connect("first").size(), 16 << 20);
    up.stop(Signal::TERM);
    let up = Up::start(directory.path(), &["--size=2TiB"]);
    assert_eq!(up.connect("first").size(), 16 << 20);
    assert_eq!(up.connect("second").size(), 2 << 40);
}
