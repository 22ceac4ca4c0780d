//! One node from its first start to its last: probes, stopping, starting again, refusing to start,
//! a crash under load, a full disk.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

#[path = "lifecycle/load.rs"]
mod load;
#[path = "lifecycle/mount.rs"]
mod mount;
#[path = "lifecycle/run.rs"]
mod run;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_proto::constants::option_reply;
use nbd_proto::option::InfoRequests;
use nbd_proto::{
    ClientEvent, ClientGoal, ClientHandshake, ClientWish, Command, ExportName, NbdError,
    RemoteExport, ReplyStyle, encode_request,
};
use nbd_testkit::process::Signal;
use nbd_testkit::{
    ClientError, Cluster, ConnectOptions, NbdClient, NodeProcess, http, list_exports, read_some,
    tools,
};
use serde_json::Value;

use self::load::{Load, acknowledged_bytes, verify};
use self::mount::SmallDisk;
use self::run::Run;

const MIB: u64 = 1 << 20;

#[test]
fn probes_answer() {
    let mut cluster = Cluster::start();
    let node = cluster.node();
    let (live, ready) = (node.get("/livez"), node.get("/readyz"));
    assert_eq!((live.status, live.body.trim()), (200, "ok"));
    assert_eq!((ready.status, ready.body.trim()), (200, "ready"));
    assert_eq!(node.get("/nothing").status, 404);
    // Not ready any more once it stops, alive until it is gone.
    let idle_http = TcpStream::connect(node.http_address()).unwrap();
    assert!(cluster.node_mut().terminate().success());
    drop(idle_http);
    assert!(http::get(cluster.node().http_address(), "/livez").is_err());
}

#[test]
fn metrics_count_what_happened() {
    let cluster = Cluster::builder().argument("--checkpoint-log-bytes=1MiB").start();
    let node = cluster.node();
    let mut client = node.connect("counted").unwrap();
    for number in 0..50 {
        client.write(number * 65_536, &[1; 65_536]).unwrap();
    }
    for number in 0..20 {
        client.read(number * 4096, 4096).unwrap();
    }
    client.trim(0, MIB).unwrap();
    client.write_zeroes(32 * MIB, 5 * MIB, false).unwrap();
    assert!(client.read(client.size(), 1).is_err());
    let value = |series: &str| node.metric(series);
    let count = |op: &str| value(&format!("nbd_requests_seconds_count{{op=\"{op}\"}}"));
    let bytes = |op: &str| value(&format!("nbd_request_bytes_total{{op=\"{op}\"}}"));
    assert_eq!((count("write"), bytes("write")), (Some(50.0), Some(50.0 * 65_536.0)));
    assert_eq!((count("read"), bytes("read")), (Some(20.0), Some(20.0 * 4096.0)));
    assert_eq!((count("trim"), bytes("trim")), (Some(1.0), Some(1_048_576.0)));
    assert_eq!((count("write_zeroes"), bytes("write_zeroes")), (Some(1.0), Some(5_242_880.0)));
    assert_eq!(value("nbd_connections"), Some(1.0));
    assert_eq!(value("nbd_connections_refused_total"), Some(0.0));
    assert_eq!(value("nbd_requests_refused_total"), Some(1.0));
    assert_eq!(value("nbd_requests_failed_total"), Some(0.0));
    assert_eq!(value("store_corrupt_reads_total"), Some(0.0));
    assert_eq!(value("raft_role{shard=\"0\"}"), Some(1.0));
    let positive = [
        "raft_term{shard=\"0\"}",
        "raft_committed{shard=\"0\"}",
        "raft_applied{shard=\"0\"}",
        "raft_commit_seconds_count{shard=\"0\"}",
        "log_append_seconds_count",
        "log_write_seconds_count",
        "log_write_jobs_count",
    ];
    for series in positive {
        assert!(value(series) > Some(0.0), "{series} is {:?}", value(series));
    }
    assert!(value("log_write_bytes_total") >= Some(50.0 * 65_536.0));
    // Checkpoints come when their time has.
    let began = Instant::now();
    while value("checkpoint_seconds_count") < Some(1.0) {
        assert!(began.elapsed() < Duration::from_secs(10), "no checkpoint");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(value("checkpoint_bytes_total") > Some(0.0));
    assert_eq!(value("log_max_bytes"), Some(1_073_741_824.0));
    assert!(value("log_live_bytes") > Some(0.0));
    assert!(value("store_available_bytes") > Some(0.0));
}

#[test]
fn every_command_is_counted() {
    let cluster = Cluster::start();
    let mut client = cluster.node().connect("counted").unwrap();
    let (offset, len) = (0, 4096);
    let commands = [
        ("read", Command::Read { offset, len, dont_fragment: false }),
        ("flush", Command::Flush),
        ("trim", Command::Trim { offset, len }),
        ("cache", Command::Cache { offset, len }),
        ("write_zeroes", Command::WriteZeroes { offset, len, no_hole: true }),
        ("block_status", Command::BlockStatus { offset, len, req_one: true }),
    ];
    for (op, command) in commands {
        client.send(&command, &[]).unwrap();
        client.receive().unwrap().1.unwrap();
        let series = format!("nbd_requests_seconds_count{{op=\"{op}\"}}");
        assert_eq!(cluster.node().metric(&series), Some(1.0), "{op}");
    }
}

/// The answer to `/health`, which must be that all is well, in exactly the documented shape.
fn health(node: &NodeProcess) -> Value {
    let answer = node.get("/health");
    assert_eq!(answer.status, 200, "{answer:?}");
    let json = answer.json();
    let keys = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&json), ["node", "shards", "status"], "{json}");
    assert_eq!((&json["status"], &json["node"]), (&"ok".into(), &"nbd-1-1".into()), "{json}");
    for (number, shard) in json["shards"].as_array().unwrap().iter().enumerate() {
        let expected = "applied committed counter elapsed_ms leader replica role shard term";
        assert_eq!(keys(shard).join(" "), expected, "{json}");
        assert_eq!(shard["shard"], number, "{json}");
        assert_eq!((&shard["role"], &shard["leader"]), (&"leader".into(), &"nbd-1-1".into()));
        assert!(shard["term"].as_u64().unwrap() >= 1, "{json}");
        let (committed, applied) = (&shard["committed"], &shard["applied"]);
        assert!(applied.as_u64().unwrap() >= 1, "{json}");
        assert!(committed.as_u64() >= applied.as_u64(), "{json}");
        let elapsed_ms = shard["elapsed_ms"].as_f64().unwrap();
        assert!((0.0..20_000.0).contains(&elapsed_ms), "{json}");
    }
    json
}

