//! The handshake: our client against our server, every order of options, hostile options, and
//! limits.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use bytes::{BufMut, BytesMut};
use nbd_proto::constants::{ALLOCATION_CONTEXT_ID, TransmissionFlags, option, option_reply};
use nbd_proto::limits::{
    DESCRIPTION_BYTES_MAX, EXPORT_NAME_BYTES_MAX, LIST_REPLY_BYTES_MAX, META_QUERIES_MAX,
    OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX, OPTIONS_MAX,
};
use nbd_proto::option::{InfoOption, InfoRequests, MetaContextOption, encode_option};
use nbd_proto::{
    Attached, ClientEvent, ClientGoal, ClientHandshake, ClientHandshakeError, ClientWish,
    ExportInfo, ExportName, ExportNameError, ExportRefusal, HandshakeError, HandshakeEvent,
    Negotiated, Purpose, ReplyStyle, ServerHandshake,
};
use proptest::prelude::*;

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

fn name(text: &str) -> ExportName {
    text.parse().unwrap()
}

fn disk() -> ExportInfo {
    let description = "a volume".to_owned();
    ExportInfo { name: name("disk"), description, size: 1 << 40, read_only: false }
}

/// The server's owner: `disk` exists, also as the default export, and nothing else does.
fn lookup(asked: &ExportName) -> Result<ExportInfo, ExportRefusal> {
    match asked.as_str() {
        "" | "disk" => Ok(disk()),
        _ => Err(ExportRefusal::Unknown),
    }
}

/// Acts on `event` as [`lookup`] says.
fn act(server: &mut ServerHandshake, event: HandshakeEvent) -> Option<Negotiated> {
    match event {
        HandshakeEvent::Resolve { name, purpose } => {
            let agreement = (purpose == Purpose::Attach).then(|| server.agreement());
            let negotiated = server.answer_export(lookup(&name));
            if let Some(Negotiated { replies, allocation_context, .. }) = &negotiated {
                assert_eq!(agreement, Some((*replies, *allocation_context)), "known before");
            }
            negotiated
        }
        HandshakeEvent::List => {
            server.answer_list([(name("disk"), "a volume".to_owned())].into_iter());
            None
        }
        HandshakeEvent::Aborted => None,
    }
}

/// A server past the client's flags (fixed newstyle, no zeroes), with an empty output.
fn haggling() -> ServerHandshake {
    let mut server = ServerHandshake::new();
    assert_eq!(server.receive(&mut BytesMut::from(&[0, 0, 0, 3][..])), Ok(None));
    server.take_output();
    server
}

fn option_bytes(option: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    encode_option(&mut out, option, data);
    out
}

fn go_data(name: &ExportName) -> BytesMut {
    InfoOption { name: name.clone(), requests: InfoRequests::default() }.encode()
}

fn meta_data(name: &ExportName, queries: &[&str]) -> BytesMut {
    let queries = queries.iter().map(|query| query.as_bytes()).collect();
    MetaContextOption { name: name.clone(), queries }.encode()
}

