//! gRPC between nodes: types, clients and services generated from `/proto`, and what all of them
//! share.
//!
//! It knows how nodes reach each other and how they tell that they belong together; what they say
//! is up to the services.
//!
//! - [`v1`]: the generated code.
//! - [`connect`]: [`channel`], [`server`] and [`incoming`], with one set of HTTP/2 settings.
//!   [`channels`]: connections that are kept.
//! - [`identity`]: protocol version, cluster, node, directory and replica, checked alike.
//! - [`error`]: [`Refusal`], what a service tells a caller that it turns away, and [`reason`], why
//!   a call failed.
//! - [`mod@conflict`]: why a call of `Control` is refused as things stand.
//! - [`limits`]: sizes and times.

pub mod channels;
pub mod conflict;
pub mod connect;
pub mod error;
pub mod identity;
pub mod limits;

pub use channels::Channels;
pub use conflict::{conflict, conflict_of};
pub use connect::{InvalidAddress, channel, incoming, server, within};
pub use error::{Refusal, is_refusal, reason};
pub use limits::{CONNECT_TIMEOUT, MESSAGE_BYTES_MAX};

/// Version 1 of the protocol between nodes, as generated.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    unnameable_types,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("cinderblock.v1");
}
