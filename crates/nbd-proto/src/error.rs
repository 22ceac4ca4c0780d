//! What goes wrong: on the wire ([`NbdError`]), and in a peer's conduct (the rest).
//!
//! Errors of the last kind end the session; which text a peer saw before, if any, is in the output
//! that was already handed out.

use crate::export::ExportNameError;

/// The error values a reply may carry ("Error values"). Nothing else goes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NbdError {
    /// `NBD_EPERM`: a write to a read-only export.
    #[error("operation not permitted")]
    Perm,
    /// `NBD_EIO`: the data could not be read or stored.
    #[error("input/output error")]
    Io,
    /// `NBD_ENOMEM`: avoid, says the document.
    #[error("cannot allocate memory")]
    NoMem,
    /// `NBD_EINVAL`: the request makes no sense, or passes the end without writing.
    #[error("invalid argument")]
    Inval,
    /// `NBD_ENOSPC`: no room, or a write past the end.
    #[error("no space left on device")]
    NoSpc,
    /// `NBD_EOVERFLOW`: more asked for at once than will be answered at once.
    #[error("value too large")]
    Overflow,
    /// `NBD_ENOTSUP`: a fast zero that would not be fast.
    #[error("operation not supported")]
    NotSup,
    /// `NBD_ESHUTDOWN`: the server is going down.
    #[error("server is in the process of being shut down")]
    Shutdown,
}

impl NbdError {
    /// The value on the wire.
    pub const fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error for a non-zero value on the wire; an unexpected one is [`NbdError::Inval`], as the
    /// document tells clients to take it.
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}

