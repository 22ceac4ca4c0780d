//! All services in one process.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::time::{Duration, Instant};

use nbd_testkit::process::{Signal, cpu_time, send_signal};
use nbd_testkit::{http, require_tools, tools};
use tempfile::TempDir;

use crate::support::{SMALL_LOG, Up, command, port_after, replica_ports, wait, wait_until};
use nbd_testkit::free_port;

const NODES: [&str; 3] = ["nbd-1-1", "nbd-1-2", "nbd-1-3"];

#[test]
fn says_how_to_attach_to_look_and_to_stop() {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("deep/data");
    let up = Up::start(&data, &[]);
    let (nbd, http) = (up.nbd, up.http);
    let expected = [
        format!("nbd-client 127.0.0.1 {nbd} "),
        format!("nbdinfo nbd://127.0.0.1:{nbd}/"),
        format!("http://127.0.0.1:{http}/health"),
        format!("http://127.0.0.1:{http}/metrics"),
        data.display().to_string(),
        "1 shard of 3 replicas".to_owned(),
        "Ctrl-C".to_owned(),
    ];
    for text in expected {
        assert!(up.welcome.contains(&text), "{text:?} is not in\n{}", up.welcome);
    }
    let qemu = up.welcome.lines().find(|line| line.contains("qemu")).unwrap();
    assert!(qemu.contains("127.0.0.1") && qemu.contains(&nbd.to_string()), "{qemu}");
    // All of it holds as soon as it is said.
    assert_eq!(up.get("/readyz").status, 200);
    let health = up.get("/health");
    assert_eq!((health.status, &health.json()["status"]), (200, &"ok".into()));
    for node in NODES {
        let http = ("127.0.0.1", up.http_of(node));
        assert_eq!(http::get(http, "/health").unwrap().json()["node"], node);
        // Any replica can be attached to as well.
        let nbd = port_after(up.line(node), "nbd://127.0.0.1:");
        let mut client = nbd_testkit::NbdClient::connect(("127.0.0.1", nbd), "direct").unwrap();
        client.write(0, node.as_bytes()).unwrap();
    }
    let mut client = up.connect("vol1");
    assert_eq!(client.size(), 1 << 30);
    client.write(5, b"here").unwrap();
    assert_eq!(client.read(4, 6).unwrap(), b"\0here\0");
}

/// Names of the metrics on a page.
fn families(page: &str) -> BTreeSet<&str> {
    page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

// Goal: in one process, what each replica counts is its own, and all of it.
// Method: their pages, beside that of a replica with a process to itself.
#[test]
fn each_service_has_metrics_of_its_own() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &[]);
    up.connect("vol1").write(0, &[7; 4096]).unwrap();
    let page = |node| http::get(("127.0.0.1", up.http_of(node)), "/metrics").unwrap().body;
    let leader = up.leader(0);
    let mut all = BTreeSet::new();
    for node in NODES {
        let page = page(node);
        let role = i32::from(node == leader);
        assert!(page.contains(&format!("raft_role{{shard=\"0\"}} {role}")), "{node}: {page}");
        assert!(!page.contains("lb_shard_reached"), "{node}: {page}");
        let size = fs::read_dir(directory.path().join(node).join("log")).unwrap().count();
        assert!(size > 0, "{node}");
        all.extend(families(&page).into_iter().map(str::to_owned));
    }
    let balancer = up.get("/metrics").body;
    assert!(balancer.contains("lb_shard_reached{shard=\"0\"} 1"), "{balancer}");
    assert!(balancer.contains("nbd_requests_seconds_count{op=\"write\"} 1"), "{balancer}");
    assert!(!balancer.contains("raft_role"), "{balancer}");

    crate::support::build_services();
    let alone = nbd_testkit::Cluster::builder().replicas(3).start();
    alone.node().connect("vol1").unwrap().write(0, &[7; 4096]).unwrap();
    let alone = alone.node().get("/metrics").body;
    let missing: Vec<_> = families(&alone).into_iter().filter(|f| !all.contains(*f)).collect();
    assert!(missing.is_empty(), "only of a process to itself: {missing:?}");
}

#[test]
fn stops_at_either_signal_and_keeps_what_was_written() {
    let directory = TempDir::new().unwrap();
    for (round, signal) in (1..).zip([Signal::INT, Signal::TERM, Signal::INT]) {
        let up = Up::start(directory.path(), &["--size=32MiB"]);
        let mut client = up.connect("kept");
        assert_eq!(client.size(), 32 << 20);
        for earlier in 1..round {
            let content = client.read(u64::from(earlier) * 10_000, 10_000).unwrap();
            assert_eq!(content, [earlier; 10_000]);
        }
        client.write(u64::from(round) * 10_000, &[round; 10_000]).unwrap();
        // With the client still attached.
        let began = Instant::now();
        let said = up.stop(signal);
        assert!(said.contains("Stopping"), "{said:?}");
        assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    }
}

