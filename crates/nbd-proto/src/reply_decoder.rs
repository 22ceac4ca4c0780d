//! Client side of transmission: bytes in, replies out.

use bytes::{Buf, BytesMut};

use crate::constants::{
    AllocationFlags, EXTENDED_REPLY_HEADER_BYTES, EXTENDED_REPLY_MAGIC, ReplyFlags,
    SIMPLE_REPLY_HEADER_BYTES, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_HEADER_BYTES,
    STRUCTURED_REPLY_MAGIC, chunk,
};
use crate::error::{NbdError, ReplyError};
use crate::export::ReplyStyle;
use crate::limits::{ERROR_CHUNK_BYTES_MAX, ERROR_TEXT_BYTES_MAX, REPLY_EXTENTS_MAX};
use crate::reply::Extent;
use crate::wire::Reader;

/// Cuts a server's bytes into replies.
///
/// Call [`decode`](Self::decode) until it wants more. When it yields [`ReplyEvent::Data`], the data
/// comes next in the stream: take all of it with [`take_payload`](Self::take_payload) and, for what
/// is not in `input`, by reading from the socket and reporting it with
/// [`payload_received`](Self::payload_received). Only then call `decode` again.
///
/// Content is held to the range of its read; that chunks of one read do not overlap and together
/// cover it is for the caller to check, who knows the read.
///
/// Memory: `input` never needs to hold more than a block status chunk of [`REPLY_EXTENTS_MAX`]
/// extents.
#[derive(Debug)]
pub struct ReplyDecoder {
    replies: ReplyStyle,
    /// Data bytes of the last content chunk still to come.
    payload_remaining: u64,
}

/// The range of a read whose reply is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRead {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What a call of [`ReplyDecoder::decode`] found. `last` says that this ends the reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyEvent {
    /// `input` ends before the next reply does.
    NeedMore,
    /// The end of a reply. The request succeeded, unless an error came before.
    Done {
        /// The request's mark.
        cookie: u64,
    },
    /// The request failed.
    Error {
        /// The request's mark.
        cookie: u64,
        /// How.
        error: NbdError,
        /// The server's text; may be empty.
        message: String,
        /// Where, if the server said.
        offset: Option<u64>,
        /// Whether this ends the reply.
        last: bool,
    },
    /// `len` bytes of content (not zero) that belong to `offset` come next in the stream.
    Data {
        /// The request's mark.
        cookie: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether this ends the reply.
        last: bool,
    },
    /// `len` bytes at `offset` are zeroes.
    Hole {
        /// The request's mark.
        cookie: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether this ends the reply.
        last: bool,
    },
    /// Allocation status from the request's offset on.
    BlockStatus {
        /// The request's mark.
        cookie: u64,
        /// Id of the metadata context.
        context_id: u32,
        /// Consecutive, none of them empty, at least one.
        extents: Vec<Extent>,
        /// Whether this ends the reply.
        last: bool,
    },
}

/// A chunk's header, of either style.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    header_len: usize,
    last: bool,
    kind: u16,
    cookie: u64,
    /// Offset of the request, which only extended replies repeat.
    offset: Option<u64>,
    length: u64,
}

impl ReplyDecoder {
    /// A decoder at the first byte after the handshake.
    pub fn new(replies: ReplyStyle) -> Self {
        Self { replies, payload_remaining: 0 }
    }

    /// The next reply, or part of one, in `input`, consuming exactly that.
    ///
    /// `pending` tells the range of the read outstanding under a cookie; `None` if that is no read.
    /// A simple reply cannot be followed without it. An error is final: each further call returns
    /// it again.
    ///
    /// # Panics
    ///
    /// If content is still outstanding.
    pub fn decode(
        &mut self,
        input: &mut BytesMut,
        pending: impl FnOnce(u64) -> Option<PendingRead>,
    ) -> Result<ReplyEvent, ReplyError> {
        assert!(self.payload_remaining == 0, "decode called with content outstanding");
        let Some(magic) = Reader::new(input).u32() else { return Ok(ReplyEvent::NeedMore) };
        match (self.replies, magic) {
            (ReplyStyle::Simple | ReplyStyle::Structured, SIMPLE_REPLY_MAGIC) => {
                self.decode_simple(input, pending)
            }
            (ReplyStyle::Structured, STRUCTURED_REPLY_MAGIC)
            | (ReplyStyle::Extended, EXTENDED_REPLY_MAGIC) => match self.chunk(input) {
                Some(chunk) => self.decode_chunk(input, chunk, pending),
                None => Ok(ReplyEvent::NeedMore),
            },
            _ => Err(ReplyError::BadMagic { found: magic }),
        }
    }

