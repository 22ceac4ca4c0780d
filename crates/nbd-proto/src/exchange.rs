//! Client side of transmission as a whole: commands out, whole answers in.

use std::collections::{BTreeMap, HashMap};

use bytes::BytesMut;

use crate::error::{ExchangeError, NbdError};
use crate::export::ReplyStyle;
use crate::handshake::client::Attached;
use crate::limits::READ_PIECES_MAX;
use crate::reply::Extent;
use crate::reply_decoder::{PendingRead, ReplyDecoder, ReplyEvent};
use crate::request::{Command, RequestTooLong, encode_request};

/// The requests of one connection that are not answered yet, and what of their answers has come.
///
/// ```text
///  begin ─▶ bytes to send (and, after a write's, its payload)
///  receive ─▶ NeedMore: read on
///          ─▶ Content: fill `content` from `input` and the socket, tell `content_received`
///          ─▶ Answered: that request is done with
/// ```
///
/// A server is believed nothing that can be checked: content that overlaps, that lies outside its
/// read or is missing, answers to what was not asked or of another kind than it, and status beyond
/// the request are errors. Each of them is final: the connection can only be closed.
///
/// Memory: the buffers that callers gave for their reads, and a bounded amount for each request.
#[derive(Debug)]
pub struct Exchange {
    replies: ReplyStyle,
    allocation_context: Option<u32>,
    decoder: ReplyDecoder,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    filling: Option<Filling>,
}

/// What [`Exchange::receive`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// `input` ends before the next piece of an answer does.
    NeedMore,
    /// Content comes next in the stream and belongs into [`Exchange::content`].
    Content,
    /// A request is answered.
    Answered {
        /// The mark that [`Exchange::begin`] gave it.
        cookie: u64,
        /// How.
        outcome: Result<Answer, Refusal>,
    },
}

/// The answer to a request that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To anything but the two below.
    Done,
    /// To a read: as many bytes as were asked for, holes as zeroes.
    Data(Vec<u8>),
    /// To a block status request: at least one extent, from the request's offset on, none of them
    /// beyond the request. They may end before it does.
    Extents(Vec<Extent>),
}

/// A request that the server answered with an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server answered {command} at {offset}: {error}{}", in_parentheses(.message))]
pub struct Refusal {
    /// The error.
    pub error: NbdError,
    /// The server's text; empty in simple replies.
    pub message: String,
    /// What was asked for.
    pub command: &'static str,
    /// Where in the export: as the server said, else where the request began.
    pub offset: u64,
}