#[test]
fn what_was_copied_in_survives_kill_9() {
    require_tools!["nbdcopy"];
    let directory = TempDir::new().unwrap();
    let (image, back) = (directory.path().join("image"), directory.path().join("back"));
    let content: Vec<u8> =
        (0..16u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&image, &content).unwrap();
    let data = directory.path().join("data");
    let copy = |from: &dyn AsRef<std::ffi::OsStr>, to: &dyn AsRef<std::ffi::OsStr>| {
        let mut command = std::process::Command::new(tools::tool("nbdcopy").unwrap());
        assert!(command.arg(from).arg(to).status().unwrap().success());
    };
    let up = Up::start(&data, &["--size=16MiB"]);
    copy(&image, &up.uri("vol1"));
    up.kill_9();
    let up = Up::start(&data, &[]);
    copy(&up.uri("vol1"), &back);
    assert!(fs::read(&back).unwrap() == content, "it came back changed");
    up.stop(Signal::TERM);
}

// Goal: a replica whose data is damaged is named, and the others serve without it.
#[test]
fn a_replica_that_cannot_start_is_reported_and_the_rest_goes_on() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &[]);
    up.connect("vol1").write(0, b"kept").unwrap();
    up.stop(Signal::TERM);
    fs::write(directory.path().join("nbd-1-2/identity"), "nonsense").unwrap();
    let up = Up::start(directory.path(), &[]);
    up.wait_error("nbd-1-2: cannot open the data directory");
    assert!(up.line("nbd-1-2").contains("(has ended)"), "{}", up.welcome);
    assert_eq!(up.connect("vol1").read(0, 4).unwrap(), b"kept");
    let (status, _, errors) = up.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{errors}");
    // Without a majority there is nothing to go on with.
    fs::write(directory.path().join("nbd-1-3/identity"), "nonsense").unwrap();
    let mut command = command(directory.path(), free_port(), free_port());
    let (code, errors) = {
        let output = command.args(SMALL_LOG).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.lines().last().unwrap().starts_with("error: nbd-1-"), "{errors}");
}

// Goal: a replica whose disk fails while it runs is given up, and says so; clients notice nothing.
// Method: its log loses the directory in which the next segment would be made.
#[test]
fn a_replica_that_fails_is_reported_and_the_rest_goes_on() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--size=64MiB"]);
    let leader = up.leader(0);
    fs::remove_dir_all(directory.path().join(&leader).join("log")).unwrap();
    let mut client = up.connect("vol1");
    let failed = format!("{leader}: ");
    let mut offset = 0;
    wait_until("the failure", || {
        client.write(offset % (64 << 20), &vec![3; 1 << 20]).unwrap();
        offset += 1 << 20;
        up.errors().lines().any(|line| line.starts_with(&failed))
    });
    client.write(0, &[4; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [4; 4096]);
    assert_ne!(up.leader(0), leader);
    // Gone as if its process had ended.
    assert!(http::get(("127.0.0.1", up.http_of(&leader)), "/livez").is_err());
    let (status, _, errors) = up.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{errors}");
}

// Goal: log lines of several services in one process can be told apart.
#[test]
fn log_lines_name_the_service() {
    let directory = TempDir::new().unwrap();
    let mut command = command(directory.path(), free_port(), free_port());
    command.arg(format!("--ports={}", replica_ports())).arg("--log-format=json");
    command.args(SMALL_LOG).env("RUST_LOG", "info");
    let mut child = command.spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut lines = std::io::BufRead::lines(stdout);
    assert!(lines.any(|line| line.unwrap().contains("Stop with Ctrl-C")));
    send_signal(child.id(), Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let mut speakers = BTreeSet::new();
    for line in String::from_utf8(output.stderr).unwrap().lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        speakers
            .insert(event["threadName"].as_str().unwrap().split(':').next().unwrap().to_owned());
    }
    let expected = ["nbd-1-1", "nbd-1-2", "nbd-1-3", "nbd-control", "nbd-lb"].map(str::to_owned);
    assert_eq!(speakers, BTreeSet::from(expected));
}

// Goal: a cluster that nobody uses leaves a laptop alone.
#[test]
fn an_idle_cluster_uses_little_of_a_core() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &[]);
    let (pid, span) = (up.child.id(), Duration::from_secs(5));
    let before = cpu_time(pid);
    std::thread::sleep(span);
    let used = cpu_time(pid) - before;
    // A few percent; far less than what a thread that spins takes, on whatever machine.
    assert!(used < span / 4, "{used:?} in {span:?}");
}

// Bug: `nbdctl up | tee log` and Ctrl-C, which ends `tee` first: it panicked instead of stopping.
#[test]
fn it_stops_in_good_order_when_nobody_reads_what_it_says() {
    let directory = TempDir::new().unwrap();
    let ports = format!("--ports={}", replica_ports());
    let mut child = command(directory.path(), free_port(), free_port())
        .args(SMALL_LOG)
        .args(["--replicas=1", &ports])
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("Stop with Ctrl-C") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended before it was up");
    }
    drop((said, child.stderr.take()));
    send_signal(child.id(), Signal::INT);
    assert_eq!(wait(&mut child).code(), Some(0));
}
