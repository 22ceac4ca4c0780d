//! What is printed, to the letter.

use crate::fake::Fake;
use crate::support::{ask, is_golden, nbdctl, run};

/// Moments are another in each run; their ages are not.
fn without_moments(text: &str) -> String {
    let shape = b"dddd-dd-ddTdd:dd:ddZ";
    let is_moment = |bytes: &[u8]| {
        bytes.len() >= shape.len()
            && shape.iter().zip(bytes).all(|(shape, byte)| match shape {
                b'd' => byte.is_ascii_digit(),
                shape => shape == byte,
            })
    };
    let (mut bytes, mut out) = (text.as_bytes(), Vec::new());
    while let [first, rest @ ..] = bytes {
        if is_moment(bytes) {
            out.extend(b"<moment>");
            bytes = &bytes[shape.len()..];
        } else {
            out.push(*first);
            bytes = rest;
        }
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn tables_are_for_people() {
    let fake = Fake::start();
    for (name, command) in [
        ("volume-list", "volume list"),
        ("volume-show", "volume show db/main"),
        ("session-list", "session list"),
        ("shard-list", "shard list"),
        ("shard-show", "shard show 1"),
        ("node-list", "node list"),
        ("node-show", "node show nbd-1-1"),
        ("operation-list", "operation list"),
        ("operation-show", "operation show resync-0-3"),
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let text = ask(&fake, &words).succeeds();
        assert!(!text.contains('\x1b'), "colours are for terminals: {text:?}");
        is_golden(&format!("{name}.txt"), &without_moments(&text));
    }
    let health = ask(&fake, &["health"]);
    assert_eq!(health.code, 1, "degraded");
    is_golden("health.txt", &health.out);
}

#[test]
fn json_is_what_the_api_says() {
    let fake = Fake::start();
    let text = ask(&fake, &["volume", "list", "--output", "json"]).succeeds();
    is_golden("volume-list.json", &without_moments(&text));
    // Fields that this version does not know, too.
    let volumes: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(volumes[2]["future"], true);
    for (command, pointer) in [
        ("volume show vol1", "/allocated"),
        ("session list", "/0/attachment/client"),
        ("shard list", "/1/members/2/resync/bytes_done"),
        ("shard show 0", "/members/0/role"),
        ("node list", "/0/disk"),
        ("node show nbd-1-1", "/disk"),
        ("operation list", "/0/progress/total"),
        ("operation show add-0-4", "/progress/total"),
        ("top", "/0/volumes/1/counts/reads"),
    ] {
        let words = ["-o", "json"].into_iter().chain(command.split(' '));
        let text = ask(&fake, &words.collect::<Vec<_>>()).succeeds();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(value.pointer(pointer).is_some_and(|value| !value.is_null()), "{command}: {text}");
    }
    let none = ask(&fake, &["volume", "list", "--prefix=none", "--output=json"]).succeeds();
    assert_eq!(none, "[]\n");
    let none = ask(&fake, &["volume", "list", "--prefix=none"]).succeeds();
    assert_eq!(none, "NAME  SIZE  SHARD  AGE  LABELS\n");
}

#[test]
fn help_is_there_with_examples() {
    let mut all = String::new();
    for command in [
        "",
        "volume",
        "volume create",
        "volume list",
        "volume show",
        "volume grow",
        "volume set",
        "volume rm",
        "session",
        "session list",
        "session end",
        "shard",
        "shard list",
        "shard show",
        "shard transfer",
        "shard add",
        "shard remove",
        "shard replace",
        "node",
        "node list",
        "node show",
        "node drain",
        "node cordon",
        "node uncordon",
        "operation",
        "operation list",
        "operation show",
        "operation watch",
        "operation cancel",
        "health",
        "top",
        "completions",
    ] {
        let words = command.split(' ').filter(|word| !word.is_empty()).chain(["--help"]);
        let text = run(nbdctl(&words.collect::<Vec<_>>()).env("COLUMNS", "100")).succeeds();
        assert!(command.is_empty() || text.contains("Example"), "{command}: {text}");
        all += &format!("$ nbdctl {command} --help\n{text}\n");
    }
    assert!(all.contains("Exit codes:"));
    assert!(all.contains("64  a mistake"));
}
