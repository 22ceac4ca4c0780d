//! Reaching a shard, wherever its leader is.
//!
//! ```text
//!  NBD session ─▶ SessionClient ─┬─ leader here ──▶ Local ──▶ group task, store
//!                  (what is      │
//!                   pending)     └─ leader there ─▶ Remote ══ gRPC ══▶ session_service
//!                                                                            │
//!                                                                  Local ◀───┘
//! ```
//!
//! - [`session`]: [`SessionClient`], one session over one attachment at a time, kept through moves
//!   of the leader.
//! - [`local`], [`remote`]: the two kinds of attachment. [`links`]: connections to other nodes.
//! - [`read`]: reads under the leader's lease or behind a barrier. [`room`]: room on its disk.
//! - [`wire`]: between the types here and those of the protocol.
//! - This file: [`ShardClient`], for commands and look-ups that need no session.
//!
//! A node's own budget of request bytes is held by its clients' requests until they are answered,
//! whoever leads. What other nodes' requests hold here is counted apart (see `session_service`):
//! with one budget for both, two nodes that forward to each other could wait for one another.

mod expiry;
mod links;
pub(crate) mod local;
pub(crate) mod read;
mod remote;
pub(crate) mod room;
pub(crate) mod session;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use metrics::Counter;
use nbd_service::Shutdown;
use nbd_session::QueryId;
use nbd_store::{Outcome, Owner, SpaceGrant, VolumeId, VolumeInfo, command};
use nbd_topology::ClusterName;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use self::local::Share;
use self::read::QueryData;
use self::wire::Elsewhere;
use crate::group_task::{Answer, GroupHandle, GroupStopped, LeaderAt, Route, RunError};

pub(crate) use expiry::{AttachedSessions, expire_sessions};
pub(crate) use links::Links;
pub(crate) use read::{BlockRepair, Fetched, ReadData};
pub(crate) use room::Room;
pub(crate) use session::{Event, SessionClient, SessionEnd, Signal};

/// Time that one attempt to reach a leader has. A leader that lives answers within milliseconds;
/// one that has no majority steps down well before this.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// Wait after a failed attempt while nothing new is known of the leader: doubled each time, up to
/// [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(20);

/// Longest wait between attempts: what a failover may be late by when news of it comes late.
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// Time that the end of a session is tried to be put into the log. A session that stays open costs
/// memory, until its node starts again or it expires.
const CLOSE_MAX: Duration = Duration::from_secs(30);

/// The same once the node stops: its next start ends what is left.
const CLOSE_STOPPING_MAX: Duration = Duration::from_millis(500);

/// Why a request was not carried out, when it is not the log that says no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failed {
    /// No room on the disk.
    NoSpace,
    /// The disk failed, or what it holds is damaged.
    Io,
}

/// What an attachment has to say.
#[derive(Debug)]
pub(crate) enum Answered {
    /// What came of a mutation that was proposed.
    Mutation { seq: u64, answer: Answer },
    /// There is room for a mutation: it may be proposed.
    Granted { seq: u64, command: Bytes, share: Share, grant: SpaceGrant },
    /// A mutation was not proposed.
    Refused { seq: u64, failed: Failed },
    /// What came of a query.
    Query { id: QueryId, result: Result<QueryData, Failed> },
    /// Some bytes of a read, behind those that came before.
    Piece { id: QueryId, piece: ReadData },
    /// Nothing more will come: whoever was asked does not lead any more, or cannot be reached.
    Lost,
}

impl Answered {
    /// Whether it shows that whoever is attached to does lead.
    const fn is_from_leader(&self) -> bool {
        match self {
            Self::Mutation { answer: Answer::Outcome(_), .. }
            | Self::Refused { .. }
            | Self::Query { .. }
            | Self::Piece { .. } => true,
            Self::Mutation { .. } | Self::Granted { .. } | Self::Lost => false,
        }
    }
}

/// What all that reaches shards from this node shares.
#[derive(Debug)]
pub(crate) struct Access {
    pub(crate) cluster: ClusterName,
    /// This life of this node, as sessions name their owner.
    pub(crate) owner: Owner,
    pub(crate) links: Links,
    pub(crate) room: Room,
    pub(crate) repair: Arc<dyn BlockRepair>,
    pub(crate) shutdown: Shutdown,
    /// Reads that met a damaged block.
    pub(crate) corrupt: CorruptReads,
}

/// A counter with a `Debug`.
#[derive(Clone)]
pub(crate) struct CorruptReads(pub(crate) Counter);

impl std::fmt::Debug for CorruptReads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CorruptReads")
    }
}

impl CorruptReads {
    fn increment(&self, by: u64) {
        self.0.increment(by);
    }
}

