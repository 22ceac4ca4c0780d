//! Server side of transmission: replies out, in the style agreed on.
//!
//! With structured or extended replies everything is sent in chunks, never as a simple reply: that
//! is always allowed, a must for reads, and gives errors room for a text.

use bytes::{BufMut, BytesMut};

use crate::constants::{
    AllocationFlags, EXTENDED_REPLY_MAGIC, ReplyFlags, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    chunk,
};
use crate::error::NbdError;
use crate::export::{Negotiated, ReplyStyle};
use crate::limits::{
    BLOCK_STATUS_EXTENTS_MAX, COMPACT_EXTENT_BYTES_MAX, ERROR_TEXT_BYTES_MAX,
    REQUEST_PAYLOAD_BYTES_MAX, clip,
};
use crate::request::ReplyTo;

/// Writes replies.
///
/// Each request gets exactly one of: [`done`](Self::done); [`error`](Self::error);
/// [`block_status`](Self::block_status); or, for a read of at least one byte, content chunks
/// ([`read_prefix`](Self::read_prefix) followed by its data, [`read_hole`](Self::read_hole)) that
/// cover it without overlap, the last of them marked `last`, or broken off with
/// [`read_error_after_data`](Self::read_error_after_data). Chunks of different requests may
/// interleave. An empty read is answered with [`done`](Self::done).
#[derive(Clone, Copy, Debug)]
pub struct ReplyEncoder {
    replies: ReplyStyle,
}

/// A stretch of equal allocation status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not zero.
    pub len: u64,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

impl Extent {
    /// The status on the wire.
    pub fn flags(&self) -> AllocationFlags {
        let mut flags = AllocationFlags::NONE;
        if self.hole {
            flags = flags | AllocationFlags::HOLE;
        }
        if self.zero {
            flags = flags | AllocationFlags::ZERO;
        }
        flags
    }

    pub(crate) fn from_wire(len: u64, flags: AllocationFlags) -> Self {
        let hole = flags.contains(AllocationFlags::HOLE);
        let zero = flags.contains(AllocationFlags::ZERO);
        Self { len, hole, zero }
    }
}

impl ReplyEncoder {
    /// An encoder for what was negotiated.
    pub fn new(negotiated: &Negotiated) -> Self {
        Self { replies: negotiated.replies }
    }

    /// Success without data.
    pub fn done(&self, out: &mut BytesMut, to: &ReplyTo) {
        match self.replies {
            ReplyStyle::Simple => simple(out, to, 0),
            _ => self.chunk(out, to, chunk::NONE, true, 0),
        }
    }

    /// Failure before any content. `message` is for people; it is sent where the style has room for
    /// one, cut to [`ERROR_TEXT_BYTES_MAX`].
    pub fn error(&self, out: &mut BytesMut, to: &ReplyTo, error: NbdError, message: &str) {
        if self.replies == ReplyStyle::Simple {
            simple(out, to, error.code());
            return;
        }
        let text = clip(message, ERROR_TEXT_BYTES_MAX);
        self.chunk(out, to, chunk::ERROR, true, 6 + text.len() as u64);
        put_error(out, error, text);
    }

    /// The bytes that precede `len` bytes of data found at `offset`; the caller sends the data
    /// right after them.
    ///
    /// # Panics
    ///
    /// If `len` is zero or above [`REQUEST_PAYLOAD_BYTES_MAX`], or if replies are simple and this
    /// is not the whole read (`last`, starting where the request did).
    pub fn read_prefix(&self, out: &mut BytesMut, to: &ReplyTo, offset: u64, len: u64, last: bool) {
        assert!((1..=REQUEST_PAYLOAD_BYTES_MAX).contains(&len), "content chunk of {len} bytes");
        if self.replies == ReplyStyle::Simple {
            assert!(last && offset == to.offset, "a simple reply has all the data in one piece");
            simple(out, to, 0);
            return;
        }
        self.chunk(out, to, chunk::OFFSET_DATA, last, 8 + len);
        out.put_u64(offset);
    }

    /// `len` zeroes found at `offset`, sent without sending them.
    ///
    /// # Panics
    ///
    /// If [`can_send_holes`](Self::can_send_holes) is false, or `len` is zero or above
    /// [`REQUEST_PAYLOAD_BYTES_MAX`] (no read is longer).
    pub fn read_hole(&self, out: &mut BytesMut, to: &ReplyTo, offset: u64, len: u64, last: bool) {
        assert!(self.can_send_holes(), "a simple reply has no holes");
        assert!(len <= REQUEST_PAYLOAD_BYTES_MAX, "hole of {len} bytes");
        let len = u32::try_from(len).unwrap_or_default();
        assert!(len > 0, "a hole has a length");
        self.chunk(out, to, chunk::OFFSET_HOLE, last, 12);
        out.put_u64(offset);
        out.put_u32(len);
    }

