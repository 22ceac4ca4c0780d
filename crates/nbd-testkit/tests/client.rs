//! The NBD client against a server that others wrote.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::collections::HashMap;
use std::net::TcpStream;
use std::process::{Child, Command as Process, Stdio};
use std::thread::sleep;
use std::time::Duration;

use nbd_proto::constants::CommandFlags;
use nbd_proto::{ClientGoal, Command, NbdError, ReplyStyle, RequestHeader};
use nbd_testkit::{
    ClientError, ConnectOptions, NbdClient, Reply, free_port, list_exports, require_tools, tools,
};

const SIZE: u64 = 16 << 20;

/// An nbdkit with 16 MiB of memory to serve; killed when dropped.
struct Nbdkit {
    child: Child,
    port: u16,
}

impl Nbdkit {
    fn start() -> Self {
        let port = free_port();
        let child = Process::new(tools::tool("nbdkit").unwrap())
            .args(["--foreground", "--ipaddr=127.0.0.1", &format!("--port={port}")])
            .args(["memory", "16M"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { child, port };
        for _ in 0..500 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return server;
            }
            sleep(Duration::from_millis(10));
        }
        panic!("nbdkit does not listen");
    }

    fn connect(&self, replies: ReplyStyle, goal: ClientGoal) -> NbdClient {
        let options = ConnectOptions { replies, goal, ..ConnectOptions::default() };
        NbdClient::connect_with(("127.0.0.1", self.port), &options).unwrap()
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_operation_works_in_every_style() {
    require_tools!["nbdkit"];
    let server = Nbdkit::start();
    for (replies, goal) in [
        (ReplyStyle::Simple, ClientGoal::ExportName),
        (ReplyStyle::Simple, ClientGoal::Go),
        (ReplyStyle::Structured, ClientGoal::Go),
        (ReplyStyle::Extended, ClientGoal::Go),
    ] {
        let mut client = server.connect(replies, goal);
        assert_eq!(client.size(), SIZE);
        assert!(client.attached().replies <= replies);
        client.write(1000, b"hello").unwrap();
        client.flush().unwrap();
        assert_eq!(client.read(999, 7).unwrap(), b"\0hello\0");
        client.write_zeroes(1001, 2, true).unwrap();
        assert_eq!(client.read(1000, 5).unwrap(), b"h\0\0lo");
        client.trim(0, 1 << 20).unwrap();
        assert_eq!(client.read(1000, 5).unwrap(), [0; 5]);
        let past_end = client.read(SIZE - 1, 2).unwrap_err();
        assert_eq!(past_end.nbd_error(), Some(NbdError::Inval), "{past_end}");
        if client.attached().allocation_context.is_some() {
            let extents = client.block_status(0, SIZE).unwrap();
            assert!(extents[0].hole && extents[0].zero, "{extents:?}");
        } else {
            assert_eq!(client.attached().replies, ReplyStyle::Simple);
        }
        assert_eq!(client.disconnect().unwrap(), []);
    }
}

#[test]
fn replies_are_matched_to_requests_in_any_order() {
    require_tools!["nbdkit"];
    let server = Nbdkit::start();
    let mut client = server.connect(ReplyStyle::Structured, ClientGoal::Go);
    for block in 0..64_u8 {
        let command = Command::Write { offset: u64::from(block) * 4096, len: 4096 };
        client.send(&command, &[block; 4096]).unwrap();
    }
    // Waits for its own reply, and keeps those of the writes.
    client.flush().unwrap();
    for _ in 0..64 {
        assert_eq!(client.receive().unwrap().1, Ok(Reply::Done));
    }
    let mut blocks = HashMap::new();
    for block in 0..64_u8 {
        let offset = u64::from(block) * 4096;
        let command = Command::Read { offset, len: 4096, dont_fragment: false };
        blocks.insert(client.send(&command, &[]).unwrap(), block);
    }
    assert_eq!(client.in_flight(), 64);
    while !blocks.is_empty() {
        let (cookie, outcome) = client.receive().unwrap();
        let block = blocks.remove(&cookie).unwrap();
        assert_eq!(outcome, Ok(Reply::Data(vec![block; 4096])));
    }
    assert_eq!(client.in_flight(), 0);
}

#[test]
fn misbehaviour_gets_through_to_the_server() {
    require_tools!["nbdkit"];
    let server = Nbdkit::start();
    let mut client = server.connect(ReplyStyle::Structured, ClientGoal::Go);
    let header = RequestHeader {
        flags: CommandFlags::NONE,
        command: 999,
        cookie: u64::MAX,
        offset: 0,
        length: 0,
    };
    client.send_header(&header, None).unwrap();
    let (cookie, outcome) = client.receive().unwrap();
    assert_eq!((cookie, outcome.unwrap_err().error), (u64::MAX, NbdError::Inval));
    std::io::Write::write_all(client.stream(), &[0; 28]).unwrap();
    assert!(matches!(client.receive(), Err(ClientError::Closed | ClientError::Io(_))));
}

#[test]
fn exports_are_listed() {
    require_tools!["nbdkit"];
    let server = Nbdkit::start();
    assert_eq!(list_exports(("127.0.0.1", server.port)).unwrap(), [""]);
}
