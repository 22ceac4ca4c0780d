//! A new load balancer in the place of a running one: whoever is attached notices nothing.

use std::io::{Read as _, Write as _};
use std::mem;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_proto::{Command as Request, ReplyStyle};
use nbd_testkit::load::{Load, LoadOptions};
use nbd_testkit::{ConnectOptions, NbdClient, Reply, list_exports, require_tools, seed};

use crate::beside::Beside;
use crate::carrying::{assert_unharmed, finish_at, term};
use crate::succession::{Place, Process};
use crate::support::{cluster, stale_but, wait_until};

/// Long enough that no test sees it pass.
const PATIENT: &str = "--drain-deadline=10m";

/// Starts a successor and waits until it has everything. Gives it.
#[track_caller]
fn replace(place: &Place, cluster: &nbd_testkit::Cluster, before: &mut Process) -> Process {
    let after = place.spawn(cluster, &[PATIENT]);
    let took = before.wait_success();
    assert!(took < Duration::from_secs(30), "{took:?}");
    after
}

/// fio, one run after the other: how long a run takes has nothing to do with how long takeovers do.
struct Fio {
    uri: String,
    run: Child,
}

impl Fio {
    const EXPORT: &str = "fio";

    fn start(uri: String) -> Self {
        Self { run: Self::spawn(&uri), uri }
    }

