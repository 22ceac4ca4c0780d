//! The client against servers that others wrote, and against one that lies.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nbd_client::{Address, ConnectError, Connection, Error, Lost, Options};
use nbd_proto::constants::TransmissionFlags;
use nbd_proto::{
    ExchangeError, ExportInfo, ExportName, ExportRefusal, HandshakeEvent, NbdError, ReplyEncoder,
    ReplyStyle, ReplyTo, ServerHandshake,
};
use nbd_testkit::{require_tools, tools};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Somebody's server of 16 MiB on a Unix socket; killed when dropped.
struct Server {
    child: Child,
    address: Address,
    directory: tempfile::TempDir,
}

impl Server {
    async fn start(program: &str, arguments: impl FnOnce(&str) -> Vec<String>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd");
        let child = Process::new(tools::tool(program).unwrap())
            .args(arguments(socket.to_str().unwrap()))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let address = Address::Unix(socket);
        let server = Self { child, address, directory };
        for _ in 0..1000 {
            if Connection::open(&server.address, &ExportName::default(), &Options::default())
                .await
                .is_ok()
            {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{program} does not listen in {}", server.directory.path().display());
    }

    async fn nbdkit() -> Self {
        Self::start("nbdkit", |socket| {
            ["--foreground", "--unix", socket, "memory", "16M"].map(str::to_owned).to_vec()
        })
        .await
    }

    async fn connect(&self, replies: ReplyStyle) -> Connection {
        let options = Options { replies, ..Options::default() };
        Connection::open(&self.address, &ExportName::default(), &options).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn every_operation_works_in_every_style() {
    require_tools!["nbdkit"];
    let server = Server::nbdkit().await;
    for replies in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let connection = server.connect(replies).await;
        assert_eq!(connection.size(), 16 << 20);
        assert!(connection.attached().replies <= replies);
        assert!(connection.can(TransmissionFlags::SEND_FLUSH));
        connection.write(1000, Bytes::from_static(b"hello")).await.unwrap();
        connection.flush().await.unwrap();
        assert_eq!(connection.read(999, 7).await.unwrap(), b"\0hello\0");
        connection.write_zeroes(1001, 2).await.unwrap();
        assert_eq!(connection.read(1000, 5).await.unwrap(), b"h\0\0lo");
        let past_end = connection.read((16 << 20) - 1, 2).await.unwrap_err();
        assert_eq!(past_end.nbd_error(), Some(NbdError::Inval), "{past_end}");
        if connection.attached().allocation_context.is_some() {
            let extents = connection.block_status(8 << 20, 1 << 20).await.unwrap();
            assert!(extents[0].zero && extents[0].len == 1 << 20, "{extents:?}");
        }
        connection.write_zeroes(0, 16 << 20).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_in_flight_find_their_answers() {
    require_tools!["nbdkit"];
    let server = Server::nbdkit().await;
    let connection = server.connect(ReplyStyle::Extended).await;
    let each = |work: fn(Connection, u8) -> tokio::task::JoinHandle<()>| {
        let tasks: Vec<_> = (0..64).map(|block| work(connection.clone(), block)).collect();
        async {
            for task in tasks {
                task.await.unwrap();
            }
        }
    };
    each(|connection, block| {
        tokio::spawn(async move {
            let data = Bytes::from(vec![block; 256 << 10]);
            connection.write(u64::from(block) * (256 << 10), data).await.unwrap();
        })
    })
    .await;
    each(|connection, block| {
        tokio::spawn(async move {
            let data = connection.read(u64::from(block) * (256 << 10), 256 << 10).await.unwrap();
            assert!(data.iter().all(|byte| *byte == block) && data.len() == 256 << 10);
        })
    })
    .await;
}

#[tokio::test]
async fn a_server_that_dies_is_a_lost_connection() {
    require_tools!["nbdkit"];
    let mut server = Server::nbdkit().await;
    let connection = server.connect(ReplyStyle::Structured).await;
    server.child.kill().unwrap();
    let error = connection.read(0, 512).await.unwrap_err();
    assert!(error.is_transient() && matches!(error, Error::Lost(_)), "{error}");
    assert!(connection.has_ended());
}

/// A server that attaches everything, and then answers every request with what `answer` says.
async fn liar(answer: fn(&ReplyEncoder, &mut BytesMut)) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if let Some(encoder) = attach(&mut stream).await {
                let mut bytes = BytesMut::new();
                answer(&encoder, &mut bytes);
                stream.write_all(&bytes).await.unwrap();
            }
            open.push(stream);
        }
    });
    address
}

async fn attach(stream: &mut TcpStream) -> Option<ReplyEncoder> {
    let (mut handshake, mut input) = (ServerHandshake::new(), BytesMut::new());
    let encoder = loop {
        let event = handshake.receive(&mut input).unwrap();
        let mut attached = None;
        if let Some(HandshakeEvent::Resolve { .. }) = event {
            let name = ExportName::default();
            let description = String::new();
            let info = ExportInfo { name, description, size: 1 << 20, read_only: false };
            attached = handshake.answer_export(Ok::<_, ExportRefusal>(info));
        }
        stream.write_all(&handshake.take_output()).await.unwrap();
        if let Some(negotiated) = attached {
            break ReplyEncoder::new(&negotiated);
        }
        if event.is_none() && stream.read_buf(&mut input).await.unwrap() == 0 {
            return None;
        }
    };
    // The request.
    stream.read_buf(&mut input).await.unwrap();
    Some(encoder)
}

const TO: ReplyTo = ReplyTo { cookie: 0, offset: 0 };

#[tokio::test]
async fn lies_are_errors() {
    type Lie = fn(&ReplyEncoder, &mut BytesMut);
    type Noticed = fn(&Lost) -> bool;
    let lies: [(Lie, Noticed); 5] = [
        (
            |encoder, out| encoder.done(out, &ReplyTo { cookie: 77, offset: 0 }),
            |lost| matches!(lost, Lost::Protocol(ExchangeError::UnknownCookie { cookie: 77 })),
        ),
        (
            |encoder, out| {
                encoder.read_hole(out, &TO, 0, 512, false);
                encoder.read_hole(out, &TO, 256, 256, true);
            },
            |lost| matches!(lost, Lost::Protocol(ExchangeError::Misplaced { .. })),
        ),
        (
            |encoder, out| encoder.read_hole(out, &TO, 0, 1 << 20, true),
            |lost| matches!(lost, Lost::Protocol(ExchangeError::Reply(_))),
        ),
        (
            |encoder, out| encoder.done(out, &TO),
            |lost| matches!(lost, Lost::Protocol(ExchangeError::Incomplete { .. })),
        ),
        (
            |_, out| out.extend_from_slice(&[0xff; 64]),
            |lost| matches!(lost, Lost::Protocol(ExchangeError::Reply(_))),
        ),
    ];
    for (place, (lie, expected)) in lies.into_iter().enumerate() {
        let address = liar(lie).await;
        let name = ExportName::default();
        let connection = Connection::open(&address, &name, &Options::default()).await.unwrap();
        let error = connection.read(0, 512).await.unwrap_err();
        assert!(!error.is_transient(), "{place}: {error}");
        assert!(matches!(&error, Error::Lost(lost) if expected(lost)), "{place}: {error}");
    }
}

#[tokio::test]
async fn silence_is_an_error_after_a_while_and_so_is_chatter() {
    let silent: fn(&ReplyEncoder, &mut BytesMut) = |_, _| {};
    // Errors that do not end the reply can go on for ever; they do not count as getting on.
    let chatter: fn(&ReplyEncoder, &mut BytesMut) = |encoder, out| {
        for _ in 0..1000 {
            let from = out.len();
            encoder.error(out, &TO, NbdError::Io, "");
            out[from + 5] = 0;
        }
    };
    for answer in [silent, chatter] {
        let address = liar(answer).await;
        let silence_max = Duration::from_millis(300);
        let options = Options { silence_max, ..Options::default() };
        let connection =
            Connection::open(&address, &ExportName::default(), &options).await.unwrap();
        let error = connection.read(0, 512).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(
            matches!(&error, Error::Lost(lost) if matches!(**lost, Lost::Silent(_))),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_handshake_has_a_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    let options = Options { connect_max: Duration::from_millis(200), ..Options::default() };
    let error = Connection::open(&address, &ExportName::default(), &options).await.unwrap_err();
    assert!(matches!(error, ConnectError::Silent(_)) && error.is_transient(), "{error}");
}
