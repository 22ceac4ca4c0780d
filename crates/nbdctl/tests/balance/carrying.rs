//! What goes through arrives whole, both ways, and so does an end.

use std::io::Write as _;
use std::net::Shutdown;
use std::process::Command;

use bytes::BytesMut;
use nbd_proto::{Command as Request, encode_disconnect};
use nbd_testkit::{Reply, read_some, require_tools};

use crate::process::{Stack, wait_until};

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
}

#[test]
fn a_clients_bytes_are_whole_both_ways() {
    require_tools!["nbdcopy"];
    let stack = Stack::start(2, &[]);
    let uri = stack.balance.uri("copied");
    let directory = tempfile::tempdir().unwrap();
    let (image, back) = (directory.path().join("image"), directory.path().join("back"));
    let bytes: Vec<u8> =
        (0..32_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    run(Command::new("nbdcopy").arg(&image).arg(&uri));
    run(Command::new("nbdcopy").arg(&uri).arg(&back));
    assert!(std::fs::read(&back).unwrap()[..bytes.len()] == bytes);
    let page = stack.balance.get("/metrics").body;
    let moved = |name: &str| -> f64 {
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    assert!(moved("balance_received_bytes_total{") > f64::from(32 << 20), "{page}");
    assert!(moved("balance_sent_bytes_total{") > f64::from(32 << 20), "{page}");
}

#[test]
fn a_client_that_has_said_all_gets_every_answer() {
    let stack = Stack::start(1, &[]);
    let mut client = stack.balance.connect("v");
    for place in 0..32 {
        let write = Request::Write { offset: place << 16, len: 1 << 16 };
        client.send(&write, &vec![u8::try_from(place).unwrap(); 1 << 16]).unwrap();
    }
    // Of a client that just falls silent, a load balancer answers nothing more.
    let mut disconnect = BytesMut::new();
    encode_disconnect(&mut disconnect, client.attached().replies);
    client.stream().write_all(&disconnect).unwrap();
    client.stream().shutdown(Shutdown::Write).unwrap();
    for _ in 0..32 {
        assert_eq!(client.receive().unwrap().1.unwrap(), Reply::Done);
    }
    assert_eq!(read_some(client.stream(), &mut [0; 16]).unwrap(), 0, "and then the end");
    wait_until("it to be gone", || stack.balance.connections() == 0);
}
