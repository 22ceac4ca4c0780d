//! fio, which verifies what it wrote, while the leader is lost in every way there is.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, require_tools};
use serde_json::Value;

use crate::command::tool;
use crate::leaders::{Way, lose_leader};
use crate::{MIB, SetOnDrop, cluster};

/// How long leaders are lost; each way comes at least once whatever it takes.
const DURATION: Duration = Duration::from_secs(30);

/// No request may take longer where the loss of a leader costs one term: votes that are split cost
/// another. Far above the promise, which a release build is measured against: these are debug
/// builds on machines that do other things.
const LATENCY_MAX: Duration = Duration::from_secs(5);

/// Bytes that each run of fio writes and verifies.
const RUN_BYTES: u64 = 2 * (8 * MIB);

/// What all runs of fio came to.
#[derive(Debug, Default)]
struct Moved {
    runs: u32,
    written: u64,
    verified: u64,
    latency_max: Duration,
}

impl Moved {
    /// Adds a run's report.
    fn add(&mut self, report: &Value) {
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{job}");
        let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().unwrap();
        self.runs += 1;
        self.written += bytes("write");
        self.verified += bytes("read");
        for direction in ["write", "read"] {
            let longest = job[direction]["lat_ns"]["max"].as_u64().unwrap();
            self.latency_max = self.latency_max.max(Duration::from_nanos(longest));
        }
    }
}

/// Writes anywhere in two regions, a connection for each, and verifies each block a little later
/// and so while leaders are lost as well. Slow enough that several are lost in a run. Panics if fio
/// meets an error, a lost connection, or a block that is not what it wrote.
fn run_fio(uri: &str, directory: &Path) -> Value {
    let output = tool("fio")
        .directory(directory)
        .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--iodepth=16"])
        .args(["--bsrange=512-64k", "--blockalign=512", "--randrepeat=0"])
        .args(["--numjobs=2", "--size=8m", "--offset_increment=8m"])
        .args(["--thinktime=200ms", "--thinktime_blocks=16"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"])
        .args(["--verify_state_save=0", "--group_reporting", "--output-format=json"])
        .arg(format!("--uri={uri}"))
        .run();
    // Warnings come first.
    serde_json::from_str(&output[output.find('{').unwrap()..]).unwrap()
}

/// The term that the shard has come to, by what its replicas say.
fn term(cluster: &Cluster) -> f64 {
    let terms = (0..3).filter_map(|at| cluster.at(at).metric("raft_term{shard=\"0\"}"));
    terms.fold(0.0, f64::max)
}

#[test]
fn what_is_written_while_leaders_are_lost_verifies() {
    require_tools!["fio"];
    let mut cluster = cluster();
    let (uri, directory) = (cluster.front().uri("volume"), cluster.directory().to_owned());
    let (stop, mut lost) = (AtomicBool::new(false), 0);
    // The most terms that passed from one loss of a leader to the next.
    let (mut before, mut terms) = (term(&cluster), 1.0_f64);
    let moved = thread::scope(|scope| {
        let fio = scope.spawn(|| {
            let mut moved = Moved::default();
            while !stop.load(Ordering::Relaxed) {
                moved.add(&run_fio(&uri, &directory));
            }
            moved
        });
        let (stop, started) = (SetOnDrop(&stop), Instant::now());
        for way in Way::ALL.into_iter().cycle() {
            if fio.is_finished() || (lost >= Way::ALL.len() && started.elapsed() > DURATION) {
                break;
            }
            lose_leader(&mut cluster, way);
            lost += 1;
            let now = term(&cluster);
            terms = terms.max(now - before);
            before = now;
        }
        drop(stop);
        fio.join().unwrap()
    });
    terms = terms.max(term(&cluster) - before);
    println!("{lost} leaders lost, in up to {terms} terms each: {moved:?}");
    assert!(lost >= Way::ALL.len());
    assert_eq!(moved.written, RUN_BYTES * u64::from(moved.runs));
    assert_eq!(moved.verified, moved.written);
    assert!(moved.latency_max < LATENCY_MAX.mul_f64(terms), "{moved:?} in {terms} terms");
    cluster.wait_until_equal();
}
