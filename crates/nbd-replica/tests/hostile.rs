//! Hostile, broken and slow clients against a real node, while a good client is served.
//!
//! Each test attacks a node of its own in one way; [`scene::Scene`] runs the good client beside it
//! and checks afterwards that it was served correctly and in time, that a new client is, and that
//! the node neither ended nor logged an error. What the attacked connection itself must see is
//! checked by the test.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

#[path = "hostile/scene.rs"]
mod scene;
#[path = "hostile/sessions.rs"]
mod sessions;
#[path = "hostile/slow.rs"]
mod slow;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use nbd_proto::constants::{CommandFlags, command, option, option_reply};
use nbd_proto::option::{InfoOption, InfoRequests, encode_option};
use nbd_proto::{
    ClientGoal, Command, ExportName, NbdError, PendingRead, ReplyStyle, RequestHeader,
    encode_request,
};
use nbd_testkit::{
    ClientError, Cluster, ConnectOptions, NbdClient, NodeProcess, Reply, process, read_some, seed,
};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use socket2::SockRef;

use self::scene::{Scene, fresh_client_is_served};
use self::sessions::{HURRY, Leave, Recording, VICTIM, mutated, play, recordings};
use self::slow::{Fate, Herd};

const MIB: u64 = 1 << 20;

/// The most memory that a node may take under any of these attacks, unless its test says otherwise:
/// the budget for requests (96 MiB), caches (48 MiB of log here unless said otherwise, 16 + 32 MiB
/// of metadata) and 64 MiB for everything else.
const RSS_MAX: u64 = 256 * MIB;

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

fn attach(node: &NodeProcess, export: &str, replies: ReplyStyle) -> NbdClient {
    let export = export.to_owned();
    let options = ConnectOptions { export, replies, ..ConnectOptions::default() };
    NbdClient::connect_with(node.nbd_address(), &options).unwrap()
}

/// Leaves with a reset instead of an orderly close.
fn reset(mut client: NbdClient) {
    let socket = SockRef::from(&*client.stream());
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Waits until the node has `count` connections.
fn await_connections(node: &NodeProcess, count: f64) {
    let began = Instant::now();
    while node.metric("nbd_connections") != Some(count) {
        let connections = node.metric("nbd_connections");
        assert!(began.elapsed() < Duration::from_secs(20), "{connections:?} are not {count}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the server has closed this connection; whatever still comes is thrown away.
fn await_close(stream: &mut TcpStream, patience: Duration) {
    let began = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        let left = patience.saturating_sub(began.elapsed());
        assert!(!left.is_zero(), "the server has not closed the connection");
        stream.set_read_timeout(Some(left)).unwrap();
        match read_some(stream, &mut buffer) {
            Ok(0) => return,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Ok(_) | Err(_) => {}
        }
    }
}

#[test]
fn random_and_mutated_sessions_hurt_nobody() {
    const SESSIONS: usize = 3000;
    let seed = seed();
    // With a small log cache the node's memory reaches its level in the first half.
    let scene = Scene::start(Cluster::builder().argument("--log-cache-bytes=4MiB"));
    let address = scene.node().nbd_address();
    let recordings = recordings();

    // Unharmed, each is served to its end, whatever else the machine is doing.
    for recording in &recordings {
        let patience = Duration::from_secs(20);
        let answer = play(address, &recording.bytes, [0, 0], Leave::HalfClose, patience);
        assert!(answer.len() > 250, "only {} bytes were answered", answer.len());
    }
    let storm = |sessions: std::ops::Range<usize>| {
        let next = AtomicUsize::new(sessions.start);
        let work = || {
            loop {
                let session = next.fetch_add(1, Ordering::Relaxed);
                if session >= sessions.end {
                    return;
                }
                let mut random = StdRng::seed_from_u64(seed.wrapping_add(session as u64));
                let bytes = mutated(&mut random, &recordings);
                let cuts = [0, 1].map(|_| random.random_range(0..=bytes.len()));
                play(address, &bytes, cuts, Leave::ALL[random.random_range(0..4)], HURRY);
            }
        };
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(work))));
        scene.node().rss_bytes()
    };
    let half = storm(0..SESSIONS / 2);
    let end = storm(SESSIONS / 2..SESSIONS);
    let peak = process::rss_peak_bytes(scene.node().pid());
    println!("rss: {half} after half of the sessions, {end} after all, peak {peak}");
    assert!(peak < RSS_MAX, "the node took {peak} bytes of memory");
    assert!(end < half + 16 * MIB, "the node grew from {half} to {end} bytes");

    // The sessions did reach all the places they were made for.
    let log = scene.node().stderr();
    let count = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    for text in ["handshake failed", "attached", "connection ended"] {
        assert!(count(text) > SESSIONS / 60, "{text:?} was logged {} times", count(text));
    }
    let refused = scene.node().metric("nbd_requests_refused_total").unwrap();
    assert!(refused > 30.0, "{refused} requests were refused");
    await_connections(scene.node(), 1.0);
    scene.finish();
}

