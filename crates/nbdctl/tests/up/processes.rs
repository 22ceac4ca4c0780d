//! A process for each service.

use std::fs;
use std::process::{Command, Stdio};

use nbd_testkit::load::{Load, LoadOptions};
use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::seed;
use tempfile::TempDir;

use crate::support::{Up, build_services, fails_in_one_line, is_alive, wait, wait_until};

fn load(up: &Up) -> Load {
    let options =
        LoadOptions { threads: 2, region_bytes: 1 << 20, seed: seed(), ..Default::default() };
    Load::start(&[up.target()], options)
}

fn wait_for(load: &Load, answers: u64) {
    load.wait_for_answers(answers).unwrap_or_else(|failure| panic!("{failure}"));
}

fn is_ready(http: u16) -> bool {
    nbd_testkit::http::get(("127.0.0.1", http), "/readyz").is_ok_and(|page| page.status == 200)
}

// Goal: what the whole is for: kill the leader's process, and clients see no error. Then start it
// again as told, and nothing is wrong on any replica.
#[test]
fn the_leader_is_killed_while_clients_write() {
    build_services();
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--processes"]);
    let mut pids = up.pids();
    pids.push(up.child.id());
    assert!(pids.iter().all(|pid| is_alive(*pid)), "{}", up.welcome);
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 6, "{}", up.welcome);

    let load = load(&up);
    wait_for(&load, 50);
    let leader = up.leader(0);
    send_signal(up.pid(&leader), Signal::KILL);
    wait_for(&load, 100);
    let said = up.wait_error("To start it again");
    assert!(said.contains(&format!("{leader}: process {}", up.pid(&leader))), "{said}");
    assert!(said.contains("SIGKILL"), "{said}");
    assert_ne!(up.leader(0), leader);

    // Replicas may have warned of something before and after.
    let mut line = None;
    wait_until("the command", || {
        let errors = up.errors();
        let mut from = errors.lines().skip_while(|line| !line.contains("To start it again"));
        line = from.nth(1).map(|line| line.trim().to_owned());
        line.is_some()
    });
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", &format!("exec {}", line.unwrap())]).current_dir("/");
    shell.stdout(Stdio::null()).stderr(Stdio::null());
    let mut started = shell.spawn().unwrap();
    wait_until("the replica", || is_ready(up.http_of(&leader)));
    wait_for(&load, 100);
    let mut finished = load.stop().unwrap_or_else(|failure| panic!("{failure}"));
    finished.verify(&up.target()).unwrap();
    finished.check_history().unwrap();
    assert_eq!((finished.reconnects, finished.lost), (0, 0));
    send_signal(started.id(), Signal::TERM);
    assert!(wait(&mut started).success());
    let (status, said, _) = up.end(Signal::INT);
    assert_eq!(status.code(), Some(0), "{said}");
}

// Bug: once every replica had ended at some time, it took the cluster down, although those that had
// been started again by hand, as it tells how to, were serving.
#[test]
fn it_goes_on_whichever_processes_have_ended() {
    build_services();
    let directory = TempDir::new().unwrap();
    let mut up = Up::start(directory.path(), &["--processes"]);
    for service in ["nbd-1-1", "nbd-1-2", "nbd-1-3"] {
        send_signal(up.pid(service), Signal::KILL);
        up.wait_error(&format!("{service}: process"));
    }
    wait_until("a health check without a majority", || {
        let health = nbd_testkit::http::get(("127.0.0.1", up.http), "/health");
        health.is_ok_and(|page| page.status == 503)
    });
    assert!(up.child.try_wait().unwrap().is_none(), "{}", up.errors());
    let (status, _, errors) = up.end(Signal::INT);
    assert_eq!(status.code(), Some(0), "{errors}");
}

#[test]
fn a_process_that_ended_is_started_again_if_wished() {
    build_services();
    let directory = TempDir::new().unwrap();
    let mut up = Up::start(directory.path(), &["--processes", "--restart"]);
    for service in ["nbd-1-2", "load balancer"] {
        let old = up.pid(service);
        send_signal(old, Signal::KILL);
        let said = up.wait_line("runs as process");
        let name = if service == "load balancer" { "nbd-lb" } else { service };
        assert!(said.starts_with(&format!("{name} runs as process ")), "{said}");
        assert!(!is_alive(old));
    }
    wait_until("the replica", || is_ready(up.http_of("nbd-1-2")));
    wait_until("the load balancer", || is_ready(up.http));
    up.connect("vol1").write(0, b"x").unwrap();
    let (status, _, errors) = up.end(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{errors}");
    assert_eq!(errors.matches("It is started again in 1 s").count(), 2, "{errors}");
}

// Goal: no process outlives `nbdctl`, not even one that stands still.
#[test]
fn sigkill_leaves_no_process_behind() {
    build_services();
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--processes"]);
    let mut client = up.connect("vol1");
    client.write(0, b"kept").unwrap();
    let pids = up.pids();
    assert_eq!(pids.len(), 5, "{}", up.welcome);
    send_signal(up.pid("nbd-1-2"), Signal::STOP);
    up.kill_9();
    wait_until("their ends", || !pids.iter().any(|pid| is_alive(*pid)));
    let up = Up::start(directory.path(), &["--processes"]);
    assert_eq!(up.connect("vol1").read(0, 4).unwrap(), b"kept");
}

// Goal: Ctrl-C at a terminal, which signals the whole foreground group, stops all in good order,
// and one that stands still does not hold it up.
#[test]
fn ctrl_c_stops_in_good_order() {
    build_services();
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--processes"]);
    let (mut client, pids) = (up.connect("vol1"), up.pids());
    client.write(0, b"kept").unwrap();
    send_signal(up.pid("nbd-1-3"), Signal::STOP);
    let (status, said, errors) = up.end(Signal::INT);
    assert_eq!(status.code(), Some(0), "{errors}");
    assert!(said.contains("Stopping"), "{said}");
    // The last replica may say that it has lost its majority. None has failed, or was killed.
    let wrong = errors.lines().find(|line| !line.contains("WARN"));
    assert_eq!(wrong, None, "{errors}");
    assert!(!pids.iter().any(|pid| is_alive(*pid)), "{pids:?}");
    let up = Up::start(directory.path(), &["--processes"]);
    assert_eq!(up.connect("vol1").read(0, 4).unwrap(), b"kept");
}

#[test]
fn programs_that_are_missing_are_named_and_how_to_build_them() {
    let directory = TempDir::new().unwrap();
    let release = directory.path().join("release");
    fs::create_dir(&release).unwrap();
    let alone = release.join("nbdctl");
    fs::copy(env!("CARGO_BIN_EXE_nbdctl"), &alone).unwrap();
    let data = directory.path().join("data");
    let mut command = Command::new(&alone);
    command.args(["up", "--processes"]).arg(format!("--data-dir={}", data.display()));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let build = "cargo build --release --bin nbd-lb --bin nbd-control --bin nbd-replica";
    let expected = ["nbd-lb", build];
    fails_in_one_line(&mut command, 1, &expected);
    assert!(!data.exists());
}
