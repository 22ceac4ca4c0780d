//! What commands ask for, and what comes of it.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::fake::{Fake, problem};
use crate::support::{ask, nbdctl, run};

/// The one request that was made.
#[track_caller]
fn only(fake: &Fake) -> crate::fake::Seen {
    let seen = fake.seen();
    assert_eq!(seen.len(), 1, "{seen:?}");
    seen[0].clone()
}

#[test]
fn volumes_are_created() {
    let fake = Fake::start();
    let words = "volume create a/b --size 10GiB --description x --label k=v=w --label l=";
    let text = ask(&fake, &words.split(' ').collect::<Vec<_>>()).succeeds();
    assert_eq!(text, "a/b created: 10GiB, on shard 1\n");
    let seen = only(&fake);
    assert_eq!(seen.line, "POST /volumes");
    assert_eq!(
        seen.body,
        json!({"name": "a/b", "size": 10_u64 << 30, "description": "x",
            "labels": {"k": "v=w", "l": ""}})
    );
    let text = ask(&fake, &["volume", "create", "c", "--key", "order-1"]).succeeds();
    assert_eq!(text, "c created: 1GiB, on shard 1\n");
    let seen = only(&fake);
    assert_eq!(seen.key.as_deref(), Some("order-1"));
    // The cluster's own default.
    assert_eq!(seen.body, json!({"name": "c", "description": "", "labels": {}}));
    let again = ask(&fake, &["volume", "create", "c", "--key", "order-1"]).succeeds();
    assert_eq!(again, "c was there already: 1GiB, on shard 1\n");
    ask(&fake, &["volume", "create", "d", "--key", "order-1"]).fails(3, &["key was used"]);
    ask(&fake, &["volume", "create", "c"]).fails(3, &["error: there is a volume c already\n"]);
}

#[test]
fn volumes_are_listed_page_by_page() {
    let fake = Fake::start();
    let text = ask(&fake, &["volume", "list", "--sort=size", "--reverse"]).succeeds();
    assert_eq!(text.lines().count(), 4, "{text}");
    let seen: Vec<String> = fake.seen().into_iter().map(|seen| seen.line).collect();
    assert_eq!(
        seen,
        ["GET /volumes?sort=-size&limit=1000", "GET /volumes?sort=-size&limit=1000&cursor=2"]
    );
    let text = ask(&fake, &["volume", "list", "--limit=1"]).succeeds();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert_eq!(only(&fake).line, "GET /volumes?sort=name&limit=1");
    let text = ask(&fake, &["volume", "list", "--limit=3", "-o", "json"]).succeeds();
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&text).unwrap().len(), 3);
    let text = ask(&fake, &["volume", "list", "--prefix=db/", "--label=team=a"]).succeeds();
    assert!(text.contains("db/main") && text.lines().count() == 2, "{text}");
}