#[test]
fn sessions_cut_at_any_byte_hurt_nobody() {
    let scene = Scene::start(Cluster::builder());
    let address = scene.node().nbd_address();
    let recordings = recordings();
    thread::scope(|scope| {
        for (number, Recording { bytes, .. }) in recordings.iter().enumerate() {
            scope.spawn(move || {
                // All of the handshake and of the first header, then samples.
                let cuts = (0..300).chain((300..bytes.len()).step_by(97));
                for cut in cuts.filter(|cut| *cut < bytes.len()) {
                    let leave = Leave::ALL[(cut + number) % 3];
                    play(address, &bytes[..cut], [cut / 2, cut], leave, HURRY);
                }
            });
        }
    });
    await_connections(scene.node(), 1.0);
    scene.finish();
}

/// A write of `payload` as bytes on the wire.
fn write_request(style: ReplyStyle, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    let command = Command::Write { offset, len: payload.len() as u64 };
    encode_request(&mut out, style, 77, &command, false).unwrap();
    out.extend_from_slice(payload);
    out.to_vec()
}

#[test]
fn a_write_that_is_cut_off_never_takes_effect() {
    let scene = Scene::start(Cluster::builder());
    let content: Vec<u8> = (0..4 * MIB).map(|byte| (byte % 199) as u8).collect();
    let mut checker = attach(scene.node(), VICTIM, ReplyStyle::Extended);
    checker.write(0, &content).unwrap();

    let cut_off = |style, request: &[u8], cut: usize| {
        let mut client = attach(scene.node(), VICTIM, style);
        client.stream().write_all(&request[..cut]).unwrap();
        match cut % 3 {
            0 => drop(client),
            1 => reset(client),
            _ => {
                client.stream().shutdown(Shutdown::Write).unwrap();
                assert!(client.receive().is_err(), "a cut-off write was answered");
            }
        }
    };
    for style in STYLES {
        // Neither aligned nor within one block; every byte of the header, and samples beyond.
        let small = write_request(style, 5000, &[0xee; 9000]);
        let cuts = (0..small.len() - 9000).chain((small.len() - 9000..small.len()).step_by(211));
        for (number, cut) in cuts.chain([small.len() - 1]).enumerate() {
            cut_off(style, &small, cut);
            if number % 8 == 0 {
                assert!(checker.read(0, 20_000).unwrap() == content[..20_000], "{style:?} {cut}");
            }
        }
        // Large enough to be several mutations.
        let mib = 1 << 20;
        let large = write_request(style, 100_001, &[0xdd; 3 << 20]);
        for cut in [mib, mib + 1, 2 * mib + 5, 3 * mib, large.len() - 1] {
            cut_off(style, &large, cut);
        }
    }
    // Once the node is done with all of them, still nothing has happened.
    await_connections(scene.node(), 2.0);
    assert!(checker.read(0, content.len()).unwrap() == content);
    scene.finish();
}

