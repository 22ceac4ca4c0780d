//! What clients send: valid sessions as recordings, and what becomes of them in hostile hands.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_proto::constants::{CommandFlags, command, option};
use nbd_proto::option::{InfoOption, InfoRequests, MetaContextOption, encode_option};
use nbd_proto::{ExportName, ReplyStyle, RequestHeader};
use nbd_testkit::read_some;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _};
use socket2::SockRef;

/// The volume that hostile sessions attach, as long as nobody garbles its name.
pub(crate) const VICTIM: &str = "victim";

/// Everything a hostile session may take, from its first byte to its last.
pub(crate) const HURRY: Duration = Duration::from_millis(300);

/// All that a client sends in one session.
#[derive(Clone, Default)]
pub(crate) struct Recording {
    pub(crate) bytes: Vec<u8>,
    /// Where lengths, counts and offsets stand: a liar's favourite places.
    numbers: Vec<Range<usize>>,
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Leave {
    /// Closes at once, whatever the server has still to say.
    Close,
    /// Resets the connection at once.
    Reset,
    /// Says that it sends no more, and reads to the end.
    HalfClose,
    /// Reads for a while, saying nothing, then closes.
    Linger,
}

impl Leave {
    pub(crate) const ALL: [Self; 4] = [Self::Close, Self::Reset, Self::HalfClose, Self::Linger];
}

/// Valid sessions that together send every option and every command, in every reply style.
pub(crate) fn recordings() -> Vec<Recording> {
    let transmissions = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
    let attached = transmissions.into_iter().map(|style| {
        let mut recording = Recording::default();
        recording.flags(3);
        match style {
            ReplyStyle::Simple => recording.option(option::EXPORT_NAME, VICTIM.as_bytes(), &[]),
            _ => recording.go(style),
        }
        recording.transmission(style);
        recording
    });
    attached.chain([negotiation()]).collect()
}

/// Every option that does not attach.
fn negotiation() -> Recording {
    let mut recording = Recording::default();
    recording.flags(3);
    let info = InfoOption { name: victim(), requests: InfoRequests::default() }.encode();
    recording.option(option::LIST, &[], &[]);
    recording.option(option::INFO, &info, &[0..4, info.len() - 2..info.len()]);
    recording.option(option::STARTTLS, &[], &[]);
    recording.option(option::PEEK_EXPORT, &[], &[]);
    recording.option(option::STRUCTURED_REPLY, &[], &[]);
    recording.contexts(option::LIST_META_CONTEXT, &[b"base:", b"base:allocation", b"x-none:y"]);
    recording.option(0x4242_4242, &[7; 300], &[]);
    recording.option(option::ABORT, &[], &[]);
    recording
}

fn victim() -> ExportName {
    ExportName::from_bytes(VICTIM.as_bytes()).expect("a valid name")
}

impl Recording {
    fn flags(&mut self, flags: u32) {
        self.bytes.extend_from_slice(&flags.to_be_bytes());
    }

    /// Adds an option; `numbers` are places in its data.
    fn option(&mut self, option: u32, data: &[u8], numbers: &[Range<usize>]) {
        let start = self.bytes.len();
        let mut out = BytesMut::new();
        encode_option(&mut out, option, data);
        self.bytes.extend_from_slice(&out);
        self.numbers.push(start + 12..start + 16);
        let shifted = |range: &Range<usize>| start + 16 + range.start..start + 16 + range.end;
        self.numbers.extend(numbers.iter().map(shifted));
    }

    fn contexts(&mut self, option: u32, queries: &[&[u8]]) {
        let data = MetaContextOption { name: victim(), queries: queries.to_vec() }.encode();
        let count = 4 + VICTIM.len();
        self.option(option, &data, &[0..4, count..count + 4, count + 4..count + 8]);
    }

    fn go(&mut self, style: ReplyStyle) {
        let richer = match style {
            ReplyStyle::Extended => option::EXTENDED_HEADERS,
            _ => option::STRUCTURED_REPLY,
        };
        self.option(richer, &[], &[]);
        self.contexts(option::SET_META_CONTEXT, &[b"base:allocation"]);
        let requests = InfoRequests { name: true, description: true, block_size: true };
        let data = InfoOption { name: victim(), requests }.encode();
        self.option(option::GO, &data, &[0..4, 4 + VICTIM.len()..6 + VICTIM.len()]);
    }

    /// Adds a request and `payload`, if it is a write.
    pub(crate) fn request(
        &mut self,
        style: ReplyStyle,
        (command, flags): (u16, CommandFlags),
        (offset, length): (u64, u64),
        payload: &[u8],
    ) {
        let start = self.bytes.len();
        let cookie = start as u64;
        let extended = style == ReplyStyle::Extended && !payload.is_empty();
        let flags = if extended { flags | CommandFlags::PAYLOAD_LEN } else { flags };
        let mut out = BytesMut::new();
        let header = RequestHeader { flags, command, cookie, offset, length };
        header.encode(&mut out, style).expect("lengths are short");
        self.bytes.extend_from_slice(&out);
        self.numbers.push(start + 16..start + 24);
        self.numbers.push(start + 24..self.bytes.len());
        self.bytes.extend_from_slice(payload);
    }

