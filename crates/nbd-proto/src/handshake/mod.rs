//! Both sides of the handshake, as state machines over bytes.

pub(crate) mod client;
pub(crate) mod server;
