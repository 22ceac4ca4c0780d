//! Requests and replies: validation, payloads, truncation, limits, and what properties hold for
//! all.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use bytes::{BufMut, BytesMut};
use nbd_proto::constants::{ALLOCATION_CONTEXT_ID, CommandFlags, command};
use nbd_proto::limits::{
    BLOCK_STATUS_EXTENTS_MAX, COMPACT_EXTENT_BYTES_MAX, ERROR_TEXT_BYTES_MAX, EXPORT_BYTES_MAX,
    REQUEST_PAYLOAD_BYTES_MAX, WRITE_DRAIN_BYTES_MAX,
};
use nbd_proto::{
    Command, CommandKind, Decoded, ExportInfo, ExportName, Extent, NbdError, Negotiated,
    PendingRead, Refused, ReplyDecoder, ReplyEncoder, ReplyError, ReplyEvent, ReplyStyle, ReplyTo,
    RequestDecoder, RequestHeader, TransmissionError, encode_disconnect, encode_request,
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;
const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const TO: ReplyTo = ReplyTo { cookie: 9, offset: 4096 };

fn negotiated(replies: ReplyStyle) -> Negotiated {
    let export = ExportInfo {
        name: ExportName::default(),
        description: String::new(),
        size: SIZE,
        read_only: false,
    };
    let allocation_context = (replies != ReplyStyle::Simple).then_some(ALLOCATION_CONTEXT_ID);
    Negotiated { export, replies, allocation_context }
}

fn header(command: u16, flags: CommandFlags, offset: u64, length: u64) -> RequestHeader {
    RequestHeader { flags, command, cookie: 9, offset, length }
}

/// What comes of one header, with the payload of a write under extended headers flagged.
fn decide(negotiated: &Negotiated, header: RequestHeader) -> Result<Command, NbdError> {
    let mut wire = BytesMut::new();
    header.encode(&mut wire, negotiated.replies).unwrap();
    let mut decoder = RequestDecoder::new(negotiated);
    let mut decoded = decoder.decode(&mut wire).unwrap();
    while decoded == Decoded::NeedMore {
        wire.put_bytes(0, 1 << 16);
        decoded = decoder.decode(&mut wire).unwrap();
    }
    match decoded {
        Decoded::Request(request) => {
            assert_eq!(request.cookie, 9);
            Ok(request.command)
        }
        Decoded::Refused(Refused { cookie, offset, error, message, command }) => {
            assert_eq!((cookie, offset), (header.cookie, header.offset));
            assert!(!message.is_empty() && message.len() < 100);
            if header.command <= command::WRITE {
                assert!(matches!(command, CommandKind::Read | CommandKind::Write));
            }
            Err(error)
        }
        other => panic!("{other:?}"),
    }
}

/// A header of `command` as `replies` wants it: a write under extended headers has a payload flag.
fn styled(replies: ReplyStyle, command: u16, offset: u64, length: u64) -> RequestHeader {
    let payload = replies == ReplyStyle::Extended && command == command::WRITE;
    let flags = if payload { CommandFlags::PAYLOAD_LEN } else { CommandFlags::NONE };
    header(command, flags, offset, length)
}

#[test]
fn ranges_past_the_end() {
    // Goal: the error of each command that leaves the export, also where offset + length wraps.
    let table = [
        (command::READ, NbdError::Inval),
        (command::WRITE, NbdError::NoSpc),
        (command::TRIM, NbdError::Inval),
        (command::CACHE, NbdError::Inval),
        (command::WRITE_ZEROES, NbdError::NoSpc),
        (command::BLOCK_STATUS, NbdError::Inval),
    ];
    for replies in STYLES {
        let negotiated = negotiated(replies);
        for (command, error) in table {
            if command == command::BLOCK_STATUS && replies == ReplyStyle::Simple {
                continue;
            }
            for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512)] {
                let header = styled(replies, command, offset, len);
                assert_eq!(decide(&negotiated, header), Err(error), "{header:?}");
            }
            let header = styled(replies, command, SIZE - 512, 512);
            assert_eq!(decide(&negotiated, header).unwrap().range(), (SIZE - 512, 512));
        }
    }
}

