//! The NBD server: from an accepted connection to proposals and replies.
//!
//! - [`listener`]: accepts, bounds the number of connections, sets socket options.
//! - [`attach`]: carries the handshake, finds or creates the volume, opens the session.
//! - [`session`]: the transmission phase, one task a connection.
//! - [`in_flight`]: the requests a session has under way.
//! - [`output`]: replies on their way to the client.

mod attach;
mod in_flight;
mod listener;
mod output;
mod session;

use std::collections::HashMap;
use std::num::NonZeroU32;

use nbd_service::Shutdown;
use nbd_topology::ShardId;

use crate::budget::ByteBudget;
use crate::config::VolumesConfig;
use crate::metrics::NbdMetrics;
use crate::shard_client::ShardClient;

pub(crate) use listener::Listener;

/// What all connections of a node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) shard_count: NonZeroU32,
    /// The shards of which this node hosts a replica, whoever leads them.
    pub(crate) shards: HashMap<ShardId, ShardClient>,
    pub(crate) volumes: VolumesConfig,
    pub(crate) budget: ByteBudget,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: NbdMetrics,
}