#[test]
fn what_others_have_named_cannot_steer_the_terminal() {
    let fake = Fake::start();
    fake.add_volume("a\x1b[2J", json!({"k": "v\u{202e}\x07"}));
    let text = ask(&fake, &["volume", "list"]).succeeds();
    assert!(text.contains(r#""a\u{1b}[2J""#) && text.contains(r"k=v\u{202e}\u{7}"), "{text}");
    assert!(!text.contains(['\x1b', '\x07', '\u{202e}']), "{text:?}");
}

#[test]
fn volumes_grow_and_shrink_on_purpose_only() {
    let fake = Fake::start();
    let text = ask(&fake, &["volume", "grow", "vol1", "2GiB"]).succeeds();
    assert_eq!(text, "vol1 has 2GiB\n");
    assert_eq!(only(&fake).body, json!({"size": 2_u64 << 30, "force": false}));
    let text = ask(&fake, &["volume", "grow", "vol1", "+512MiB"]).succeeds();
    assert_eq!(text, "vol1 has 2560MiB\n");
    // What is said relative to the present size never shrinks, whatever another does meanwhile.
    fake.seen();
    ask(&fake, &["volume", "grow", "vol1", "+1MiB", "--shrink-and-lose-data"]).succeeds();
    assert_eq!(fake.seen().last().unwrap().body["force"], json!(false));
    let refused = ask(&fake, &["volume", "grow", "vol1", "1MiB"]);
    refused.fails(3, &["would become smaller", "hint: --shrink-and-lose-data"]);
    let words = ["volume", "grow", "vol1", "1MiB", "--shrink-and-lose-data"];
    assert_eq!(ask(&fake, &words).succeeds(), "vol1 has 1MiB\n");
    ask(&fake, &["volume", "grow", "vol1", "1.5GiB"]).fails(64, &["fractions"]);
    ask(&fake, &["volume", "grow", "vol1", "+16383PiB"]).succeeds();
    ask(&fake, &["volume", "grow", "vol1", "+16383PiB"]).fails(1, &["more than can be counted"]);
}

#[test]
fn labels_are_set_and_taken_away() {
    let fake = Fake::start();
    let words = ["volume", "set", "db/main", "--label", "tier=silver", "--unlabel", "team"];
    let text = ask(&fake, &words).succeeds();
    assert_eq!(text, "db/main changed; its labels: tier=silver\n");
    let seen = only(&fake);
    assert_eq!(seen.line, "PATCH /volumes/db%2Fmain");
    assert_eq!(seen.body, json!({"labels": {"tier": "silver", "team": null}}));
    ask(&fake, &["volume", "set", "vol1", "--description="]).succeeds();
    assert_eq!(only(&fake).body, json!({"description": "", "labels": {}}));
    ask(&fake, &["volume", "set", "vol1"]).fails(64, &["--description"]);
}

#[test]
fn traces_are_asked_for() {
    let fake = Fake::start();
    let text = ask(&fake, &["volume", "trace", "db/main", "--requests", "5"]).succeeds();
    let told = "db/main: the next 5 requests of its client will be traced\n\
                http://jaeger/search?service=nbd-replica\n";
    assert_eq!(text, told);
    let seen = only(&fake);
    assert_eq!(
        (seen.line.as_str(), seen.body),
        ("POST /volumes/db%2Fmain/trace", json!({"requests": 5}))
    );
    let text = ask(&fake, &["volume", "trace", "vol1"]).succeeds();
    assert!(text.starts_with("no client is attached to vol1"), "{text}");
    assert_eq!(only(&fake).body, json!({"requests": 10}));
    ask(&fake, &["volume", "trace", "vol1", "--requests=0"]).fails(64, &["--requests"]);
    ask(&fake, &["volume", "trace", "vol1", "--requests=1001"]).fails(64, &["--requests"]);
}

#[test]
fn volumes_are_deleted() {
    let fake = Fake::start();
    ask(&fake, &["volume", "rm", "db/main"]).fails(3, &["attached to db/main", "--force"]);
    assert!(fake.has("db/main"));
    let text = ask(&fake, &["volume", "rm", "--force", "db/main"]).succeeds();
    assert_eq!(text, "db/main deleted\n");
    // The others go, whatever became of one.
    let run = ask(&fake, &["volume", "rm", "gone", "vol1"]);
    assert_eq!((run.code, run.out.as_str()), (2, "vol1 deleted\n"));
    assert_eq!(run.err, "error: gone: there is no volume gone\n");
    ask(&fake, &["volume", "rm", "gone", "-o", "json"]).fails(2, &["no volume gone"]);
}

#[test]
fn sessions_end() {
    let fake = Fake::start();
    let id = "00000000000000000000000000000abc";
    let text = ask(&fake, &["session", "end", id, "--shard=0"]).succeeds();
    assert_eq!(text, format!("{id} ended\n"));
    assert_eq!(only(&fake).line, format!("DELETE /sessions/{id}?shard=0"));
    ask(&fake, &["session", "end", "abc"]).fails(2, &["no DELETE /sessions/abc"]);
    // The others end, whatever became of one.
    let run = ask(&fake, &["session", "end", "abc", id]);
    assert_eq!((run.code, run.out), (2, format!("{id} ended\n")));
    assert!(run.err.starts_with("error: abc: there is no"), "{}", run.err);
    fake.seen();
    ask(&fake, &["session", "list", "--volume=a b", "--shard=1"]).succeeds();
    assert_eq!(only(&fake).line, "GET /sessions?volume=a%20b&shard=1&limit=1000");
}

#[test]
fn shards_are_changed() {
    let fake = Fake::start();
    let text = ask(&fake, &["shard", "transfer", "0", "nbd-1-2"]).succeeds();
    assert_eq!(text, "shard 0 is led by nbd-1-2\n");
    assert_eq!(only(&fake).body, json!({"node": "nbd-1-2"}));
    ask(&fake, &["shard", "transfer", "0"]).succeeds();
    assert_eq!(only(&fake).body, json!({}));
    let text = ask(&fake, &["shard", "add", "0", "nbd-1-4", "--grpc=h:1"]).succeeds();
    assert_eq!(
        text,
        "add-0-4 running: fetching chunks\nTo watch it: nbdctl operation watch add-0-4\n"
    );
    assert_eq!(only(&fake).body, json!({"node": "nbd-1-4", "grpc": "h:1"}));
    let text = ask(&fake, &["shard", "remove", "0", "3"]).succeeds();
    assert_eq!(text, "replica 3 of shard 0 removed\n");
    ask(&fake, &["shard", "remove", "0", "9"]).fails(2, &["/members/9"]);
}

#[test]
fn waiting_shows_how_it_gets_on() {
    let fake = Fake::start();
    let run = ask(&fake, &["shard", "replace", "0", "2", "nbd-1-4", "--wait"]);
    assert_eq!((run.code, run.out.as_str()), (0, "replace-0-2-4 done: all is there\n"), "{run:?}");
    assert_eq!(
        run.err,
        "replace-0-2-4: [....................]   0%  0 of 100MiB, 100s left  fetching chunks\n\
         replace-0-2-4: [#########...........]  45%  45MiB of 100MiB, 55s left  fetching chunks\n"
    );
    let run = ask(&fake, &["node", "drain", "nbd-1-1", "--wait", "-o", "json"]);
    let end: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.code, &end["state"]), (0, &json!("done")), "{run:?}");
    // One that does not succeed.
    let run = ask(&fake, &["operation", "watch", "resync-0-3"]);
    assert_eq!((run.code, run.out.as_str()), (1, "resync-0-3 ended: it was cancelled\n"));
    let run = ask(&fake, &["operation", "watch", "add-0-4", "-o", "json"]);
    assert_eq!((run.code, run.out.lines().count(), run.err.as_str()), (0, 3, ""));
    ask(&fake, &["operation", "watch", "add-9-9"]).fails(2, &["add-9-9"]);
}

