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
use crate::metrics::NbdMetrics;
use crate::shard_client::ShardClient;
use crate::volumes::VolumesConfig;

pub use listener::Listener;

/// What all connections of a process share.
#[derive(Debug)]
pub struct Front {
    pub(crate) shard_count: NonZeroU32,
    /// The shards whose volumes can be attached to here, whoever leads them.
    pub(crate) shards: HashMap<ShardId, ShardClient>,
    pub(crate) volumes: VolumesConfig,
    pub(crate) budget: ByteBudget,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: NbdMetrics,
}

impl Front {
    /// Serves the volumes of `shards`, out of `shard_count` that the cluster has: names of others
    /// are unknown here. All requests together hold what `budget` has. `shutdown` ends every
    /// connection.
    #[must_use]
    pub fn new(
        shard_count: NonZeroU32,
        shards: HashMap<ShardId, ShardClient>,
        volumes: VolumesConfig,
        budget: ByteBudget,
        shutdown: Shutdown,
    ) -> Self {
        let metrics = NbdMetrics::new();
        Self { shard_count, shards, volumes, budget, shutdown, metrics }
    }
}
