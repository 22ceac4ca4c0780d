//! The replicas that this node hosts, as front ends use them: this node's own, and, by way of
//! `session_service`, those of others.
//!
//! - [`session`]: one attached session. [`attachments`]: all of them, whom they are for and what
//!   they move.
//! - [`read`]: reads under the leader's lease or behind a barrier. [`room`]: room on its disk.
//! - [`expiry`]: the end of sessions whose front end never comes back.
//! - This file: [`HostedShard`], for commands and look-ups that need no session.

mod attachments;
mod expiry;
pub(crate) mod read;
mod room;
mod session;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use metrics::{Counter, counter};
use nbd_front::{
    Access, Answered, Attaching, Boxed, LocalAttachment, LocalReplica, RunError, ShardClient,
};
use nbd_service::Shutdown;
use nbd_service::trace::Tracer;
use nbd_store::{Outcome, VolumeInfo};
use tokio::sync::mpsc;

use crate::group_task::GroupHandle;
use crate::metrics::ReplyMetrics;

pub(crate) use attachments::{
    Attachment, Attachments, Moved, Underway, VolumesMoved, end_attachments,
};
pub(crate) use expiry::expire_sessions;
pub(crate) use read::{BlockRepair, Fetched};
pub(crate) use room::Room;
pub(crate) use session::{HostedSession, lead_query};

/// What all shards of this node share for their front ends.
#[derive(Debug)]
pub(crate) struct Hosting {
    pub(crate) room: Room,
    pub(crate) repair: Arc<dyn BlockRepair>,
    pub(crate) shutdown: Shutdown,
    pub(crate) corrupt: CorruptReads,
    pub(crate) tracer: Tracer,
    pub(crate) replies: ReplyMetrics,
}

/// Counts reads that met a damaged block.
#[derive(Clone)]
pub(crate) struct CorruptReads(Counter);

impl fmt::Debug for CorruptReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CorruptReads")
    }
}

impl CorruptReads {
    pub(crate) fn new() -> Self {
        Self(counter!("store_corrupt_reads_total"))
    }

    fn increment(&self) {
        self.0.increment(1);
    }
}

/// This node's replica of one shard. Clones are cheap, and the same.
#[derive(Debug, Clone)]
pub(crate) struct HostedShard {
    pub(crate) group: GroupHandle,
    /// The sessions attached to it while it leads.
    pub(crate) attached: Attachments,
    pub(crate) hosting: Arc<Hosting>,
}

impl HostedShard {
    /// Reaches the shard wherever its leader is.
    pub(crate) fn client(&self, access: Arc<Access>) -> ShardClient {
        let (shard, route) = (self.group.shard(), self.group.route());
        ShardClient::new(shard, route, Some(Arc::new(self.clone())), access)
    }

    /// Looks something up in this replica's memory, as its leader.
    pub(crate) async fn look<T>(&self, look: impl Fn() -> T) -> Result<T, RunError> {
        if let Some(permit) = self.group.read_permit() {
            let found = look();
            if permit.holds() {
                return Ok(found);
            }
        }
        self.group.barrier().await?;
        Ok(look())
    }

    /// The volume of this name, as of now.
    pub(crate) async fn describe(&self, name: &str) -> Result<Option<VolumeInfo>, RunError> {
        self.look(|| self.group.reader().volume_by_name(name)).await
    }

    /// All volumes of the shard as of now, oldest first.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeInfo>, RunError> {
        self.look(|| self.group.reader().volumes()).await
    }
}

impl LocalReplica for HostedShard {
    fn run(&self, command: Bytes) -> Boxed<'_, Result<Outcome, RunError>> {
        Box::pin(self.group.run(command))
    }

    fn describe<'a>(&'a self, name: &'a str) -> Boxed<'a, Result<Option<VolumeInfo>, RunError>> {
        Box::pin(self.describe(name))
    }

    fn volumes(&self) -> Boxed<'_, Result<Vec<VolumeInfo>, RunError>> {
        Box::pin(self.volumes())
    }

    fn attach(
        &self,
        session: Attaching,
        answers: mpsc::Sender<Answered>,
    ) -> Box<dyn LocalAttachment> {
        Box::new(HostedSession::new(self.clone(), session, answers))
    }
}
