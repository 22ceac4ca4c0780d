//! The fuzzers' committed corpus, built from the crate's own encoders: one named conversation a
//! file. The first bytes of each steer the entry (see `nbd_proto::fuzzing`), the rest is the
//! stream.

use bytes::{BufMut, BytesMut};
use nbd_proto::constants::{ALLOCATION_CONTEXT_ID, CommandFlags, command, option, option_reply};
use nbd_proto::option::{
    InfoOption, InfoRequests, MetaContextOption, encode_option, encode_option_reply,
};
use nbd_proto::{
    Command, ExportInfo, ExportName, Extent, NbdError, Negotiated, ReplyEncoder, ReplyStyle,
    ReplyTo, RequestHeader, ServerHandshake, encode_disconnect, encode_request,
};

/// One file of the corpus.
pub(crate) struct Seed {
    /// Which fuzz target it is for.
    pub(crate) target: &'static str,
    /// Its file name: what the conversation is about.
    pub(crate) name: &'static str,
    /// Its content.
    pub(crate) bytes: Vec<u8>,
}

/// The whole corpus.
pub(crate) fn all() -> Vec<Seed> {
    let targets = [
        ("server_handshake", handshakes()),
        ("transmission", transmissions()),
        ("client", clients()),
    ];
    let of = |(target, seeds): (&'static str, Vec<(&'static str, BytesMut)>)| {
        seeds.into_iter().map(move |(name, bytes)| Seed { target, name, bytes: bytes.to_vec() })
    };
    targets.into_iter().flat_map(of).collect()
}

fn name(text: &str) -> ExportName {
    text.parse().unwrap()
}

/// A client's stream: what to refuse, its flags, and options.
fn options(refusals: u8, flags: u32, options: &[(u32, &[u8])]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u8(refusals);
    out.put_u32(flags);
    for (option, data) in options {
        encode_option(&mut out, *option, data);
    }
    out
}