    /// A run: eight seconds of writing at least, then all that was written is verified.
    fn spawn(uri: &str) -> Child {
        let mut fio = Command::new("fio");
        fio.args(["--name=verified", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--size=8m"])
            .args(["--iodepth=16", "--rate_iops=250", "--verify=crc32c", "--verify_fatal=1"])
            // Unlike what the run before has left: that must not pass for what this one writes.
            .args(["--verify_state_save=0", "--randrepeat=0"])
            .arg(format!("--uri={uri}"));
        fio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until a run is attached and at work: the next, if one has ended, which it must have
    /// done well.
    fn wait_attached(&mut self, place: &Place) {
        wait_until("fio to be attached", || {
            // More than a connection brings that only asks for the size.
            let works = received_bytes(place, Self::EXPORT).is_some_and(|bytes| bytes >= 4096);
            if self.run.try_wait().unwrap().is_none() {
                return works;
            }
            // What is listed behind this is the next run's.
            wait_until("a run of fio to be gone", || received_bytes(place, Self::EXPORT).is_none());
            assert_verified(mem::replace(&mut self.run, Self::spawn(&self.uri)));
            false
        });
    }

    fn finish(self) {
        assert_verified(self.run);
    }
}

/// The run ends without an error, and all that it wrote was there.
fn assert_verified(run: Child) {
    let ended = run.wait_with_output().unwrap();
    let told = [ended.stdout, ended.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(ended.status.success() && told.contains("err= 0"), "{told}");
}

/// Bytes that came from the client of this volume. `None`: there is no such client.
fn received_bytes(place: &Place, export: &str) -> Option<u64> {
    let listed = place.get("/sessions")?.json();
    let mut sessions = listed["sessions"].as_array().unwrap().iter();
    let session = sessions.find(|session| session["export"] == export)?;
    session["received_bytes"].as_u64()
}

// Goal: six takeovers in a row cost no client an error, a disconnect or a wrong byte, and no
// connection is refused.
// Method: a load that checks everything, other people's clients that verify, one that idles, and
// others that come and go all the time, over NBD and over HTTP.
#[test]
fn nobody_notices_takeovers() {
    require_tools!["fio", "qemu-io"];
    let mut cluster = cluster();
    let before = term(&cluster);
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let options =
        LoadOptions { threads: 2, region_bytes: 1 << 20, seed: seed(), ..Default::default() };
    let load = Load::start(&[place.target()], options);
    let mut idle = place.connect("idle");
    idle.write(0, &[9; 512]).unwrap();
    let address = place.target().address();
    let http = ("127.0.0.1", place.http);
    let attaching = Beside::start(move || {
        let mut client = NbdClient::connect(address, "visited").unwrap();
        client.write(0, &[3; 512]).unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [3; 512]);
    });
    let listing = Beside::start(move || {
        assert!(list_exports(address).unwrap().len() >= 2);
        thread::sleep(Duration::from_millis(5));
    });
    let probing = Beside::start(move || {
        let live = nbd_testkit::http::get(http, "/livez").unwrap();
        assert_eq!(live.status, 200);
        thread::sleep(Duration::from_millis(2));
    });
    let uri = |export: &str| format!("nbd://127.0.0.1:{}/{export}", place.nbd);
    let mut fio = Fio::start(uri(Fio::EXPORT));
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "raw"]).arg(uri("qemu"));
    let mut qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut tell = |commands: &str| qemu.stdin.as_mut().unwrap().write_all(commands.as_bytes());
    wait_until("the load, fio and qemu-io to be attached", || {
        load.answers().iter().all(|answers| *answers > 50)
            && ["fio", "qemu"]
                .iter()
                .all(|export| list_exports(address).unwrap().iter().any(|listed| listed == export))
    });

    for takeover in 1..=6 {
        tell(&format!("write -P {takeover} {takeover}M 1M\n")).unwrap();
        fio.wait_attached(&place);
        let after = replace(&place, &cluster, &mut balancer);
        let log = balancer.log();
        assert!(log.contains("handed over what could be"), "{log}");
        balancer = after;
        load.wait_for_answers(100).unwrap_or_else(|failure| panic!("{failure}"));
        tell(&format!("read -P {takeover} {takeover}M 1M\n")).unwrap();
    }

    assert_eq!(idle.read(0, 512).unwrap(), [9; 512]);
    assert!(attaching.stop() > 20);
    assert!(listing.stop() > 20);
    assert!(probing.stop() > 100);
    tell("quit\n").unwrap();
    let told = qemu.wait_with_output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert_eq!(told.matches("read 1048576/1048576").count(), 6, "{told}");
    assert!(!told.contains("failed") && !told.contains("rror"), "{told}");
    fio.finish();
    let finished = finish_at(load, &mut cluster, &place.target());
    assert_unharmed(&finished, 0, term(&cluster) - before);
}

// Goal: a successor that dies before it is ready has changed nothing.
#[test]
fn a_successor_that_dies_midway_leaves_the_running_one_as_it_was() {
    let mut cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    client.write(0, &[1; 4096]).unwrap();
    // One that finds no leader gets the listening sockets, and then waits for a while.
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale.toml");
    std::fs::write(&stale, stale_but(&mut cluster, usize::MAX)).unwrap();
    for round in 1..=2 {
        let mut successor = place.spawn_with(&stale, &[]);
        wait_until("a successor to be expected", || {
            balancer.log().matches("prepares to take over").count() == round
        });
        successor.kill_9();
        balancer.wait_log("it left before it was ready");
        client.write(4096, &[2; 4096]).unwrap();
        place.connect("v").write(8192, &[3; 4096]).unwrap();
        assert_eq!(place.get("/readyz").unwrap().status, 200);
    }
    let _after = replace(&place, &cluster, &mut balancer);
    assert_eq!(client.read(4096, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_session_without_a_majority_is_handed_over_once_there_is_one() {
    let mut cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    client.write(0, &[1; 4096]).unwrap();
    for follower in cluster.followers() {
        cluster.at_mut(follower).kill_9();
    }
    let writer = thread::spawn(move || {
        client.write(0, &[2; 4096]).unwrap();
        client
    });
    let mut after = place.spawn(&cluster, &[PATIENT]);
    // It has waited for leaders in vain by then, and takes over all the same.
    after.wait_log("started");
    balancer.wait_log("draining");
    thread::sleep(Duration::from_secs(3));
    assert!(!writer.is_finished(), "one of three answered a write");
    assert_eq!(balancer.ended(), None, "{}", balancer.log());
    for place in 0..3 {
        if !cluster.at_mut(place).is_running() {
            cluster.at_mut(place).spawn();
        }
    }
    let mut client = writer.join().unwrap();
    balancer.wait_success();
    assert_eq!(client.read(0, 4096).unwrap(), [2; 4096]);
    client.write(0, &[3; 4096]).unwrap();
}

// Goal: what a client has sent in part is neither lost nor read twice, in any style of requests.
// Method: of two clients, one has sent a part of a header when another process takes over, the
// other a part of a payload, which is waited for.
#[test]
fn half_a_header_goes_along_and_half_a_payload_is_waited_for() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let styles = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
    for ((replies, reply_bytes), byte) in styles.into_iter().zip([16, 20, 32]).zip(1..) {
        let options = ConnectOptions {
            export: "v".to_owned(),
            replies,
            allocation_context: replies != ReplyStyle::Simple,
            ..ConnectOptions::default()
        };
        let connect = || NbdClient::connect_with(place.target().address(), &options).unwrap();
        let [mut header, mut payload, mut reader] = [(); 3].map(|()| connect());
        assert_eq!(header.attached().replies, replies);
        let request = |offset| {
            let mut bytes = BytesMut::new();
            let write = Request::Write { offset, len: 512 };
            nbd_proto::encode_request(&mut bytes, replies, 77, &write, false).unwrap();
            bytes.extend_from_slice(&[byte; 512]);
            bytes
        };
        let (one, other) = (request(0), request(4096));
        let (half_header, rest_of_header) = one.split_at(11);
        let (half_payload, rest_of_payload) = other.split_at(200);
        header.stream().write_all(half_header).unwrap();
        payload.stream().write_all(half_payload).unwrap();
        // Both have arrived once something behind them was answered.
        reader.read(0, 512).unwrap();

        let after = place.spawn(&cluster, &[PATIENT]);
        balancer.wait_log("another load balancer has taken over");
        thread::sleep(Duration::from_millis(500));
        assert_eq!(balancer.ended(), None, "{}", balancer.log());
        payload.stream().write_all(rest_of_payload).unwrap();
        balancer.wait_success();
        balancer = after;
        header.stream().write_all(rest_of_header).unwrap();
        let mut reply = vec![0; reply_bytes];
        header.stream().read_exact(&mut reply).unwrap();
        payload.stream().read_exact(&mut reply).unwrap();
        for offset in [0, 4096] {
            assert_eq!(reader.read(offset, 512).unwrap(), [byte; 512], "{replies:?}");
        }
        // What it was promised holds, its context too.
        let extents = reader.block_status(0, 4096);
        assert_eq!(extents.is_ok(), replies != ReplyStyle::Simple, "{extents:?}");
    }
}

#[test]
fn many_requests_under_way_are_all_answered_once() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    let mut at = 0_u64;
    let mut takeovers = 0;
    let mut successor: Option<Process> = None;
    let began = Instant::now();
    while takeovers < 5 {
        assert!(began.elapsed() < Duration::from_secs(120));
        while client.in_flight() < 64 {
            let offset = at % 4096 * 4096;
            at += 1;
            if at.is_multiple_of(3) {
                let read = Request::Read { offset, len: 4096, dont_fragment: false };
                client.send(&read, &[]).unwrap();
            } else {
                client.send(&Request::Write { offset, len: 4096 }, &[1; 4096]).unwrap();
            }
        }
        // A cookie answered twice, or never asked with, fails this.
        let (_, outcome) = client.receive().unwrap();
        assert!(matches!(outcome.unwrap(), Reply::Done | Reply::Data(_)));
        if successor.is_none() {
            successor = Some(place.spawn(&cluster, &[PATIENT]));
        }
        if let Some(status) = balancer.ended() {
            assert!(status.success());
            balancer = successor.take().unwrap();
            takeovers += 1;
        }
    }
    while client.in_flight() > 0 {
        client.receive().unwrap().1.unwrap();
    }
}

// Goal: a failover in the middle of a takeover costs a pause, and no more.
// Method: the leader dies as a successor starts; clients come to a point where they can be handed
// over only once there is another.
#[test]
fn a_takeover_and_a_failover_at_the_same_time() {
    let mut cluster = cluster();
    let before = term(&cluster);
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let options =
        LoadOptions { threads: 2, region_bytes: 1 << 20, seed: seed(), ..Default::default() };
    let load = Load::start(&[place.target()], options);
    load.wait_for_answers(50).unwrap_or_else(|failure| panic!("{failure}"));
    for round in 0..4 {
        let leader = cluster.wait_leader();
        let mut after = place.spawn(&cluster, &[PATIENT]);
        if round % 2 == 0 {
            cluster.at_mut(leader).kill_9();
        } else {
            cluster.at_mut(leader).pause();
        }
        balancer.wait_success();
        load.wait_for_answers(100).unwrap_or_else(|failure| panic!("{failure}"));
        if round % 2 == 0 {
            cluster.at_mut(leader).start();
        } else {
            cluster.at_mut(leader).resume();
        }
        cluster.wait_until_serving();
        assert_eq!(after.ended(), None, "{}", after.log());
        balancer = after;
    }
    let finished = finish_at(load, &mut cluster, &place.target());
    assert_unharmed(&finished, 4, term(&cluster) - before);
}

// Goal: clients that are many are handed over a few at a time, and soon.
#[test]
fn hundreds_of_idle_clients_go_along() {
    const CLIENTS: u32 = 400;
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| place.connect("v")).collect();
    let after = replace(&place, &cluster, &mut balancer);
    assert!(balancer.log().contains(&format!("handed={CLIENTS}")), "{}", balancer.log());
    assert_eq!(place.metric("nbd_connections"), Some(f64::from(CLIENTS)));
    for (client, number) in clients.iter_mut().zip(0..) {
        client.write(number * 512, &[1; 512]).unwrap();
    }
    drop(clients);
    drop(after);
}

// Goal: a client that connected before a takeover and finishes its handshake after it is served by
// the process it is connected to, and handed over from there.
#[test]
fn a_client_in_the_middle_of_its_handshake_is_not_forgotten() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = TcpStream::connect(place.target().address()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    let _after = place.spawn(&cluster, &[PATIENT]);
    balancer.wait_log("another load balancer has taken over");
    // Fixed newstyle without zeroes; NBD_OPT_EXPORT_NAME of "v".
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x01v");
    client.write_all(&hello).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    let mut read = BytesMut::new();
    let command = Request::Read { offset: 0, len: 512, dont_fragment: false };
    nbd_proto::encode_request(&mut read, ReplyStyle::Simple, 1, &command, false).unwrap();
    client.write_all(&read).unwrap();
    client.read_exact(&mut [0; 16 + 512]).unwrap();
    balancer.wait_success();
    client.write_all(&read).unwrap();
    client.read_exact(&mut [0; 16 + 512]).unwrap();
}