#[test]
fn empty_requests_are_accepted() {
    for replies in STYLES {
        let negotiated = negotiated(replies);
        let kinds =
            [command::READ, command::WRITE, command::TRIM, command::CACHE, command::WRITE_ZEROES];
        for command in kinds {
            for offset in [0, 77, SIZE] {
                let command = decide(&negotiated, styled(replies, command, offset, 0)).unwrap();
                assert_eq!(command.range(), (offset, 0));
            }
            let past = styled(replies, command, SIZE + 1, 0);
            assert!(decide(&negotiated, past).is_err());
        }
    }
    // Its answer needs an extent, and there is none of no length.
    let empty = header(command::BLOCK_STATUS, CommandFlags::NONE, 0, 0);
    let result = decide(&negotiated(ReplyStyle::Structured), empty);
    assert_eq!(result, Err(NbdError::Inval));
}

#[test]
fn an_empty_export_has_no_range() {
    let mut negotiated = negotiated(ReplyStyle::Structured);
    negotiated.export.size = 0;
    let read = |len| header(command::READ, CommandFlags::NONE, 0, len);
    assert!(decide(&negotiated, read(0)).is_ok());
    assert_eq!(decide(&negotiated, read(1)), Err(NbdError::Inval));
}

#[test]
fn flags_belong_to_commands() {
    // Goal: each flag is accepted with its command and nowhere else; FUA everywhere.
    // Method: all commands, all single flags, all styles, against a table.
    let commands = 0..12_u16;
    for (command, bit) in commands.flat_map(|command| (0..16).map(move |bit| (command, bit))) {
        if command == command::DISC {
            continue;
        }
        let flag = CommandFlags::from_bits(1 << bit);
        for replies in STYLES {
            let negotiated = negotiated(replies);
            let (chunked, extended) =
                (replies != ReplyStyle::Simple, replies == ReplyStyle::Extended);
            let mut allowed = match command {
                command::READ => flag == CommandFlags::DF && chunked,
                command::WRITE_ZEROES => {
                    flag == CommandFlags::NO_HOLE || flag == CommandFlags::FAST_ZERO
                }
                command::BLOCK_STATUS => flag == CommandFlags::REQ_ONE && chunked,
                _ => false,
            };
            allowed |= flag == CommandFlags::FUA;
            allowed &= command <= command::BLOCK_STATUS;
            allowed &= chunked || command != command::BLOCK_STATUS;
            let mut flags = flag;
            if command == command::WRITE && extended {
                allowed |= flag == CommandFlags::PAYLOAD_LEN;
                flags = flags | CommandFlags::PAYLOAD_LEN;
            }
            let len = if command == command::FLUSH { 0 } else { 64 };
            let result = decide(&negotiated, header(command, flags, 0, len));
            assert_eq!(result.is_ok(), allowed, "command {command} {flag:?} {replies:?}");
            if !allowed {
                assert_eq!(result, Err(NbdError::Inval));
            }
        }
    }
}

#[test]
fn flags_reach_the_command() {
    let negotiated = negotiated(ReplyStyle::Structured);
    let cases = [
        (command::READ, CommandFlags::DF, Command::Read { offset: 0, len: 8, dont_fragment: true }),
        (
            command::WRITE_ZEROES,
            CommandFlags::NO_HOLE,
            Command::WriteZeroes { offset: 0, len: 8, no_hole: true },
        ),
        (
            command::WRITE_ZEROES,
            CommandFlags::FAST_ZERO,
            Command::WriteZeroes { offset: 0, len: 8, no_hole: false },
        ),
        (
            command::BLOCK_STATUS,
            CommandFlags::REQ_ONE,
            Command::BlockStatus { offset: 0, len: 8, req_one: true },
        ),
    ];
    for (code, flags, command) in cases {
        assert_eq!(decide(&negotiated, header(code, flags, 0, 8)), Ok(command));
    }
}

#[test]
fn unknown_commands_and_a_flush_of_something() {
    for replies in STYLES {
        let negotiated = negotiated(replies);
        for command in [command::RESIZE, 9, 100, u16::MAX] {
            let header = header(command, CommandFlags::NONE, 1, 1);
            assert_eq!(decide(&negotiated, header), Err(NbdError::Inval));
        }
        for (offset, len) in [(1, 0), (0, 1)] {
            let header = header(command::FLUSH, CommandFlags::NONE, offset, len);
            assert_eq!(decide(&negotiated, header), Err(NbdError::Inval));
        }
    }
}