fn counter(json: &Value, shard: usize) -> i64 {
    json["shards"][shard]["counter"].as_i64().unwrap()
}

fn committed(json: &Value) -> u64 {
    json["shards"][0]["committed"].as_u64().unwrap()
}

/// For tests of what `/health` does: that a busy disk makes it fail in time is another's matter.
const PATIENT_HEALTH: &str = "--health-deadline=20s";

/// Longer than a result of `/health` is shared.
const UNSHARED: Duration = Duration::from_millis(150);

#[test]
fn health_moves_the_counter_of_every_shard() {
    let three: &[&[&str]] = &[&["nbd-1-1"], &["nbd-1-1"], &["nbd-1-1"]];
    let mut cluster = Cluster::builder().shards(three).argument(PATIENT_HEALTH).start();
    let mut last = health(cluster.node());
    assert_eq!(last["shards"].as_array().unwrap().len(), 3);
    for round in 0..8 {
        // The counter is replicated state: it goes on after a stop and after a crash.
        match round {
            3 => cluster.node_mut().restart(),
            6 => {
                cluster.node_mut().kill_9();
                cluster.node_mut().start();
            }
            _ => thread::sleep(UNSHARED),
        }
        let now = health(cluster.node());
        for shard in 0..3 {
            let moved = counter(&now, shard) - counter(&last, shard);
            assert_eq!(moved.abs(), 1, "shard {shard}: {last} then {now}");
        }
        assert!(committed(&now) > committed(&last), "{last} then {now}");
        last = now;
    }
}

#[test]
fn a_storm_of_health_checks_is_no_load() {
    let cluster = Cluster::builder().argument(PATIENT_HEALTH).start();
    let node = cluster.node();
    let before = committed(&health(node));
    thread::sleep(UNSHARED);
    let began = Instant::now();
    thread::scope(|scope| (0..200).for_each(|_| drop(scope.spawn(|| health(node)))));
    let elapsed = began.elapsed();
    thread::sleep(UNSHARED);
    let proposals = committed(&health(node)) - before;
    // One for each window of 100 ms that the storm touched, and the last probe's own.
    let windows = u64::try_from(elapsed.as_millis()).unwrap() / 100 + 1;
    println!("200 calls in {elapsed:?} cost {proposals} proposals");
    assert!(proposals <= windows + 2, "{proposals} proposals in {elapsed:?}");
    assert!(proposals < 100, "{proposals} proposals");
}

