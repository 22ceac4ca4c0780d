//! The NBD server: from an accepted connection to proposals and replies.
//!
//! - [`listener`]: accepts, bounds the number of connections, sets socket options.
//! - [`attach`]: carries the handshake, finds or creates the volume, opens the session.
//! - [`session`]: the transmission phase, one task a connection.
//! - [`splice`]: instead of it, bytes moved between the client and a replica's NBD server.
//! - [`in_flight`]: the requests a session has under way.
//! - [`trace`]: what is told of a request that is traced.
//! - [`output`]: replies on their way to the client.
//! - [`handover`]: sessions that go on in another process. [`connections`]: how many there are.

mod attach;
mod connections;
mod handover;
mod in_flight;
mod listener;
mod output;
mod session;
mod splice;
mod trace;

use std::collections::HashMap;
use std::num::NonZeroU32;

use nbd_service::Shutdown;
use nbd_service::trace::Tracer;
use nbd_topology::ShardId;
use tokio::sync::watch;

use self::splice::Splicing;
use crate::budget::ByteBudget;
use crate::metrics::NbdMetrics;
use crate::route::NbdAt;
use crate::sessions::Sessions;
use crate::shard_client::ShardClient;
use crate::volumes::VolumesConfig;

pub use connections::Connections;
pub use handover::{
    Adopted, Adopter, Handover, MalformedParcel, NotAdopted, Offer, PARCEL_BYTES_MAX,
};
pub use listener::Listener;
pub use output::Output;

/// What all connections of a process share.
#[derive(Debug)]
pub struct Front {
    pub(crate) shard_count: NonZeroU32,
    /// The shards whose volumes can be attached to here, whoever leads them.
    pub(crate) shards: HashMap<ShardId, ShardClient>,
    pub(crate) volumes: VolumesConfig,
    pub(crate) budget: ByteBudget,
    pub(crate) shutdown: Shutdown,
    pub(crate) handover: Handover,
    pub(crate) metrics: NbdMetrics,
    pub(crate) sessions: Sessions,
    pub(crate) tracer: Tracer,
    /// Set if clients' bytes are moved to a replica, instead of being understood here.
    pub(crate) splicing: Option<Splicing>,
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
        let handover = Handover::new(&shutdown);
        Self {
            shard_count,
            shards,
            volumes,
            budget,
            shutdown,
            handover,
            metrics: NbdMetrics::new(),
            sessions: Sessions::default(),
            tracer: Tracer::off(),
            splicing: None,
        }
    }

    /// Instead of carrying requests, attaches each client to a replica and moves bytes between the
    /// two within the kernel. `servers` says where each shard's volumes are served, best first, now
    /// and as that changes. A client whose replica is lost is disconnected.
    #[must_use]
    pub fn splicing(self, servers: HashMap<ShardId, watch::Receiver<Vec<NbdAt>>>) -> Self {
        Self { splicing: Some(Splicing::new(servers)), ..self }
    }

    /// Traces some of the requests.
    #[must_use]
    pub fn traced(self, tracer: Tracer) -> Self {
        Self { tracer, ..self }
    }

    /// Who is attached here.
    #[must_use]
    pub fn sessions(&self) -> Sessions {
        self.sessions.clone()
    }

    /// Hands its sessions over to another process, should one ask for them.
    #[must_use]
    pub fn handover(&self) -> Handover {
        self.handover.clone()
    }
}
