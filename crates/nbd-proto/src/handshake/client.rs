//! The client's side of the handshake.
//!
//! ```text
//! greeting ─▶ extended headers ─▶ structured replies ─▶ select base:allocation ─▶ goal
//!             (if wished)         (if wished and not    (if wished, and replies
//!                                  extended)             are not simple)
//! ```
//! A step the server refuses is done without: the result says what was agreed on. Only
//! `NBD_REP_ERR_TLS_REQD` and `NBD_REP_ERR_SHUTDOWN` end it there and then.

use bytes::{Buf, BufMut, BytesMut};

use crate::constants::{
    ALLOCATION_CONTEXT, ClientFlags, EXPORT_NAME_PADDING_BYTES, GREETING_BYTES, HandshakeFlags,
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_HEADER_BYTES, OPTION_REPLY_MAGIC, TransmissionFlags,
    info, option, option_reply,
};
use crate::error::ClientHandshakeError;
use crate::export::{ExportName, ReplyStyle};
use crate::limits::{ERROR_TEXT_BYTES_MAX, EXPORT_BYTES_MAX, OPTION_REPLY_BYTES_MAX};
use crate::option::{InfoOption, InfoRequests, MetaContextOption, encode_option};
use crate::wire::Reader;

/// What a client wants from a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientWish {
    /// The export; not looked at for [`ClientGoal::List`].
    pub export: ExportName,
    /// Where the handshake leads.
    pub goal: ClientGoal,
    /// The richest replies to ask for. With [`ClientGoal::ExportName`] extended counts as
    /// structured, since the document keeps the two apart.
    pub replies: ReplyStyle,
    /// Select `base:allocation`.
    pub allocation_context: bool,
    /// What to ask about the export with [`ClientGoal::Go`] and [`ClientGoal::Info`].
    pub info: InfoRequests,
}

/// Where a client's handshake leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientGoal {
    /// Attach with `NBD_OPT_GO`; with `NBD_OPT_EXPORT_NAME` if the server does not know that.
    Go,
    /// Attach with `NBD_OPT_EXPORT_NAME`. A refusal shows as the server closing the connection.
    ExportName,
    /// Describe the export.
    Info,
    /// Name all exports.
    List,
}

/// What a client's handshake comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// The export is attached; what follows in the input is transmission.
    Attached(Attached),
    /// The answer to [`ClientGoal::Info`]. Go on with [`ClientHandshake::ask`] or
    /// [`ClientHandshake::abort`].
    Described(RemoteExport),
    /// One export of the answer to [`ClientGoal::List`]. Call [`ClientHandshake::receive`] again.
    Listed {
        /// Its name.
        name: ExportName,
        /// Text for people; may be empty.
        description: String,
    },
    /// The answer to [`ClientGoal::List`] is complete. Go on with [`ClientHandshake::ask`] or
    /// [`ClientHandshake::abort`].
    ListEnd,
    /// The server refuses. Go on with [`ClientHandshake::ask`] or [`ClientHandshake::abort`].
    Refused {
        /// The option it refused.
        option: u32,
        /// One of the errors in [`constants::option_reply`](crate::constants::option_reply), or
        /// another with the error bit set.
        error: u32,
        /// The server's text, at most [`ERROR_TEXT_BYTES_MAX`] bytes of it.
        message: String,
    },
    /// The server acknowledged [`ClientHandshake::abort`]. Close. (Servers may also just close.)
    Aborted,
}

/// What a handshake ended in, on the client's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The export.
    pub export: RemoteExport,
    /// How requests and replies look.
    pub replies: ReplyStyle,
    /// Id under which block status replies speak of `base:allocation`.
    pub allocation_context: Option<u32>,
}

/// An export as a server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteExport {
    /// Bytes; at most [`EXPORT_BYTES_MAX`].
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// The server's own name for it, if it said.
    pub name: Option<ExportName>,
    /// Text for people, if it said.
    pub description: Option<String>,
    /// What sizes it wants to see, if it said.
    pub block_size: Option<BlockSize>,
}

/// A server's size constraints, in bytes, as it sent them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Every offset and length is a multiple of it.
    pub minimum: u32,
    /// Multiples of it are cheap.
    pub preferred: u32,
    /// The most payload in one request.
    pub payload_max: u32,
}

