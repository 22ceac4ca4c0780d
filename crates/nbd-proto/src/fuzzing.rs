//! Entry points for fuzzers: hostile bytes go through the real state machines, and what must always
//! hold is asserted. Compiled always, so that the stable test suite replays the fuzzers' corpus.
//!
//! Each entry runs its bytes twice, all at once and in small pieces, and demands the same outcome:
//! how a stream is cut by the network must not matter.

use bytes::{BufMut, BytesMut};

use crate::constants::{ALLOCATION_CONTEXT_ID, OPTION_HEADER_BYTES};
use crate::error::{ClientHandshakeError, HandshakeError, NbdError, ReplyError, TransmissionError};
use crate::limits::{
    EXPORT_BYTES_MAX, OPTION_BYTES_MAX, OPTION_REPLY_BYTES_MAX, OPTIONS_MAX,
    REQUEST_PAYLOAD_BYTES_MAX,
};
use crate::option::InfoRequests;
use crate::request::RequestHeader;
use crate::{
    ClientEvent, ClientGoal, ClientHandshake, ClientWish, Command, Decoded, ExportInfo, ExportName,
    ExportRefusal, Extent, HandshakeEvent, Negotiated, PendingRead, ReplyDecoder, ReplyEncoder,
    ReplyEvent, ReplyStyle, Request, RequestDecoder, ServerHandshake,
};

/// More than any answer to one option takes, with the exports that [`answer`] makes up.
const OPTION_OUTPUT_BYTES_MAX: usize = 512;

/// A client's bytes against [`ServerHandshake`], and on into transmission if they get there.
/// `data[0]`: which events are refused (bit i: the i-th, modulo 8). The rest is the stream.
pub fn handshake(data: &[u8]) {
    let Some((&refusals, stream)) = data.split_first() else { return };
    let at_once = drive_server(refusals, stream, stream.len().max(1));
    for piece in [1, 7] {
        assert_eq!(drive_server(refusals, stream, piece), at_once, "in pieces of {piece}");
    }
    if let ServerEnd::Attached(negotiated) = &at_once.end {
        check_transmission(negotiated, &stream[at_once.consumed..]);
    }
}

/// A client's bytes against [`RequestDecoder`]; each request is answered, and the answer read back.
/// `data[0]`: bits 0-1 the style, bit 2 read-only, bit 3 block status; `data[1]`: the export's
/// size, of a few. The rest is the stream.
pub fn transmission(data: &[u8]) {
    let Some((&[settings, size], stream)) = data.split_first_chunk::<2>() else { return };
    let sizes = [1 << 30, 0, 1, 4096, 1_000_003, 1 << 44, EXPORT_BYTES_MAX];
    let replies = style(settings);
    let negotiated = Negotiated {
        export: ExportInfo {
            name: ExportName::default(),
            description: String::new(),
            size: sizes[usize::from(size) % sizes.len()],
            read_only: settings & 4 != 0,
        },
        replies,
        allocation_context: (settings & 8 != 0 && replies != ReplyStyle::Simple)
            .then_some(ALLOCATION_CONTEXT_ID),
    };
    check_transmission(&negotiated, stream);
}

/// A server's bytes against [`ClientHandshake`], and on into [`ReplyDecoder`] if they get there.
/// `data[0]`: bits 0-1 the style wished for, bits 2-3 the goal, bit 4 block status, bit 5 the
/// questions. The rest is the stream.
pub fn client(data: &[u8]) {
    let Some((&settings, stream)) = data.split_first() else { return };
    let asked = settings & 32 != 0;
    let goals = [ClientGoal::Go, ClientGoal::Info, ClientGoal::List, ClientGoal::ExportName];
    let wish = ClientWish {
        export: ExportName::default(),
        goal: goals[usize::from(settings >> 2 & 3)],
        replies: style(settings),
        allocation_context: settings & 16 != 0,
        info: InfoRequests { name: asked, description: asked, block_size: asked },
    };
    let at_once = drive_client(&wish, stream, stream.len().max(1));
    for piece in [1, 7] {
        assert_eq!(drive_client(&wish, stream, piece), at_once, "in pieces of {piece}");
    }
}