    /// Bytes of the last [`ReplyEvent::Data`] that are still to come.
    pub fn payload_remaining(&self) -> u64 {
        self.payload_remaining
    }

    /// Moves content from `input` to `dest` and returns how much: the least of what `input` has,
    /// what `dest` holds, and what remains.
    pub fn take_payload(&mut self, input: &mut BytesMut, dest: &mut [u8]) -> usize {
        let remaining = usize::try_from(self.payload_remaining).unwrap_or(usize::MAX);
        let count = input.len().min(dest.len()).min(remaining);
        input.copy_to_slice(&mut dest[..count]);
        self.payload_remaining -= count as u64;
        count
    }

    /// Tells that `count` bytes of content were read from the socket without passing `input`, which
    /// must have been empty.
    ///
    /// # Panics
    ///
    /// If that is more than remains.
    pub fn payload_received(&mut self, count: usize) {
        let count = count as u64;
        assert!(count <= self.payload_remaining, "more content received than outstanding");
        self.payload_remaining -= count;
    }

    fn decode_simple(
        &mut self,
        input: &mut BytesMut,
        pending: impl FnOnce(u64) -> Option<PendingRead>,
    ) -> Result<ReplyEvent, ReplyError> {
        let mut reader = Reader::new(input);
        let (Some(_), Some(code), Some(cookie)) = (reader.u32(), reader.u32(), reader.u64()) else {
            return Ok(ReplyEvent::NeedMore);
        };
        let read = pending(cookie);
        if read.is_some() && self.replies == ReplyStyle::Structured {
            return Err(ReplyError::SimpleReplyToRead);
        }
        input.advance(SIMPLE_REPLY_HEADER_BYTES);
        if code != 0 {
            let (error, message) = (NbdError::from_code(code), String::new());
            return Ok(ReplyEvent::Error { cookie, error, message, offset: None, last: true });
        }
        match read {
            Some(PendingRead { offset, len }) if len > 0 => {
                self.payload_remaining = len;
                Ok(ReplyEvent::Data { cookie, offset, len, last: true })
            }
            _ => Ok(ReplyEvent::Done { cookie }),
        }
    }

    fn chunk(&self, input: &[u8]) -> Option<Chunk> {
        let extended = self.replies == ReplyStyle::Extended;
        let header_len =
            if extended { EXTENDED_REPLY_HEADER_BYTES } else { STRUCTURED_REPLY_HEADER_BYTES };
        let mut reader = Reader::new(input.get(..header_len)?);
        reader.u32()?;
        let last = ReplyFlags::from_bits(reader.u16()?).contains(ReplyFlags::DONE);
        let kind = reader.u16()?;
        let cookie = reader.u64()?;
        let offset = if extended { Some(reader.u64()?) } else { None };
        let length = if extended { reader.u64()? } else { u64::from(reader.u32()?) };
        Some(Chunk { header_len, last, kind, cookie, offset, length })
    }

    fn decode_chunk(
        &mut self,
        input: &mut BytesMut,
        chunk: Chunk,
        pending: impl FnOnce(u64) -> Option<PendingRead>,
    ) -> Result<ReplyEvent, ReplyError> {
        let Chunk { header_len, kind, cookie, length, .. } = chunk;
        let bad_length = ReplyError::BadChunkLength { kind, length };
        let status_kind = match self.replies {
            ReplyStyle::Extended => chunk::BLOCK_STATUS_EXT,
            _ => chunk::BLOCK_STATUS,
        };
        // How much of the payload has to be in the input before anything is consumed: all of it,
        // but for content of which only the offset.
        let needed = match kind {
            chunk::NONE if length == 0 => 0,
            chunk::OFFSET_DATA if length > 8 => 8,
            chunk::OFFSET_HOLE if length == 12 => 12,
            chunk::NONE | chunk::OFFSET_DATA | chunk::OFFSET_HOLE => return Err(bad_length),
            kind if kind == status_kind => {
                bounded(length, 16 * REPLY_EXTENTS_MAX + 8).ok_or(bad_length)?
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                bounded(length, ERROR_CHUNK_BYTES_MAX).ok_or(bad_length)?
            }
            kind => return Err(ReplyError::UnknownChunk { kind }),
        };
        let Some(payload) = input.get(header_len..header_len + needed) else {
            return Ok(ReplyEvent::NeedMore);
        };
        let malformed = ReplyError::BadChunk { kind };
        let event = match kind {
            chunk::NONE if chunk.last => ReplyEvent::Done { cookie },
            chunk::NONE => return Err(malformed),
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => content(&chunk, payload, pending(cookie))?,
            kind if kind == status_kind => {
                block_status(&chunk, payload, self.replies).ok_or(malformed)?
            }
            _ => error(&chunk, payload).ok_or(malformed)?,
        };
        input.advance(header_len + needed);
        if let ReplyEvent::Data { len, .. } = event {
            self.payload_remaining = len;
        }
        Ok(event)
    }
}