#[test]
fn a_broken_stream_is_asked_for_again() {
    let fake = Fake::start();
    // It breaks off after a first event, until the test lets it go on.
    let line = "GET /operations/drain-x/events";
    let event = |state: &str| {
        let operation = json!({"id": "drain-x", "kind": "drain", "state": state, "message": "m",
            "cancellable": false});
        format!("data: {operation}\n\n")
    };
    let kind = [("content-type", "text/event-stream")];
    fake.script(line, 200, &kind, &format!("{}data: {{\"id", event("running")));
    let watch = ["operation", "watch", "drain-x"];
    let mut child = nbdctl(&watch)
        .env("NBDCTL_SERVER", fake.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while fake.seen().is_empty() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    fake.script(line, 200, &kind, &event("done"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "drain-x done: m\n");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_problem_in_a_stream_is_told_and_outlived() {
    let fake = Fake::start();
    let line = "GET /operations/drain-x/events";
    let event = |state: &str| {
        let operation = json!({"id": "drain-x", "kind": "drain", "state": state, "message": "m",
            "cancellable": false});
        format!("event: operation\ndata: {operation}\n\n")
    };
    let kind = [("content-type", "text/event-stream")];
    let trouble =
        |status, kind| format!("event: problem\ndata: {}\n\n", problem(kind, status, "so it is"));
    let unknown = "event: weather\ndata: fine\n\n";
    let silence = trouble(503, "unavailable");
    fake.script(line, 200, &kind, &[&event("running"), unknown, &silence, &event("done")].concat());
    let run = ask(&fake, &["operation", "watch", "drain-x"]);
    assert_eq!((run.code, run.out.as_str()), (0, "drain-x done: m\n"), "{run:?}");
    assert_eq!(run.err, "drain-x: m\ndrain-x: so it is; still watching\n");
    let run = ask(&fake, &["operation", "watch", "drain-x", "-o", "json"]);
    assert_eq!((run.code, run.out.lines().count()), (0, 2), "{run:?}");
    // It is gone, say: nothing more will come.
    fake.script(line, 200, &kind, &[event("running"), trouble(404, "not-found")].concat());
    let run = ask(&fake, &["operation", "watch", "drain-x"]);
    assert_eq!((run.code, run.out.as_str()), (2, ""), "{run:?}");
    assert_eq!(run.err, "drain-x: m\nerror: so it is\n");
}

#[test]
fn nodes_are_cordoned_and_drained() {
    let fake = Fake::start();
    let text = ask(&fake, &["node", "cordon", "nbd-1-1"]).succeeds();
    assert_eq!(text, "nbd-1-1 is cordoned\n");
    let text = ask(&fake, &["node", "uncordon", "nbd-1-1"]).succeeds();
    assert_eq!(text, "nbd-1-1 is not cordoned\n");
    let text = ask(&fake, &["node", "drain", "nbd-1-1"]).succeeds();
    assert!(text.starts_with("drain-nbd-1-1 running"), "{text}");
    let text = ask(&fake, &["operation", "cancel", "drain-nbd-1-1"]).succeeds();
    assert_eq!(text, "drain-nbd-1-1 ended: it was cancelled\n");
    ask(&fake, &["operation", "cancel", "add-0-4"]).fails(3, &["cannot be cancelled"]);
}

#[test]
fn health_is_an_exit_code() {
    let fake = Fake::start();
    for (status, code) in [("ok", 0), ("degraded", 1), ("down", 4)] {
        let health = json!({"status": status, "shards": []}).to_string();
        fake.script("GET /cluster/health", 200, &[], &health);
        let run = ask(&fake, &["health", "--output=json"]);
        assert_eq!((run.code, run.out), (code, format!("{health}\n")));
        assert_eq!(ask(&fake, &["health"]).code, code);
    }
}

#[test]
fn top_prints_one_table_without_a_terminal() {
    let fake = Fake::start();
    let text = ask(&fake, &["top", "--interval=200ms"]).succeeds();
    let row: Vec<&str> =
        text.lines().find(|line| line.starts_with("vol1")).unwrap().split_whitespace().collect();
    // 1,000 reads and 10 writes in 200 ms or somewhat more.
    let iops: f64 = row[3].parse().unwrap();
    assert!((1000.0..=5000.0).contains(&iops), "{text}");
    assert_eq!(&row[7..], ["250us", "1.50ms"]);
    let volumes: Vec<&str> =
        text.lines().filter(|l| l.contains("vol1") || l.contains("quiet")).collect();
    assert!(volumes[0].starts_with("vol1"), "the busiest is first: {text}");
    assert!(text.contains("nbd-2-1"), "{text}");
}

#[test]
fn completions_load_in_bash() {
    let script = run(&mut nbdctl(&["completions", "bash"])).succeeds();
    let mut bash = Command::new("bash")
        .args(["--norc", "-eu"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let test = "COMP_WORDS=(nbdctl volume li) COMP_CWORD=2\n_nbdctl nbdctl li volume\n\
                echo \"${COMPREPLY[@]}\"\n";
    bash.stdin.take().unwrap().write_all(format!("{script}\n{test}").as_bytes()).unwrap();
    let output = bash.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "list\n");
    for shell in ["zsh", "fish"] {
        assert!(run(&mut nbdctl(&["completions", shell])).succeeds().contains("nbdctl"));
    }
}

#[test]
fn a_reader_that_has_enough_ends_it_quietly() {
    let fake = Fake::start();
    let mut shell = Command::new("bash");
    shell.args(["-c", "set -o pipefail; \"$NBDCTL\" volume list | head -c 1 > /dev/null"]);
    shell.env("NBDCTL", env!("CARGO_BIN_EXE_nbdctl")).env("NBDCTL_SERVER", fake.url());
    for number in 0..5000 {
        fake.add_volume(&format!("many-{number}"), json!({}));
    }
    let run = run(&mut shell);
    assert_eq!((run.code, run.err.as_str()), (0, ""));
}