#[test]
fn sigterm_under_load_loses_nothing() {
    let mut cluster = Cluster::start();
    let load = Load::start(cluster.node(), "loaded", 4, 512, 4096);
    thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let status = cluster.node_mut().terminate();
    let stopping = began.elapsed();
    assert_eq!(status.code(), Some(0));
    assert!(stopping < Duration::from_secs(5), "stopping took {stopping:?}");
    let written = load.stop();
    let acknowledged = acknowledged_bytes(&written);
    assert!(acknowledged > MIB, "only {acknowledged} bytes were acknowledged");
    let began = Instant::now();
    cluster.node_mut().start();
    let starting = began.elapsed();
    println!("stopped in {stopping:?} after {acknowledged} bytes, started in {starting:?}");
    assert!(starting < Duration::from_secs(5), "starting took {starting:?}");
    verify(cluster.node(), "loaded", &written);
}

/// A client that asks for nothing beyond what NBD began with.
fn connect_simply(node: &NodeProcess, export: &str) -> NbdClient {
    let options = ConnectOptions {
        export: export.to_owned(),
        replies: ReplyStyle::Simple,
        allocation_context: false,
        ..ConnectOptions::default()
    };
    NbdClient::connect_with(node.nbd_address(), &options).unwrap()
}

#[test]
fn requests_received_before_sigterm_are_answered() {
    let mut cluster = Cluster::start();
    let mut client = connect_simply(cluster.node(), "answered");
    // One segment, which the server reads whole before it answers any of it.
    let mut requests = BytesMut::new();
    for number in 0..8 {
        let write = Command::Write { offset: number * 4096, len: 4096 };
        encode_request(&mut requests, ReplyStyle::Simple, number, &write, false).unwrap();
        requests.extend_from_slice(&[9; 4096]);
    }
    client.stream().write_all(&requests).unwrap();
    let mut success = || {
        let mut reply = [0; 16];
        client.stream().read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "an error");
    };
    success();
    cluster.node().signal(Signal::TERM);
    (1..8).for_each(|_| success());
    assert_eq!(read_some(client.stream(), &mut [0; 16]).unwrap(), 0, "more than the replies");
    assert_eq!(cluster.node_mut().wait_exit().code(), Some(0));
    cluster.node_mut().start();
    let mut client = cluster.node().connect("answered").unwrap();
    assert_eq!(client.read(0, 8 * 4096).unwrap(), [9; 8 * 4096]);
}

/// Clients that do nothing: attached, silent, in the middle of an option, half closed, in the
/// middle of a payload; and one of HTTP in the middle of its request.
fn idlers(node: &NodeProcess) -> (Vec<NbdClient>, Vec<TcpStream>) {
    let mut attached: Vec<_> = (0..10).map(|_| node.connect("idle").unwrap()).collect();
    let mut out = BytesMut::new();
    let write = Command::Write { offset: 0, len: MIB };
    encode_request(&mut out, ReplyStyle::Extended, 1, &write, false).unwrap();
    out.resize(500_000, 0xee);
    attached[0].stream().write_all(&out).unwrap();
    let connect = |(number, bytes): (usize, &[u8])| {
        let address = if number == 0 { node.http_address() } else { node.nbd_address() };
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let beginnings: [&[u8]; 4] = [b"GET /live", b"", b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0"];
    let streams: Vec<_> = beginnings.into_iter().enumerate().map(connect).collect();
    // Not only connected but looked at by the server.
    for stream in &streams[1..] {
        let mut stream = stream.try_clone().unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
    }
    (attached, streams)
}

#[test]
fn sigterm_does_not_wait_for_idle_clients() {
    let mut cluster = Cluster::start();
    let mut writer = cluster.node().connect("idle").unwrap();
    writer.write(0, &[5; 4096]).unwrap();
    let (attached, mut streams) = idlers(cluster.node());
    // The one of HTTP may be waited for, until the deadline: see the next test.
    streams.remove(0);
    let began = Instant::now();
    assert_eq!(cluster.node_mut().terminate().code(), Some(0));
    let stopping = began.elapsed();
    assert!(stopping < Duration::from_secs(4), "stopping took {stopping:?}");
    drop((attached, streams, writer));
    cluster.node_mut().start();
    let mut client = cluster.node().connect("idle").unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [5; 4096]);
}

#[test]
fn sigterm_waits_for_stubborn_clients_until_the_deadline() {
    let mut cluster = Cluster::builder().argument("--shutdown-deadline=2s").start();
    let mut writer = cluster.node().connect("idle").unwrap();
    writer.write(0, &[5; 4096]).unwrap();
    let idlers = idlers(cluster.node());
    // Replies that nobody reads, more than sockets hold.
    let mut deaf = connect_simply(cluster.node(), "idle");
    let read = Command::Read { offset: 0, len: 32 * MIB, dont_fragment: false };
    deaf.send(&read, &[]).unwrap();
    thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    assert_eq!(cluster.node_mut().terminate().code(), Some(0));
    let stopping = began.elapsed();
    println!("stopped in {stopping:?}");
    assert!(stopping < Duration::from_secs(5), "stopping took {stopping:?}");
    drop((idlers, deaf, writer));
    let began = Instant::now();
    cluster.node_mut().start();
    assert!(began.elapsed() < Duration::from_secs(5), "starting took {:?}", began.elapsed());
    let mut client = cluster.node().connect("idle").unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [5; 4096]);
}

