//! The control API in front of real replicas: 2 shards of 3, whole and with pieces missing.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod failures;
mod members;
mod process;
mod resources;
mod schemathesis;

use nbd_testkit::{Cluster, ServerProcess};
use serde_json::Value;

/// 2 shards of 3 replicas each.
fn cluster() -> Cluster {
    let shards: [&[&str]; 2] =
        [&["nbd-1-1", "nbd-1-2", "nbd-1-3"], &["nbd-2-1", "nbd-2-2", "nbd-2-3"]];
    let mut cluster = Cluster::builder().shards(&shards).start();
    cluster.wait_until_serving();
    cluster
}

/// A control API that may be asked by the name that [`nbd_testkit::http`] calls every host.
fn control(cluster: &Cluster) -> ServerProcess {
    control_with(cluster, &[])
}

/// The same, with more flags.
fn control_with(cluster: &Cluster, flags: &[&str]) -> ServerProcess {
    cluster.control_with(&[&["--allowed-host=test"], flags].concat())
}

/// A name on each shard: those of `prefix` and a number are spread over both.
fn name_on(control: &ServerProcess, shard: u64, prefix: &str) -> String {
    for number in 0..64 {
        let name = format!("{prefix}{number}");
        let created = create(control, &name);
        if created["shard"] == shard {
            return name;
        }
    }
    panic!("no name on shard {shard}");
}

#[track_caller]
fn create(control: &ServerProcess, name: &str) -> Value {
    let body = format!(r#"{{"name":"{name}","size":8388608}}"#);
    let answer = control.send("POST", "/api/v1/volumes", &[], &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

/// Gets a resource that is there.
#[track_caller]
fn get(control: &ServerProcess, path: &str) -> Value {
    let answer = control.get(&format!("/api/v1/{path}"));
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.json()
}

/// Asks for a resource until it is as it should be.
#[track_caller]
fn wait_for(control: &ServerProcess, path: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let started = std::time::Instant::now();
    loop {
        let answer = control.get(&format!("/api/v1/{path}"));
        if answer.status == 200 && is_so(&answer.json()) {
            return answer.json();
        }
        assert!(started.elapsed().as_secs() < 60, "{path} stays {answer:?}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