fn handshakes() -> Vec<(&'static str, BytesMut)> {
    let info = |text: &str, name_it, describe, block_size| {
        let requests = InfoRequests { name: name_it, description: describe, block_size };
        InfoOption { name: name(text), requests }.encode()
    };
    let meta = |text: &str, queries: &[&str]| {
        let queries = queries.iter().map(|query| query.as_bytes()).collect();
        MetaContextOption { name: name(text), queries }.encode()
    };
    let go = info("disk", false, false, false);
    let go_all = info("disk", true, true, true);
    let select = meta("disk", &["base:allocation"]);
    let trailing = [&select[..], &options(0, 0, &[(option::ABORT, b"")])[5..]].concat();
    let lying = [&u32::MAX.to_be_bytes()[..], b"disk\0\0"].concat();
    let many_kinds: Vec<u8> = [0, 0, 0, 0, 0, 200].into_iter().chain([0, 3].repeat(200)).collect();
    let repeated = [(option::STRUCTURED_REPLY, &b""[..]); 40];
    let (structured, extended) = ((option::STRUCTURED_REPLY, &b""[..]), option::EXTENDED_HEADERS);
    let mut magic = options(0, 3, &[(option::GO, &go)]);
    magic[5] ^= 1;
    let mut huge = options(0, 3, &[(99, b"")]);
    let at = huge.len() - 4;
    huge[at..].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut pipelined = options(0, 3, &[structured, (option::GO, &go)]);
    encode_request(&mut pipelined, ReplyStyle::Structured, 1, &Command::Flush, true).unwrap();
    let write = Command::Write { offset: 4096, len: 16 };
    encode_request(&mut pipelined, ReplyStyle::Structured, 2, &write, false).unwrap();
    pipelined.put_slice(b"sixteen bytes of");
    encode_disconnect(&mut pipelined, ReplyStyle::Structured);
    let mut cut = options(0, 3, &[(option::GO, &go_all)]);
    cut.truncate(cut.len() - 3);
    vec![
        ("export_name", options(0, 3, &[(option::EXPORT_NAME, b"disk")])),
        ("export_name_padded", options(0, 1, &[(option::EXPORT_NAME, b"disk")])),
        ("export_name_not_fixed", options(0, 0, &[(option::EXPORT_NAME, b"")])),
        ("export_name_refused", options(1, 3, &[(option::EXPORT_NAME, b"disk")])),
        ("export_name_nul", options(0, 3, &[(option::EXPORT_NAME, b"good\0junk")])),
        ("export_name_too_long", options(0, 3, &[(option::EXPORT_NAME, &[b'x'; 4097])])),
        ("export_name_after_extended", {
            options(0, 3, &[(extended, b""), (option::EXPORT_NAME, b"disk")])
        }),
        ("go", options(0, 3, &[(option::GO, &go)])),
        ("go_every_information", options(0, 3, &[(option::GO, &go_all)])),
        ("go_cut", cut),
        ("go_lying_name_length", options(0, 3, &[(option::GO, &lying)])),
        ("go_repeated_kinds", options(0, 3, &[(option::GO, &many_kinds)])),
        ("go_refused_then_abort", { options(1, 3, &[(option::GO, &go), (option::ABORT, b"bye")]) }),
        ("go_then_requests", pipelined),
        ("info_then_go", options(0, 3, &[(option::INFO, &go_all), (option::GO, &go_all)])),
        ("list", options(0, 3, &[(option::LIST, b""), (option::ABORT, b"")])),
        ("list_refused", options(1, 3, &[(option::LIST, b"")])),
        ("list_with_data", options(0, 3, &[(option::LIST, b"data"), (option::LIST, b"")])),
        ("abort", options(0, 3, &[(option::ABORT, b"")])),
        ("starttls", options(0, 3, &[(option::STARTTLS, b""), (option::GO, &go)])),
        ("peek_export", options(0, 3, &[(option::PEEK_EXPORT, b"disk")])),
        ("unknown_option", options(0, 3, &[(0xdead_beef, b"data"), (option::GO, &go)])),
        ("unknown_option_huge", huge),
        ("structured_then_extended", {
            options(0, 3, &[structured, (extended, b""), structured, (option::GO, &go)])
        }),
        ("structured_forty_times", options(0, 3, &repeated)),
        ("meta_list_all", {
            options(0, 3, &[structured, (option::LIST_META_CONTEXT, &meta("", &[]))])
        }),
        ("meta_select_then_go", {
            let select = (option::SET_META_CONTEXT, &select[..]);
            options(0, 3, &[(extended, b""), select, (option::GO, &go)])
        }),
        ("meta_select_other_name", {
            let other = meta("other", &["base:allocation"]);
            let select = (option::SET_META_CONTEXT, &other[..]);
            options(0, 3, &[structured, select, (option::GO, &go)])
        }),
        ("meta_select_before_structured", {
            options(0, 3, &[(option::SET_META_CONTEXT, &select), (option::GO, &go)])
        }),
        ("meta_trailing_option_header", {
            options(0, 3, &[structured, (option::SET_META_CONTEXT, &trailing)])
        }),
        ("meta_too_many_queries", {
            let data = meta("disk", &["base:"; 33]);
            options(0, 3, &[structured, (option::LIST_META_CONTEXT, &data)])
        }),
        ("client_flags_unknown", options(0, 7, &[])),
        ("client_flags_not_fixed_go", options(0, 0, &[(option::GO, &go)])),
        ("option_magic_wrong", magic),
        ("http_request", BytesMut::from(&b"\0GET / HTTP/1.1\r\nHost: nbd\r\n\r\n"[..])),
    ]
}

/// A client's stream in transmission: settings, size, then what `put` adds.
fn requests(settings: u8, size: u8, put: impl Fn(&mut BytesMut, ReplyStyle)) -> BytesMut {
    let styles = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
    let mut out = BytesMut::from(&[settings, size][..]);
    put(&mut out, styles[usize::from(settings & 3)]);
    out
}

