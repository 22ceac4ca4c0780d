//! What is in the way of a start, and mistakes.

use std::fs;
use std::net::TcpListener;

use nbd_testkit::process::Signal;
use tempfile::TempDir;

use crate::support::{Up, command, fails, fails_in_one_line, replica_ports};
use nbd_testkit::free_port;

#[test]
fn what_is_in_the_way_of_a_start_is_said_in_one_line() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    let other = directory.path().join("other");
    let up = Up::start(&data, &["--replicas=1"]);
    let (nbd, http) = (up.nbd.to_string(), up.http.to_string());
    let mut to_nbd = command(&other, up.nbd, free_port());
    fails_in_one_line(&mut to_nbd, 1, &["NBD of the load balancer", &nbd, "in use"]);
    let mut to_http = command(&other, free_port(), up.http);
    fails_in_one_line(&mut to_http, 1, &["HTTP of the load balancer", &http, "in use"]);
    assert!(!other.exists(), "something was made");
    let mut to_data = command(&data, free_port(), free_port());
    fails_in_one_line(&mut to_data, 1, &[&data.display().to_string(), "in use"]);
    up.connect("vol1").write(0, b"x").unwrap();
    up.stop(Signal::TERM);
    let up = Up::start(&data, &[]);
    assert_eq!(up.connect("vol1").read(0, 1).unwrap(), b"x");
}

#[test]
fn a_replicas_port_that_is_taken_is_named() {
    let directory = TempDir::new().unwrap();
    let (data, ports) = (directory.path().join("data"), replica_ports());
    let grpc = ports + 122;
    let taken = TcpListener::bind(("127.0.0.1", grpc)).unwrap();
    for processes in [None, Some("--processes")] {
        let mut command = command(&data, free_port(), free_port());
        command.arg(format!("--ports={ports}")).args(processes);
        let grpc = grpc.to_string();
        fails_in_one_line(&mut command, 1, &["gRPC of nbd-1-2", &grpc, "in use", "--ports"]);
    }
    assert!(!data.exists(), "something was made");
    drop(taken);
    Up::start_as_is(&data, &[&format!("--ports={ports}")]).stop(Signal::TERM);
    // Once it is there, the file says where the port comes from.
    let _taken = TcpListener::bind(("127.0.0.1", grpc)).unwrap();
    let mut again = command(&data, free_port(), free_port());
    fails_in_one_line(&mut again, 1, &["gRPC of nbd-1-2", "in use", "cluster.toml"]);
}

#[test]
fn ports_in_use_are_passed_over_when_a_cluster_is_made() {
    let directory = TempDir::new().unwrap();
    // Others may run a cluster here: then they hold it, which is as good.
    let _taken = TcpListener::bind(("127.0.0.1", 11_113));
    let up = Up::start_as_is(directory.path(), &["--replicas=1"]);
    assert_ne!(up.http_of("nbd-1-1"), 11_113);
    assert_eq!(up.http_of("nbd-1-1") % 1000, 113);
}

#[test]
fn a_directory_of_something_else_is_left_alone() {
    let directory = TempDir::new().unwrap();
    let foreign = directory.path().join("foreign/nbd-1-1");
    fs::create_dir_all(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    let mut in_foreign = command(foreign.parent().unwrap(), free_port(), free_port());
    fails_in_one_line(&mut in_foreign, 1, &[&foreign.display().to_string(), "letter"]);
    let mut in_file = command(&foreign.join("letter"), free_port(), free_port());
    fails_in_one_line(&mut in_file, 1, &["letter"]);
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "something was added");
    assert_eq!(fs::read(foreign.join("letter")).unwrap(), b"dear");
    assert!(!foreign.with_file_name("cluster.toml").exists());
}

#[test]
fn silly_settings_are_usage_errors() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    for size in ["0", "1000", "4097", "65TiB"] {
        let mut command = command(&data, free_port(), free_port());
        fails_in_one_line(command.arg(format!("--size={size}")), 64, &["size"]);
    }
    let (nbd, http) = (free_port(), free_port());
    fails_in_one_line(&mut command(&data, nbd, nbd), 64, &[&nbd.to_string()]);
    let mut small_log = command(&data, nbd, http);
    fails_in_one_line(small_log.arg("--log-bytes-max=1MiB"), 64, &["--log-bytes-max"]);
    let mistakes = [
        "--size=big",
        "--size=8EiB",
        "--size=-1",
        "--size=",
        "--nbd=nowhere",
        "--name=my cluster",
        "--shards=0",
        "--shards=10",
        "--replicas=8",
        "--ports=80",
        "--restart",
        "--nosuch",
    ];
    for mistake in mistakes {
        let mut command = command(&data, nbd, http);
        let (code, err) = fails(command.arg(mistake));
        assert_eq!(code, 64, "{mistake}: {err}");
        let flag = mistake.split('=').next().unwrap();
        let said =
            err.lines().take(2).any(|line| line.contains(flag) || line.contains("--processes"));
        assert!(said, "{err}");
    }
    assert!(!data.exists(), "a data directory was made for a mistake");
}
