//! The NBD wire protocol, both directions, sans-IO.
//!
//! Nothing here reads a socket, a file or a clock, and nothing blocks: bytes go in, events and
//! bytes come out. A peer is never trusted. Whatever it sends leads to an event, to a refusal, or
//! to an error that ends its session; never to a panic, and never to memory by a length it
//! announced. Panics are left for callers that break the order of calls documented on each type.
//!
//! ```text
//!  server                                                          client
//!  socket ─▶ ServerHandshake ─▶ Resolve, List, Aborted             ClientHandshake ─▶ Attached
//!                  │ answer_export                                        │
//!                  ▼                                                      ▼
//!              Negotiated                                              Attached
//!                  │                                                      │
//!  socket ─▶ RequestDecoder ─▶ Request, Refused      encode_request ─▶ socket
//!  socket ◀─ ReplyEncoder   ◀─ done, error, data      ReplyDecoder   ◀─ socket
//! ```
//!
//! What is spoken: fixed newstyle, `NBD_OPT_EXPORT_NAME` for old clients, structured replies, the
//! metadata context `base:allocation`, extended headers. What is not: oldstyle, TLS (refused by
//! policy), the experimental resize.
//!
//! - [`constants`]: every magic number, flag and code, with its section of the document.
//! - [`limits`]: every bound a peer is held to.
//! - [`option`]: options and their replies as bytes.
//! - [`ServerHandshake`], [`ClientHandshake`]: from the greeting to an attached export.
//! - [`RequestDecoder`], [`ReplyEncoder`]: the server's transmission phase.
//! - [`encode_request`], [`ReplyDecoder`]: the client's; [`Exchange`]: both, with the requests in
//!   flight, for clients that want whole answers.
//! - [`NbdError`]: what a reply may say; the other errors end sessions.

mod decoder;
mod error;
mod exchange;
mod export;
mod handshake;
mod reply;
mod reply_decoder;
mod request;
mod validate;
mod wire;

pub mod constants;
#[doc(hidden)]
pub mod fuzzing;
pub mod limits;
pub mod option;

pub use decoder::{Decoded, RequestDecoder};
pub use error::{
    ClientHandshakeError, ExchangeError, HandshakeError, NbdError, ReplyError, TransmissionError,
};
pub use exchange::{Answer, Exchange, Received, Refusal};
pub use export::{ExportInfo, ExportName, ExportNameError, ExportRefusal, Negotiated, ReplyStyle};
pub use handshake::client::{
    Attached, BlockSize, ClientEvent, ClientGoal, ClientHandshake, ClientWish, RemoteExport,
};
pub use handshake::server::{HandshakeEvent, Purpose, ServerHandshake};
pub use reply::{Extent, ReplyEncoder};
pub use reply_decoder::{PendingRead, ReplyDecoder, ReplyEvent};
pub use request::{
    Command, CommandKind, Refused, ReplyTo, Request, RequestHeader, RequestTooLong,
    encode_disconnect, encode_request,
};
