//! Byte-exact messages, written out from the protocol document by hand (and from its branch
//! `extension-ext-header` for extended headers). Each test names its section.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use bytes::BytesMut;
use nbd_proto::constants::{ALLOCATION_CONTEXT_ID, option, option_reply};
use nbd_proto::option::{
    InfoOption, InfoRequests, MetaContextOption, encode_option, encode_option_reply,
};
use nbd_proto::{
    Command, Decoded, ExportInfo, ExportName, Extent, HandshakeEvent, NbdError, Negotiated,
    PendingRead, Purpose, ReplyDecoder, ReplyEncoder, ReplyEvent, ReplyStyle, ReplyTo,
    RequestDecoder, ServerHandshake, encode_disconnect, encode_request,
};

/// Bytes from hex digits; spaces and line ends do not count.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    assert!(digits.len().is_multiple_of(2));
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

fn name(text: &str) -> ExportName {
    text.parse().unwrap()
}

fn export(read_only: bool) -> ExportInfo {
    ExportInfo { name: name("disk"), description: "text".into(), size: 0x1234_5000, read_only }
}

fn negotiated(replies: ReplyStyle) -> Negotiated {
    let allocation_context = (replies != ReplyStyle::Simple).then_some(ALLOCATION_CONTEXT_ID);
    Negotiated { export: export(false), replies, allocation_context }
}

/// A handshake past greeting and client flags, with an empty output.
fn haggling(client_flags: &str) -> ServerHandshake {
    let mut handshake = ServerHandshake::new();
    handshake.take_output();
    let mut input = BytesMut::from(&hex(client_flags)[..]);
    assert_eq!(handshake.receive(&mut input), Ok(None));
    assert!(input.is_empty());
    handshake
}

fn receive(handshake: &mut ServerHandshake, bytes: &str) -> Option<HandshakeEvent> {
    let mut input = BytesMut::from(&hex(bytes)[..]);
    let event = handshake.receive(&mut input).unwrap();
    assert!(input.is_empty());
    event
}

const LIST: &str = "49484156454f5054 00000003 00000000";
const STRUCTURED: &str = "49484156454f5054 00000008 00000000";
const EXTENDED: &str = "49484156454f5054 0000000b 00000000";

#[test]
fn greeting() {
    // "Newstyle negotiation": NBDMAGIC, IHAVEOPT, handshake flags (fixed newstyle, no zeroes).
    let greeting = hex("4e42444d41474943 49484156454f5054 0003");
    assert_eq!(ServerHandshake::new().take_output(), greeting);
}

#[test]
fn export_name_with_and_without_padding() {
    // "Newstyle negotiation": size, transmission flags, 124 zeroes unless both sides gave them up.
    // Flags: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN, CACHE, FAST_ZERO = 0x0d6d.
    let option = "49484156454f5054 00000001 00000004 6469736b";
    for (client_flags, padding) in [("00000001", 124), ("00000003", 0), ("00000000", 124)] {
        let mut handshake = haggling(client_flags);
        let event = receive(&mut handshake, option).unwrap();
        let expected = HandshakeEvent::Resolve { name: name("disk"), purpose: Purpose::Attach };
        assert_eq!(event, expected);
        let attached = handshake.answer_export(Ok(export(false))).unwrap();
        assert_eq!(attached.replies, ReplyStyle::Simple);
        let mut answer = hex("0000000012345000 0d6d");
        answer.extend(vec![0; padding]);
        assert_eq!(handshake.take_output(), answer);
    }
}