/// Reaches one shard of which this node hosts a replica. Clones are cheap.
#[derive(Debug, Clone)]
pub(crate) struct ShardClient {
    pub(crate) group: GroupHandle,
    pub(crate) access: Arc<Access>,
    /// The sessions attached to this node's replica while it leads.
    pub(crate) attached: AttachedSessions,
}

impl Route {
    /// The leader, if there is one that can be asked.
    fn usable(&self) -> Option<&LeaderAt> {
        self.leader.as_ref().filter(|leader| !leader.local || self.serving)
    }

    /// Whether another leader than `asked` is known by now.
    fn leads_away_from(&self, asked: &LeaderAt) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader != asked)
    }
}

/// The wait between attempts.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    const fn new() -> Self {
        Self(BACKOFF_MIN)
    }

    fn next(&mut self) -> Instant {
        let wait = self.0;
        self.0 = (wait * 2).min(BACKOFF_MAX);
        Instant::now() + wait
    }
}

impl ShardClient {
    /// Runs a command through the leader, and again until it has an outcome: only for commands that
    /// may take effect twice without harm. Waits for a leader as long as there is none.
    pub(crate) async fn run(&self, command: &Bytes) -> Result<Outcome, GroupStopped> {
        self.at_leader(|leader| self.run_at(leader, command.clone())).await
    }

    /// The volume of this name, as of now.
    pub(crate) async fn describe(&self, name: &str) -> Result<Option<VolumeInfo>, GroupStopped> {
        self.at_leader(|leader| async move {
            if leader.local {
                let find = || self.group.reader().volume_by_name(name);
                return Ok(self.look(find).await?);
            }
            wire::describe(&self.access, self.group.shard(), &leader, name).await
        })
        .await
    }

    /// All volumes of the shard, oldest first.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeInfo>, GroupStopped> {
        let mut volumes = Vec::<VolumeInfo>::new();
        loop {
            let after = volumes.last().map_or(VolumeId(0), |volume| volume.id);
            let (page, last) = self
                .at_leader(|leader| async move {
                    if leader.local {
                        // The rest at once.
                        let mut all = self.look(|| self.group.reader().volumes()).await?;
                        all.retain(|volume| volume.id > after);
                        return Ok((all, true));
                    }
                    let page = wire::list(&self.access, self.group.shard(), &leader, after).await?;
                    let last = page.is_empty();
                    Ok((page, last))
                })
                .await?;
            volumes.extend(page);
            if last {
                return Ok(volumes);
            }
        }
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

    /// Asks the leader, whoever that is by now, until it has answered.
    async fn at_leader<T, F, Asking>(&self, ask: F) -> Result<T, GroupStopped>
    where
        F: Fn(LeaderAt) -> Asking,
        Asking: Future<Output = Result<T, Elsewhere>>,
    {
        let mut route = self.group.route();
        let mut backoff = Backoff::new();
        loop {
            let leader = route.borrow_and_update().usable().cloned();
            let until = match leader {
                None => None,
                Some(leader) => tokio::select! {
                    asked = tokio::time::timeout(ATTEMPT_MAX, ask(leader.clone())) => match asked {
                        Ok(Ok(answer)) => return Ok(answer),
                        Ok(Err(Elsewhere::Stopped)) => return Err(GroupStopped),
                        Ok(Err(Elsewhere::NotLeader | Elsewhere::Lost)) | Err(_) => {
                            Some(backoff.next())
                        }
                    },
                    moved = moved_from(&mut route, &leader) => {
                        moved?;
                        continue;
                    }
                },
            };
            tokio::select! {
                changed = route.changed() => changed.map_err(|_| GroupStopped)?,
                () = sleep_until(until) => {}
            }
        }
    }

    async fn run_at(&self, leader: LeaderAt, command: Bytes) -> Result<Outcome, Elsewhere> {
        if leader.local {
            return Ok(self.group.run(command).await?);
        }
        wire::run(&self.access, self.group.shard(), &leader, command).await
    }
}

/// Waits until another leader than `asked` is known.
async fn moved_from(
    route: &mut watch::Receiver<Route>,
    asked: &LeaderAt,
) -> Result<(), GroupStopped> {
    route.wait_for(|now| now.leads_away_from(asked)).await.map(|_| ()).map_err(|_| GroupStopped)
}

/// Sleeps until `until`; for ever if there is no such time.
async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Ends the sessions that earlier lives of this node have left in a shard: what their clients had
/// in flight is over. To be spawned once at start, for each shard; it waits for a leader.
pub(crate) async fn end_earlier_sessions(shard: ShardClient) {
    let command = command::encode_end_sessions(shard.access.owner);
    let stop = shard.access.shutdown.started();
    tokio::select! {
        ended = shard.run(&command) => {
            if let Ok(outcome) = ended {
                info!(shard = %shard.group.shard(), ?outcome, "ended earlier sessions");
            }
        }
        () = stop => warn!(shard = %shard.group.shard(), "earlier sessions were not ended"),
    }
}