/// Type and data of every option reply in `output`.
fn replies(output: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut rest = output;
    let mut found = Vec::new();
    while !rest.is_empty() {
        assert_eq!(rest[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let reply = u32::from_be_bytes(rest[12..16].try_into().unwrap());
        let length = u32::from_be_bytes(rest[16..20].try_into().unwrap()) as usize;
        found.push((reply, rest[20..20 + length].to_vec()));
        rest = &rest[20 + length..];
    }
    found
}

/// Sends one option and acts on what comes of it: the reply types, and the end if it is one.
fn exchange(
    server: &mut ServerHandshake,
    option: u32,
    data: &[u8],
) -> (Vec<u32>, Option<Negotiated>) {
    let mut input = option_bytes(option, data);
    let mut negotiated = None;
    while let Some(event) = server.receive(&mut input).unwrap() {
        negotiated = act(server, event);
        if negotiated.is_some() {
            break;
        }
    }
    assert!(input.is_empty());
    let found = replies(&server.take_output());
    (found.into_iter().map(|(reply, _)| reply).collect(), negotiated)
}

/// Runs client and server against each other, `piece` bytes at a time, to the client's event.
fn meet(
    client: &mut ClientHandshake,
    server: &mut ServerHandshake,
    piece: usize,
) -> (Result<Option<ClientEvent>, HandshakeError>, Option<Negotiated>) {
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let mut negotiated = None;
    loop {
        let mut moved = false;
        let output = server.take_output();
        for bytes in output.chunks(piece) {
            moved = true;
            to_client.put_slice(bytes);
            if let Some(event) = client.receive(&mut to_client).unwrap() {
                // What is left of the output belongs to events to come: listings only.
                let used = bytes.as_ptr() as usize - output.as_ptr() as usize + bytes.len();
                to_client.put_slice(&output[used..]);
                if !matches!(event, ClientEvent::Listed { .. }) {
                    assert!(to_client.is_empty(), "the server said more");
                    return (Ok(Some(event)), negotiated);
                }
                while let Some(event) = client.receive(&mut to_client).unwrap() {
                    if event == ClientEvent::ListEnd {
                        return (Ok(Some(event)), negotiated);
                    }
                }
                break;
            }
        }
        let output = client.take_output();
        for bytes in output.chunks(piece) {
            moved = true;
            to_server.put_slice(bytes);
            loop {
                match server.receive(&mut to_server) {
                    Ok(None) => break,
                    Ok(Some(event)) => negotiated = act(server, event),
                    Err(HandshakeError::Ended) if negotiated.is_some() => break,
                    Err(error) => return (Err(error), None),
                }
            }
        }
        if !moved {
            return (Ok(None), negotiated);
        }
    }
}

#[test]
fn client_and_server_agree() {
    // Goal: whatever a client wishes, both sides end with the same idea of the session.
    // Method: every goal, style, question and export, in pieces of several sizes.
    let goals = [ClientGoal::Go, ClientGoal::ExportName, ClientGoal::Info];
    let all = InfoRequests { name: true, description: true, block_size: true };
    for (goal, replies) in goals.iter().flat_map(|goal| STYLES.map(|style| (*goal, style))) {
        for (allocation_context, info) in
            [(false, InfoRequests::default()), (true, InfoRequests::default()), (true, all)]
        {
            for (export, piece) in [("disk", 1), ("disk", 1000), ("", 3), ("nothing", 1000)] {
                let wish =
                    ClientWish { export: name(export), goal, replies, allocation_context, info };
                let mut client = ClientHandshake::new(wish.clone());
                let mut server = ServerHandshake::new();
                let (event, negotiated) = meet(&mut client, &mut server, piece);
                check_agreement(&wish, event, negotiated);
            }
        }
    }
}

fn check_agreement(
    wish: &ClientWish,
    event: Result<Option<ClientEvent>, HandshakeError>,
    negotiated: Option<Negotiated>,
) {
    let style = match (wish.goal, wish.replies) {
        (ClientGoal::ExportName, ReplyStyle::Extended) => ReplyStyle::Structured,
        (_, style) => style,
    };
    let export = match event {
        Err(error) => {
            assert_eq!(wish.goal, ClientGoal::ExportName);
            assert_eq!((wish.export.as_str(), error), ("nothing", HandshakeError::ExportRefused));
            return;
        }
        Ok(Some(ClientEvent::Refused { option, error, message })) => {
            assert_eq!(wish.export.as_str(), "nothing");
            assert!(option == option::GO || option == option::INFO);
            assert_eq!((error, message.as_str()), (option_reply::ERR_UNKNOWN, "no such export"));
            return;
        }
        Ok(Some(ClientEvent::Attached(Attached { export, replies, allocation_context }))) => {
            let negotiated = negotiated.unwrap();
            assert_eq!((replies, negotiated.replies), (style, style));
            assert_eq!(allocation_context, negotiated.allocation_context);
            let selected = wish.allocation_context && style != ReplyStyle::Simple;
            assert_eq!(allocation_context, selected.then_some(ALLOCATION_CONTEXT_ID));
            assert_eq!(negotiated.export, disk());
            export
        }
        Ok(Some(ClientEvent::Described(export))) => {
            assert_eq!((wish.goal, negotiated), (ClientGoal::Info, None));
            export
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(export.size, disk().size);
    assert_eq!(export.flags, disk().transmission_flags(style));
    assert_eq!(export.flags.contains(TransmissionFlags::SEND_DF), style != ReplyStyle::Simple);
    if wish.goal != ClientGoal::ExportName {
        assert_eq!(export.name, wish.info.name.then(|| name("disk")));
        assert_eq!(export.description, wish.info.description.then(|| "a volume".to_owned()));
        assert_eq!(export.block_size.is_some(), wish.info.block_size);
    }
    if let Some(sizes) = export.block_size {
        assert_eq!((sizes.minimum, sizes.preferred, sizes.payload_max), (1, 4096, 1 << 25));
    }
}

#[test]
fn a_client_lists_then_describes_then_goes() {
    // Goal: a handshake goes on after each answer, and INFO and GO say the same.
    for piece in [1, 5, 10_000] {
        let mut client = ClientHandshake::new(ClientWish {
            export: name(""),
            goal: ClientGoal::List,
            replies: ReplyStyle::Extended,
            allocation_context: true,
            info: InfoRequests { name: true, description: true, block_size: true },
        });
        let mut server = ServerHandshake::new();
        let (event, _) = meet(&mut client, &mut server, piece);
        assert_eq!(event, Ok(Some(ClientEvent::ListEnd)));
        client.ask(ClientGoal::Info, name("nothing"));
        let (event, _) = meet(&mut client, &mut server, piece);
        assert!(matches!(event, Ok(Some(ClientEvent::Refused { .. }))));
        client.ask(ClientGoal::Info, name("disk"));
        let (event, _) = meet(&mut client, &mut server, piece);
        let Ok(Some(ClientEvent::Described(described))) = event else { panic!("{event:?}") };
        client.ask(ClientGoal::Go, name("disk"));
        let (event, negotiated) = meet(&mut client, &mut server, piece);
        let Ok(Some(ClientEvent::Attached(attached))) = event else { panic!("{event:?}") };
        assert_eq!(attached.export, described);
        assert_eq!(attached.allocation_context, negotiated.unwrap().allocation_context);
        assert_eq!(client.receive(&mut BytesMut::new()), Err(ClientHandshakeError::Ended));
    }
}

#[test]
fn a_client_aborts() {
    let mut client = ClientHandshake::new(ClientWish {
        export: name(""),
        goal: ClientGoal::Info,
        replies: ReplyStyle::Simple,
        allocation_context: false,
        info: InfoRequests::default(),
    });
    let mut server = ServerHandshake::new();
    assert!(meet(&mut client, &mut server, 1000).0.unwrap().is_some());
    client.abort();
    let mut to_server = client.take_output();
    assert_eq!(server.receive(&mut to_server), Ok(Some(HandshakeEvent::Aborted)));
    let event = client.receive(&mut server.take_output());
    assert_eq!(event, Ok(Some(ClientEvent::Aborted)));
    assert_eq!(server.receive(&mut to_server), Err(HandshakeError::Ended));
}

/// Options that leave the handshake open, for the test of all orders.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Structured,
    Extended,
    Select,
    SelectOther,
    SelectUnknown,
    ListContexts,
    Unknown,
}

/// What the document says must come of options in this order.
#[derive(Default)]
struct Model {
    replies: ReplyStyle,
    selected: bool,
}

impl Model {
    fn expect(&mut self, step: Step) -> Vec<u32> {
        use option_reply::{
            ACK, ERR_EXT_HEADER_REQD, ERR_INVALID, ERR_UNKNOWN, ERR_UNSUP, META_CONTEXT,
        };
        let chunked = self.replies != ReplyStyle::Simple;
        match step {
            Step::Structured if self.replies == ReplyStyle::Extended => vec![ERR_EXT_HEADER_REQD],
            Step::Structured => {
                self.replies = ReplyStyle::Structured;
                vec![ACK]
            }
            Step::Extended => {
                self.replies = ReplyStyle::Extended;
                vec![ACK]
            }
            Step::Unknown => vec![ERR_UNSUP],
            Step::ListContexts if chunked => vec![META_CONTEXT, ACK],
            Step::ListContexts => vec![ERR_INVALID],
            Step::Select | Step::SelectOther | Step::SelectUnknown => {
                self.selected = false;
                match step {
                    _ if !chunked => vec![ERR_INVALID],
                    Step::SelectUnknown => vec![ERR_UNKNOWN],
                    _ => {
                        self.selected = step == Step::Select;
                        vec![META_CONTEXT, ACK]
                    }
                }
            }
        }
    }
}

fn send(server: &mut ServerHandshake, step: Step) -> Vec<u32> {
    let context = ["base:allocation"];
    let (option, data) = match step {
        Step::Structured => (option::STRUCTURED_REPLY, BytesMut::new()),
        Step::Extended => (option::EXTENDED_HEADERS, BytesMut::new()),
        Step::Unknown => (0xdead_beef, BytesMut::from(&[0; 40][..])),
        Step::Select => (option::SET_META_CONTEXT, meta_data(&name("disk"), &context)),
        // The same volume by another name: not the same name.
        Step::SelectOther => (option::SET_META_CONTEXT, meta_data(&name(""), &context)),
        Step::SelectUnknown => (option::SET_META_CONTEXT, meta_data(&name("nothing"), &context)),
        Step::ListContexts => (option::LIST_META_CONTEXT, meta_data(&name("disk"), &[])),
    };
    exchange(server, option, &data).0
}

#[test]
fn every_order_of_options() {
    // Goal: each option's answer, and what GO ends in, depend on order as the document says.
    // Method: all sequences of up to five of seven options (19,608 of them) against a model.
    let steps = [
        Step::Structured,
        Step::Extended,
        Step::Select,
        Step::SelectOther,
        Step::SelectUnknown,
        Step::ListContexts,
        Step::Unknown,
    ];
    for length in 0..=5 {
        for mut code in 0..steps.len().pow(length) {
            let mut server = haggling();
            let mut model = Model::default();
            let mut sequence = Vec::new();
            for _ in 0..length {
                let step = steps[code % steps.len()];
                code /= steps.len();
                sequence.push(step);
                assert_eq!(send(&mut server, step), model.expect(step), "{sequence:?}");
            }
            let (_, negotiated) = exchange(&mut server, option::GO, &go_data(&name("disk")));
            let negotiated = negotiated.unwrap();
            assert_eq!(negotiated.replies, model.replies, "{sequence:?}");
            let selected = model.selected.then_some(ALLOCATION_CONTEXT_ID);
            assert_eq!(negotiated.allocation_context, selected, "{sequence:?}");
        }
    }
}

#[test]
fn queries_of_metadata_contexts() {
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    let cases: [(u32, &[&str], bool); 11] = [
        (list, &[], true),
        (list, &["base:"], true),
        (list, &["base:allocation"], true),
        (list, &["base:unknown", "qemu:dirty-bitmap:x"], false),
        (list, &["base", ""], false),
        (set, &[], false),
        (set, &["base:"], false),
        (set, &["base:allocation"], true),
        (set, &["base:allocation", "base:", "base:allocation"], true),
        (set, &["x-unknown:leaf", "base:ALLOCATION"], false),
        (set, &["qemu:allocation-depth", "base:allocation"], true),
    ];
    for (option, queries, matched) in cases {
        let mut server = haggling();
        send(&mut server, Step::Structured);
        let (found, _) = exchange(&mut server, option, &meta_data(&name("disk"), queries));
        let expected = if matched {
            vec![option_reply::META_CONTEXT, option_reply::ACK]
        } else {
            vec![option_reply::ACK]
        };
        assert_eq!(found, expected, "{queries:?}");
    }
}

#[test]
fn too_many_or_too_long_queries() {
    let mut server = haggling();
    send(&mut server, Step::Structured);
    let select = |server: &mut ServerHandshake, queries: &[&str]| {
        exchange(server, option::SET_META_CONTEXT, &meta_data(&name("disk"), queries)).0
    };
    let most = vec!["base:allocation"; META_QUERIES_MAX];
    assert_eq!(select(&mut server, &most), [option_reply::META_CONTEXT, option_reply::ACK]);
    let more = vec!["base:allocation"; META_QUERIES_MAX + 1];
    assert_eq!(select(&mut server, &more), [option_reply::ERR_TOO_BIG]);
    let long = "x".repeat(4097);
    assert_eq!(select(&mut server, &[&long]), [option_reply::ERR_INVALID]);
    // Each failure has cleared the selection.
    let (_, negotiated) = exchange(&mut server, option::GO, &go_data(&name("disk")));
    assert_eq!(negotiated.unwrap().allocation_context, None);
}

#[test]
fn malformed_data_is_refused_and_the_next_option_is_served() {
    // Goal: options are consumed exactly, whatever their data claims about itself.
    // Method: every cut and every extension of good data; then a good option must still work.
    let disk = name("disk");
    let good = [
        (option::INFO, go_data(&disk)),
        (option::LIST_META_CONTEXT, meta_data(&disk, &["base:", "base:allocation"])),
        (option::SET_META_CONTEXT, meta_data(&disk, &["base:", "base:allocation"])),
    ];
    for (option, data) in good {
        let mut server = haggling();
        send(&mut server, Step::Structured);
        for cut in 0..data.len() {
            let (found, _) = exchange(&mut server, option, &data[..cut]);
            assert_eq!(found, [option_reply::ERR_INVALID], "option {option} cut at {cut}");
        }
        // 16 bytes that look like an option's header brought down qemu-nbd here.
        for tail in [&b"x"[..], &option_bytes(option::ABORT, b""), &[0; 100]] {
            let (found, _) = exchange(&mut server, option, &[&data[..], tail].concat());
            assert_eq!(found, [option_reply::ERR_INVALID]);
        }
        let (found, _) = exchange(&mut server, option, &data);
        assert_eq!(found.last(), Some(&option_reply::ACK));
    }
}

#[test]
fn lying_lengths_inside_options() {
    let mut server = haggling();
    send(&mut server, Step::Structured);
    for length in [7_u32, 0x7fff_ffff, 0xffff_fffa, u32::MAX] {
        let mut data = BytesMut::new();
        data.put_u32(length);
        data.put_slice(b"disk\0\0");
        for option in [option::INFO, option::GO, option::LIST_META_CONTEXT] {
            let (found, _) = exchange(&mut server, option, &data);
            assert_eq!(found, [option_reply::ERR_INVALID]);
        }
        let mut data = BytesMut::new();
        data.put_u32(4);
        data.put_slice(b"disk");
        data.put_u32(1);
        data.put_u32(length);
        let (found, _) = exchange(&mut server, option::SET_META_CONTEXT, &data);
        assert_eq!(found, [option_reply::ERR_INVALID]);
    }
}

#[test]
fn impossible_names() {
    let long = "x".repeat(EXPORT_NAME_BYTES_MAX + 1);
    let cases = [
        (&b"good\0junk"[..], ExportNameError::Nul),
        (&b"\xff\xfe"[..], ExportNameError::NotUtf8),
        (long.as_bytes(), ExportNameError::TooLong { length: long.len() }),
    ];
    for (bytes, error) in cases {
        assert_eq!(ExportName::from_bytes(bytes), Err(error));
        let mut server = haggling();
        let mut data = BytesMut::new();
        data.put_u32(u32::try_from(bytes.len()).unwrap());
        data.put_slice(bytes);
        data.put_u16(0);
        let (found, _) = exchange(&mut server, option::GO, &data);
        assert_eq!(found, [option_reply::ERR_INVALID]);
        let result = server.receive(&mut option_bytes(option::EXPORT_NAME, bytes));
        match error {
            ExportNameError::TooLong { .. } => {
                assert!(matches!(result, Err(HandshakeError::OptionTooLong { option: 1, .. })));
            }
            _ => assert_eq!(result, Err(HandshakeError::InvalidExportName(error))),
        }
    }
    let longest = name(&long[1..]);
    let (found, _) = exchange(&mut haggling(), option::GO, &go_data(&longest));
    assert_eq!(found, [option_reply::ERR_UNKNOWN]);
}

#[test]
fn names_are_never_echoed() {
    // Goal: nothing a client sent comes back in an error (CVE-2020-10761).
    let secret = name("do-not-echo-this");
    let mut server = haggling();
    send(&mut server, Step::Structured);
    for (option, data) in [
        (option::GO, go_data(&secret)),
        (option::INFO, go_data(&secret)),
        (option::SET_META_CONTEXT, meta_data(&secret, &["base:do-not-echo-this"])),
        (option::LIST, BytesMut::from(secret.as_bytes())),
        (99, BytesMut::from(secret.as_bytes())),
    ] {
        let mut input = option_bytes(option, &data);
        if let Some(event) = server.receive(&mut input).unwrap() {
            act(&mut server, event);
        }
        let output = server.take_output();
        assert!(output.windows(11).all(|window| window != b"do-not-echo"));
    }
}

#[test]
fn refusals_have_their_codes() {
    let table = [
        (ExportRefusal::Unknown, option_reply::ERR_UNKNOWN),
        (ExportRefusal::Policy, option_reply::ERR_POLICY),
        (ExportRefusal::Shutdown, option_reply::ERR_SHUTDOWN),
        (ExportRefusal::Platform("no leader"), option_reply::ERR_PLATFORM),
    ];
    for (refusal, code) in table {
        let mut server = haggling();
        send(&mut server, Step::Structured);
        for (option, data) in [
            (option::INFO, go_data(&name("disk"))),
            (option::GO, go_data(&name("disk"))),
            (option::SET_META_CONTEXT, meta_data(&name("disk"), &["base:allocation"])),
        ] {
            let event = server.receive(&mut option_bytes(option, &data)).unwrap();
            assert!(matches!(event, Some(HandshakeEvent::Resolve { .. })));
            assert_eq!(server.answer_export(Err(refusal)), None);
            assert_eq!(replies(&server.take_output())[0].0, code);
        }
        let event = server.receive(&mut option_bytes(option::LIST, b"")).unwrap();
        assert_eq!(event, Some(HandshakeEvent::List));
        server.refuse_list(refusal);
        assert_eq!(replies(&server.take_output())[0].0, code);
    }
}

#[test]
fn information_is_given_once_however_often_asked() {
    let mut data = BytesMut::new();
    data.put_u32(4);
    data.put_slice(b"disk");
    data.put_u16(1000);
    for kind in (0..1000_u16).map(|index| index % 6) {
        data.put_u16(kind);
    }
    let (found, _) = exchange(&mut haggling(), option::INFO, &data);
    use option_reply::{ACK, INFO};
    assert_eq!(found, [INFO, INFO, INFO, INFO, ACK]);
}

#[test]
fn what_follows_the_handshake_stays_in_the_input() {
    // Goal: a client that sends its first requests along with its last option loses none of them.
    for (option, data) in
        [(option::GO, go_data(&name("disk"))), (option::EXPORT_NAME, BytesMut::from("disk"))]
    {
        let mut server = ServerHandshake::new();
        let mut input = BytesMut::from(&[0, 0, 0, 3][..]);
        encode_option(&mut input, option, &data);
        input.put_slice(b"requests");
        let event = server.receive(&mut input).unwrap().unwrap();
        let expected = HandshakeEvent::Resolve { name: name("disk"), purpose: Purpose::Attach };
        assert_eq!(event, expected);
        assert!(act(&mut server, event).is_some());
        assert_eq!(&input[..], b"requests");
        assert_eq!(server.receive(&mut input), Err(HandshakeError::Ended));
        assert_eq!(&input[..], b"requests");
    }
}

#[test]
fn clients_that_are_dropped() {
    let flags = |bits: u32| BytesMut::from(&bits.to_be_bytes()[..]);
    let unknown = ServerHandshake::new().receive(&mut flags(4));
    assert_eq!(unknown, Err(HandshakeError::UnknownClientFlags { found: 4 }));

    let mut server = haggling();
    let result = server.receive(&mut BytesMut::from("GET / HTTP/1.1\r\n\r\n"));
    let found = u64::from_be_bytes(*b"GET / HT");
    assert_eq!(result, Err(HandshakeError::BadOptionMagic { found }));

    // Without fixed newstyle: nothing but NBD_OPT_EXPORT_NAME.
    for option in [option::GO, option::LIST, option::ABORT, 99] {
        let mut server = ServerHandshake::new();
        let mut input = flags(0);
        encode_option(&mut input, option, b"");
        assert_eq!(server.receive(&mut input), Err(HandshakeError::NotFixedNewstyle { option }));
    }

    let mut server = haggling();
    send(&mut server, Step::Extended);
    let result = server.receive(&mut option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(result, Err(HandshakeError::ExportNameWithExtendedHeaders));

    let mut server = haggling();
    let event = server.receive(&mut option_bytes(option::EXPORT_NAME, b"nothing")).unwrap();
    assert_eq!(act(&mut server, event.unwrap()), None);
    assert!(server.take_output().is_empty());
    let result = server.receive(&mut BytesMut::new());
    assert_eq!(result, Err(HandshakeError::ExportRefused));
}

#[test]
fn the_number_of_options_is_bounded() {
    let mut server = haggling();
    for _ in 0..OPTIONS_MAX {
        assert_eq!(send(&mut server, Step::Unknown), [option_reply::ERR_UNSUP]);
    }
    let result = server.receive(&mut option_bytes(99, b""));
    assert_eq!(result, Err(HandshakeError::TooManyOptions));
}

#[test]
fn the_length_of_options_is_bounded() {
    // Goal: up to the first bound looked at, up to the second skipped, beyond it closed.
    for option in [option::GO, option::LIST_META_CONTEXT] {
        let mut server = haggling();
        let (found, _) = exchange(&mut server, option, &vec![0; OPTION_BYTES_MAX]);
        assert_eq!(found, [option_reply::ERR_INVALID]);
        let (found, _) = exchange(&mut server, option, &vec![0; OPTION_BYTES_MAX + 1]);
        assert_eq!(found, [option_reply::ERR_TOO_BIG]);
    }
    for (option, reply) in [
        (option::GO, option_reply::ERR_TOO_BIG),
        (option::LIST, option_reply::ERR_INVALID),
        (option::STARTTLS, option_reply::ERR_INVALID),
        (99, option_reply::ERR_UNSUP),
    ] {
        let mut server = haggling();
        let (found, _) = exchange(&mut server, option, &vec![0; OPTION_SKIP_BYTES_MAX]);
        assert_eq!(found, [reply]);
        let mut input = option_bytes(option, &vec![0; OPTION_SKIP_BYTES_MAX + 1]);
        assert!(matches!(server.receive(&mut input), Err(HandshakeError::OptionTooLong { .. })));
    }
}

#[test]
fn a_list_that_is_too_long_is_cut() {
    let mut server = haggling();
    assert!(server.receive(&mut option_bytes(option::LIST, b"")).unwrap().is_some());
    let long = "d".repeat(DESCRIPTION_BYTES_MAX + 100);
    server.answer_list((0..10_000).map(|index| (name(&index.to_string()), long.clone())));
    let output = server.take_output();
    assert!(output.len() <= LIST_REPLY_BYTES_MAX + 100);
    let found = replies(&output);
    assert_eq!(found.last().unwrap().0, option_reply::ERR_TOO_BIG);
    assert_eq!(found[0].1.len(), 4 + 1 + DESCRIPTION_BYTES_MAX);
    assert!(found.len() > 4000);
}

#[test]
#[should_panic(expected = "event to be answered")]
fn receiving_on_with_an_event_unanswered_is_a_bug() {
    let mut server = haggling();
    let _ = server.receive(&mut option_bytes(option::LIST, b""));
    let _ = server.receive(&mut BytesMut::new());
}

/// A server's replies as raw bytes, after its greeting.
fn scripted(goal: ClientGoal, script: &[(u32, u32, &[u8])]) -> ClientHandshake {
    let mut client = ClientHandshake::new(ClientWish {
        export: name("disk"),
        goal,
        replies: ReplyStyle::Extended,
        allocation_context: true,
        info: InfoRequests::default(),
    });
    let mut input = ServerHandshake::new().take_output();
    for (option, reply, data) in script {
        nbd_proto::option::encode_option_reply(&mut input, *option, *reply, &[data]);
    }
    assert_eq!(client.receive(&mut input), Ok(None));
    assert!(input.is_empty());
    client
}

#[test]
fn a_client_makes_do_with_an_old_server() {
    // Goal: a server that knows nothing but the baseline is used through NBD_OPT_EXPORT_NAME.
    let unsup = option_reply::ERR_UNSUP;
    let mut client = scripted(
        ClientGoal::Go,
        &[
            (option::EXTENDED_HEADERS, unsup, b""),
            (option::STRUCTURED_REPLY, unsup, b""),
            (option::GO, unsup, b"what?"),
        ],
    );
    let mut input = BytesMut::from(&hex_u64(4096)[..]);
    input.put_slice(&[0, 1]);
    let Ok(Some(ClientEvent::Attached(attached))) = client.receive(&mut input) else { panic!() };
    assert_eq!(attached.replies, ReplyStyle::Simple);
    assert_eq!((attached.export.size, attached.allocation_context), (4096, None));
}

fn hex_u64(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[test]
fn hostile_servers_are_errors() {
    let ack = option_reply::ACK;
    let extended: (u32, u32, &[u8]) = (option::EXTENDED_HEADERS, ack, b"");
    let selected: (u32, u32, &[u8]) = (option::SET_META_CONTEXT, ack, b"");
    let go_info = |data: &[u8]| {
        let mut input = BytesMut::new();
        let info = option_reply::INFO;
        nbd_proto::option::encode_option_reply(&mut input, option::GO, info, &[data]);
        nbd_proto::option::encode_option_reply(&mut input, option::GO, ack, &[]);
        scripted(ClientGoal::Go, &[extended, selected]).receive(&mut input)
    };
    let malformed = Err(ClientHandshakeError::MalformedReply { reply: option_reply::INFO });
    assert_eq!(go_info(b""), malformed);
    assert_eq!(go_info(&[0, 0, 1]), malformed);
    assert_eq!(go_info(&[0; 13]), malformed);
    assert_eq!(go_info(b"\0\x01\xff"), malformed);
    assert_eq!(go_info(&[0, 9, 1, 2, 3]), Err(ClientHandshakeError::MissingExportInfo));
    let huge = [&[0, 0][..], &hex_u64(1 << 63), &[0, 1]].concat();
    assert_eq!(go_info(&huge), Err(ClientHandshakeError::ExportTooLarge { size: 1 << 63 }));

    let reply = |option: u32, reply: u32, length: u32| {
        let mut input = BytesMut::from(&hex_u64(0x0003_e889_0455_65a9)[..]);
        input.put_u32(option);
        input.put_u32(reply);
        input.put_u32(length);
        scripted(ClientGoal::Go, &[extended, selected]).receive(&mut input)
    };
    let (go, length) = (option::GO, u32::MAX);
    assert_eq!(reply(go, 3, length), Err(ClientHandshakeError::ReplyTooLong { length }));
    let wrong = ClientHandshakeError::WrongOption { found: 9, expected: go };
    assert_eq!(reply(9, ack, 0), Err(wrong));
    let unexpected = ClientHandshakeError::UnexpectedReply { option: go, reply: 77 };
    assert_eq!(reply(go, 77, 0), Err(unexpected));
    assert_eq!(reply(go, ack, 0), Err(ClientHandshakeError::MissingExportInfo));

    let mut client = scripted(ClientGoal::Go, &[]);
    let result = client.receive(&mut BytesMut::from(&[0; 20][..]));
    assert_eq!(result, Err(ClientHandshakeError::BadReplyMagic { found: 0 }));
    let mut client = ClientHandshake::new(ClientWish {
        export: name(""),
        goal: ClientGoal::List,
        replies: ReplyStyle::Simple,
        allocation_context: false,
        info: InfoRequests::default(),
    });
    let mut other = client.receive(&mut BytesMut::from("SSH-2.0-OpenSSH_9.2\r\n"));
    assert_eq!(other, Err(ClientHandshakeError::BadGreeting));
    client = ClientHandshake::new(ClientWish {
        export: name(""),
        goal: ClientGoal::List,
        replies: ReplyStyle::Simple,
        allocation_context: false,
        info: InfoRequests::default(),
    });
    other = client.receive(&mut BytesMut::from(&b"NBDMAGICIHAVEOPT\0\0"[..]));
    assert_eq!(other, Err(ClientHandshakeError::NotFixedNewstyle));
}

#[test]
fn a_client_is_told_that_tls_is_needed() {
    let mut client = scripted(ClientGoal::Go, &[]);
    let mut input = BytesMut::new();
    let (extended, error) = (option::EXTENDED_HEADERS, option_reply::ERR_TLS_REQD);
    nbd_proto::option::encode_option_reply(&mut input, extended, error, &[b"use TLS"]);
    let refused = ClientEvent::Refused { option: extended, error, message: "use TLS".to_owned() };
    assert_eq!(client.receive(&mut input), Ok(Some(refused)));
}

proptest! {
    #[test]
    fn option_data_round_trips(
        text in "[^\0]{0,60}",
        asked: (bool, bool, bool),
        queries in prop::collection::vec("[a-z:]{0,20}", 0..META_QUERIES_MAX),
    ) {
        let requests =
            InfoRequests { name: asked.0, description: asked.1, block_size: asked.2 };
        let info = InfoOption { name: name(&text), requests };
        prop_assert_eq!(InfoOption::decode(&info.encode()), Ok(info));
        let queries = queries.iter().map(|query| query.as_bytes()).collect();
        let meta = MetaContextOption { name: name(&text), queries };
        let encoded = meta.encode();
        prop_assert_eq!(MetaContextOption::decode(&encoded), Ok(meta.clone()));
    }

    #[test]
    fn hostile_bytes_never_break_the_handshake(data in prop::collection::vec(any::<u8>(), 0..300)) {
        nbd_proto::fuzzing::handshake(&data);
        nbd_proto::fuzzing::transmission(&data);
        nbd_proto::fuzzing::client(&data);
    }
}