#[test]
fn a_crash_under_load_is_recovered_from_quickly() {
    let mut cluster = Cluster::builder().default_size("1GiB").start();
    let load = Load::start(cluster.node(), "loaded", 8, 1024, 32_768);
    thread::sleep(Duration::from_secs(5));
    cluster.node_mut().kill_9();
    let written = load.stop();
    let began = Instant::now();
    cluster.node_mut().start();
    let starting = began.elapsed();
    println!("ready {starting:?} after a crash under {} bytes", acknowledged_bytes(&written));
    assert!(starting < Duration::from_secs(5), "starting took {starting:?}");
    verify(cluster.node(), "loaded", &written);
}

/// A cluster file, and flags that would start its node `a`.
struct Description {
    directory: tempfile::TempDir,
    flags: [String; 3],
}

impl Description {
    fn new(toml: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cluster.toml");
        fs::write(&file, toml).unwrap();
        let flags = [
            format!("--cluster={}", file.display()),
            "--node=a".to_owned(),
            format!("--data-dir={}", directory.path().join("data").display()),
        ];
        Self { directory, flags }
    }

    fn run(&self, more: &[&str]) -> Run {
        let flags: Vec<&str> =
            self.flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Run::new(&flags, &[])
    }

    fn data(&self) -> std::path::PathBuf {
        self.directory.path().join("data")
    }
}

/// A cluster of the nodes a, b and c, of which a holds the only shard.
fn three_nodes() -> String {
    let mut text = "name = \"demo\"\n".to_owned();
    for (name, port) in [("a", 11_201), ("b", 11_211), ("c", 11_221)] {
        text += &format!(
            "[[nodes]]\nname = \"{name}\"\nnbd = \"127.0.0.1:{port}\"\n\
             grpc = \"127.0.0.1:{}\"\nhttp = \"127.0.0.1:{}\"\n",
            port + 1,
            port + 2
        );
    }
    text + "[[shards]]\nreplicas = [\"a\"]\n"
}

#[test]
fn a_configuration_that_cannot_be_is_a_usage_error() {
    let good = three_nodes();
    let wrong = |from: &str, to: &str, words: &[&str]| {
        assert!(good.contains(from));
        let description = Description::new(&good.replacen(from, to, 1));
        description.run(&[]).fails(64, words);
        assert!(!description.data().exists(), "a data directory was made for {to:?}");
    };
    wrong("[\"a\"]", "[\"a\", \"b\", \"a\"]", &["shards[0]", "a"]);
    wrong("[\"a\"]", "[\"b\"]", &["node a", "no shard"]);
    wrong("[\"a\"]", "[\"z\"]", &["shards[0]", "z"]);
    wrong("[\"a\"]", "[]", &["shards[0]"]);
    wrong("127.0.0.1:11201", "127.0.0.1", &["nodes[0].nbd", "127.0.0.1"]);
    wrong("127.0.0.1:11201", "127.0.0.1:0", &["nodes[0].nbd"]);
    wrong("127.0.0.1:11201", "127.0.0.1:11202", &["127.0.0.1:11202"]);
    wrong("name = \"b\"", "name = \"a\"", &["nodes[1].name"]);
    wrong("name = \"demo\"", "name = \"de mo\"", &["name", "de mo"]);
    wrong("name = \"demo\"", "nane = \"demo\"", &["line 1"]);
    wrong("name = \"demo\"\n", "", &["name"]);
    wrong("name = \"demo\"", "name = \"demo", &["cluster.toml", "line 1"]);
    wrong(
        "[[shards]]",
        "[volumes]\ndefault_size = \"1000\"\n[[shards]]",
        &["default_size", "1000"],
    );
    wrong("[[shards]]", "[volumes]\ndefault_size = \"big\"\n[[shards]]", &["default_size", "big"]);
    wrong("[[shards]]", "[volumes]\ndefault_size = \"1EiB\"\n[[shards]]", &["default_size"]);

    let description = Description::new("\0\u{1}not toml");
    description.run(&[]).fails(64, &["cluster.toml", "line 1"]);
    let description = Description::new("");
    description.run(&[]).fails(64, &["cluster.toml"]);

    let data = format!("--data-dir={}", description.data().display());
    let missing = description.directory.path().join("nowhere.toml");
    let cluster = format!("--cluster={}", missing.display());
    Run::new(&[&cluster, "--node=a", &data], &[]).fails(64, &["nowhere.toml", "No such file"]);
    Run::new(&["--node=a", &data], &[]).fails(64, &["no cluster", "--cluster", "NBD_SHARDS"]);
    let shards = [("NBD_SHARDS", "[[\"a\"")];
    Run::new(&["--node=a", &data], &shards).fails(64, &["NBD_SHARDS"]);
}