fn style(settings: u8) -> ReplyStyle {
    [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended, ReplyStyle::Structured]
        [usize::from(settings & 3)]
}

/// A stream that arrives piece by piece.
struct Feed<'a> {
    pieces: std::slice::Chunks<'a, u8>,
    input: BytesMut,
}

impl<'a> Feed<'a> {
    fn new(stream: &'a [u8], piece: usize) -> Self {
        Self { pieces: stream.chunks(piece), input: BytesMut::new() }
    }

    /// Lets the next piece arrive; false at the end of the stream.
    fn more(&mut self) -> bool {
        let Some(piece) = self.pieces.next() else { return false };
        self.input.put_slice(piece);
        true
    }

    /// Bytes that were not consumed.
    fn left(self) -> usize {
        self.input.len() + self.pieces.map(<[u8]>::len).sum::<usize>()
    }
}

#[derive(Debug, PartialEq)]
struct ServerTrace {
    events: Vec<HandshakeEvent>,
    output: BytesMut,
    consumed: usize,
    end: ServerEnd,
}

#[derive(Debug, PartialEq)]
enum ServerEnd {
    /// The stream ended first.
    Open,
    Aborted,
    Attached(Negotiated),
    Failed(HandshakeError),
}

fn drive_server(refusals: u8, stream: &[u8], piece: usize) -> ServerTrace {
    let mut feed = Feed::new(stream, piece);
    let mut handshake = ServerHandshake::new();
    let mut events = Vec::new();
    let mut output = BytesMut::new();
    let end = loop {
        let received = handshake.receive(&mut feed.input);
        match received {
            Err(error) => {
                assert_eq!(handshake.receive(&mut feed.input), Err(error), "errors are final");
                break ServerEnd::Failed(error);
            }
            Ok(None) => {
                let unused = feed.input.len();
                assert!(unused < OPTION_BYTES_MAX, "{unused} bytes were left in the input");
                if !feed.more() {
                    break ServerEnd::Open;
                }
            }
            Ok(Some(event)) => {
                assert!(events.len() < OPTIONS_MAX as usize, "more events than options");
                let refuse = refusals >> (events.len() % 8) & 1 == 1;
                events.push(event.clone());
                match event {
                    HandshakeEvent::Aborted => break ServerEnd::Aborted,
                    HandshakeEvent::List if refuse => handshake.refuse_list(ExportRefusal::Policy),
                    HandshakeEvent::List => handshake.answer_list(listing()),
                    HandshakeEvent::Resolve { name, .. } => {
                        let attached = handshake.answer_export(answer(&name, refuse));
                        if let Some(negotiated) = attached {
                            break ServerEnd::Attached(negotiated);
                        }
                    }
                }
            }
        }
        output.put(handshake.take_output());
    };
    output.put(handshake.take_output());
    let consumed = stream.len() - feed.left();
    let options = consumed / OPTION_HEADER_BYTES + 1;
    let output_max = 18 + options * OPTION_OUTPUT_BYTES_MAX;
    assert!(output.len() <= output_max, "{} bytes for {consumed}", output.len());
    ServerTrace { events, output, consumed, end }
}

fn listing() -> impl Iterator<Item = (ExportName, String)> {
    let names = ["", "disk", "disk/2"].into_iter().filter_map(|name| name.parse().ok());
    names.map(|name| (name, "a volume".to_owned()))
}

fn answer(name: &ExportName, refuse: bool) -> Result<ExportInfo, ExportRefusal> {
    if refuse {
        return Err(ExportRefusal::Unknown);
    }
    let read_only = name.as_bytes().len() % 2 == 1;
    let name = "canonical".parse().unwrap_or_default();
    Ok(ExportInfo { name, description: "a volume".to_owned(), size: 1 << 30, read_only })
}

fn check_transmission(negotiated: &Negotiated, stream: &[u8]) {
    let at_once = drive_transmission(negotiated, stream, stream.len().max(1));
    for piece in [1, 7] {
        assert_eq!(drive_transmission(negotiated, stream, piece), at_once, "in pieces of {piece}");
    }
    for found in &at_once.found {
        if let Decoded::Request(request) = found {
            check_request(negotiated, request);
            check_reply(negotiated, request);
        }
    }
}