/// A handshake with one server.
///
/// The order of calls: loop over reading from the server, [`receive`](Self::receive), acting on the
/// event, and sending [`take_output`](Self::take_output). After an event other than `Attached` and
/// `Aborted` call `receive` again before reading on.
///
/// Memory: `input` never needs to hold more than a reply of [`OPTION_REPLY_BYTES_MAX`].
#[derive(Debug)]
pub struct ClientHandshake {
    wish: ClientWish,
    state: State,
    output: BytesMut,
    /// What the server offered in its greeting.
    server: HandshakeFlags,
    replies: ReplyStyle,
    allocation_context: Option<u32>,
    /// What the replies to the option under way have said so far.
    export: PartialExport,
}

#[derive(Debug)]
enum State {
    Greeting,
    /// Replies to this option are awaited.
    Asked(u32),
    /// The answer to `NBD_OPT_EXPORT_NAME`, which has no header, is awaited.
    ExportName,
    /// The caller decides how to go on.
    Idle,
    Over(ClientHandshakeError),
}

#[derive(Debug, Default)]
struct PartialExport {
    size_and_flags: Option<(u64, TransmissionFlags)>,
    name: Option<ExportName>,
    description: Option<String>,
    block_size: Option<BlockSize>,
}

enum Step {
    NeedMore,
    Again,
    Event(ClientEvent),
}

impl ClientHandshake {
    /// A handshake at its start: the server speaks first.
    pub fn new(wish: ClientWish) -> Self {
        Self {
            wish,
            state: State::Greeting,
            output: BytesMut::new(),
            server: HandshakeFlags::NONE,
            replies: ReplyStyle::Simple,
            allocation_context: None,
            export: PartialExport::default(),
        }
    }