#[test]
fn flags_that_cannot_be_are_usage_errors() {
    let description = Description::new(&three_nodes());
    let unknown = [&description.flags[0], "--node=z", &description.flags[2]];
    Run::new(&unknown, &[]).fails(64, &["node z", "a, b, c"]);
    let out_of_range = [
        ("--log-segment-bytes", "2MiB"),
        ("--log-segment-bytes", "2GiB"),
        ("--log-segment-bytes", "4194816"),
        ("--log-bytes-max", "128MiB"),
        ("--log-cache-bytes", "1KiB"),
        ("--checkpoint-log-bytes", "600MiB"),
        ("--request-bytes-max", "1MiB"),
    ];
    for (flag, value) in out_of_range {
        description.run(&[&format!("{flag}={value}")]).fails(64, &[flag, "allowed"]);
    }
    let nonsense = [
        "--log-bytes-max=lots",
        "--log-bytes-max=-1",
        "--log-bytes-max=99999999999999999999GiB",
        "--connections-max=0",
        "--connections-max=many",
        "--health-deadline=soon",
        "--shutdown-deadline=-1s",
        "--log-format=xml",
        "--no-such-flag",
    ];
    for flag in nonsense {
        let name = flag.split('=').next().unwrap();
        description.run(&[flag]).fails_with_explanation(64, &[name]);
    }
    let bad_name = [&description.flags[0], "--node=a b", &description.flags[2]];
    Run::new(&bad_name, &[]).fails_with_explanation(64, &["--node"]);
    Run::new(&[], &[]).fails_with_explanation(64, &["required"]);
    assert!(!description.data().exists());
}

#[test]
fn what_is_in_the_way_of_a_start_is_said_in_one_line() {
    let mut cluster = Cluster::builder().name("mine").start();
    let node = cluster.node();
    let ((_, nbd), (_, grpc)) = (node.nbd_address(), node.grpc_address());
    let (_, http) = node.http_address();
    let running = node.data_directory().display().to_string();
    let text = fs::read_to_string(cluster.cluster_file()).unwrap();
    let file = cluster.directory().join("other.toml");
    let try_start = |text: &str, name: &str, data: &str| {
        fs::write(&file, text).unwrap();
        let cluster = format!("--cluster={}", file.display());
        let (node, data) = (format!("--node={name}"), format!("--data-dir={data}"));
        Run::new(&[&cluster, &node, &data], &[])
    };
    let elsewhere = |text: &str| {
        // Ports that nobody else has: those of a cluster that is never started.
        let free = Cluster::builder().prepare();
        let free = free.node();
        let ports = [
            (nbd, free.nbd_address().1),
            (grpc, free.grpc_address().1),
            (http, free.http_address().1),
        ];
        ports.into_iter().fold(text.to_owned(), |text, (from, to)| {
            text.replace(&format!(":{from}\""), &format!(":{to}\""))
        })
    };
    let unused = cluster.directory().join("unused").display().to_string();

    // Ports.
    let run = try_start(&text, "nbd-1-1", &unused);
    run.fails(1, &["NBD", &format!("127.0.0.1:{nbd}"), "in use"]);
    let moved = elsewhere(&text);
    let http_taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = http_taken.local_addr().unwrap();
    let (before, after) = moved.split_once("http = \"").unwrap();
    let (_, after) = after.split_once('"').unwrap();
    let run = try_start(&format!("{before}http = \"{taken}\"{after}"), "nbd-1-1", &unused);
    run.fails(1, &["HTTP", &taken.to_string(), "in use"]);
    let run = try_start(&moved.replacen("127.0.0.1", "192.0.2.1", 1), "nbd-1-1", &unused);
    run.fails(1, &["NBD", "192.0.2.1"]);

    // Data directories of others.
    let run = try_start(&elsewhere(&text), "nbd-1-1", &running);
    run.fails(1, &[&running, "use"]);
    assert!(cluster.node().connect("still").unwrap().write(0, b"works").is_ok());
    assert!(cluster.node_mut().terminate().success());
    let run = try_start(&text.replace("mine", "theirs"), "nbd-1-1", &running);
    run.fails(1, &[&running, "mine", "theirs"]);
    let run = try_start(&text.replace("nbd-1-1", "nbd-9-9"), "nbd-9-9", &running);
    run.fails(1, &[&running, "nbd-1-1", "nbd-9-9"]);
    let run = try_start(&text, "nbd-1-1", "/dev/null/data");
    run.fails(1, &["/dev/null/data"]);

    // Nothing of all that has harmed the node's own.
    cluster.node_mut().start();
    assert_eq!(cluster.node().connect("still").unwrap().read(0, 5).unwrap(), b"works");
}