#[test]
fn what_was_sent_before_the_cut_takes_effect_whole() {
    let scene = Scene::start(Cluster::builder());
    for round in 0..20_u8 {
        let mut client = attach(scene.node(), VICTIM, ReplyStyle::Structured);
        let mut bytes = write_request(ReplyStyle::Structured, 8000, &[0x40 + round; 10_000]);
        let cut_off = write_request(ReplyStyle::Structured, 8000, &[0xee; 10_000]);
        bytes.extend_from_slice(&cut_off[..cut_off.len() - 1]);
        client.stream().write_all(&bytes).unwrap();
        // The first write is answered before the connection ends, or it is not: but never in part.
        let answered = client.stream().shutdown(Shutdown::Write).is_ok();
        assert!(answered);
        await_close(client.stream(), Duration::from_secs(10));
    }
    await_connections(scene.node(), 1.0);
    let mut checker = attach(scene.node(), VICTIM, ReplyStyle::Structured);
    let content = checker.read(8000, 10_000).unwrap();
    assert!(content.iter().all(|byte| *byte == content[0]), "a write took effect in part");
    assert!((0x40..0x40 + 20).contains(&content[0]), "a cut-off write took effect");
    scene.finish();
}

#[test]
fn slow_clients_are_dropped_in_time_and_hold_up_nobody() {
    let scene = Scene::start(Cluster::builder());
    let address = scene.node().nbd_address();
    let mut checker = attach(scene.node(), VICTIM, ReplyStyle::Extended);
    checker.write(0, &[0x11; 65_536]).unwrap();

    // Attached and idle: kept for ever.
    let mut idle: Vec<NbdClient> =
        (0..20).map(|_| attach(scene.node(), VICTIM, ReplyStyle::Structured)).collect();
    // Silent in the middle of a payload: dropped after 30 s.
    let mut stalled: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut client = attach(scene.node(), VICTIM, ReplyStyle::Simple);
            let request = write_request(ReplyStyle::Simple, 0, &[0xee; 65_536]);
            client.stream().write_all(&request[..30_000]).unwrap();
            client.stream().try_clone().unwrap()
        })
        .collect();
    let stalled_since = Instant::now();

    // One byte each 100 ms: the first kind cannot be done in the 10 s a handshake may take, the
    // second can.
    let mut endless = vec![0, 0, 0, 3];
    let mut out = BytesMut::new();
    encode_option(&mut out, 0x4242, &[0; 60_000]);
    endless.extend_from_slice(&out);
    let mut patient = vec![0, 0, 0, 3];
    let mut out = BytesMut::new();
    encode_option(&mut out, option::EXPORT_NAME, b"patient");
    patient.extend_from_slice(&out);
    let mut herd = Herd::new(address);
    herd.join(40, &[], Fate::Dropped);
    herd.join(40, &endless, Fate::Dropped);
    herd.join(10, &endless[..1], Fate::Dropped);
    herd.join(10, &patient[..patient.len() - 1], Fate::Dropped);
    herd.join(5, &patient, Fate::Attached);
    herd.half_close(20);
    herd.run(Duration::from_millis(100), Duration::from_secs(10));

    for client in &mut idle {
        assert_eq!(client.read(65_000, 536).unwrap(), [0x11; 536]);
    }
    for stream in &mut stalled {
        await_close(stream, Duration::from_secs(40));
    }
    let stalled_for = stalled_since.elapsed();
    assert!(stalled_for > Duration::from_secs(28), "dropped after {stalled_for:?} already");
    assert_eq!(checker.read(0, 65_536).unwrap(), [0x11; 65_536]);
    drop((idle, herd));
    await_connections(scene.node(), 2.0);
    scene.finish();
}