    /// Takes what it can use from `input`, and not a byte more, up to the next event. `None`: send
    /// the output and read on. An error is final, and so is the end; each further call then fails.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<ClientEvent>, ClientHandshakeError> {
        loop {
            match self.step(input) {
                Ok(Step::Again) => {}
                Ok(Step::NeedMore) => return Ok(None),
                Ok(Step::Event(event)) => return Ok(Some(event)),
                Err(error) => {
                    self.state = State::Over(error);
                    return Err(error);
                }
            }
        }
    }

    /// Bytes to send, in order; empty if there are none.
    pub fn take_output(&mut self) -> BytesMut {
        self.output.split()
    }

    /// Goes on with another goal, after an event that leaves the handshake open. A context is
    /// selected anew.
    ///
    /// # Panics
    ///
    /// If an answer is still awaited, or the handshake is over.
    pub fn ask(&mut self, goal: ClientGoal, export: ExportName) {
        assert!(matches!(self.state, State::Idle), "ask called with an answer awaited");
        self.wish.goal = goal;
        self.wish.export = export;
        self.ask_meta_context();
    }

    /// Ends the session politely, after an event that leaves the handshake open.
    ///
    /// # Panics
    ///
    /// If an answer is still awaited, or the handshake is over.
    pub fn abort(&mut self) {
        assert!(matches!(self.state, State::Idle), "abort called with an answer awaited");
        self.ask_option(option::ABORT, &[]);
    }

    fn step(&mut self, input: &mut BytesMut) -> Result<Step, ClientHandshakeError> {
        match self.state {
            State::Greeting => self.receive_greeting(input),
            State::Asked(option) => self.receive_reply(option, input),
            State::ExportName => self.receive_export_name(input),
            State::Idle => Ok(Step::NeedMore),
            State::Over(error) => Err(error),
        }
    }

    fn receive_greeting(&mut self, input: &mut BytesMut) -> Result<Step, ClientHandshakeError> {
        let mut reader = Reader::new(input);
        let (Some(init), Some(magic), Some(flags)) = (reader.u64(), reader.u64(), reader.u16())
        else {
            return Ok(Step::NeedMore);
        };
        if init != INIT_MAGIC || magic != OPTION_MAGIC {
            return Err(ClientHandshakeError::BadGreeting);
        }
        input.advance(GREETING_BYTES);
        self.server = HandshakeFlags::from_bits(flags);
        let mut flags = ClientFlags::NONE;
        if self.server.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            flags = flags | ClientFlags::FIXED_NEWSTYLE;
        }
        if self.server.contains(HandshakeFlags::NO_ZEROES) {
            flags = flags | ClientFlags::NO_ZEROES;
        }
        self.output.put_u32(flags.bits());
        if self.server.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            self.ask_extended_headers();
        } else if matches!(self.wish.goal, ClientGoal::Go | ClientGoal::ExportName) {
            self.ask_export_name();
        } else {
            return Err(ClientHandshakeError::NotFixedNewstyle);
        }
        Ok(Step::Again)
    }

    fn ask_extended_headers(&mut self) {
        let allowed = self.wish.goal != ClientGoal::ExportName;
        if allowed && self.wish.replies == ReplyStyle::Extended {
            self.ask_option(option::EXTENDED_HEADERS, &[]);
        } else {
            self.ask_structured_reply();
        }
    }

    fn ask_structured_reply(&mut self) {
        if self.wish.replies != ReplyStyle::Simple {
            self.ask_option(option::STRUCTURED_REPLY, &[]);
        } else {
            self.ask_meta_context();
        }
    }

    fn ask_meta_context(&mut self) {
        self.allocation_context = None;
        let attaches = matches!(self.wish.goal, ClientGoal::Go | ClientGoal::ExportName);
        if attaches && self.wish.allocation_context && self.replies != ReplyStyle::Simple {
            let name = self.wish.export.clone();
            let queries = vec![ALLOCATION_CONTEXT.as_bytes()];
            let data = MetaContextOption { name, queries }.encode();
            self.ask_option(option::SET_META_CONTEXT, &data);
        } else {
            self.ask_goal();
        }
    }

    fn ask_goal(&mut self) {
        let option = match self.wish.goal {
            ClientGoal::ExportName => return self.ask_export_name(),
            ClientGoal::List => return self.ask_option(option::LIST, &[]),
            ClientGoal::Info => option::INFO,
            ClientGoal::Go => option::GO,
        };
        let name = self.wish.export.clone();
        let data = InfoOption { name, requests: self.wish.info }.encode();
        self.ask_option(option, &data);
    }

    fn ask_export_name(&mut self) {
        encode_option(&mut self.output, option::EXPORT_NAME, self.wish.export.as_bytes());
        self.state = State::ExportName;
    }

    fn ask_option(&mut self, option: u32, data: &[u8]) {
        encode_option(&mut self.output, option, data);
        self.export = PartialExport::default();
        self.state = State::Asked(option);
    }

    fn receive_export_name(&mut self, input: &mut BytesMut) -> Result<Step, ClientHandshakeError> {
        let padded = !self.server.contains(HandshakeFlags::NO_ZEROES);
        let length = 10 + if padded { EXPORT_NAME_PADDING_BYTES } else { 0 };
        if input.len() < length {
            return Ok(Step::NeedMore);
        }
        let answer = input.split_to(length);
        let mut reader = Reader::new(&answer);
        self.export = PartialExport::default();
        self.export.size_and_flags = reader
            .u64()
            .zip(reader.u16())
            .map(|(size, flags)| (size, TransmissionFlags::from_bits(flags)));
        self.attach()
    }

    fn receive_reply(
        &mut self,
        asked: u32,
        input: &mut BytesMut,
    ) -> Result<Step, ClientHandshakeError> {
        let mut reader = Reader::new(input);
        let (Some(magic), Some(option), Some(reply), Some(length)) =
            (reader.u64(), reader.u32(), reader.u32(), reader.u32())
        else {
            return Ok(Step::NeedMore);
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(ClientHandshakeError::BadReplyMagic { found: magic });
        }
        if option != asked {
            return Err(ClientHandshakeError::WrongOption { found: option, expected: asked });
        }
        let Some(length) =
            usize::try_from(length).ok().filter(|length| *length <= OPTION_REPLY_BYTES_MAX)
        else {
            return Err(ClientHandshakeError::ReplyTooLong { length });
        };
        if reader.rest().len() < length {
            return Ok(Step::NeedMore);
        }
        input.advance(OPTION_REPLY_HEADER_BYTES);
        let data = input.split_to(length);
        if reply & option_reply::ERROR_BIT != 0 {
            return Ok(self.receive_error(option, reply, &data));
        }
        match reply {
            option_reply::ACK if data.is_empty() => self.receive_ack(option),
            option_reply::ACK => Err(ClientHandshakeError::MalformedReply { reply }),
            _ => {
                let malformed = ClientHandshakeError::MalformedReply { reply };
                self.receive_content(option, reply, &data)?.ok_or(malformed)
            }
        }
    }

    fn receive_ack(&mut self, option: u32) -> Result<Step, ClientHandshakeError> {
        match option {
            option::EXTENDED_HEADERS => {
                self.replies = ReplyStyle::Extended;
                self.ask_meta_context();
                Ok(Step::Again)
            }
            option::STRUCTURED_REPLY => {
                self.replies = ReplyStyle::Structured;
                self.ask_meta_context();
                Ok(Step::Again)
            }
            option::SET_META_CONTEXT => {
                self.ask_goal();
                Ok(Step::Again)
            }
            option::GO => self.attach(),
            option::INFO => {
                self.state = State::Idle;
                Ok(Step::Event(ClientEvent::Described(self.take_export()?)))
            }
            option::LIST => {
                self.state = State::Idle;
                Ok(Step::Event(ClientEvent::ListEnd))
            }
            _ => {
                self.state = State::Over(ClientHandshakeError::Ended);
                Ok(Step::Event(ClientEvent::Aborted))
            }
        }
    }

    fn receive_error(&mut self, option: u32, error: u32, text: &[u8]) -> Step {
        let fatal = matches!(error, option_reply::ERR_TLS_REQD | option_reply::ERR_SHUTDOWN);
        match option {
            option::EXTENDED_HEADERS if !fatal => self.ask_structured_reply(),
            option::STRUCTURED_REPLY if !fatal => self.ask_meta_context(),
            option::SET_META_CONTEXT if !fatal => {
                self.allocation_context = None;
                self.ask_goal();
            }
            option::GO
                if error == option_reply::ERR_UNSUP && self.replies != ReplyStyle::Extended =>
            {
                self.ask_export_name();
            }
            option::ABORT => {
                self.state = State::Over(ClientHandshakeError::Ended);
                return Step::Event(ClientEvent::Aborted);
            }
            _ => {
                self.state = State::Idle;
                let text = &text[..text.len().min(ERROR_TEXT_BYTES_MAX)];
                let message = String::from_utf8_lossy(text).into_owned();
                return Step::Event(ClientEvent::Refused { option, error, message });
            }
        }
        Step::Again
    }

    /// `Ok(None)`: the data does not parse.
    fn receive_content(
        &mut self,
        option: u32,
        reply: u32,
        data: &[u8],
    ) -> Result<Option<Step>, ClientHandshakeError> {
        let mut reader = Reader::new(data);
        match (option, reply) {
            (option::INFO | option::GO, option_reply::INFO) => {
                Ok(self.receive_info(reader).map(|()| Step::Again))
            }
            (option::LIST, option_reply::SERVER) => {
                let name = reader.prefixed().and_then(|name| ExportName::from_bytes(name).ok());
                let description = String::from_utf8_lossy(reader.rest()).into_owned();
                Ok(name.map(|name| Step::Event(ClientEvent::Listed { name, description })))
            }
            (option::SET_META_CONTEXT, option_reply::META_CONTEXT) => Ok(reader.u32().map(|id| {
                if reader.rest() == ALLOCATION_CONTEXT.as_bytes() {
                    self.allocation_context = Some(id);
                }
                Step::Again
            })),
            _ => Err(ClientHandshakeError::UnexpectedReply { option, reply }),
        }
    }

    /// `None`: the data does not parse.
    fn receive_info(&mut self, mut reader: Reader<'_>) -> Option<()> {
        match reader.u16()? {
            info::EXPORT => {
                let (size, flags) = (reader.u64()?, reader.u16()?);
                let flags = TransmissionFlags::from_bits(flags);
                self.export.size_and_flags = reader.is_empty().then_some((size, flags));
                self.export.size_and_flags.map(|_| ())
            }
            info::NAME => {
                self.export.name = Some(ExportName::from_bytes(reader.rest()).ok()?);
                Some(())
            }
            info::DESCRIPTION => {
                let text = String::from_utf8_lossy(reader.rest());
                self.export.description = Some(text.into_owned());
                Some(())
            }
            info::BLOCK_SIZE => {
                let (minimum, preferred) = (reader.u32()?, reader.u32()?);
                let payload_max = reader.u32()?;
                let block_size = BlockSize { minimum, preferred, payload_max };
                self.export.block_size = reader.is_empty().then_some(block_size);
                self.export.block_size.map(|_| ())
            }
            _ => Some(()),
        }
    }

    fn attach(&mut self) -> Result<Step, ClientHandshakeError> {
        let export = self.take_export()?;
        self.state = State::Over(ClientHandshakeError::Ended);
        let (replies, allocation_context) = (self.replies, self.allocation_context);
        Ok(Step::Event(ClientEvent::Attached(Attached { export, replies, allocation_context })))
    }

    fn take_export(&mut self) -> Result<RemoteExport, ClientHandshakeError> {
        let PartialExport { size_and_flags, name, description, block_size } =
            std::mem::take(&mut self.export);
        let (size, flags) = size_and_flags.ok_or(ClientHandshakeError::MissingExportInfo)?;
        if size > EXPORT_BYTES_MAX {
            return Err(ClientHandshakeError::ExportTooLarge { size });
        }
        Ok(RemoteExport { size, flags, name, description, block_size })
    }
}