#[test]
fn a_directory_of_something_else_is_left_alone() {
    let description = Description::new(&three_nodes());
    let data = description.data();
    fs::create_dir(&data).unwrap();
    fs::write(data.join("thesis.tex"), "years of work").unwrap();
    description.run(&[]).fails(1, &[&data.display().to_string(), "not empty"]);
    let names: Vec<_> = fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["thesis.tex"]);
}

#[test]
fn check_config_prints_what_would_be_used_and_does_nothing() {
    let description = Description::new(&three_nodes());
    // It binds nothing: the port may be taken.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fs::write(
        description.directory.path().join("cluster.toml"),
        three_nodes().replace("11201", &port),
    )
    .unwrap();
    let run = description.run(&["--check-config"]);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{run:?}");
    for word in ["demo", &port, &description.data().display().to_string()] {
        assert!(run.stdout.contains(word), "{word} is not in {}", run.stdout);
    }
    assert!(!description.data().exists());
    description.run(&["--check-config", "--log-bytes-max=1MiB"]).fails(64, &["--log-bytes-max"]);
}

#[test]
fn check_config_speaks_in_units_and_takes_flags_before_variables() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data").display().to_string();
    let environment = [
        ("NBD_SHARDS", r#"[["a"]]"#),
        ("NBD_NODE", "a"),
        ("NBD_DATA_DIR", &data),
        ("NBD_DEFAULT_SIZE", "7GiB"),
        ("NBD_LOG_BYTES_MAX", "3GiB"),
    ];
    let printed = |arguments: &[&str], expected: &[&str]| {
        let run = Run::new(arguments, &environment);
        assert_eq!(run.code, Some(0), "{run:?}");
        for word in expected {
            assert!(run.stdout.contains(word), "{word} is not in {}", run.stdout);
        }
    };
    printed(&["--check-config"], &["7GiB", "3GiB", "10s"]);
    printed(&["--check-config", "--log-bytes-max=5GiB"], &["7GiB", "5GiB", "10s"]);
}

