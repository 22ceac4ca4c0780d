//! Requests: their header on the wire, and the commands they become once validated.

use bytes::{BufMut, BytesMut};

use crate::constants::{
    CommandFlags, EXTENDED_REQUEST_HEADER_BYTES, EXTENDED_REQUEST_MAGIC, REQUEST_HEADER_BYTES,
    REQUEST_MAGIC, command,
};
use crate::error::{NbdError, TransmissionError};
use crate::export::ReplyStyle;
use crate::wire::Reader;

/// A request that passed every check against the export and what was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's mark, echoed in each reply. Opaque; clients may repeat it.
    pub cookie: u64,
    /// Offset exactly as sent, which extended replies echo.
    pub offset: u64,
    /// What to do.
    pub command: Command,
}

impl Request {
    /// What a reply has to echo.
    pub const fn reply_to(&self) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset }
    }
}

/// What to do, with `offset + len` inside the export and only flags that belong to the command.
///
/// `len` may be zero, in which case there is nothing to do but to reply (never for
/// [`Command::BlockStatus`]). [`CommandFlags::FUA`] is accepted on every command and not shown
/// here: this server replies to no command before its effect is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// `NBD_CMD_READ`, at most
    /// [`limits::REQUEST_PAYLOAD_BYTES_MAX`](crate::limits::REQUEST_PAYLOAD_BYTES_MAX) bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Answer with at most one content chunk.
        dont_fragment: bool,
    },
    /// `NBD_CMD_WRITE`; `len` bytes of payload follow, at most
    /// [`limits::REQUEST_PAYLOAD_BYTES_MAX`](crate::limits::REQUEST_PAYLOAD_BYTES_MAX).
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`, of any length.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `NBD_CMD_CACHE`, of any length.
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `NBD_CMD_WRITE_ZEROES`, of any length. `FAST_ZERO` is not shown: zeroing is always fast
    /// here.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Keep the range allocated.
        no_hole: bool,
    },
    /// `NBD_CMD_BLOCK_STATUS`; `len` is at least 1.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes of interest.
        len: u64,
        /// Answer with exactly one extent, not longer than `len`.
        req_one: bool,
    },
}

impl Command {
    /// The command without its operands.
    pub const fn kind(&self) -> CommandKind {
        match self {
            Self::Read { .. } => CommandKind::Read,
            Self::Write { .. } => CommandKind::Write,
            Self::Flush => CommandKind::Flush,
            Self::Trim { .. } => CommandKind::Trim,
            Self::Cache { .. } => CommandKind::Cache,
            Self::WriteZeroes { .. } => CommandKind::WriteZeroes,
            Self::BlockStatus { .. } => CommandKind::BlockStatus,
        }
    }

    /// Offset and length on the wire; zeroes for [`Command::Flush`].
    pub const fn range(&self) -> (u64, u64) {
        match *self {
            Self::Flush => (0, 0),
            Self::Read { offset, len, .. }
            | Self::Write { offset, len }
            | Self::Trim { offset, len }
            | Self::Cache { offset, len }
            | Self::WriteZeroes { offset, len, .. }
            | Self::BlockStatus { offset, len, .. } => (offset, len),
        }
    }

    fn flags(&self) -> CommandFlags {
        match *self {
            Self::Read { dont_fragment: true, .. } => CommandFlags::DF,
            Self::WriteZeroes { no_hole: true, .. } => CommandFlags::NO_HOLE,
            Self::BlockStatus { req_one: true, .. } => CommandFlags::REQ_ONE,
            _ => CommandFlags::NONE,
        }
    }
}

/// A command without its operands: for logs, metrics and refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandKind {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`.
    Write,
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_CACHE`.
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus,
    /// Anything else; always refused.
    Unknown,
}

impl CommandKind {
    /// A short, fixed name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Unknown => "unknown",
        }
    }

    pub(crate) const fn from_code(code: u16) -> Self {
        match code {
            command::READ => Self::Read,
            command::WRITE => Self::Write,
            command::FLUSH => Self::Flush,
            command::TRIM => Self::Trim,
            command::CACHE => Self::Cache,
            command::WRITE_ZEROES => Self::WriteZeroes,
            command::BLOCK_STATUS => Self::BlockStatus,
            _ => Self::Unknown,
        }
    }
}

/// A request that was refused before it reached anyone. Its payload, if it had one, is already
/// consumed; the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The client's mark.
    pub cookie: u64,
    /// Offset exactly as sent.
    pub offset: u64,
    /// Which command it was.
    pub command: CommandKind,
    /// What to reply.
    pub error: NbdError,
    /// Text to reply, where the style has room for one.
    pub message: &'static str,
}

impl Refused {
    /// What the reply has to echo.
    pub const fn reply_to(&self) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset }
    }
}

/// The fields of a request that its replies echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The client's mark.
    pub cookie: u64,
    /// Offset exactly as sent.
    pub offset: u64,
}

/// A request's header as it is on the wire, before any check but that of its magic number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Flags as sent, unknown ones included.
    pub flags: CommandFlags,
    /// One of [`constants::command`](crate::constants::command), or anything.
    pub command: u16,
    /// The client's mark.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes of payload or of effect; at most 32 bits in compact headers.
    pub length: u64,
}

impl RequestHeader {
    /// Bytes of a header under `replies`.
    pub const fn encoded_len(replies: ReplyStyle) -> usize {
        match replies {
            ReplyStyle::Extended => EXTENDED_REQUEST_HEADER_BYTES,
            _ => REQUEST_HEADER_BYTES,
        }
    }

    /// The header at the start of `input`, or `None` if `input` is shorter than one. Consumes
    /// nothing.
    pub fn decode(input: &[u8], replies: ReplyStyle) -> Result<Option<Self>, TransmissionError> {
        let mut reader = Reader::new(input);
        let (Some(found), Some(flags), Some(command), Some(cookie), Some(offset)) =
            (reader.u32(), reader.u16(), reader.u16(), reader.u64(), reader.u64())
        else {
            return Ok(None);
        };
        let (magic, length) = match replies {
            ReplyStyle::Extended => (EXTENDED_REQUEST_MAGIC, reader.u64()),
            _ => (REQUEST_MAGIC, reader.u32().map(u64::from)),
        };
        let Some(length) = length else { return Ok(None) };
        if found != magic {
            return Err(TransmissionError::BadMagic { found });
        }
        let flags = CommandFlags::from_bits(flags);
        Ok(Some(Self { flags, command, cookie, offset, length }))
    }

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut BytesMut, replies: ReplyStyle) -> Result<(), RequestTooLong> {
        if replies == ReplyStyle::Extended {
            self.put_front(out, EXTENDED_REQUEST_MAGIC);
            out.put_u64(self.length);
            return Ok(());
        }
        let length =
            u32::try_from(self.length).map_err(|_| RequestTooLong { length: self.length })?;
        self.put_front(out, REQUEST_MAGIC);
        out.put_u32(length);
        Ok(())
    }

    /// Everything before the length, which is all that the styles have in common.
    fn put_front(&self, out: &mut BytesMut, magic: u32) {
        out.put_u32(magic);
        out.put_u16(self.flags.bits());
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
    }
}

/// A length above 32 bits has no place in a compact header; nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a length of {length} bytes needs extended headers")]
pub struct RequestTooLong {
    /// The length that does not fit.
    pub length: u64,
}

/// Client side: appends a request's header to `out`. The payload of [`Command::Write`] is the
/// caller's to send right after it.
pub fn encode_request(
    out: &mut BytesMut,
    replies: ReplyStyle,
    cookie: u64,
    command: &Command,
    fua: bool,
) -> Result<(), RequestTooLong> {
    let code = match command {
        Command::Read { .. } => command::READ,
        Command::Write { .. } => command::WRITE,
        Command::Flush => command::FLUSH,
        Command::Trim { .. } => command::TRIM,
        Command::Cache { .. } => command::CACHE,
        Command::WriteZeroes { .. } => command::WRITE_ZEROES,
        Command::BlockStatus { .. } => command::BLOCK_STATUS,
    };
    let mut flags = command.flags();
    if fua {
        flags = flags | CommandFlags::FUA;
    }
    if code == command::WRITE && replies == ReplyStyle::Extended {
        flags = flags | CommandFlags::PAYLOAD_LEN;
    }
    let (offset, length) = command.range();
    RequestHeader { flags, command: code, cookie, offset, length }.encode(out, replies)
}

/// Client side: appends `NBD_CMD_DISC`, after which nothing may be sent. It is never answered.
pub fn encode_disconnect(out: &mut BytesMut, replies: ReplyStyle) {
    let header = RequestHeader {
        flags: CommandFlags::NONE,
        command: command::DISC,
        cookie: 0,
        offset: 0,
        length: 0,
    };
    header.encode(out, replies).expect("a length of zero fits every header");
}