/// Sends read requests until the server takes no more for a while, or `limit` of them.
fn send_reads(client: &mut NbdClient, len: u64, limit: usize) -> usize {
    let stream = client.stream();
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut out = BytesMut::new();
    for number in 0..limit {
        let command = Command::Read { offset: 0, len, dont_fragment: false };
        out.clear();
        encode_request(&mut out, ReplyStyle::Simple, number as u64, &command, false).unwrap();
        if stream.write_all(&out).is_err() {
            return number;
        }
    }
    limit
}

#[test]
fn clients_that_do_not_read_their_replies_cost_little() {
    // Simple replies carry zeroes as bytes, so the volume can stay empty.
    let scene = Scene::start(Cluster::builder().argument("--log-cache-bytes=4MiB"));
    let mut hogs = Vec::new();
    // Each asks for far more than is kept for it: 64 or 128 MiB of replies.
    for len in [1 << 20, 1 << 20, 1 << 20, 4096] {
        for _ in 0..6 {
            let mut client = attach(scene.node(), VICTIM, ReplyStyle::Simple);
            send_reads(&mut client, len, if len > 4096 { 64 } else { 32_000 });
            hogs.push(client);
        }
    }
    thread::sleep(Duration::from_secs(2));
    let rss = process::rss_peak_bytes(scene.node().pid());
    println!("rss peak with {} clients that do not read: {rss}", hogs.len());
    assert!(rss < RSS_MAX, "the node took {rss} bytes of memory");
    fresh_client_is_served(scene.node());
    // One that begins to read after all gets everything it asked for.
    let mut late = hogs.swap_remove(0);
    let mut expected = 64 * ((1 << 20) + 16);
    let mut buffer = vec![0; 1 << 20];
    while expected > 0 {
        let count = read_some(late.stream(), &mut buffer).unwrap();
        assert!(count > 0, "the server closed with {expected} bytes to come");
        expected -= count;
    }
    drop((late, hogs));
    await_connections(scene.node(), 1.0);
    scene.finish();
}

/// Clients that announce a payload of 32 MiB and send a byte at a time.
const TRICKLERS: usize = 8;

/// Longest wait of a large write behind them: two of them hold the room at a time, and lose it
/// after 5 s.
const TRICKLED_WAIT_MAX: Duration = Duration::from_secs(45);

#[test]
fn trickled_payloads_hold_up_no_small_request() {
    let scene = Scene::start(Cluster::builder().argument("--log-cache-bytes=4MiB"));
    let mut clients: Vec<NbdClient> = (0..TRICKLERS)
        .map(|number| {
            let style = STYLES[number % 3];
            let mut client = attach(scene.node(), VICTIM, style);
            let request = write_request(style, 0, &[0; 32 << 20]);
            client.stream().write_all(&request[..40]).unwrap();
            client
        })
        .collect();
    // A client that means what it announces gets its turn: who holds room for a large payload and
    // does not fill it while others wait is disconnected.
    let address = scene.node().nbd_address();
    let large = thread::spawn(move || {
        let mut client = NbdClient::connect(address, "large").unwrap();
        let began = Instant::now();
        client.write(0, &vec![7; 32 << 20]).unwrap();
        began.elapsed()
    });
    let mut dropped = 0;
    while !large.is_finished() {
        dropped = 0;
        for client in &mut clients {
            dropped += usize::from(client.stream().write_all(&[0xee]).is_err());
        }
        thread::sleep(Duration::from_millis(100));
    }
    let waited = large.join().unwrap();
    println!("a large write behind {TRICKLERS} tricklers took {waited:?}; {dropped} were dropped");
    assert!(dropped < clients.len(), "those that hold nothing are not in the way");
    assert!(waited < TRICKLED_WAIT_MAX, "a large write waited {waited:?}");
    let rss = process::rss_peak_bytes(scene.node().pid());
    println!("rss peak with {} payloads announced: {rss}", clients.len());
    assert!(rss < RSS_MAX, "the node took {rss} bytes of memory");
    // Small requests on a new connection, too.
    let mut small = attach(scene.node(), "small", ReplyStyle::Extended);
    small.write(0, &[1; 65_536]).unwrap();
    assert_eq!(small.read(0, 65_536).unwrap(), [1; 65_536]);
    drop((small, clients));
    await_connections(scene.node(), 1.0);
    // Nothing of it took effect, and the room for large payloads is back.
    let mut victim = attach(scene.node(), VICTIM, ReplyStyle::Extended);
    assert!(victim.read(0, 32 << 20).unwrap().iter().all(|byte| *byte == 0));
    let large: Vec<u8> = (0..32 * MIB).map(|byte| (byte % 251) as u8).collect();
    victim.write(0, &large).unwrap();
    assert!(victim.read(0, large.len()).unwrap() == large);
    scene.finish();
}