    fn transmission(&mut self, style: ReplyStyle) {
        let plain = CommandFlags::NONE;
        self.request(style, (command::WRITE, CommandFlags::FUA), (4096, 4096), &[0x5a; 4096]);
        self.request(style, (command::READ, plain), (4000, 5000), &[]);
        self.request(style, (command::WRITE, plain), (70_001, 333), &[0xa5; 333]);
        self.request(style, (command::TRIM, plain), (0, 1 << 20), &[]);
        self.request(style, (command::WRITE_ZEROES, CommandFlags::NO_HOLE), (9, 99_999), &[]);
        self.request(style, (command::CACHE, plain), (0, 1 << 20), &[]);
        self.request(style, (command::BLOCK_STATUS, plain), (0, 1 << 20), &[]);
        self.request(style, (command::FLUSH, plain), (0, 0), &[]);
        self.request(style, (command::READ, CommandFlags::DF), (0, 100_000), &[]);
        self.request(style, (command::DISC, plain), (0, 0), &[]);
    }

    /// Says something impossible, or nearly so, where a number stands.
    fn lie(&mut self, random: &mut StdRng) {
        const LIES: [u64; 12] = [
            0,
            1,
            0x7fff_ffff,
            0xffff_ffff,
            0x1_0000_0000,
            (32 << 20) + 1,
            (64 << 20) - 1,
            64 << 20,
            (64 << 20) + 1,
            1 << 63,
            u64::MAX - 1,
            u64::MAX,
        ];
        let place = self.numbers[random.random_range(0..self.numbers.len())].clone();
        let lie = LIES[random.random_range(0..LIES.len())].to_be_bytes();
        let width = place.len();
        self.bytes[place].copy_from_slice(&lie[8 - width..]);
    }
}

/// A hostile session: a recording in which some things went wrong, or nothing sensible at all.
pub(crate) fn mutated(random: &mut StdRng, recordings: &[Recording]) -> Vec<u8> {
    let mut recording = recordings[random.random_range(0..recordings.len())].clone();
    if random.random_bool(0.05) {
        let keep = random.random_range(0..=recording.bytes.len().min(80));
        recording.bytes.truncate(keep);
        let mut garbage = vec![0; random.random_range(0..20_000)];
        random.fill_bytes(&mut garbage);
        recording.bytes.extend_from_slice(&garbage);
        return recording.bytes;
    }
    if random.random_bool(0.5) {
        recording.lie(random);
    }
    let mut bytes = recording.bytes;
    for _ in 0..random.random_range(0..4) {
        garble(random, &mut bytes);
    }
    bytes
}

/// One thing goes wrong.
fn garble(random: &mut StdRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = random.random_range(0..bytes.len());
    let end = (at + random.random_range(1..200)).min(bytes.len());
    match random.random_range(0..7) {
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => random.fill_bytes(&mut bytes[at..end]),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let repeated = bytes[at..end].to_vec();
            bytes.splice(at..at, repeated);
        }
        5 => {
            let mut inserted = vec![0; end - at];
            random.fill_bytes(&mut inserted);
            bytes.splice(at..at, inserted);
        }
        _ => bytes[at..end].fill(0xff),
    }
}

/// Plays one session: sends `bytes` in up to three pieces, and leaves. The server may close
/// whenever it likes.
pub(crate) fn play(
    address: (&'static str, u16),
    bytes: &[u8],
    cuts: [usize; 2],
    leave: Leave,
    deadline: Duration,
) -> Vec<u8> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).expect("the server accepts connections");
    stream.set_nodelay(true).expect("set TCP_NODELAY");
    stream.set_write_timeout(Some(deadline)).expect("set a timeout");
    let (first, second) = (cuts[0].min(cuts[1]), cuts[0].max(cuts[1]));
    let (first, second) = (first.min(bytes.len()), second.min(bytes.len()));
    for piece in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
        // The server has closed, or waits for us to read: either is its right.
        if stream.write_all(piece).is_err() {
            break;
        }
    }
    let patience = match leave {
        Leave::Close => Duration::ZERO,
        Leave::Reset => {
            let reset = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            reset.expect("set SO_LINGER");
            Duration::ZERO
        }
        Leave::HalfClose => {
            // It fails if the server has closed.
            let _ = stream.shutdown(Shutdown::Write);
            deadline
        }
        Leave::Linger => deadline / 20,
    };
    read_until(&mut stream, began + patience)
}

/// Reads until the end of the connection or of patience.
fn read_until(stream: &mut TcpStream, deadline: Instant) -> Vec<u8> {
    let mut received = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return received;
        }
        stream.set_read_timeout(Some(left)).expect("set a timeout");
        match read_some(stream, &mut buffer) {
            Ok(0) | Err(_) => return received,
            Ok(count) => received.extend_from_slice(&buffer[..count]),
        }
    }
}
