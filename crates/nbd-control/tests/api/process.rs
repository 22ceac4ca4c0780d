//! The process: settings, signals, audit lines.

use std::process::Command;

use nbd_testkit::{Cluster, binary};

#[test]
fn changes_leave_an_audit_line_and_stopping_is_clean() {
    let cluster = Cluster::start();
    let file = cluster.directory().join("tokens");
    std::fs::write(&file, "admin:ops:sesame\nreader:eye:look\n").unwrap();
    let mut control = cluster.control_with(&[&format!("--token-file={}", file.display())]);
    let as_whom = |token: &str| format!("Bearer {token}");
    let send = |token: &str| {
        let header = as_whom(token);
        let headers = [("Authorization", header.as_str())];
        control.send("POST", "/api/v1/volumes", &headers, r#"{"name":"x","size":4096}"#)
    };
    assert_eq!(send("sesame").status, 201);
    assert_eq!(send("sesame").status, 409);
    assert_eq!(send("look").status, 403);
    let header = as_whom("sesame");
    let headers = [("Authorization", header.as_str())];
    assert_eq!(control.send("DELETE", "/api/v1/volumes/x?force=true", &headers, "").status, 204);
    let log = control.stderr();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(" audit: ")).collect();
    assert_eq!(lines.len(), 4, "{log}");
    assert!(lines[3].contains("/api/v1/volumes/x?force=true"), "the query, too: {}", lines[3]);
    for (line, parts) in lines.iter().zip([
        ["ops", "201", "done"],
        ["ops", "409", "exists"],
        ["eye", "403", "for reading only"],
    ]) {
        for part in parts.into_iter().chain(["POST", "/api/v1/volumes", "127.0.0.1:"]) {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    assert!(lines[0].contains(r#"4096"#), "what was asked for: {}", lines[0]);
    assert!(!log.contains("sesame"), "{log}");
    let series = "control_requests_total{method=\"POST\",route=\"/api/v1/volumes\",status=\"409\"}";
    assert_eq!(control.metric(series), Some(1.0));
    assert!(control.terminate().success());
}

#[test]
fn an_open_api_says_so_and_mistakes_exit_with_64() {
    let cluster = Cluster::start();
    let control = cluster.control();
    assert!(control.stderr().contains("everybody on this machine may do everything"));
    let run = |flags: &[&str]| {
        let file = format!("--cluster={}", cluster.cluster_file().display());
        let output = Command::new(binary("nbd-control")).arg(file).args(flags).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let (code, text) = run(&["--check-config"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("127.0.0.1:8080"), "{text}");
    let (code, text) = run(&["--deadline=1ms"]);
    assert_eq!((code, text.lines().count()), (Some(64), 1), "{text}");
    let (code, text) = run(&["--check-config", "--token-file=/nowhere/tokens"]);
    assert_eq!(code, Some(64), "{text}");
    let (code, text) = run(&["--http=203.0.113.7:1"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("cannot listen on 203.0.113.7:1"), "{text}");
}