fn in_parentheses(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// One request in flight.
#[derive(Debug)]
struct Pending {
    command: Command,
    /// Content of a read. Sized when the first piece comes.
    data: Vec<u8>,
    /// Ranges of `data` that have come, start to end; neighbours are joined.
    covered: BTreeMap<usize, usize>,
    extents: Option<Vec<Extent>>,
    refusal: Option<Refusal>,
}

/// Where outstanding content goes.
#[derive(Debug)]
struct Filling {
    cookie: u64,
    start: usize,
    end: usize,
    last: bool,
}

impl Exchange {
    /// An exchange at the first byte after the handshake.
    pub fn new(attached: &Attached) -> Self {
        Self {
            replies: attached.replies,
            allocation_context: attached.allocation_context,
            decoder: ReplyDecoder::new(attached.replies),
            pending: HashMap::new(),
            next_cookie: 0,
            filling: None,
        }
    }

    /// Appends a request's header to `out` and returns its mark. A write's payload is to be sent
    /// right after it. `buffer` is what a read's content goes into, whatever it holds now.
    ///
    /// # Errors
    /// A length that the headers agreed on cannot carry; then nothing was appended.
    pub fn begin(
        &mut self,
        out: &mut BytesMut,
        command: Command,
        buffer: Vec<u8>,
    ) -> Result<u64, RequestTooLong> {
        let cookie = self.next_cookie;
        encode_request(out, self.replies, cookie, &command, false)?;
        self.next_cookie += 1;
        self.pending.insert(cookie, Pending::new(command, buffer));
        Ok(cookie)
    }

    /// Requests not answered yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The next that `input` has, consuming exactly that.
    ///
    /// # Errors
    /// A server that breaks the protocol.
    ///
    /// # Panics
    /// If content is still outstanding.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Received, ExchangeError> {
        assert!(self.content().is_empty(), "receive called with content outstanding");
        if let Some(Filling { cookie, last: true, .. }) = self.filling.take() {
            return self.finish(cookie);
        }
        loop {
            let pending = &self.pending;
            let read = |cookie| pending.get(&cookie).and_then(Pending::read);
            let (cookie, last) = match self.decoder.decode(input, read)? {
                ReplyEvent::NeedMore => return Ok(Received::NeedMore),
                ReplyEvent::Data { cookie, offset, len, last } => {
                    let (start, end) = self.find(cookie)?.place(offset, len)?;
                    self.filling = Some(Filling { cookie, start, end, last });
                    self.take_content(input);
                    return Ok(Received::Content);
                }
                ReplyEvent::Hole { cookie, offset, len, last } => {
                    let pending = self.find(cookie)?;
                    let (start, end) = pending.place(offset, len)?;
                    pending.data[start..end].fill(0);
                    (cookie, last)
                }
                ReplyEvent::BlockStatus { cookie, context_id, extents, last } => {
                    let expected = self.allocation_context == Some(context_id);
                    self.find(cookie)?.take_extents(cookie, expected, extents)?;
                    (cookie, last)
                }
                ReplyEvent::Error { cookie, error, message, offset, last } => {
                    self.find(cookie)?.refuse(error, message, offset);
                    (cookie, last)
                }
                ReplyEvent::Done { cookie } => (cookie, true),
            };
            if last {
                return self.finish(cookie);
            }
        }
    }

    /// Where outstanding content goes; empty if there is none.
    pub fn content(&mut self) -> &mut [u8] {
        let Some(Filling { cookie, start, end, .. }) = self.filling else { return &mut [] };
        let pending = self.pending.get_mut(&cookie).expect("content is of a request in flight");
        &mut pending.data[start..end]
    }

    /// Tells that the first `count` bytes of [`content`](Self::content) are there, read from the
    /// socket without passing `input`.
    ///
    /// # Panics
    /// If that is more than is outstanding.
    pub fn content_received(&mut self, count: usize) {
        self.decoder.payload_received(count);
        if let Some(filling) = &mut self.filling {
            filling.start += count;
        }
    }

    fn take_content(&mut self, input: &mut BytesMut) {
        let Some(filling) = &mut self.filling else { return };
        let pending = self.pending.get_mut(&filling.cookie);
        let data = &mut pending.expect("content is of a request in flight").data;
        filling.start += self.decoder.take_payload(input, &mut data[filling.start..filling.end]);
    }

    fn find(&mut self, cookie: u64) -> Result<&mut Pending, ExchangeError> {
        self.pending.get_mut(&cookie).ok_or(ExchangeError::UnknownCookie { cookie })
    }

    fn finish(&mut self, cookie: u64) -> Result<Received, ExchangeError> {
        let pending = self.pending.remove(&cookie);
        let outcome = pending.ok_or(ExchangeError::UnknownCookie { cookie })?.finish(cookie)?;
        Ok(Received::Answered { cookie, outcome })
    }
}

impl Pending {
    fn new(command: Command, data: Vec<u8>) -> Self {
        Self { command, data, covered: BTreeMap::new(), extents: None, refusal: None }
    }

    fn read(&self) -> Option<PendingRead> {
        match self.command {
            Command::Read { offset, len, .. } => Some(PendingRead { offset, len }),
            _ => None,
        }
    }