#[test]
fn surplus_connections_are_closed_before_the_greeting() {
    const MAX: usize = 16;
    let argument = format!("--connections-max={MAX}");
    let scene = Scene::start(Cluster::builder().argument(&argument));
    let mut served: Vec<NbdClient> = (1..MAX)
        .map(|number| attach(scene.node(), &format!("vol{number}"), ReplyStyle::Extended))
        .collect();
    let surplus = 30;
    for _ in 0..surplus {
        let mut stream = TcpStream::connect(scene.node().nbd_address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut greeting = Vec::new();
        // A reset does as well: it says the same.
        let _ = stream.read_to_end(&mut greeting);
        assert_eq!(greeting, b"", "a connection too many was greeted");
    }
    let refused = scene.node().metric("nbd_connections_refused_total");
    assert_eq!(refused, Some(f64::from(surplus)));
    assert_eq!(scene.node().metric("nbd_connections"), Some(16.0));
    for (client, byte) in served.iter_mut().zip(1..) {
        client.write(0, &[byte; 4096]).unwrap();
    }
    // Whether they leave by the book or not, there is room again.
    let again = served.split_off(5);
    for (number, client) in again.into_iter().enumerate() {
        match number % 3 {
            0 => drop(client.disconnect().unwrap()),
            1 => drop(client),
            _ => reset(client),
        }
    }
    await_connections(scene.node(), 6.0);
    let more: Vec<NbdClient> = (6..MAX)
        .map(|number| attach(scene.node(), &format!("vol{number}"), ReplyStyle::Extended))
        .collect();
    for (mut client, byte) in served.into_iter().chain(more).zip(1..) {
        assert_eq!(client.read(0, 4096).unwrap(), [byte; 4096]);
    }
    await_connections(scene.node(), 1.0);
    scene.finish();
}

/// A connection in the middle of its handshake.
struct Negotiation {
    stream: TcpStream,
}

impl Negotiation {
    fn begin(node: &NodeProcess) -> Self {
        let mut stream = TcpStream::connect(node.nbd_address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting[..8], *b"NBDMAGIC");
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        Self { stream }
    }

    /// Sends an option and returns the type of the last reply to it.
    fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        let mut out = BytesMut::new();
        encode_option(&mut out, option, data);
        self.stream.write_all(&out).unwrap();
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header).unwrap();
            let mut header = &header[8..];
            assert_eq!(header.get_u32(), option, "a reply to another option");
            let (reply, length) = (header.get_u32(), header.get_u32());
            self.stream.read_exact(&mut vec![0; length as usize]).unwrap();
            if reply == option_reply::ACK || reply & option_reply::ERROR_BIT != 0 {
                return reply;
            }
        }
    }

    fn await_close(mut self) {
        await_close(&mut self.stream, Duration::from_secs(5));
    }
}

