//! An NBD client: one connection to one export, many requests in flight.
//!
//! What a server may say is [`nbd_proto::Exchange`]'s to judge; here are the socket, the deadlines
//! and the callers that wait. A connection that is lost is not made again: that is for whoever
//! knows which requests may be repeated.
//!
//! ```text
//!  Connection (cloned at will) ─▶ requests ─▶ task of the connection ─▶ socket
//!          ▲                                     │ Exchange  ▲
//!          └──────────── one answer each ────────┘           └── socket
//! ```
//!
//! Memory: the payloads and buffers of callers, of which the task takes in at most
//! [`limits::REQUESTS_WAITING_MAX`] while the socket takes none, and a fixed input buffer.

mod address;
mod connection;
mod error;
pub mod limits;

pub use address::Address;
pub use connection::{Connection, Options};
pub use error::{ConnectError, Error, Lost};