    /// Whether reads are answered in chunks: several of them, holes among them, and an error even
    /// after some. If not, a read that fails after its header was sent can only end the connection.
    pub const fn can_send_holes(&self) -> bool {
        !matches!(self.replies, ReplyStyle::Simple)
    }

    /// Ends a read that failed after content chunks were sent. `offset` is inside the request: the
    /// first byte that could not be delivered.
    ///
    /// # Panics
    ///
    /// If [`can_send_holes`](Self::can_send_holes) is false.
    pub fn read_error_after_data(
        &self,
        out: &mut BytesMut,
        to: &ReplyTo,
        offset: u64,
        error: NbdError,
        message: &str,
    ) {
        assert!(self.can_send_holes(), "a simple reply cannot fail after its data began");
        let text = clip(message, ERROR_TEXT_BYTES_MAX);
        self.chunk(out, to, chunk::ERROR_OFFSET, true, 14 + text.len() as u64);
        put_error(out, error, text);
        out.put_u64(offset);
    }

    /// Allocation status from the request's offset on, in the form the style demands.
    ///
    /// Only the first [`BLOCK_STATUS_EXTENTS_MAX`] extents are sent, and with 32-bit lengths only
    /// those up to the first that is longer than [`COMPACT_EXTENT_BYTES_MAX`], cut to that: an
    /// answer may be shorter than the question. It is the caller's part that all but the last
    /// extent lie inside the request, that none passes the export's end, and that there is just
    /// one, inside the request, if the client asked for one.
    ///
    /// # Panics
    ///
    /// If replies are simple, there is no extent, or one is empty.
    pub fn block_status(
        &self,
        out: &mut BytesMut,
        to: &ReplyTo,
        context_id: u32,
        extents: &[Extent],
        last: bool,
    ) {
        assert!(self.replies != ReplyStyle::Simple, "block status needs structured replies");
        assert!(!extents.is_empty(), "block status without an extent");
        assert!(extents.iter().all(|extent| extent.len > 0), "empty extent");
        let extents = &extents[..extents.len().min(BLOCK_STATUS_EXTENTS_MAX)];
        if self.replies == ReplyStyle::Extended {
            let count = u32::try_from(extents.len()).unwrap_or_default();
            self.chunk(out, to, chunk::BLOCK_STATUS_EXT, last, 8 + 16 * u64::from(count));
            out.put_u32(context_id);
            out.put_u32(count);
            for extent in extents {
                out.put_u64(extent.len);
                out.put_u64(u64::from(extent.flags().bits()));
            }
            return;
        }
        let whole = extents
            .iter()
            .take_while(|extent| extent.len <= u64::from(COMPACT_EXTENT_BYTES_MAX))
            .count();
        let extents = &extents[..extents.len().min(whole + 1)];
        self.chunk(out, to, chunk::BLOCK_STATUS, last, 4 + 8 * extents.len() as u64);
        out.put_u32(context_id);
        for extent in extents {
            out.put_u32(
                u32::try_from(extent.len).unwrap_or(u32::MAX).min(COMPACT_EXTENT_BYTES_MAX),
            );
            out.put_u32(extent.flags().bits());
        }
    }

    fn chunk(&self, out: &mut BytesMut, to: &ReplyTo, kind: u16, last: bool, length: u64) {
        let flags = if last { ReplyFlags::DONE } else { ReplyFlags::NONE };
        let extended = self.replies == ReplyStyle::Extended;
        out.put_u32(if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC });
        out.put_u16(flags.bits());
        out.put_u16(kind);
        out.put_u64(to.cookie);
        if extended {
            out.put_u64(to.offset);
            out.put_u64(length);
        } else {
            out.put_u32(u32::try_from(length).expect("chunks are bounded far below 32 bits"));
        }
    }
}

fn simple(out: &mut BytesMut, to: &ReplyTo, error: u32) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error);
    out.put_u64(to.cookie);
}

fn put_error(out: &mut BytesMut, error: NbdError, text: &str) {
    out.put_u32(error.code());
    out.put_u16(u16::try_from(text.len()).expect("texts are bounded below 16 bits"));
    out.put_slice(text.as_bytes());
}