#[test]
fn go_with_every_information() {
    // "Option types", NBD_OPT_GO; "Option reply types", NBD_REP_INFO.
    let go = "49484156454f5054 00000007 00000010
              00000004 6469736b 0003 0001 0002 0003";
    let mut handshake = haggling("00000003");
    let event = receive(&mut handshake, go).unwrap();
    let expected = HandshakeEvent::Resolve { name: name("disk"), purpose: Purpose::Attach };
    assert_eq!(event, expected);
    assert!(handshake.answer_export(Ok(export(true))).is_some());
    // Read-only: HAS_FLAGS, READ_ONLY, FLUSH, FUA, CAN_MULTI_CONN, CACHE = 0x050f.
    let answer = hex("0003e889045565a9 00000007 00000003 0000000c 0000 0000000012345000 050f
         0003e889045565a9 00000007 00000003 00000006 0001 6469736b
         0003e889045565a9 00000007 00000003 00000006 0002 74657874
         0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000
         0003e889045565a9 00000007 00000001 00000000");
    assert_eq!(handshake.take_output(), answer);
}

#[test]
fn info_under_structured_replies_offers_df() {
    // "Transmission flags": SEND_DF (bit 7) once replies are structured or extended.
    for option in [STRUCTURED, EXTENDED] {
        let mut handshake = haggling("00000003");
        assert_eq!(receive(&mut handshake, option), None);
        handshake.take_output();
        let info = "49484156454f5054 00000006 00000006 00000000 0000";
        let event = receive(&mut handshake, info).unwrap();
        let expected = HandshakeEvent::Resolve { name: name(""), purpose: Purpose::Describe };
        assert_eq!(event, expected);
        assert_eq!(handshake.answer_export(Ok(export(false))), None);
        let answer = hex("0003e889045565a9 00000006 00000003 0000000c 0000 0000000012345000 0ded
             0003e889045565a9 00000006 00000001 00000000");
        assert_eq!(handshake.take_output(), answer);
    }
}

#[test]
fn list() {
    // "Option types", NBD_OPT_LIST; "Option reply types", NBD_REP_SERVER.
    let mut handshake = haggling("00000003");
    assert_eq!(receive(&mut handshake, LIST), Some(HandshakeEvent::List));
    let exports = [(name("disk"), "text".to_owned()), (name(""), String::new())];
    handshake.answer_list(exports.into_iter());
    let answer = hex("0003e889045565a9 00000003 00000002 0000000c 00000004 6469736b 74657874
         0003e889045565a9 00000003 00000002 00000004 00000000
         0003e889045565a9 00000003 00000001 00000000");
    assert_eq!(handshake.take_output(), answer);
}

#[test]
fn abort_is_acknowledged() {
    // "Option types", NBD_OPT_ABORT: ACK, and data is ignored.
    for option in
        ["49484156454f5054 00000002 00000000", "49484156454f5054 00000002 00000003 ffffff"]
    {
        let mut handshake = haggling("00000003");
        assert_eq!(receive(&mut handshake, option), Some(HandshakeEvent::Aborted));
        let answer = hex("0003e889045565a9 00000002 00000001 00000000");
        assert_eq!(handshake.take_output(), answer);
    }
}

#[test]
fn options_that_only_get_an_acknowledgement_or_an_error() {
    // "Option types" and "Option reply types". The errors' texts are ours; lengths cover them.
    let cases = [
        (STRUCTURED, "00000008 00000001"),
        (EXTENDED, "0000000b 00000001"),
        ("49484156454f5054 00000008 00000001 00", "00000008 80000003"),
        ("49484156454f5054 0000000b 00000001 00", "0000000b 80000003"),
        ("49484156454f5054 00000003 00000001 00", "00000003 80000003"),
        ("49484156454f5054 00000005 00000000", "00000005 80000002"),
        ("49484156454f5054 00000005 00000001 00", "00000005 80000003"),
        ("49484156454f5054 00000004 00000000", "00000004 80000001"),
        ("49484156454f5054 12345678 00000002 abcd", "12345678 80000001"),
    ];
    for (option, reply) in cases {
        let mut handshake = haggling("00000003");
        assert_eq!(receive(&mut handshake, option), None, "{option}");
        let output = handshake.take_output();
        assert_eq!(output[..8], hex("0003e889045565a9"));
        assert_eq!(output[8..16], hex(reply), "{option}");
        let length = u32::from_be_bytes(output[16..20].try_into().unwrap());
        assert_eq!(output.len(), 20 + length as usize);
        assert!(std::str::from_utf8(&output[20..]).is_ok());
    }
}

#[test]
fn metadata_contexts() {
    // "Option types", NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT: base:allocation.
    let query = "00000004 6469736b 00000001 0000000f 626173653a616c6c6f636174696f6e";
    let context = "626173653a616c6c6f636174696f6e";
    for (code, id) in [("0000000a", "00000001"), ("00000009", "00000000")] {
        let mut handshake = haggling("00000003");
        receive(&mut handshake, STRUCTURED);
        handshake.take_output();
        let option = format!("49484156454f5054 {code} 0000001f {query}");
        let event = receive(&mut handshake, &option).unwrap();
        let expected = HandshakeEvent::Resolve { name: name("disk"), purpose: Purpose::Describe };
        assert_eq!(event, expected);
        assert_eq!(handshake.answer_export(Ok(export(false))), None);
        let answer = hex(&format!(
            "0003e889045565a9 {code} 00000004 00000013 {id} {context}
             0003e889045565a9 {code} 00000001 00000000"
        ));
        assert_eq!(handshake.take_output(), answer);
    }
}

#[test]
fn option_data() {
    let requests = InfoRequests { name: true, description: false, block_size: true };
    let info = InfoOption { name: name("disk"), requests };
    assert_eq!(info.encode(), hex("00000004 6469736b 0002 0001 0003"));
    let meta = MetaContextOption { name: name(""), queries: vec![b"base:", b""] };
    assert_eq!(meta.encode(), hex("00000000 00000002 00000005 626173653a 00000000"));
    let mut out = BytesMut::new();
    encode_option(&mut out, option::GO, b"ab");
    assert_eq!(out, hex("49484156454f5054 00000007 00000002 6162"));
    out.clear();
    encode_option_reply(&mut out, option::LIST, option_reply::ERR_POLICY, &[b"a", b"b"]);
    assert_eq!(out, hex("0003e889045565a9 00000003 80000002 00000002 6162"));
}

/// Every command, its compact and its extended header, both with the cookie 0102030405060708.
fn requests() -> Vec<(Command, &'static str, &'static str)> {
    let (offset, len) = (0x1000, 0x200);
    vec![
        (
            Command::Read { offset, len, dont_fragment: false },
            "25609513 0000 0000 0102030405060708 0000000000001000 00000200",
            "21e41c71 0000 0000 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::Read { offset, len, dont_fragment: true },
            "25609513 0004 0000 0102030405060708 0000000000001000 00000200",
            "21e41c71 0004 0000 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::Write { offset, len },
            "25609513 0000 0001 0102030405060708 0000000000001000 00000200",
            "21e41c71 0020 0001 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::Flush,
            "25609513 0000 0003 0102030405060708 0000000000000000 00000000",
            "21e41c71 0000 0003 0102030405060708 0000000000000000 0000000000000000",
        ),
        (
            Command::Trim { offset, len },
            "25609513 0000 0004 0102030405060708 0000000000001000 00000200",
            "21e41c71 0000 0004 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::Cache { offset, len },
            "25609513 0000 0005 0102030405060708 0000000000001000 00000200",
            "21e41c71 0000 0005 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::WriteZeroes { offset, len, no_hole: true },
            "25609513 0002 0006 0102030405060708 0000000000001000 00000200",
            "21e41c71 0002 0006 0102030405060708 0000000000001000 0000000000000200",
        ),
        (
            Command::BlockStatus { offset, len, req_one: true },
            "25609513 0008 0007 0102030405060708 0000000000001000 00000200",
            "21e41c71 0008 0007 0102030405060708 0000000000001000 0000000000000200",
        ),
    ]
}

#[test]
fn request_headers() {
    // "Request message", both styles; "Command flags"; "Request types".
    let cookie = 0x0102_0304_0506_0708;
    for (command, compact, extended) in requests() {
        let styles =
            [(ReplyStyle::Structured, hex(compact)), (ReplyStyle::Extended, hex(extended))];
        for (replies, bytes) in styles {
            let mut out = BytesMut::new();
            encode_request(&mut out, replies, cookie, &command, false).unwrap();
            assert_eq!(out, bytes);
            let Decoded::Request(request) =
                RequestDecoder::new(&negotiated(replies)).decode(&mut out).unwrap()
            else {
                panic!("{command:?} was not accepted");
            };
            assert_eq!((request.cookie, request.command), (cookie, command));
            assert_eq!(request.offset, command.range().0);
        }
    }
}

#[test]
fn request_with_fua_and_goodbye() {
    let mut out = BytesMut::new();
    encode_request(&mut out, ReplyStyle::Simple, 7, &Command::Flush, true).unwrap();
    encode_disconnect(&mut out, ReplyStyle::Simple);
    encode_disconnect(&mut out, ReplyStyle::Extended);
    let expected = hex("25609513 0001 0003 0000000000000007 0000000000000000 00000000
         25609513 0000 0002 0000000000000000 0000000000000000 00000000
         21e41c71 0000 0002 0000000000000000 0000000000000000 0000000000000000");
    assert_eq!(out, expected);
}

const TO: ReplyTo = ReplyTo { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };

/// Encodes one reply and reads it back; the events are for the caller to look at.
fn reply(
    replies: ReplyStyle,
    encode: impl Fn(&ReplyEncoder, &mut BytesMut),
    expected: &str,
) -> ReplyEvent {
    let mut out = BytesMut::new();
    encode(&ReplyEncoder::new(&negotiated(replies)), &mut out);
    assert_eq!(out, hex(expected));
    let read = Some(PendingRead { offset: TO.offset, len: 0x400 });
    let content = matches!(out[6..8], [0, 1 | 2]) || replies == ReplyStyle::Simple;
    let pending = |_| read.filter(|_| content);
    ReplyDecoder::new(replies).decode(&mut out, pending).unwrap()
}

#[test]
fn simple_replies() {
    // "Simple reply message".
    let done = |encoder: &ReplyEncoder, out: &mut BytesMut| encoder.done(out, &TO);
    let fail = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.error(out, &TO, NbdError::NoSpc, "unseen");
    };
    let data = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.read_prefix(out, &TO, 0x1000, 0x400, true);
    };
    reply(ReplyStyle::Simple, done, "67446698 00000000 0102030405060708");
    reply(ReplyStyle::Simple, fail, "67446698 0000001c 0102030405060708");
    let event = reply(ReplyStyle::Simple, data, "67446698 00000000 0102030405060708");
    let (cookie, offset) = (TO.cookie, TO.offset);
    assert_eq!(event, ReplyEvent::Data { cookie, offset, len: 0x400, last: true });
}

#[test]
fn chunks_without_content() {
    // "Structured reply types": NONE, ERROR, ERROR_OFFSET; "Extended reply chunk message".
    let done = |encoder: &ReplyEncoder, out: &mut BytesMut| encoder.done(out, &TO);
    let fail = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.error(out, &TO, NbdError::Inval, "no");
    };
    let late = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.read_error_after_data(out, &TO, 0x1100, NbdError::Io, "");
    };
    let (s, e) = (ReplyStyle::Structured, ReplyStyle::Extended);
    let cookie = TO.cookie;
    let event = reply(s, done, "668e33ef 0001 0000 0102030405060708 00000000");
    assert_eq!(event, ReplyEvent::Done { cookie });
    let event =
        reply(e, done, "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000");
    assert_eq!(event, ReplyEvent::Done { cookie });

    let error = NbdError::Inval;
    let failed =
        ReplyEvent::Error { cookie, error, message: "no".into(), offset: None, last: true };
    let event = reply(s, fail, "668e33ef 0001 8001 0102030405060708 00000008 00000016 0002 6e6f");
    assert_eq!(event, failed);
    let event = reply(
        e,
        fail,
        "6e8a278c 0001 8001 0102030405060708 0000000000001000 0000000000000008
         00000016 0002 6e6f",
    );
    assert_eq!(event, failed);

    let (error, offset) = (NbdError::Io, Some(0x1100));
    let failed = ReplyEvent::Error { cookie, error, message: String::new(), offset, last: true };
    let event = reply(
        s,
        late,
        "668e33ef 0001 8002 0102030405060708 0000000e 00000005 0000 0000000000001100",
    );
    assert_eq!(event, failed);
    let event = reply(
        e,
        late,
        "6e8a278c 0001 8002 0102030405060708 0000000000001000 000000000000000e
         00000005 0000 0000000000001100",
    );
    assert_eq!(event, failed);
}