    /// Claims the place for `len` bytes of content that belong to `offset` of the export.
    fn place(&mut self, offset: u64, len: u64) -> Result<(usize, usize), ExchangeError> {
        let misplaced = ExchangeError::Misplaced { offset, len };
        let PendingRead { offset: from, len: asked } = self.read().ok_or(misplaced)?;
        let range = || {
            let start = offset.checked_sub(from)?;
            let end = start.checked_add(len).filter(|end| *end <= asked)?;
            Some((usize::try_from(start).ok()?, usize::try_from(end).ok()?))
        };
        let (start, end) = range().ok_or(misplaced)?;
        let before = self.covered.range(..end).next_back().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, covered)| covered > start) {
            return Err(misplaced);
        }
        let first = match before {
            Some((first, covered)) if covered == start => first,
            _ => start,
        };
        let behind = self.covered.remove(&end).unwrap_or(end);
        self.covered.insert(first, behind);
        if self.covered.len() > READ_PIECES_MAX {
            return Err(ExchangeError::TooManyPieces);
        }
        let asked = usize::try_from(asked).map_err(|_| misplaced)?;
        if self.data.len() != asked {
            self.data.resize(asked, 0);
        }
        Ok((start, end))
    }

    fn take_extents(
        &mut self,
        cookie: u64,
        expected: bool,
        mut extents: Vec<Extent>,
    ) -> Result<(), ExchangeError> {
        let Command::BlockStatus { len: asked, .. } = self.command else {
            return Err(ExchangeError::OtherKind { cookie });
        };
        if !expected || self.extents.is_some() {
            return Err(ExchangeError::OtherKind { cookie });
        }
        let count = extents.len();
        let mut left = asked;
        for (place, extent) in extents.iter_mut().enumerate() {
            if left == 0 || (extent.len > left && place + 1 < count) {
                return Err(ExchangeError::StatusBeyondRequest);
            }
            // Only the last may pass the end of the request, and of no use to us.
            extent.len = extent.len.min(left);
            left -= extent.len;
        }
        self.extents = Some(extents);
        Ok(())
    }

    /// The first error is the cause; a server may add others about further pieces.
    fn refuse(&mut self, error: NbdError, message: String, offset: Option<u64>) {
        let command = self.command.kind().name();
        let offset = offset.unwrap_or_else(|| self.command.range().0);
        self.refusal.get_or_insert(Refusal { error, message, command, offset });
    }

    fn finish(self, cookie: u64) -> Result<Result<Answer, Refusal>, ExchangeError> {
        if let Some(refusal) = self.refusal {
            return Ok(Err(refusal));
        }
        Ok(Ok(match self.command {
            Command::Read { len, .. } => {
                // Ranges do not overlap, so their sum tells whether they cover the read.
                let received =
                    self.covered.iter().map(|(start, end)| (end - start) as u64).sum::<u64>();
                if received != len {
                    return Err(ExchangeError::Incomplete { len, received });
                }
                Answer::Data(self.data)
            }
            Command::BlockStatus { .. } => {
                Answer::Extents(self.extents.ok_or(ExchangeError::OtherKind { cookie })?)
            }
            _ => Answer::Done,
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::constants::TransmissionFlags;
    use crate::export::{ExportInfo, Negotiated};
    use crate::handshake::client::RemoteExport;
    use crate::reply::ReplyEncoder;
    use crate::request::ReplyTo;

    use super::*;

    const CONTEXT: u32 = 7;
    const TO: ReplyTo = ReplyTo { cookie: 0, offset: 100 };

    fn exchange(replies: ReplyStyle) -> (Exchange, ReplyEncoder) {
        let flags = TransmissionFlags::HAS_FLAGS;
        let export =
            RemoteExport { size: 1 << 20, flags, name: None, description: None, block_size: None };
        let attached = Attached { export, replies, allocation_context: Some(CONTEXT) };
        let name = "v".parse().unwrap();
        let info = ExportInfo { name, description: String::new(), size: 1 << 20, read_only: false };
        let negotiated = Negotiated { export: info, replies, allocation_context: Some(CONTEXT) };
        (Exchange::new(&attached), ReplyEncoder::new(&negotiated))
    }

    /// An exchange with one request in flight, cookie 0.
    fn asked(command: Command) -> (Exchange, ReplyEncoder) {
        let (mut exchange, encoder) = exchange(ReplyStyle::Extended);
        let mut out = BytesMut::new();
        // A buffer that was used before: nothing of it must be left in the answer.
        assert_eq!(exchange.begin(&mut out, command, vec![0xee; 8]), Ok(0));
        assert!(!out.is_empty());
        (exchange, encoder)
    }

    const READ: Command = Command::Read { offset: 100, len: 8, dont_fragment: false };
    const STATUS: Command = Command::BlockStatus { offset: 100, len: 8192, req_one: false };

    /// What the bytes come to, when they come one at a time.
    fn outcome(exchange: &mut Exchange, bytes: &[u8]) -> Result<Received, ExchangeError> {
        let mut input = BytesMut::new();
        for byte in bytes {
            if let Some(place) = exchange.content().first_mut() {
                *place = *byte;
                exchange.content_received(1);
            } else {
                input.extend_from_slice(&[*byte]);
            }
            if exchange.content().is_empty() {
                match exchange.receive(&mut input)? {
                    Received::NeedMore | Received::Content => {}
                    answered @ Received::Answered { .. } => return Ok(answered),
                }
            }
        }
        Ok(Received::NeedMore)
    }

    fn piece(encoder: &ReplyEncoder, out: &mut BytesMut, offset: u64, data: &[u8], last: bool) {
        encoder.read_prefix(out, &TO, offset, data.len() as u64, last);
        out.extend_from_slice(data);
    }

    #[test]
    fn pieces_in_any_order_make_the_whole() {
        let (mut exchange, encoder) = asked(READ);
        let mut bytes = BytesMut::new();
        piece(&encoder, &mut bytes, 104, b"ever", false);
        encoder.read_hole(&mut bytes, &TO, 102, 2, false);
        piece(&encoder, &mut bytes, 100, b"ho", true);
        let whole = Ok(Answer::Data(b"ho\0\0ever".to_vec()));
        let answered = Received::Answered { cookie: 0, outcome: whole };
        assert_eq!(outcome(&mut exchange, &bytes), Ok(answered));
        assert_eq!(exchange.in_flight(), 0);
    }

    #[test]
    fn content_is_taken_from_the_input_as_far_as_it_has_some() {
        let (mut exchange, encoder) = asked(READ);
        let mut input = BytesMut::new();
        piece(&encoder, &mut input, 100, b"wherever", true);
        let rest = input.split_off(input.len() - 3);
        assert_eq!(exchange.receive(&mut input), Ok(Received::Content));
        assert!(input.is_empty());
        exchange.content().copy_from_slice(&rest);
        exchange.content_received(3);
        let whole = Ok(Answer::Data(b"wherever".to_vec()));
        let answered = Received::Answered { cookie: 0, outcome: whole };
        assert_eq!(exchange.receive(&mut input), Ok(answered));
    }

    #[test]
    fn content_that_overlaps_or_is_missing_is_an_error() {
        for (first, second) in [((100, 4), (103, 2)), ((103, 2), (100, 4)), ((102, 2), (102, 2))] {
            let (mut exchange, encoder) = asked(READ);
            let mut bytes = BytesMut::new();
            for (offset, len) in [first, second] {
                piece(&encoder, &mut bytes, offset, &vec![1; len], false);
            }
            let found = outcome(&mut exchange, &bytes);
            assert!(matches!(found, Err(ExchangeError::Misplaced { .. })), "{found:?}");
        }
        let (mut exchange, encoder) = asked(READ);
        let mut bytes = BytesMut::new();
        piece(&encoder, &mut bytes, 101, b"7 bytes", true);
        let missing = ExchangeError::Incomplete { len: 8, received: 7 };
        assert_eq!(outcome(&mut exchange, &bytes), Err(missing));
        let (mut exchange, encoder) = asked(READ);
        let mut bytes = BytesMut::new();
        encoder.done(&mut bytes, &TO);
        let missing = ExchangeError::Incomplete { len: 8, received: 0 };
        assert_eq!(outcome(&mut exchange, &bytes), Err(missing));
    }

    #[test]
    fn content_in_crumbs_is_refused_before_it_takes_memory() {
        let len = 4 * READ_PIECES_MAX as u64;
        let command = Command::Read { offset: 0, len, dont_fragment: false };
        let (mut exchange, encoder) = asked(command);
        let mut input = BytesMut::new();
        for place in 0..=READ_PIECES_MAX as u64 {
            encoder.read_hole(&mut input, &ReplyTo { cookie: 0, offset: 0 }, 2 * place, 1, false);
        }
        assert_eq!(exchange.receive(&mut input), Err(ExchangeError::TooManyPieces));
    }

    #[test]
    fn answers_to_what_was_not_asked_are_errors() {
        let stranger = ReplyTo { cookie: 9, offset: 0 };
        let (mut exchange, encoder) = asked(Command::Flush);
        let mut bytes = BytesMut::new();
        encoder.done(&mut bytes, &stranger);
        let unknown = ExchangeError::UnknownCookie { cookie: 9 };
        assert_eq!(outcome(&mut exchange, &bytes), Err(unknown));
        let zero = Extent { len: 4096, hole: true, zero: true };
        for command in [READ, Command::Flush] {
            let (mut exchange, encoder) = asked(command);
            let mut bytes = BytesMut::new();
            encoder.block_status(&mut bytes, &TO, CONTEXT, &[zero], true);
            let other = ExchangeError::OtherKind { cookie: 0 };
            assert_eq!(outcome(&mut exchange, &bytes), Err(other));
        }
        // No status at all, one of another context, and two.
        for contexts in [&[][..], &[CONTEXT + 1], &[CONTEXT, CONTEXT]] {
            let (mut exchange, encoder) = asked(STATUS);
            let mut bytes = BytesMut::new();
            for context in contexts {
                encoder.block_status(&mut bytes, &TO, *context, &[zero], false);
            }
            encoder.done(&mut bytes, &TO);
            let other = ExchangeError::OtherKind { cookie: 0 };
            assert_eq!(outcome(&mut exchange, &bytes), Err(other), "{contexts:?}");
        }
    }

    #[test]
    fn status_is_held_to_the_request() {
        let extent = |len| Extent { len, hole: false, zero: false };
        let answer = |extents: &[Extent]| {
            let (mut exchange, encoder) = asked(STATUS);
            let mut bytes = BytesMut::new();
            encoder.block_status(&mut bytes, &TO, CONTEXT, extents, true);
            match outcome(&mut exchange, &bytes)? {
                Received::Answered { outcome, .. } => Ok(outcome.unwrap()),
                other => panic!("{other:?}"),
            }
        };
        let whole = [extent(4096), extent(4096)];
        assert_eq!(answer(&whole), Ok(Answer::Extents(whole.to_vec())));
        let longer = [extent(4096), extent(1 << 40)];
        assert_eq!(answer(&longer), Ok(Answer::Extents(whole.to_vec())));
        let beyond = Err(ExchangeError::StatusBeyondRequest);
        assert_eq!(answer(&[extent(1 << 40), extent(1)]), beyond);
        assert_eq!(answer(&[extent(4096), extent(4096), extent(1)]), beyond);
    }

    #[test]
    fn the_first_error_of_a_reply_is_its_outcome() {
        let (mut exchange, encoder) = asked(READ);
        let mut bytes = BytesMut::new();
        piece(&encoder, &mut bytes, 100, b"some", false);
        encoder.read_error_after_data(&mut bytes, &TO, 104, NbdError::Io, "bad sector");
        let Ok(Received::Answered { outcome: Err(refusal), .. }) = outcome(&mut exchange, &bytes)
        else {
            panic!("no answer");
        };
        assert_eq!((refusal.error, refusal.offset), (NbdError::Io, 104));
        let text = "the server answered read at 104: input/output error (bad sector)";
        assert_eq!(refusal.to_string(), text);
    }

    #[test]
    fn a_simple_reply_has_its_data_behind_it() {
        let (mut exchange, encoder) = exchange(ReplyStyle::Simple);
        let mut out = BytesMut::new();
        exchange.begin(&mut out, READ, Vec::new()).unwrap();
        let mut bytes = BytesMut::new();
        piece(&encoder, &mut bytes, 100, b"8 bytes!", true);
        let whole = Ok(Answer::Data(b"8 bytes!".to_vec()));
        let answered = Received::Answered { cookie: 0, outcome: whole };
        assert_eq!(outcome(&mut exchange, &bytes), Ok(answered));
    }
}