#[test]
fn refused_options_keep_the_connection() {
    let scene = Scene::start(Cluster::builder());
    let requests = InfoRequests { block_size: true, ..InfoRequests::default() };
    let go = |name: &str| {
        let name = ExportName::from_bytes(name.as_bytes()).unwrap();
        InfoOption { name, requests }.encode().to_vec()
    };
    let mut client = Negotiation::begin(scene.node());
    let (unsup, invalid) = (option_reply::ERR_UNSUP, option_reply::ERR_INVALID);
    let trailing = [go(VICTIM), vec![0; 16]].concat();
    let lying = [&[0xff; 4][..], VICTIM.as_bytes(), &[0; 2]].concat();
    let not_utf8 = [&[0, 0, 0, 2][..], &[0xff, 0xfe], &[0, 0]].concat();
    let refused: [(u32, &[u8], u32); 16] = [
        (0x4242, &[], unsup),
        (0x4242, &[1; 100], unsup),
        (0x4242, &[1; 1 << 20], unsup),
        (u32::MAX, b"x", unsup),
        (option::PEEK_EXPORT, &[], unsup),
        (option::STARTTLS, &[], option_reply::ERR_POLICY),
        (option::STARTTLS, b"data", invalid),
        (option::LIST, b"data", invalid),
        (option::STRUCTURED_REPLY, b"data", invalid),
        (option::GO, &[], invalid),
        (option::GO, &trailing, invalid),
        (option::GO, &lying, invalid),
        (option::GO, &[0; 100_000], option_reply::ERR_TOO_BIG),
        (option::INFO, &not_utf8, invalid),
        (option::GO, &go("a\nb"), option_reply::ERR_UNKNOWN),
        (option::GO, &go(&"x".repeat(300)), option_reply::ERR_UNKNOWN),
    ];
    for (option, data, expected) in refused {
        let found = client.option(option, data);
        assert_eq!(found, expected, "option {option} with {} bytes", data.len());
    }
    assert_eq!(client.option(option::GO, &go(VICTIM)), option_reply::ACK);
    // And it is attached indeed: a flush is answered.
    let mut out = BytesMut::new();
    encode_request(&mut out, ReplyStyle::Simple, 42, &Command::Flush, false).unwrap();
    client.stream.write_all(&out).unwrap();
    let mut reply = [0; 16];
    client.stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 42]);
    drop(client);

    // What no connection survives: too much to skip, too many options, no options at all.
    let mut client = Negotiation::begin(scene.node());
    client.stream.write_all(b"IHAVEOPT\0\0\x42\x42\xff\xff\xff\xff").unwrap();
    client.await_close();
    let mut client = Negotiation::begin(scene.node());
    for _ in 0..256 {
        assert_eq!(client.option(0x4242, &[]), unsup);
    }
    client.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
    client.await_close();
    let mut client = Negotiation::begin(scene.node());
    client.stream.write_all(&[0; 16]).unwrap();
    client.await_close();
    scene.finish();
}

/// A request that is refused: command, flags, offset, length, bytes of payload, error.
type Refused = (u16, CommandFlags, u64, u64, usize, NbdError);