fn put_command(out: &mut BytesMut, replies: ReplyStyle, cookie: u64, command: Command) {
    encode_request(out, replies, cookie, &command, false).unwrap();
    if let Command::Write { len, .. } = command {
        out.put_bytes(b'w', usize::try_from(len).unwrap());
    }
}

fn one(settings: u8, command: Command) -> BytesMut {
    requests(settings, 0, |out, replies| {
        put_command(out, replies, 1, command);
        put_command(out, replies, 2, Command::Flush);
    })
}

fn raw(settings: u8, flags: CommandFlags, command: u16, offset: u64, length: u64) -> BytesMut {
    requests(settings, 0, |out, replies| {
        let header = RequestHeader { flags, command, cookie: 1, offset, length };
        header.encode(out, replies).unwrap();
        out.put_bytes(0, usize::try_from(length.min(200)).unwrap());
        put_command(out, replies, 2, Command::Flush);
    })
}

fn transmissions() -> Vec<(&'static str, BytesMut)> {
    let (offset, len) = (8192, 300);
    let read = Command::Read { offset, len, dont_fragment: false };
    let write = Command::Write { offset, len: 40 };
    let zeroes = Command::WriteZeroes { offset, len: 1 << 20, no_hole: true };
    let status = Command::BlockStatus { offset, len, req_one: true };
    let long_status = Command::BlockStatus { offset: 0, len: u64::from(u32::MAX), req_one: false };
    let (none, payload) = (CommandFlags::NONE, CommandFlags::PAYLOAD_LEN);
    let wide = Command::Trim { offset: 0, len: 1 << 44 };
    vec![
        ("read_simple", one(0, read)),
        ("read_structured", one(1, read)),
        ("read_extended", one(2, read)),
        ("read_dont_fragment", one(1, Command::Read { offset, len, dont_fragment: true })),
        ("read_empty", one(1, Command::Read { offset, len: 0, dont_fragment: false })),
        ("read_past_end", raw(0, none, command::READ, (1 << 30) - 1, 2)),
        ("read_wrapping", raw(0, none, command::READ, u64::MAX, 2)),
        ("read_too_long", raw(1, none, command::READ, 0, 1 << 26)),
        ("read_with_payload", raw(2, payload, command::READ, 0, 100)),
        ("write_simple", one(0, write)),
        ("write_structured", one(1, write)),
        ("write_extended", one(2, write)),
        ("write_extended_without_flag", raw(2, none, command::WRITE, 0, 100)),
        ("write_empty", one(0, Command::Write { offset, len: 0 })),
        ("write_read_only", one(4, write)),
        ("write_past_end", raw(0, none, command::WRITE, 1 << 30, 100)),
        ("write_flag_of_another", raw(0, CommandFlags::NO_HOLE, command::WRITE, 0, 100)),
        ("write_cut_payload", {
            let mut out = one(0, write);
            out.truncate(2 + 28 + 39);
            out
        }),
        ("write_longer_than_payload_max", raw(0, none, command::WRITE, 0, (32 << 20) + 1)),
        ("write_longer_than_drain_max", raw(0, none, command::WRITE, 0, u64::from(u32::MAX))),
        ("write_extended_huge", raw(2, payload, command::WRITE, 0, u64::MAX)),
        ("flush", one(0, Command::Flush)),
        ("flush_of_something", raw(0, none, command::FLUSH, 1, 1)),
        ("trim", one(0, Command::Trim { offset, len })),
        ("trim_64_bit", { requests(2, 5, |out, replies| put_command(out, replies, 1, wide)) }),
        ("cache", one(0, Command::Cache { offset, len })),
        ("write_zeroes", one(0, zeroes)),
        ("write_zeroes_fast", raw(0, CommandFlags::FAST_ZERO, command::WRITE_ZEROES, 0, 512)),
        ("block_status", one(1 | 8, status)),
        ("block_status_extended", one(2 | 8, status)),
        ("block_status_without_context", one(1, status)),
        ("block_status_4_gib", {
            requests(1 | 8, 5, |out, replies| put_command(out, replies, 1, long_status))
        }),
        ("fua_everywhere", {
            requests(1 | 8, 0, |out, replies| {
                for (cookie, command) in (1..).zip([read, Command::Flush, zeroes, status]) {
                    encode_request(out, replies, cookie, &command, true).unwrap();
                }
            })
        }),
        ("unknown_command", raw(0, none, 4711, 0, 0)),
        ("unknown_flag", raw(0, CommandFlags::from_bits(0x8000), command::READ, 0, 1)),
        ("disconnect_then_more", {
            requests(0, 0, |out, replies| {
                encode_disconnect(out, replies);
                put_command(out, replies, 1, read);
            })
        }),
        ("other_style", { requests(2, 0, |out, _| put_command(out, ReplyStyle::Simple, 1, read)) }),
        ("empty_export", requests(0, 1, |out, replies| put_command(out, replies, 1, read))),
    ]
}