#[test]
fn chunks_with_content() {
    // "Structured reply types": OFFSET_DATA, OFFSET_HOLE.
    let data = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.read_prefix(out, &TO, 0x1200, 0x200, false);
    };
    let hole = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.read_hole(out, &TO, 0x1000, 0x200, true);
    };
    let (s, e) = (ReplyStyle::Structured, ReplyStyle::Extended);
    let cookie = TO.cookie;
    let found = ReplyEvent::Data { cookie, offset: 0x1200, len: 0x200, last: false };
    let event = reply(s, data, "668e33ef 0000 0001 0102030405060708 00000208 0000000000001200");
    assert_eq!(event, found);
    let event = reply(
        e,
        data,
        "6e8a278c 0000 0001 0102030405060708 0000000000001000 0000000000000208
         0000000000001200",
    );
    assert_eq!(event, found);
    let found = ReplyEvent::Hole { cookie, offset: 0x1000, len: 0x200, last: true };
    let event =
        reply(s, hole, "668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000200");
    assert_eq!(event, found);
    let event = reply(
        e,
        hole,
        "6e8a278c 0001 0002 0102030405060708 0000000000001000 000000000000000c
         0000000000001000 00000200",
    );
    assert_eq!(event, found);
}

#[test]
fn block_status() {
    // "Structured reply types": BLOCK_STATUS and BLOCK_STATUS_EXT.
    let extents = vec![
        Extent { len: 0x1000, hole: false, zero: false },
        Extent { len: 0x2000, hole: true, zero: true },
        Extent { len: 0x3000, hole: false, zero: true },
    ];
    let status = |encoder: &ReplyEncoder, out: &mut BytesMut| {
        encoder.block_status(out, &TO, 1, &extents, true);
    };
    let expected = ReplyEvent::BlockStatus {
        cookie: TO.cookie,
        context_id: 1,
        extents: extents.clone(),
        last: true,
    };
    let event = reply(
        ReplyStyle::Structured,
        status,
        "668e33ef 0001 0005 0102030405060708 0000001c 00000001
         00001000 00000000 00002000 00000003 00003000 00000002",
    );
    assert_eq!(event, expected);
    let event = reply(
        ReplyStyle::Extended,
        status,
        "6e8a278c 0001 0006 0102030405060708 0000000000001000 0000000000000038
         00000001 00000003
         0000000000001000 0000000000000000
         0000000000002000 0000000000000003
         0000000000003000 0000000000000002",
    );
    assert_eq!(event, expected);
}

#[test]
fn error_values() {
    // "Error values"; an unexpected one is to be taken for NBD_EINVAL.
    let table = [
        (NbdError::Perm, 1),
        (NbdError::Io, 5),
        (NbdError::NoMem, 12),
        (NbdError::Inval, 22),
        (NbdError::NoSpc, 28),
        (NbdError::Overflow, 75),
        (NbdError::NotSup, 95),
        (NbdError::Shutdown, 108),
    ];
    for (error, code) in table {
        assert_eq!(error.code(), code);
        assert_eq!(NbdError::from_code(code), error);
    }
    assert_eq!(NbdError::from_code(30), NbdError::Inval);
}