fn refused_requests(style: ReplyStyle, size: u64) -> Vec<Refused> {
    use NbdError::{Inval, NoSpc, Overflow};
    let none = CommandFlags::NONE;
    let (no_hole, odd) = (CommandFlags::NO_HOLE, CommandFlags::from_bits(1 << 14));
    let extended = style == ReplyStyle::Extended;
    let payload = if extended { CommandFlags::PAYLOAD_LEN } else { none };
    let (huge, too_long) = (32 << 20, (32 << 20) + 1);
    let mut all = vec![
        (999, none, 0, 0, 0, Inval),
        (u16::MAX, none, 0, 4096, 0, Inval),
        (command::RESIZE, none, 0, 1 << 30, 0, Inval),
        (command::READ, no_hole, 0, 512, 0, Inval),
        (command::READ, odd, 0, 512, 0, Inval),
        (command::READ, none, size, 1, 0, Inval),
        (command::READ, none, size - 1, 2, 0, Inval),
        (command::READ, none, u64::MAX, 2, 0, Inval),
        (command::READ, none, u64::MAX - 511, 512, 0, Inval),
        (command::READ, none, 1 << 63, 512, 0, Inval),
        (command::READ, none, 0, 0xffff_ffff, 0, Inval),
        (command::READ, none, 0, too_long, 0, Overflow),
        (command::WRITE, odd | payload, 0, 5000, 5000, Inval),
        (command::WRITE, no_hole | payload, 0, 5000, 5000, Inval),
        (command::WRITE, payload, size - 1, 2, 2, NoSpc),
        (command::WRITE, payload, u64::MAX, 2, 2, NoSpc),
        (command::WRITE, payload, u64::MAX - 4095, 4096, 4096, NoSpc),
        (command::WRITE, payload, size - 1, huge, 32 << 20, NoSpc),
        (command::WRITE, payload, 0, too_long, (32 << 20) + 1, Inval),
        (command::WRITE, payload, 0, 64 << 20, 64 << 20, Inval),
        (command::TRIM, none, size - 1, 2, 0, Inval),
        (command::TRIM, none, u64::MAX - 1, 0xffff_ffff, 0, Inval),
        (command::WRITE_ZEROES, none, size - 1, 2, 0, NoSpc),
        (command::WRITE_ZEROES, none, u64::MAX - 1, 0xffff_ffff, 0, NoSpc),
        (command::CACHE, none, size, 1, 0, Inval),
        (command::FLUSH, none, 1, 0, 0, Inval),
        (command::FLUSH, none, 0, 1, 0, Inval),
        (command::BLOCK_STATUS, none, size, 1, 0, Inval),
        (command::BLOCK_STATUS, none, 0, 0, 0, Inval),
    ];
    if extended {
        all.extend([
            (command::READ, none, 0, 1 << 63, 0, Inval),
            (command::READ, none, 1, u64::MAX, 0, Inval),
            (command::READ, payload, 0, 100, 100, Inval),
            (999, payload, 0, 100, 100, Inval),
            (command::TRIM, none, 1, u64::MAX, 0, Inval),
        ]);
    }
    all
}

#[test]
fn refused_requests_keep_the_connection() {
    let scene = Scene::start(Cluster::builder());
    for style in STYLES {
        let mut client = attach(scene.node(), VICTIM, style);
        let content: Vec<u8> = (0..100_000_u32).map(|byte| (byte % 241) as u8).collect();
        client.write(0, &content).unwrap();
        for (number, refused) in refused_requests(style, client.size()).into_iter().enumerate() {
            let (command, flags, offset, length, payload, error) = refused;
            let cookie = 0xc00c_1e00 + number as u64;
            let read = (command == command::READ).then_some(PendingRead { offset, len: length });
            client
                .send_header(&RequestHeader { flags, command, cookie, offset, length }, read)
                .unwrap();
            client.stream().write_all(&vec![0xee; payload]).unwrap();
            let answer = client.receive();
            let (answered, outcome) =
                answer.unwrap_or_else(|error| panic!("{style:?}: {refused:?}: {error}"));
            assert_eq!(answered, cookie);
            let found = outcome.unwrap_err().error;
            assert_eq!(found, error, "{style:?}: {refused:?}");
            assert!(client.read(0, content.len()).unwrap() == content, "{style:?}: {refused:?}");
        }
        // One byte more than is drained: the connection is closed.
        let flags = match style {
            ReplyStyle::Extended => CommandFlags::PAYLOAD_LEN,
            _ => CommandFlags::NONE,
        };
        let (command, cookie, offset) = (command::WRITE, 1, 0);
        let header = RequestHeader { flags, command, cookie, offset, length: (64 << 20) + 1 };
        client.send_header(&header, None).unwrap();
        await_close(client.stream(), Duration::from_secs(5));
    }
    scene.finish();
}

