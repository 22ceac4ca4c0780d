//! A cluster from `nbdctl up`, managed by `nbdctl`.

use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::Up;

fn run(up: &Up, command: &str) -> Output {
    up.nbdctl(&command.split(' ').collect::<Vec<_>>()).output().unwrap()
}

#[track_caller]
fn does(up: &Up, command: &str) -> String {
    let output = run(up, command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{command}: {said}\n{}", up.errors());
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json(up: &Up, command: &str) -> Value {
    serde_json::from_str(&does(up, &format!("{command} --output json"))).unwrap()
}

/// The command's exit code, and what it complains of.
#[track_caller]
fn fails(up: &Up, command: &str) -> (Option<i32>, String) {
    let output = run(up, command);
    assert!(!output.status.success(), "{command}");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

// Goal: what a person does in a first hour with volumes, with a client attached.
#[test]
fn a_volume_is_made_used_grown_and_removed() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--shards=2", "--replicas=1"]);
    does(&up, "volume create db/main --size 64MiB --label team=a --description shop");
    let (code, said) = fails(&up, "volume create db/main --size 64MiB");
    assert_eq!(code, Some(3), "{said}");
    let before = json(&up, "volume show db/main");
    assert_eq!((&before["size"], &before["sessions"]), (&(64 << 20).into(), &0.into()));

    let mut client = up.connect("db/main");
    client.write(0, &[7; 1 << 20]).unwrap();
    let used = json(&up, "volume show db/main");
    assert_eq!(used["sessions"], 1, "{used}");
    assert_eq!(used["allocated"], 1 << 20, "{used}");
    let sessions = json(&up, "session list --volume db/main");
    let attachment = &sessions[0]["attachment"];
    assert_eq!(attachment["via"], "nbd-lb", "{sessions}");
    assert_eq!(attachment["counts"]["write_bytes"], 1 << 20, "{sessions}");

    does(&up, "volume grow db/main +64MiB");
    assert_eq!(up.connect("db/main").size(), 128 << 20, "the next to attach sees it");
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096], "who is attached is not disturbed");

    let (code, said) = fails(&up, "volume rm db/main --yes");
    assert_eq!(code, Some(3), "{said}");
    let id = sessions[0]["id"].as_str().unwrap();
    does(&up, &format!("session end {id}"));
    let began = Instant::now();
    while client.read(0, 512).is_ok() {
        assert!(began.elapsed() < Duration::from_secs(10), "its session was ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    does(&up, "volume rm db/main --yes --force");
    assert_eq!(fails(&up, "volume show db/main").0, Some(2));
    assert_eq!(json(&up, "volume list"), Value::Array(Vec::new()));
}

#[test]
fn the_cluster_tells_how_it_is() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &[]);
    let mut client = up.connect("vol1");
    client.write(0, &[1; 4096]).unwrap();
    let health = does(&up, "health");
    assert!(health.contains("cinderblock: ok; 1 shard, 3 of 3 nodes up, 1 volume"), "{health}");
    let shards = json(&up, "shard list");
    let old = shards[0]["leader"].as_str().unwrap().to_owned();
    let nodes = does(&up, "node list");
    assert!(nodes.contains(&old), "{nodes}");
    let top = does(&up, "top --once");
    assert!(top.contains("vol1"), "{top}");

    does(&up, &format!("node drain {old} --wait"));
    let now = json(&up, "shard show 0");
    assert_ne!(now["leader"], old.as_str(), "{now}");
    client.write(4096, &[2; 4096]).unwrap();
    does(&up, &format!("node uncordon {old}"));
}

// Goal: an image larger than what volumes are by default goes into a volume of its own.
#[test]
fn an_image_is_imported_into_a_volume_made_for_it() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), &["--replicas=1", "--size=1MiB"]);
    let file = directory.path().join("image");
    let content: Vec<u8> = (0..2_u32 << 20).map(|at| (at / 3000).to_le_bytes()[0]).collect();
    std::fs::write(&file, &content[..content.len() - 100]).unwrap();
    let import = format!("import {} vol1 --create --nbd 127.0.0.1:{}", file.display(), up.nbd);
    does(&up, &import);
    let mut client = up.connect("vol1");
    assert_eq!(client.size(), content.len() as u64, "whole sectors");
    let mut expected = content;
    let end = expected.len();
    expected[end - 100..].fill(0);
    assert!(client.read(0, end).unwrap() == expected);
    // The same file, so the same volume; but it holds data, and the first run has ended.
    let (_, said) = fails(&up, &import);
    assert!(said.contains("--overwrite"), "{said}");
    std::fs::write(&file, b"another").unwrap();
    let (_, said) = fails(&up, &import);
    assert!(said.contains("already") || said.contains("exists"), "{said}");
}