#[test]
fn a_read_only_export_takes_no_writes() {
    for replies in STYLES {
        let mut negotiated = negotiated(replies);
        negotiated.export.read_only = true;
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let result = decide(&negotiated, styled(replies, command, 0, 512));
            assert_eq!(result, Err(NbdError::Perm));
        }
        for command in [command::READ, command::CACHE] {
            assert!(decide(&negotiated, styled(replies, command, 0, 512)).is_ok());
        }
        assert!(decide(&negotiated, styled(replies, command::FLUSH, 0, 0)).is_ok());
    }
}

#[test]
fn block_status_needs_its_context() {
    let mut negotiated = negotiated(ReplyStyle::Structured);
    let status = header(command::BLOCK_STATUS, CommandFlags::NONE, 0, 512);
    assert!(decide(&negotiated, status).is_ok());
    negotiated.allocation_context = None;
    assert_eq!(decide(&negotiated, status), Err(NbdError::Inval));
}

#[test]
fn lengths_of_reads_and_writes() {
    let max = REQUEST_PAYLOAD_BYTES_MAX;
    for replies in STYLES {
        let negotiated = negotiated(replies);
        let of = |command, len| decide(&negotiated, styled(replies, command, 0, len));
        assert!(of(command::READ, max).is_ok());
        assert_eq!(of(command::READ, max + 1), Err(NbdError::Overflow));
        assert!(of(command::WRITE, max).is_ok());
        assert_eq!(of(command::WRITE, max + 1), Err(NbdError::Inval));
        assert_eq!(of(command::WRITE, WRITE_DRAIN_BYTES_MAX), Err(NbdError::Inval));
        assert!(of(command::TRIM, SIZE).is_ok());
        assert!(of(command::WRITE_ZEROES, SIZE).is_ok());
    }
}

#[test]
fn a_payload_beyond_the_drain_bound_is_fatal() {
    // Goal: the connection closes at the header; a wrong command does not hide the payload.
    let length = WRITE_DRAIN_BYTES_MAX + 1;
    let payload = CommandFlags::PAYLOAD_LEN;
    let cases = [
        (ReplyStyle::Simple, header(command::WRITE, CommandFlags::NONE, 0, length)),
        (
            ReplyStyle::Structured,
            header(command::WRITE, CommandFlags::NONE, 0, u64::from(u32::MAX)),
        ),
        (ReplyStyle::Extended, header(command::WRITE, payload, 0, u64::MAX)),
        (ReplyStyle::Extended, header(command::READ, payload, 0, length)),
        (ReplyStyle::Extended, header(999, payload, 0, length)),
    ];
    for (replies, header) in cases {
        let mut wire = BytesMut::new();
        header.encode(&mut wire, replies).unwrap();
        let mut decoder = RequestDecoder::new(&negotiated(replies));
        let max = WRITE_DRAIN_BYTES_MAX;
        let expected = Err(TransmissionError::PayloadTooLong { length: header.length, max });
        assert_eq!(decoder.decode(&mut wire), expected);
        assert_eq!(decoder.decode(&mut wire), expected);
    }
}

#[test]
fn a_refused_payload_is_drained_exactly() {
    // Goal: what follows a refused payload is the next request, however the payload is cut.
    for (replies, flags, code) in [
        (ReplyStyle::Simple, CommandFlags::NO_HOLE, command::WRITE),
        (ReplyStyle::Extended, CommandFlags::PAYLOAD_LEN, command::READ),
        (ReplyStyle::Extended, CommandFlags::PAYLOAD_LEN, 77),
    ] {
        for piece in [1, 10, 100, 1000] {
            let mut stream = BytesMut::new();
            header(code, flags, 0, 300).encode(&mut stream, replies).unwrap();
            stream.put_bytes(0x25, 300);
            encode_request(&mut stream, replies, 10, &Command::Flush, false).unwrap();
            let mut decoder = RequestDecoder::new(&negotiated(replies));
            let mut input = BytesMut::new();
            let mut found = Vec::new();
            for bytes in stream.chunks(piece) {
                input.extend_from_slice(bytes);
                loop {
                    match decoder.decode(&mut input).unwrap() {
                        Decoded::NeedMore => break,
                        decoded => found.push(decoded),
                    }
                }
            }
            let [Decoded::Refused(refused), Decoded::Request(request)] = found[..] else {
                panic!("{found:?}");
            };
            assert_eq!((refused.cookie, refused.error), (9, NbdError::Inval));
            assert_eq!((request.cookie, request.command), (10, Command::Flush));
            assert!(input.is_empty());
        }
    }
}