#[test]
fn the_environment_alone_describes_a_node() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data").display().to_string();
    let environment = [
        ("NBD_SHARDS", r#"[["nbd-1-1"],["nbd-2-1"]]"#),
        ("NBD_NODE", "nbd-2-1"),
        ("NBD_DATA_DIR", &data),
    ];
    let run = Run::new(&["--check-config"], &environment);
    assert_eq!(run.code, Some(0), "{run:?}");
    for word in ["nbd-2-1", "10809", "8080", "cinderblock", &data] {
        assert!(run.stdout.contains(word), "{word} is not in {}", run.stdout);
    }
    let three =
        [("NBD_SHARDS", r#"[["nbd-2-1","nbd-2-2","nbd-2-3"]]"#), environment[1], environment[2]];
    let run = Run::new(&["--check-config"], &three);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stdout.contains("nbd-2-3:7400"), "{run:?}");
}

/// What INFO says of an export; the refusal's code if it is one.
fn describe(node: &NodeProcess, export: &str) -> Result<RemoteExport, u32> {
    let mut stream = TcpStream::connect(node.nbd_address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut handshake = ClientHandshake::new(ClientWish {
        export: ExportName::from_bytes(export.as_bytes()).unwrap(),
        goal: ClientGoal::Info,
        replies: ReplyStyle::Simple,
        allocation_context: false,
        info: InfoRequests { name: true, description: true, block_size: true },
    });
    let mut input = BytesMut::new();
    loop {
        let event = handshake.receive(&mut input).unwrap();
        stream.write_all(&handshake.take_output()).unwrap();
        match event {
            Some(ClientEvent::Described(export)) => return Ok(export),
            Some(ClientEvent::Refused { error, .. }) => return Err(error),
            Some(other) => panic!("{other:?}"),
            None => {
                let mut buffer = [0; 4096];
                let count = read_some(&mut stream, &mut buffer).unwrap();
                assert!(count > 0, "the server closed");
                input.extend_from_slice(&buffer[..count]);
            }
        }
    }
}

#[test]
fn info_creates_nothing_and_tells_what_go_would() {
    let cluster = Cluster::builder().default_size("48MiB").start();
    let node = cluster.node();
    let described = describe(node, "new").unwrap();
    assert_eq!(list_exports(node.nbd_address()).unwrap(), [""; 0]);
    let client = connect_simply(node, "new");
    assert_eq!(client.size(), 48 * MIB);
    assert_eq!(client.attached().export, described);
    assert_eq!(describe(node, "new").unwrap(), described);
    assert_eq!(list_exports(node.nbd_address()).unwrap(), ["new"]);
    // The empty name stands for a volume with a name.
    drop(node.connect("").unwrap());
    assert_eq!(list_exports(node.nbd_address()).unwrap(), ["default", "new"]);
}

#[test]
fn without_auto_create_only_what_exists_is_served() {
    let mut cluster = Cluster::start();
    cluster.node().connect("old").unwrap().write(0, b"kept").unwrap();
    let file = cluster.cluster_file().to_owned();
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("auto_create = true"));
    fs::write(&file, text.replace("auto_create = true", "auto_create = false")).unwrap();
    cluster.node_mut().restart();
    let node = cluster.node();
    for name in ["new", "Old", "old ", "", "default"] {
        let refused = node.connect(name).unwrap_err();
        let code = match refused {
            ClientError::Refused { error, .. } => error,
            other => panic!("{name:?}: {other}"),
        };
        assert_eq!(code, option_reply::ERR_UNKNOWN, "{name:?}");
        assert_eq!(describe(node, name), Err(option_reply::ERR_UNKNOWN), "{name:?}");
        let export = name.to_owned();
        let options =
            ConnectOptions { export, goal: ClientGoal::ExportName, ..ConnectOptions::default() };
        let closed = NbdClient::connect_with(node.nbd_address(), &options).unwrap_err();
        assert!(matches!(closed, ClientError::Closed | ClientError::Io(_)), "{closed}");
    }
    assert_eq!(list_exports(node.nbd_address()).unwrap(), ["old"]);
    assert_eq!(node.connect("old").unwrap().read(0, 4).unwrap(), b"kept");
}

/// A volume on a disk that is about to be full, and what it should hold.
struct Filler {
    client: NbdClient,
    chunks: Vec<Option<Chunk>>,
}

/// Content of a chunk that holds something.
#[derive(Clone, Copy)]
struct Chunk {
    /// Every byte but those of the patch.
    byte: u8,
    /// The bytes of [`PATCH`].
    patch: u8,
}

const CHUNK_BYTES: usize = 65_536;

/// A part of a chunk without a whole block in it: neither end is on a block's edge.
const PATCH: std::ops::Range<usize> = 5000..9000;

impl Chunk {
    fn content(self) -> Vec<u8> {
        let mut content = vec![self.byte; CHUNK_BYTES];
        content[PATCH].fill(self.patch);
        content
    }
}

impl Filler {
    fn attach(node: &NodeProcess, chunks: Vec<Option<Chunk>>) -> Self {
        Self { client: node.connect("filled").unwrap(), chunks }
    }

    fn write(&mut self, chunk: usize, byte: u8) -> Result<(), ClientError> {
        self.client.write((chunk * CHUNK_BYTES) as u64, &[byte; CHUNK_BYTES])?;
        self.chunks[chunk] = Some(Chunk { byte, patch: byte });
        Ok(())
    }

    /// Writes to new places until there is no room, and returns how many were written.
    fn fill(&mut self) -> usize {
        let empty = |chunk: &usize| self.chunks[*chunk].is_none();
        let empty: Vec<usize> = (0..self.chunks.len()).filter(empty).collect();
        for (number, chunk) in empty.into_iter().enumerate() {
            if let Err(error) = self.write(chunk, chunk.to_le_bytes()[0]) {
                assert_eq!(error.nbd_error(), Some(NbdError::NoSpc), "{error}");
                return number;
            }
        }
        panic!("the disk never became full");
    }

    /// The chunks that hold something.
    fn filled(&self) -> Vec<usize> {
        (0..self.chunks.len()).filter(|chunk| self.chunks[*chunk].is_some()).collect()
    }

    /// Writes anew every chunk that holds something.
    fn overwrite(&mut self, byte: u8) {
        for chunk in self.filled() {
            let outcome = self.write(chunk, byte);
            outcome.unwrap_or_else(|error| panic!("overwrite chunk {chunk}: {error}"));
        }
    }

    /// Writes anew parts of blocks in every chunk that holds something.
    fn patch(&mut self, byte: u8) {
        for chunk in self.filled() {
            let offset = (chunk * CHUNK_BYTES + PATCH.start) as u64;
            let outcome = self.client.write(offset, &vec![byte; PATCH.len()]);
            outcome.unwrap_or_else(|error| panic!("patch chunk {chunk}: {error}"));
            self.chunks[chunk].as_mut().unwrap().patch = byte;
        }
    }

    /// Gives up the first `count` chunks and writes them anew, `rounds` times. All but one: the
    /// metadata database takes a page or two meanwhile (8 KiB were seen over 50 rounds), and when
    /// those are the first of what would be a chunk, there is one chunk less room for data.
    fn trim_and_write_again(&mut self, count: usize, rounds: u8) -> Result<(), ClientError> {
        for round in 0..rounds {
            self.client.trim(0, (count * CHUNK_BYTES) as u64)?;
            self.chunks[count - 1] = None;
            (0..count - 1).try_for_each(|chunk| self.write(chunk, round))?;
        }
        Ok(())
    }

    fn check(&mut self) {
        for (number, chunk) in self.chunks.iter().enumerate() {
            let data = self.client.read((number * CHUNK_BYTES) as u64, CHUNK_BYTES).unwrap();
            let expected = chunk.map_or_else(|| vec![0; CHUNK_BYTES], Chunk::content);
            assert!(data == expected, "chunk {number} holds something else");
        }
    }
}

fn start_on(disk: &Path) -> Cluster {
    let mut cluster = Cluster::builder()
        .default_size("128MiB")
        .argument("--log-segment-bytes=4MiB")
        .argument("--log-bytes-max=16MiB")
        .argument("--checkpoint-log-bytes=4MiB")
        .argument("--space-reserve=4MiB")
        .prepare();
    // Only the data is on the small disk; what the process prints is not to be lost with it.
    let data = format!("--data-dir={}", disk.join("data").display());
    cluster.node_mut().set_argument(&data);
    cluster.node_mut().start();
    cluster
}

#[test]
fn a_full_disk_refuses_new_places_and_nothing_else() {
    let disk = match SmallDisk::mount(96 * MIB) {
        Ok(disk) => disk,
        Err(reason) => return tools::skip(file!(), &reason),
    };
    let mut cluster = start_on(disk.path());
    let mut filler = Filler::attach(cluster.node(), vec![None; 2048]);
    let written = filler.fill();
    println!("{written} chunks were written before the disk was full");
    assert!(written > 500, "only {written} chunks of 64 KiB fit a disk of 96 MiB");
    filler.check();
    // More than the log holds: what is overwritten finds its way home although the disk is full.
    filler.overwrite(0xaa);
    filler.patch(0xab);
    filler.check();
    assert!(filler.fill() < 64, "a full disk had room after all");
    // Zeroing and reading need no room.
    filler.client.write_zeroes(120 * MIB, MIB, false).unwrap();
    assert_eq!(health(cluster.node())["status"], "ok");

    // A stop, and a crash, while it is full.
    for (crash, byte) in [(false, 0xc0), (true, 0xd0)] {
        let chunks = std::mem::take(&mut filler.chunks);
        if crash {
            cluster.node_mut().kill_9();
            cluster.node_mut().start();
        } else {
            cluster.node_mut().restart();
        }
        filler = Filler::attach(cluster.node(), chunks);
        filler.check();
        filler.overwrite(byte);
        filler.patch(byte + 1);
        assert!(filler.fill() < 64, "a full disk had room after a restart");
        filler.check();
    }

    // Room that is given up is room for others.
    filler.client.trim(0, (200 * CHUNK_BYTES) as u64).unwrap();
    filler.chunks[..200].fill(None);
    let again = filler.fill();
    println!("{again} chunks were written after 200 were given up");
    assert!((190..264).contains(&again), "{again} chunks fit where 200 were given up");
    filler.check();
    // Also in the middle of checkpoints, which others' overwriting keeps under way.
    let stop = AtomicBool::new(false);
    let mut other = cluster.node().connect("filled").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let chunks = (300..304).cycle().take_while(|_| !stop.load(Ordering::Relaxed));
            for chunk in chunks {
                other.write((chunk * CHUNK_BYTES) as u64, &[0xee; CHUNK_BYTES]).unwrap();
            }
        });
        let outcome = filler.trim_and_write_again(20, 50);
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|error| panic!("no room where some was given up: {error}"));
    });
    assert!(cluster.node_mut().terminate().success());
    drop(cluster);
}

/// What waits while a log write is under way is proposed in pieces that the log can hold, however
/// small it is.
#[test]
fn writes_larger_than_the_log_go_through() {
    let cluster = Cluster::builder()
        .default_size("64MiB")
        .argument("--log-segment-bytes=4MiB")
        .argument("--log-bytes-max=16MiB")
        .argument("--checkpoint-log-bytes=4MiB")
        .start();
    thread::scope(|scope| {
        for number in 0..4_u8 {
            let mut client = cluster.node().connect(&format!("large{number}")).unwrap();
            scope.spawn(move || {
                // Blocks that differ from their neighbours and from the other clients'.
                let block = |block: usize| [block.to_le_bytes()[0] ^ number; 4096];
                let data: Vec<u8> = (0..8192).flat_map(block).collect();
                client.write(0, &data).unwrap();
                assert!(client.read(0, data.len()).unwrap() == data);
            });
        }
    });
}
