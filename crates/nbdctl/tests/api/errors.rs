//! How commands fail: one line that says what, and a code that programs can tell apart.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use serde_json::json;

use crate::fake::{Fake, problem};
use crate::support::{ask, nbdctl, run};

#[test]
fn each_problem_has_its_code() {
    let fake = Fake::start();
    for (status, kind, code) in [
        (400, "malformed", 1),
        (401, "unauthorized", 5),
        (403, "forbidden", 5),
        (404, "not-found", 2),
        (405, "method-not-allowed", 1),
        (409, "conflict", 3),
        (409, "limit-reached", 3),
        (413, "too-large", 1),
        (415, "unsupported-media-type", 1),
        (422, "invalid", 1),
        (422, "key-reused", 3),
        (500, "internal", 1),
        (503, "unavailable", 4),
        (409, "of-another-version", 3),
    ] {
        fake.script("GET /shards/0", status, &[], &problem(kind, status, "so it is"));
        let err = ask(&fake, &["shard", "show", "0"]).fails(code, &["error: so it is\n"]);
        assert!(err.lines().count() <= 2, "{kind}: {err}");
    }
}

#[test]
fn values_out_of_bounds_are_named_one_by_one() {
    let fake = Fake::start();
    let problem = json!({"type": "/problems/invalid", "title": "t", "status": 422,
        "detail": "2 values are out of bounds", "errors": [
            {"field": "/size", "detail": "a multiple of 512"},
            {"field": "/labels/a b", "detail": "no blanks"}]});
    fake.script("POST /volumes", 422, &[], &problem.to_string());
    let err = ask(&fake, &["volume", "create", "x"]).fails(1, &[]);
    assert_eq!(
        err,
        "error: 2 values are out of bounds\n  /size: a multiple of 512\n  /labels/a b: no blanks\n"
    );
}

#[test]
fn a_shard_without_majority_says_when_to_try_again() {
    let fake = Fake::start();
    let body = problem("unavailable", 503, "shard 0 has no leader");
    fake.script("GET /volumes/vol1", 503, &[("retry-after", "2")], &body);
    let err = ask(&fake, &["volume", "show", "vol1"]).fails(4, &[]);
    assert_eq!(err, "error: shard 0 has no leader\nhint: try again in 2 s\n");
}

#[test]
fn a_list_that_is_not_whole_says_so() {
    let fake = Fake::start();
    fake.lose(&[3, 1]);
    for format in ["table", "json"] {
        let run = ask(&fake, &["volume", "list", "--output", format]);
        assert_eq!(run.code, 4);
        assert!(run.out.contains("db/main"), "{}", run.out);
        assert!(run.err.contains("shards 1, 3 do not answer"), "{}", run.err);
    }
}

#[test]
fn nobody_there_is_said_with_a_hint() {
    let port = nbd_testkit::free_port();
    let server = format!("http://127.0.0.1:{port}");
    let words = [&server, "connection refused", "`nbdctl up`", "--server URL", "NBDCTL_SERVER"];
    run(nbdctl(&["volume", "list"]).env("NBDCTL_SERVER", &server)).fails(4, &words);
    run(nbdctl(&["top"]).env("NBDCTL_SERVER", &server)).fails(4, &words);
    run(&mut nbdctl(&["operation", "watch", "x", "--server", &server])).fails(4, &words);
    let nowhere = ["health", "--server", "http://no-such-host.invalid"];
    run(&mut nbdctl(&nowhere)).fails(4, &["no-such-host.invalid"]);
}

#[test]
fn a_connection_that_is_lost_is_no_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (mut stream, mut some) = (stream, [0; 16]);
            let _ = stream.read(&mut some);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"na");
        }
    });
    run(&mut nbdctl(&["volume", "show", "x", "--server", &server])).fails(4, &[&server]);
}

#[test]
fn another_kind_of_server_is_noticed() {
    let fake = Fake::start();
    fake.script("GET /volumes/x", 404, &[], "<html>\nnope");
    let words = ["404 Not Found: <html>", "is that the control API?"];
    ask(&fake, &["volume", "show", "x"]).fails(1, &words);
    fake.script("GET /volumes/x", 200, &[], "<html>");
    ask(&fake, &["volume", "show", "x"]).fails(1, &["cannot be understood"]);
    fake.script("GET /volumes/x", 502, &[], "");
    ask(&fake, &["volume", "show", "x"]).fails(4, &["502 Bad Gateway"]);
    fake.script("GET /operations/x/events", 200, &[("content-type", "text/html")], "<html>");
    ask(&fake, &["operation", "watch", "x"]).fails(1, &["no events"]);
}

#[test]
fn an_endless_list_ends() {
    let fake = Fake::start();
    let page = json!({"items": [], "next": "again"}).to_string();
    fake.script("GET /nodes", 200, &[], &page);
    let run = ask(&fake, &["node", "list"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("repeats a page"), "{}", run.err);
}

#[test]
fn mistakes_in_flags_are_usage_errors() {
    for (command, word) in [
        ("volume create x --size 1.5GiB", "fractions"),
        ("volume create x --label nonsense", "KEY=VALUE"),
        ("volume create x --key ä", "visible ASCII"),
        ("volume list --limit 0", "0 is not in"),
        ("volume list --sort colour", "colour"),
        ("volume rm", "<NAME>"),
        ("shard show one", "invalid digit"),
        ("shard add 0 n --grpc nowhere", "nowhere"),
        ("top --interval 1ms", "100ms is the shortest"),
        ("health --server https://x", "https is not built in"),
        ("health --output yaml", "yaml"),
        ("completions cmd", "cmd"),
        ("up --server http://x", "does not ask the control API"),
        ("replica list -o json", "take --output away"),
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let failed = run(&mut nbdctl(&words));
        assert_eq!((failed.code, failed.out.as_str()), (64, ""), "{command}: {}", failed.err);
        assert!(failed.err.contains(word), "{command}: {}", failed.err);
    }
}
