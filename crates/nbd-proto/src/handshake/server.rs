//! The server's side of the handshake.
//!
//! ```text
//! receive: client flags ─▶ option header ─┬▶ data (looked at) ──▶ reply ───────────────┐
//!              ▲                          ├▶ skip (too long, unwanted, unknown) ─▶ reply ┤
//!              │                          └▶ close                                       │
//!              └──────────────◀── answered ◀── Resolve | List ◀───────────────────────◀──┘
//! ```
//!
//! Choices the document leaves open:
//!
//! - `NBD_INFO_BLOCK_SIZE` is sent only when asked for: ours are the document's defaults, so a
//!   client that does not ask keeps to them anyway.
//! - `NBD_OPT_STRUCTURED_REPLY` and `NBD_OPT_EXTENDED_HEADERS` may be repeated.
//! - Both metadata options are refused until replies are structured, as qemu and nbdkit do.
//! - A query without a colon is taken for one of an unknown namespace, and ignored.
//! - A client without fixed newstyle is served through `NBD_OPT_EXPORT_NAME`, and closed otherwise.

use bytes::{Buf, BufMut, BytesMut};

use crate::constants::{
    ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, BASE_WILDCARD, ClientFlags,
    EXPORT_NAME_PADDING_BYTES, HandshakeFlags, INIT_MAGIC, OPTION_HEADER_BYTES, OPTION_MAGIC, info,
    option, option_reply,
};
use crate::error::HandshakeError;
use crate::export::{ExportInfo, ExportName, ExportRefusal, Negotiated, ReplyStyle};
use crate::limits::{
    BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, DESCRIPTION_BYTES_MAX, ERROR_TEXT_BYTES_MAX,
    EXPORT_NAME_BYTES_MAX, LIST_REPLY_BYTES_MAX, OPTION_BYTES_MAX, OPTION_SKIP_BYTES_MAX,
    OPTIONS_MAX, REQUEST_PAYLOAD_BYTES_MAX, clip,
};
use crate::option::{
    InfoOption, InfoRequests, MetaContextOption, OptionDataError, encode_option_reply,
};
use crate::wire::Reader;

/// One client's handshake, from the greeting to the export it attaches.
///
/// The order of calls: send [`take_output`](Self::take_output) (the greeting is in it), then loop:
/// read from the client, call [`receive`](Self::receive); on an event answer it
/// ([`answer_export`](Self::answer_export), [`answer_list`](Self::answer_list) or
/// [`refuse_list`](Self::refuse_list)), send the output, and call `receive` again before reading
/// on. Send the output before closing, too. The handshake is over when `answer_export` returns
/// [`Negotiated`], when [`HandshakeEvent::Aborted`] comes, or when `receive` fails.
///
/// Memory: `input` never needs to hold more than an option of
/// [`OPTION_BYTES_MAX`]; the output between two events stays within
/// [`LIST_REPLY_BYTES_MAX`] and some tens of kilobytes.
#[derive(Debug)]
pub struct ServerHandshake {
    state: State,
    output: BytesMut,
    /// The client agreed to fixed newstyle: options other than `NBD_OPT_EXPORT_NAME` are allowed.
    fixed: bool,
    /// The client wants no padding after `NBD_OPT_EXPORT_NAME`.
    no_zeroes: bool,
    /// Grows only, and from structured on `selection` may be set.
    replies: ReplyStyle,
    /// Export for which `base:allocation` is selected, by the name the client used.
    selection: Option<ExportName>,
    /// Option headers seen; `<=` [`OPTIONS_MAX`].
    options: u32,
}

/// What the owner of a handshake has to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeEvent {
    /// Look the export up and call [`ServerHandshake::answer_export`].
    Resolve {
        /// The name the client used; empty for the default export.
        name: ExportName,
        /// What the client wants with it.
        purpose: Purpose,
    },
    /// Call [`ServerHandshake::answer_list`] or [`ServerHandshake::refuse_list`].
    List,
    /// The client ended the session; its acknowledgement is in the output. Send it and close.
    Aborted,
}

/// What a client wants with an export it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// To know about it: `NBD_OPT_INFO` and the metadata options. The handshake goes on.
    Describe,
    /// To use it: `NBD_OPT_GO` and `NBD_OPT_EXPORT_NAME`. Success ends the handshake.
    Attach,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    /// `length` bytes of data, at most [`OPTION_BYTES_MAX`], have to be in the input at once.
    OptionData {
        option: u32,
        length: usize,
    },
    /// `remaining` bytes of data are thrown away as they come, then `verdict` is replied.
    Skip {
        option: u32,
        remaining: usize,
        verdict: Verdict,
    },
    /// An event is with the owner.
    Waiting(Question),
    Over(HandshakeError),
}