#[derive(Debug, PartialEq)]
struct TransmissionTrace {
    found: Vec<Decoded>,
    payload: Vec<u8>,
    consumed: usize,
    error: Option<TransmissionError>,
}

fn drive_transmission(negotiated: &Negotiated, stream: &[u8], piece: usize) -> TransmissionTrace {
    let mut feed = Feed::new(stream, piece);
    let mut decoder = RequestDecoder::new(negotiated);
    let mut found = Vec::new();
    let mut payload = Vec::new();
    let mut scratch = [0; 100];
    let error = loop {
        if decoder.payload_remaining() > 0 {
            let taken = decoder.take_payload(&mut feed.input, &mut scratch);
            payload.extend_from_slice(&scratch[..taken]);
            if taken == 0 && !feed.more() {
                break None;
            }
            continue;
        }
        match decoder.decode(&mut feed.input) {
            Err(error) => {
                assert_eq!(decoder.decode(&mut feed.input), Err(error), "errors are final");
                break Some(error);
            }
            Ok(Decoded::NeedMore) => {
                let header = RequestHeader::encoded_len(negotiated.replies);
                assert!(feed.input.len() < header, "a whole header was left in the input");
                if !feed.more() {
                    break None;
                }
            }
            Ok(decoded) => {
                found.push(decoded);
                if decoded == Decoded::Disconnect {
                    break None;
                }
            }
        }
    };
    TransmissionTrace { found, payload, consumed: stream.len() - feed.left(), error }
}

/// What validation promises of each request.
fn check_request(negotiated: &Negotiated, request: &Request) {
    let (offset, len) = request.command.range();
    assert!(offset.checked_add(len).is_some_and(|end| end <= negotiated.export.size));
    assert_eq!(request.offset, offset);
    match request.command {
        Command::Read { dont_fragment, .. } => {
            assert!(len <= REQUEST_PAYLOAD_BYTES_MAX);
            assert!(!dont_fragment || negotiated.replies != ReplyStyle::Simple);
        }
        Command::Write { .. } => {
            assert!(len <= REQUEST_PAYLOAD_BYTES_MAX && !negotiated.export.read_only);
        }
        Command::Trim { .. } | Command::WriteZeroes { .. } => {
            assert!(!negotiated.export.read_only);
        }
        Command::BlockStatus { .. } => {
            assert!(negotiated.allocation_context.is_some() && len > 0);
        }
        Command::Flush | Command::Cache { .. } => {}
    }
}

/// Answers a request in a way that depends on its cookie, and reads the answer back.
fn check_reply(negotiated: &Negotiated, request: &Request) {
    let encoder = ReplyEncoder::new(negotiated);
    let (to, cookie) = (request.reply_to(), request.cookie);
    let mut wire = BytesMut::new();
    let mut expected = Vec::new();
    let (offset, len) = request.command.range();
    match request.command {
        _ if cookie % 5 == 0 => {
            encoder.error(&mut wire, &to, NbdError::Io, "no luck");
            let chunked = negotiated.replies != ReplyStyle::Simple;
            let message = if chunked { "no luck".to_owned() } else { String::new() };
            let error = NbdError::Io;
            expected.push(ReplyEvent::Error { cookie, error, message, offset: None, last: true });
        }
        Command::Read { .. } if len > 0 => {
            let hole = if encoder.can_send_holes() { len / 2 } else { 0 };
            if hole > 0 {
                encoder.read_hole(&mut wire, &to, offset, hole, false);
                expected.push(ReplyEvent::Hole { cookie, offset, len: hole, last: false });
            }
            let (offset, len) = (offset + hole, len - hole);
            encoder.read_prefix(&mut wire, &to, offset, len, true);
            expected.push(ReplyEvent::Data { cookie, offset, len, last: true });
        }
        Command::BlockStatus { .. } => {
            let extents = [Extent { len, hole: cookie % 2 == 0, zero: cookie % 3 == 0 }];
            encoder.block_status(&mut wire, &to, ALLOCATION_CONTEXT_ID, &extents, true);
            let context_id = ALLOCATION_CONTEXT_ID;
            let extents = extents.to_vec();
            // With 32-bit lengths the extent may come back shorter.
            expected.push(ReplyEvent::BlockStatus { cookie, context_id, extents, last: true });
        }
        _ => {
            encoder.done(&mut wire, &to);
            expected.push(ReplyEvent::Done { cookie });
        }
    }
    let is_read = matches!(request.command, Command::Read { .. });
    let mut decoder = ReplyDecoder::new(negotiated.replies);
    for expected in expected {
        let pending = |_| is_read.then_some(PendingRead { offset, len });
        let mut found = decoder.decode(&mut wire, pending);
        if let Ok(ReplyEvent::BlockStatus { extents, .. }) = &mut found {
            assert!(extents[0].len <= len);
            extents[0].len = len;
        }
        assert_eq!(found, Ok(expected));
        let data = usize::try_from(decoder.payload_remaining()).unwrap_or(usize::MAX);
        decoder.payload_received(data);
    }
    assert!(wire.is_empty(), "{} bytes of a reply were not understood", wire.len());
}