#[test]
fn block_status_without_a_context_is_refused() {
    let scene = Scene::start(Cluster::builder());
    let node = scene.node();
    for goal in [ClientGoal::Go, ClientGoal::ExportName] {
        let (export, replies) = (VICTIM.to_owned(), ReplyStyle::Structured);
        let allocation_context = false;
        let options =
            ConnectOptions { export, replies, goal, allocation_context, ..Default::default() };
        let mut client = NbdClient::connect_with(node.nbd_address(), &options).unwrap();
        let refused = client.block_status(0, 4096).unwrap_err();
        assert_eq!(refused.nbd_error(), Some(NbdError::Inval));
        client.write(0, b"x").unwrap();
    }
    scene.finish();
}

#[test]
fn memory_is_bounded_with_many_busy_clients() {
    const CLIENTS: u8 = 64;
    const DEPTH: usize = 32;
    // A small log cache is full before the first half begins, however slow the machine is.
    let builder = Cluster::builder().default_size("1GiB").argument("--log-cache-bytes=4MiB");
    let scene = Scene::start(builder);
    let stop = AtomicBool::new(false);
    let operations = AtomicUsize::new(0);
    let work = |number: u8| {
        let mut client = attach(scene.node(), "busy", STYLES[usize::from(number % 3)]);
        let mut random = StdRng::seed_from_u64(number.into());
        let mut send = |client: &mut NbdClient| {
            let offset = u64::from(number) * 16 * MIB + random.random_range(0..4096) * 4096;
            if random.random_bool(0.5) {
                client.send(&Command::Write { offset, len: 4096 }, &[number; 4096]).unwrap();
            } else {
                let read = Command::Read { offset, len: 4096, dont_fragment: false };
                client.send(&read, &[]).unwrap();
            }
        };
        (0..DEPTH).for_each(|_| send(&mut client));
        while !stop.load(Ordering::Relaxed) {
            take_answer(&mut client, number);
            operations.fetch_add(1, Ordering::Relaxed);
            send(&mut client);
        }
        while client.in_flight() > 0 {
            take_answer(&mut client, number);
        }
        client.disconnect().unwrap();
    };
    let (mut halves, pid) = ([0, 0], scene.node().pid());
    thread::scope(|scope| {
        let work = &work;
        (0..CLIENTS).for_each(|number| drop(scope.spawn(move || work(number))));
        // The caches fill first.
        thread::sleep(Duration::from_secs(3));
        for half in &mut halves {
            for _ in 0..40 {
                thread::sleep(Duration::from_millis(100));
                *half = process::rss_bytes(pid).max(*half);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let peak = process::rss_peak_bytes(pid);
    println!("{operations:?} operations; rss by halves {halves:?}, peak {peak}");
    assert!(peak < RSS_MAX, "the node took {peak} bytes of memory");
    assert!(halves[1] < halves[0] + 24 * MIB, "memory grows: {halves:?}");
    scene.finish();
}

/// Blocks hold zeroes, or what their one client writes.
fn take_answer(client: &mut NbdClient, number: u8) {
    match client.receive().unwrap().1.unwrap() {
        Reply::Data(data) => {
            let own = |byte: &u8| *byte == 0 || *byte == number;
            assert!(data.iter().all(own), "another client's bytes");
        }
        reply => assert_eq!(reply, Reply::Done),
    }
}

#[test]
fn a_client_that_breaks_the_protocol_is_dropped_alone() {
    let scene = Scene::start(Cluster::builder());
    for style in STYLES {
        let mut client = attach(scene.node(), VICTIM, style);
        client.stream().write_all(&[0; 32]).unwrap();
        assert!(matches!(client.receive(), Err(ClientError::Closed | ClientError::Io(_))));
        // A write under way is carried out although its client then talks nonsense.
        let mut client = attach(scene.node(), VICTIM, style);
        client.write(0, &[7; 4096]).unwrap();
        client.stream().write_all(&[0xff; 1000]).unwrap();
        await_close(client.stream(), Duration::from_secs(5));
        let mut client = attach(scene.node(), VICTIM, style);
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    }
    scene.finish();
}