fn bounded(length: u64, max: usize) -> Option<usize> {
    usize::try_from(length).ok().filter(|length| *length <= max)
}

fn content(
    chunk: &Chunk,
    payload: &[u8],
    read: Option<PendingRead>,
) -> Result<ReplyEvent, ReplyError> {
    let Chunk { kind, cookie, last, length, .. } = *chunk;
    let read = read.ok_or(ReplyError::NotARead { cookie })?;
    if chunk.offset.is_some_and(|offset| offset != read.offset) {
        return Err(ReplyError::BadChunk { kind });
    }
    let mut reader = Reader::new(payload);
    let offset = reader.u64().ok_or(ReplyError::BadChunk { kind })?;
    let len = match kind {
        chunk::OFFSET_DATA => length - 8,
        _ => u64::from(reader.u32().unwrap_or_default()),
    };
    // Neither sum can wrap unseen: the read's own range is the client's and fits.
    let end = read.offset.saturating_add(read.len);
    if offset < read.offset || offset.checked_add(len).is_none_or(|content_end| content_end > end) {
        return Err(ReplyError::OutsideRequest { offset, length: len });
    }
    match kind {
        chunk::OFFSET_DATA => Ok(ReplyEvent::Data { cookie, offset, len, last }),
        _ if len == 0 => Err(ReplyError::BadChunk { kind }),
        _ => Ok(ReplyEvent::Hole { cookie, offset, len, last }),
    }
}

fn block_status(chunk: &Chunk, payload: &[u8], replies: ReplyStyle) -> Option<ReplyEvent> {
    let mut reader = Reader::new(payload);
    let context_id = reader.u32()?;
    let extended = replies == ReplyStyle::Extended;
    let announced = if extended { Some(reader.u32()?) } else { None };
    let extent_len = if extended { 16 } else { 8 };
    let count = reader.rest().len() / extent_len;
    if count > REPLY_EXTENTS_MAX || announced.is_some_and(|n| usize::try_from(n) != Ok(count)) {
        return None;
    }
    let mut extents = Vec::with_capacity(count);
    while !reader.is_empty() {
        let (len, flags) = if extended {
            (reader.u64()?, u32::try_from(reader.u64()? & u64::from(u32::MAX)).ok()?)
        } else {
            (u64::from(reader.u32()?), reader.u32()?)
        };
        if len == 0 {
            return None;
        }
        extents.push(Extent::from_wire(len, AllocationFlags::from_bits(flags)));
    }
    if extents.is_empty() {
        return None;
    }
    Some(ReplyEvent::BlockStatus { cookie: chunk.cookie, context_id, extents, last: chunk.last })
}

/// Also for error chunks of unknown types, which begin alike ("All error chunk types have bit 15
/// set, and begin with the same fields").
fn error(chunk: &Chunk, payload: &[u8]) -> Option<ReplyEvent> {
    let mut reader = Reader::new(payload);
    let error = NbdError::from_code(reader.u32()?);
    let length = usize::from(reader.u16()?);
    let message = reader.bytes(length).filter(|text| text.len() <= ERROR_TEXT_BYTES_MAX)?;
    let message = String::from_utf8_lossy(message).into_owned();
    let offset = match chunk.kind {
        chunk::ERROR_OFFSET => Some(reader.u64()?),
        _ => None,
    };
    Some(ReplyEvent::Error { cookie: chunk.cookie, error, message, offset, last: chunk.last })
}
