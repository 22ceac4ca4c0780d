//! Clients whose bytes are moved within the kernel: they attach anew when their replica is lost.

use std::net::Shutdown;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{ClientGoal, Command as Request, ReplyStyle};
use nbd_testkit::{
    ClientError, Cluster, ConnectOptions, NbdClient, Reply, list_exports, read_some, require_tools,
};

use crate::process::Process;
use crate::support::{Balancer, cluster, start, toml, wait_until};

const SPLICE: &[&str] = &["--mode=splice"];

/// Time for a client to learn that its replica is gone. Far more than it takes.
const NOTICE_MAX: Duration = Duration::from_secs(2);

/// Pipes that a load balancer keeps for the next who needs one have two descriptors each.
const PIPE_DESCRIPTORS_MAX: usize = 2 * 64;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn backend_node(balancer: &Balancer) -> String {
    let listed = balancer.get("/sessions").json();
    listed["sessions"][0]["backend"]["node"].as_str().unwrap().to_owned()
}

#[test]
fn other_peoples_clients_are_served() {
    require_tools!["nbdinfo", "nbdcopy", "fio"];
    let cluster = cluster();
    let balancer = Process::start(&cluster, SPLICE);
    let uri = balancer.uri("copied");
    let directory = tempfile::tempdir().unwrap();
    let (image, back) = (directory.path().join("image"), directory.path().join("back"));
    let bytes: Vec<u8> =
        (0..32_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    run(Command::new("nbdcopy").arg(&image).arg(&uri));
    let told = run(Command::new("nbdinfo").arg(&uri));
    assert!(told.contains("can_multi_conn: true") && told.contains("base:allocation"), "{told}");
    let listed = run(Command::new("nbdinfo").arg("--list").arg(balancer.uri("")));
    assert!(listed.contains("export=\"copied\""), "{listed}");
    run(Command::new("nbdcopy").arg(&uri).arg(&back));
    assert!(std::fs::read(&back).unwrap()[..bytes.len()] == bytes);
    // Every block with a checksum in it, written in any order and read again.
    let fio = [
        "--name=verify",
        "--ioengine=nbd",
        "--iodepth=16",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--blockalign=512",
        "--size=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    let uri = format!("--uri={}", balancer.uri("checked"));
    run(Command::new("fio").current_dir(&directory).args(fio).arg(uri));
    // All that went through was counted, and by nobody twice.
    let received = balancer.metric("nbd_received_bytes_total{shard=\"0\"}");
    assert!(received > f64::from(48 << 20) && received < f64::from(60 << 20), "{received}");
    assert!(balancer.metric("nbd_sent_bytes_total{shard=\"0\"}") > f64::from(40 << 20));
}

#[test]
fn clients_old_and_new_get_what_they_agreed_on() {
    let cluster = cluster();
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    let styles = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
    for goal in [ClientGoal::Go, ClientGoal::ExportName] {
        for (replies, context) in styles.into_iter().flat_map(|r| [(r, false), (r, true)]) {
            let options = ConnectOptions {
                export: "v".to_owned(),
                replies,
                goal,
                allocation_context: context,
                ..ConnectOptions::default()
            };
            let direct = &cluster.at(cluster.wait_leader()).target();
            let mut direct = NbdClient::connect_with(direct.address(), &options).unwrap();
            let mut client =
                NbdClient::connect_with(balancer.target().address(), &options).unwrap();
            let agreed = client.attached().clone();
            assert_eq!(agreed, *direct.attached(), "{options:?}");
            let data = vec![7; 70_000];
            client.write(512, &data).unwrap();
            assert_eq!(direct.read(512, data.len()).unwrap(), data);
            assert_eq!(client.read(512, data.len()).unwrap(), data);
            if agreed.allocation_context.is_some() {
                assert!(!client.block_status(0, 1 << 20).unwrap().is_empty());
            }
            client.trim(0, 1 << 20).unwrap();
            client.flush().unwrap();
            client.disconnect().unwrap();
        }
    }
}

#[test]
fn a_client_that_has_said_all_gets_every_answer() {
    let cluster = cluster();
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    let outstanding = |client: &mut NbdClient| {
        for place in 0..32 {
            let write = Request::Write { offset: place << 16, len: 1 << 16 };
            client.send(&write, &vec![u8::try_from(place).unwrap(); 1 << 16]).unwrap();
        }
    };
    let mut client = balancer.connect("v");
    outstanding(&mut client);
    let answers = client.disconnect().unwrap();
    assert!(answers.len() == 32 && answers.iter().all(|(_, answer)| answer.is_ok()));
    // The same of one that ends its direction and does not say so.
    let mut client = balancer.connect("v");
    outstanding(&mut client);
    client.stream().shutdown(Shutdown::Write).unwrap();
    for _ in 0..32 {
        assert_eq!(client.receive().unwrap().1.unwrap(), Reply::Done);
    }
    assert_eq!(read_some(client.stream(), &mut [0; 16]).unwrap(), 0, "and then the end");
    wait_until("both to be gone", || balancer.get("/sessions").json()["total"] == 0);
}

#[test]
fn what_is_listed_and_described_is_as_ever() {
    let cluster = start(Cluster::builder().auto_create(false));
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    assert_eq!(list_exports(balancer.target().address()).unwrap(), [""; 0]);
    let error = NbdClient::connect(balancer.target().address(), "nobody's").unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
}

// Goal: a client whose replica dies is told at once, and finds its data when it attaches anew.
#[test]
fn a_lost_replica_is_a_lost_connection() {
    let mut cluster = cluster();
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    for _ in 0..2 {
        let leader = cluster.wait_leader();
        balancer.wait_leader(cluster.at(leader));
        let (mut busy, mut idle) = (balancer.connect("v"), balancer.connect("v"));
        busy.write(0, &[7; 4096]).unwrap();
        assert_eq!(backend_node(&balancer), cluster.at(leader).name());
        cluster.at_mut(leader).kill_9();
        let killed = Instant::now();
        busy.read(0, 4096).unwrap_err();
        let ended = read_some(idle.stream(), &mut [0; 16]);
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        assert!(killed.elapsed() < NOTICE_MAX, "{:?}", killed.elapsed());
        let mut again = balancer.connect("v");
        assert_eq!(again.read(0, 4096).unwrap(), [7; 4096]);
        drop((busy, idle, again));
        cluster.at_mut(leader).start();
        cluster.wait_until_serving();
        wait_until("all to be gone", || balancer.get("/sessions").json()["total"] == 0);
    }
}

// Goal: a client stays where it is when another replica leads: its own carries requests there.
// Method: the leader, which it is attached to, stands still until it does not lead any more.
#[test]
fn a_session_stays_with_a_replica_that_does_not_lead_any_more() {
    let mut cluster = cluster();
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    let leader = cluster.wait_leader();
    balancer.wait_leader(cluster.at(leader));
    let mut client = balancer.connect("v");
    client.write(0, &[1; 4096]).unwrap();
    cluster.at_mut(leader).pause();
    balancer.wait_reached_elsewhere(crate::support::SHARD, cluster.at(leader).name());
    cluster.at_mut(leader).resume();
    client.write(4096, &[2; 4096]).unwrap();
    assert_eq!(client.read(0, 8192).unwrap(), [[1; 4096], [2; 4096]].concat());
    assert_eq!(backend_node(&balancer), cluster.at(leader).name());
    // One that comes now is attached to the one that leads.
    drop(client);
    wait_until("the first to be gone", || balancer.get("/sessions").json()["total"] == 0);
    let leads = cluster.wait_leader();
    balancer.wait_leader(cluster.at(leads));
    let _next = balancer.connect("v");
    assert_eq!(backend_node(&balancer), cluster.at(leads).name());
}

// Goal: NBD addresses that are stale cost nothing, where nodes say themselves where they are.
#[test]
fn a_replica_is_found_where_it_says_it_is() {
    let mut cluster = cluster();
    let mut text = toml(&cluster);
    // Nobody listens there: privileged, and of no service in use.
    let mut nowhere = 2..;
    for node in cluster.nodes() {
        let (host, port) = node.nbd_address();
        let old = format!("nbd = \"{host}:{port}\"");
        assert!(text.contains(&old), "{text}");
        text = text.replace(&old, &format!("nbd = \"{host}:{}\"", nowhere.next().unwrap()));
    }
    let balancer = Balancer::with(&text, SPLICE);
    let mut client = balancer.connect("v");
    client.write(0, &[3; 4096]).unwrap();
    let listed = balancer.get("/sessions").json();
    let session = &listed["sessions"][0];
    let (host, port) = cluster.at(cluster.wait_leader()).nbd_address();
    assert_eq!(session["backend"]["address"], format!("{host}:{port}"));
    assert_eq!((&session["mode"], session["session"].is_null()), (&"splice".into(), true));
}

#[test]
fn a_stop_answers_what_was_received() {
    let cluster = cluster();
    let balancer = Balancer::with(&toml(&cluster), SPLICE);
    let mut client = balancer.connect("v");
    let idle = balancer.connect("v");
    for place in 0..16 {
        client.send(&Request::Write { offset: place << 12, len: 4096 }, &[5; 4096]).unwrap();
    }
    // So that all of them are with the replica.
    client.receive().unwrap().1.unwrap();
    let began = Instant::now();
    balancer.stop();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    for _ in 1..16 {
        client.receive().unwrap().1.unwrap();
    }
    assert!(matches!(client.receive(), Err(ClientError::Closed)));
    drop(idle);
}

/// All of them read what is theirs at the same time, and before that write it if they are to.
fn use_at_once(clients: &mut [NbdClient], round: u8, write: bool) {
    thread::scope(|scope| {
        for (client, number) in clients.iter_mut().zip(0_u8..) {
            scope.spawn(move || {
                let (offset, bytes) = (u64::from(number) * 65_536, [number ^ round; 65_536]);
                if write {
                    client.write(offset, &bytes).unwrap();
                }
                assert!(client.read(offset, 65_536).unwrap() == bytes);
            });
        }
    });
}

// Goal: many clients at a time get their own bytes, and leave nothing behind.
// Method: they attach a few at a time, for a replica has two seconds to agree with each. Once all
// are attached they write and read at the same time.
#[test]
fn two_hundred_clients_leave_nothing_open() {
    const CLIENTS: usize = 200;
    const ATTACHING: usize = 16;
    let cluster = cluster();
    let balancer = Process::start(&cluster, SPLICE);
    drop(balancer.connect("v"));
    wait_until("nobody", || balancer.get("/sessions").json()["total"] == 0);
    let before = balancer.descriptors();
    for round in 0..2_u8 {
        let attach = |first: usize| -> Vec<NbdClient> {
            (first..CLIENTS).step_by(ATTACHING).map(|_| balancer.connect("v")).collect()
        };
        let mut clients: Vec<NbdClient> = thread::scope(|scope| {
            let threads = (0..ATTACHING).map(|first| scope.spawn(move || attach(first)));
            let threads: Vec<_> = threads.collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        use_at_once(&mut clients, round, true);
        let listed = balancer.get("/sessions").json();
        assert_eq!(listed["total"], CLIENTS);
        assert_eq!(balancer.metric("nbd_sessions{shard=\"0\"}"), 200.0);
        // Two sockets each, and no pipe of its own for one that is idle.
        let open = balancer.descriptors();
        let most = before + 2 * CLIENTS + PIPE_DESCRIPTORS_MAX + 8;
        assert!((before + 2 * CLIENTS..=most).contains(&open), "{before}, now {open}");
        use_at_once(&mut clients, round, false);
        drop(clients);
        wait_until("nobody", || balancer.get("/sessions").json()["total"] == 0);
        let after = balancer.descriptors();
        assert!(after <= before + PIPE_DESCRIPTORS_MAX + 8, "{before}, then {after}");
    }
    assert!(balancer.terminate().success());
}
