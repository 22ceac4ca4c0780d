//! What a client's operation can come to other than success.

use std::io;

use nbd_proto::{
    ClientEvent, ClientHandshakeError, ExportNameError, NbdError, ReplyError, RequestTooLong,
};

use super::Reply;

/// Why an operation of an [`NbdClient`](crate::NbdClient) failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket: refused, reset, or nothing for as long as the timeout.
    #[error("socket")]
    Io(#[from] io::Error),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The name cannot be an export's.
    #[error("export name")]
    ExportName(#[from] ExportNameError),
    /// The server broke the protocol in the handshake.
    #[error("handshake")]
    Handshake(#[from] ClientHandshakeError),
    /// The server refused an option.
    #[error("option {option} refused with {error:#x}: {message}")]
    Refused {
        /// The option.
        option: u32,
        /// The error's value in the reply.
        error: u32,
        /// The server's text.
        message: String,
    },
    /// The handshake led where it was not to go.
    #[error("unexpected: {0:?}")]
    UnexpectedEvent(Box<ClientEvent>),
    /// The request's length does not fit the agreed headers; nothing was sent.
    #[error("request")]
    TooLong(#[from] RequestTooLong),
    /// The server broke the protocol in a reply.
    #[error("reply")]
    Reply(#[from] ReplyError),
    /// A reply to a request that is not in flight.
    #[error("a reply to cookie {0}, which is not in flight")]
    UnknownCookie(u64),
    /// Pieces of a read's content that overlap, or lie outside of what was asked for.
    #[error("content of {len} bytes at {offset} overlaps other content or the read's range")]
    Misplaced {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A read was answered without error and without all its bytes.
    #[error("a read of {len} bytes was answered with {received}")]
    Incomplete {
        /// Bytes asked for.
        len: u64,
        /// Bytes received.
        received: u64,
    },
    /// A reply of another kind than the request's.
    #[error("a reply of another kind: {0:?}")]
    UnexpectedReply(Reply),
    /// The server answered the request with an error.
    #[error(transparent)]
    Error(ErrorReply),
}

/// An error reply to one request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}: {message}")]
pub struct ErrorReply {
    /// The error.
    pub error: NbdError,
    /// The server's text; empty in simple replies.
    pub message: String,
    /// Where in the export, if the server said.
    pub offset: Option<u64>,
}

impl ClientError {
    /// The error that the server answered the request with, if that is what this is.
    pub fn nbd_error(&self) -> Option<NbdError> {
        match self {
            Self::Error(reply) => Some(reply.error),
            _ => None,
        }
    }
}