#[test]
fn an_extended_write_without_its_flag_is_forgiven() {
    // Goal: qemu's client, which leaves the flag out and sends the payload, is served.
    let replies = ReplyStyle::Extended;
    let mut stream = BytesMut::new();
    header(command::WRITE, CommandFlags::NONE, 0, 5).encode(&mut stream, replies).unwrap();
    stream.put_slice(b"bytes");
    encode_disconnect(&mut stream, replies);
    let mut decoder = RequestDecoder::new(&negotiated(replies));
    let Ok(Decoded::Request(request)) = decoder.decode(&mut stream) else { panic!() };
    assert_eq!(request.command, Command::Write { offset: 0, len: 5 });
    let mut dest = [0; 5];
    assert_eq!(decoder.take_payload(&mut stream, &mut dest), 5);
    assert_eq!(&dest, b"bytes");
    assert_eq!(decoder.decode(&mut stream), Ok(Decoded::Disconnect));
}

#[test]
fn a_payload_comes_from_the_input_and_from_the_socket() {
    for replies in STYLES {
        let mut stream = BytesMut::new();
        let write = Command::Write { offset: 512, len: 10 };
        encode_request(&mut stream, replies, 1, &write, true).unwrap();
        stream.put_slice(b"0123");
        let mut decoder = RequestDecoder::new(&negotiated(replies));
        let Decoded::Request(request) = decoder.decode(&mut stream).unwrap() else { panic!() };
        assert_eq!(request.command, write);
        assert_eq!(decoder.payload_remaining(), 10);
        let mut dest = [0; 10];
        assert_eq!(decoder.take_payload(&mut stream, &mut dest[..3]), 3);
        assert_eq!(decoder.take_payload(&mut stream, &mut dest[3..]), 1);
        assert_eq!(&dest[..4], b"0123");
        assert_eq!(decoder.take_payload(&mut stream, &mut dest[4..]), 0);
        decoder.payload_received(4);
        assert_eq!(decoder.payload_remaining(), 2);
        stream.put_slice(b"89");
        encode_disconnect(&mut stream, replies);
        assert_eq!(decoder.take_payload(&mut stream, &mut dest[8..]), 2);
        assert_eq!(decoder.payload_remaining(), 0);
        assert_eq!(decoder.decode(&mut stream), Ok(Decoded::Disconnect));
        assert_eq!(decoder.decode(&mut stream), Ok(Decoded::Disconnect));
        assert!(stream.is_empty());
    }
}

#[test]
fn the_session_may_refuse_a_write_it_has_begun() {
    let mut stream = BytesMut::new();
    let write = Command::Write { offset: 512, len: 10 };
    encode_request(&mut stream, ReplyStyle::Simple, 1, &write, false).unwrap();
    stream.put_slice(b"01234");
    let mut decoder = RequestDecoder::new(&negotiated(ReplyStyle::Simple));
    assert!(matches!(decoder.decode(&mut stream), Ok(Decoded::Request(_))));
    decoder.take_payload(&mut stream, &mut [0; 2]);
    decoder.refuse_write(NbdError::NoSpc, "the volume has no room");
    assert_eq!(decoder.payload_remaining(), 0);
    assert_eq!(decoder.decode(&mut stream), Ok(Decoded::NeedMore));
    stream.put_slice(b"56789");
    let refused = Refused {
        cookie: 1,
        offset: 512,
        command: CommandKind::Write,
        error: NbdError::NoSpc,
        message: "the volume has no room",
    };
    assert_eq!(decoder.decode(&mut stream), Ok(Decoded::Refused(refused)));
    assert_eq!(decoder.decode(&mut stream), Ok(Decoded::NeedMore));
}

// Goal: a decoder made anew may take another's place where it says so, and nowhere else.
#[test]
fn between_requests_is_where_nothing_of_one_was_taken() {
    let mut stream = BytesMut::new();
    let write = Command::Write { offset: 512, len: 10 };
    encode_request(&mut stream, ReplyStyle::Simple, 1, &write, false).unwrap();
    stream.put_slice(b"0123456789");
    let header = RequestHeader::encoded_len(ReplyStyle::Simple);
    let mut decoder = RequestDecoder::new(&negotiated(ReplyStyle::Simple));
    let mut half = stream.split_to(header / 2);
    assert_eq!(decoder.decode(&mut half), Ok(Decoded::NeedMore));
    assert!(decoder.is_between_requests(), "half a header is still in the input");
    half.unsplit(stream);
    assert!(matches!(decoder.decode(&mut half), Ok(Decoded::Request(_))));
    assert!(!decoder.is_between_requests());
    decoder.take_payload(&mut half, &mut [0; 4]);
    decoder.refuse_write(NbdError::NoSpc, "the volume has no room");
    assert!(!decoder.is_between_requests(), "a refused payload is thrown away first");
    assert!(matches!(decoder.decode(&mut half), Ok(Decoded::Refused(_))));
    assert!(decoder.is_between_requests());
    encode_disconnect(&mut half, ReplyStyle::Simple);
    assert_eq!(decoder.decode(&mut half), Ok(Decoded::Disconnect));
    assert!(!decoder.is_between_requests());
}