#[derive(Debug, PartialEq)]
struct ClientTrace {
    events: Vec<ClientEvent>,
    output: BytesMut,
    handshake_error: Option<ClientHandshakeError>,
    replies: Vec<ReplyEvent>,
    reply_error: Option<ReplyError>,
    consumed: usize,
}

fn drive_client(wish: &ClientWish, stream: &[u8], piece: usize) -> ClientTrace {
    let mut feed = Feed::new(stream, piece);
    let mut handshake = ClientHandshake::new(wish.clone());
    let mut trace = ClientTrace {
        events: Vec::new(),
        output: BytesMut::new(),
        handshake_error: None,
        replies: Vec::new(),
        reply_error: None,
        consumed: 0,
    };
    loop {
        match handshake.receive(&mut feed.input) {
            Err(error) => {
                trace.handshake_error = Some(error);
                break;
            }
            Ok(None) => {
                let unused = feed.input.len();
                assert!(unused < OPTION_REPLY_BYTES_MAX + 20, "{unused} bytes left in the input");
                if !feed.more() {
                    break;
                }
            }
            Ok(Some(event)) => {
                trace.events.push(event.clone());
                match event {
                    ClientEvent::Attached(attached) => {
                        assert!(attached.export.size <= EXPORT_BYTES_MAX);
                        drive_replies(attached.replies, &mut feed, &mut trace);
                        break;
                    }
                    ClientEvent::Aborted => break,
                    ClientEvent::Listed { .. } => {}
                    ClientEvent::Described(_) => {
                        handshake.ask(ClientGoal::Go, ExportName::default());
                    }
                    ClientEvent::Refused { .. } | ClientEvent::ListEnd => handshake.abort(),
                }
            }
        }
        trace.output.put(handshake.take_output());
    }
    trace.output.put(handshake.take_output());
    trace.consumed = stream.len() - feed.left();
    trace
}

fn drive_replies(replies: ReplyStyle, feed: &mut Feed<'_>, trace: &mut ClientTrace) {
    let mut decoder = ReplyDecoder::new(replies);
    let mut scratch = [0; 100];
    let pending = |cookie: u64| {
        (!cookie.is_multiple_of(3)).then_some(PendingRead { offset: 512, len: cookie % 4096 })
    };
    loop {
        if decoder.payload_remaining() > 0 {
            let taken = decoder.take_payload(&mut feed.input, &mut scratch);
            if taken == 0 && !feed.more() {
                return;
            }
            continue;
        }
        match decoder.decode(&mut feed.input, pending) {
            Err(error) => {
                trace.reply_error = Some(error);
                return;
            }
            Ok(ReplyEvent::NeedMore) => {
                if !feed.more() {
                    return;
                }
            }
            Ok(event) => {
                if let ReplyEvent::Data { offset, len, .. } | ReplyEvent::Hole { offset, len, .. } =
                    event
                {
                    assert!(len > 0 && offset >= 512 && offset + len <= 512 + 4096);
                }
                trace.replies.push(event);
            }
        }
    }
}
