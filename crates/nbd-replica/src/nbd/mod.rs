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
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use nbd_proto::NbdError;
use nbd_service::Shutdown;
use nbd_store::{Outcome, SpaceGauge, SpaceGrant};
use nbd_topology::ShardId;

use crate::budget::ByteBudget;
use crate::checkpoint_thread::CheckpointHandle;
use crate::config::VolumesConfig;
use crate::group_task::GroupHandle;
use crate::metrics::NbdMetrics;

pub(crate) use listener::Listener;

/// What all connections of a node share.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) shard_count: NonZeroU32,
    pub(crate) groups: HashMap<ShardId, GroupHandle>,
    pub(crate) volumes: VolumesConfig,
    pub(crate) budget: ByteBudget,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) checkpoints: CheckpointHandle,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: NbdMetrics,
}

/// Something a session asked for has come to an end. `token` is the request's place in the
/// session's table.
#[derive(Debug)]
pub(crate) enum Completion {
    /// A command was applied.
    Mutation { token: usize, outcome: Outcome },
    /// There is room for a request's mutations: they may be proposed.
    Granted { token: usize, grant: SpaceGrant, commands: Vec<Bytes> },
    /// A request's mutations were not proposed, for want of room.
    Refused { token: usize, error: NbdError },
    /// A read that had to wait for the disk.
    Read { token: usize, result: Result<ReadData, NbdError> },
    /// Block status that had to wait for the disk.
    Status { token: usize, result: Result<Vec<nbd_proto::Extent>, NbdError> },
}

/// Bytes of a read with the runs in them that are known to be zero.
#[derive(Debug)]
pub(crate) struct ReadData {
    pub(crate) bytes: Vec<u8>,
    /// Runs in order, without gaps, relative to the read's start; `true` for a run of zeroes.
    pub(crate) runs: Vec<(Range<usize>, bool)>,
}