#[test]
#[should_panic(expected = "payload outstanding")]
fn decoding_on_with_a_payload_outstanding_is_a_bug() {
    let mut stream = BytesMut::new();
    let write = Command::Write { offset: 0, len: 1 };
    encode_request(&mut stream, ReplyStyle::Simple, 1, &write, false).unwrap();
    let mut decoder = RequestDecoder::new(&negotiated(ReplyStyle::Simple));
    let _ = decoder.decode(&mut stream);
    let _ = decoder.decode(&mut stream);
}

#[test]
fn a_request_of_the_other_style_is_fatal() {
    for (sent, expected) in
        [(ReplyStyle::Simple, ReplyStyle::Extended), (ReplyStyle::Extended, ReplyStyle::Structured)]
    {
        let mut stream = BytesMut::new();
        encode_request(&mut stream, sent, 1, &Command::Flush, false).unwrap();
        encode_request(&mut stream, sent, 1, &Command::Flush, false).unwrap();
        let found = u32::from_be_bytes(stream[..4].try_into().unwrap());
        let result = RequestDecoder::new(&negotiated(expected)).decode(&mut stream);
        assert_eq!(result, Err(TransmissionError::BadMagic { found }));
    }
}

#[test]
fn compact_headers_hold_32_bits() {
    let mut out = BytesMut::new();
    let trim = Command::Trim { offset: 0, len: 1 << 32 };
    assert!(encode_request(&mut out, ReplyStyle::Structured, 1, &trim, false).is_err());
    assert!(out.is_empty());
    assert!(encode_request(&mut out, ReplyStyle::Extended, 1, &trim, false).is_ok());
    let mut negotiated = negotiated(ReplyStyle::Extended);
    negotiated.export.size = EXPORT_BYTES_MAX;
    let decoded = RequestDecoder::new(&negotiated).decode(&mut out).unwrap();
    assert!(matches!(decoded, Decoded::Request(request) if request.command == trim));
}

