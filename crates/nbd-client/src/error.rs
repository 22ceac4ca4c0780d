//! What a connection or a request can come to other than success.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::constants::option_reply;
use nbd_proto::{ClientHandshakeError, ExchangeError, NbdError, Refusal, RequestTooLong};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server closed the connection in the middle of the handshake.
    #[error("the server closed the connection")]
    Closed,
    /// The server does not answer in time.
    #[error("the server does not answer within {0:?}")]
    Silent(Duration),
    /// The server broke the protocol.
    #[error(transparent)]
    Handshake(#[from] ClientHandshakeError),
    /// The server does not hand out the export.
    #[error("the server refuses: {}", refused(*.error, .message))]
    Refused {
        /// One of [`nbd_proto::constants::option_reply`], or another with the error bit set.
        error: u32,
        /// The server's text; may be empty.
        message: String,
    },
    /// The handshake led where it was not to go.
    #[error("the server answers what was not asked")]
    Unasked,
}

/// Why a request has no answer that it could use.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The server answered with an error; the connection goes on.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The connection ended first. Whether the request took effect is not known.
    #[error(transparent)]
    Lost(#[from] Arc<Lost>),
    /// The headers agreed on cannot carry the request's length; nothing was sent.
    #[error(transparent)]
    TooLong(#[from] RequestTooLong),
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// The socket.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The server closed it.
    #[error("the server closed the connection")]
    Closed,
    /// Requests are in flight, and none of them got on for as long as this.
    #[error("the server does not answer within {0:?}")]
    Silent(Duration),
    /// The server broke the protocol.
    #[error("the server breaks the protocol: {0}")]
    Protocol(#[from] ExchangeError),
}

fn refused(error: u32, message: &str) -> String {
    if !message.is_empty() {
        return message.to_owned();
    }
    match error {
        option_reply::ERR_UNKNOWN => "no such export".to_owned(),
        option_reply::ERR_POLICY => "not allowed".to_owned(),
        option_reply::ERR_TLS_REQD => "it wants TLS, which is not spoken here".to_owned(),
        option_reply::ERR_SHUTDOWN => "it is being shut down".to_owned(),
        other => format!("error {other:#x}"),
    }
}

impl ConnectError {
    /// Whether to try again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Io(_) | Self::Closed | Self::Silent(_) => true,
            // The server cannot at the moment: no leader, say.
            Self::Refused { error, .. } => {
                matches!(*error, option_reply::ERR_SHUTDOWN | option_reply::ERR_PLATFORM)
            }
            Self::Handshake(_) | Self::Unasked => false,
        }
    }

    /// Whether the server says that there is no such export.
    pub fn is_unknown_export(&self) -> bool {
        matches!(self, Self::Refused { error: option_reply::ERR_UNKNOWN, .. })
    }
}

impl Error {
    /// Whether the same request may be answered over another connection.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Lost(lost) => !matches!(**lost, Lost::Protocol(_)),
            Self::Refused(refusal) => refusal.error == NbdError::Shutdown,
            Self::TooLong(_) => false,
        }
    }

    /// The error that the server answered with, if that is what this is.
    pub fn nbd_error(&self) -> Option<NbdError> {
        match self {
            Self::Refused(refusal) => Some(refusal.error),
            _ => None,
        }
    }
}