/// What the owner was asked, and how its answer is sent.
#[derive(Debug)]
enum Question {
    List,
    ExportName,
    Info { option: u32, name: ExportName, requests: InfoRequests },
    MetaContext { option: u32, name: ExportName, matched: bool },
}

/// A reply that ends an option: a type and a fixed text.
#[derive(Clone, Copy, Debug)]
struct Verdict(u32, &'static str);

const ACK: Verdict = Verdict(option_reply::ACK, "");

/// What one step of [`ServerHandshake::receive`] led to.
enum Step {
    NeedMore,
    Again,
    Event(HandshakeEvent),
}

impl Default for ServerHandshake {
    fn default() -> Self {
        Self::new()
    }
}

impl ServerHandshake {
    /// A handshake at its start; the greeting is in the output.
    pub fn new() -> Self {
        let mut output = BytesMut::new();
        output.put_u64(INIT_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).bits());
        Self {
            state: State::ClientFlags,
            output,
            fixed: false,
            no_zeroes: false,
            replies: ReplyStyle::Simple,
            selection: None,
            options: 0,
        }
    }

    /// Takes what it can use from `input`, and not a byte more, up to the next event. `None`: more
    /// input is needed. An error is final, and so is the end; each further call then fails.
    ///
    /// # Panics
    ///
    /// If the last event is not answered yet.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<HandshakeEvent>, HandshakeError> {
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

    /// What the client that asks to attach (a [`HandshakeEvent::Resolve`] with [`Purpose::Attach`])
    /// will have agreed on if it is answered well: how requests and replies look, and the id of
    /// `base:allocation` if that is selected for this export.
    ///
    /// # Panics
    ///
    /// If no such event is to be answered.
    pub fn agreement(&self) -> (ReplyStyle, Option<u32>) {
        let selected = match &self.state {
            State::Waiting(Question::ExportName) => self.selection.is_some(),
            State::Waiting(Question::Info { option: option::GO, name, .. }) => {
                self.selection.as_ref() == Some(name)
            }
            _ => panic!("agreement called with nobody asking to attach"),
        };
        (self.replies, selected.then_some(ALLOCATION_CONTEXT_ID))
    }

    /// Answers [`HandshakeEvent::Resolve`]. `Some`: the client is attached, and what follows in the
    /// input is transmission. `None`: call [`receive`](Self::receive) again; after a refused
    /// `NBD_OPT_EXPORT_NAME` that fails, since the client cannot be told.
    ///
    /// # Panics
    ///
    /// If no [`HandshakeEvent::Resolve`] is to be answered, or if the export is larger than
    /// [`EXPORT_BYTES_MAX`](crate::limits::EXPORT_BYTES_MAX).
    pub fn answer_export(
        &mut self,
        answer: Result<ExportInfo, ExportRefusal>,
    ) -> Option<Negotiated> {
        let State::Waiting(question) = std::mem::replace(&mut self.state, State::OptionHeader)
        else {
            panic!("answer_export called with no event to answer");
        };
        match question {
            Question::List => panic!("answer_export called for a list"),
            Question::ExportName => self.answer_export_name(answer),
            Question::Info { option, name, requests } => {
                self.answer_info(option, name, requests, answer)
            }
            Question::MetaContext { option, name, matched } => {
                self.answer_meta_context(option, name, matched, answer);
                None
            }
        }
    }

    /// Answers [`HandshakeEvent::List`] with names and descriptions (empty: none). Beyond
    /// [`LIST_REPLY_BYTES_MAX`] the rest is left out and the client told so.
    ///
    /// # Panics
    ///
    /// If no [`HandshakeEvent::List`] is to be answered.
    pub fn answer_list(&mut self, exports: impl Iterator<Item = (ExportName, String)>) {
        self.take_list_question();
        let start = self.output.len();
        for (name, description) in exports {
            let description = clip(&description, DESCRIPTION_BYTES_MAX);
            let length = u32::try_from(name.as_bytes().len()).unwrap_or_default();
            let pieces: [&[u8]; 3] =
                [&length.to_be_bytes(), name.as_bytes(), description.as_bytes()];
            let size = 20 + 4 + name.as_bytes().len() + description.len();
            if self.output.len() - start + size > LIST_REPLY_BYTES_MAX {
                let verdict = Verdict(option_reply::ERR_TOO_BIG, "the list is cut short");
                self.reply(option::LIST, verdict);
                return;
            }
            encode_option_reply(&mut self.output, option::LIST, option_reply::SERVER, &pieces);
        }
        self.reply(option::LIST, ACK);
    }

    /// Answers [`HandshakeEvent::List`] with an error.
    ///
    /// # Panics
    ///
    /// If no [`HandshakeEvent::List`] is to be answered.
    pub fn refuse_list(&mut self, refusal: ExportRefusal) {
        self.take_list_question();
        self.reply(option::LIST, refusal.into());
    }

    fn step(&mut self, input: &mut BytesMut) -> Result<Step, HandshakeError> {
        match &mut self.state {
            State::ClientFlags => self.receive_client_flags(input),
            State::OptionHeader => self.receive_option_header(input),
            State::OptionData { option, length } => {
                let (option, length) = (*option, *length);
                if input.len() < length {
                    return Ok(Step::NeedMore);
                }
                self.state = State::OptionHeader;
                let data = input.split_to(length);
                self.receive_option_data(option, &data)
            }
            State::Skip { option, remaining, verdict } => {
                let count = (*remaining).min(input.len());
                input.advance(count);
                *remaining -= count;
                if *remaining > 0 {
                    return Ok(Step::NeedMore);
                }
                let (option, verdict) = (*option, *verdict);
                Ok(self.finish_option(option, verdict))
            }
            State::Waiting(_) => panic!("receive called with an event to be answered"),
            State::Over(error) => Err(*error),
        }
    }

    fn receive_client_flags(&mut self, input: &mut BytesMut) -> Result<Step, HandshakeError> {
        let mut reader = Reader::new(input);
        let Some(found) = reader.u32() else { return Ok(Step::NeedMore) };
        input.advance(4);
        let flags = ClientFlags::from_bits(found);
        if !flags.without(ClientFlags::KNOWN).is_empty() {
            return Err(HandshakeError::UnknownClientFlags { found });
        }
        self.fixed = flags.contains(ClientFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
        self.state = State::OptionHeader;
        Ok(Step::Again)
    }

    fn receive_option_header(&mut self, input: &mut BytesMut) -> Result<Step, HandshakeError> {
        let mut reader = Reader::new(input);
        let (Some(magic), Some(option), Some(length)) = (reader.u64(), reader.u32(), reader.u32())
        else {
            return Ok(Step::NeedMore);
        };
        input.advance(OPTION_HEADER_BYTES);
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::BadOptionMagic { found: magic });
        }
        if self.options == OPTIONS_MAX {
            return Err(HandshakeError::TooManyOptions);
        }
        self.options += 1;
        self.state = self.plan_option(option, length)?;
        Ok(Step::Again)
    }

    /// How the data of an option is read, by the option and the announced length alone.
    fn plan_option(&mut self, option: u32, announced: u32) -> Result<State, HandshakeError> {
        let length = usize::try_from(announced).unwrap_or(usize::MAX);
        let within = |max: usize| match u32::try_from(max) {
            Ok(max) if announced > max => {
                Err(HandshakeError::OptionTooLong { option, length: announced, max })
            }
            _ => Ok(()),
        };
        if option != option::EXPORT_NAME && !self.fixed {
            return Err(HandshakeError::NotFixedNewstyle { option });
        }
        if option == option::SET_META_CONTEXT {
            // "Issuing this command replaces all previously-set metadata contexts (including when
            // this command fails)".
            self.selection = None;
        }
        let verdict = match option {
            option::EXPORT_NAME => {
                if self.replies == ReplyStyle::Extended {
                    return Err(HandshakeError::ExportNameWithExtendedHeaders);
                }
                within(EXPORT_NAME_BYTES_MAX)?;
                return Ok(State::OptionData { option, length });
            }
            option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if length <= OPTION_BYTES_MAX {
                    return Ok(State::OptionData { option, length });
                }
                Verdict(option_reply::ERR_TOO_BIG, "the option is too long")
            }
            // Data with an abort is ignored; elsewhere it is an error.
            option::ABORT => ACK,
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if length == 0 => {
                return Ok(State::OptionData { option, length });
            }
            option::STARTTLS if length == 0 => {
                Verdict(option_reply::ERR_POLICY, "TLS is not offered here")
            }
            option::LIST
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS
            | option::STARTTLS => Verdict(option_reply::ERR_INVALID, "the option takes no data"),
            _ => Verdict(option_reply::ERR_UNSUP, "the option is not known here"),
        };
        within(OPTION_SKIP_BYTES_MAX)?;
        Ok(State::Skip { option, remaining: length, verdict })
    }

    /// Acts on an option whose data is complete, and only its data.
    fn receive_option_data(&mut self, option: u32, data: &[u8]) -> Result<Step, HandshakeError> {
        match option {
            option::EXPORT_NAME => {
                let name =
                    ExportName::from_bytes(data).map_err(HandshakeError::InvalidExportName)?;
                self.state = State::Waiting(Question::ExportName);
                self.drop_selection_for_other(&name);
                Ok(resolve(name, Purpose::Attach))
            }
            option::INFO | option::GO => match InfoOption::decode(data) {
                Ok(InfoOption { name, requests }) => {
                    let question = Question::Info { option, name: name.clone(), requests };
                    self.state = State::Waiting(question);
                    let attach = option == option::GO;
                    Ok(resolve(name, if attach { Purpose::Attach } else { Purpose::Describe }))
                }
                Err(error) => Ok(self.finish_option(option, error.into())),
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                Ok(self.receive_meta_context(option, data))
            }
            option::LIST => {
                self.state = State::Waiting(Question::List);
                Ok(Step::Event(HandshakeEvent::List))
            }
            option::STRUCTURED_REPLY if self.replies == ReplyStyle::Extended => {
                let text = "extended headers are already agreed on";
                Ok(self.finish_option(option, Verdict(option_reply::ERR_EXT_HEADER_REQD, text)))
            }
            option::STRUCTURED_REPLY => {
                self.replies = ReplyStyle::Structured;
                Ok(self.finish_option(option, ACK))
            }
            option::EXTENDED_HEADERS => {
                self.replies = ReplyStyle::Extended;
                Ok(self.finish_option(option, ACK))
            }
            _ => unreachable!("option {option} is skipped, not read"),
        }
    }

    fn receive_meta_context(&mut self, option: u32, data: &[u8]) -> Step {
        let (name, queries) = match MetaContextOption::decode(data) {
            Ok(MetaContextOption { name, queries }) => (name, queries),
            Err(error) => return self.finish_option(option, error.into()),
        };
        if self.replies == ReplyStyle::Simple {
            let text = "structured replies must be agreed on first";
            return self.finish_option(option, Verdict(option_reply::ERR_INVALID, text));
        }
        // Our one context is named by itself, when listing also by the wildcard of its namespace or
        // by no query at all. However often it is named, it is answered once.
        let listing = option == option::LIST_META_CONTEXT;
        let matched = (listing && queries.is_empty())
            || queries.iter().any(|query| {
                *query == ALLOCATION_CONTEXT.as_bytes()
                    || (listing && *query == BASE_WILDCARD.as_bytes())
            });
        let question = Question::MetaContext { option, name: name.clone(), matched };
        self.state = State::Waiting(question);
        resolve(name, Purpose::Describe)
    }

    fn answer_export_name(
        &mut self,
        answer: Result<ExportInfo, ExportRefusal>,
    ) -> Option<Negotiated> {
        let Ok(export) = answer else {
            self.state = State::Over(HandshakeError::ExportRefused);
            return None;
        };
        self.output.put_u64(export.size);
        self.output.put_u16(export.transmission_flags(self.replies).bits());
        if !self.no_zeroes {
            self.output.put_bytes(0, EXPORT_NAME_PADDING_BYTES);
        }
        Some(self.attach(export))
    }

    fn answer_info(
        &mut self,
        option: u32,
        name: ExportName,
        requests: InfoRequests,
        answer: Result<ExportInfo, ExportRefusal>,
    ) -> Option<Negotiated> {
        let export = match answer {
            Ok(export) => export,
            Err(refusal) => {
                self.reply(option, refusal.into());
                return None;
            }
        };
        let flags = export.transmission_flags(self.replies).bits();
        self.info(option, info::EXPORT, &[&export.size.to_be_bytes(), &flags.to_be_bytes()]);
        if requests.name {
            self.info(option, info::NAME, &[export.name.as_bytes()]);
        }
        if requests.description {
            let text = clip(&export.description, DESCRIPTION_BYTES_MAX);
            self.info(option, info::DESCRIPTION, &[text.as_bytes()]);
        }
        if requests.block_size {
            let payload = u32::try_from(REQUEST_PAYLOAD_BYTES_MAX).unwrap_or(u32::MAX);
            let sizes = [BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, payload].map(u32::to_be_bytes);
            self.info(option, info::BLOCK_SIZE, &[sizes.as_flattened()]);
        }
        self.reply(option, ACK);
        if option != option::GO {
            return None;
        }
        self.drop_selection_for_other(&name);
        Some(self.attach(export))
    }

    fn answer_meta_context(
        &mut self,
        option: u32,
        name: ExportName,
        matched: bool,
        answer: Result<ExportInfo, ExportRefusal>,
    ) {
        if let Err(refusal) = answer {
            self.reply(option, refusal.into());
            return;
        }
        if matched {
            let selecting = option == option::SET_META_CONTEXT;
            // "The metadata context ID in these replies is reserved and SHOULD be set to zero" when
            // listing.
            let id = if selecting { ALLOCATION_CONTEXT_ID } else { 0 };
            let pieces: [&[u8]; 2] = [&id.to_be_bytes(), ALLOCATION_CONTEXT.as_bytes()];
            encode_option_reply(&mut self.output, option, option_reply::META_CONTEXT, &pieces);
            if selecting {
                self.selection = Some(name);
            }
        }
        self.reply(option, ACK);
    }

    /// A selection counts only for the very name it was made for ("and where the final time it was
    /// sent, it referred to the same export name that was ultimately selected").
    fn drop_selection_for_other(&mut self, attached: &ExportName) {
        self.selection = self.selection.take().filter(|selected| selected == attached);
    }

    fn attach(&mut self, export: ExportInfo) -> Negotiated {
        self.state = State::Over(HandshakeError::Ended);
        let allocation_context = self.selection.take().map(|_| ALLOCATION_CONTEXT_ID);
        assert!(
            allocation_context.is_none() || self.replies != ReplyStyle::Simple,
            "a context was selected with simple replies"
        );
        Negotiated { export, replies: self.replies, allocation_context }
    }

    fn take_list_question(&mut self) {
        let state = std::mem::replace(&mut self.state, State::OptionHeader);
        assert!(
            matches!(state, State::Waiting(Question::List)),
            "a list was answered that is not asked for"
        );
    }

    /// Replies, and leaves the option behind.
    fn finish_option(&mut self, option: u32, verdict: Verdict) -> Step {
        self.reply(option, verdict);
        if option == option::ABORT {
            self.state = State::Over(HandshakeError::Ended);
            return Step::Event(HandshakeEvent::Aborted);
        }
        self.state = State::OptionHeader;
        Step::Again
    }

    fn reply(&mut self, option: u32, Verdict(reply, text): Verdict) {
        let text = clip(text, ERROR_TEXT_BYTES_MAX);
        encode_option_reply(&mut self.output, option, reply, &[text.as_bytes()]);
    }

    fn info(&mut self, option: u32, kind: u16, pieces: &[&[u8]]) {
        let data = pieces.concat();
        let pieces: [&[u8]; 2] = [&kind.to_be_bytes(), &data];
        encode_option_reply(&mut self.output, option, option_reply::INFO, &pieces);
    }
}