#[test]
fn block_status_is_cut_to_what_the_style_holds() {
    // Goal: an extent above 32 bits is cut to a block boundary and ends the compact answer.
    let extent = |len| Extent { len, hole: true, zero: true };
    let extents = [extent(4096), extent(1 << 40), extent(4096)];
    let status = |replies, extents: &[Extent]| {
        let mut out = BytesMut::new();
        ReplyEncoder::new(&negotiated(replies)).block_status(&mut out, &TO, 1, extents, true);
        match ReplyDecoder::new(replies).decode(&mut out, |_| None) {
            Ok(ReplyEvent::BlockStatus { extents, .. }) => extents,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(status(ReplyStyle::Extended, &extents), extents);
    let cut = [extent(4096), extent(u64::from(COMPACT_EXTENT_BYTES_MAX))];
    assert_eq!(status(ReplyStyle::Structured, &extents), cut);
    let many = vec![extent(512); BLOCK_STATUS_EXTENTS_MAX + 1];
    for replies in [ReplyStyle::Structured, ReplyStyle::Extended] {
        assert_eq!(status(replies, &many).len(), BLOCK_STATUS_EXTENTS_MAX);
    }
}

#[test]
fn texts_are_cut_at_a_character() {
    let text = "é".repeat(ERROR_TEXT_BYTES_MAX);
    for replies in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let mut out = BytesMut::new();
        ReplyEncoder::new(&negotiated(replies)).error(&mut out, &TO, NbdError::Io, &text);
        match ReplyDecoder::new(replies).decode(&mut out, |_| None) {
            Ok(ReplyEvent::Error { message, .. }) => {
                assert_eq!(message.len(), ERROR_TEXT_BYTES_MAX);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn hostile_replies_are_errors() {
    // Goal: each way a server's chunk can lie is an error of its own, and takes nothing.
    let chunk = |kind: u16, flags: u16, length: u32, payload: &[u8]| {
        let mut wire = BytesMut::new();
        wire.put_u32(0x668e_33ef);
        wire.put_u16(flags);
        wire.put_u16(kind);
        wire.put_u64(9);
        wire.put_u32(length);
        wire.put_slice(payload);
        wire
    };
    let read = |_| Some(PendingRead { offset: 4096, len: 512 });
    let at = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let cases = [
        (chunk(0, 1, 1, &[0]), ReplyError::BadChunkLength { kind: 0, length: 1 }),
        (chunk(0, 0, 0, &[]), ReplyError::BadChunk { kind: 0 }),
        (chunk(1, 1, 8, &[0; 8]), ReplyError::BadChunkLength { kind: 1, length: 8 }),
        (
            chunk(1, 1, 8 + 513, &4096_u64.to_be_bytes()),
            ReplyError::OutsideRequest { offset: 4096, length: 513 },
        ),
        (
            chunk(1, 1, u32::MAX, &u64::MAX.to_be_bytes()),
            ReplyError::OutsideRequest { offset: u64::MAX, length: u64::from(u32::MAX) - 8 },
        ),
        (chunk(2, 1, 11, &[0; 11]), ReplyError::BadChunkLength { kind: 2, length: 11 }),
        (chunk(2, 1, 12, &at(4096, 0)), ReplyError::BadChunk { kind: 2 }),
        (chunk(2, 1, 12, &at(4095, 1)), ReplyError::OutsideRequest { offset: 4095, length: 1 }),
        (chunk(3, 1, 0, &[]), ReplyError::UnknownChunk { kind: 3 }),
        (chunk(6, 1, 24, &[0; 24]), ReplyError::UnknownChunk { kind: 6 }),
        (chunk(5, 1, 4, &[0; 4]), ReplyError::BadChunk { kind: 5 }),
        (chunk(5, 1, 12, &[0; 12]), ReplyError::BadChunk { kind: 5 }),
        (chunk(5, 1, 13, &[1; 13]), ReplyError::BadChunk { kind: 5 }),
        (
            chunk(5, 1, u32::MAX, &[]),
            ReplyError::BadChunkLength { kind: 5, length: u64::from(u32::MAX) },
        ),
        (chunk(0x8001, 1, 6, &[0, 0, 0, 5, 0, 1]), ReplyError::BadChunk { kind: 0x8001 }),
        (chunk(0x8002, 1, 6, &[0, 0, 0, 5, 0, 0]), ReplyError::BadChunk { kind: 0x8002 }),
        (
            chunk(0x8001, 1, 1 << 20, &[]),
            ReplyError::BadChunkLength { kind: 0x8001, length: 1 << 20 },
        ),
    ];
    for (wire, expected) in cases {
        let mut input = wire.clone();
        let mut decoder = ReplyDecoder::new(ReplyStyle::Structured);
        assert_eq!(decoder.decode(&mut input, read), Err(expected));
        assert_eq!(input, wire);
    }
    // Content nobody asked for.
    let mut input = chunk(2, 1, 12, &at(4096, 1));
    let result = ReplyDecoder::new(ReplyStyle::Structured).decode(&mut input, |_| None);
    assert_eq!(result, Err(ReplyError::NotARead { cookie: 9 }));
    // An error of an unknown type is an error all the same.
    let mut input = chunk(0x80ff, 0, 10, &[0, 0, 0, 5, 0, 2, b'n', b'o', 1, 2]);
    let result = ReplyDecoder::new(ReplyStyle::Structured).decode(&mut input, |_| None);
    let (message, error) = ("no".to_owned(), NbdError::Io);
    let expected = ReplyEvent::Error { cookie: 9, error, message, offset: None, last: false };
    assert_eq!(result, Ok(expected));
}

#[test]
fn simple_replies_under_structured_ones() {
    // Goal: a server may answer anything with a simple reply, but not a read.
    let mut out = BytesMut::new();
    ReplyEncoder::new(&negotiated(ReplyStyle::Simple)).done(&mut out, &TO);
    let mut decoder = ReplyDecoder::new(ReplyStyle::Structured);
    let read = |_| Some(PendingRead { offset: 4096, len: 512 });
    assert_eq!(decoder.decode(&mut out.clone(), read), Err(ReplyError::SimpleReplyToRead));
    let done = Ok(ReplyEvent::Done { cookie: 9 });
    assert_eq!(decoder.decode(&mut out.clone(), |_| None), done);
    let result = ReplyDecoder::new(ReplyStyle::Extended).decode(&mut out, |_| None);
    assert_eq!(result, Err(ReplyError::BadMagic { found: 0x6744_6698 }));
}

#[test]
fn our_server_never_sends_simple_replies_once_structured() {
    for replies in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let encoder = ReplyEncoder::new(&negotiated(replies));
        let mut out = BytesMut::new();
        encoder.done(&mut out, &TO);
        assert_ne!(out[..4], 0x6744_6698_u32.to_be_bytes());
        out.clear();
        encoder.error(&mut out, &TO, NbdError::Inval, "");
        assert_ne!(out[..4], 0x6744_6698_u32.to_be_bytes());
    }
}

fn any_style() -> impl Strategy<Value = ReplyStyle> {
    prop::sample::select(&STYLES[..])
}

/// Commands that pass validation under `replies`.
fn any_command(replies: ReplyStyle) -> impl Strategy<Value = Command> {
    let chunked = replies != ReplyStyle::Simple;
    let range = (0..SIZE).prop_flat_map(|offset| (Just(offset), 0..=(SIZE - offset).min(4096)));
    (range, any::<bool>(), 0..if chunked { 7 } else { 6 }).prop_map(
        move |((offset, len), flag, kind)| match kind {
            0 => Command::Read { offset, len, dont_fragment: flag && chunked },
            1 => Command::Write { offset, len },
            2 => Command::Flush,
            3 => Command::Trim { offset, len },
            4 => Command::Cache { offset, len },
            5 => Command::WriteZeroes { offset, len, no_hole: flag },
            _ => Command::BlockStatus { offset, len: len.max(1), req_one: flag },
        },
    )
}

/// A style and requests of it: cookie, command, FUA.
type Requests = (ReplyStyle, Vec<(u64, Command, bool)>);

fn any_requests() -> impl Strategy<Value = Requests> {
    any_style().prop_flat_map(|replies| {
        let request = (any::<u64>(), any_command(replies), any::<bool>());
        (Just(replies), prop::collection::vec(request, 1..8))
    })
}

fn encode_all((replies, requests): &Requests) -> BytesMut {
    let mut stream = BytesMut::new();
    for (cookie, command, fua) in requests {
        encode_request(&mut stream, *replies, *cookie, command, *fua).unwrap();
        if let Command::Write { len, .. } = command {
            stream.put_bytes(cookie.to_le_bytes()[0], usize::try_from(*len).unwrap());
        }
    }
    stream
}

/// Everything found in `stream` when it comes in pieces, and what was left over.
fn decode_all(
    replies: ReplyStyle,
    stream: &[u8],
    piece: usize,
) -> (Vec<(u64, Command, Vec<u8>)>, usize) {
    let mut decoder = RequestDecoder::new(&negotiated(replies));
    let mut input = BytesMut::new();
    let mut found: Vec<(u64, Command, Vec<u8>)> = Vec::new();
    let mut scratch = [0; 64];
    for bytes in stream.chunks(piece) {
        input.extend_from_slice(bytes);
        loop {
            if decoder.payload_remaining() > 0 {
                let taken = decoder.take_payload(&mut input, &mut scratch);
                found.last_mut().unwrap().2.extend_from_slice(&scratch[..taken]);
                if taken == 0 {
                    break;
                }
                continue;
            }
            match decoder.decode(&mut input).unwrap() {
                Decoded::NeedMore => break,
                Decoded::Request(request) => {
                    found.push((request.cookie, request.command, Vec::new()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    let missing = usize::try_from(decoder.payload_remaining()).unwrap();
    (found, input.len() + missing)
}

proptest! {
    #[test]
    fn requests_round_trip(requests in any_requests(), piece in 1_usize..200) {
        let stream = encode_all(&requests);
        let (found, left) = decode_all(requests.0, &stream, piece);
        prop_assert_eq!(left, 0);
        prop_assert_eq!(found.len(), requests.1.len());
        for ((cookie, command, payload), (sent_cookie, sent, _)) in found.iter().zip(&requests.1) {
            prop_assert_eq!((cookie, command), (sent_cookie, sent));
            if let Command::Write { len, .. } = sent {
                prop_assert_eq!(payload.len() as u64, *len);
                prop_assert!(payload.iter().all(|byte| *byte == cookie.to_le_bytes()[0]));
            }
        }
    }

    #[test]
    fn a_cut_request_stream_yields_a_prefix(
        requests in any_requests(),
        cut in any::<prop::sample::Index>(),
    ) {
        let stream = encode_all(&requests);
        let (all, _) = decode_all(requests.0, &stream, stream.len());
        let cut = cut.index(stream.len());
        let (found, _) = decode_all(requests.0, &stream[..cut], cut.max(1));
        prop_assert!(found.len() <= all.len());
        for (index, (found, whole)) in found.iter().zip(&all).enumerate() {
            prop_assert_eq!((found.0, found.1), (whole.0, whole.1), "request {}", index);
            prop_assert!(whole.2.starts_with(&found.2));
        }
    }

    #[test]
    fn headers_round_trip(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) {
        for replies in STYLES {
            let is_long = replies == ReplyStyle::Extended;
            let length = if is_long { length } else { length & 0xffff_ffff };
            let flags = CommandFlags::from_bits(flags);
            let header = RequestHeader { flags, command, cookie, offset, length };
            let mut out = BytesMut::new();
            header.encode(&mut out, replies).unwrap();
            prop_assert_eq!(out.len(), RequestHeader::encoded_len(replies));
            prop_assert_eq!(RequestHeader::decode(&out, replies), Ok(Some(header)));
            for cut in 0..out.len() {
                prop_assert_eq!(RequestHeader::decode(&out[..cut], replies), Ok(None));
            }
        }
    }

    #[test]
    fn replies_round_trip_and_every_cut_waits(
        replies in any_style(),
        cookie: u64,
        offset in 0_u64..1 << 40,
        len in 1_u64..REQUEST_PAYLOAD_BYTES_MAX,
        text in ".{0,40}",
        last: bool,
        lens in prop::collection::vec(1_u64..1 << 31, 1..20),
    ) {
        let encoder = ReplyEncoder::new(&negotiated(replies));
        let to = ReplyTo { cookie, offset };
        let chunked = encoder.can_send_holes();
        let mut cases: Vec<(BytesMut, ReplyEvent)> = Vec::new();
        let mut case = |event: ReplyEvent, encode: &dyn Fn(&mut BytesMut)| {
            let mut out = BytesMut::new();
            encode(&mut out);
            cases.push((out, event));
        };
        let message = if chunked { text.clone() } else { String::new() };
        let error = NbdError::Overflow;
        case(
            ReplyEvent::Error { cookie, error, message: message.clone(), offset: None, last: true },
            &|out| encoder.error(out, &to, error, &text),
        );
        let whole = last || !chunked;
        case(ReplyEvent::Data { cookie, offset, len, last: whole }, &|out| {
            encoder.read_prefix(out, &to, offset, len, whole);
        });
        if chunked {
            case(ReplyEvent::Done { cookie }, &|out| encoder.done(out, &to));
            case(ReplyEvent::Hole { cookie, offset, len, last }, &|out| {
                encoder.read_hole(out, &to, offset, len, last);
            });
            case(
                ReplyEvent::Error { cookie, error, message, offset: Some(offset), last: true },
                &|out| encoder.read_error_after_data(out, &to, offset, error, &text),
            );
            let extents: Vec<Extent> = lens
                .iter()
                .map(|len| Extent { len: *len, hole: len % 2 == 0, zero: len % 3 == 0 })
                .collect();
            case(
                ReplyEvent::BlockStatus { cookie, context_id: 5, extents: extents.clone(), last },
                &|out| encoder.block_status(out, &to, 5, &extents, last),
            );
        }
        let pending = |_| Some(PendingRead { offset, len });
        for (wire, event) in cases {
            for cut in 0..wire.len() {
                let mut input = BytesMut::from(&wire[..cut]);
                let found = ReplyDecoder::new(replies).decode(&mut input, pending);
                prop_assert_eq!(found, Ok(ReplyEvent::NeedMore));
                prop_assert_eq!(input.len(), cut);
            }
            let mut input = wire.clone();
            input.put_slice(b"rest");
            let mut decoder = ReplyDecoder::new(replies);
            prop_assert_eq!(decoder.decode(&mut input, pending), Ok(event.clone()));
            prop_assert_eq!(&input[..], b"rest");
            let is_data = matches!(event, ReplyEvent::Data { .. });
            prop_assert_eq!(decoder.payload_remaining(), if is_data { len } else { 0 });
        }
    }
}
