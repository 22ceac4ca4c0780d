//! No memory is taken by an announced length. In a test binary of its own, so that nothing else
//! moves the process's numbers.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use bytes::{BufMut, BytesMut};
use nbd_proto::constants::{CommandFlags, command, option};
use nbd_proto::limits::{OPTION_SKIP_BYTES_MAX, REQUEST_PAYLOAD_BYTES_MAX, WRITE_DRAIN_BYTES_MAX};
use nbd_proto::{
    Decoded, ExportInfo, ExportName, HandshakeError, Negotiated, PendingRead, ReplyDecoder,
    ReplyEvent, ReplyStyle, RequestDecoder, RequestHeader, ServerHandshake,
};

/// The most address space this process has had, in bytes: counts what was asked for, touched or
/// not.
fn address_space_peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

fn option_header(option: u32, length: u32) -> BytesMut {
    let mut header = BytesMut::from(&b"IHAVEOPT"[..]);
    header.put_u32(option);
    header.put_u32(length);
    header
}

fn haggling() -> ServerHandshake {
    let mut server = ServerHandshake::new();
    assert_eq!(server.receive(&mut BytesMut::from(&[0, 0, 0, 3][..])), Ok(None));
    server
}

fn negotiated(replies: ReplyStyle) -> Negotiated {
    let export = ExportInfo {
        name: ExportName::default(),
        description: String::new(),
        size: 1 << 50,
        read_only: false,
    };
    Negotiated { export, replies, allocation_context: None }
}

#[test]
fn announced_lengths_take_no_memory() {
    // Goal: nothing is allocated by a length a peer announces, only by bytes that came.
    // Method: announce, send next to nothing, and compare the peak of the address space.
    let mut piece = BytesMut::with_capacity(1 << 16);
    let before = address_space_peak();

    for option in 0..20 {
        let result = haggling().receive(&mut option_header(option, u32::MAX));
        assert!(matches!(result, Err(HandshakeError::OptionTooLong { .. })), "option {option}");
    }
    for (option, length) in [(option::GO, 1 << 16), (99, OPTION_SKIP_BYTES_MAX)] {
        let mut server = haggling();
        let header = &mut option_header(option, u32::try_from(length).unwrap());
        assert_eq!(server.receive(header), Ok(None));
        assert!(header.is_empty());
    }

    for length in [REQUEST_PAYLOAD_BYTES_MAX, WRITE_DRAIN_BYTES_MAX] {
        let flags = CommandFlags::PAYLOAD_LEN;
        let header = RequestHeader { flags, command: command::WRITE, cookie: 0, offset: 0, length };
        header.encode(&mut piece, ReplyStyle::Extended).unwrap();
        let mut decoder = RequestDecoder::new(&negotiated(ReplyStyle::Extended));
        let decoded = decoder.decode(&mut piece).unwrap();
        if length == REQUEST_PAYLOAD_BYTES_MAX {
            assert!(matches!(decoded, Decoded::Request(_)));
            assert_eq!(decoder.payload_remaining(), length);
            continue;
        }
        // The whole payload of a refused write passes through one small buffer.
        assert_eq!(decoded, Decoded::NeedMore);
        let mut drained = 0;
        let refused = loop {
            piece.reserve(1 << 16);
            piece.put_bytes(0, 1 << 16);
            drained += 1 << 16;
            match decoder.decode(&mut piece).unwrap() {
                Decoded::NeedMore => assert!(piece.is_empty()),
                other => break other,
            }
        };
        assert!(matches!(refused, Decoded::Refused(_)));
        assert_eq!(drained, length);
    }

    let mut reply = BytesMut::new();
    reply.put_u32(0x6e8a_278c);
    reply.put_u32(0x0001_0001);
    reply.put_u64(7);
    reply.put_u64(0);
    reply.put_u64(8 + (1 << 40));
    reply.put_u64(0);
    let pending = |_| Some(PendingRead { offset: 0, len: 1 << 40 });
    let event = ReplyDecoder::new(ReplyStyle::Extended).decode(&mut reply, pending);
    assert!(matches!(event, Ok(ReplyEvent::Data { len, .. }) if len == 1 << 40));

    let grown = address_space_peak() - before;
    assert!(grown < 1 << 20, "the address space grew by {grown} bytes");
}