fn resolve(name: ExportName, purpose: Purpose) -> Step {
    Step::Event(HandshakeEvent::Resolve { name, purpose })
}

impl From<ExportRefusal> for Verdict {
    fn from(refusal: ExportRefusal) -> Self {
        match refusal {
            ExportRefusal::Unknown => Self(option_reply::ERR_UNKNOWN, "no such export"),
            ExportRefusal::Policy => Self(option_reply::ERR_POLICY, "not allowed here"),
            ExportRefusal::Shutdown => {
                Self(option_reply::ERR_SHUTDOWN, "the server is being shut down")
            }
            ExportRefusal::Platform(text) => Self(option_reply::ERR_PLATFORM, text),
        }
    }
}

impl From<OptionDataError> for Verdict {
    fn from(error: OptionDataError) -> Self {
        match error {
            OptionDataError::Truncated => {
                Self(option_reply::ERR_INVALID, "the option's data ends too early")
            }
            OptionDataError::TrailingBytes => {
                Self(option_reply::ERR_INVALID, "the option's data has bytes left over")
            }
            OptionDataError::Name(_) => {
                Self(option_reply::ERR_INVALID, "the export name is not valid")
            }
            OptionDataError::TooManyQueries => {
                Self(option_reply::ERR_TOO_BIG, "the option has too many queries")
            }
            OptionDataError::QueryTooLong => Self(option_reply::ERR_INVALID, "a query is too long"),
        }
    }
}
