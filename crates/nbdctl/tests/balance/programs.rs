//! One program, several names.

use std::os::unix::fs::symlink;
use std::process::{Command, Output};

use crate::process::{Stack, nbdctl};

fn probe(url: &str) -> Output {
    nbdctl().args(["probe", url]).output().unwrap()
}

#[test]
fn a_probe_says_by_its_exit_code_how_it_was_answered() {
    let stack = Stack::start(1, &[]);
    let at = stack.balance.http();
    let healthy = probe(&format!("http://{at}/health"));
    assert_eq!(healthy.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&healthy.stdout).contains("\"status\":\"ok\""), "{healthy:?}");
    let absent = probe(&format!("http://{at}/nothing"));
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("404"), "{absent:?}");
    drop(stack);
    assert_eq!(probe(&format!("http://{at}/health")).status.code(), Some(1), "nobody there");
    assert_eq!(probe("nowhere").status.code(), Some(64));
    let asks = nbdctl().args(["--server=http://x", "probe", "http://x"]).output().unwrap();
    assert_eq!(asks.status.code(), Some(64), "no flag of the control API");
}

// Goal: as in the image, where the services are links to one program.
#[test]
fn the_services_are_there_by_their_names() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["nbd-replica", "nbd-lb", "nbd-control"] {
        let link = directory.path().join(name);
        symlink(env!("CARGO_BIN_EXE_nbdctl"), &link).unwrap();
        let output = Command::new(&link).arg("--version").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.starts_with(&format!("{name} ")), "{said}");
    }
    let output = nbdctl().arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("nbdctl "));
}