/// A server's stream: settings, the greeting, then what `put` adds.
fn server(settings: u8, put: impl Fn(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u8(settings);
    out.put(ServerHandshake::new().take_output());
    put(&mut out);
    out
}

fn acks(out: &mut BytesMut, options: &[u32]) {
    options.iter().for_each(|option| encode_option_reply(out, *option, option_reply::ACK, &[]));
}

/// The rest of a server's stream once the goal is asked: information, and an acknowledgement.
fn put_go(out: &mut BytesMut, option: u32) {
    let export = [&[0; 2][..], &(1_u64 << 30).to_be_bytes(), &[0x0d, 0xed]].concat();
    let sizes = [&[0, 3][..], &[0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]].concat();
    for data in [&export[..], b"\0\x01disk", b"\0\x02text", &sizes, b"\0\x77?"] {
        encode_option_reply(out, option, option_reply::INFO, &[data]);
    }
    acks(out, &[option]);
}

fn replies(settings: u8, put: impl Fn(&mut BytesMut, &ReplyEncoder)) -> BytesMut {
    let (style, option) = match settings & 3 {
        0 => (ReplyStyle::Simple, None),
        2 => (ReplyStyle::Extended, Some(option::EXTENDED_HEADERS)),
        _ => (ReplyStyle::Structured, Some(option::STRUCTURED_REPLY)),
    };
    let export = ExportInfo {
        name: name("disk"),
        description: String::new(),
        size: 1 << 30,
        read_only: false,
    };
    let encoder =
        ReplyEncoder::new(&Negotiated { export, replies: style, allocation_context: None });
    server(settings, |out| {
        acks(out, option.as_slice());
        put_go(out, option::GO);
        put(out, &encoder);
    })
}

fn clients() -> Vec<(&'static str, BytesMut)> {
    let (extended, structured) = (option::EXTENDED_HEADERS, option::STRUCTURED_REPLY);
    let (info, list) = (1 << 2, 2 << 2);
    // The entry expects reads of `cookie % 4096` bytes from 512 on.
    let (to, nil) = (ReplyTo { cookie: 601, offset: 512 }, ReplyTo { cookie: 9, offset: 512 });
    let extents = [
        Extent { len: 4096, hole: true, zero: true },
        Extent { len: 8192, hole: false, zero: false },
    ];
    let read = move |out: &mut BytesMut, encoder: &ReplyEncoder| {
        encoder.read_hole(out, &to, 512, 200, false);
        encoder.read_prefix(out, &to, 712, 401, true);
        out.put_bytes(b'd', 401);
        encoder.done(out, &nil);
    };
    let status = move |out: &mut BytesMut, encoder: &ReplyEncoder| {
        encoder.block_status(out, &nil, ALLOCATION_CONTEXT_ID, &extents, true);
    };
    let late = move |out: &mut BytesMut, encoder: &ReplyEncoder| {
        encoder.read_hole(out, &to, 512, 200, false);
        encoder.read_error_after_data(out, &to, 712, NbdError::Io, "lost");
        encoder.error(out, &nil, NbdError::NoSpc, "full");
    };
    vec![
        ("go_simple", server(32, |out| put_go(out, option::GO))),
        ("go_cut", {
            let mut out = server(32, |out| put_go(out, option::GO));
            out.truncate(out.len() - 5);
            out
        }),
        (
            "go_extended",
            server(2, |out| {
                acks(out, &[extended]);
                put_go(out, option::GO);
            }),
        ),
        (
            "go_extended_with_context",
            server(2 | 16, |out| {
                acks(out, &[extended]);
                let data = b"\0\0\0\x05base:allocation";
                let (option, reply) = (option::SET_META_CONTEXT, option_reply::META_CONTEXT);
                encode_option_reply(out, option, reply, &[data]);
                acks(out, &[option]);
                put_go(out, option::GO);
            }),
        ),
        (
            "everything_unknown",
            server(2 | 16, |out| {
                for option in [extended, structured, option::GO] {
                    encode_option_reply(out, option, option_reply::ERR_UNSUP, &[b"what?"]);
                }
                out.put_slice(&[0, 0, 0, 0, 0, 0, 16, 0, 0, 1]);
            }),
        ),
        (
            "refused_then_abort",
            server(0, |out| {
                encode_option_reply(out, option::GO, option_reply::ERR_UNKNOWN, &[b"no"]);
                acks(out, &[option::ABORT]);
            }),
        ),
        (
            "tls_required",
            server(2, |out| {
                encode_option_reply(out, extended, option_reply::ERR_TLS_REQD, &[]);
            }),
        ),
        (
            "info_then_go",
            server(info, |out| {
                put_go(out, option::INFO);
                put_go(out, option::GO);
            }),
        ),
        ("info_without_export", server(info, |out| acks(out, &[option::INFO]))),
        (
            "list",
            server(list, |out| {
                for data in [&b"\0\0\0\x04disktext"[..], b"\0\0\0\0"] {
                    encode_option_reply(out, option::LIST, option_reply::SERVER, &[data]);
                }
                acks(out, &[option::LIST, option::ABORT]);
            }),
        ),
        (
            "list_lying_name",
            server(list, |out| {
                let data = b"\xff\xff\xff\xffdisk";
                encode_option_reply(out, option::LIST, option_reply::SERVER, &[data]);
            }),
        ),
        ("export_name", server(3 << 2, |out| out.put_slice(&[0, 0, 0, 0, 0, 0, 16, 0, 0, 1]))),
        ("export_too_large", server(3 << 2, |out| out.put_slice(&[255; 10]))),
        ("greeting_oldstyle", BytesMut::from(&b"\0NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"[..])),
        ("greeting_not_fixed", BytesMut::from(&b"\0NBDMAGICIHAVEOPT\0\0\0\0\0\0\0\0\x10"[..])),
        ("reply_to_another_option", server(0, |out| acks(out, &[option::LIST]))),
        (
            "reply_too_long",
            server(0, |out| {
                acks(out, &[option::GO]);
                let at = out.len() - 4;
                out[at..].copy_from_slice(&u32::MAX.to_be_bytes());
            }),
        ),
        (
            "read_simple",
            replies(0, move |out, encoder| {
                encoder.read_prefix(out, &to, 512, 601, true);
                out.put_bytes(b'd', 601);
                encoder.error(out, &to, NbdError::Io, "");
            }),
        ),
        ("read_structured", replies(1, read)),
        ("read_extended", replies(2, read)),
        ("read_failed_late", replies(1, late)),
        ("read_failed_late_extended", replies(2, late)),
        ("block_status", replies(1, status)),
        ("block_status_extended", replies(2, status)),
        (
            "content_outside_read",
            replies(1, move |out, encoder| {
                encoder.read_prefix(out, &to, 512, 602, true);
            }),
        ),
        (
            "content_nobody_asked_for",
            replies(1, move |out, encoder| {
                encoder.read_hole(out, &nil, 512, 1, true);
            }),
        ),
    ]
}