/// Why a server ends a session during the handshake. Send what output is left, then close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The client set a flag this server did not offer; the document demands to drop it.
    #[error("client flags {found:#x} are not known here")]
    UnknownClientFlags {
        /// The flags as sent.
        found: u32,
    },
    /// The bytes where an option should begin do not begin one.
    #[error("an option began with {found:#x} instead of its magic number")]
    BadOptionMagic {
        /// The 8 bytes as sent.
        found: u64,
    },
    /// An option announced more than
    /// [`limits::OPTION_SKIP_BYTES_MAX`](crate::limits::OPTION_SKIP_BYTES_MAX) bytes of data, or
    /// `NBD_OPT_EXPORT_NAME` (which cannot be answered with an error) more than a name has.
    #[error("option {option} announced {length} bytes of data, {max} are allowed")]
    OptionTooLong {
        /// The option's code.
        option: u32,
        /// The announced length.
        length: u32,
        /// The most that is taken.
        max: u32,
    },
    /// More than [`limits::OPTIONS_MAX`](crate::limits::OPTIONS_MAX) options.
    #[error("the client sent more than {} options", crate::limits::OPTIONS_MAX)]
    TooManyOptions,
    /// A client that did not agree to fixed newstyle sent anything but `NBD_OPT_EXPORT_NAME`.
    #[error("option {option} needs fixed newstyle, which the client did not agree to")]
    NotFixedNewstyle {
        /// The option's code.
        option: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` carried a name that is none.
    #[error("the client asked for an impossible export name")]
    InvalidExportName(#[source] ExportNameError),
    /// `NBD_OPT_EXPORT_NAME` after extended headers were agreed on, which the document forbids.
    #[error("the client used NBD_OPT_EXPORT_NAME after it asked for extended headers")]
    ExportNameWithExtendedHeaders,
    /// `NBD_OPT_EXPORT_NAME` was refused; it has no other way to say so.
    #[error("the export asked for with NBD_OPT_EXPORT_NAME was refused")]
    ExportRefused,
    /// The handshake is over: it was aborted, or an export was attached.
    #[error("the handshake is over")]
    Ended,
}

/// Why a server ends a session during transmission. The peer is told nothing: the byte stream can
/// no longer be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// The bytes where a request should begin do not begin one of the style agreed on.
    #[error("a request began with {found:#x} instead of its magic number")]
    BadMagic {
        /// The 4 bytes as sent.
        found: u32,
    },
    /// A payload longer than
    /// [`limits::WRITE_DRAIN_BYTES_MAX`](crate::limits::WRITE_DRAIN_BYTES_MAX): not worth reading.
    #[error("a request announced {length} bytes of payload, {max} are allowed")]
    PayloadTooLong {
        /// The announced length.
        length: u64,
        /// The most that is taken.
        max: u64,
    },
}

/// Why a client gives up a handshake: the server broke the protocol, or is too old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientHandshakeError {
    /// The server did not greet as an NBD server of the newstyle does.
    #[error("the peer is no newstyle NBD server")]
    BadGreeting,
    /// Only fixed newstyle servers can be asked this.
    #[error("the server does not speak fixed newstyle")]
    NotFixedNewstyle,
    /// The bytes where a reply should begin do not begin one.
    #[error("an option reply began with {found:#x} instead of its magic number")]
    BadReplyMagic {
        /// The 8 bytes as sent.
        found: u64,
    },
    /// The reply is to an option that was not asked.
    #[error("the server replied to option {found}, asked was {expected}")]
    WrongOption {
        /// The option in the reply.
        found: u32,
        /// The option that was sent.
        expected: u32,
    },
    /// The reply's type does not belong to the option.
    #[error("the server sent reply type {reply:#x} to option {option}")]
    UnexpectedReply {
        /// The option that was sent.
        option: u32,
        /// The reply's type.
        reply: u32,
    },
    /// More than [`limits::OPTION_REPLY_BYTES_MAX`](crate::limits::OPTION_REPLY_BYTES_MAX).
    #[error("the server announced an option reply of {length} bytes")]
    ReplyTooLong {
        /// The announced length.
        length: u32,
    },
    /// The reply's data does not parse.
    #[error("the server's reply of type {reply:#x} is malformed")]
    MalformedReply {
        /// The reply's type.
        reply: u32,
    },
    /// `NBD_REP_ACK` without the mandatory `NBD_INFO_EXPORT` before it.
    #[error("the server accepted the export without saying its size")]
    MissingExportInfo,
    /// More than [`limits::EXPORT_BYTES_MAX`](crate::limits::EXPORT_BYTES_MAX).
    #[error("the server announced an export of {size} bytes")]
    ExportTooLarge {
        /// The announced size.
        size: u64,
    },
    /// The handshake is over: it was aborted, or an export was attached.
    #[error("the handshake is over")]
    Ended,
}

/// Why a client gives up a session during transmission: the server broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The bytes where a reply should begin do not begin one of the style agreed on.
    #[error("a reply began with {found:#x} instead of a magic number")]
    BadMagic {
        /// The 4 bytes as sent.
        found: u32,
    },
    /// A read was answered with a simple reply although replies are structured.
    #[error("a read was answered with a simple reply although replies are structured")]
    SimpleReplyToRead,
    /// A chunk type that is unknown or does not belong to the style agreed on.
    #[error("a reply chunk has type {kind}")]
    UnknownChunk {
        /// The type as sent.
        kind: u16,
    },
    /// A chunk whose length does not fit its type.
    #[error("a reply chunk of type {kind} has {length} bytes")]
    BadChunkLength {
        /// The type as sent.
        kind: u16,
        /// The length as sent.
        length: u64,
    },
    /// A chunk whose fields contradict each other or the request.
    #[error("a reply chunk of type {kind} makes no sense")]
    BadChunk {
        /// The type as sent.
        kind: u16,
    },
    /// Content for a cookie under which no read is outstanding.
    #[error("content arrived for cookie {cookie:#x}, which is no read")]
    NotARead {
        /// The cookie as sent.
        cookie: u64,
    },
    /// Content outside the range that was asked for.
    #[error("content at {offset} with {length} bytes lies outside its request")]
    OutsideRequest {
        /// The content's offset.
        offset: u64,
        /// The content's length.
        length: u64,
    },
}

/// Why a client gives up a session during transmission: a reply cannot be followed, or is no answer
/// to what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The bytes cannot be followed.
    #[error(transparent)]
    Reply(#[from] ReplyError),
    /// A reply to a request that is not in flight.
    #[error("the server replied to cookie {cookie:#x}, under which nothing was asked")]
    UnknownCookie {
        /// The cookie as sent.
        cookie: u64,
    },
    /// Pieces of a read's content that overlap, or lie outside of what was asked for.
    #[error("{len} bytes of content at {offset} overlap other content, or were not asked for")]
    Misplaced {
        /// The content's offset.
        offset: u64,
        /// The content's length.
        len: u64,
    },
    /// More than [`limits::READ_PIECES_MAX`](crate::limits::READ_PIECES_MAX).
    #[error("the server scatters the content of a read in too many pieces")]
    TooManyPieces,
    /// A read was answered without error and without all its bytes.
    #[error("the server answered a read of {len} bytes with {received}")]
    Incomplete {
        /// Bytes asked for.
        len: u64,
        /// Bytes received.
        received: u64,
    },
    /// A reply of another kind than its request, or of another metadata context.
    #[error("the reply to cookie {cookie:#x} is of another kind than the request")]
    OtherKind {
        /// The cookie as sent.
        cookie: u64,
    },
    /// Extents that go on behind the end of the request.
    #[error("the server told the status of more than it was asked about")]
    StatusBeyondRequest,
}
